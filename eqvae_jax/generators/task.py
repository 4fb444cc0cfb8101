"""The generators' task for the one training loop: DiT and SiT on cached latents."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from eqvae_jax.generators.dit import drop_labels
from eqvae_jax.generators.process import example_keys, normal
from eqvae_jax.training.loop import Task
from eqvae_jax.training.optimizer import ema_update, guarded, make_optimizer
from eqvae_jax.training.sharding import state_shardings
from eqvae_jax.training.state import TrainState

ROLE = "generator"  # in the state's dicts


def check(config, model, process, shape, mesh):
    """Raises ValueError, naming the config's field, where numbers do not fit together; before anything is compiled.

    shape: (h, w, C) of the latents.
    """
    micro = mesh.size * config.training.accumulate
    if config.training.accumulate < 1 or config.data.batch_size < 1 or config.data.batch_size % micro:
        raise ValueError(f"data.batch_size is {config.data.batch_size}; it must be a multiple of {mesh.size} devices x "
                         f"training.accumulate {config.training.accumulate}.")
    if config.data.evaluation_batch_size < 1 or config.data.evaluation_batch_size % mesh.size:
        raise ValueError(f"data.evaluation_batch_size is {config.data.evaluation_batch_size}; it must be a multiple "
                         f"of the {mesh.size} devices.")
    if not 0 <= config.label_dropout < 1:
        raise ValueError(f"label_dropout is {config.label_dropout}; it is a share, 0 or more and below 1.")
    if shape[0] != shape[1] or shape[0] % model.patch_size:
        raise ValueError(f"the latents are {shape[0]} x {shape[1]}; this model takes squares whose side divides into "
                         f"patches of {model.patch_size}: choose another model.preset or model.patch_size.")
    if (model.input_size, model.in_channels, model.out_channels) != (shape[0], shape[2], process.outputs(shape[2])):
        raise ValueError(f"the model takes {model.input_size} x {model.input_size} x {model.in_channels} and gives "
                         f"{model.out_channels} channels; the latents are {shape}.")


def generator_task(config, model, process, space, mesh, *, preview=None, measures=None, init_params=None) -> Task:
    """Training of a generator on posteriors of latents.

    Args:
      config: reads `seed`, `label_dropout`, `optimizer`, `ema_decay`, `training.{accumulate,steps}`, `mesh`.
      model: (x, t, labels) -> an output with `prediction`, as `dit.DiT`; `model.classes` is the label of no class.
      process: a `process.Process`. space: its `to_model` gives latents their scale.
      preview: (params, batch) -> {name: images}, and measures: name -> (params) -> float, of the averaged weights.
      init_params: weights to start from; None draws them.
    """
    optimizer, schedule = make_optimizer(config.optimizer, config.training.steps)
    root, accumulate = jax.random.key(config.seed), config.training.accumulate

    def init(params, key):
        if params is None:
            x = jnp.zeros((1, model.input_size, model.input_size, model.in_channels))
            params = model.init(key, x, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]
        params = {ROLE: jax.tree.map(jnp.asarray, params)}
        ema = jax.tree.map(jnp.array, params) if config.ema_decay else None  # a copy: a donated buffer has one owner
        return TrainState.create(params, {ROLE: optimizer.init(params[ROLE])}, ema)

    init = jax.tree_util.Partial(init, init_params)
    shardings = state_shardings(mesh, jax.eval_shape(init, root), config.mesh.min_shard_size)

    def losses(params, batch, labels, key):
        posterior, rest = jax.random.split(key)
        noise = normal(example_keys(posterior, batch["index"]), 0, batch["mean"].shape[1:])
        x = space.to_model(batch["mean"] + batch["std"] * noise)                       # (B,h,w,C)
        network = lambda x_t, t: model.apply({"params": params}, x_t, t, labels).prediction
        return process.loss(network, x, rest, batch["index"])

    def gradients(params, batch, key):
        dropout, rest = jax.random.split(key)
        keys = example_keys(dropout, batch["index"])
        labels = drop_labels(keys, batch["label"], config.label_dropout, model.classes)

        def loss(params):
            values = jax.tree.map(jnp.mean, losses(params, batch, labels, rest))
            return values["loss"], values

        grads, values = jax.grad(loss, has_aux=True)(params)
        return grads, values

    def accumulated(params, batch, key):
        if accumulate == 1:
            return gradients(params, batch, key)
        # Strided, so that each device keeps its own examples.
        split = lambda a: jnp.moveaxis(a.reshape(-1, accumulate, *a.shape[1:]), 1, 0)
        one = lambda micro: gradients(params, micro, key)  # an example's draws come from its index, not its place
        parts = jax.lax.map(one, jax.tree.map(split, batch))
        return jax.tree.map(lambda part: part.mean(0), parts)

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state, batch, step):
        params = state.params[ROLE]
        grads, metrics = accumulated(params, batch, jax.random.fold_in(root, step))
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
    def eval_step(state, batch):
        key = jax.random.fold_in(root, 2**32 - 1)  # of no training step: the same times and noise at each evaluation
        return losses(weights(state), batch, batch["label"], key)

    show = preview or (lambda params, batch: {})
    of_weights = lambda measure: lambda state: measure(weights(state))
    return Task(init, train_step, eval_step, lambda state, batch: show(weights(state), batch), shardings,
                measures={name: of_weights(measure) for name, measure in (measures or {}).items()})
