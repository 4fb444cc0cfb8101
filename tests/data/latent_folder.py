"""A small cache of known numbers, written without an autoencoder."""

import numpy as np

from eqvae_jax.data import latent_cache, latent_records, records

SHAPE = (2, 3, 4)


def moments_of(i):
    """[image, mirror] x [mean, std], (2,2,h,w,C): all numbers of all latents differ, and float16 holds them."""
    return (np.arange(4 * np.prod(SHAPE), dtype=np.float32).reshape(2, 2, *SHAPE) + 100 * i) / 4


def label_of(i):
    return i % 3


def write(directory, count=10, shard_size=4, dtype="float32", **changes):
    """Latent i is of image 2 i of its source. changes: of the plan."""
    plan = {
        "format": latent_cache.FORMAT, "version": latent_cache.VERSION, "shape": list(SHAPE), "dtype": dtype,
        "autoencoder": {"reference": "workdir:A", "kind": "kl", "hash": "aa", "scale": 0.5, "shift": 0.25},
        "shard_size": shard_size,
    } | changes
    cache = latent_cache.Cache(directory, plan, -(-count // shard_size))
    assert not cache.begin()
    for k, name in enumerate(cache.names):
        rows = range(k * shard_size, min((k + 1) * shard_size, count))
        packed = (latent_records.pack(2 * i, label_of(i), moments_of(i), dtype) for i in rows)
        records.write_shard(packed, cache.directory / name)
        cache.finish(k, {"count": len(rows)})
    cache.publish({"count": count, "classes": 3})
    return cache
