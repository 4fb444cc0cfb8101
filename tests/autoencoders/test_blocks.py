"""Blocks against torch: values and gradients, on inputs whose mean is far from zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvae_jax.autoencoders.blocks import AttentionBlock, Upsample, group_norm
from eqvae_jax.autoencoders.kl import Posterior


def channels_first(torch, x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous().requires_grad_()


@pytest.mark.parametrize("swish", [False, True])
def test_group_norm_and_its_gradient_match_torch(torch, rng, swish):
    x, dy = (rng.normal(size=(2, 5, 7, 12)).astype(np.float32) for _ in range(2))
    x = 3 * x + 20
    scale, bias = (rng.normal(size=12).astype(np.float32) for _ in range(2))
    y, pull = jax.vjp(lambda *a: group_norm(*a, 4, swish), x, scale, bias)
    dx, dscale, dbias = pull(dy)

    tx, ts, tb = channels_first(torch, x), *(torch.from_numpy(a).requires_grad_() for a in (scale, bias))
    ty = torch.nn.functional.group_norm(tx, 4, ts, tb, eps=1e-6)
    ty = torch.nn.functional.silu(ty) if swish else ty
    ty.backward(channels_first(torch, dy))
    for ours, theirs in ((y, ty.permute(0, 2, 3, 1)), (dx, tx.grad.permute(0, 2, 3, 1)),
                         (dscale, ts.grad), (dbias, tb.grad)):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_group_norm_survives_a_mean_that_dwarfs_the_spread(rng):
    x = (50 + 0.01 * rng.normal(size=(1, 16, 16, 4))).astype(np.float32)
    y = group_norm(jnp.asarray(x), jnp.ones(4), jnp.zeros(4), 1, False)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-6)
    assert np.abs(y - expected).max() < 5e-3  # E[x^2] - E[x]^2 would be off by more than 1


def test_group_norm_keeps_bfloat16_and_computes_in_float32(rng):
    x = jnp.asarray(rng.normal(size=(1, 8, 8, 4)) + 5, jnp.bfloat16)
    y = group_norm(x, jnp.ones(4), jnp.zeros(4), 2, True)
    exact = group_norm(x.astype(jnp.float32), jnp.ones(4), jnp.zeros(4), 2, True)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_upsample_matches_nearest_then_convolution(torch, rng):
    x = rng.normal(size=(2, 5, 3, 4)).astype(np.float32)
    dy = rng.normal(size=(2, 10, 6, 4)).astype(np.float32)
    kernel, bias = rng.normal(size=(3, 3, 4, 4)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    y, pull = jax.vjp(lambda x, k, b: Upsample().apply({"params": {"kernel": k, "bias": b}}, x), x, kernel, bias)
    dx, dkernel, dbias = pull(dy)

    tx, tk, tb = channels_first(torch, x), *(torch.from_numpy(a).requires_grad_() for a in (kernel, bias))
    doubled = torch.nn.functional.interpolate(tx, scale_factor=2.0, mode="nearest")
    ty = torch.nn.functional.conv2d(doubled, tk.permute(3, 2, 0, 1), tb, padding=1)
    ty.backward(channels_first(torch, dy))
    for ours, theirs in ((y, ty.permute(0, 2, 3, 1)), (dx, tx.grad.permute(0, 2, 3, 1)),
                         (dkernel, tk.grad), (dbias, tb.grad)):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_attention_matches_torch(torch, rng):
    x = rng.normal(size=(2, 3, 4, 8)).astype(np.float32)
    shapes = jax.eval_shape(AttentionBlock(4).init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    ours = AttentionBlock(4).apply({"params": params}, x)

    p = jax.tree.map(torch.from_numpy, params)
    h = torch.nn.functional.group_norm(channels_first(torch, x), 4, p["norm"]["scale"], p["norm"]["bias"], eps=1e-6)
    h = h.permute(0, 2, 3, 1).reshape(2, 12, 8)
    query, key, value = (h @ p[name]["kernel"] + p[name]["bias"] for name in ("query", "key", "value"))
    weights = torch.softmax(query @ key.transpose(1, 2) * 8**-0.5, dim=-1)
    theirs = (weights @ value @ p["out"]["kernel"] + p["out"]["bias"]).reshape(2, 3, 4, 8) + torch.from_numpy(x)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_posterior_splits_mean_first_clips_and_has_torchs_kl(torch, rng):
    moments = rng.normal(size=(3, 2, 2, 8)).astype(np.float32)
    moments[0, 0, 0, 4:] = (50, -50, 0, 1)
    posterior = Posterior.from_moments(moments)
    np.testing.assert_array_equal(posterior.mode(), moments[..., :4])
    np.testing.assert_array_equal(posterior.logvar[0, 0, 0], (20, -30, 0, 1))
    mean, std = torch.from_numpy(moments[1:, ..., :4]), torch.from_numpy(np.exp(moments[1:, ..., 4:] / 2))
    normal = torch.distributions.Normal(mean, std)
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    np.testing.assert_allclose(posterior.kl()[1:], kl.numpy(), rtol=1e-5)


def test_samples_follow_the_example_not_its_place(rng):
    moments = rng.normal(size=(3, 4, 4, 8)).astype(np.float32)
    posterior, key = Posterior.from_moments(moments), jax.random.key(1)
    sample = posterior.sample(key, jnp.array([5, 6, 7]))
    swapped = jax.tree.map(lambda a: a[::-1], posterior).sample(key, jnp.array([7, 6, 5]))
    np.testing.assert_array_equal(sample, swapped[::-1])
    noise = (sample - posterior.mean) / posterior.std
    assert abs(np.mean(noise)) < 0.3 and 0.7 < np.std(noise) < 1.3
