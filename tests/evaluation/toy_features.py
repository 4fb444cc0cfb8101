"""Extractors made by hand: a fixed projection of pixels, which counts what it is asked for; and a classifier's run."""

import pathlib
import runpy

import numpy as np

from eqvae_jax import main
from eqvae_jax.evaluation.feature_sets import Extractor


def extractor(name="toy", hash="1234", protocol="as is", seed=0, spatial=False):
    """(Extractor of 5 features and 4 logits, list of the shapes that it was given)."""
    rng, seen, weights = np.random.default_rng(seed), [], {}

    def extract(images):
        seen.append(images.shape)
        pixels = np.asarray(images).reshape(len(images), -1) / np.float32(255)
        sizes = {"pool": 5, "logits": 4} | ({"spatial": 6} if spatial else {})
        for kind, size in sizes.items():
            weights.setdefault((kind, *images.shape[1:]), rng.normal(size=(pixels.shape[1], size)).astype(np.float32))
        return {kind: pixels @ weights[kind, *images.shape[1:]] for kind in sizes}

    return Extractor(name, hash, protocol, extract), seen


def classifier_run(workdir):
    """The workdir of a classifier that took two steps on photographs."""
    config = pathlib.Path(__file__).resolve().parents[2] / "configs" / "fashion_classifier.py"
    assert main.train(runpy.run_path(str(config))["get_config"]("smoke"), workdir) == 0
    return workdir


def images(count, seed=0, side=4, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (count, side, side, 3), dtype=np.uint8)


def batches(array, *sizes):
    """The rows of an array in batches of these sizes, then the rest."""
    return np.split(array, np.cumsum(sizes))
