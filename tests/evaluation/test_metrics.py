import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvae_jax import equivariance
from eqvae_jax.evaluation import metrics


def test_psnr_of_a_constant_difference_is_its_closed_form(rng):
    x = rng.uniform(-0.8, 0.7, (2, 9, 13, 3)).astype(np.float32)
    offset = np.array([0.1, 0.02], np.float32)[:, None, None, None]
    expected = 20 * np.log10(2 / np.array([0.1, 0.02]))
    np.testing.assert_allclose(metrics.psnr(x, x + offset), expected, rtol=1e-4)


def test_psnr_on_eight_bits_matches_numpy_on_the_8_bit_images(rng):
    x = rng.uniform(-1.3, 1.3, (3, 16, 12, 3)).astype(np.float32)  # beyond the range: must be clipped
    y = x + rng.normal(0, 0.1, x.shape).astype(np.float32)
    for name, convert in {
        "round": lambda v: np.clip(127.5 * v + 128, 0, 255).astype(np.uint8),  # released EQ-VAE eval
        "truncate": lambda v: (255 * ((np.clip(v, -1, 1) + 1) / 2)).astype(np.uint8),  # LDM's custom_to_pil
    }.items():
        a, b = convert(x).astype(np.float64), convert(y).astype(np.float64)
        expected = 20 * np.log10(255 / np.sqrt(np.mean((a - b) ** 2, axis=(1, 2, 3))))
        np.testing.assert_allclose(metrics.psnr(x, y, uint8=name), expected, rtol=1e-4)


def test_the_8_bit_grid_gives_back_8_bit_images_unchanged():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = levels / np.float32(127.5) - 1
    np.testing.assert_array_equal(np.rint((metrics.as_displayed(x) + 1) * 127.5), levels)
    assert np.isinf(metrics.psnr(x, x)).all()


def test_ssim_matches_scikit_image(rng):
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    x = rng.uniform(-1, 1, (3, 21, 34, 3)).astype(np.float32)
    x[1] = np.cumsum(x[1], axis=1) / 6  # smooth, as photographs are
    y = np.stack([x[0] + 0.3 * rng.normal(size=x[0].shape), 0.5 * x[1] + 0.2, x[2, ::-1]]).astype(np.float32)
    expected = [
        structural_similarity(
            a, b, data_range=2, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(x.astype(np.float64), y.astype(np.float64), strict=True)
    ]
    np.testing.assert_allclose(metrics.ssim(x, y), expected, atol=2e-5)


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="11 x 11"):
        metrics.ssim(jnp.full((1, 10, 32, 3), 0.3), jnp.full((1, 10, 32, 3), 0.2))


def test_l1_and_mse_are_per_image():
    x, y = np.full((2, 4, 4, 3), 0.25, np.float32), np.zeros((2, 4, 4, 3), np.float32)
    y[0, 0, 0, 0] = 0.25 + 4.8
    np.testing.assert_allclose(metrics.l1(x, y), [(47 * 0.25 + 4.8) / 48, 0.25], rtol=1e-6)
    np.testing.assert_allclose(metrics.mse(x, y), [(47 * 0.0625 + 4.8**2) / 48, 0.0625], rtol=1e-6)


def test_latent_error_is_the_error_of_equivariance(rng):
    x = rng.normal(size=(3, 8, 8, 3)).astype(np.float32)
    ramp = np.linspace(0.5, 2, 4)[None, None, :, None]

    def encode(image):
        return (
            image.reshape(image.shape[0], image.shape[1] // 2, 2, image.shape[2] // 2, 2, 3).mean((2, 4))
            * ramp
        )

    moved, encoded = equivariance.apply_tau(encode(x), turns=1), encode(equivariance.apply_tau(x, turns=1))
    np.testing.assert_allclose(
        equivariance.relative_error(moved, encoded), equivariance.error(encode, x, factor=2, turns=1), rtol=1e-6
    )
    with pytest.raises(ValueError, match="tau E"):
        equivariance.relative_error(moved, encoded[:, :2])


def test_means_ignore_padding_and_weigh_images_not_batches():
    means = metrics.Means()
    means.add({"error": np.array([1.0, 2.0, 6.0])}, np.array([True, True, True]))
    means.add({"error": np.array([11.0, np.nan, 500.0])}, np.array([True, False, False]))
    assert means.result() == {"error": 5.0} and means.count() == 4


def test_means_show_a_broken_image_and_refuse_an_empty_set():
    means = metrics.Means()
    with pytest.raises(ValueError, match="empty"):
        means.result()
    means.add({"error": np.array([1.0])}, np.array([False]))
    with pytest.raises(ValueError, match="empty"):
        means.result()
    means.add({"error": np.array([np.nan, 2.0])})
    assert np.isnan(means.result()["error"])


def test_codes_are_counted_over_the_whole_set_without_padding():
    counts = metrics.CodeCounts(6)
    counts.add(np.array([[[0, 0], [0, 1]], [[1, 3], [0, 0]]]))  # five of 0, two of 1, one of 3
    counts.add(np.array([[[3, 1], [1, 1]], [[5, 5], [5, 5]]], np.int32), np.array([True, False]))
    p = np.array([5, 5, 2]) / 12
    result = counts.result()
    assert result["codebook_usage"] == 3 / 6
    assert result["codebook_perplexity"] == pytest.approx(np.prod(p**-p))  # exp(-sum p log p)


def test_perplexity_is_one_for_one_code_and_their_number_for_all_alike():
    one, all_alike = np.full((2, 4, 4), 3), np.arange(32).reshape(2, 4, 4) % 16
    for indices, usage, perplexity in [(one, 1 / 16, 1), (all_alike, 1, 16)]:
        counts = metrics.CodeCounts(16)
        counts.add(indices)
        assert counts.result() == {"codebook_usage": usage, "codebook_perplexity": pytest.approx(perplexity)}
    with pytest.raises(ValueError, match="empty"):
        metrics.CodeCounts(16).result()


@pytest.mark.parametrize("data_range, border", [(2.0, "valid"), (2.0, "reflect"), (None, "valid"), (None, "reflect")])
def test_ssim_is_that_of_torchmetrics(rng, torch, lpips_package, data_range, border):
    """lpips_package: so that torchvision can be imported beside a CPU build of torch."""
    reference = pytest.importorskip("torchmetrics.functional.image").structural_similarity_index_measure
    x = rng.uniform(-0.9, 0.8, (3, 21, 34, 3)).astype(np.float32)
    x[1] = np.cumsum(x[1], axis=1) / 6
    y = np.stack([x[0] + 0.3 * rng.normal(size=x[0].shape), 0.5 * x[1] + 0.2, x[2, ::-1]]).astype(np.float32)
    expected = []
    for a, b in zip(x, y, strict=True):  # one image at a time, as the released evaluation: its range is per batch
        images = (torch.tensor(z.transpose(2, 0, 1)[None].astype(np.float64)) for z in (b, a))
        mean, full = reference(*images, data_range=data_range, return_full_image=True)
        # torchmetrics <= 1.4.1 left out the border of 5 pixels, where windows see reflections; later versions keep it.
        expected.append(float(mean if border == "reflect" else full[..., 5:-5, 5:-5].mean()))
    np.testing.assert_allclose(metrics.ssim(x, y, data_range, border), expected, atol=2e-5)


@pytest.mark.parametrize("convention", ["round", "truncate"])
def test_images_that_were_8_bit_stay_what_they_are_in_a_compiled_program_too(convention):
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = jnp.asarray(levels, jnp.float32) / 127.5 - 1
    for convert in (metrics.to_bytes, jax.jit(metrics.to_bytes, static_argnums=1)):
        np.testing.assert_array_equal(convert(x, convention), levels)
    y = x + 0.6 / 127.5
    shown = metrics.as_displayed(y, convention)
    np.testing.assert_array_equal(np.rint((np.asarray(shown) + 1) * 127.5), metrics.to_bytes(y, convention))
    above = {"round": 1, "truncate": 0}[convention]
    np.testing.assert_array_equal(metrics.to_bytes(y, convention), np.minimum(levels.astype(int) + above, 255))
