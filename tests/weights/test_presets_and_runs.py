"""Autoencoders of presets and of runs of ours: random weights, a calm beginning, hashes, workdirs."""

import re

import flax
import jax
import numpy as np
import pytest
from parity import assert_same, refused

from eqvae_jax.autoencoders.blocks import ResnetBlock
from eqvae_jax.autoencoders.presets import PRESETS
from eqvae_jax.weights import load_autoencoder, open_autoencoder, tables
from eqvae_jax.weights.autoencoders import parameter_hash
from eqvae_jax.weights.initial import random_parameters

SMALL = [name for name in PRESETS if "smoke" in name]


@pytest.mark.parametrize("name", SMALL)
def test_a_preset_gives_its_model_scale_and_shift(name):
    preset = PRESETS[name]
    model, params, spec, left_out = open_autoencoder(f"init:{name}")
    assert model == preset.model and left_out == {}
    assert (spec.kind, spec.scale, spec.shift) == (model.kind, preset.scale, preset.shift)
    assert spec.reference == f"init:{name}" and re.fullmatch("[0-9a-f]{16}", spec.hash)
    assert "did you mean 'smoke'? There are sd, sd16" in refused("init:smok")


def test_init_begins_with_idle_residual_branches_and_a_narrow_posterior(rng):
    for name in SMALL:
        model, params, _ = load_autoencoder(f"init:{name}")
        x, block = rng.normal(size=(1, 4, 4, 8)).astype(np.float32), params["encoder"]["down_0_block_0"]
        idle = ResnetBlock(8, 4).apply({"params": block}, x)
        np.testing.assert_allclose(idle, x + block["conv2"]["bias"], atol=1e-6)
        assert not params["decoder"]["mid_attention"]["out"]["kernel"].any()
        image = rng.uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
        latent = model.apply({"params": params}, image, method="encode")
        if model.kind == "kl":
            assert np.abs(np.asarray(latent.logvar) + 5).max() < 3, name
        else:
            assert np.isclose(params["codebook"].std(), 0.15) and all(params["quant_conv"]["bias"] != 0)


def test_random_parameters_are_distributed_as_the_models_own_initialisation():
    _, params, spec = load_autoencoder("init:smoke", seed=5)
    again, other = load_autoencoder("init:smoke", seed=5), load_autoencoder("init:smoke", seed=6)
    assert_same(params, again[1])
    assert spec.hash == again[2].hash != other[2].hash

    block, x = ResnetBlock(32, groups=4), np.zeros((1, 8, 8, 24), np.float32)
    drawn = random_parameters(jax.eval_shape(block.init, jax.random.key(0), x)["params"], seed=5)
    ours, own = (flax.traverse_util.flatten_dict(tree) for tree in (drawn, block.init(jax.random.key(0), x)["params"]))
    assert ours.keys() == own.keys()
    for path, value in own.items():
        assert ours[path].shape == value.shape and ours[path].dtype == value.dtype
        if "norm" in path[0]:
            np.testing.assert_array_equal(ours[path], value)
        else:
            tolerance = 0.02 if value.size > 500 else 0.3
            np.testing.assert_allclose(np.abs(ours[path]).max(), np.abs(value).max(), rtol=tolerance, err_msg=path)
            np.testing.assert_allclose(ours[path].std(), value.std(), rtol=2 * tolerance, err_msg=path)
            assert abs(ours[path].mean()) < 5 * tolerance * np.abs(value).max()

    shapes = tables.parameter_shapes(PRESETS["vqgan-quickstart"].model)
    codebook = random_parameters(shapes, seed=5)["codebook"]                 # U(-1/K, 1/K) of K = 256
    np.testing.assert_allclose([codebook.min(), codebook.max()], [-1 / 256, 1 / 256], rtol=0.01)
    np.testing.assert_allclose(codebook.std(), 1 / 256 / 3**0.5, rtol=0.05)


def test_the_hash_sees_every_value_name_and_shape():
    a = {"x": {"kernel": np.arange(6, dtype=np.float32)}, "y": np.ones(2, np.float32)}
    assert parameter_hash(a) == parameter_hash({"y": a["y"], "x": {"kernel": a["x"]["kernel"].astype(np.float64)}})
    changed = [{**a, "y": np.array([1, 1 + 1e-6], np.float32)}, {"z": a["x"], "y": a["y"]},
               {**a, "x": {"kernel": a["x"]["kernel"].reshape(2, 3)}}]
    assert len({parameter_hash(tree) for tree in [a, *changed]}) == 4


@pytest.mark.parametrize("preset", ["smoke", "sd3-smoke", "vqgan-smoke"])
def test_a_workdir_gives_its_average_or_else_its_parameters(save_run, tmp_path, preset):
    model, params, spec = load_autoencoder(f"init:{preset}", seed=1)
    save_run(tmp_path / "run", preset, scale=0.5)
    opened = open_autoencoder(f"workdir:{tmp_path / 'run'}")
    assert opened.model == model and opened.spec.hash == spec.hash
    assert (opened.spec.kind, opened.spec.scale, opened.spec.shift) == (model.kind, 0.5, spec.shift)
    assert list(opened.left_out.values()) == [["ema", "opt_state", "buffers"]]
    assert_same(opened.params, params)

    average = jax.tree.map(lambda p: p + 1, params)
    save_run(tmp_path / "averaged", preset, ema=average)
    opened = open_autoencoder(f"workdir:{tmp_path / 'averaged'}")
    assert list(opened.left_out.values()) == [["params", "opt_state", "buffers"]]
    assert_same(opened.params, average)


def test_runs_that_do_not_fit_are_explained(save_run, monkeypatch, tmp_path):
    from eqvae_jax.training import checkpoint

    save_run(tmp_path / "wide", "smoke", latent_channels=3)
    assert "encoder/conv_out/bias: (8,) instead of (6,)" in refused(f"workdir:{tmp_path / 'wide'}")
    save_run(tmp_path / "newer", "smoke", kind="fsq")
    assert "an autoencoder of kind 'fsq'; this version knows kl, vq" in refused(f"workdir:{tmp_path / 'newer'}")
    assert "workdir:" in refused(f"workdir:{tmp_path / 'none'}")
    monkeypatch.setattr(checkpoint, "load_params", lambda workdir, which: ({"generator": {}}, {"generator": {}}, 7))
    assert "its run trained no autoencoder" in refused("workdir:run")


def test_a_run_from_before_there_were_kinds_is_kl(monkeypatch):
    from eqvae_jax.training import checkpoint

    model, params, _ = load_autoencoder("init:smoke", seed=1)
    section = {"channels": 8, "multipliers": [1, 2], "blocks_per_level": 1, "latent_channels": 4, "groups": 4,
               "attention_levels": [], "quant": True, "scale": 0.5, "shift": 0.25}
    monkeypatch.setattr(checkpoint, "load_params",
                        lambda workdir, which: ({"autoencoder": params}, {"autoencoder": section}, 7))
    ours, back, spec = load_autoencoder("workdir:run")
    assert ours == model and (spec.kind, spec.scale, spec.shift) == ("kl", 0.5, 0.25)
    assert_same(back, params)
