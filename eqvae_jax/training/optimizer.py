"""Adam with the learning-rate schedules of the recipes, the guard against bad updates, the average of the
weights.
"""

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("constant", "cosine")


def make_schedule(name, learning_rate, warmup_steps, steps):
    """Returns count -> learning rate, where count is the number of updates applied before this one.

    Warm-up rises linearly and reaches `learning_rate` at update number `warmup_steps`; its first update uses
    1/warmup_steps of it, not 0, so no step is spent on nothing. "cosine" then falls to 0 at `steps`;
    "constant" stays. Raises ValueError for another name, or where the warm-up leaves no step to decay in.
    """
    if name not in SCHEDULES:
        raise ValueError(f"config.optimizer.schedule is {name!r}; known schedules: {', '.join(SCHEDULES)}")
    if name == "cosine" and warmup_steps >= steps:
        raise ValueError(f"config.optimizer.warmup_steps is {warmup_steps}, but a cosine schedule over "
                         f"config.training.steps = {steps} must end its warm-up before that")

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        rate = jnp.minimum(1.0, (count + 1) / max(warmup_steps, 1))
        if name == "cosine":
            progress = jnp.clip((count - warmup_steps) / (steps - warmup_steps), 0.0, 1.0)
            rate = rate * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return learning_rate * rate

    return schedule


def make_optimizer(config, steps):
    """Returns (optax transformation, schedule) for a `config.optimizer` section and `config.training.steps`.

    Fields: learning_rate, schedule, warmup_steps, b1, b2, eps, weight_decay (decoupled, on every parameter,
    as in torch.optim.AdamW; 0 = Adam), clip_norm (global norm; 0 = off). eps is added outside the root, as
    torch does. The schedule counts applied updates: a skipped one neither moves the weights nor the schedule.
    Raises ValueError naming the field that makes no sense.
    """
    for field, low, high in (("b1", 0.0, 1.0), ("b2", 0.0, 1.0)):
        if not low <= config[field] < high:
            raise ValueError(f"config.optimizer.{field} is {config[field]}; it must lie in [{low}, {high})")
    for field in ("learning_rate", "warmup_steps", "eps", "weight_decay", "clip_norm"):
        if config[field] < 0:
            raise ValueError(f"config.optimizer.{field} is {config[field]}; it must not be negative")
    schedule = make_schedule(config.schedule, config.learning_rate, config.warmup_steps, steps)
    stages = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    stages.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.weight_decay:
        stages.append(optax.add_decayed_weights(config.weight_decay))
    stages.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*stages), schedule


def guarded(finite, new_state, old_state):
    """Returns `new_state` where the update was finite, else `old_state` with the step advanced and the skip
    counted.

    finite: () bool, for example `jnp.isfinite(gradient_norm)`. The step advances either way, because data,
    random keys and tau follow from it: standing still would replay the same bad batch for ever.
    """
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, old_state)
    return kept.replace(
        step=new_state.step,
        skipped=old_state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32),
        skipped_in_a_row=jnp.where(finite, 0, old_state.skipped_in_a_row + 1).astype(jnp.int32),
    )


def ema_update(ema, params, decay):
    """Returns decay * ema + (1 - decay) * params, kept in float32 whatever the parameters' type.

    Both sides in float32 because near decay 0.9999 a step's change is below what bfloat16 can add.
    """
    return jax.tree.map(
        lambda average, value: decay * average + (1 - decay) * value.astype(jnp.float32), ema, params)
