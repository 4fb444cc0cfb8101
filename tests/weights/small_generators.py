"""What the tests of generators' weights share: small models, parameters that are nowhere zero, files by torch."""

import jax
import numpy as np
import pytest

from eqvae_jax.generators.dit import DiT
from eqvae_jax.generators.repa import REPA
from eqvae_jax.weights import WeightsError
from eqvae_jax.weights.blocks import parameter_shapes
from eqvae_jax.weights.generators import GeneratorSpec, load_generator

SMALL = dict(input_size=8, in_channels=3, patch_size=2, width=128, depth=2, heads=2, classes=5)
REPA_FIELDS = dict(alignment_depth=2, projector_size=24, feature_size=7)
DIT, SIT = DiT(**SMALL, out_channels=6), DiT(**SMALL, out_channels=3, reversed_time=True)
ALIGNED = REPA(**SMALL, out_channels=3, **REPA_FIELDS)


def drawn(rng, model):
    """Parameters that are nowhere zero, with matrices that keep the size of what they multiply."""
    scale = lambda shape: 0.3 if len(shape) == 1 else shape[0] ** -0.5
    return jax.tree.map(lambda s: (scale(s.shape) * rng.normal(size=s.shape)).astype(np.float32),
                        parameter_shapes(model))


def spec_of(kind, **more):
    return GeneratorSpec(kind, 5, "here", "", **more)


def saved(torch, value, path):
    torch.save(value, path)
    return path


def refused(reference, **options):
    """The message with which loading a reference is refused."""
    with pytest.raises(WeightsError) as error:
        load_generator(reference, **options)
    return str(error.value)
