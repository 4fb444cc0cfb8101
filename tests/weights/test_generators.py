"""Generators' weights from and into every kind of file. The forward pass beside torch: tests/generators."""

import argparse
import importlib
import math

import jax
import numpy as np
import pytest
import safetensors.numpy
from parity import assert_same
from small_generators import ALIGNED, DIT, SIT, SMALL, drawn, saved, spec_of

from eqvae_jax.generators.dit import SIZES, positions, preset
from eqvae_jax.weights import WeightsError, tables
from eqvae_jax.weights.blocks import parameter_shapes
from eqvae_jax.weights.generators import key_of, load_generator, save_generator


def training_checkpoint(torch, state):
    """What DiT's train.py keeps: the weights, their average and more."""
    other = {name: value + 1 for name, value in state.items()}
    return {"model": other, "ema": state, "opt": {"state": {0: {"exp_avg": torch.randn(2)}}, "param_groups": []},
            "args": argparse.Namespace(model="DiT-XL/2")}


WRAPPINGS = {
    "bare": lambda torch, state: state,
    "of train.py": training_checkpoint,
    "no average": lambda torch, state: {"model": state, "steps": 3},
    "data parallel": lambda torch, state: {"ema": {f"module.{name}": value for name, value in state.items()}},
    "compiled": lambda torch, state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "both": lambda torch, state: {f"module._orig_mod.{name}": value for name, value in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_gives_the_same(torch, public_dit, tmp_path, wrapping):
    state = public_dit.state_dict()
    plain = saved(torch, state, tmp_path / "plain.pt")
    model, params, spec = load_generator(f"dit:{plain}")
    assert model == DIT and (spec.kind, spec.classes, spec.latents, spec.process) == ("dit", 5, None, {})
    wrapped = saved(torch, WRAPPINGS[wrapping](torch, state), tmp_path / "x.pt")
    again = load_generator(f"dit:{wrapped}")
    assert again[0] == model and again[2].hash == spec.hash and again[2].source == f"dit:{wrapped}"
    assert_same(params, again[1])


def test_safetensors_and_sixteen_bits_are_read(torch, public_dit, tmp_path):
    state = public_dit.state_dict()
    _, params, spec = load_generator(f"dit:{saved(torch, state, tmp_path / 'x.pt')}")
    safetensors.numpy.save_file({name: np.ascontiguousarray(value) for name, value in state.items()},
                                tmp_path / "x.safetensors")
    assert load_generator(f"dit:{tmp_path / 'x.safetensors'}")[2].hash == spec.hash
    for dtype in (torch.float16, torch.bfloat16):
        half = {name: value.to(dtype) for name, value in state.items()}            # its rounded positions pass
        rough = load_generator(f"dit:{saved(torch, half, tmp_path / 'half.pt')}")[1]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.005, atol=1e-6), rough, params)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_dit_files_of_ours_load_strictly_in_torch_and_back(torch, torch_dit, rng, tmp_path, suffix, qk_norm):
    model = DIT.clone(qk_norm=qk_norm)
    params, file = drawn(rng, model), tmp_path / f"x.{suffix}"
    save_generator(f"dit:{file}", model, params, spec_of("dit"))
    network = torch_dit.DiT(**SMALL, out_channels=6, qk_norm=qk_norm)
    table = network.pos_embed.clone()
    state = torch.load(file) if suffix == "pt" else importlib.import_module("safetensors.torch").load_file(file)
    network.load_state_dict(state, strict=True)
    torch.testing.assert_close(network.pos_embed, table, rtol=0, atol=1e-6)
    again, back, _ = load_generator(f"dit:{file}")
    assert again == model
    assert_same(back, params)


def velocities(torch, network, x, t, labels):
    """The public network's velocity in our direction, NHWC, for times of ours."""
    with torch.no_grad():
        y, _ = network(torch.tensor(x).permute(0, 3, 1, 2), 1 - torch.tensor(t), torch.tensor(labels))
    return -y.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("turn", [True, False])
def test_sit_files_of_ours_compute_the_same_velocity_in_torch(torch, torch_dit, rng, tmp_path, turn):
    """turn: whether the network is given 1 - t; one that is not has its first layer rewritten, exactly."""
    model = SIT.clone(reversed_time=turn)
    params, file = drawn(rng, model), tmp_path / "x.pt"
    save_generator(f"sit:{file}", model, params, spec_of("sit", process={"prediction": "velocity"}))
    network = torch_dit.SiT(**SMALL, out_channels=6)
    network.load_state_dict(torch.load(file), strict=True)
    assert not network.final_layer.linear.weight.reshape(4, 6, 128)[:, 3:].any()
    x, t = rng.normal(size=(3, 8, 8, 3)).astype(np.float32), np.array([0.0, 0.3, 1.0], np.float32)
    labels = np.array([0, 4, 5])
    ours = model.apply({"params": params}, x, t, labels).prediction
    theirs = velocities(torch, network, x, t, labels)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())

    again, back, spec = load_generator(f"sit:{file}")
    assert again == SIT and spec.process == {"prediction": "velocity"}
    if turn:
        assert_same(back, params)
    np.testing.assert_allclose(again.apply({"params": back}, x, t, labels).prediction, theirs,
                               rtol=0, atol=1e-5 * np.abs(theirs).max())


class Projector:
    """REPA's network in torch: the transcription of DiT with the projector in its names."""

    def __new__(cls, torch, torch_dit):
        nn, network = torch.nn, torch_dit.DiT(**SMALL, out_channels=3)
        layers = nn.Linear(128, 24), nn.SiLU(), nn.Linear(24, 24), nn.SiLU(), nn.Linear(24, 7)
        network.projectors = nn.ModuleList([nn.Sequential(*layers)])
        return network


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_repa_files_of_ours_load_strictly_in_torch_and_say_the_same(torch, torch_dit, rng, tmp_path, suffix):
    params, file = drawn(rng, ALIGNED), tmp_path / f"x.{suffix}"
    save_generator(f"repa:{file}", ALIGNED, params, spec_of("repa"))
    network = Projector(torch, torch_dit)
    state = torch.load(file) if suffix == "pt" else importlib.import_module("safetensors.torch").load_file(file)
    network.load_state_dict(state, strict=True)
    x, t = rng.normal(size=(3, 8, 8, 3)).astype(np.float32), np.array([0.0, 0.3, 1.0], np.float32)
    with torch.no_grad():
        y, hidden = network(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor([0, 4, 5]))
        projected = network.projectors[0](hidden[1])
    model, back, spec = load_generator(f"repa:{file}")
    assert model == ALIGNED and spec.kind == "repa"
    assert_same(back, params)
    ours = model.apply({"params": back}, x, t, np.array([0, 4, 5]))
    for mine, theirs in ((ours.prediction, y.permute(0, 2, 3, 1)), (ours.projected, projected)):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_blocks_behind_the_projector_may_have_their_old_names(torch, torch_dit, tmp_path):
    state = torch_dit.randomise(Projector(torch, torch_dit)).state_dict()
    _, params, spec = load_generator(f"repa:{saved(torch, state, tmp_path / 'x.pt')}")
    old = {name.replace("blocks.1.", "decoder_blocks.0."): value for name, value in state.items()}
    model, _, again = load_generator(f"repa:{saved(torch, {'ema': old}, tmp_path / 'old.pt')}")
    assert again.hash == spec.hash and model.alignment_depth == 1  # as many blocks as come before the others
    del state["projectors.0.2.bias"]
    with pytest.raises(WeightsError, match="projectors.0.2.bias"):
        load_generator(f"repa:{saved(torch, state, tmp_path / 'less.pt')}")


def test_only_the_velocity_changes_its_sign_with_time(rng, tmp_path):
    params = drawn(rng, SIT)
    save_generator(f"sit:{tmp_path / 'x.pt'}", SIT, params, spec_of("sit", process={"prediction": "score"}))
    assert_same(load_generator(f"sit:{tmp_path / 'x.pt'}", prediction="score")[1], params)
    other = load_generator(f"sit:{tmp_path / 'x.pt'}")[1]
    np.testing.assert_array_equal(other["final"]["bias"], -params["final"]["bias"])


def test_the_whole_table_has_a_place_in_torch(torch, torch_dit, monkeypatch):
    """Every published size: names and shapes, on torch's meta device and as views of one zero."""
    monkeypatch.setattr(torch_dit, "position_table", lambda width, grid: torch.zeros(1, grid**2, width))
    for size in SIZES:
        for patch in (2, 4, 8):
            model = preset(f"{size}/{patch}")
            with torch.device("meta"):
                theirs = torch_dit.DiT(patch_size=patch, width=model.width, depth=model.depth, heads=model.heads)
            names = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
            del names["pos_embed"]
            names["x_embedder.proj.weight"] = (model.width, 4 * patch**2)
            params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), parameter_shapes(model))
            ours = tables.write_parameters(params, parameter_shapes(model), key_of)
            assert {name: value.shape for name, value in ours.items()} == names


def test_patches_keep_row_column_and_channel_apart(torch, public_dit, tmp_path):
    weight = np.zeros((128, 3, 2, 2), np.float32)
    weight[7, 2, 1, 0] = 5                                     # feature 7 sees channel 2 of the lower left pixel
    state = public_dit.state_dict() | {"x_embedder.proj.weight": torch.tensor(weight)}
    _, params, _ = load_generator(f"dit:{saved(torch, state, tmp_path / 'x.pt')}")
    assert np.argwhere(params["patch"]["kernel"]).tolist() == [[(1 * 2 + 0) * 3 + 2, 7]]


def test_positions_of_the_transcription_are_ours(torch_dit):
    for width, grid in ((128, 4), (192, 3)):
        np.testing.assert_allclose(torch_dit.position_table(width, grid)[0], positions(width, grid), rtol=0, atol=1e-6)
    assert math.isclose(positions(128, 4)[1, 0], math.sin(1), rel_tol=1e-6)
