"""GroupNorm + swish of the autoencoders against flax's, forward and backward, turn by turn in one run.

    python benchmarks/group_norm.py

Minima over rounds in milliseconds; a ratio above 1 says how many times longer flax's takes.
"""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp

import eqvae_jax  # noqa: F401  sets XLA's CPU flags; before jax makes its first array
from eqvae_jax.autoencoders.blocks import group_norm

SHAPES = ((2, 128, 64), (4, 32, 256), (2, 256, 128))  # batch, side, channels


def flax_norm(x, scale, bias):
    layer = nn.GroupNorm(32, use_fast_variance=False)
    return nn.swish(layer.apply({"params": {"scale": scale, "bias": bias}}, x))


def our_norm(x, scale, bias):
    return group_norm(x, scale, bias, 32, True)


def with_gradient(function):
    return jax.jit(lambda x, scale, bias, dy: jax.vjp(function, x, scale, bias)[1](dy))


def milliseconds(functions, arguments, rounds=8):
    for function in functions:
        jax.block_until_ready(function(*arguments))
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            begun = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            best[i] = min(best[i], 1000 * (time.perf_counter() - begun))
    return best


if __name__ == "__main__":
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, float32, 32 groups")
    for batch, side, channels in SHAPES:
        x, dy = jax.random.normal(jax.random.key(0), (2, batch, side, side, channels))
        scale, bias = jnp.linspace(0.5, 1.5, channels), jnp.linspace(-1.0, 1.0, channels)
        forward = milliseconds([jax.jit(flax_norm), jax.jit(our_norm)], (x, scale, bias))
        both = milliseconds([with_gradient(flax_norm), with_gradient(our_norm)], (x, scale, bias, dy))
        for name, (theirs, ours) in (("forward", forward), ("forward + backward", both)):
            print(f"{batch} x {side} x {side} x {channels:4} {name:20} flax {theirs:7.1f}  ours {ours:7.1f}  "
                  f"ratio {theirs / ours:.2f}")
