"""Autoencoders whose errors are known, with the interface of a linen module and of weights.load_autoencoder."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Posterior(NamedTuple):
    mean: jax.Array
    std: jax.Array

    def mode(self):
        return self.mean

    def sample(self, key, index):
        def draw(i):
            return jax.random.normal(jax.random.fold_in(key, i), self.mean.shape[1:])

        return self.mean + self.std * jax.vmap(draw)(index)


def pool(x, factor):
    """Means of blocks: commutes with quarter turns and with bilinear halving, exactly."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // factor, factor, width // factor, factor, channels).mean((2, 4))


def enlarge(z, factor):
    return jnp.repeat(jnp.repeat(z, factor, axis=1), factor, axis=2)


def pooling(params, x):
    z = pool(x, 2)
    return Posterior(z, jnp.zeros_like(z))


def upsampling(params, z):
    return enlarge(z, 2)


def ramping(params, x):
    z = pool(x, 2) * (1.0 + 2.0 * jnp.arange(x.shape[2] // 2))[None, None, :, None]
    return Posterior(z, jnp.zeros_like(z))


def noisy(params, x):
    z = pool(x, 2)
    return Posterior(z, jnp.full_like(z, 0.5))


PARAMS = {}


def batches_of(images, size, pad_value=255):
    """Batches of `size`; the last is padded with images that would change every number."""
    result = []
    for start in range(0, len(images), size):
        rows = images[start : start + size]
        short = size - len(rows)
        padding = np.full((short, *images.shape[1:]), pad_value, np.uint8)
        result.append(
            {
                "image": np.concatenate([rows, padding]),
                "mask": np.arange(size) < len(rows),
            }
        )
    return result


def photographs(rng, count, side):
    return rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@dataclasses.dataclass(frozen=True)
class Toy:
    """Pools; `params["tilt"]` multiplies columns by 1 + tilt * column, which does not commute with turns."""

    downsampling: int = 4
    noise: float = 0.1

    def apply(self, variables, array, method):
        return method(variables["params"], array)

    def encode(self, params, x):
        z = pool(x, self.downsampling)
        z = z * (1 + params["tilt"] * jnp.linspace(0, 1, z.shape[2])[:, None])
        return Posterior(z, jnp.full_like(z, self.noise))

    def decode(self, params, z):
        return enlarge(z, self.downsampling)


@dataclasses.dataclass(frozen=True)
class Spec:
    reference: str
    kind: str = "toy"
    scale: float = 1.0
    shift: float = 0.0
    hash: str = "0123456789abcdef"


def load(reference):
    """weights.load_autoencoder for references whose last part is the tilt: "toy:0.5", "workdir:/somewhere/0.5"."""
    return Toy(), {"tilt": np.float32(reference.replace("/", ":").split(":")[-1])}, Spec(reference)
