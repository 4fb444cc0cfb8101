"""What a checkpoint keeps of its training loss: the discriminator, LPIPS and the log-variance of the reconstruction."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eqvae_jax.autoencoders.discriminator import PatchDiscriminator
from eqvae_jax.weights import ldm_files
from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.lpips import lpips_parameters
from eqvae_jax.weights.references import parse_reference
from eqvae_jax.weights.tables import LEAVES, check_parameters, read_parameters


class Critic(NamedTuple):
    """Variables and fields of an `autoencoders.discriminator.PatchDiscriminator`; float32 NumPy arrays."""

    params: dict
    batch_stats: dict
    width: int
    layers: int


class LossWeights(NamedTuple):
    """What there is, None for the rest. lpips: as `load_lpips` gives it. logvar: of LDM's loss, in most files 0."""

    discriminator: Critic | None = None
    lpips: dict | None = None
    logvar: float | None = None


def load_loss(reference, *, discriminator=True, lpips=True):
    """LossWeights of an autoencoder reference: what it holds of the loss it was trained with.

    Checkpoints of latent-diffusion, EQ-VAE and taming carry `loss.*`; runs of ours the logvar, and a discriminator if
    they trained one. discriminator, lpips: False leaves that network alone, whatever state it is in.
    Raises WeightsError where the file cannot be read, or a network in it is incomplete or of another form.
    """
    reference = parse_reference(reference)
    if reference.kind == "workdir":
        return trained_loss(reference.rest, discriminator)
    if reference.kind not in ("ldm", "taming"):
        return LossWeights()
    parts = {"discriminator.main.": {}, "perceptual_loss.": {}}
    loss = ldm_files.read_contents(reference.rest).loss
    for name, value in loss.items():
        for prefix, tensors in parts.items():
            if name.startswith(prefix):
                tensors[name.removeprefix(prefix)] = value
    judge, perceptual = parts.values()
    logvar = loss.get("logvar")
    if logvar is not None and logvar.size != 1:
        raise WeightsError(f"{reference}: loss.logvar has {logvar.size} values; it should be one number")
    return LossWeights(
        read_critic(judge, f"{reference}, discriminator") if judge and discriminator else None,
        lpips_parameters(perceptual, f"{reference}, LPIPS") if perceptual and lpips else None,
        None if logvar is None else float(logvar.reshape(())),
    )


def read_critic(tensors, where):
    """A Critic from the tensors of taming's NLayerDiscriminator, "0.weight" and so on.

    Its layers are numbered in a row: convolution 0 and an activation, then convolution 3i - 1, normalisation 3i and an
    activation for each i, then the last convolution. num_batches_tracked, a counter nobody reads, is dropped.
    """
    tensors = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    norms = {int(match[1]) for match in (re.fullmatch(r"(\d+)\.running_mean", name) for name in tensors) if match}
    first = tensors.get("0.weight")
    if first is None or first.ndim != 4 or not norms or max(norms) > 3 * len(norms):
        raise WeightsError(f"{where}: not a PatchGAN with batch normalisation; it holds {', '.join(list(tensors)[:5])}")
    return critic(lambda shapes: read_parameters(tensors, shapes, lambda p: critic_key(p, len(norms)), where),
                  first.shape[0], len(norms))


def critic(fill, width, layers):
    """The Critic of these fields, with variables that `fill` makes of a tree of their shapes."""
    shapes = jax.eval_shape(
        PatchDiscriminator(width, layers).init, jax.random.key(0), jnp.zeros((1, 3 * 2**layers, 3 * 2**layers, 3)))
    filled = fill({"params": shapes["params"], "batch_stats": shapes["batch_stats"]})
    return Critic(filled["params"], filled["batch_stats"], width, layers)


def critic_key(path, layers):
    """The name, in NLayerDiscriminator's sequence, of our path ("params" or "batch_stats", layer, leaf)."""
    _, layer, leaf = path
    kind, _, number = layer.partition("_")
    index = 3 * layers + 2 if number == "out" else max(3 * int(number) - (kind == "conv"), 0)
    return f"{index}.{LEAVES[leaf]}"


def trained_loss(workdir, discriminator):
    """LossWeights of a run of ours: its logvar and, unless that is not wanted, the Critic it trained, if it did."""
    from eqvae_jax.training.checkpoint import load_params  # needs Orbax, which is slow to import

    try:
        params, config, step = load_params(workdir, "params")
        logvar = config.get("loss", {}).get("logvar")
        if "discriminator" not in params or not discriminator:
            return LossWeights(logvar=logvar)
        variables = {"params": params["discriminator"],
                     "batch_stats": load_params(workdir, "buffers", step)[0]["discriminator"]}
    except (FileNotFoundError, KeyError) as error:
        raise WeightsError(f"workdir:{workdir}: {error}") from error

    def fill(shapes):
        check_parameters(f"workdir:{workdir}, discriminator", variables, shapes)
        return variables

    layers = len(variables["batch_stats"])
    return LossWeights(critic(fill, variables["params"]["conv_0"]["kernel"].shape[-1], layers), logvar=logvar)
