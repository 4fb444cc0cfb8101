"""MaskGIT's two networks: published counts and beginnings, derivatives, dropout, and what they refuse.

Beside torch, read from files: test_maskgit_parity.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvae_jax.generators.draws import example_keys
from eqvae_jax.generators.maskgit import MaskGIT, forward_macs, preset
from eqvae_jax.generators.maskgit_original import OriginalMaskGIT
from eqvae_jax.generators.masking import Masking
from eqvae_jax.generators.networks import describe, from_description

SMALL = dict(input_size=4, codes=11, classes=5, width=64, depth=2, heads=4, mlp_size=96)
NETWORKS = [MaskGIT, OriginalMaskGIT]


def batch_of(model, rng, size=2):
    ids = rng.integers(0, model.codes + 1, (size, model.input_size, model.input_size)).astype(np.int32)
    return ids, rng.integers(0, model.classes, size).astype(np.int32)


def shapes_of(model):
    ids = jax.ShapeDtypeStruct((1, model.input_size, model.input_size), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids, jax.ShapeDtypeStruct((1,), jnp.int32))["params"]


def drawn(model, rng):
    """Variables that are nowhere zero."""
    return {"params": jax.tree.map(lambda s: (0.2 * rng.normal(size=s.shape)).astype(np.float32), shapes_of(model))}


@pytest.mark.parametrize("model, count", [
    (preset("base"), 174_160_874), (preset("base", input_size=32), 176_306_666), (OriginalMaskGIT(), 172_457_193)],
    ids=["256", "512", "original"])
def test_published_models_have_their_size(model, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes_of(model.clone(scan=True)))) == count


def test_larger_models_have_their_size():
    for name, millions in (("big", 341.95), ("huge", 509.92)):
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes_of(preset(name, scan=True))))
        assert round(count / 1e6, 2) == millions
    with pytest.raises(ValueError, match="no MaskGIT named 'large'; the sizes are base, big, huge"):
        preset("large")
    assert preset("big", depth=2).depth == 2


def test_a_forward_pass_costs_what_its_layers_multiply():
    """Counted by torch's rule on the released size: 24 blocks, 257 tokens of 768, and 256 x 768 x 1025 at the end."""
    block = 257 * (4 * 768**2 + 2 * 768 * 3072) + 2 * 257**2 * 768
    assert forward_macs(MaskGIT()) == 24 * block + 257 * 2 * 768**2 + 256 * (768**2 + 768 * 1025)


def test_initialisation_is_torchs(torch, torch_maskgit, rng):
    fields = SMALL | dict(width=128, mlp_size=160)
    model = MaskGIT(**fields, scan=True)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0), *batch_of(model, rng))["params"])
    blocks = params.pop("blocks")
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(2))
    assert np.abs(first["qkv"]["kernel"] - second["qkv"]["kernel"]).max() > 0.05
    params["block_0"] = first
    torch.manual_seed(0)
    state = torch_maskgit.MaskGIT(**fields).state_dict()
    block = "transformer.layers.0."
    pairs = {
        "attention_norm": "0.norm", "qkv": "0.fn.mha.in_proj_", "proj": "0.fn.mha.out_proj", "mlp_norm": "1.norm",
        "fc1": "1.fn.net.0", "fc2": "1.fn.net.3"}
    pairs = {name: (params["block_0"][name], block + key) for name, key in pairs.items()}
    before = {"first_norm_1": 0, "first_1": 2, "first_norm_2": 4, "first_2": 6}
    pairs |= {name: (params[name], f"first_layer.{i}") for name, i in before.items()}
    after = {"last_norm_1": 0, "last": 2, "last_norm_2": 4}
    pairs |= {name: (params[name], f"last_layer.{i}") for name, i in after.items()}
    for name, (layer, key) in pairs.items():
        for leaf, value in layer.items():
            theirs = state[key + ("" if key.endswith("_") else ".") + ("bias" if leaf == "bias" else "weight")].numpy()
            assert value.size == theirs.size
            for measure in (np.mean, np.std, lambda v: np.abs(v).max()):  # a bias of 128 leaves the loosest estimate
                np.testing.assert_allclose(measure(value), measure(theirs), rtol=0.15, atol=0.02, err_msg=name + leaf)
    bound = (6 / (4 * 128))**0.5                                        # Xavier's, of queries, keys and values together
    assert 0.99 * bound < np.abs(params["block_0"]["qkv"]["kernel"]).max() <= bound * 1.000001
    bound = 128**-0.5
    for layer in (params["block_0"]["proj"], params["block_0"]["fc1"], params["last"]):
        assert 0.99 * bound < np.abs(layer["kernel"]).max() <= bound * 1.000001
    assert 0.9 * bound < np.abs(params["block_0"]["fc1"]["bias"]).max() <= bound * 1.000001
    assert not np.any(params["block_0"]["qkv"]["bias"]) and not np.any(params["bias"])
    np.testing.assert_allclose(np.std(params["tokens"]["embedding"]), 1, rtol=0.05)
    np.testing.assert_allclose(np.std(params["positions"]), 0.02, rtol=0.05)


def test_training_starts_at_the_published_loss(rng):
    """Embeddings of N(0, 1) are the last layer too: far above ln 1025 = 6.93. 90 at full size, of 24 blocks; torch's
    transcription with two narrow ones begins at 86.
    """
    model = MaskGIT(depth=1, mlp_size=128)
    ids, index = jnp.asarray(rng.integers(0, 1024, (2, 16, 16))), jnp.arange(2)

    @jax.jit
    def start(key):
        params = model.init(key, ids, index)
        corrupted, masked = Masking().corrupt(example_keys(key, index), ids)
        logits = model.apply(params, corrupted, index).prediction
        return logits.std(), Masking().measure(logits, ids, masked)["loss"]

    std, loss = start(jax.random.key(0))
    np.testing.assert_allclose(std, 27.5, rtol=0.05)
    assert 80 < np.mean(loss) < 95


def test_the_original_starts_near_a_uniform_guess(rng):
    model = OriginalMaskGIT(depth=1, mlp_size=64, heads=2)
    batch = batch_of(model, rng)
    params = jax.jit(model.init)(jax.random.key(0), *batch)["params"]
    logits = jax.jit(model.apply)({"params": params}, *batch).prediction
    loss = Masking(schedule="cosine").measure(logits, batch[0] % 1024, batch[0] == 1024)["loss"]
    np.testing.assert_allclose(loss, np.log(1024), rtol=0.05)
    for name in ("qkv", "fc1", "fc2", "proj"):
        kernel = np.asarray(params["block_0"][name]["kernel"])
        assert 0.039 < np.abs(kernel).max() <= 0.04 and not np.any(params["block_0"][name]["bias"])
        np.testing.assert_allclose(kernel.std(), 0.0176, rtol=0.02)     # 0.02 before the tails were cut off


@pytest.mark.parametrize("network", NETWORKS)
def test_scan_and_remat_change_nothing(rng, network):
    model = network(**SMALL)
    variables, batch = drawn(model, rng), batch_of(model, rng)
    blocks = [variables["params"][f"block_{i}"] for i in range(2)]
    stacked = {name: value for name, value in variables["params"].items() if not name.startswith("block_")}
    stacked = {"params": stacked | {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}}

    def results(variables, **how):
        def loss(variables):
            prediction, hidden = model.clone(**how).apply(variables, *batch)
            return jnp.sum(prediction**2), (prediction, hidden)

        (_, outputs), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
        return jax.device_get((*outputs, gradient["params"]))

    prediction, hidden, gradient = results(variables)
    assert prediction.shape == (2, 16, model.outputs) and prediction.dtype == jnp.float32
    assert isinstance(hidden, tuple) and [h.shape for h in hidden] == [(2, 17, 64)] * 2
    scale = max(np.abs(g).max() for g in jax.tree.leaves(gradient))
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(gradient))
    again, states, slope = results(stacked, scan=True, remat=True)
    np.testing.assert_allclose(again, prediction, rtol=0, atol=1e-5 * np.abs(prediction).max())
    assert states.shape == (2, 2, 17, 64)
    np.testing.assert_allclose(states, np.stack(hidden), rtol=0, atol=1e-5 * np.abs(hidden[-1]).max())
    slope |= {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], slope["blocks"]) for i in range(2)}
    del slope["blocks"]
    # Keys' biases change nothing, so that their gradients are rounding errors of the others.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max() + 1e-6 * scale),
                 slope, gradient)


@pytest.mark.parametrize("network", NETWORKS)
def test_bfloat16_is_close(rng, network):
    model = network(**SMALL | dict(depth=1))
    variables, batch = drawn(model, rng), batch_of(model, rng)
    run = jax.jit(lambda variables: [model.clone(dtype=d).apply(variables, *batch) for d in ("float32", "bfloat16")])
    exact, near = jax.device_get(run(variables))
    assert {leaf.dtype for leaf in jax.tree.leaves(near)} == {jnp.dtype("float32")}
    error = np.linalg.norm(near.prediction - exact.prediction) / np.linalg.norm(exact.prediction)
    assert 1e-4 < error < 0.03


def test_dropout_acts_in_training_alone_and_keeps_the_mean(rng):
    model = MaskGIT(**SMALL, scan=True, remat=True)
    variables, batch = drawn(model, rng), batch_of(model, rng)
    apply = lambda key: model.apply(variables, *batch, train=True, rngs={"dropout": key}).prediction
    many = np.asarray(jax.jit(jax.vmap(apply))(jax.random.split(jax.random.key(0), 64)))
    quiet = np.asarray(jax.jit(model.apply)(variables, *batch).prediction)
    assert all(np.abs(many[i] - quiet).max() > 0.05 * np.abs(quiet).max() for i in (0, 1))
    assert np.abs(many[0] - many[1]).max() > 0.05 * np.abs(quiet).max()
    away, spread = np.linalg.norm(many.mean(0) - quiet), np.linalg.norm(many[0] - quiet)
    assert away < 0.6 * spread
    none = jax.jit(lambda: model.clone(dropout=0.0).apply(variables, *batch, train=True).prediction)()  # and no rng
    np.testing.assert_allclose(none, quiet, rtol=0, atol=1e-5 * np.abs(quiet).max())


def test_dropout_can_be_each_examples_own(rng):
    """Mapped over examples and their keys, so that what is dropped does not depend on the batch."""
    model = MaskGIT(**SMALL | dict(depth=1))
    variables, (ids, labels) = drawn(model, rng), batch_of(model, rng, 3)
    keys = jax.random.split(jax.random.key(0), 3)
    one = lambda ids, label, key: model.apply(variables, ids[None], label[None], train=True,
                                              rngs={"dropout": key}).prediction[0]
    several = jax.jit(jax.vmap(one))
    order = np.array([2, 0, 1])
    whole, turned = (np.asarray(several(ids[rows], labels[rows], keys[rows])) for rows in (np.arange(3), order))
    np.testing.assert_allclose(turned, whole[order], rtol=0, atol=1e-5 * np.abs(whole).max())
    assert np.abs(whole - several(ids, labels, keys[order])).max() > 0.1 * np.abs(whole).max()


def test_dropout_hits_what_each_code_drops(rng, monkeypatch):
    """The shapes of what the dropouts of one block and the stacks around it draw, in their order."""
    seen = []
    draw = jax.random.bernoulli

    def bernoulli(key, p, shape):
        seen.append((tuple(shape), float(p)))
        return draw(key, p, shape)

    monkeypatch.setattr(jax.random, "bernoulli", bernoulli)
    for network, expected in (
        (MaskGIT, [(2, 17, 64)] * 2 + [(2, 4, 17, 17), (2, 17, 96), (2, 17, 64)] + [(2, 16, 64)]),
        (OriginalMaskGIT, [(2, 17, 64)] + [(2, 4, 17, 17), (2, 17, 64), (2, 17, 64)])):
        model = network(**SMALL | dict(depth=1, dropout=0.25))
        seen.clear()
        batch = batch_of(model, rng)
        jax.eval_shape(lambda model=model, batch=batch: model.init_with_output(
            {"params": jax.random.key(0), "dropout": jax.random.key(1)}, *batch, train=True))
        assert seen == [(shape, 0.75) for shape in expected]


@pytest.mark.parametrize("network", NETWORKS)
def test_rows_of_tokens_come_one_after_another_and_every_id_has_its_row(rng, network):
    model = network(**SMALL | dict(depth=1))
    variables = drawn(model, rng)
    labels_there_are = model.classes + (network is MaskGIT)                # and that of none
    words = np.repeat(np.arange(model.codes + 1)[:, None], 16, 1)
    words = np.concatenate([words, np.zeros((labels_there_are, 16), int)])
    classes = np.concatenate([np.zeros(model.codes + 1, int), np.arange(labels_there_are)])
    words[model.codes + 1:, 3] = 7                                         # nothing is there twice; row 0, column 3
    both = lambda words: [model.apply(variables, ids, classes).prediction for ids in (words, words.reshape(-1, 4, 4))]
    rows, grids = jax.device_get(jax.jit(both)(words))
    np.testing.assert_allclose(rows, grids, rtol=0, atol=1e-5 * np.abs(rows).max())
    assert np.isfinite(rows).all() and len({row.tobytes() for row in rows[:, 0].round(3)}) == len(rows)


@pytest.mark.parametrize(("fields", "given", "message"), [
    ({}, dict(ids=np.zeros((2, 4, 5), int)), r"integer ids \(B, 4, 4\) or \(B, 16\), not int\d+ \(2, 4, 5\)"),
    ({}, dict(ids=np.zeros((2, 15), int)), r"not int\d+ \(2, 15\)"),
    ({}, dict(ids=np.zeros((2, 16))), r"not float\d+ \(2, 16\)"),
    ({}, dict(labels=np.zeros(1, int)), r"integer labels \(2,\), not int\d+ \(1,\)"),
    ({}, dict(labels=np.zeros(2)), r"integer labels \(2,\), not float\d+"),
    (dict(heads=5), {}, "64 does not divide into 5 heads"), (dict(dtype="float16"), {}, "dtype is 'float16'"),
    (dict(dropout=1.0), {}, "dropout is 1.0"),
])
def test_what_does_not_fit_is_refused(fields, given, message):
    given = dict(ids=np.zeros((2, 16), int), labels=np.zeros(2, int)) | given
    for network in NETWORKS:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(network(**SMALL | fields).init, jax.random.key(0), *given.values())


def test_descriptions_bring_back_the_model_and_leave_out_how_it_is_computed():
    for network in NETWORKS:
        model = network(**SMALL, dropout=0.2, dtype="bfloat16", remat=True, scan=True)
        values = describe(model)
        assert from_description(values | {"kind": "maskgit"}, network) == network(**SMALL, dropout=0.2)
        assert {type(value) for value in values.values()} <= {int, float}
    values = describe(MaskGIT())
    with pytest.raises(ValueError, match="lacks codes, heads, or they"):
        from_description({**{name: values[name] for name in values if name != "codes"}, "heads": None}, MaskGIT)
