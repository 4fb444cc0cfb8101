"""The EQ step: its programs, its gradients against one monolithic loss, and what must not change it."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_task import MODEL, adam_means, batch_of, norm, random_params, small_config, start, where_draw_is

from eqvae_jax import equivariance
from eqvae_jax.autoencoders import losses
from eqvae_jax.autoencoders.discriminator import PatchDiscriminator
from eqvae_jax.autoencoders.objective import to_float
from eqvae_jax.autoencoders.task import autoencoder_task, check
from eqvae_jax.training.compilation import CompileLedger
from eqvae_jax.training.sharding import make_mesh, put
from eqvae_jax.weights import load_autoencoder


@pytest.fixture(scope="module")
def params():
    return random_params()


def whole_loss(config, tau, batch, critic=None):
    """The objective in one piece, straight from the definition: what the split step must have the gradient of."""
    x = to_float(jnp.asarray(batch["image"]))
    key = jax.random.fold_in(jax.random.key(config.seed), 0)

    def reconstruct(params):
        image = equivariance.apply_tau(x, tau.image_size(2)) if tau.where == "image" else x
        posterior = MODEL.apply({"params": params}, image, method="encode")
        z, target = posterior.sample(key, batch["index"]), image
        if tau.where == "latent":
            z = equivariance.apply_tau(z, tau[1:3], tau.turns)
            target = equivariance.apply_tau(x, tau.image_size(2), tau.turns)
        y = MODEL.apply({"params": params}, z, method="decode")
        nll = jnp.abs(y - target).sum() / len(x)
        g = 0.0
        if critic is not None:
            judge = PatchDiscriminator(4, 1)
            g = losses.generator_loss(judge.apply({"params": critic}, y, mutable=["batch_stats"])[0])
        return nll, g, posterior.kl().mean()

    return reconstruct


@pytest.mark.parametrize("where", ["latent", "image", "none"])
def test_gradients_are_those_of_the_whole_loss(params, where):
    seed, tau = where_draw_is(where)
    config = small_config()
    config.seed = seed
    task, state, place = start(config, params)
    batch = batch_of(4)
    state, metrics = task.train_step(state, place(batch), 0)
    reconstruct = whole_loss(config, tau, batch)
    loss = lambda p: (lambda nll, _, kl: nll + 1e-3 * kl)(*reconstruct(p))
    expected = jax.jit(jax.grad(loss))(params)
    ours = adam_means(state.opt_state["autoencoder"])
    scale = norm(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a / 0.5, b, atol=2e-6 * scale), ours, expected)
    np.testing.assert_allclose(metrics["gradient_norm_autoencoder"], scale, rtol=1e-5)
    assert (metrics["branch_equivariance"], metrics["branch_low_resolution"]) == (where == "latent", where == "image")


def test_adversarial_gradients_are_balanced_at_the_last_kernel(params):
    seed, tau = where_draw_is("latent")
    config = small_config(loss__disc_weight=0.7)
    config.seed = seed
    task, state, place = start(config, params)
    critic = jax.device_get(state.params["discriminator"])
    batch = batch_of(4)
    state, metrics = task.train_step(state, place(batch), 0)

    reconstruct = whole_loss(config, tau, batch, critic)
    nll = jax.jit(jax.grad(lambda p: reconstruct(p)[0]))(params)
    g = jax.jit(jax.grad(lambda p: reconstruct(p)[1]))(params)
    kl = jax.jit(jax.grad(lambda p: reconstruct(p)[2]))(params)
    last = lambda tree: np.linalg.norm(tree["decoder"]["conv_out"]["kernel"])
    weight = last(nll) / (last(g) + 1e-4)
    np.testing.assert_allclose(metrics["adaptive_weight"], weight, rtol=1e-4)
    expected = jax.tree.map(lambda a, b, c: a + 0.7 * weight * b + 1e-3 * c, nll, g, kl)
    scale = norm(expected)
    ours = adam_means(state.opt_state["autoencoder"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a / 0.5, b, atol=1e-5 * scale), ours, expected)


def test_discriminator_learns_to_tell_and_waits_for_disc_start(params):
    config = small_config(loss__disc_weight=0.5, loss__disc_start=1, optimizer__learning_rate=0.0)
    task, state, place = start(config, params)
    before = jax.device_get(state.params["discriminator"])
    state, _ = task.train_step(state, place(batch_of(4)), 0)
    assert norm(adam_means(state.opt_state["discriminator"])) == 0
    state, _ = task.train_step(state, place(batch_of(4)), 1)
    assert norm(adam_means(state.opt_state["discriminator"])) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params["discriminator"]))

    config = small_config(loss__disc_weight=1e-6, optimizer__learning_rate=3e-2, equivariance__p_equivariance=0.0,
                          equivariance__p_low_resolution=0.0)
    task, state, place = start(config, params)
    history = []
    for step in range(8):
        state, metrics = task.train_step(state, place(batch_of(4)), step)
        history.append(float(metrics["discriminator"]))
    assert history[-1] < 0.7 * history[0]


def test_one_large_program_for_each_size_and_none_for_turns(params):
    config = small_config(equivariance__sizes=(5, 6))
    task, state, place = start(config, params)
    batch, sizes = place(batch_of(4)), set()
    with CompileLedger() as ledger:
        for step in range(14):
            sizes.add(equivariance.draw_tau(config.seed, step, sizes=(5, 6), p_low_resolution=0.5).height)
            state, _ = task.train_step(state, batch, step)
    assert sizes == {None, 5, 6}
    assert ledger.names["jit(decode)"] == 3


@pytest.mark.parametrize("change", [{}, dict(training__accumulate=2, loss__disc_weight=0.5)])
def test_warm_up_leaves_nothing_to_compile(params, change):
    task, state, place = start(small_config(**change), params)
    batch = place(batch_of(4) | {"label": np.zeros(4, np.int32)})
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), (state, batch))
    names = []
    for name, compile_one in task.warm_up(*shapes):
        names.append(name)
        compile_one()
    with CompileLedger() as ledger:
        for step in range(8):
            state, _ = task.train_step(state, batch, step)
    assert len(names) == 3
    assert not set(ledger.names) & {f"jit({name})" for name in ("encode", "transform", "decode", "pull", "take")}


def test_accumulated_gradients_are_the_mean_over_micro_batches(params):
    config = small_config(training__accumulate=2)
    task, state, place = start(config, params)
    batch = batch_of(4)
    state, _ = task.train_step(state, place(batch), 0)
    expected = []
    for micro in range(2):  # micro-batch i holds examples i, i + 2, and step 0's draw number i
        rows = {name: array[micro::2] for name, array in batch.items()}
        task_1, state_1, place = start(small_config(), params)
        state_1, _ = task_1.train_step(state_1, place(rows), micro)
        expected.append(adam_means(state_1.opt_state["autoencoder"]))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *expected)
    scale = norm(mean)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale),
                 adam_means(state.opt_state["autoencoder"]), mean)


def test_a_broken_gradient_changes_nothing_but_the_counters(params):
    config = small_config(loss__kl_weight=float("nan"), loss__disc_weight=0.5)
    config.ema_decay = 0.9
    task, state, place = start(config, params)
    before = jax.device_get(state)
    state, _ = task.train_step(state, place(batch_of(4)), 0)
    after = jax.device_get(state)
    for field in ("params", "opt_state", "ema", "buffers"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, field), getattr(after, field))
    assert (after.step, after.skipped, after.skipped_in_a_row) == (1, 1, 1)


def test_evaluation_gives_the_papers_errors_for_each_image(params):
    task, state, place = start(small_config(), params)
    batch = batch_of(4)
    values = task.eval_step(state, place(batch))
    encode = jax.jit(lambda x: MODEL.apply({"params": params}, x, method="encode").mode())
    x = to_float(jnp.asarray(batch["image"]))
    turned, small = np.rot90(x, 1, axes=(2, 1)), equivariance.resize(x, (8, 8))
    for name, moved, encoded in (("rotation_error_90", np.rot90(encode(x), 1, axes=(2, 1)), encode(turned)),
                                 ("scale_error_0.5", equivariance.resize(encode(x), (4, 4)), encode(small))):
        expected = ((moved - encoded) ** 2).sum((1, 2, 3)) / (encoded**2).sum((1, 2, 3))
        np.testing.assert_allclose(values[name], expected, rtol=1e-4)
    y = np.clip(MODEL.apply({"params": params}, encode(x), method="decode"), -1, 1)
    np.testing.assert_allclose(values["psnr"], 10 * np.log10(4 / ((x - y) ** 2).mean((1, 2, 3))), rtol=1e-4)
    assert {name: image.shape for name, image in task.preview(state, place(batch)).items()} == {
        "image": (4, 16, 16, 3), "reconstruction": (4, 16, 16, 3),
        "image_transformed": (4, 8, 8, 3), "latent_transformed": (4, 8, 8, 3)}


@pytest.mark.parametrize("change, message", [
    (dict(data__image_size=17), "multiple of 2"),
    (dict(data__image_size=2), "at least 4"),
    (dict(data__evaluation_batch_size=0), "evaluation_batch_size"),
    (dict(equivariance__sizes=(4, 9)), "latent sides of 1 to 8"),
    (dict(equivariance__sizes=()), "latent sides"),
    (dict(equivariance__turns=(4,)), "quarter turns"),
    (dict(equivariance__method="nearest"), "bicubic"),
    (dict(training__accumulate=3), "multiple of"),
    (dict(loss__disc_weight=0.5, loss__disc_layers=3), "discriminator"),
    (dict(loss__perceptual_weight=1.0), "LPIPS"),
])
def test_sizes_that_do_not_fit_are_refused(change, message):
    config = small_config(**change)
    with pytest.raises(ValueError, match=message):
        check(config, MODEL, make_mesh(config.mesh, jax.devices()[:1]))


def test_eight_devices_agree_with_one():
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"}
    here = os.path.dirname(__file__)
    code = f"import runpy, sys; sys.path.insert(0, {here!r}); runpy.run_path({__file__!r})['compare_meshes']()"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]


def compare_meshes():
    """Run by the test above in a process with eight devices: one step on one, on eight, and sharded."""
    model, params, _ = load_autoencoder("init:smoke")
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), "index": np.arange(8, dtype=np.int32)}
    results = []
    for devices, fsdp in ((1, 1), (8, 4)):
        config = small_config(loss__disc_weight=0.5, mesh__fsdp=fsdp, equivariance__p_equivariance=1.0)
        mesh = make_mesh(config.mesh, jax.devices()[:devices])
        task = autoencoder_task(config, model, params, mesh)
        state = jax.jit(lambda init, key: init(key), out_shardings=task.shardings)(task.init, jax.random.key(0))
        state, metrics = task.train_step(state, put(mesh, batch), 0)
        results.append(jax.device_get((metrics, {r: adam_means(s) for r, s in state.opt_state.items()})))
    for metrics, gradients in results[1:]:
        for name, value in results[0][0].items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
        for role, expected in results[0][1].items():
            scale = norm(expected)
            for ours, theirs in zip(jax.tree.leaves(gradients[role]), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)
