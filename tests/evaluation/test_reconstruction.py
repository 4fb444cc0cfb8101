import jax.numpy as jnp
import numpy as np
import pytest
from toy_autoencoder import PARAMS, batches_of, noisy, photographs, pool, pooling, ramping, upsampling

from eqvae_jax import equivariance
from eqvae_jax.autoencoders.presets import PRESETS
from eqvae_jax.autoencoders.vq import Features
from eqvae_jax.evaluation import metrics, reconstruction, transforms


def errors(encode, decode, images, *, factor=2, batch=2, turns=(1, 2, 3), scales=(0.5,), **options):
    latent = reconstruction.latent_size(encode, decode, PARAMS, images.shape[1:3])
    chosen = transforms.choose(latent, factor, turns, scales)
    return reconstruction.equivariance_errors(
        encode, decode, PARAMS, batches_of(images, batch), chosen, **options
    )


def test_a_pooling_encoder_commutes_with_turns_and_with_halving(rng):
    result = errors(pooling, upsampling, photographs(rng, 3, 16), scales=(0.5, 0.25))
    for name in ("R/90", "R/180", "R/270", "R", "R_sample", "S/0.5", "S_sample/0.5"):
        assert result[name] == pytest.approx(0, abs=1e-10), name
    assert result["S/0.25"] > 1e-3  # bilinear without antialias reads 4 of 16 pixels: not a mean of blocks
    assert result["S"] == pytest.approx((result["S/0.5"] + result["S/0.25"]) / 2)


def test_a_ramp_gives_the_errors_worked_out_by_hand():
    pooled = np.array([[1, 2], [3, 4]]) * 40  # the ramp's columns weigh 1 and 3
    images = np.kron(pooled, np.ones((2, 2))).astype(np.uint8)[None, :, :, None].repeat(3, -1)
    # [-1, 1] is 8-bit / 127.5 - 1, so hand the network the 8-bit values back.
    encode = lambda params, x: ramping(params, (x + 1) * 127.5)
    result = errors(encode, upsampling, images, batch=1, scales=())
    assert result["R/90"] == pytest.approx(68 / 70, rel=1e-5)
    assert result["R/180"] == pytest.approx(120 / 110, rel=1e-5)
    assert result["R/270"] == pytest.approx(52 / 230, rel=1e-5)
    assert result["R"] == pytest.approx((68 / 70 + 120 / 110 + 52 / 230) / 3, rel=1e-5)


def test_errors_are_means_of_per_image_ratios_without_padding(rng):
    images = photographs(rng, 5, 8)
    result = errors(ramping, upsampling, images, batch=4, turns=(1,), scales=(0.5,))
    x = images.astype(np.float32) / 127.5 - 1
    encode = lambda image: ramping(PARAMS, image).mode()
    assert result["R/90"] == pytest.approx(
        float(equivariance.error(encode, x, factor=2, turns=1).mean()), rel=1e-5
    )
    expected = float(equivariance.error(encode, x, factor=2, size=(2, 2)).mean())
    assert result["S/0.5"] == pytest.approx(expected, rel=1e-5)


def test_pixel_errors_compare_decodes_with_the_moved_image(rng):
    images = photographs(rng, 3, 8)
    result = errors(pooling, upsampling, images, turns=(1,), scales=(0.5,), uint8="none")
    x = images.astype(np.float64) / 127.5 - 1
    blur = np.kron(np.asarray(pool(x, 2)).transpose(0, 3, 1, 2), np.ones((2, 2))).transpose(0, 2, 3, 1)
    expected = np.abs(blur - x).mean()
    assert result["pixel_l1/90"] == pytest.approx(expected, rel=1e-5)  # a turn moves the error along
    assert result["pixel_l1/R"] == result["pixel_l1/90"]
    half = pool(x, 2)
    shrunk = np.kron(np.asarray(pool(half, 2)).transpose(0, 3, 1, 2), np.ones((2, 2))).transpose(0, 2, 3, 1)
    assert result["floor_l1/0.5"] == pytest.approx(np.abs(shrunk - half).mean(), rel=1e-5)
    psnr = -10 * np.log10(np.square(blur - x).mean((1, 2, 3)) / 4)
    assert result["pixel_psnr/90"] == pytest.approx(psnr.mean(), rel=1e-5)


def test_the_latent_is_moved_before_decoding_and_the_image_before_encoding_for_the_floor(rng):
    images = photographs(rng, 2, 8)
    result = errors(ramping, upsampling, images, turns=(1,), scales=(), uint8="none")
    x = images.astype(np.float32) / 127.5 - 1
    turn = lambda array: np.rot90(array, -1, (1, 2))
    through = lambda array: np.asarray(upsampling(PARAMS, ramping(PARAMS, array).mode()))
    error = lambda array: np.abs(np.clip(array, -1, 1) - turn(x)).mean()
    assert result["pixel_l1/90"] == pytest.approx(error(turn(through(x))), rel=1e-5)
    assert result["floor_l1/90"] == pytest.approx(error(through(turn(x))), rel=1e-5)
    assert result["pixel_l1/90"] != pytest.approx(result["floor_l1/90"], rel=1e-3)


def test_samples_have_independent_noise_that_follows_the_image_not_the_batch(rng):
    images = photographs(rng, 6, 64)
    x = images.astype(np.float64) / 127.5 - 1
    one, two = (errors(noisy, upsampling, images, batch=size, turns=(2,), scales=()) for size in (2, 3))
    assert one["R_sample/180"] == pytest.approx(two["R_sample/180"], rel=1e-6)
    assert one["R/180"] == pytest.approx(0, abs=1e-10)
    # Independent noise of deviation 0.5 on both sides: 2 * 0.25 / (mean square + 0.25).
    expected = np.mean(0.5 / (np.square(np.asarray(pool(x, 2))).mean((1, 2, 3)) + 0.25))
    assert one["R_sample/180"] == pytest.approx(expected, rel=0.03)
    other = errors(noisy, upsampling, images, turns=(2,), scales=(), seed=1)
    assert other["R_sample/180"] != one["R_sample/180"]


def test_reconstruct_averages_images_and_decodes_what_it_was_asked_to(rng, monkeypatch):
    images = photographs(rng, 5, 16)
    exact = reconstruction.reconstruct(
        pooling, upsampling, PARAMS, batches_of(images // 64 * 64, 2), uint8="none"
    )
    assert set(exact) == {"psnr", "ssim", "l1", "mse", "count"} and exact["count"] == 5
    x = (images // 64 * 64).astype(np.float64) / 127.5 - 1
    blur = np.kron(np.asarray(pool(x, 2)).transpose(0, 3, 1, 2), np.ones((2, 2))).transpose(0, 2, 3, 1)
    assert exact["mse"] == pytest.approx(np.square(blur - x).mean(), rel=1e-5)
    assert exact["l1"] == pytest.approx(np.abs(blur - x).mean(), rel=1e-5)
    monkeypatch.setattr(reconstruction, "lpips_distance", lambda params, a, b: params * (a - b)[:, 0, 0, 0])
    with_lpips = reconstruction.reconstruct(
        pooling, upsampling, PARAMS, batches_of(images, 2), lpips=np.float32(1)
    )
    x = images.astype(np.float64) / 127.5 - 1
    assert with_lpips["lpips"] == pytest.approx(
        (x[:, 0, 0, 0] - np.asarray(pool(x, 2))[:, 0, 0, 0]).mean(), rel=1e-3
    )
    sampled = reconstruction.reconstruct(noisy, upsampling, PARAMS, batches_of(images, 2), posterior="sample")
    assert (
        sampled["mse"] > reconstruction.reconstruct(noisy, upsampling, PARAMS, batches_of(images, 2))["mse"]
    )


def test_pictures_are_the_arrays_behind_the_numbers(rng):
    images = photographs(rng, 2, 8)
    chosen = transforms.choose((4, 4), 2, (2, 1), (0.5,))
    shown = reconstruction.pictures(pooling, upsampling, PARAMS, batches_of(images, 2)[0], chosen)
    np.testing.assert_allclose(shown["image"], images / np.float32(127.5) - 1, atol=1e-6)
    np.testing.assert_allclose(shown["target"]["90"], np.rot90(shown["image"], -1, (1, 2)))
    np.testing.assert_allclose(shown["moved"]["90"], np.rot90(shown["reconstruction"], -1, (1, 2)), atol=1e-6)
    assert list(shown["moved"]) == list(shown["target"]) == list(shown["first"]) == ["180", "90", "0.5"]
    through = upsampling(PARAMS, pooling(PARAMS, shown["target"]["0.5"]).mode())
    np.testing.assert_allclose(shown["first"]["0.5"], through, atol=1e-6)
    assert np.abs(shown["first"]["0.5"] - shown["target"]["0.5"]).max() > 0.1
    assert shown["moved"]["0.5"].shape == (2, 4, 4, 3) and shown["latent"].shape == (2, 4, 4, 3)


def test_transforms_round_and_record_the_scale_or_refuse():
    chosen = transforms.choose((9, 9), 8)
    assert [t.label for t in chosen] == ["90", "180", "270", "0.25", "0.5", "0.75"]
    assert [t.size for t in chosen[3:]] == [(2, 2), (5, 5), (7, 7)]
    assert chosen[4].image_size == (40, 40) and chosen[4].scale == pytest.approx(5 / 9)
    with pytest.raises(ValueError, match="32 x 32 pixels"):
        transforms.choose((1, 1), 8)
    with pytest.raises(ValueError, match="quarters"):
        transforms.choose((4, 4), 8, turns=(4,))


def test_an_image_side_that_does_not_come_back_is_refused_before_compiling():
    floor = lambda params, x: pooling(params, x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2])
    with pytest.raises(ValueError, match="multiples of the autoencoder's downsampling factor, 2"):
        reconstruction.latent_size(floor, upsampling, PARAMS, (15, 16))
    assert reconstruction.latent_size(floor, upsampling, PARAMS, (14, 16)) == (7, 8)


def test_an_oblong_image_turns_into_its_own_shape(rng):
    images = rng.integers(0, 256, (2, 8, 16, 3), dtype=np.uint8)
    result = errors(pooling, upsampling, images, batch=2, turns=(1,), scales=())
    assert result["R"] == pytest.approx(0, abs=1e-10)


def test_features_without_noise_have_no_column_of_samples(rng):
    images = photographs(rng, 3, 16)
    features = lambda params, x: Features(ramping(params, x).mode())
    plain, result = errors(ramping, upsampling, images), errors(features, upsampling, images)
    assert set(plain) - set(result) == {key for key in plain if "_sample" in key} and len(plain) - len(result) == 6
    assert result == {key: pytest.approx(plain[key], rel=1e-6) for key in result}
    asked = errors(features, upsampling, images, posterior="sample")  # as one of several columns may be
    assert asked == result


def test_the_excess_is_the_pixel_error_above_its_floor(rng):
    images = photographs(rng, 3, 8)
    result = errors(ramping, upsampling, images, scales=(0.5,))
    for family, labels in {"R": ("90", "180", "270"), "S": ("0.5",)}.items():
        expected = np.mean([result[f"pixel_l1/{label}"] - result[f"floor_l1/{label}"] for label in labels])
        assert result[f"excess_l1/{family}"] == pytest.approx(expected) and abs(expected) > 1e-4
    assert errors(pooling, upsampling, images, scales=())["excess_l1/R"] == pytest.approx(0, abs=1e-7)


def test_codes_of_the_whole_set_are_counted_without_padding(rng):
    images = photographs(rng, 5, 12) // 2  # the padding is brighter than any of them
    code = lambda params, z: jnp.floor((z[..., 0] + 1) * 4).astype(jnp.int32)  # eight levels of red
    result = reconstruction.reconstruct(pooling, upsampling, PARAMS, batches_of(images, 2), assign=(code, 10))
    indices = np.floor((np.asarray(pool(images / 127.5 - 1, 2))[..., 0] + 1) * 4)
    levels, counts = np.unique(indices, return_counts=True)
    p = counts / counts.sum()
    assert 1 < len(levels) < 8 and p.sum() == 1
    assert result["codebook_usage"] == len(levels) / 10
    assert result["codebook_perplexity"] == pytest.approx(np.exp(-np.sum(p * np.log(p))))
    assert result["count"] == 5


def test_only_models_with_a_codebook_assign_codes():
    codes, size = reconstruction.assignment(PRESETS["vqgan-smoke"].model)
    assert size == 16 and reconstruction.assignment(PRESETS["smoke"].model) is None
    codebook = np.arange(16, dtype=np.float32)[:, None] * np.ones(4, np.float32)
    z = np.array([2.1, 7.6, -3, 40], np.float32).reshape(1, 2, 2, 1) * np.ones(4, np.float32)
    assert codes({"codebook": codebook}, z).tolist() == [[[2, 8], [0, 15]]]


def test_ssim_takes_the_variant_that_was_asked_for(rng):
    images, double = photographs(rng, 3, 16), lambda params, z: 2 * upsampling(params, z)  # beyond [-1, 1]
    x = images.astype(np.float32) / 127.5 - 1
    y = double(PARAMS, pooling(PARAMS, x).mode())
    measure = lambda **options: reconstruction.reconstruct(pooling, double, PARAMS, batches_of(images, 2), **options)
    ssim = lambda **options: measure(**options)["ssim"]
    released = float(metrics.ssim(x, y, data_range=None, border="reflect").mean())
    assert ssim(ssim_range=None, ssim_border="reflect") == pytest.approx(released, rel=1e-5)
    clipped = np.clip(y, -1, 1)
    assert ssim(uint8="none") == pytest.approx(float(metrics.ssim(x, clipped).mean()), rel=1e-5)
    reflected = float(metrics.ssim(x, clipped, border="reflect").mean())
    assert ssim(uint8="none", ssim_border="reflect") == pytest.approx(reflected, rel=1e-5)
    assert len({round(value, 4) for value in (released, reflected, ssim(), ssim(ssim_range=1.0))}) == 4
