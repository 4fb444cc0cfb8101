"""The generators' task for the one training loop: DiT, SiT, REPA and MaskGIT on cached latents."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from eqvae_jax.generators.dit import drop_labels
from eqvae_jax.generators.draws import example_keys, normal
from eqvae_jax.generators.networks import example_inputs, latent_shape, predict, training_flops
from eqvae_jax.generators.repa import alignment_loss
from eqvae_jax.training.loop import Task
from eqvae_jax.training.optimizer import ema_update, guarded, make_optimizer
from eqvae_jax.training.programs import call
from eqvae_jax.training.sharding import replicate, state_shardings, whole
from eqvae_jax.training.state import TrainState, state_shapes

ROLE = "generator"  # in the state's dicts


def check(config, model, process, shape, classes, mesh):
    """Raises ValueError, naming the config's field, where numbers do not fit together; before anything is compiled.

    shape, classes: of the latents, (h, w, C) or (h, w) of tokens, and how many labels they have.
    """
    micro = mesh.size * config.training.accumulate
    if config.training.accumulate < 1 or config.data.batch_size < 1 or config.data.batch_size % micro:
        raise ValueError(f"data.batch_size is {config.data.batch_size}; it must be a multiple of {mesh.size} devices x "
                         f"training.accumulate {config.training.accumulate}.")
    if config.data.evaluation_batch_size < 1:
        raise ValueError(f"data.evaluation_batch_size is {config.data.evaluation_batch_size}; it must be at least 1.")
    if not 0 <= config.label_dropout < 1:
        raise ValueError(f"label_dropout is {config.label_dropout}; it is a share, 0 or more and below 1.")
    if model.classes < classes:
        raise ValueError(f"model.classes is {model.classes}, and the latents have {classes} classes; 0 takes as many.")
    if process.kind == "masking":
        if shape != latent_shape(model):
            raise ValueError(f"the model takes {latent_shape(model)} tokens; the latents are {shape}.")
        return
    if shape[0] != shape[1] or shape[0] % model.patch_size:
        raise ValueError(f"the latents are {shape[0]} x {shape[1]}; this model takes squares whose side divides into "
                         f"patches of {model.patch_size}: choose another model.preset or model.patch_size.")
    if (model.input_size, model.in_channels, model.out_channels) != (shape[0], shape[2], process.outputs(shape[2])):
        raise ValueError(f"the model takes {model.input_size} x {model.input_size} x {model.in_channels} and gives "
                         f"{model.out_channels} channels; the latents are {shape}.")


def generator_task(config, model, process, space, mesh, *, alignment=None, preview=None, measures=None,
                   init_params=None) -> Task:
    """Training of a generator on posteriors of latents, or on tokens.

    Args:
      config: reads `seed`, `label_dropout`, `optimizer`, `ema_decay`, `training.{accumulate,steps}`, `mesh`.
      model: (x, t, labels) -> an output with `prediction`, as `dit.DiT`, or a `maskgit.MaskGIT`; `model.classes` is the
        label of no class.
      process: a `process.Process`. space: its `to_model` gives latents their scale; tokens have none.
      alignment: a `repa.Alignment`, for a model that also says `projected` (B,N,Z) and batches with `image`, uint8
        (B,H,W,3); its loss is then logged as "alignment", the process's own as "denoising".
      preview: (params, batch) -> {name: images}, and measures: name -> (params) -> float, of the averaged weights.
      init_params: weights to start from; None draws them.
    """
    if alignment:
        alignment = alignment._replace(params=replicate(mesh, alignment.params),
                                       encode=jax.tree_util.Partial(alignment.encode))
    optimizer, schedule = make_optimizer(config.optimizer, config.training.steps)
    root, accumulate = jax.random.key(config.seed), config.training.accumulate

    def init(params, key):
        if params is None:
            params = model.init(key, *example_inputs(model))["params"]
        params = {ROLE: jax.tree.map(jnp.asarray, params)}
        ema = jax.tree.map(jnp.array, params) if config.ema_decay else None  # a copy: a donated buffer has one owner
        return TrainState.create(params, {ROLE: optimizer.init(params[ROLE])}, ema)

    init = jax.tree_util.Partial(init, init_params)
    shardings = state_shardings(mesh, state_shapes(init, root), config.mesh)

    def latents(batch, key):
        if "tokens" in batch:
            return batch["tokens"]                                                     # (B,h,w)
        noise = normal(example_keys(key, batch["index"]), 0, batch["mean"].shape[1:])
        return space.to_model(batch["mean"] + batch["std"] * noise)                    # (B,h,w,C)

    def losses(params, alignment, batch, labels, key, dropout=None):
        params = whole(params, shardings.params[ROLE])
        posterior, rest = jax.random.split(key)
        seen = process.corrupt(latents(batch, posterior), rest, batch["index"])
        output = predict(model, params, seen.x_t, seen.t, labels, dropout)
        values = process.loss(output.prediction, seen)
        if alignment:
            features = alignment.encode(alignment.params, batch["image"])              # (B,N,Z)
            distance = alignment_loss(output.projected, features)
            values |= {"denoising": values["loss"], "alignment": distance,
                       "loss": values["loss"] + alignment.weight * distance}
        return values

    def gradients(params, alignment, batch, key):
        unlabelled, rest = jax.random.split(key)
        keys = example_keys(unlabelled, batch["index"])
        labels = drop_labels(keys, batch["label"], config.label_dropout, model.classes)
        # A third key beside those of split(key), which are as they were before there was dropout.
        drops = getattr(model, "dropout", 0)
        dropout = example_keys(jax.random.fold_in(key, 2), batch["index"]) if drops else None

        def loss(params):
            values = jax.tree.map(jnp.mean, losses(params, alignment, batch, labels, rest, dropout))
            return values["loss"], values

        grads, values = jax.grad(loss, has_aux=True)(params)
        return grads, values

    def accumulated(params, alignment, batch, key):
        if accumulate == 1:
            return gradients(params, alignment, batch, key)
        # Strided, so that each device keeps its own examples.
        split = lambda a: jnp.moveaxis(a.reshape(-1, accumulate, *a.shape[1:]), 1, 0)
        one = lambda micro: gradients(params, alignment, micro, key)  # an example's draws come from its own index
        parts = jax.lax.map(one, jax.tree.map(split, batch))
        return jax.tree.map(lambda part: part.mean(0), parts)

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def update(state, alignment, batch, step):
        params = state.params[ROLE]
        grads, metrics = accumulated(params, alignment, batch, jax.random.fold_in(root, step))
        change, opt_state = optimizer.update(grads, state.opt_state[ROLE], params)
        new = {ROLE: optax.apply_updates(params, change)}
        ema = state.ema and ema_update(state.ema, new, config.ema_decay)
        norm = optax.global_norm(grads)
        metrics |= {"gradient_norm": norm, "learning_rate": schedule(state.step - state.skipped)}
        moved = state.replace(step=state.step + 1, params=new, opt_state={ROLE: opt_state}, ema=ema)
        return guarded(jnp.isfinite(norm), moved, state), metrics

    def weights(state):
        return (state.ema or state.params)[ROLE]

    @jax.jit
    def evaluate(params, alignment, batch):
        key = jax.random.fold_in(root, 2**32 - 1)  # of no training step: the same times and noise at each evaluation
        return losses(params, alignment, batch, batch["label"], key)

    show = preview or (lambda params, batch: {})
    of_weights = lambda measure: lambda state: measure(weights(state))
    return Task(init, lambda state, batch, step, run=call: run(update, state, alignment, batch, step),
                lambda state, batch: evaluate(weights(state), alignment, batch),
                lambda state, batch: show(weights(state), batch), shardings,
                measures={name: of_weights(measure) for name, measure in (measures or {}).items()},
                model_flops=lambda: training_flops(model))
