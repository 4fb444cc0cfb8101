"""What the generators' networks have in common: DiT's and REPA's see latents at a time, MaskGIT's see tokens."""

import dataclasses

import jax
import jax.numpy as jnp

from eqvae_jax.generators import dit, maskgit, repa

# How a model is computed, not which one it is.
HOW = ("dtype", "remat", "scan", "attention", "parent", "name")


def describe(model):
    """The model as plain values, {"input_size": 32, ...}: what a run's config keeps of it."""
    return {name: getattr(model, name) for name in names_of(model)}


def from_description(values, kind):
    """The model of a kind (DiT, REPA, MaskGIT, ...) that `describe` described; entries that are no fields are left out.

    Raises ValueError with the fields that are missing or are no numbers.
    """
    wrong = [name for name in names_of(kind) if not isinstance(values.get(name), int | float)]
    if wrong:
        raise ValueError(f"the description of a {kind.__name__} lacks {', '.join(wrong)}, or they are no numbers")
    return kind(**{name: values[name] for name in names_of(kind)})


def as_kind(model, kind, **fields):
    """The model as one of a class that has more fields, which are given."""
    same = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)
            if field.name not in ("parent", "name")}
    return kind(**same | fields)


def names_of(kind):
    return [field.name for field in dataclasses.fields(kind) if field.name not in HOW]


def sees_tokens(model):
    """Whether it is a MaskGIT, of either network."""
    return hasattr(model, "codes")


def latent_shape(model):
    """Of one latent of a generator: (h,w,C), or (h,w) of tokens."""
    side = (model.input_size, model.input_size)
    return side if sees_tokens(model) else (*side, model.in_channels)


def example_inputs(model):
    """Zeros that a generator's network takes: (x_t, t, labels), or (ids, labels), of one example."""
    labels, shape = jnp.zeros(1, jnp.int32), (1, *latent_shape(model))
    if sees_tokens(model):
        return jnp.zeros(shape, jnp.int32), labels
    return jnp.zeros(shape), jnp.zeros(1), labels


def training_flops(model):
    """FLOPs of one image in training: three forward passes, at two FLOPs a multiply-accumulate.

    Without what remat recomputes, and of REPA without the frozen encoder.
    """
    macs = (maskgit if sees_tokens(model) else dit).forward_macs(model)
    macs += repa.projector_macs(model) if isinstance(model, repa.REPA) else 0
    return 6 * macs


def predict(model, params, x_t, t, labels, dropout=None):
    """The network's output: of `dit.DiT` and the like, or of MaskGIT's, which is told no time.

    dropout: (B,) keys while training, of each example its own; DiT's have no dropout.
    """
    if not sees_tokens(model):
        return model.apply({"params": params}, x_t, t, labels)
    if dropout is None:
        return model.apply({"params": params}, x_t, labels)
    one = lambda ids, label, key: model.apply({"params": params}, ids[None], label[None], train=True,
                                              rngs={"dropout": key})
    output = jax.vmap(one)(x_t, labels, dropout)                              # (B, 1, N, K)
    return output._replace(prediction=output.prediction[:, 0])
