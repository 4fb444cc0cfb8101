import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from eqvae_jax import equivariance
from eqvae_jax.equivariance import Tau, apply_tau, draw_tau


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
