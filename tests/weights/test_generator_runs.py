"""Generators' weights of runs of ours, and blocks one by one or stacked."""


import jax
import ml_collections
import numpy as np
import pytest
from parity import assert_same
from small_generators import DIT, SIT, drawn, refused, spec_of

from eqvae_jax.generators.networks import describe
from eqvae_jax.training import checkpoint
from eqvae_jax.training.checkpoint import Checkpoints
from eqvae_jax.training.state import TrainState
from eqvae_jax.weights import maskgit, tables
from eqvae_jax.weights.blocks import stack_blocks, unstack_blocks
from eqvae_jax.weights.generators import load_generator, save_generator

LATENTS = {"hash": "0123456789abcdef", "reference": "init:smoke", "scale": 0.2, "shift": 0.1}


def test_stacking_is_undone_and_changes_no_hash(rng, tmp_path):
    params = drawn(rng, DIT)
    stacked = stack_blocks(params)
    assert stacked["blocks"]["qkv"]["kernel"].shape == (2, 128, 384) and stack_blocks(stacked) is stacked
    np.testing.assert_array_equal(stacked["blocks"]["fc1"]["bias"][1], params["block_1"]["fc1"]["bias"])
    assert_same(unstack_blocks(stacked), params)
    shapes = jax.eval_shape(DIT.clone(scan=True).init, jax.random.key(0), np.zeros((1, 8, 8, 3), "f"),
                            np.zeros(1, "f"), np.zeros(1, int))["params"]
    tables.check_parameters("stacked", stacked, shapes)        # what a model with scan takes

    save_generator(f"dit:{tmp_path / 'x.pt'}", DIT.clone(scan=True), stacked, spec_of("dit"))
    model, back, spec = load_generator(f"dit:{tmp_path / 'x.pt'}", scan=True)
    assert model == DIT.clone(scan=True) and spec.hash == load_generator(f"dit:{tmp_path / 'x.pt'}")[2].hash
    assert_same(back, stacked)


def test_order_of_ten_and_more_blocks(rng):
    params = {f"block_{i}": {"x": np.full(1, i)} for i in (10, 2, 1, 0, 3, 4, 5, 6, 7, 8, 9)}
    np.testing.assert_array_equal(stack_blocks(params)["blocks"]["x"][:, 0], np.arange(11))


def save_run(directory, model, params, ema=None, latents=LATENTS, **section):
    config = ml_collections.ConfigDict({
        "seed": 1, "checkpoint": dict(keep=1, keep_best=0, best_metric="", best_mode="min"),
        "generator": describe(model) | {"kind": "sit", "prediction": "velocity", "path": "linear"} | section,
        "latents": latents, "sampling": {"steps": 50},
    })
    state = TrainState.create({"generator": params}, {}, ema and {"generator": ema}, {})
    with Checkpoints(directory, config) as checkpoints:
        checkpoints.save(7, state)
    return f"workdir:{directory}"


def test_runs_give_their_average_and_what_their_latents_are(rng, tmp_path):
    model, params = SIT.clone(reversed_time=False), drawn(rng, SIT)
    reference = save_run(tmp_path / "run", model.clone(scan=True), stack_blocks(params))
    ours, back, spec = load_generator(reference)
    assert ours == model and spec.kind == "sit" and spec.latents == LATENTS and spec.source == reference
    assert spec.process == {"prediction": "velocity", "path": "linear"} and spec.sampling == {"steps": 50}
    assert_same(back, params)
    stacked = load_generator(reference, scan=True)
    assert stacked[0] == model.clone(scan=True) and stacked[2].hash == spec.hash
    assert_same(stacked[1], stack_blocks(params))

    average = jax.tree.map(lambda p: p + 1, params)
    assert_same(load_generator(save_run(tmp_path / "averaged", model, params, average))[1], average)


@pytest.mark.parametrize("kind", maskgit.NETWORKS)
def test_runs_of_maskgit_give_the_network_they_trained(rng, tmp_path, kind):
    model = maskgit.NETWORKS[kind](input_size=4, codes=11, classes=5, width=64, depth=2, heads=4, mlp_size=96)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), maskgit.parameter_shapes(model))
    reference = save_run(tmp_path / "run", model.clone(scan=True), stack_blocks(params), kind=kind)
    ours, back, spec = load_generator(reference)
    assert (ours, spec.kind, spec.classes, spec.latents) == (model, kind, 5, LATENTS)
    assert_same(back, params)


def test_runs_that_do_not_fit_are_explained(rng, monkeypatch, tmp_path):
    params = drawn(rng, SIT)

    def refused_run(name, *arguments, **more):
        return refused(save_run(tmp_path / name, *arguments, **more))

    assert "qkv/kernel: (128, 384) instead of (64, 192)" in refused_run("narrow", SIT, params, width=64)
    assert "a generator of kind 'edm'; this version knows dit, sit" in refused_run("kind", SIT, params, kind="edm")
    assert "lacks depth" in refused_run("lacks", SIT, params, depth="many")
    assert "'scale'" in refused_run("latents", SIT, params, latents={"hash": "0", "reference": "init:smoke"})
    assert "do not agree" in refused_run("uneven", SIT, stack_blocks(params) | {
        "blocks": {"a": np.zeros((2, 3)), "b": np.zeros((3, 3))}})
    assert f"workdir:{tmp_path / 'none'}" in refused(f"workdir:{tmp_path / 'none'}")
    for saved, config in (({"autoencoder": params}, {"generator": {"kind": "sit"}}), ({"generator": params}, {})):
        monkeypatch.setattr(checkpoint, "load_params", lambda workdir, which, found=(saved, config, 7): found)
        assert "its run trained no generator" in refused("workdir:run")
