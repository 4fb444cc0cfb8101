"""Losses and the adaptive weight against a transcription of the reference's formulae in torch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvae_jax.autoencoders import losses


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("logvar", [0.0, 0.7])
def test_reconstruction_loss_and_its_gradient_match_torch(torch, rng, reduction, logvar):
    x, y = rng.uniform(-1, 1, (2, 3, 9, 13, 3)).astype(np.float32)
    p = rng.uniform(0, 1, 3).astype(np.float32)

    t_y, t_p = torch.tensor(y, requires_grad=True), torch.tensor(p, requires_grad=True)
    r = (torch.tensor(x) - t_y).abs() + 0.6 * t_p[:, None, None, None]      # the reference's map
    nll = r / np.exp(logvar) + logvar
    nll = nll.sum() / 3 if reduction == "sum" else nll.mean()
    nll.backward()

    loss = lambda y, p: losses.reconstruction_loss(x, y, p, 0.6, logvar, reduction)
    value, grads = jax.value_and_grad(loss, (0, 1))(y, p)
    np.testing.assert_allclose(value, nll.item(), rtol=1e-5)
    np.testing.assert_allclose(grads[0], t_y.grad.numpy(), rtol=1e-5)
    np.testing.assert_allclose(grads[1], t_p.grad.numpy(), rtol=1e-5)


def test_reconstruction_loss_without_lpips_and_with_a_wrong_reduction(rng):
    x, y = rng.uniform(-1, 1, (2, 2, 5, 6, 3)).astype(np.float32)
    np.testing.assert_allclose(losses.reconstruction_loss(x, y), np.abs(x - y).mean() * 5 * 6 * 3, rtol=1e-5)
    with pytest.raises(ValueError, match='"sum".*"mean".*\'max\''):
        losses.reconstruction_loss(x, y, reduction="max")


def test_adversarial_losses_match_torch(torch, rng):
    real, fake = rng.normal(0.3, 1.5, (2, 2, 3, 4, 1)).astype(np.float32)
    t_real, t_fake = torch.tensor(real), torch.tensor(fake)
    hinge = 0.5 * (torch.relu(1 - t_real).mean() + torch.relu(1 + t_fake).mean())
    np.testing.assert_allclose(losses.hinge_discriminator_loss(real, fake), hinge.item(), rtol=1e-6)
    np.testing.assert_allclose(losses.generator_loss(jnp.asarray(fake)), -fake.mean(), rtol=1e-5)


def test_balance_and_one_backward_pass_match_two_passes_of_torch_autograd(torch, rng):
    """A two-layer decoder and a one-layer discriminator: weight and gradients of every parameter."""
    z = rng.normal(size=(2, 7, 9, 4)).astype(np.float32)
    x = rng.uniform(-1, 1, (2, 7, 9, 3)).astype(np.float32)
    first = rng.normal(0, 0.2, (3, 3, 4, 5)).astype(np.float32)
    last = rng.normal(0, 0.2, (3, 3, 5, 3)).astype(np.float32)
    critic = rng.normal(0, 0.2, (3, 3, 3, 1)).astype(np.float32)

    def t(a):
        kernel = a.shape[:2] == (3, 3)
        return torch.tensor(a).permute((3, 2, 0, 1) if kernel else (0, 3, 1, 2)).contiguous()

    t_first, t_last = t(first).requires_grad_(), t(last).requires_grad_()
    conv2d = torch.nn.functional.conv2d
    t_y = conv2d(torch.tanh(conv2d(t(z), t_first, padding=1)), t_last, padding=1)
    nll, g = (t(x) - t_y).abs().sum() / 2, -conv2d(t_y, t(critic)).mean()
    norms = [torch.autograd.grad(loss, t_last, retain_graph=True)[0].norm() for loss in (nll, g)]
    d = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
    (nll + 0.5 * d.detach() * g).backward()

    def conv(x, kernel, padding="SAME"):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def decode(first, last):
        h = jnp.tanh(conv(z, first))
        return conv(h, last), h

    y, decoder_vjp, h = jax.vjp(decode, first, last, has_aux=True)
    _, kernel_vjp = jax.vjp(lambda kernel: conv(h, kernel), last)
    nll_y = jax.grad(lambda y: losses.reconstruction_loss(x, y))(y)
    g_y = jax.grad(lambda y: losses.generator_loss(conv(y, critic, "VALID")))(y)
    weight = losses.balance(kernel_vjp, nll_y, g_y)
    np.testing.assert_allclose(weight, d.item(), rtol=1e-4)
    for ours, theirs in zip(decoder_vjp(nll_y + 0.5 * weight * g_y), (t_first, t_last), strict=True):
        theirs = theirs.grad.permute(2, 3, 1, 0).numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_adaptive_weight_is_capped_finite_and_constant(rng):
    a = rng.normal(size=(3, 3, 2, 2)).astype(np.float32)
    np.testing.assert_allclose(
        losses.adaptive_weight(a, 2 * a), np.linalg.norm(a) / (2 * np.linalg.norm(a) + 1e-4), rtol=1e-6)
    assert losses.adaptive_weight(a, np.zeros_like(a)) == 1e4           # the clip, reached without dividing by zero
    assert losses.adaptive_weight(a, 1e-3 * a, maximum=10.0) == 10
    assert not np.any(jax.grad(lambda a: losses.adaptive_weight(a, 2 * a[::-1]))(a))


@pytest.mark.parametrize("legacy", [True, False])
def test_codebook_loss_and_its_gradients_match_torch(torch, rng, legacy):
    z, codes = rng.normal(size=(2, 2, 3, 4, 5)).astype(np.float32)
    t_z, t_codes = torch.tensor(z, requires_grad=True), torch.tensor(codes, requires_grad=True)
    commitment, codebook = ((t_codes.detach() - t_z) ** 2).mean(), ((t_codes - t_z.detach()) ** 2).mean()
    expected = commitment + 0.3 * codebook if legacy else 0.3 * commitment + codebook
    expected.backward()
    value, grads = jax.value_and_grad(lambda *a: losses.codebook_loss(*a, 0.3, legacy), (0, 1))(z, codes)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(grads[0], t_z.grad.numpy(), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(grads[1], t_codes.grad.numpy(), rtol=1e-5, atol=1e-8)


def test_codebook_metrics_of_a_known_histogram():
    indices = jnp.array([[0, 0], [3, 3], [3, 1], [1, 0]])  # counts 3 2 0 3 of 5 codes
    found = losses.codebook_metrics(indices, 5)
    p = np.array([3, 2, 3]) / 8
    np.testing.assert_allclose(found["codebook_usage"], 3 / 5)
    np.testing.assert_allclose(found["codebook_perplexity"], np.exp(-(p * np.log(p)).sum()), rtol=1e-6)


def test_explicit_loss_of_vq_models_is_a_mean_as_their_other_losses(rng):
    moved, encoded = rng.normal(size=(2, 3, 2, 2, 4)).astype(np.float32)
    value = losses.explicit_loss(moved, encoded, reduction="mean")
    np.testing.assert_allclose(value, ((moved - encoded) ** 2).mean(), rtol=1e-6)


def test_explicit_loss_is_a_sum_over_the_latent_and_its_target_may_be_constant(rng):
    moved, encoded = rng.normal(size=(2, 3, 2, 2, 4)).astype(np.float32)
    for stop, sign in ((False, -1), (True, 0)):
        value, grads = jax.value_and_grad(partial(losses.explicit_loss, stop_gradient=stop), (0, 1))(moved, encoded)
        np.testing.assert_allclose(value, ((moved - encoded) ** 2).sum() / 3, rtol=1e-6)
        np.testing.assert_allclose(grads[0], 2 * (moved - encoded) / 3, rtol=1e-6)
        np.testing.assert_allclose(grads[1], sign * grads[0], rtol=1e-6)
