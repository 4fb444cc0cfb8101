"""rFID: the Frechet distance between images and what an autoencoder makes of them, for several transforms at once.

Plain rFID compares D(E(x)) with x (Table 12); the paper's Figure 3 compares D(tau E(x)) with tau x for each tau. Only
means and covariances are kept, so the memory does not grow with the number of images.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from eqvae_jax.evaluation import feature_sets, metrics
from eqvae_jax.evaluation.gaussians import Statistics, frechet_distance
from eqvae_jax.training.metrics import to_host


def describe(extractor):
    """What metrics.json says of the features: name, weights' hash, protocol of resizing."""
    return {"name": extractor.name, "hash": extractor.hash, "protocol": extractor.protocol}


@functools.partial(jax.jit, static_argnames="uint8")
def _as_bytes(x, y, uint8):
    return metrics.to_bytes(x, uint8), metrics.to_bytes(y, uint8), jnp.isfinite(y).all((1, 2, 3))


class _Set:
    """Statistics of features that come few at a time; added by the hundred, as an addition costs D^2 however few."""

    ROWS = 1024

    def __init__(self):
        self._statistics, self._rows = Statistics(), []

    def add(self, features):
        """features: (B, D)."""
        self._rows.append(features)
        if sum(len(rows) for rows in self._rows) >= self.ROWS:
            self._flush()

    def _flush(self):
        if self._rows:
            self._statistics.update(np.concatenate(self._rows))
            self._rows = []

    def gaussian(self):
        """Gaussian of all features, None for fewer than two."""
        self._flush()
        return self._statistics.finalize() if self._statistics.n > 1 else None


class Pairs:
    """Frechet distances of pairs of sets, each under a label, from batches.

    extractor: as evaluation.feature_sets.Extractor. uint8: how images become 8-bit, "round" or "truncate".
    references: a dict that this fills with the finished statistics of reference sets, and what is there is not computed
    again; hand the same dict to the next autoencoder on the same images under the same transforms.

    Raises:
      ValueError: the convention leaves images as floats, which features are not taken of.
    """

    def __init__(self, extractor, uint8, references=None):
        check(uint8)
        self.key = feature_sets.label("rfid", extractor)
        self._extract, self._uint8 = extractor.extract, uint8
        self._known = {} if references is None else references
        self._reference, self._generated, self._broken = {}, {}, set()

    def add(self, label, x, y, mask=None):
        """x, y: (B, H, W, 3) in [-1, 1], the reference and what is compared with it; mask: (B,), False for padding."""
        reference, generated, finite = _as_bytes(x, y, self._uint8)
        real = np.ones(len(finite), bool) if mask is None else np.asarray(mask, bool)
        if not to_host(finite)[real].all():
            self._broken.add(label)  # its bytes would be any
        place = (label, *x.shape[1:3])
        if place not in self._known:
            self._reference.setdefault(place, _Set()).add(self._features(reference, real))
        self._generated.setdefault(place, _Set()).add(self._features(generated, real))

    def _features(self, images, real):
        return to_host(self._extract(images)["pool"])[real]

    def result(self):
        """{key or key/label: distance}, NaN where an image was not finite or there are under two. Ends the pass."""
        self._known |= {place: each.gaussian() for place, each in self._reference.items()}
        distances = {}
        for (label, *size), each in self._generated.items():
            ours, theirs = each.gaussian(), self._known[(label, *size)]
            measurable = ours is not None and label not in self._broken
            distances[f"{self.key}/{label}" if label else self.key] = (
                frechet_distance(theirs.mu, theirs.sigma, ours.mu, ours.sigma) if measurable else float("nan")
            )
        return distances


def check(uint8):
    """Refuses the convention under which there are no 8-bit images to take features of."""
    if metrics.UINT8_CONVENTIONS[uint8] is None:
        raise ValueError(f"rFID is of 8-bit images: take uint8=round or truncate instead of {uint8}.")
