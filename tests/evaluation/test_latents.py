import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_autoencoder as toys

from eqvae_jax.autoencoders.kl import Posterior
from eqvae_jax.autoencoders.vq import Features
from eqvae_jax.evaluation.latents import LatentStatistics, Moments, latent_statistics, scale_and_shift


def batches_of(images, masks):
    """Images (N, H, W, 3) in batches as long as the masks."""
    ends = np.cumsum([len(mask) for mask in masks])
    return [
        {"image": images[end - len(mask) : end], "mask": np.array(mask, bool)}
        for mask, end in zip(masks, ends, strict=True)
    ]


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (7, 8, 8, 3), np.uint8)


def gaussian(params, x):
    """A posterior whose mean and spread differ from place to place and from channel to channel."""
    z = toys.pool(x, 4)
    z = jnp.concatenate([z, z[..., :1] * z[..., 1:2]], -1)  # 4 channels
    return Posterior(z * params["gain"] + params["offset"], 2 * jnp.log(0.1 + jnp.abs(z)))


PARAMS = {"gain": np.array([1, 2, 3, 4], np.float32), "offset": np.array([0, -1, 5, 0.5], np.float32)}


def plain(params, x):
    return gaussian(params, x).mean


def deterministic(params, x):
    return Features(plain(params, x))


def truth(images):
    """Means and standard deviations of the posterior's mean, (N h w, C) float64."""
    posterior = gaussian(PARAMS, images.astype(np.float32) / 127.5 - 1)
    return (np.asarray(array, np.float64).reshape(-1, 4) for array in (posterior.mean, posterior.std))


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_batches_merge_to_the_moments_of_all_the_data_however_large_its_mean(rng, offset):
    values = rng.normal(size=(1000, 3)) * [0.1, 1, 10] + offset
    moments = Moments()
    for part in np.split(values, [1, 1, 7, 300, 999]):  # one of them is empty
        moments.add(part)
    assert moments.count == 1000
    np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-12, atol=1e-12)
    exact = np.var(values - offset, axis=0)  # the offset is exact in float64, up to the last digits of the values
    np.testing.assert_allclose(moments.variance(), exact, rtol=1e-12 if offset == 0 else 1e-6)


def test_statistics_of_images_in_batches_equal_those_of_all_at_once(images):
    found = latent_statistics(gaussian, PARAMS, batches_of(images, [[1] * 4, [1] * 3]), progress=False)
    mean, std = truth(images)
    assert found.count == 7
    np.testing.assert_allclose(found.channel_mean, mean.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.channel_std, np.sqrt(mean.var(0) + np.square(std).mean(0)), rtol=1e-5)
    assert found.mean == pytest.approx(mean.mean(), rel=1e-5)
    assert found.std == pytest.approx(np.sqrt(mean.var() + np.square(std).mean()), rel=1e-5)


def test_total_variance_is_that_of_samples(images):
    found = latent_statistics(gaussian, PARAMS, batches_of(images, [[1] * 7]), progress=False)
    posterior = gaussian(PARAMS, images.astype(np.float32) / 127.5 - 1)
    samples = jax.vmap(posterior.sample)(jax.random.split(jax.random.key(0), 10000))  # (10000, B, h, w, C)
    samples = np.asarray(samples, np.float64).reshape(-1, 4)
    np.testing.assert_allclose(found.channel_mean, samples.mean(0), atol=5e-3)
    np.testing.assert_allclose(found.channel_std, samples.std(0), rtol=5e-3)
    assert found.std == pytest.approx(samples.std(), rel=5e-3)
    means_only = np.asarray(posterior.mean).reshape(-1, 4).std(0)
    assert (found.channel_std > 1.05 * means_only).all()  # the noise is no small part here


def test_padding_is_never_looked_at(images):
    real = latent_statistics(gaussian, PARAMS, batches_of(images[:5], [[1] * 4, [1]]), progress=False)
    padded = np.concatenate([images[:5], np.full((3, 8, 8, 3), 255, np.uint8)])
    found = latent_statistics(gaussian, PARAMS, batches_of(padded, [[1] * 4, [1, 0, 0, 0]]), progress=False)
    assert found.count == real.count == 5
    np.testing.assert_allclose(found.channel_mean, real.channel_mean, rtol=1e-6)
    np.testing.assert_allclose(found.channel_std, real.channel_std, rtol=1e-6)


def test_a_batch_without_a_mask_is_all_real(images):
    found = latent_statistics(gaussian, PARAMS, [{"image": images}], progress=False)
    assert found.count == 7


def test_a_deterministic_encoder_has_no_noise(images):
    found = latent_statistics(deterministic, PARAMS, batches_of(images, [[1] * 7]), progress=False)
    mean, _ = truth(images)
    np.testing.assert_allclose(found.channel_std, mean.std(0), rtol=1e-5)


def test_scale_and_shift_make_samples_of_unit_deviation(images):
    found = latent_statistics(gaussian, PARAMS, batches_of(images, [[1] * 7]), progress=False)
    posterior = gaussian(PARAMS, images.astype(np.float32) / 127.5 - 1)
    samples = np.asarray(jax.vmap(posterior.sample)(jax.random.split(jax.random.key(0), 2000)), np.float64)
    scale, shift = scale_and_shift(found, with_shift=True)
    ordinary = (samples - shift) * scale
    assert ordinary.mean() == pytest.approx(0, abs=5e-3) and ordinary.std() == pytest.approx(1, rel=5e-3)
    assert shift == found.mean
    # LDM's rule: the deviation about the mean, though the mean stays.
    assert scale_and_shift(found, with_shift=False) == (scale, 0.0)
    assert scale == pytest.approx(1 / samples.std(), rel=5e-3)


def test_what_has_no_statistics_is_refused(images):
    with pytest.raises(ValueError, match="no image"):
        latent_statistics(gaussian, PARAMS, batches_of(images, [[0] * 7]), progress=False)
    broken = PARAMS | {"offset": np.array([0, np.nan, 0, 0], np.float32)}
    with pytest.raises(ValueError, match="not finite"):
        latent_statistics(gaussian, broken, batches_of(images, [[1] * 7]), progress=False)
    constant = LatentStatistics(7, np.ones(4), np.zeros(4), 1.0, 0.0)
    with pytest.raises(ValueError, match="all equal"):
        scale_and_shift(constant, with_shift=False)
