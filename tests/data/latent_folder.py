"""A small cache of known numbers, written without an autoencoder."""

import itertools

import numpy as np

from eqvae_jax.data import latent_cache, latent_records, records
from eqvae_jax.data.latent_batches import train_batches

SHAPE, IMAGE_SHAPE = (2, 3, 4), (5, 5, 3)


def moments_of(i):
    """[image, mirror] x [mean, std], (2,2,h,w,C): all numbers of all latents differ, and float16 holds them."""
    return (np.arange(4 * np.prod(SHAPE), dtype=np.float32).reshape(2, 2, *SHAPE) + 100 * i) / 4


def label_of(i):
    return i % 3


def tokens_of(i):
    """[image, mirror], (2,h,w), up to the largest that uint16 holds."""
    return (np.arange(2 * np.prod(SHAPE[:2])).reshape(2, *SHAPE[:2]) + 100 * i + 64_600).astype(np.uint16)


def image_of(i):
    return np.random.default_rng(i).integers(0, 256, IMAGE_SHAPE, np.uint8)


def write(directory, count=10, shard_size=4, dtype="float32", images=False, **changes):
    """Latent i is of image 2 i of its source; of dtype uint16 it is tokens. changes: of the plan."""
    tokens = dtype == latent_records.TOKENS
    plan = {
        "format": latent_cache.FORMAT, "version": latent_cache.VERSION, "shape": list(SHAPE[:2] if tokens else SHAPE),
        "dtype": dtype,
        "autoencoder": {"reference": "workdir:A", "kind": "kl", "hash": "aa", "scale": 0.5, "shift": 0.25},
        "preprocessing": {"image_size": IMAGE_SHAPE[0]} | ({"images": True} if images else {}),
        "shard_size": shard_size,
    } | changes
    cache = latent_cache.Cache(directory, plan, -(-count // shard_size))
    assert not cache.begin()
    for k, name in enumerate(cache.names):
        rows = range(k * shard_size, min((k + 1) * shard_size, count))
        packed = (latent_records.pack(2 * i, label_of(i), (tokens_of if tokens else moments_of)(i), dtype,
                                      image_of(i) if images else None) for i in rows)
        records.write_shard(packed, cache.directory / name)
        cache.finish(k, {"count": len(rows)})
    cache.publish({"count": count, "classes": 3})
    return cache


def batches(latents, count, **options):
    """The first `count` batches of training, in a list."""
    iterator = train_batches(latents, **{"batch_size": 4, "seed": 3} | options)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()
