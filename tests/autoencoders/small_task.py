"""A task small enough to differentiate in one piece, for the tests beside this file."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from eqvae_jax import equivariance
from eqvae_jax.autoencoders.kl import AutoencoderKL
from eqvae_jax.autoencoders.task import autoencoder_task
from eqvae_jax.training.sharding import make_mesh, put

MODEL = AutoencoderKL(channels=4, multipliers=(1, 2), blocks_per_level=1, groups=2, latent_channels=2)


def small_config(**changes):
    config = ConfigDict(dict(
        seed=3, ema_decay=0.0, training=dict(accumulate=1, steps=8),
        mesh=dict(data=-1, fsdp=1, min_shard_size=8, rules=()),
        optimizer=dict(learning_rate=1e-3, schedule="constant", warmup_steps=0, b1=0.5, b2=0.9, eps=1e-8,
                       weight_decay=0.0, clip_norm=0.0),
        loss=dict(perceptual_weight=0.0, kl_weight=1e-3, disc_weight=0.0, disc_factor=1.0, disc_start=0, disc_width=4,
                  disc_batch_norm="synchronised",
                  disc_layers=1, logvar=0.0, explicit_weight=0.1, scale_equivariance_weight=0.0,
                  scale_equivariance_factors=(2, 4), latent_noise=0.0),
        equivariance=dict(sizes=(6,), turns=(1, 2, 3), p_equivariance=0.5, p_low_resolution=0.5, anisotropic=False,
                          method="bilinear", antialias=False, objective="implicit", max_shift=0),
        data=dict(image_size=16, batch_size=4, evaluation_batch_size=4)))
    for name, value in changes.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    return config


def random_params(model=MODEL):
    """Parameters far from the ones and zeros of fresh normalisations."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    return jax.tree.map(lambda s: (rng.normal(size=s.shape) * 0.3).astype(np.float32), shapes)


def batch_of(rows, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8)
    return {"image": image, "index": np.arange(rows, dtype=np.int32) + 40}


def start(config, params, mesh=None, model=MODEL, critic=None):
    """(task, its first state, how to put a batch on the devices)."""
    mesh = mesh or make_mesh(config.mesh)
    task = autoencoder_task(config, model, params, mesh, critic=critic)
    state = jax.jit(lambda init, key: init(key), out_shardings=task.shardings)(task.init, jax.random.key(config.seed))
    return task, state, functools.partial(put, mesh)


def adam_means(opt_state):
    """Adam's first moments, which after one step are (1 - b1) x the gradient, as NumPy arrays."""
    return jax.device_get(optax.tree_utils.tree_get(opt_state, "mu"))


def norm(tree):
    """As `optax.global_norm`, of which JAX would compile a dozen programs for each shape."""
    return np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree)))


def where_draw_is(where):
    for seed in range(100):
        tau = equivariance.draw_tau(seed, 0, sizes=(6,), p_low_resolution=0.5)
        if tau.where == where:
            return seed, tau
