"""Which spatial frequencies latents are made of: their energy under the cosine transform, over rings of frequency.

Latents that hold much energy at high frequencies are hard for diffusion to learn, as Skorokhodov et al. 2025 (arXiv
2502.14831) show by the DCT. Rings and normalisation here are our own, defined below: compare curves by shape only.
"""

import functools
from typing import NamedTuple

import numpy as np


@functools.cache
def dct_matrix(length):
    """(length, length) the orthonormal DCT-II, scipy's dct(norm="ortho"): row u is a cosine of u half periods."""
    u, position = np.arange(length)[:, None], np.arange(length) + 0.5
    matrix = np.sqrt(2 / length) * np.cos(np.pi * u * position / length)
    matrix[0] /= np.sqrt(2)
    return matrix


@functools.cache
def ring_of(height, width):
    """(height, width) int: the ring that coefficient (u, v) belongs to. Ring 0 is the mean, (0, 0), alone.

    Rings are one basis function of the shorter side wide, around whole multiples of it: for a square, sqrt(u^2 + v^2)
    rounded. Some at the far corner may be empty where the sides differ.
    """
    u, v = np.arange(height)[:, None] / height, np.arange(width) / width
    rings = np.maximum(np.rint(np.sqrt(u**2 + v**2) * min(height, width)), 1).astype(int)
    rings[0, 0] = 0
    return rings


class Spectrum(NamedTuple):
    """Energy over frequency, of (h, w, C) arrays.

    frequency: (R,) the mean sqrt((u/h)^2 + (v/w)^2) of a ring; 1 is one sign change per pixel along an axis (Nyquist).
    energy: (R, C) mean squared coefficient, over images and over the ring; its mean over channels is the usual curve.
      White noise has its variance at every frequency. By Parseval, a channel's sum(energy * coefficients) is the mean
      over images of its sum of squares.
    coefficients: (R,) how many coefficients a ring has. count: images.
    """

    frequency: np.ndarray
    energy: np.ndarray
    coefficients: np.ndarray
    count: int

    def share_above(self, frequency):
        """Share in [0, 1] of the energy, ring 0 (the mean) left out, in rings of more than `frequency`.

        A scale or a shift of the latents leaves it as it is, so it can be compared between autoencoders.

        Raises:
          ValueError: all images are constant, so there is no such energy.
        """
        energy = self.energy.mean(1) * self.coefficients
        varying = energy[1:].sum()
        if not varying > 1e-20 * energy.sum():  # rounding of the transform
            raise ValueError(f"The {self.count} images are constant: they have no energy but that of their mean.")
        return float(energy[self.frequency > frequency].sum() / varying)


class SpectrumMeter:
    """Averages the spectrum of arrays that come in batches, in float64 on the host."""

    def __init__(self):
        self._energy, self._count = None, 0

    def add(self, latents, mask=None):
        """latents: (B, h, w, C), all of one size; mask: (B,) bool, False for padding, which is never looked at.

        Raises:
          ValueError: a wrong shape, another size than before, or a real value that is not finite.
        """
        latents = np.asarray(latents)
        if latents.ndim != 4 or 0 in latents.shape[1:]:
            raise ValueError(f"Latents must be (B, h, w, C), got shape {latents.shape}.")
        if mask is not None:
            latents = latents[np.asarray(mask, bool)]
        z = latents.astype(np.float64)
        if self._energy is not None and self._energy.shape != z.shape[1:]:
            raise ValueError(f"Latents of {z.shape[1:]} after {self._energy.shape}: measure sets of one size apart.")
        if not np.isfinite(z).all():
            raise ValueError(f"Some of the {len(z)} latents after the first {self._count} are not finite.")
        vertical, horizontal = dct_matrix(z.shape[1]), dct_matrix(z.shape[2])
        z = np.moveaxis(z, -1, 1)  # (B, C, h, w)
        coefficients = np.moveaxis(vertical @ z @ horizontal.T, 1, -1)  # (B, u, v, C)
        energy = np.square(coefficients).sum(0)
        self._energy = energy if self._energy is None else self._energy + energy
        self._count += len(latents)

    def result(self):
        """Spectrum of all that was added.

        Raises:
          ValueError: nothing was added.
        """
        if not self._count:
            raise ValueError("There are no latents to take a spectrum of: the set is empty.")
        height, width, _ = self._energy.shape
        rings = ring_of(height, width).ravel()
        frequency = np.hypot(np.arange(height)[:, None] / height, np.arange(width) / width).ravel()
        coefficients = np.bincount(rings)
        there = coefficients > 0

        def ring_means(values):
            return np.bincount(rings, weights=values)[there] / coefficients[there]

        energy = np.stack([ring_means(e) for e in self._energy.reshape(-1, self._energy.shape[-1]).T], axis=1)
        return Spectrum(ring_means(frequency), energy / self._count, coefficients[there], self._count)
