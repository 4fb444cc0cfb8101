"""DINOv2 against transformers' models and Meta's computation; positions and REPA's input against torch's bicubic."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from dinov2_files import random_tensors, write_folder

from eqvae_jax.features.dinov2 import (
    MEAN,
    POSITIONS,
    STD,
    DINOv2,
    bicubic_matrix,
    fit_positions,
    parameter_shapes,
    preset,
    repa_features,
    repa_preprocess,
)
from eqvae_jax.weights import load_dinov2

TOLERANCE = 1e-5             # of tokens, whose size is about 1; float32 in torch is 1e-6 away from its own float64
KINDS = {"plain": {}, "registers": {"registers": 4}, "swiglu": {"swiglu": True}}


@pytest.fixture(scope="module")
def tensors():
    return {kind: random_tensors(np.random.default_rng(i), **fields) for i, (kind, fields) in enumerate(KINDS.items())}


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    """Function that gives the folder of a kind in Hugging Face's layout."""
    return lambda kind: write_folder(tmp_path_factory.getbasetemp() / f"dinov2-{kind}", tensors[kind])


@pytest.fixture(scope="module")
def loaded(tensors, tmp_path_factory):
    """kind -> (model, params) from Meta's layout."""
    directory = tmp_path_factory.mktemp("dinov2")

    def load(kind):
        path = directory / f"{kind}.safetensors"
        safetensors.numpy.save_file(tensors[kind], path)
        return load_dinov2(path)[:2]

    return {kind: load(kind) for kind in KINDS}


def images(rng, *shape):
    return rng.integers(0, 256, (*shape, 3), np.uint8)


def normalised(images):
    return ((images / 255 - MEAN) / STD).astype(np.float32)


def to_torch(torch, x):
    return torch.tensor(x).permute(0, 3, 1, 2)


def gap(ours, theirs):
    """Largest difference of all tokens, in the references' order."""
    ours = np.concatenate([np.asarray(ours.cls)[:, None], ours.registers, ours.patches], axis=1)
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    assert 0.5 < np.abs(theirs).mean() < 2
    return np.abs(ours - theirs.numpy()).max()


@pytest.mark.parametrize(("kind", "size"), [
    ("plain", (224, 224)), ("plain", (518, 518)), ("plain", (70, 154)), ("registers", (224, 224)),
    ("swiglu", (518, 518)),
])
def test_tokens_match_transformers(torch, transformers, rng, loaded, folder, kind, size):
    name = "Dinov2WithRegistersModel" if kind == "registers" else "Dinov2Model"
    network, report = getattr(transformers, name).from_pretrained(folder(kind), output_loading_info=True)
    assert not any(report.values())                      # transformers found every tensor, and no other
    x = normalised(images(rng, 1, *size))
    with torch.inference_mode():
        theirs = network(to_torch(torch, x)).last_hidden_state
    model, params = loaded[kind]
    assert gap(jax.jit(model.clone(positions="transformers").apply)({"params": params}, x), theirs) < TOLERANCE


@pytest.mark.parametrize(("kind", "size"), [("plain", (224, 224)), ("registers", (70, 154)), ("swiglu", (70, 154))])
def test_tokens_match_metas_code(torch, torch_dinov2, rng, loaded, tensors, kind, size):
    x = normalised(images(rng, 2, *size))
    model, params = loaded[kind]
    ours = jax.jit(model.apply)({"params": params}, x)
    assert ours.cls.shape == (2, 128) and ours.registers.shape == (2, model.registers, 128)
    assert gap(ours, torch_dinov2.DINOv2(tensors[kind])(to_torch(torch, x))) < TOLERANCE


@pytest.mark.parametrize(("kind", "side"), [("plain", None), ("registers", 70)])
def test_repas_target_is_what_its_code_computes(torch, torch_dinov2, rng, loaded, tensors, kind, side):
    x = images(rng, 2, 256, 256) if side is None else images(rng, 2, 64, 64)
    network, grid = torch_dinov2.DINOv2(tensors[kind]), 16 if side is None else side // 14
    # As REPA's load_encoders: at this size Meta's code then takes the table as it is.
    network.pos_embed = torch.nn.Parameter(torch_dinov2.timm_resampled(network.pos_embed.data, grid))
    image = (to_torch(torch, x) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    image = torch.nn.functional.interpolate(image, 14 * grid, mode="bicubic")
    theirs = network(image)[:, -grid**2:]
    model, params = loaded[kind]
    ours = repa_features(model, params, x, side=side)
    assert ours.shape == (2, grid**2, 128) and ours.dtype == np.float32
    assert np.abs(ours - theirs.numpy()).max() < 2e-5


@pytest.mark.parametrize(("size", "side"), [(256, None), (512, None), (300, 224), (32, 70), (28, 28)])
def test_repas_input_matches_torch(torch, rng, size, side):
    x = images(rng, 2, size, size)
    image = (to_torch(torch, x) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    theirs = torch.nn.functional.interpolate(image, side or 224 * (size // 256), mode="bicubic")
    ours = repa_preprocess(x, side)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("side", "size"), [(37, (16, 16)), (37, (32, 32)), (37, (5, 11)), (5, (9, 3)), (37, (37, 16))])
def test_positions_match_torch(torch, torch_dinov2, rng, side, size):
    table = rng.normal(size=(1, 1 + side**2, 6)).astype(np.float32)
    hows = {
        "transformers": dict(size=size), "repa": dict(size=size, antialias=True),
        "dinov2": dict(scale_factor=tuple((n + 0.1) / side for n in size)),
    }
    for name, how in hows.items():
        theirs = torch_dinov2.resampled(torch.tensor(table), **how)[:, 1:]
        ours = fit_positions(table[:, 1:], size, POSITIONS[name][0])
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6, err_msg=name)


def test_positions_of_the_tables_own_size_are_left_alone(rng):
    table = rng.normal(size=(1, 37**2, 4)).astype(np.float32)
    for protocols in POSITIONS.values():
        for resampling in protocols:
            np.testing.assert_array_equal(fit_positions(table, (37, 37), resampling), table)


def test_bicubic_weights_are_those_worked_out_by_hand():
    # Keys' kernel is 1/2 - a/8 at distance 1/2 and a/8 at 3/2, with a = -3/4; the pixel at the edge is repeated.
    np.testing.assert_allclose(bicubic_matrix(8, 4)[1], [0, -0.09375, 0.59375, 0.59375, -0.09375, 0, 0, 0], atol=1e-7)
    np.testing.assert_allclose(bicubic_matrix(8, 4)[0], [0.5, 0.59375, -0.09375, 0, 0, 0, 0, 0], atol=1e-7)
    for antialias in (False, True):
        np.testing.assert_allclose(bicubic_matrix(37, 16, antialias).sum(1), 1, rtol=1e-6)
        np.testing.assert_array_equal(bicubic_matrix(7, 7, antialias), np.eye(7))


def test_ways_to_fit_positions_differ_without_registers_only(rng):
    table = rng.normal(size=(1, 37**2, 4)).astype(np.float32)
    plain = [fit_positions(table, (16, 16), without) for without, _ in POSITIONS.values()]
    assert min(np.abs(plain[i] - plain[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.3
    assert {with_registers for _, with_registers in POSITIONS.values()} == {POSITIONS["repa"][0]}


@pytest.mark.parametrize("kind", ["plain", "swiglu"])
def test_bfloat16_is_near_and_gives_float32(rng, loaded, kind):
    x, (model, params) = images(rng, 1, 64, 64), loaded[kind]
    model = model.clone(depth=1)
    exact = repa_features(model, params, x, side=28)
    rounded = repa_features(model.clone(dtype="bfloat16"), params, x, side=28)
    assert rounded.dtype == np.float32
    assert 1e-4 < np.abs(rounded - exact).mean() / np.abs(exact).mean() < 0.02


def test_only_the_blocks_layers_compute_in_bfloat16(loaded):
    model, params = loaded["plain"]
    apply = lambda x: model.clone(dtype="bfloat16", depth=1).apply(
        {"params": params}, x, capture_intermediates=True, mutable=["intermediates"])[1]["intermediates"]
    seen = jax.eval_shape(apply, jax.ShapeDtypeStruct((1, 28, 28, 3), np.float32))
    kind = lambda module: {leaf.dtype.name for leaf in jax.tree.leaves(module["__call__"])}
    narrow = {name for name, module in seen["block_0"].items() if name != "__call__" and kind(module) == {"bfloat16"}}
    assert narrow == {"qkv", "proj", "fc1", "fc2"}
    wide = [seen["patch"], seen["block_0"], seen["block_0"]["norm1"], seen["block_0"]["norm2"], seen["norm"], seen]
    assert all(kind(module) == {"float32"} for module in wide)


@pytest.mark.parametrize(("name", "count"), [
    ("S", 22_056_576), ("B", 86_580_480), ("L", 304_368_640), ("g", 1_136_480_768),
])
def test_parameters_are_counted(transformers, torch, name, count):
    model = preset(name)
    size = lambda model: sum(p.size for p in jax.tree.leaves(parameter_shapes(model)))
    with torch.device("meta"):
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(
            hidden_size=model.width, num_hidden_layers=model.depth, num_attention_heads=model.width // 64,
            image_size=518, use_swiglu_ffn=model.swiglu))
    assert sum(p.numel() for p in theirs.parameters()) == count
    assert size(model) == count - model.width            # the mask token
    assert size(preset(name, registers=4)) == count + 3 * model.width


@pytest.mark.parametrize(("x", "side", "message"), [
    (np.zeros((2, 256, 256, 3), np.float32), None, "uint8 images .* not float32"),
    (np.zeros((2, 256, 256), np.uint8), None, r"not uint8 \(2, 256, 256\)"),
    (np.zeros((2, 0, 256, 3), np.uint8), None, r"not uint8 \(2, 0, 256, 3\)"),
    (np.zeros((2, 256, 512, 3), np.uint8), None, "square, and these are 256 x 512"),
    (np.zeros((2, 300, 300, 3), np.uint8), None, r"for images of 300 say which side to resize to: side=14 \* GRID"),
    (np.zeros((2, 32, 32, 3), np.uint8), None, "for images of 32 say which side"),
    (np.zeros((2, 32, 32, 3), np.uint8), 32, "a side of 32 pixels does not divide into patches of 14"),
    (np.zeros((2, 32, 32, 3), np.uint8), 0, "a side of 0 pixels"),
])
def test_other_images_are_refused(x, side, message):
    with pytest.raises(ValueError, match=message):
        repa_preprocess(x, side)


@pytest.mark.parametrize(("fields", "shape", "message"), [
    ({}, (1, 28, 30, 3), r"multiples of 14, not \(1, 28, 30, 3\)"), ({}, (1, 28, 28, 1), "multiples of 14"),
    ({}, (28, 28, 3), "multiples of 14"), ({}, (1, 0, 28, 3), "multiples of 14"),
    ({"dtype": "float16"}, (1, 28, 28, 3), "dtype is 'float16'; it must be 'float32' or 'bfloat16'"),
    ({"width": 100}, (1, 28, 28, 3), "a width of 100 does not divide into heads of 64"),
    ({"positions": "timm"}, (1, 28, 28, 3), "'timm'; there are dinov2, transformers, repa"),
])
def test_what_does_not_fit_is_refused(fields, shape, message):
    model = DINOv2(**{"width": 64, "depth": 1, "hidden": 64} | fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, np.float32))


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="of size 'XL'; there are S, B, L, g"):
        preset("XL")
