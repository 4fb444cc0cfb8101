"""Resizing and cropping against exact averages and a transcription of ADM."""

import math
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from eqvae_jax.data.cropping import center_crop, random_crop, resize, side_for_random_crop


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_whole_ratios_are_block_averages(factor):
    x = noise(4 * factor, 7 * factor, 3)
    expected = x.reshape(4, factor, 7, factor, 3).mean((1, 3))
    assert np.array_equal(resize(x, 4, 7), np.rint(expected))


@pytest.mark.parametrize("n, out", [(10, 7), (9, 8), (25, 16), (7, 7), (13, 2)])
def test_fractional_ratios_are_exact_area_averages(n, out):
    x = noise(n, n, 3)

    def axis(i):  # overlap of [i*n/out, (i+1)*n/out) with each unit interval, in exact fractions
        low, high = Fraction(i * n, out), Fraction((i + 1) * n, out)
        return [max(Fraction(0), min(high, j + 1) - max(low, j)) / Fraction(n, out) for j in range(n)]

    weights = np.array([[float(w) for w in axis(i)] for i in range(out)])
    expected = np.einsum("ih,jw,hwc->ijc", weights, weights, x)
    assert np.abs(resize(x, out, out) - expected).max() <= 0.5 + 1e-4


def test_shrinking_keeps_the_mean_of_a_stripe():
    # Pillow's BOX weighs every touched pixel alike, and gives 255, 128, 0 at this ratio of 4/3.
    x = np.zeros((12, 12, 3), np.uint8)
    x[::2] = 255
    assert resize(x, 9, 12)[:3, 0, 0].tolist() == [191, 128, 64]


def test_growing_is_half_pixel_bilinear():
    # Kept within 8 bits by rounding: compare with numpy's interpolation at the pixel centres.
    x = noise(6, 5, 3)
    rows = np.clip((np.arange(17) + 0.5) * 6 / 17 - 0.5, 0, 5)
    columns = np.clip((np.arange(11) + 0.5) * 5 / 11 - 0.5, 0, 4)
    y = np.stack([[np.interp(rows, range(6), x[:, j, c]) for j in range(5)] for c in range(3)])   # (3,5,17)
    y = np.stack([[np.interp(columns, range(5), y[c, :, i]) for i in range(17)] for c in range(3)])
    assert np.abs(resize(x, 17, 11) - y.transpose(1, 2, 0)).max() <= 0.5 + 1e-3


def adm_center_crop_arr(pil_image, image_size):
    """openai/guided-diffusion, guided_diffusion/image_datasets.py, center_crop_arr."""
    while min(*pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize(tuple(x // 2 for x in pil_image.size), resample=Image.BOX)
    scale = image_size / min(*pil_image.size)
    pil_image = pil_image.resize(tuple(round(x * scale) for x in pil_image.size), resample=Image.BICUBIC)
    arr = np.array(pil_image)
    crop_y = (arr.shape[0] - image_size) // 2
    crop_x = (arr.shape[1] - image_size) // 2
    return arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size]


@pytest.mark.parametrize("height, width", [(16, 16), (33, 70), (131, 64), (15, 40), (3, 5), (64, 32)])
def test_center_crop_is_adm(height, width):
    x = noise(height, width, 3)
    assert np.array_equal(center_crop(x, 16), adm_center_crop_arr(Image.fromarray(x), 16))


def test_random_crop_of_the_whole_square():
    x = noise(20, 20, 3)
    assert np.array_equal(random_crop(x, 20, np.random.default_rng(0), 1.0, 1.0), x)


def test_random_crop_is_where_its_draws_say():
    x = noise(40, 60, 3)
    for seed in range(5):
        u = np.random.default_rng(seed).random(4)
        side = int(40 * (0.5 + 0.5 * u[0]))
        top, left = int((40 - side) * u[1]), int((60 - side) * u[2])
        expected = resize(x[top : top + side, left : left + side], 8, 8)
        assert np.array_equal(random_crop(x, 8, np.random.default_rng(seed)), expected)
        mirrored = random_crop(x, 8, np.random.default_rng(seed), flip=True)
        assert np.array_equal(mirrored, expected[:, ::-1] if u[3] < 0.5 else expected)


def test_the_side_that_suffices_is_the_smallest():
    for seed in range(50):
        side = side_for_random_crop(64, np.random.default_rng(seed), 0.4, 0.9)
        share = 0.4 + 0.5 * np.random.default_rng(seed).random(4)[0]
        assert int(side * share) >= 64 > int((side - 1) * share)


def test_an_unchanged_size_is_a_copy():
    x = noise(5, 7, 3)
    y = resize(x, 5, 7)
    assert np.array_equal(x, y) and not np.shares_memory(x, y)


def test_crop_sides_and_corners_are_spread_as_the_released_code_spreads_them():
    # An image whose pixels say where they are: the crop's corner and side are read back from the result.
    y, x = np.mgrid[:200, :200]
    image = np.stack([y, x, y * 0], -1).astype(np.uint8)
    sides, corners = [], []
    for seed in range(400):
        crop = random_crop(image, 50, np.random.default_rng(seed), 0.5, 1.0).astype(int)
        sides.append((crop[-1, 0, 0] - crop[0, 0, 0]) * 50 / 49)
        corners.append(crop[0, 0, :2])
    assert 98 <= min(sides) < 106 and 193 < max(sides) <= 202
    assert abs(np.mean(sides) - 150) < 3 * 100 / math.sqrt(12 * 400)
    # E[(200 - side) * u] = 50 / 2, plus the centre of the first output pixel (side/50 - 1)/2 = 1
    assert np.abs(np.mean(corners, 0) - 26).max() < 3


@pytest.mark.parametrize("height, width", [(3, 5), (1, 1), (1, 40)])
def test_tiny_images_are_enlarged(height, width):
    x = noise(height, width, 3)
    assert center_crop(x, 16).shape == random_crop(x, 16, np.random.default_rng(1)).shape == (16, 16, 3)
