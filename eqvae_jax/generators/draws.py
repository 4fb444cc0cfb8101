"""Random numbers of examples, each from a key of its own: neither batch nor devices matter."""

import jax


def example_keys(key, index):
    """(B,) keys, each of its example's index alone."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def normal(keys, number, shape):
    """Standard normal (B, *shape); row b depends on keys[b] and `number` alone."""
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, number), shape)
    return jax.vmap(draw)(keys)
