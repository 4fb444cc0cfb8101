"""Every config: its variants, its preset, its sizes; and EQ steps of its smoke variant."""

import json
import math
import pathlib
import runpy

import pytest

from eqvae_jax import main
from eqvae_jax.autoencoders.presets import PRESETS
from eqvae_jax.autoencoders.task import check
from eqvae_jax.training.sharding import make_mesh

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
# config -> preset of the full-size graph
AUTOENCODERS = {"eq_sdvae": "sd", "eq_sdvae16": "sd16", "eq_sdxlvae": "sdxl", "eq_sd3vae": "sd3", "eq_vqgan": "vqgan"}


def get_config(name, variant):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](variant)


def test_there_is_a_test_for_every_config():
    assert {path.stem for path in CONFIGS.glob("eq_*.py")} == set(AUTOENCODERS)


REPRODUCED = [(name, "photos") for name in ("eq_sdvae", "eq_vqgan")]


@pytest.mark.parametrize("name, variant", [(name, variant) for name in AUTOENCODERS
                                           for variant in ("paper", "quickstart", "smoke")] + REPRODUCED)
def test_sizes_of_every_variant_suit_its_autoencoder(name, variant):
    config = get_config(name, variant)
    preset = AUTOENCODERS[name] if variant == "paper" else config.init.removeprefix("init:")
    model, mesh = PRESETS[preset].model, make_mesh(config.mesh)
    config.data.batch_size = config.data.batch_per_device * mesh.size * config.training.accumulate
    check(config, model, mesh)
    side = config.data.image_size // model.downsampling
    scales = [size / side for size in config.equivariance.sizes]
    assert min(scales) == (0.5 if variant == "smoke" else 0.25) and max(scales) <= 1
    assert config.preset == AUTOENCODERS[name]
    if variant == "paper":  # the released grid, or as much of it as gives whole 16-pixel latents
        step = max(model.downsampling // 8, 1)
        assert [32 * scale for scale in scales] == list(range(8, 32, step))
        assert (config.init, config.data.train) == ("", "")


def test_vqgan_keeps_its_own_recipe():
    config = get_config("eq_vqgan", "paper")
    loss, optimizer = config.loss, config.optimizer
    assert (loss.codebook_weight, loss.codebook_beta, loss.codebook_legacy, loss.disc_weight) == (1.0, 0.25, True, 0.8)
    assert math.isclose(optimizer.learning_rate, 4.5e-6 * 8 * config.data.batch_per_device, rel_tol=0.01)
    assert "kl_weight" not in loss


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_unknown_variant_is_named_with_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"configs/{name}.py has no variant 'smoek'; it has: paper, quickstart"):
        get_config(name, "smoek")


def test_sdxl_differs_from_sd_in_its_preset_only():
    for variant in ("paper", "quickstart", "smoke"):
        config, other = get_config("eq_sdxlvae", variant), get_config("eq_sdvae", variant)
        assert (config.preset, other.preset) == ("sdxl", "sd")
        config.preset = other.preset
        assert config.to_dict() == other.to_dict()


# eq_sdvae's is run whole, with its stages, by test_main.py.
@pytest.mark.parametrize("name", ["eq_sdvae16", "eq_sd3vae", "eq_vqgan"])
def test_the_smoke_variant_takes_eq_steps_and_describes_its_autoencoder(name, tmp_path):
    config = get_config(name, "smoke")
    config.stages = {}
    assert main.train(config, tmp_path) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in steps] == [1, 2] and all(row["branch_equivariance"] == 1 for row in steps)
    assert all(math.isfinite(row["nll"]) for row in steps)
    assert ("codebook_usage" in steps[0], "kl" in steps[0]) == ((True, False) if name == "eq_vqgan" else (False, True))
    section = json.loads((tmp_path / "config.json").read_text())["autoencoder"]
    assert section["kind"] == ("vq" if name == "eq_vqgan" else "kl")
    assert section["attention_levels"] == ([] if name == "eq_sd3vae" else [1])
