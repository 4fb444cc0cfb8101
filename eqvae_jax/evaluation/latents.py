"""What latents look like over a set of images: their mean and standard deviation, and the scale they call for.

The distribution described is that of posterior samples. Its moments need no sampling: by the law of total variance
Var[z] = Var[mean] + E[std^2], over images and positions.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqvae_jax.evaluation.reconstruction import placed_batches


class Moments:
    """Mean and variance of vectors (C,) that come in batches, in float64 on the host.

    Batches are merged by their deviations from their own mean (Chan, Golub and LeVeque 1979), so a mean far from zero
    costs no digits of the variance, as it would in E[x^2] - E[x]^2.
    """

    def __init__(self):
        self.count, self.mean, self._deviation = 0, 0.0, 0.0

    def add(self, values):
        """values: (N, C); N may be 0."""
        values = np.asarray(values, np.float64)
        if len(values):
            mean = values.mean(0)
            self._merge(len(values), mean, np.square(values - mean).sum(0))

    def _merge(self, count, mean, deviation):
        total, gap = self.count + count, mean - self.mean
        self._deviation = self._deviation + deviation + gap**2 * (self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self.count = total

    def variance(self):
        """(C,), the population's (division by N)."""
        return self._deviation / self.count


class LatentStatistics(NamedTuple):
    """Of unscaled posterior samples, over images and positions.

    count: images. channel_mean, channel_std: (C,) float64. mean, std: over all channels together.
    """

    count: int
    channel_mean: np.ndarray
    channel_std: np.ndarray
    mean: float
    std: float


@functools.partial(jax.jit, static_argnums=0)
def _mean_and_std(encode, params, x):
    """x (B,H,W,3) -> mean and standard deviation of the posterior, each (B,h,w,C)."""
    posterior = encode(params, x)
    mean = posterior.mode()
    return mean, getattr(posterior, "std", jnp.zeros_like(mean))  # a deterministic encoder has no std


def latent_statistics(encode, params, batches, *, progress=True):
    """LatentStatistics of an autoencoder on a set of images, in one pass.

    Args:
      encode: as reconstruction.functions returns it.
      batches: iterable of {"image": uint8 (B,H,W,3), "mask": bool (B,)}, as data.images.evaluation_batches.

    Raises:
      ValueError: there is no image, or a latent is not finite.
    """
    images, means, noise = 0, Moments(), Moments()  # noise: of std^2, whose mean is E[std^2]
    with jax.default_matmul_precision("highest"):  # the accelerators' default is TF32 or bf16
        for x, _, mask, placed in placed_batches(batches, params, progress, "latents"):
            mean, std = (np.asarray(array, np.float64) for array in _mean_and_std(encode, placed, x))
            real = slice(None) if mask is None else np.asarray(mask, bool)
            mean, std = mean[real], std[real]
            images += len(mean)
            if not (np.isfinite(mean).all() and np.isfinite(std).all()):
                raise ValueError(f"Among the first {images} images are some whose latents are not finite.")
            means.add(mean.reshape(-1, mean.shape[-1]))  # (B h w, C)
            noise.add(np.square(std).reshape(-1, std.shape[-1]))
    if not images:
        raise ValueError("There is no image to take statistics of: the set is empty.")
    variance = means.variance() + noise.mean
    # Every channel has as many values as any other, so the whole is their equal mixture.
    overall = np.mean(variance) + np.var(means.mean)
    return LatentStatistics(images, means.mean, np.sqrt(variance), float(np.mean(means.mean)), float(np.sqrt(overall)))


def scale_and_shift(statistics, with_shift):
    """(scale, shift) that make latents (z - shift) * scale of standard deviation one and, with a shift, mean zero.

    scale = 1 / std about the mean, whether or not the mean is then taken away: LDM's `scale_by_std`
    (ldm/models/diffusion/ddpm.py), which takes it from one batch. with_shift: whether the model uses one, as SD3's.

    Raises:
      ValueError: all latents are equal.
    """
    if not statistics.std > 0:
        raise ValueError(f"The latents of {statistics.count} images are all equal, so no scale makes their std one.")
    return 1.0 / statistics.std, statistics.mean if with_shift else 0.0
