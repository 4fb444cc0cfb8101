import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from eqvae_jax import equivariance
from eqvae_jax.equivariance import Tau, apply_tau, draw_tau, shifted


def torch_tau(x, scale, turns, mode="bilinear", antialias=False):
    """The released code's transform: scale by a factor, then torch.rot90 over [-1, -2]. NHWC in and out."""
    y = torch.from_numpy(x).permute(0, 3, 1, 2)
    y = torch.nn.functional.interpolate(y, scale_factor=scale, mode=mode, align_corners=False, antialias=antialias)
    return torch.rot90(y, turns, dims=[-1, -2]).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("side", [32, 64])
def test_matches_torch_at_every_released_size_and_turn(side):
    x = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    for k in range(8, 32):
        size, turns = (side * k // 32,) * 2, k % 4
        np.testing.assert_allclose(apply_tau(x, size, turns), torch_tau(x, k / 32, turns), atol=1e-5)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("scale", [(0.25, 0.5), (0.75, 0.375), (0.5, 0.5)])
def test_matches_torch_for_anisotropic_sizes_and_every_interpolation(mode, antialias, scale):
    x = np.random.default_rng(1).normal(size=(1, 32, 48, 2)).astype(np.float32)
    size = (int(32 * scale[0]), int(48 * scale[1]))
    ours = apply_tau(x, size, 1, mode, antialias)
    np.testing.assert_allclose(ours, torch_tau(x, scale, 1, mode, antialias), atol=1e-5)


def test_turns_may_be_traced_on_square_maps_only():
    x = np.random.default_rng(2).normal(size=(1, 4, 4, 1)).astype(np.float32)
    turned = jax.jit(lambda x, k: apply_tau(x, None, k))
    for k in range(5):
        np.testing.assert_array_equal(turned(x, k), np.rot90(x, k, axes=(2, 1)))
    with pytest.raises(ValueError, match="4 x 6"):
        jax.jit(lambda x, k: apply_tau(x, (4, 6), k))(x, 1)


def test_first_turn_is_clockwise_and_four_are_none():
    x = np.arange(4.0).reshape(1, 2, 2, 1)  # 0 1 / 2 3
    np.testing.assert_array_equal(apply_tau(x, None, 1)[0, :, :, 0], [[2, 0], [3, 1]])
    y = np.random.default_rng(3).normal(size=(1, 5, 5, 2))
    for _ in range(4):
        y_turned = apply_tau(y, None, 1)
        y, original = y_turned, y
        assert not np.allclose(y, original)
    np.testing.assert_array_equal(apply_tau(y, None, 4), y)


def test_bfloat16_is_resized_in_float32():
    x = np.random.default_rng(4).normal(size=(1, 32, 32, 1)).astype(np.float32)
    narrow = apply_tau(jnp.asarray(x, jnp.bfloat16), (31, 31))
    assert narrow.dtype == jnp.bfloat16
    exact = apply_tau(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), (31, 31))
    np.testing.assert_allclose(np.asarray(narrow, np.float32), exact, atol=2**-8 * np.abs(exact).max())


def test_error_is_zero_for_an_equivariant_encoder_and_known_for_another():
    x = np.random.default_rng(5).normal(size=(3, 16, 16, 3)).astype(np.float32)
    pool = lambda x: x.reshape(-1, x.shape[1] // 2, 2, x.shape[2] // 2, 2, 3).mean((2, 4))
    np.testing.assert_allclose(equivariance.error(pool, x, factor=2, turns=1), np.zeros(3), atol=1e-12)

    # Weighting rows by i: tau E(x) - E(tau x) is x turned, times (column's weight - row's weight).
    ramp = lambda x: x * jnp.arange(1.0, x.shape[1] + 1)[:, None, None]
    turned = np.rot90(x, 1, axes=(2, 1))
    rows = np.arange(1.0, 17)[:, None, None]
    columns = np.arange(16.0, 0, -1)[:, None]
    expected = ((turned * (columns - rows)) ** 2).sum((1, 2, 3)) / ((turned * rows) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(equivariance.error(ramp, x, factor=1, turns=1), expected, rtol=1e-5)


def test_draws_have_the_released_probabilities_and_sizes():
    draws = [draw_tau(7, i, sizes=range(8, 32)) for i in range(4000)]
    share = {where: n / 4000 for where, n in collections.Counter(tau.where for tau in draws).items()}
    for where, expected in (("latent", 0.5), ("image", 0.125), ("none", 0.375)):
        assert abs(share[where] - expected) < 0.03, where
    latent = [tau for tau in draws if tau.where == "latent"]
    assert {tau.height for tau in latent} == set(range(8, 32)) and all(tau.height == tau.width for tau in latent)
    assert {tau.turns for tau in latent} == {1, 2, 3}
    assert all(tau.turns == 0 and tau.height in range(8, 32) for tau in draws if tau.where == "image")


def test_draws_depend_on_seed_and_number_alone():
    sequence = lambda seed: [draw_tau(seed, i, sizes=(4, 6, 9)) for i in range(20)]
    assert sequence(3) == sequence(3) != sequence(4)
    np.random.seed(0)
    assert sequence(3)[7] == draw_tau(3, 7, sizes=(4, 6, 9))


def test_transform_groups_of_the_paper():
    always = dict(p_equivariance=1.0, p_low_resolution=0.0)
    rotation = {draw_tau(0, i, sizes=(32,), **always) for i in range(50)}
    assert {(tau.height, tau.width) for tau in rotation} == {(32, 32)}
    scaling = {draw_tau(0, i, sizes=(8, 16), turns=(0,), **always) for i in range(50)}
    assert scaling == {Tau("latent", 8, 8, 0), Tau("latent", 16, 16, 0)}
    both = {draw_tau(0, i, sizes=(8, 16), anisotropic=True, **always)[1:3] for i in range(50)}
    assert both == {(8, 8), (8, 16), (16, 8), (16, 16)}
    assert {draw_tau(0, i, sizes=(8,), p_equivariance=0.0, p_low_resolution=0.0) for i in range(50)} == {Tau("none")}


def test_image_size_is_the_latent_size_times_the_factor():
    assert Tau("latent", 9, 12, 1).image_size(8) == (72, 96)
    assert Tau("none").image_size(8) is None


def test_shifts_change_no_other_draw_and_no_program_but_the_equivariance_branch():
    plain = [draw_tau(5, i, sizes=(4, 6, 9)) for i in range(400)]
    moved = [draw_tau(5, i, sizes=(4, 6, 9), max_shift=3, reductions=(2, 4)) for i in range(400)]
    assert [tau._replace(shift=None, reduction=None) for tau in moved] == plain
    assert all(tau.shift is None and tau.reduction is None for tau in plain)
    for tau in moved:
        assert (tau.shift is not None) == (tau.where == "latent")
        assert (tau.reduction is not None) == (tau.where == "none")
    shifts = np.array([tau.shift for tau in moved if tau.shift])
    for axis in (0, 1):
        assert set(shifts[:, axis]) == set(range(-3, 4)) and abs(shifts[:, axis].mean()) < 0.5
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.2
    assert {tau.reduction for tau in moved} == {None, 2, 4}
    alone = [draw_tau(5, i, sizes=(4, 6, 9), reductions=(2, 4)) for i in range(400)]
    assert [tau.reduction for tau in alone] == [tau.reduction for tau in moved]


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_shifts_are_circular_convolutions_with_torchs_kernels(method):
    x = np.random.default_rng(6).normal(size=(2, 8, 9, 3)).astype(np.float32)

    def kernel(d):  # Keys' with a = -0.75 for torch's bicubic, which does not even keep a ramp
        d = abs(d)
        if method == "bilinear":
            return max(1 - d, 0)
        return 1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0

    for by in ((2, -3), (2.0, -3.0), (0.375, -1.75)):
        expected = x
        for axis, offset in zip((1, 2), by, strict=True):
            expected = sum(kernel(n - offset) * np.roll(expected, n, axis) for n in range(-5, 6))
        np.testing.assert_allclose(shifted(x, by, method), expected, atol=1e-5)


def test_a_ramp_moves_by_the_shift():
    ramp = np.broadcast_to(np.arange(16, dtype=np.float32)[:, None], (1, 16, 4)).reshape(1, 16, 4, 1)
    for by in (0.375, -2.25):
        np.testing.assert_allclose(shifted(ramp, (by, 0.5))[0, 3:-5], ramp[0, 3:-5] - by, atol=1e-5)


def test_half_a_pixel_is_the_mean_of_two():
    x = np.random.default_rng(7).normal(size=(1, 4, 5, 2)).astype(np.float32)
    np.testing.assert_allclose(shifted(x, (0.5, 1)), (np.roll(x, (0, 1), (1, 2)) + np.roll(x, (1, 1), (1, 2))) / 2,
                               atol=1e-6)


def test_tau_scales_then_shifts_then_turns_and_shifts_may_be_traced():
    x = np.random.default_rng(8).normal(size=(1, 8, 8, 2)).astype(np.float32)
    expected = np.rot90(np.roll(equivariance.resize(x, (6, 6)), (1, -2), (1, 2)), 1, axes=(2, 1))
    traced = jax.jit(lambda x, k, by: apply_tau(x, (6, 6), k, shift=by))
    np.testing.assert_array_equal(traced(x, 1, (1, -2)), expected)
    np.testing.assert_allclose(traced(x, 1, (1.0, -2.0)), expected, atol=1e-6)
    assert traced(x, 2, (3, 0)).shape == (1, 6, 6, 2) and traced._cache_size() == 2  # integers, and floats


def test_image_and_latent_move_together():
    """Nearest-neighbour doubling, a decoder of factor 2, commutes with a shift of the latent by whole pixels."""
    z = np.random.default_rng(9).normal(size=(1, 4, 4, 1)).astype(np.float32)
    decode = lambda z: np.asarray(z).repeat(2, 1).repeat(2, 2)
    np.testing.assert_allclose(decode(shifted(z, (1.0, -1.0))), shifted(decode(z), (2, -2)), atol=1e-6)
