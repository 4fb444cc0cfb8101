"""What latents look like over a set of images: their moments and scale, their spectrum, their intrinsic dimension.

The moments are those of posterior samples. They need no sampling: by the law of total variance
Var[z] = Var[mean] + E[std^2], over images and positions. Spectrum and dimension are those of the posterior's mode; of
a VQ model, of the features before quantisation.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqvae_jax.evaluation.intrinsic import IntrinsicDimension, two_nn
from eqvae_jax.evaluation.reconstruction import placed_batches
from eqvae_jax.evaluation.spectrum import Spectrum, SpectrumMeter
from eqvae_jax.training.metrics import to_host

SHARES_ABOVE = (0.25, 0.5)  # of the Nyquist frequency


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


class NotFinite(ValueError):
    """A latent is NaN or infinite: the autoencoder is broken, not what it was asked."""


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


def _posteriors(encode, params, batches, progress):
    """Yields mean and std (B,h,w,C), float32 on the host, of the real images of each batch."""
    with jax.default_matmul_precision("highest"):  # the accelerators' default is TF32 or bf16
        for x, _, mask, placed in placed_batches(batches, params, progress, "latents"):
            real = slice(None) if mask is None else np.asarray(mask, bool)
            yield tuple(to_host(array)[real] for array in _mean_and_std(encode, placed, x))


class _StatisticsMeter:
    """LatentStatistics from means and standard deviations that come in batches."""

    def __init__(self):
        self._images, self._means, self._noise = 0, Moments(), Moments()  # noise: of std^2, whose mean is E[std^2]

    def add(self, mean, std):
        mean, std = (np.asarray(array, np.float64) for array in (mean, std))
        self._images += len(mean)
        if not (np.isfinite(mean).all() and np.isfinite(std).all()):
            raise NotFinite(f"Among the first {self._images} images are some whose latents are not finite.")
        self._means.add(mean.reshape(-1, mean.shape[-1]))  # (B h w, C)
        self._noise.add(np.square(std).reshape(-1, std.shape[-1]))

    def result(self):
        if not self._images:
            raise ValueError("There is no image to take statistics of: the set is empty.")
        variance, means = self._means.variance() + self._noise.mean, self._means.mean
        # Every channel has as many values as any other, so the whole is their equal mixture.
        overall = np.mean(variance) + np.var(means)
        return LatentStatistics(
            self._images, means, np.sqrt(variance), float(np.mean(means)), float(np.sqrt(overall))
        )


def latent_statistics(encode, params, batches, *, progress=True):
    """LatentStatistics of an autoencoder on a set of images, in one pass.

    Args:
      encode: as reconstruction.functions returns it.
      batches: iterable of {"image": uint8 (B,H,W,3), "mask": bool (B,)}, as data.images.evaluation_batches.

    Raises:
      ValueError: there is no image; NotFinite: a latent is not finite.
    """
    meter = _StatisticsMeter()
    for mean, std in _posteriors(encode, params, batches, progress):
        meter.add(mean, std)
    return meter.result()


class LatentStructure(NamedTuple):
    """statistics: LatentStatistics. spectrum: of spectrum.SpectrumMeter. shape: (h, w, C) of a latent.

    dimension: intrinsic.IntrinsicDimension, or None where `why_no_dimension` says what two_nn found wrong.
    """

    statistics: LatentStatistics
    spectrum: Spectrum
    shape: tuple[int, int, int]
    dimension: IntrinsicDimension | None
    why_no_dimension: str


def latent_structure(encode, params, batches, *, progress=True):
    """LatentStructure of an autoencoder on a set of images, in one pass.

    Holds the latents of all images at once, for the search of nearest neighbours: 4 h w C bytes each, and twice that
    again while it searches. Args and errors as `latent_statistics`.
    """
    meter, spectrum, modes = _StatisticsMeter(), SpectrumMeter(), []
    for mean, std in _posteriors(encode, params, batches, progress):
        meter.add(mean, std)
        spectrum.add(mean)
        modes.append(mean)
    statistics, points, why = meter.result(), np.concatenate(modes), ""
    try:
        dimension = two_nn(points)
    except ValueError as error:  # too few images for a dimension are enough for the rest
        dimension, why = None, str(error)
    return LatentStructure(statistics, spectrum.result(), points.shape[1:], dimension, why)


def latent_measures(structure, scale, shift):
    """(flat metrics, details, warnings) of a LatentStructure, for the table and for metrics.json.

    scale, shift: the autoencoder's own. Metrics, each a float, NaN where the latents allow none:
      intrinsic_dimension, intrinsic_points, intrinsic_duplicates    TwoNN, the N it rests on, points left out
      spectrum_above_0.25, spectrum_above_0.5    share of the energy above that part of the Nyquist frequency
      latent_mean, latent_std, latent_channel_std_min, latent_channel_std_max    of unscaled samples
      latent_scaled_std    after the autoencoder's own scale; diffusion is tuned for 1
    """
    statistics, spectrum, dimension, warnings = structure.statistics, structure.spectrum, structure.dimension, []
    nan = float("nan")
    if dimension is None:
        warnings.append(f"no intrinsic dimension: {structure.why_no_dimension}")
    values = {
        "intrinsic_dimension": dimension.dimension if dimension else nan,
        "intrinsic_points": float(dimension.n) if dimension else nan,
        "intrinsic_duplicates": float(dimension.duplicates) if dimension else nan,
    }
    for frequency in SHARES_ABOVE:
        try:
            values[f"spectrum_above_{frequency:g}"] = spectrum.share_above(frequency)
        except ValueError as error:
            values[f"spectrum_above_{frequency:g}"] = nan
            warnings.append(str(error))
    values |= {
        "latent_mean": statistics.mean,
        "latent_std": statistics.std,
        "latent_scaled_std": statistics.std * scale,
        "latent_channel_std_min": float(statistics.channel_std.min()),
        "latent_channel_std_max": float(statistics.channel_std.max()),
    }
    details = {
        "shape": list(structure.shape),
        "channel_mean": statistics.channel_mean.tolist(),
        "channel_std": statistics.channel_std.tolist(),
        "spectrum": {
            "frequency": spectrum.frequency.tolist(),
            "energy": spectrum.energy.mean(1).tolist(),
            "coefficients": spectrum.coefficients.tolist(),
        },
    }
    if statistics.std > 0:
        unit_scale, mean = scale_and_shift(statistics, with_shift=shift != 0)
        details |= {"unit_scale": unit_scale, "unit_shift": mean}
    return values, details, list(dict.fromkeys(warnings))


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
