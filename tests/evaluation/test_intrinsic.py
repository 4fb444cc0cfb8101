import numpy as np
import pytest

from eqvae_jax.evaluation.intrinsic import two_nn


def dadapys_estimate(points, mu_fraction=0.9):
    """DADApy 0.3.4, `Data(points).compute_id_2NN()`: distances, ratios of the second to the first, a fitted line."""
    curve_fit = pytest.importorskip("scipy.optimize").curve_fit
    pairwise = np.sqrt(np.square(points[:, None] - points[None]).sum(-1))
    distances = np.sort(pairwise, axis=1)
    mus = distances[:, 2] / distances[:, 1]
    count = mus.shape[0]
    used = int(count * mu_fraction)
    y = -np.log(1 - np.arange(1, used + 1) / count)
    (dimension,), _ = curve_fit(lambda x, m: m * x, np.sort(np.log(mus))[:used], y)
    return dimension


def sphere(rng, n, k, ambient):
    """n points evenly on S^k, turned into `ambient` dimensions."""
    points = rng.normal(size=(n, k + 1))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    turn, _ = np.linalg.qr(rng.normal(size=(ambient, ambient)))
    return points @ turn[: k + 1]


@pytest.mark.parametrize("n, dims", [(301, 2), (400, 7), (250, 40)])
def test_the_estimate_is_dadapys(rng, n, dims):
    points = rng.gamma(0.7, size=(n, dims))
    for fraction in (0.9, 0.5):
        found = two_nn(points, fraction)
        assert found.dimension == pytest.approx(dadapys_estimate(points, fraction), rel=1e-6)
        assert (found.n, found.duplicates) == (n, 0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_sphere_has_its_dimension_whatever_space_it_lies_in(rng, k):
    assert two_nn(sphere(rng, 4000, k, 20)).dimension == pytest.approx(k, rel=0.06)  # N = 4000


def test_a_cube_has_its_dimension(rng):
    cube = rng.uniform(size=(4000, 3))
    bent = np.concatenate([cube, cube**2 @ rng.normal(size=(3, 9))], axis=1)
    assert two_nn(bent).dimension == pytest.approx(3, rel=0.1)  # N = 4000; its faces cost a few per cent


def test_the_estimate_grows_with_n_where_the_dimension_is_high(rng):
    points = rng.normal(size=(4000, 64))
    few, many = two_nn(points[:200]).dimension, two_nn(points).dimension
    assert few < many < 64 and many - few > 3  # why n belongs to the number


def test_neither_scale_nor_a_large_mean_nor_the_shape_matters(rng):
    latents = rng.normal(size=(300, 2, 3, 4))
    expected = two_nn(latents.reshape(300, 24))
    assert two_nn(latents) == expected
    assert two_nn(1e-6 * latents).dimension == pytest.approx(expected.dimension, rel=1e-9)
    assert two_nn(latents + 1e6).dimension == pytest.approx(expected.dimension, rel=1e-6)
    assert two_nn(latents.astype(np.float32)).dimension == pytest.approx(expected.dimension, rel=1e-3)


def test_copies_are_left_out_and_counted(rng):
    points = rng.normal(size=(200, 5))
    points[0, 0] = 0.0
    again = np.concatenate([points, points[:30], points[:5]])
    again[200, 0] = -0.0  # equal to 0.0
    found = two_nn(again)
    assert found == (two_nn(points).dimension, 200, 35)


def test_bad_points_are_refused(rng):
    points = rng.normal(size=(50, 3))
    broken = points.copy()
    broken[7] = np.nan
    grid = np.stack(np.meshgrid(*3 * [np.arange(5.0)]), -1).reshape(-1, 3)
    for values, options, message in [
        (broken, {}, "1 of 50 points are not finite, the first is 7"),
        (points[:, 0], {}, r"must be \(N, D\)"),
        (points[:0], {}, r"must be \(N, D\)"),
        (points[:2], {}, "2 different points of 2"),
        (np.repeat(points[:2], 20, axis=0), {}, "2 different points of 40"),
        (points, {"fraction": 1.0}, "fraction must lie between"),
        (grid, {}, "as far from their second neighbour"),
    ]:
        with pytest.raises(ValueError, match=message):
            two_nn(values, **options)
