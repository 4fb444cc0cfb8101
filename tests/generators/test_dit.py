"""The network: published constants and counts, its derivatives, and what it refuses. Beside torch: test_dit_parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvae_jax.generators.dit import (
    SIZES,
    DiT,
    attention_kernel,
    drop_labels,
    forward_macs,
    layer_norm,
    positions,
    preset,
    time_features,
)
from eqvae_jax.generators.networks import describe, from_description

SMALL = dict(input_size=8, in_channels=3, out_channels=6, patch_size=2, width=64, depth=3, heads=4, classes=5)
# name -> parameters with the fixed positions, as DiT's logs print them; trained ones; with 4 channels out; GMACs
TABLE = {
    "S/2": (32_963_360, 32_865_056, 32_957_200, 6.06), "S/4": (32_945_024, 32_920_448, 32_920_384, 1.41),
    "S/8": (33_148_160, 33_142_016, 33_049_600, 0.36),
    "B/2": (130_512_416, 130_315_808, 130_500_112, 23.01), "B/4": (130_475_648, 130_426_496, 130_426_432, 5.57),
    "B/8": (130_881_536, 130_869_248, 130_684_672, 1.42),
    "L/2": (458_102_816, 457_840_672, 458_086_416, 80.70), "L/4": (458_053_760, 457_988_224, 457_988_160, 19.70),
    "L/8": (458_594_816, 458_578_432, 458_332_416, 5.01),
    "XL/2": (675_129_632, 674_834_720, 675_111_184, 118.62), "XL/4": (675_074_432, 675_000_704, 675_000_640, 29.04),
    "XL/8": (675_683_072, 675_664_640, 675_387_904, 7.39),
}


def batch_of(model, rng, size=2):
    x = rng.normal(size=(size, model.input_size, model.input_size, model.in_channels)).astype(np.float32)
    return x, rng.uniform(size=size).astype(np.float32), rng.integers(0, model.classes + 1, size).astype(np.int32)


def shapes_of(model):
    x = jax.ShapeDtypeStruct((1, model.input_size, model.input_size, model.in_channels), jnp.float32)
    t, labels = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), x, t, labels)["params"]


@pytest.fixture
def variables(rng):
    """Of DiT(**SMALL), nothing of which is zero."""
    return {"params": jax.tree.map(lambda s: (0.2 * rng.normal(size=s.shape)).astype(np.float32),
                                   shapes_of(DiT(**SMALL)))}


@pytest.mark.parametrize("name", TABLE)
def test_published_models_have_their_size_and_cost(name):
    total, trained, without_variance, macs = TABLE[name]
    model = preset(name, scan=True)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes_of(model)))
    fixed = positions(model.width, model.input_size // model.patch_size).size
    narrow = sum(leaf.size for leaf in jax.tree.leaves(shapes_of(preset(name, scan=True, out_channels=4))))
    assert (count + fixed, count, narrow + fixed) == (total, trained, without_variance)
    assert round(forward_macs(model) / 1e9, 2) == macs


def test_attention_costs_more_at_512_pixels():
    assert round(forward_macs(preset("XL/2", input_size=64)) / 1e9, 1) == 524.5


def test_time_features_are_the_published_ones():
    features = time_features(jnp.array([1, 999], jnp.float32))
    assert features.shape == (2, 256) and features.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(features)[:, [0, 1, 127, 128, 129, 255]], [
        [0.54030234, 0.59737533, 1.0, 0.84147096, 0.80196178, 1.0746e-4],
        [0.99964982, 0.96378529, 0.99424314, -0.02646075, -0.26667938, 0.10714722]], rtol=0, atol=2e-7)


def test_positions_are_the_published_ones():
    table = positions(1152, 16)
    assert table.shape == (256, 1152) and table.dtype == np.float32
    some = table[:, [0, 1, 287, 288, 576, 577, 864, 1151]]
    np.testing.assert_allclose(some[[0, 1, 16]], [
        [0, 0, 0, 1, 0, 0, 1, 1],
        [0.841471, 0.824051, 1.0325e-4, 0.540302, 0, 0, 1, 1],
        [0, 0, 0, 1, 0.841471, 0.824051, 0.540302, 0.999999995]], rtol=0, atol=1e-6)


def test_initialisation_is_the_published_one(rng):
    model = DiT(**SMALL | dict(width=128, depth=1))
    batch = batch_of(model, rng)
    params = jax.jit(model.init)(jax.random.key(0), *batch)["params"]
    assert not np.any(jax.jit(model.apply)({"params": params}, *batch).prediction)     # adaLN-Zero
    block, width = params["block_0"], 128
    bounds = {"patch": 12 + width, "qkv": width + 3 * width, "proj": 2 * width, "fc1": 5 * width, "fc2": 5 * width}
    for name, fans in bounds.items():
        kernel = np.asarray((block | params)[name]["kernel"])
        bound = (6 / fans)**0.5                                                        # Xavier's, of the whole matrix
        assert 0.98 * bound < np.abs(kernel).max() <= bound * 1.000001, name
        np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.06, err_msg=name)
    for value in (params["time_in"]["kernel"], params["time_out"]["kernel"], params["labels"]["embedding"]):
        np.testing.assert_allclose(np.std(value), 0.02, rtol=0.07)
    for layer in (params["final"], params["final_modulation"], block["modulation"]):
        assert not any(map(np.any, jax.tree.leaves(layer)))
    biases = [leaf for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "bias"]
    assert len(biases) == 10 and not any(map(np.any, biases))


def test_scan_and_remat_change_nothing(rng, variables):
    model = DiT(**SMALL)
    batch, blocks = batch_of(model, rng), [variables["params"][f"block_{i}"] for i in range(3)]
    stacked = {name: value for name, value in variables["params"].items() if not name.startswith("block_")}
    stacked = {"params": stacked | {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}}

    def results(variables, **how):
        def loss(variables):
            prediction, hidden = model.clone(**how).apply(variables, *batch)
            return jnp.sum(prediction**2), (prediction, hidden)

        (_, outputs), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
        return *outputs, gradient["params"]

    prediction, hidden, gradient = results(variables)
    assert isinstance(hidden, tuple) and [h.shape for h in hidden] == [(2, 16, 64)] * 3
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(gradient))
    for how in (dict(remat=True), dict(scan=True), dict(scan=True, remat=True)):
        again, states, slope = results(stacked if "scan" in how else variables, **how)
        np.testing.assert_allclose(again, prediction, rtol=0, atol=1e-5 * np.abs(prediction).max())
        np.testing.assert_allclose(np.stack(states), np.stack(hidden), rtol=0, atol=1e-5 * np.abs(hidden[-1]).max())
        if "scan" in how:
            assert states.shape == (3, 2, 16, 64)
            for i in range(3):
                slope[f"block_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], slope["blocks"])
            del slope["blocks"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max()),
                     slope, gradient)


def test_scanned_blocks_begin_different(rng):
    model = DiT(**SMALL, scan=True)
    kernel = jax.jit(model.init)(jax.random.key(0), *batch_of(model, rng))["params"]["blocks"]["qkv"]["kernel"]
    assert kernel.shape == (3, 64, 192) and np.abs(kernel[0] - kernel[1]).max() > 0.1
    assert 0.98 * (6 / 256)**0.5 < np.abs(kernel).max() <= (6 / 256)**0.5 * 1.000001


def test_bfloat16_is_close(rng, variables):
    model, dtype = DiT(**SMALL), "bfloat16"
    x, _, labels = batch_of(model, rng)
    t = np.array([999, 998], np.float32)                       # two steps that bfloat16 cannot tell apart
    apply = {name: jax.jit(model.clone(dtype=name).apply) for name in ("float32", dtype)}
    exact, output = apply["float32"](variables, x, t, labels).prediction, apply[dtype](variables, x, t, labels)
    assert {leaf.dtype for leaf in jax.tree.leaves(output)} == {jnp.dtype("float32")}
    error = np.linalg.norm(output.prediction - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.02
    # Time itself stays exact: one step moves the output by far more than the same step from one rounded time would.
    moved = [apply[name](variables, x, t - 1, labels).prediction - y
             for name, y in (("float32", exact), (dtype, output.prediction))]
    near, exact = (np.linalg.norm(np.reshape(step, (2, -1)), axis=1) for step in reversed(moved))
    assert (near > 0.5 * exact).all()


def test_large_activations_do_not_cancel_in_the_norms(rng, variables):
    """Residual streams reach hundreds in trained transformers; E[x^2] - E[x]^2 would be off by percents there."""
    model = DiT(**SMALL)
    x, t, labels = batch_of(model, rng)
    params = variables["params"]
    shifted = params | {"patch": params["patch"] | {"bias": params["patch"]["bias"] + 2000}}
    for i in range(3):                                         # the blocks add nothing; the last norm sees the shift
        block = params[f"block_{i}"]
        shifted |= {f"block_{i}": block | {"modulation": jax.tree.map(np.zeros_like, block["modulation"])}}
        params = params | {f"block_{i}": shifted[f"block_{i}"]}
    apply = jax.jit(model.apply)
    near, far = (apply({"params": p}, x, t, labels).prediction for p in (params, shifted))
    np.testing.assert_allclose(near, far, rtol=0, atol=2e-3 * np.abs(near).max())


def test_small_activations_meet_the_published_epsilon():
    x = np.float32([[0.001, -0.001] * 4])                      # a variance of 1e-6, as much as epsilon
    np.testing.assert_allclose(layer_norm().apply({}, x), x / 2e-6**0.5, rtol=1e-5)


def test_reversed_time_is_one_minus_time(rng, variables):
    model = DiT(**SMALL)
    x, t, labels = batch_of(model, rng)
    y = model.clone(reversed_time=True).apply(variables, x, t, labels).prediction
    np.testing.assert_array_equal(y, model.apply(variables, x, 1 - t, labels).prediction)
    assert np.abs(y - model.apply(variables, x, t, labels).prediction).max() > 1e-3


def test_labels_are_dropped_at_their_rate_and_each_by_its_own_key():
    labels, key = np.arange(20000) % 7, jax.random.key(3)
    dropped = np.asarray(drop_labels(key, labels, 0.1, 7))
    assert abs((dropped == 7).mean() - 0.1) < 0.01 and (dropped == labels)[dropped != 7].all()
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(200))
    some = np.asarray(drop_labels(keys, labels[:200], 0.5, 7))
    assert 0.3 < (some == 7).mean() < 0.7
    np.testing.assert_array_equal(some[50:60], drop_labels(keys[50:60], labels[50:60], 0.5, 7))
    np.testing.assert_array_equal(drop_labels(key, labels, 0.0, 7), labels)
    assert (np.asarray(drop_labels(key, labels, 1.0, 7)) == 7).all()


def test_the_null_label_has_a_row_of_its_own(rng, variables):
    model = DiT(**SMALL)
    x, t, _ = batch_of(model, rng, 1)
    apply = jax.jit(model.apply)
    outputs = [apply(variables, x, t, np.array([label])).prediction for label in (0, 4, 5)]
    assert all(np.isfinite(y).all() for y in outputs)
    assert min(np.abs(a - b).max() for a, b in zip(outputs, outputs[1:], strict=False)) > 1e-3


@pytest.mark.parametrize(("fields", "shapes", "message"), [
    ({}, dict(x=(2, 8, 8, 4)), r"takes latents \(B, 8, 8, 3\), not \(2, 8, 8, 4\)"),
    ({}, dict(x=(2, 4, 8, 3)), r"takes latents \(B, 8, 8, 3\)"),
    ({}, dict(x=(8, 8, 3)), r"takes latents"),
    ({}, dict(t=(1,)), r"times \(2,\) and integer labels \(2,\), not \(1,\)"),
    ({}, dict(labels=(2, 1)), r"not \(2,\) and int32 \(2, 1\)"),
    (dict(heads=5), {}, "64 does not divide into 5 heads"),
    (dict(width=66, heads=3), {}, "66 does not divide into 3 heads, or by 4"),
    (dict(dtype="float16"), {}, "dtype is 'float16'; it must be 'float32' or 'bfloat16'"),
    (dict(patch_size=3), {}, "8 x 8 do not divide into patches of 3"),
])
def test_what_does_not_fit_is_refused(fields, shapes, message):
    shapes = dict(x=(2, 8, 8, 3), t=(2,), labels=(2,)) | shapes
    arrays = [np.zeros(shape, np.int32 if name == "labels" else np.float32) for name, shape in shapes.items()]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(DiT(**SMALL | fields).init, jax.random.key(0), *arrays)


def test_labels_that_are_no_integers_are_refused():
    with pytest.raises(ValueError, match="not .* float32"):
        jax.eval_shape(DiT(**SMALL).init, jax.random.key(0), np.zeros((1, 8, 8, 3)), np.zeros(1), np.zeros(1, "f"))


def test_presets_by_name():
    model = preset("B/4", input_size=64, dtype="bfloat16")
    assert (model.depth, model.width, model.heads) == SIZES["B"] and (model.patch_size, model.input_size) == (4, 64)
    assert preset("S/2", depth=2).depth == 2
    for name in ("XXL/2", "XL", "XL/", "XL/two", "XL/0", "xl/2", ""):
        with pytest.raises(ValueError, match=f"no DiT named '{name}'.*S, B, L, XL.*such as B/2"):
            preset(name)


def test_descriptions_bring_back_the_model_and_leave_out_how_it_is_computed():
    model = DiT(**SMALL, reversed_time=True, dtype="bfloat16", remat=True, scan=True)
    values = describe(model)
    assert from_description(values | {"kind": "sit", "path": "linear"}, DiT) == DiT(**SMALL, reversed_time=True)
    assert {type(value) for value in values.values()} <= {int, float, bool}            # what JSON keeps
    del values["heads"]
    with pytest.raises(ValueError, match="lacks width, heads, or they"):
        from_description({**{name: values[name] for name in values if name != "width"}, "heads": None}, DiT)


def test_attention_falls_back_where_cudnn_has_no_kernel(monkeypatch):
    class Device:
        compute_capability = "9.0"

    assert attention_kernel("bfloat16", 64) == "xla"                                   # the tests run on CPUs
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    assert attention_kernel("bfloat16", 72) == attention_kernel(jnp.float16, 128) == "cudnn"
    for dtype, head_size in (("float32", 64), ("float16", 36), ("float16", 256)):
        assert attention_kernel(dtype, head_size) == "xla"
    for older in ("7.5", "gfx90a"):
        Device.compute_capability = older
        assert attention_kernel("bfloat16", 64) == "xla"
