"""Training of `features.classifier`: cross-entropy with label smoothing, Adam; the loop is training.loop's."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from eqvae_jax.features.classifier import Classifier
from eqvae_jax.training.loop import Task
from eqvae_jax.training.optimizer import ema_update, guarded, make_optimizer
from eqvae_jax.training.programs import call
from eqvae_jax.training.sharding import state_shardings
from eqvae_jax.training.state import TrainState, state_shapes


def to_float(image):
    """uint8 -> float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def check(config, mesh):
    """Raises ValueError, naming the config's field, where numbers do not fit together; before anything is compiled."""
    data, model = config.data, config.model
    if data.batch_size < 1 or data.batch_size % mesh.size:
        raise ValueError(f"data.batch_size is {data.batch_size}; it must be a multiple of the {mesh.size} devices.")
    if data.evaluation_batch_size < 1:  # it is rounded up to the devices
        raise ValueError(f"data.evaluation_batch_size is {data.evaluation_batch_size}; it must be at least 1.")
    if data.image_size < 4:
        raise ValueError(f"data.image_size is {data.image_size}; the network needs 4 pixels.")
    if min(model.channels, model.feature_size) < 1 or model.classes < 2:
        raise ValueError(f"model is {model.to_dict()}; channels and feature_size must be at least 1, classes at least "
                         "2.")
    if not 0 <= config.loss.label_smoothing < 1:
        raise ValueError(f"loss.label_smoothing is {config.loss.label_smoothing}; it must lie in [0, 1).")


def classifier_task(config, mesh) -> Task:
    """Training of a Classifier; config: `model`, `loss`, `optimizer`, `ema_decay`, `training.steps`, `data`, `mesh`."""
    model = Classifier(**config.model)
    optimizer, schedule = make_optimizer(config.optimizer, config.training.steps)
    smoothing = config.loss.label_smoothing

    def init(key):
        image = jnp.zeros((1, config.data.image_size, config.data.image_size, 3))
        params = {"classifier": model.init(key, image)["params"]}
        ema = jax.tree.map(jnp.array, params) if config.ema_decay else None
        return TrainState.create(params, {"classifier": optimizer.init(params["classifier"])}, ema, {})

    shardings = state_shardings(mesh, state_shapes(init, jax.random.key(0)), config.mesh)

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def update(state, batch, step):
        def loss(params):
            logits = model.apply({"params": params}, to_float(batch["image"])).logits
            target = optax.smooth_labels(jax.nn.one_hot(batch["label"], model.classes), smoothing)
            correct = jnp.mean(logits.argmax(-1) == batch["label"])
            return optax.softmax_cross_entropy(logits, target).mean(), correct

        params = state.params["classifier"]
        (value, correct), grads = jax.value_and_grad(loss, has_aux=True)(params)
        change, opt_state = optimizer.update(grads, state.opt_state["classifier"], params)
        new = {"classifier": optax.apply_updates(params, change)}
        ema = state.ema and ema_update(state.ema, new, config.ema_decay)
        norm = optax.global_norm(grads)
        metrics = {"loss": value, "accuracy": correct, "gradient_norm": norm,
                   "learning_rate": schedule(state.step - state.skipped)}
        moved = state.replace(step=state.step + 1, params=new, opt_state={"classifier": opt_state}, ema=ema)
        return guarded(jnp.isfinite(norm), moved, state), metrics

    @jax.jit
    def eval_step(state, batch):
        logits = model.apply({"params": (state.ema or state.params)["classifier"]}, to_float(batch["image"])).logits
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {"accuracy": (logits.argmax(-1) == batch["label"]).astype(jnp.float32), "cross_entropy": entropy}

    def preview(state, batch):
        return {"image": to_float(batch["image"][:8])}

    def train_step(state, batch, step, run=call):
        return run(update, state, batch, step)

    return Task(init, train_step, eval_step, preview, shardings)
