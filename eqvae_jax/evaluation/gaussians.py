"""Features of a set of images as one Gaussian: its statistics in one pass, and the Frechet distance of two."""

import zipfile
import zlib
from typing import NamedTuple

import numpy as np
import scipy.linalg
from scipy.linalg.blas import dsyrk
from scipy.linalg.lapack import dpstrf

from eqvae_jax.atomic import whole

ROWS = 4096  # features in one block: what bounds the memory, whatever N


def checked(features, name, least, why):
    """features as (N, D) float32 or float64 on the host; refuses other shapes, fewer than `least` rows, NaN and inf."""
    features = np.asarray(features)
    if features.dtype not in (np.float32, np.float64):
        features = features.astype(np.float64)
    if features.ndim != 2 or not features.shape[1]:
        raise ValueError(f"{name} must be (N, D), one row per image; got shape {features.shape}.")
    if len(features) < least:
        raise ValueError(f"{name} has {len(features)} rows, and {why} needs at least {least}: give more images.")
    finite = np.isfinite(features).all(1)
    if not finite.all():
        raise ValueError(
            f"{name}: {np.sum(~finite)} of {len(finite)} rows are not finite, the first is row {np.argmin(finite)}. "
            "Look for NaN in the images, or for an overflow in the network they were made with."
        )
    return features


def checked_pair(reference, generated, least, why):
    reference = checked(reference, "reference", least, why)
    generated = checked(generated, "generated", least, why)
    if reference.shape[1] != generated.shape[1]:
        raise ValueError(
            f"reference has {reference.shape[1]} features and generated {generated.shape[1]}: "
            "take both from the same layer of the same network."
        )
    return reference, generated


class Gaussian(NamedTuple):
    """mu: (D,), sigma: (D, D) with division by n - 1 (numpy.cov's), both float64; n: samples, None if not known."""

    mu: np.ndarray
    sigma: np.ndarray
    n: int | None


class Statistics:
    """Mean and covariance of features that come in batches, in one pass, in float64 on the host.

    Holds one (D, D) matrix whatever the number of features. Batches are merged by their deviations from their own mean
    (Chan, Golub and LeVeque 1979), so that neither a large mean nor how the set was cut costs digits.
    """

    def __init__(self):
        self.n, self._mean, self._scatter = 0, None, None  # scatter: sum of (x - mean)(x - mean)^T, upper half only

    def update(self, features, mask=None):
        """features: (B, D); mask: (B,) bool, False for padding, which is never looked at. B may be 0.

        Raises:
          ValueError: a wrong shape, another D than before, or a real row that is not finite.
        """
        features = np.asarray(features)
        if mask is not None:
            features = features[np.asarray(mask, bool)]
        features = checked(features, "features", 0, "")
        for start in range(0, len(features), ROWS):
            rows = features[start : start + ROWS].astype(np.float64)
            mean = rows.mean(0)
            self._add(len(rows), mean, rows - mean)

    def _add(self, n, mean, deviations):
        """Adds n samples whose scatter about `mean` is deviations^T deviations."""
        if self._mean is None:
            self._mean, self._scatter = np.zeros_like(mean), np.zeros((len(mean), len(mean)), order="F")
        if self._mean.shape != mean.shape:
            raise ValueError(f"Features have {len(mean)} dimensions, those before them had {len(self._mean)}.")
        gap, total = mean - self._mean, self.n + n
        # The means' own scatter is one row more, so that all is added in one symmetric product, in place.
        rows = np.concatenate([deviations, np.sqrt(self.n * n / total) * gap[None]])
        self._scatter = dsyrk(1.0, rows.T, beta=1.0, c=self._scatter, overwrite_c=True)
        self._mean = self._mean + gap * (n / total)
        self.n = total

    def merge(self, other):
        """Adds the samples of another Statistics, which stays as it is."""
        if other.n:
            self._add(other.n, other._mean, np.zeros((0, len(other._mean))))
            self._scatter += other._scatter

    def finalize(self):
        """Gaussian(mu, sigma, n).

        Raises:
          ValueError: there are fewer than two samples.
        """
        if self.n < 2:
            raise ValueError(f"A covariance needs at least 2 samples, got {self.n}: the set is empty or too small.")
        upper = np.triu(self._scatter, 1)
        return Gaussian(
            self._mean.copy(), (upper + upper.T + np.diag(np.diag(self._scatter))) / (self.n - 1), self.n
        )

    def save(self, path):
        """Writes mu, sigma and n to an .npz that pytorch-fid and ADM's evaluator read too; whole or not at all."""
        gaussian = self.finalize()
        with whole(path) as partial, partial.open("wb") as file:
            np.savez(file, **gaussian._asdict())


def load_statistics(path, spatial=False, suffix=""):
    """Gaussian from an .npz with mu and sigma; spatial=True: mu_s and sigma_s, those of sFID in ADM's references.

    suffix: what follows both names in the file, as `samples.statistics_suffix`.

    Raises:
      ValueError: the file is not an .npz, is cut short, has no such statistics, or they have impossible shapes.
    """
    names = tuple(f"{name}_s{suffix}" if spatial else f"{name}{suffix}" for name in ("mu", "sigma"))
    try:
        with np.load(path) as file:
            missing = [name for name in names if name not in file]
            if missing:
                raise KeyError(f"it has no {' and '.join(missing)}, only {', '.join(sorted(file))}")
            mu, sigma = (np.asarray(file[name], np.float64) for name in names)
            n = int(file["n"]) if "n" in file and not spatial else None
    except (zipfile.BadZipFile, zlib.error, EOFError, TypeError, KeyError, ValueError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise ValueError(f"{path} is no file of statistics ({reason}); make it anew, or fetch it again.") from error
    _check_gaussian(mu, sigma, str(path))
    return Gaussian(mu, sigma, n)


def _check_gaussian(mu, sigma, name):
    if mu.ndim != 1 or not mu.size or sigma.shape != 2 * mu.shape:
        raise ValueError(f"{name}: mu must be (D,) and sigma (D, D); got {mu.shape} and {sigma.shape}.")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{name}: mu or sigma is not finite; the features they come from were not.")
    if not np.allclose(sigma, sigma.T, rtol=0, atol=1e-5 * np.abs(sigma).max()) or (np.diag(sigma) < 0).any():
        raise ValueError(f"{name}: sigma is not symmetric or has a negative variance, so it is no covariance.")


def _factor(sigma, name):
    """F (D, rank) with F F^T = sigma.

    Cholesky with pivots finds the rank of what few samples leave, to D * 2^-52 of the largest variance: rounding cannot
    enter as spurious directions. Where sigma is not positive to that precision (it was kept in float32, say), its
    eigenvectors serve, and negative eigenvalues count as 0.
    """
    lower, pivots, rank, _ = dpstrf(sigma, lower=1)
    factor = np.zeros((len(sigma), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    if np.abs(sigma - factor @ factor.T).max() <= 1e-10 * sigma.diagonal().max():
        return factor
    values, vectors = scipy.linalg.eigh(sigma, driver="evd")
    if -values[values < 0].sum() > 1e-3 * values[values > 0].sum():
        raise ValueError(f"{name} has large negative eigenvalues (the least is {values[0]:.3g}): it is no covariance.")
    return vectors[:, values > 0] * np.sqrt(values[values > 0])


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), a float, symmetric and never negative: FID, sFID.

    mu: (D,); sigma: (D, D), of any rank. tr (sigma1 sigma2)^(1/2) is the sum of the singular values of F1^T F2, where
    sigma = F F^T: no imaginary part can arise and no ridge is added. sqrtm and the eigenvalues of sigma1 sigma2, which
    other packages take, work with squares of these values and lose half the digits of all small ones.
    Dowson and Landau 1982; Heusel et al. 2017 (FID).

    Raises:
      ValueError: the two differ in D, are not finite, or one sigma is no covariance.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(array, np.float64) for array in (mu1, sigma1, mu2, sigma2))
    _check_gaussian(mu1, sigma1, "the first Gaussian")
    _check_gaussian(mu2, sigma2, "the second Gaussian")
    if mu1.shape != mu2.shape:
        raise ValueError(
            f"The first Gaussian has {len(mu1)} dimensions, the second {len(mu2)}: "
            "take both from the same layer of the same network."
        )
    cross = _factor(sigma1, "sigma1").T @ _factor(sigma2, "sigma2")
    root = scipy.linalg.svdvals(cross).sum() if cross.size else 0.0
    distance = np.sum(np.square(mu1 - mu2)) + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    return max(float(distance), 0.0)
