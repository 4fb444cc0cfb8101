"""The five full-size graphs: every parameter has its place in diffusers' and in latent-diffusion's own modules."""

import flax
import jax
import numpy as np
import pytest

from eqvae_jax.autoencoders.presets import PRESETS
from eqvae_jax.weights import tables
from eqvae_jax.weights.diffusers_folder import config_of

F8 = dict(widths=(128, 256, 512, 512), blocks=2)
F16 = dict(widths=(128, 128, 256, 256, 512), blocks=2, attention=(4,))
# preset -> parameters (facts of the reference), its fields in latent-diffusion
PAPER = {
    "sd": (83_653_863, dict(**F8, channels=4)),
    "sd16": (69_610_963, dict(**F16, channels=16)),
    "sdxl": (83_653_863, dict(**F8, channels=4)),
    "sd3": (83_819_683, dict(**F8, channels=16, quant=False)),
    "vqgan": (72_141_699, dict(**F16, channels=256, codes=1024)),
}


@pytest.mark.parametrize("name", PAPER)
def test_every_parameter_has_its_key_and_shape(torch, diffusers, ldm_reference, name):
    model, scale, shift = PRESETS[name]
    count, fields = PAPER[name]
    shapes = tables.parameter_shapes(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    # Views of one number, as big as the parameters in name only; on the other side torch's meta device.
    params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    config = config_of(model, scale, shift)
    with torch.device("meta"):
        folder = getattr(diffusers, config["_class_name"]).from_config(config)
        checkpoint = ldm_reference.Autoencoder(**fields)
    levels = len(model.multipliers)
    for theirs, written in (
        (folder, tables.write_parameters(params, shapes, lambda p: tables.diffusers_key(p, levels))),
        (checkpoint, tables.write_parameters(params, shapes, tables.ldm_key, attention_as_convolution=True)),
    ):
        assert {key: value.shape for key, value in written.items()} == {
            key: tuple(value.shape) for key, value in theirs.state_dict().items()}


def test_no_two_parameters_share_a_key():
    for name in ("sd", "vqgan"):
        paths = list(flax.traverse_util.flatten_dict(tables.parameter_shapes(PRESETS[name].model)))
        assert len({tables.ldm_key(path) for path in paths}) == len(paths)
        assert len({tables.diffusers_key(path, 5) for path in paths}) == len(paths)
