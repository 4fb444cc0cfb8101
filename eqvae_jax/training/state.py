"""What a run must remember between two steps."""

import flax.struct
import jax
import jax.numpy as jnp


class TrainState(flax.struct.PyTreeNode):
    """Everything a step reads and writes, and everything a checkpoint holds.

    `params`, `opt_state` and `ema` are dicts by role (for a GAN: "autoencoder" and "discriminator"), `ema` is
    None where no average is kept, `buffers` holds batch statistics. There is no random key: keys come from
    (seed, step).
    """

    step: jax.Array  # () int32, updates tried so far, skipped ones included
    params: dict
    opt_state: dict
    ema: dict | None
    buffers: dict
    skipped: jax.Array  # () int32, updates not applied because they were not finite
    skipped_in_a_row: jax.Array  # () int32, how many of them in a row up to now

    @classmethod
    def create(cls, params, opt_state, ema=None, buffers=None):
        """Returns a state at step 0 with nothing skipped."""
        # Three arrays, not one shared zero: a donated state may not hold the same buffer twice.
        step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
        return cls(step=step, params=params, opt_state=opt_state, ema=ema, buffers=buffers or {},
                   skipped=skipped, skipped_in_a_row=in_a_row)


def state_shapes(init, key):
    """The TrainState that init(key) returns, as ShapeDtypeStructs; a Partial `init` may itself be bound to shapes."""
    init = init if isinstance(init, jax.tree_util.Partial) else jax.tree_util.Partial(init)
    return jax.eval_shape(lambda init, key: init(key), init, key)
