"""The encoders that REPA is aligned with, by reference: what they see, at which places, and what is refused."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from eqvae_jax.features.dinov2 import repa_features
from eqvae_jax.run.alignment import open_encoder
from eqvae_jax.weights.dinov2 import load_dinov2

sys.path.insert(0, str(Path(__file__).parent / "features"))
from dinov2_files import random_tensors  # noqa: E402


@pytest.fixture
def file(rng, tmp_path):
    path = tmp_path / "dinov2.safetensors"
    safetensors.numpy.save_file(random_tensors(rng, depth=1, width=64, grid=3), path)
    return path


def test_dinov2_sees_a_patch_for_each_token_in_their_order(rng, file):
    encoder = open_encoder(f"dinov2:{file}", 2, (8, 8, 3))
    images = rng.integers(0, 256, (3, 8, 8, 3), np.uint8)
    seen = jax.jit(encoder.features)(encoder.params, images)
    assert seen.shape == (3, 4, 64) and encoder.feature_size == 64
    model, params, _ = load_dinov2(str(file))
    np.testing.assert_allclose(seen, repa_features(model, params, images, side=28), rtol=1e-5, atol=1e-5)
    images[:, 4:, :4] = 255                                   # the lower left quarter, third row by row
    change = np.abs(np.asarray(jax.jit(encoder.features)(encoder.params, images)) - seen).mean((0, 2))
    assert change.argmax() == 2
    half = open_encoder(f"dinov2:{file}", 2, (8, 8, 3), "bfloat16")
    assert 0 < np.abs(np.asarray(half.features(half.params, images[:1])) - np.asarray(
        encoder.features(encoder.params, images[:1]))).max() < 0.5


def test_a_token_sees_the_mean_of_its_places_in_a_classifier(rng, monkeypatch):
    from eqvae_jax.autoencoders.objective import to_float
    from eqvae_jax.evaluation import feature_sets
    from eqvae_jax.features.classifier import Classifier

    model, images = Classifier(channels=2, feature_size=4), rng.integers(0, 256, (2, 24, 24, 3), np.uint8)
    params = model.init(jax.random.key(0), to_float(images))["params"]
    monkeypatch.setattr(feature_sets, "load_classifier", lambda workdir: (model, params, None))
    places = np.asarray(model.apply({"params": params}, to_float(images)).map)            # (2,6,6,8)
    for grid, share in ((6, 1), (3, 2), (2, 3)):
        encoder = open_encoder("workdir:it", grid, (24, 24, 3))
        seen = np.asarray(encoder.features(encoder.params, images))
        assert seen.shape == (2, grid * grid, encoder.feature_size)
        last = places[:, -share:, :share].mean((1, 2))                                    # the lower left corner
        np.testing.assert_allclose(seen[:, grid * (grid - 1)], last, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="sees 36 places in images of 24 x 24, and the generator has 4 x 4 tokens"):
        open_encoder("workdir:it", 4, (24, 24, 3))


@pytest.mark.parametrize("reference, image_shape, message", [
    ("dinov2:nowhere.pth", (8, 8, 3), "nowhere.pth"), ("dinov2:", (8, 8, 3), "must be one of"),
    ("dinov2:{file}", None, "encode again with --keep_images"), ("workdir:{file}", (8, 8, 3), "workdir:"),
])
def test_encoders_that_cannot_be_are_refused(file, reference, image_shape, message):
    with pytest.raises(ValueError, match=message):
        open_encoder(reference.format(file=file), 2, image_shape)
