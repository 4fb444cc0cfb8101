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


@pytest.mark.parametrize("reference, image_shape, message", [
    ("dinov2:nowhere.pth", (8, 8, 3), "nowhere.pth"), ("dinov2:", (8, 8, 3), "must be one of"),
    ("dinov2:{file}", None, "encode again with --keep_images"), ("workdir:{file}", (8, 8, 3), "workdir:"),
])
def test_encoders_that_cannot_be_are_refused(file, reference, image_shape, message):
    with pytest.raises(ValueError, match=message):
        open_encoder(reference.format(file=file), 2, image_shape)
