"""Files and references that are no generator's, and what the formats have no place for."""


import pytest
from small_generators import DIT, SIT, SMALL, drawn, refused, saved, spec_of

from eqvae_jax.weights import WeightsError
from eqvae_jax.weights.generators import (
    load_generator,
    save_generator,
)


def test_references_that_are_none(tmp_path):
    assert "there is no kind 'dti', did you mean 'dit'?" in refused("dti:x.pt")
    assert "no such file" in refused(f"dit:{tmp_path / 'x.pt'}")
    assert "no such file" in refused(f"sit:{tmp_path / 'x.safetensors'}")


def test_misfits_are_listed(torch, public_dit, tmp_path):
    state = public_dit.state_dict()
    state["blocks.0.attn.proj.weight"] = torch.zeros(128, 127)
    state["blocks.1.surprise"] = state.pop("blocks.1.mlp.fc2.bias")
    report = refused(f"dit:{saved(torch, state, tmp_path / 'x.pt')}")
    assert "missing (1): blocks.1.mlp.fc2.bias" in report and "not expected (1): blocks.1.surprise" in report
    assert "blocks.0.attn.proj.weight: (128, 127) instead of (128, 128)" in report and str(tmp_path) in report


CHANGES = {
    "pos_embed is not DiT's": lambda state, torch: {"pos_embed": state["pos_embed"] + 0.01},
    "pos_embed is (1, 15, 128); it must be": lambda state, torch: {"pos_embed": torch.zeros(1, 15, 128)},
    "pos_embed is (1, 16, 64); it must be": lambda state, torch: {"pos_embed": torch.zeros(1, 16, 64)},
    "not a DiT or SiT (KeyError: 'y_embedder": lambda state, torch: {"y_embedder.embedding_table.weight": None},
    "not a DiT or SiT (ValueError": lambda state, torch: {"x_embedder.proj.weight": torch.zeros(128, 12)},
    "makes 23 numbers, which do not divide into patches of 2": lambda state, torch: {
        "final_layer.linear.weight": torch.zeros(23, 128)},
    "final_layer.linear.bias: (23,) instead of (24,)": lambda state, torch: {
        "final_layer.linear.bias": torch.zeros(23)},
    "missing (10): blocks.2.adaLN_modulation.1.bias": lambda state, torch: {"blocks.9.x": torch.zeros(1)},
    "blocks.00.x": lambda state, torch: {"blocks.00.x": torch.zeros(1)},
    "tensors twice": lambda state, torch: {"module.pos_embed": state["pos_embed"]},
    "blocks.0.attn.qkv.bias are empty": lambda state, torch: {"blocks.0.attn.qkv.bias": torch.zeros(10**12, 0)},
}


@pytest.mark.parametrize("message", CHANGES)
def test_other_models_are_refused(torch, public_dit, tmp_path, message):
    state = public_dit.state_dict()
    changed = state | CHANGES[message](state, torch)
    file = saved(torch, {name: value for name, value in changed.items() if value is not None}, tmp_path / "x.pt")
    report = refused(f"dit:{file}")
    assert message in report and str(file) in report


def test_files_without_weights_are_refused(torch, tmp_path):
    assert "no named tensors" in refused(f"dit:{saved(torch, {'ema': {}}, tmp_path / 'x.pt')}")
    assert "no named tensors" in refused(f"dit:{saved(torch, [1], tmp_path / 'x.pt')}")
    state = {"conv.weight": torch.zeros(3)}
    assert "it holds conv.weight ..." in refused(f"dit:{saved(torch, state, tmp_path / 'x.pt')}")
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    assert "not a file that torch.save wrote" in refused(f"sit:{tmp_path / 'page.pt'}")


def test_heads_are_asked_for_where_the_width_does_not_tell(torch, torch_dit, tmp_path):
    network = torch_dit.DiT(**SMALL | dict(width=96, heads=3), out_channels=3)
    file = saved(torch, network.state_dict(), tmp_path / "x.pt")
    assert "width of 96 does not tell how many heads it has; say heads=N" in refused(f"dit:{file}")
    assert load_generator(f"dit:{file}", heads=3)[0].heads == 3
    assert "96 does not divide into 5 heads" in refused(f"dit:{file}", heads=5)


def test_a_sit_predicts_its_own_channels_or_twice_as_many(torch, torch_dit, tmp_path):
    network = torch_dit.DiT(**SMALL, out_channels=5)
    file = saved(torch, network.state_dict(), tmp_path / "x.pt")
    assert "a SiT of 3 channels predicts 3 or 6; this one predicts 5" in refused(f"sit:{file}")
    assert load_generator(f"dit:{file}")[0].out_channels == 5


@pytest.mark.parametrize(("reference", "model", "kind", "message"), [
    ("dit:x.ckpt", DIT, "dit", "dit:FILE, sit:FILE or repa:FILE, .pt or .safetensors"),
    ("workdir:x", DIT, "dit", "are written as dit:FILE, sit:FILE, repa:FILE or maskgit:FILE"),
    ("dit:x.pt", SIT, "sit", "are a sit's, here; write sit:x.pt"),
    ("sit:x.pt", DIT, "sit", "SiT predicts as many channels as it is given, 3; this model predicts 6"),
    ("dit:x.pt", DIT.clone(reversed_time=True), "dit", "reversed times, which dit's own code does not"),
    ("dit:x.pt", DIT.clone(heads=4), "dit", "readers take 2 for a width of 128, and this one has 4"),
    ("dit:x.pt", DIT.clone(depth=3), "dit", "missing (10): block_2/"),
])
def test_what_a_format_has_no_place_for_is_not_written(rng, tmp_path, monkeypatch, reference, model, kind, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError) as error:
        save_generator(reference, model, drawn(rng, model.clone(depth=2)), spec_of(kind))
    assert message in str(error.value) and not list(tmp_path.iterdir())
