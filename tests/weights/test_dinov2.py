"""Weights of DINOv2 from Meta's files and Hugging Face's folders, and from files that are neither."""

import json
import os
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from dinov2_files import config_of, random_tensors, to_hugging_face, write_folder
from parity import assert_same

from eqvae_jax.features.dinov2 import DINOv2, parameter_shapes
from eqvae_jax.weights import WeightsError, load_dinov2

SMALL = dict(depth=2, width=64, grid=3)
KINDS = {"plain": {}, "registers": {"registers": 4}, "swiglu": {"swiglu": True}}
MODELS = {
    "plain": DINOv2(width=64, depth=2, hidden=256, grid=3),
    "registers": DINOv2(width=64, depth=2, hidden=256, grid=3, registers=4),
    "swiglu": DINOv2(width=64, depth=2, hidden=176, grid=3, swiglu=True),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tensors(rng, kind):
    return random_tensors(rng, **SMALL, **KINDS[kind])


@pytest.fixture
def plain(rng):
    return random_tensors(rng, **SMALL)


def save(path, tensors):
    safetensors.numpy.save_file(tensors, path)
    return path


def chunked(tensors):
    """Names of a model with FSDP's chunks of one block each, whose numbers go on from chunk to chunk."""
    return {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", name): value for name, value in tensors.items()}


def in_memory(tensors):
    """Names of Hugging Face's models since transformers 5, where SwiGLU's first matrix is two."""
    renamed = {}
    for name, value in to_hugging_face(tensors).items():
        name = re.sub(r"attention\.attention\.(.)\w+", r"attention.\1_proj", name)
        name = name.replace("attention.output.dense", "attention.o_proj").replace("mlp.weights_out", "mlp.down_proj")
        if "mlp.weights_in" in name:
            for part, half in zip(("gate_proj", "up_proj"), np.split(value, 2), strict=True):
                renamed[name.replace("weights_in", part)] = np.ascontiguousarray(half)
        else:
            renamed[name] = value
    return renamed


def test_what_a_file_says_is_where_it_belongs(tensors, kind, tmp_path):
    model, params, spec = load_dinov2(str(save(tmp_path / "x.safetensors", tensors)))
    assert model == MODELS[kind] and spec.reference == str(tmp_path / "x.safetensors") and len(spec.hash) == 16
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda s: s.shape, parameter_shapes(model))
    assert {value.dtype for value in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["block_1"]["qkv"]["kernel"], tensors["blocks.1.attn.qkv.weight"].T)
    np.testing.assert_array_equal(params["block_0"]["scale2"], tensors["blocks.0.ls2.gamma"])
    np.testing.assert_array_equal(params["patch"]["kernel"][3, 5], tensors["patch_embed.proj.weight"][:, :, 3, 5].T)
    np.testing.assert_array_equal(params["pos_embed"], tensors["pos_embed"])


def test_every_layout_gives_the_same_parameters_and_hash(torch, tensors, tmp_path):
    model, params, spec = load_dinov2(save(tmp_path / "meta.safetensors", tensors))
    in_torch = lambda tensors: {name: torch.tensor(value) for name, value in tensors.items()}
    torch.save(in_torch(tensors), tmp_path / "vitb14_pretrain.pth")
    torch.save(in_torch(tensors), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(in_torch(in_memory(tensors)), tmp_path / "in_memory.bin")
    save(tmp_path / "chunked.safetensors", chunked(tensors))
    write_folder(tmp_path / "folder", tensors)
    theirs = to_hugging_face(tensors)
    headed = {f"dinov2.{name}": value for name, value in theirs.items()}
    save(tmp_path / "headed.safetensors", headed | {"classifier.weight": np.ones((10, 128), np.float32)})
    save(tmp_path / "unmasked.safetensors", {name: t for name, t in theirs.items() if not name.endswith("mask_token")})

    (tmp_path / "old").mkdir()
    torch.save(in_torch(theirs), tmp_path / "old" / "pytorch_model.bin")

    (tmp_path / "shards").mkdir()
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(theirs)}
    for file in set(shards.values()):
        save(tmp_path / "shards" / file, {name: theirs[name] for name in theirs if shards[name] == file})
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    for name in ("vitb14_pretrain.pth", "old.pth", "in_memory.bin", "chunked.safetensors", "folder", "old", "shards",
                 "folder/model.safetensors", "headed.safetensors", "unmasked.safetensors"):
        other = load_dinov2(tmp_path / name)
        assert other[0] == model and other[2].hash == spec.hash, name
        assert_same(other[1], params)

    tensors["blocks.1.ls1.gamma"][7] += 1e-6
    assert load_dinov2(save(tmp_path / "other.safetensors", tensors))[2].hash != spec.hash


def test_what_transformers_saves_is_read(torch, transformers, plain, tmp_path):
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(**config_of(plain) | {
        "num_register_tokens": 3, "use_swiglu_ffn": True, "hidden_size": 128, "num_attention_heads": 2})
    network = transformers.Dinov2WithRegistersModel(config)
    network.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "state.pth")
    model, _, spec = load_dinov2(tmp_path)
    assert model == DINOv2(width=128, depth=2, hidden=344, grid=3, registers=3, swiglu=True)
    assert load_dinov2(tmp_path / "state.pth")[2].hash == spec.hash


def message(reference):
    with pytest.raises(WeightsError) as error:
        load_dinov2(reference)
    assert "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth" in str(error.value)
    return str(error.value)


def test_absent_files_say_what_to_get(tmp_path):
    assert "DINOv2 has no weights" in message("") and "DINOv2 has no weights" in message(None)
    assert f"there is no {tmp_path / 'nowhere.pth'}" in message(tmp_path / "nowhere.pth")
    assert f"{tmp_path}: holds neither" in message(tmp_path)
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    assert "page.pth: not a file that torch.save wrote" in message(tmp_path / "page.pth")
    assert "there is no facebook/dinov2-base" in message("facebook/dinov2-base")


def test_metas_names_are_listed_where_they_do_not_fit(plain, tmp_path):
    del plain["blocks.1.norm2.bias"]
    plain["head.weight"] = np.ones((10, 64), np.float32)
    plain["blocks.0.attn.qkv.weight"] = plain["blocks.0.attn.qkv.weight"][:-1]
    text = message(save(tmp_path / "x.safetensors", plain))
    assert "missing (1): blocks.1.norm2.bias" in text and "not expected (1): head.weight" in text
    assert "of another shape (1): blocks.0.attn.qkv.weight: (191, 64) instead of (192, 64)" in text


def test_hugging_faces_names_are_listed_where_they_do_not_fit(plain, tmp_path):
    theirs = to_hugging_face(plain)
    del theirs["encoder.layer.1.attention.attention.key.bias"]
    theirs["pooler.dense.weight"] = np.ones((64, 64), np.float32)
    theirs["embeddings.patch_embeddings.projection.weight"] = np.ones((64, 3, 16, 16), np.float32)
    theirs["encoder.layer.0.attention.attention.value.weight"] = np.ones((64, 65), np.float32)
    text = message(save(tmp_path / "x.safetensors", theirs))
    assert "missing (1): encoder.layer.1.attention.attention.key.bias" in text
    assert "not expected (1): pooler.dense.weight" in text
    assert "projection.weight: (64, 3, 16, 16) instead of (64, 3, 14, 14)" in text
    assert "encoder.layer.0.attention.attention.value.weight: (64, 65) instead of (64, 64)" in text


def cut(tensors, name, *index):
    tensors[name] = np.ascontiguousarray(tensors[name][index])


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda t: t.pop("cls_token"), "not a DINOv2 (KeyError: 'cls_token'); it holds "),
    (lambda t: t.update(cls_token=np.ones(64, np.float32)), "not a DINOv2 (ValueError"),
    (lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.")], "not a DINOv2 (KeyError: 'blocks.0."),
    (lambda t: cut(t, "pos_embed", slice(None), slice(9)), "positions for 9 tokens, which are no square and one more"),
    (lambda t: cut(t, "pos_embed", slice(None), slice(1)), "positions for 1 tokens"),
    (lambda t: cut(t, "cls_token", slice(None), slice(None), slice(60)), "its width of 60 does not divide into heads"),
    (lambda t: t.update(pos_embed=np.ones((1, 0, 64), np.float32)), "its tensors pos_embed are empty"),
    (lambda t: t.update({"blocks.0.1.ls1.gamma": np.ones(64, np.float32)}), "holds some blocks twice"),
    (lambda t: t.update({"blocks.7.ls1.gamma": np.ones(64, np.float32)}), "not expected (1): blocks.7.ls1.gamma"),
    (lambda t: t["norm.bias"].put(3, np.nan), "values that are not finite, in norm.bias"),
    (lambda t: t["blocks.1.mlp.fc2.weight"].put(3, np.inf), "values that are not finite, in block_1.fc2.kernel"),
    (lambda t: t.update(register_tokens=np.ones((1, 4, 32), np.float32)), "(1, 4, 32) instead of (1, 4, 64)"),
])
def test_what_is_no_dinov2_is_refused(plain, tmp_path, spoil, said):
    spoil(plain)
    text = message(save(tmp_path / "x.safetensors", plain))
    assert said in text and str(tmp_path / "x.safetensors") in text


@pytest.mark.parametrize(("name", "value", "said"), [
    ("num_attention_heads", 2, "num_attention_heads is 2, and a DINOv2 of width 64 has 1"),
    ("layer_norm_eps", 1e-5, "layer_norm_eps is 1e-05"), ("hidden_act", "gelu_new", "hidden_act is 'gelu_new'"),
    ("qkv_bias", False, "qkv_bias is False"), ("model_type", "vit", "describes a 'vit'"),
])
def test_a_config_that_our_model_cannot_follow_is_refused(plain, tmp_path, name, value, said):
    folder = write_folder(tmp_path / "folder", plain)
    (folder / "config.json").write_text(json.dumps(config_of(plain) | {name: value}))
    assert f"{folder / 'config.json'}: {said}" in message(folder)
    (folder / "config.json").write_text("[]")
    assert "not a JSON object" in message(folder)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_pickles_are_never_run(torch, plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {name: torch.tensor(value) for name, value in plain.items()}
    torch.save(state, "plain.pth")
    torch.save(state | {"cls_token": Hostile()}, "hostile.pth")
    assert "not a DINOv2 (KeyError: 'cls_token')" in message("hostile.pth")
    assert not (tmp_path / "hacked").exists()
    whole = (tmp_path / "plain.pth").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 5):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        assert "cut.pth: " in message("cut.pth")


def test_mutated_headers_fail_with_our_error_only(plain, rng, tmp_path):
    path, failures = save(tmp_path / "x.safetensors", plain), 0
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(200):
        data = bytearray(whole)
        for at in rng.integers(0, header, rng.integers(1, 4)):
            data[at] = rng.choice(list(b'0123456789,"[]x')) if rng.random() < 0.7 else rng.integers(256)
        path.write_bytes(bytes(data))
        try:
            load_dinov2(path)
        except WeightsError as error:
            failures += 1
            assert str(path) in str(error)
    assert failures > 150
