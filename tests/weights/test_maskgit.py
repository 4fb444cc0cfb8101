"""MaskGIT's weights from and into files of both kinds, and what hostile ones get. Beside torch: tests/generators."""

import struct

import jax
import msgpack
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization
from parity import assert_same
from small_generators import refused, saved

from eqvae_jax.generators.maskgit import MaskGIT, preset
from eqvae_jax.generators.maskgit_original import OriginalMaskGIT
from eqvae_jax.weights import WeightsError, tables
from eqvae_jax.weights.blocks import parameter_shapes
from eqvae_jax.weights.generators import GeneratorSpec, load_generator, save_generator
from eqvae_jax.weights.maskgit import key_of, original_layout, to_original

SMALL = dict(input_size=4, width=64, depth=2, mlp_size=96)                       # the released vocabulary and heads
OTHER = dict(codes=11, classes=5, heads=4)
# What the facts say of the released file: name -> shape.
RELEASED = {
    "tok_emb.weight": (2026, 768), "pos_emb": (1, 257, 768), "bias": (257, 2026), "first_layer.0.weight": (768,),
    "first_layer.4.bias": (768,), "first_layer.2.weight": (768, 768), "first_layer.6.bias": (768,),
    "transformer.layers.0.0.norm.weight": (768,), "transformer.layers.0.0.fn.mha.in_proj_weight": (2304, 768),
    "transformer.layers.0.0.fn.mha.in_proj_bias": (2304,), "transformer.layers.0.0.fn.mha.out_proj.weight": (768, 768),
    "transformer.layers.23.0.fn.mha.out_proj.bias": (768,), "transformer.layers.0.1.norm.bias": (768,),
    "transformer.layers.0.1.fn.net.0.weight": (3072, 768), "transformer.layers.23.1.fn.net.3.weight": (768, 3072),
    "last_layer.0.weight": (768,), "last_layer.2.weight": (768, 768), "last_layer.4.bias": (768,),
}
ORIGINAL = {
    "Embed_0/word_embeddings/embedding": (2025, 768), "Embed_0/position_embeddings/embedding": (257, 768),
    "Embed_0/embeddings_ln/scale": (768,), "MlmLayer_0/mlm_dense/kernel": (768, 768), "MlmLayer_0/mlm_ln/bias": (768,),
    "MlmLayer_0/mlm_bias/bias": (2025,),
    "TransformerLayer_0/Attention_0/self_attention/query/kernel": (768, 16, 48),
    "TransformerLayer_0/Attention_0/self_attention/value/bias": (16, 48),
    "TransformerLayer_23/Attention_0/self_attention/out/kernel": (16, 48, 768),
    "TransformerLayer_23/Attention_0/self_attention/out/bias": (768,),
    "TransformerLayer_0/Attention_0/attention_output_ln/scale": (768,),
    "TransformerLayer_0/Mlp_0/intermediate_output/kernel": (768, 3072),
    "TransformerLayer_0/Mlp_0/layer_output/kernel": (3072, 768),
    "TransformerLayer_0/Mlp_0/layer_output_ln/bias": (768,),
}


def drawn(rng, model):
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), parameter_shapes(model))


def spec_of(model):
    return GeneratorSpec("maskgit" if isinstance(model, MaskGIT) else "maskgit-original", model.classes, "here", "")


def refuses(model, params, file, spec=None, kind="maskgit"):
    with pytest.raises(WeightsError) as error:
        save_generator(f"{kind}:{file}", model, params, spec or spec_of(model))
    assert not file.exists()
    return str(error.value)


@pytest.fixture(scope="module")
def public():
    """A state dict of the reproduction, in torch, nowhere zero."""
    torch = pytest.importorskip("torch")
    shapes = parameter_shapes(MaskGIT(**SMALL))
    tensors = tables.write_parameters(drawn(np.random.default_rng(1), MaskGIT(**SMALL)), shapes, key_of)
    tensors["pos_emb"] = tensors["pos_emb"][None]
    return {name: torch.tensor(np.array(value)) for name, value in tensors.items()}


def test_names_and_shapes_are_the_released_ones():
    model = MaskGIT()
    params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), parameter_shapes(model))
    tensors = tables.write_parameters(params, parameter_shapes(model), key_of)
    tensors["pos_emb"] = tensors["pos_emb"][None]
    assert len(tensors) == 3 + 2 * 7 + 24 * 12
    assert {name: tensors[name].shape for name in RELEASED} == RELEASED
    shapes = dict(pair for pairs in original_layout(OriginalMaskGIT()).values() for pair in pairs)
    assert len(shapes) == 2 + 2 + 5 + 24 * 16 and {name: shapes[name] for name in ORIGINAL} == ORIGINAL


def test_the_transcription_has_every_name(torch, torch_maskgit):
    for name in ("base", "big"):
        model = preset(name, depth=2)
        with torch.device("meta"):
            theirs = torch_maskgit.MaskGIT(width=model.width, depth=2, mlp_size=model.mlp_size).state_dict()
        params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), parameter_shapes(model))
        ours = tables.write_parameters(params, parameter_shapes(model), key_of)
        ours["pos_emb"] = ours["pos_emb"][None]
        assert {name: value.shape for name, value in ours.items()} == {n: tuple(v.shape) for n, v in theirs.items()}


WRAPPINGS = {
    "released": lambda torch, state: {"iter": 755_200, "global_epoch": 300, "model_state_dict": state,
                                      "optimizer_state_dict": {"state": {0: {"step": torch.tensor(1.0)}}}},
    "parallel": lambda torch, state: {"model_state_dict": {f"module.{name}": value for name, value in state.items()}},
    "compiled": lambda torch, state: {f"module._orig_mod.{name}": value for name, value in state.items()},
}


def test_every_wrapping_gives_the_same(torch, public, tmp_path):
    model, params, spec = load_generator(f"maskgit:{saved(torch, public, tmp_path / 'bare.pt')}")
    assert model == MaskGIT(**SMALL) and (spec.kind, spec.classes, spec.latents) == ("maskgit", 1000, None)
    arrays = {name: np.ascontiguousarray(value) for name, value in public.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    assert load_generator(f"maskgit:{tmp_path / 'x.safetensors'}")[2].hash == spec.hash
    for name, wrap in WRAPPINGS.items():
        again = load_generator(f"maskgit:{saved(torch, wrap(torch, public), tmp_path / f'{name}.pth')}")
        assert again[0] == model and again[2].hash == spec.hash
    model, stacked, _ = load_generator(f"maskgit:{tmp_path / 'bare.pt'}", scan=True)
    assert model.scan and stacked["blocks"]["qkv"]["kernel"].shape == (2, 64, 192)
    np.testing.assert_array_equal(stacked["blocks"]["fc1"]["bias"][1], params["block_1"]["fc1"]["bias"])


@pytest.mark.parametrize("other", [{}, OTHER])
def test_files_of_ours_load_strictly_in_torch_and_back(torch, torch_maskgit, rng, tmp_path, other):
    model = MaskGIT(**SMALL | other)
    params, file = drawn(rng, model), tmp_path / "x.pth"
    save_generator(f"maskgit:{file}", model, params, spec_of(model))
    content = torch.load(file, weights_only=True)
    assert (content["iter"], content["global_epoch"]) == (0, 0)
    network = torch_maskgit.MaskGIT(**SMALL | other)
    network.load_state_dict(content["model_state_dict"], strict=True)
    again, back, _ = load_generator(f"maskgit:{file}")                             # which says its codes and heads
    assert again == model
    assert_same(back, params)
    if other:
        assert "this one has 11, 5 and 4. Write .pth" in refuses(model, params, tmp_path / "x.safetensors")
    else:
        save_generator(f"maskgit:{tmp_path / 'x.safetensors'}", model, params, spec_of(model))
        assert_same(load_generator(f"maskgit:{tmp_path / 'x.safetensors'}")[1], params)


def test_the_original_is_read_as_flax_writes_it_and_written_back(rng, tmp_path):
    model = OriginalMaskGIT(**SMALL)
    params = drawn(rng, model)
    tree = {"params": to_original(params, model), "step": np.int32(7), "optimizer": {"0": {"nu": np.zeros(3)}}}
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    again, back, spec = load_generator(f"maskgit:{tmp_path / 'checkpoint'}")
    assert again == model and (spec.kind, spec.classes, model.null) == ("maskgit-original", 1000, None)
    assert_same(back, params)
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), tree["params"])
    (tmp_path / "half").write_bytes(serialization.msgpack_serialize({"params": half}))
    rough = load_generator(f"maskgit:{tmp_path / 'half'}")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.005), rough, params)

    save_generator(f"maskgit:{tmp_path / 'x.msgpack'}", model, params, spec)
    written = serialization.msgpack_restore((tmp_path / "x.msgpack").read_bytes())
    jax.tree.map(np.testing.assert_array_equal, written["params"], tree["params"])
    assert load_generator(f"maskgit:{tmp_path / 'x.msgpack'}")[2].hash == spec.hash


def test_queries_keys_and_values_keep_their_order(rng):
    model = OriginalMaskGIT(**SMALL)
    params = drawn(rng, model)
    attention = to_original(params, model)["TransformerLayer_1"]["Attention_0"]["self_attention"]
    qkv, proj = params["block_1"]["qkv"], params["block_1"]["proj"]
    np.testing.assert_array_equal(attention["key"]["kernel"][:, 3, 2], qkv["kernel"][:, 64 + 3 * 4 + 2])
    np.testing.assert_array_equal(attention["value"]["bias"][5], qkv["bias"][128 + 20:128 + 24])
    np.testing.assert_array_equal(attention["out"]["kernel"][3, 2], proj["kernel"][3 * 4 + 2])


def test_what_has_no_place_in_a_file_is_refused(rng, tmp_path):
    model, original = MaskGIT(**SMALL), OriginalMaskGIT(**SMALL)
    params = drawn(rng, model)
    assert "written as .pth, .pt, .safetensors" in refuses(model, params, tmp_path / "x.msgpack")
    assert "written as .msgpack" in refuses(original, drawn(rng, original), tmp_path / "x.pth")
    assert "write maskgit:" in refuses(model, params, tmp_path / "x.pt", kind="dit")
    other = GeneratorSpec("dit", 5, "there", "")
    assert "these weights are a dit's" in refuses(model, params, tmp_path / "x.pth", other)
    assert "this model has 11 and 5" in refuses(original.clone(codes=11, classes=5), {}, tmp_path / "x.msgpack")
    del params["last"]
    assert "missing (2): last/bias, last/kernel" in refuses(model, params, tmp_path / "x.pth")


@pytest.mark.parametrize("change, options, message", [
    (lambda s: s.pop("bias"), {}, r"missing (1): bias"),
    (lambda s: s.pop("transformer.layers.1.0.fn.mha.in_proj_bias"), {}, "missing (1): transformer.layers.1.0.fn.mha"),
    (lambda s: s.update(extra=s["bias"]), {}, "not expected (1): extra"),
    (lambda s: s.update(bias=s["bias"].T), {}, "bias: (2026, 17) instead of (17, 2026)"),
    (lambda s: s.pop("tok_emb.weight"), {}, "not a MaskGIT (KeyError: 'tok_emb.weight')"),
    (lambda s: s.update(pos_emb=s["pos_emb"][:, :16]), {}, "16 positions; it must be those of a square and one more"),
    (lambda s: s.update({"tok_emb.weight": s["tok_emb.weight"][:900]}), {}, "how many of its 898 words are codes; say"),
    (lambda s: s.update({"tok_emb.weight": s["tok_emb.weight"][:900]}), dict(codes=300), "say heads=N"),
    (lambda s: None, dict(codes=2024), "codes=2024 leaves no labels"),
    (lambda s: None, dict(codes=-5), "codes=-5 leaves no labels"),
    (lambda s: None, dict(heads=5), "64 does not divide into 5 heads"),
    (lambda s: None, dict(heads=-2), "no MaskGIT has these sizes"),
    (lambda s: s.update(pos_emb=s["pos_emb"][:, :, :0]), {}, "its tensors pos_emb are empty"),
])
def test_a_file_that_does_not_fit_is_refused(torch, public, tmp_path, change, options, message):
    state = dict(public)
    change(state)
    said = refused(f"maskgit:{saved(torch, state, tmp_path / 'x.pth')}", **options)
    assert message in said and "x.pth" in said


@pytest.mark.parametrize("change, message", [
    (lambda t: t["MlmLayer_0"].pop("mlm_bias"), "missing (1): MlmLayer_0/mlm_bias/bias"),
    (lambda t: t["Embed_0"].update(more=np.zeros(2, "f")), "not expected (1): Embed_0/more"),
    (lambda t: t["MlmLayer_0"]["mlm_ln"].update(scale=np.zeros(63, "f")), "scale: (63,) instead of (64,)"),
    (lambda t: t["MlmLayer_0"]["mlm_ln"].update(scale=np.zeros(64, "i4")), "mlm_ln/scale are no arrays of real"),
    (lambda t: t["MlmLayer_0"]["mlm_ln"].update(scale="text"), "mlm_ln/scale are no arrays"),
    (lambda t: t.pop("Embed_0"), "not a MaskGIT (KeyError"), (lambda t: t.clear(), "not a MaskGIT (KeyError"),
    (lambda t: t["Embed_0"]["word_embeddings"].update(embedding=np.zeros((0, 64), "f")), "embedding are empty"),
])
def test_an_original_that_does_not_fit_is_refused(rng, tmp_path, change, message):
    model = OriginalMaskGIT(**SMALL)
    tree = to_original(jax.tree.map(lambda s: np.zeros(s.shape, np.float32), parameter_shapes(model)), model)
    change(tree)
    (tmp_path / "x").write_bytes(serialization.msgpack_serialize({"params": tree}))
    assert message in (said := refused(f"maskgit:{tmp_path / 'x'}")) and str(tmp_path) in said


def array(shape=(2,), name="float32", values=b"12345678", code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, name, values)))


def nested(levels):
    return b"\x81\xa1a" * levels + b"\xc0"


HOSTILE = {
    "cut off": (lambda: msgpack.packb({"params": {"a": array()}})[:-3], "not a readable msgpack file"),
    "more behind": (lambda: msgpack.packb({"params": {"a": array()}}) + b"x", "not a readable msgpack file"),
    "no parameters": (lambda: msgpack.packb({"a": array()}), "holds no parameters"),
    "a number for parameters": (lambda: msgpack.packb({"params": 3}), "holds no parameters"),
    "a map without end": (lambda: b"\xdf" + struct.pack(">I", 2**32 - 1), "not a readable msgpack file"),
    "a list without end": (lambda: b"\x81\xa1a\xdd" + struct.pack(">I", 2**32 - 1), "not a readable msgpack file"),
    "a long list": (lambda: msgpack.packb({"params": [0] * 100}), "not a readable msgpack file"),
    "deep": (lambda: nested(60), "more than 32 levels"), "deeper": (lambda: nested(5000), "not a readable"),
    "keys that are numbers": (lambda: msgpack.packb({"params": {1: 2}}), "not a readable msgpack file"),
    "an object": (lambda: msgpack.packb({"params": {"a": array(name="object")}}),
                  "a type that is none of"),
    "a type by import": (lambda: msgpack.packb({"params": {"a": array(name="os.system")}}), "a type that is none of"),
    "too few bytes": (lambda: msgpack.packb({"params": {"a": array((2**40, 2**40))}}), "with other than its bytes"),
    "a negative side": (lambda: msgpack.packb({"params": {"a": array((-2, -1))}}), "no list of sizes"),
    "a side that is no number": (lambda: msgpack.packb({"params": {"a": array((2.0,))}}), "no list of sizes"),
    "an array in an array": (lambda: msgpack.packb({"params": {"a": msgpack.ExtType(1, msgpack.packb(array()))}}),
                             "an extension of kind 1 inside"),
    "a complex number": (lambda: msgpack.packb({"params": {"a": array(code=2)}}), "an extension of kind 2"),
    "a time": (lambda: msgpack.packb({"params": {"a": msgpack.Timestamp(0, 0)}}), "a are no arrays"),
    "no text": (lambda: b"\x81\xa1\xff\xc0", "not a readable msgpack file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_msgpack_is_refused(tmp_path, name):
    make, message = HOSTILE[name]
    (tmp_path / "x").write_bytes(make())
    said = refused(f"maskgit:{tmp_path / 'x'}")
    assert str(tmp_path / "x") in said and message in said


def test_what_is_no_file_of_weights_is_refused(tmp_path):
    assert "no such file" in refused(f"maskgit:{tmp_path / 'none'}")
    (tmp_path / "empty").write_bytes(b"")
    assert "empty" in refused(f"maskgit:{tmp_path / 'empty'}")
    (tmp_path / "text").write_text("MaskGIT")
    assert str(tmp_path / "text") in refused(f"maskgit:{tmp_path / 'text'}")
