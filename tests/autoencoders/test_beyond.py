"""What goes beyond the paper (docs/beyond.md), each against its definition in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_task import MODEL, adam_means, batch_of, norm, random_params, small_config, start, where_draw_is
from test_objective import VQ, assert_first_gradient, vq_config

from eqvae_jax import equivariance
from eqvae_jax.autoencoders.kl import latent_noise
from eqvae_jax.autoencoders.objective import to_float
from eqvae_jax.autoencoders.task import check
from eqvae_jax.training.compilation import CompileLedger
from eqvae_jax.training.sharding import make_mesh


def loss_of(params, batch, *, seed, tau, model=MODEL, weight=0.0, noise=0.0):
    """The objective of one step in one piece, with everything written out."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    x = to_float(jnp.asarray(batch["image"]))
    posterior = model.apply({"params": params}, x, method="encode")
    z = posterior.sample(key, batch["index"])
    decode = lambda z: model.apply({"params": params}, z, method="decode")
    corrupt = lambda z: latent_noise(z, noise, key, batch["index"]) if noise else z
    moved, target = z, x
    if tau.where == "latent":
        by = tau.shift and tuple(pixels / 2 for pixels in tau.shift)
        moved = equivariance.apply_tau(z, tau[1:3], tau.turns, shift=by)
        target = equivariance.apply_tau(x, tau.image_size(2), tau.turns, shift=tau.shift)
    total = jnp.abs(decode(corrupt(moved)) - target).sum() / len(x) + 1e-3 * posterior.kl().mean()
    if not tau.reduction:
        return total, 0.0
    small = equivariance.resize(x, (16 // tau.reduction,) * 2)
    less = jnp.abs(decode(corrupt(equivariance.resize(z, (8 // tau.reduction,) * 2))) - small)
    extra = weight * less.mean() * x[0].size
    return total + extra, extra


def first_step(config, batch, model=MODEL):
    params = random_params(model)
    task, state, place = start(config, params, model=model)
    state, metrics = task.train_step(state, place(batch), 0)
    return params, state, metrics


def test_scale_equivariance_adds_a_smaller_reconstruction_to_a_plain_step():
    seed, _ = where_draw_is("none")
    config = small_config(loss__scale_equivariance_weight=0.25, equivariance__p_low_resolution=0.5)
    config.seed, batch = seed, batch_of(4)
    tau = equivariance.draw_tau(seed, 0, sizes=(6,), p_low_resolution=0.5, reductions=(2, 4))
    assert tau.reduction in (2, 4)
    params, state, metrics = first_step(config, batch)
    whole = lambda p: loss_of(p, batch, seed=seed, tau=tau, weight=0.25)
    (_, extra), expected = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
    assert_first_gradient(state, expected)
    np.testing.assert_allclose(metrics["scale_equivariance"], extra, rtol=1e-5)
    assert extra > 0 and norm(expected["encoder"]) > 0


def test_shifts_move_the_image_by_whole_pixels_and_the_latent_by_halves():
    config, batch = small_config(equivariance__max_shift=3), batch_of(4)
    draws = [equivariance.draw_tau(seed, 0, sizes=(6,), p_low_resolution=0.5, max_shift=3) for seed in range(99)]
    seed, tau = next((seed, tau) for seed, tau in enumerate(draws) if tau.shift and all(by % 2 for by in tau.shift))
    config.seed = seed
    params, state, _ = first_step(config, batch)
    expected = jax.jit(jax.grad(lambda p: loss_of(p, batch, seed=seed, tau=tau)[0]))(params)
    assert_first_gradient(state, expected)


def test_noise_is_on_what_is_decoded_and_not_on_the_posterior():
    seed, tau = where_draw_is("latent")
    config, batch = small_config(loss__latent_noise=0.7), batch_of(4)
    config.seed = seed
    params, state, metrics = first_step(config, batch)
    expected = jax.jit(jax.grad(lambda p: loss_of(p, batch, seed=seed, tau=tau, noise=0.7)[0]))(params)
    assert_first_gradient(state, expected)
    quiet = small_config()
    quiet.seed = seed
    np.testing.assert_allclose(first_step(quiet, batch)[2]["kl"], metrics["kl"], rtol=1e-6)


def test_noise_is_each_examples_own_and_as_distributed_as_it_says():
    z = jnp.full((4000, 2, 3, 2), 5.0)
    key, index = jax.random.key(1), jnp.arange(4000)
    noisy = np.asarray(latent_noise(z, 3.0, key, index))
    some = jnp.array([7, 3000, 12])
    np.testing.assert_array_equal(latent_noise(z[:3], 3.0, key, some), noisy[np.array(some)])
    # z' = (1 - t) 5 + 3 t eps, E t = 1/2, var t = 1/12, E t^2 = 1/3
    np.testing.assert_allclose(noisy.mean(), 2.5, atol=0.1)
    np.testing.assert_allclose(noisy.var(), 25 / 12 + 9 / 3, rtol=0.05)
    level = 1 - np.asarray(latent_noise(z, 0.0, key, index))[:, 0, 0, 0] / 5  # t itself
    assert -1e-6 < level.min() < 0.01 and 0.99 < level.max() < 1 and abs(np.median(level) - 0.5) < 0.03
    eps = (noisy - 5 * (1 - level[:, None, None, None])) / (3 * level[:, None, None, None])
    np.testing.assert_allclose((eps.mean(), eps.std()), (0, 1), atol=0.03)
    sample = np.asarray(jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (2, 3, 2)))(index))
    assert abs(np.corrcoef(eps.ravel(), sample.ravel())[0, 1]) < 0.02  # not the posterior's noise again


def test_scale_equivariance_of_a_vq_model_trains_its_encoder():
    seed, _ = where_draw_is("none")
    steps = []
    for weight in (0.0, 0.5):
        config = vq_config(loss__scale_equivariance_weight=weight, loss__scale_equivariance_factors=(2,))
        config.seed = seed
        steps.append(first_step(config, batch_of(4), VQ))
    assert steps[1][2]["scale_equivariance"] > 0 and "scale_equivariance" not in steps[0][2]
    old, new = (adam_means(state.opt_state["autoencoder"]) for _, state, _ in steps)
    # Straight through: only its own loss moves the codebook.
    np.testing.assert_allclose(new["codebook"], old["codebook"], rtol=1e-5, atol=1e-7)
    assert norm(jax.tree.map(np.subtract, new["encoder"], old["encoder"])) > 1e-5


@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_options_together_are_warmed_up_whole(accumulate):
    config = small_config(loss__scale_equivariance_weight=0.25, loss__latent_noise=0.5, equivariance__max_shift=4,
                          training__accumulate=accumulate)
    task, state, place = start(config, random_params())
    batch = place(batch_of(4))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), (state, batch))
    names = [(name, compile_one())[0] for name, compile_one in task.warm_up(*shapes)]
    assert len(set(names)) == len(names) and any(name.endswith("and 1/4") for name in names)
    with CompileLedger() as ledger:
        for step in range(8):
            state, metrics = task.train_step(state, batch, step)
    programs = ["encode", "transform", "decode", "decode_reduced", "pull", "take"]
    programs += ["add"] if accumulate == 1 else []  # the task has one of this name, too, that adds micro-batches up
    assert not set(ledger.names) & {f"jit({name})" for name in programs}
    assert ledger.names["jit(update)"] == 1
    assert np.isfinite(metrics["gradient_norm_autoencoder"])
    shares = {variant.name: variant.share for variant in task.variants()}
    assert {"full size and 1/2 of it", "full size and 1/4 of it", "latent 12 x 12"} <= set(shares)
    np.testing.assert_allclose(sum(shares.values()), 1)


@pytest.mark.parametrize("change, message", [
    (dict(equivariance__max_shift=16), "0 to 15"),
    (dict(loss__latent_noise=-1.0), "latent_noise is -1.0"),
    (dict(loss__scale_equivariance_weight=float("nan")), "scale_equivariance_weight is nan"),
    (dict(loss__scale_equivariance_weight=0.25, loss__scale_equivariance_factors=(2, 3)), "divisors of the latent"),
    (dict(loss__scale_equivariance_weight=0.25, loss__scale_equivariance_factors=()), "divisors"),
    (dict(loss__scale_equivariance_weight=0.25, loss__perceptual_weight=1.0, loss__scale_equivariance_factors=(2,)),
     "LPIPS needs images of 16 pixels, .* down to 8"),
    (dict(loss__scale_equivariance_weight=0.25, equivariance__p_equivariance=1.0), "never leave a step to"),
])
def test_options_that_cannot_work_are_refused(change, message):
    config = small_config(**change)
    with pytest.raises(ValueError, match=message):
        check(config, MODEL, make_mesh(config.mesh, jax.devices()[:1]))


def test_a_shift_by_part_of_a_pixel_is_refused():
    config = small_config()
    with config.equivariance.ignore_type():
        config.equivariance.max_shift = 1.5
    with pytest.raises(ValueError, match="max_shift is 1.5; .*whole number"):
        check(config, MODEL, make_mesh(config.mesh, jax.devices()[:1]))


def test_noise_on_codes_is_refused():
    config = vq_config(loss__latent_noise=1.0)
    with pytest.raises(ValueError, match="VQ autoencoder"):
        check(config, VQ, make_mesh(config.mesh, jax.devices()[:1]))
