"""VQ models under the objective, and the paper's explicit alternative: gradients against one monolithic loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_task import MODEL, adam_means, batch_of, norm, random_params, small_config, start, where_draw_is

from eqvae_jax import equivariance
from eqvae_jax.autoencoders.objective import to_float
from eqvae_jax.autoencoders.task import check
from eqvae_jax.autoencoders.vq import AutoencoderVQ
from eqvae_jax.training.sharding import make_mesh

VQ = AutoencoderVQ(channels=4, multipliers=(1, 2), blocks_per_level=1, groups=2, latent_channels=2, codebook_size=5)


def vq_config(**changes):
    config = small_config(**changes)
    del config.loss.kl_weight
    config.loss.update(dict(codebook_weight=0.7, codebook_beta=0.25, codebook_legacy=True) | {
        name.removeprefix("loss__"): value for name, value in changes.items() if name.startswith("loss__")})
    return config


def assert_first_gradient(state, expected):
    """Adam's first moment after one step is (1 - b1) = 0.5 times the gradient."""
    scale = norm(expected)
    compare = lambda ours, theirs: np.testing.assert_allclose(ours / 0.5, theirs, atol=3e-6 * scale)
    jax.tree.map(compare, adam_means(state.opt_state["autoencoder"]), expected)


@pytest.mark.parametrize("legacy", [True, False])
def test_tau_acts_before_quantisation_and_both_codebook_losses_have_their_gradients(legacy):
    seed, tau = where_draw_is("latent")
    config = vq_config(loss__codebook_legacy=legacy)
    config.seed = seed
    params = random_params(VQ)
    task, state, place = start(config, params, model=VQ)
    batch = batch_of(4)
    state, metrics = task.train_step(state, place(batch), 0)

    def loss(params):
        x = to_float(jnp.asarray(batch["image"]))
        z = equivariance.apply_tau(VQ.apply({"params": params}, x, method="encode").mode(), tau[1:3], tau.turns)
        distances = jnp.square(z[..., None, :] - params["codebook"]).sum(-1)  # B h w K
        codes = params["codebook"][distances.argmin(-1)]
        y = VQ.apply({"params": params}, z, method="decode")
        near, far = jnp.square(jax.lax.stop_gradient(codes) - z).mean(), jnp.square(
            codes - jax.lax.stop_gradient(z)).mean()
        target = equivariance.apply_tau(x, tau.image_size(2), tau.turns)
        codebook = near + 0.25 * far if legacy else 0.25 * near + far
        return jnp.abs(y - target).mean() + 0.7 * codebook, codebook

    (_, codebook), expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.abs(expected["codebook"]).sum() > 0
    assert_first_gradient(state, expected)
    np.testing.assert_allclose(metrics["codebook"], codebook, rtol=1e-5)
    assert 1 / 5 <= metrics["codebook_usage"] <= 1 and 1 <= metrics["codebook_perplexity"] <= 5 and "kl" not in metrics


@pytest.mark.parametrize("objective", ["explicit", "explicit_stop_gradient"])
def test_the_explicit_objective_adds_the_latents_distance_to_plain_reconstruction(objective):
    seed, tau = where_draw_is("latent")
    config = small_config(equivariance__objective=objective, loss__explicit_weight=0.3)
    config.seed = seed
    params = random_params()
    task, state, place = start(config, params)
    batch = batch_of(4)
    state, metrics = task.train_step(state, place(batch), 0)
    key = jax.random.fold_in(jax.random.key(seed), 0)

    def loss(params):
        encode = lambda x: MODEL.apply({"params": params}, x, method="encode")
        x = to_float(jnp.asarray(batch["image"]))
        posterior = encode(x)
        y = MODEL.apply({"params": params}, posterior.sample(key, batch["index"]), method="decode")
        other = encode(equivariance.apply_tau(x, tau.image_size(2), tau.turns)).mean
        other = jax.lax.stop_gradient(other) if objective == "explicit_stop_gradient" else other
        gap = equivariance.apply_tau(posterior.mean, tau[1:3], tau.turns) - other
        distance = 0.3 * jnp.square(gap).sum() / 4
        return jnp.abs(y - x).sum() / 4 + 1e-3 * posterior.kl().mean() + distance, distance

    (_, distance), expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert_first_gradient(state, expected)
    np.testing.assert_allclose(metrics["explicit"], distance, rtol=1e-5)


def test_the_explicit_objective_accumulates_over_branches_that_differ():
    config = small_config(equivariance__objective="explicit", training__accumulate=2, data__batch_size=8)
    draws = [[equivariance.draw_tau(seed, n, sizes=(6,), p_low_resolution=0.5).where for n in (0, 1)]
             for seed in range(100)]
    config.seed = draws.index(["latent", "none"])
    task, state, place = start(config, random_params())
    state, metrics = task.train_step(state, place(batch_of(8)), 0)
    assert metrics["explicit"] > 0 and np.isfinite(metrics["gradient_norm_autoencoder"])


def test_a_discriminator_of_before_is_gone_on_with():
    config = small_config(loss__disc_weight=0.5)
    params = random_params()
    _, fresh, _ = start(config, params)
    critic = {"params": jax.tree.map(lambda a: a + 1, fresh.params["discriminator"]),
              "batch_stats": jax.tree.map(lambda a: a + 2, fresh.buffers["discriminator"])}
    _, state, _ = start(config, params, critic=critic)
    jax.tree.map(np.testing.assert_array_equal, state.params["discriminator"], critic["params"])
    jax.tree.map(np.testing.assert_array_equal, state.buffers["discriminator"], critic["batch_stats"])


def test_a_model_of_the_other_kind_and_an_unknown_objective_are_refused():
    config, mesh = small_config(equivariance__objective="both"), make_mesh(small_config().mesh)
    config.init = "init:vqgan-smoke"
    with pytest.raises(ValueError, match="explicit_stop_gradient"):
        check(config, MODEL, mesh)
    with pytest.raises(ValueError, match="init:vqgan-smoke is a VQ .*loss.codebook_weight.*configs/eq_vqgan.py"):
        check(config, VQ, mesh)
