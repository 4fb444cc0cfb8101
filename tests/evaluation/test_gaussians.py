import warnings

import numpy as np
import pytest

from eqvae_jax.evaluation.distances import Gaussian, Statistics, frechet_distance, load_statistics


def statistics_of(*batches):
    statistics = Statistics()
    for batch in batches:
        statistics.update(batch)
    return statistics


def distance(first, second):
    return frechet_distance(first.mu, first.sigma, second.mu, second.sigma)


def distance_of_samples(x, y):
    """The Frechet distance of two sets' Gaussians without forming a covariance: exact to rounding at any rank."""
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * root


@pytest.fixture
def features(rng):
    """Reference and generated features of unlike means, spreads and sizes: non-negative, skewed, of fading scales."""
    scales = np.linspace(1, 0.02, 48)
    return rng.gamma(0.5, size=(400, 48)) * scales, rng.gamma(0.6, size=(300, 48)) * scales[::-1] + 0.01


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("cuts", [[], [1, 1, 7, 300, 399], list(range(1, 400))])
def test_statistics_are_numpys_however_the_set_is_cut_and_however_large_its_mean(features, offset, cuts):
    x = features[0] + offset
    found = statistics_of(*np.split(x, cuts)).finalize()
    exact = np.cov(x - offset, rowvar=False)  # the offset costs the values themselves 1e-12, nothing else
    assert found.n == 400 and found.mu.dtype == found.sigma.dtype == np.float64
    np.testing.assert_allclose(found.mu, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.sigma, exact, rtol=0, atol=1e-11 if offset else 1e-15)
    np.testing.assert_array_equal(found.sigma, found.sigma.T)


def test_blocks_within_one_batch_change_nothing(rng):
    x = rng.normal(size=(9000, 3)).astype(np.float32) + 1e4  # three blocks
    found = statistics_of(x).finalize()
    np.testing.assert_allclose(found.sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)


def test_merging_gives_the_statistics_of_all_in_any_order(features):
    x = features[0] + 1e4
    parts = np.split(x, [3, 3, 250])  # one of them is empty
    for order in [(0, 1, 2, 3), (3, 1, 0, 2), (1, 2, 3, 0)]:
        merged = Statistics()
        for i in order:
            part = statistics_of(parts[i])
            before = part.n
            merged.merge(part)
            assert part.n == before
        assert merged.n == 400
        np.testing.assert_allclose(merged.finalize().mu, x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(merged.finalize().sigma, statistics_of(x).finalize().sigma, atol=1e-11)


def test_padding_is_never_looked_at(features):
    padded = np.concatenate([features[0][:10], np.full((2, 48), np.nan)])
    statistics = Statistics()
    statistics.update(padded, mask=np.arange(12) < 10)
    statistics.update(padded[10:], mask=np.zeros(2, bool))
    assert statistics.n == 10
    np.testing.assert_allclose(statistics.finalize().mu, features[0][:10].mean(0))


def test_distance_has_its_closed_form_where_covariances_commute(rng):
    rotation, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    first, second = rng.uniform(0.1, 3, 20), rng.uniform(0.1, 3, 20)
    first[[2, 7]] = second[[7, 9, 11]] = 0  # rank 18 and 17
    mu = rng.normal(size=(2, 20))
    expected = np.sum((mu[0] - mu[1]) ** 2) + np.sum((np.sqrt(first) - np.sqrt(second)) ** 2)
    sigmas = [rotation * values @ rotation.T for values in (first, second)]
    assert frechet_distance(mu[0], sigmas[0], mu[1], sigmas[1]) == pytest.approx(expected, rel=1e-12)


def test_distance_is_that_of_pytorch_fid_torch_fidelity_and_adm(features, lpips_package):
    """lpips_package: so that torchvision can be imported beside a CPU build of torch."""
    first, second = (statistics_of(x).finalize() for x in features)
    found = distance(first, second)
    assert found == pytest.approx(distance_of_samples(*features), rel=1e-12)
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sqrtm = fid_score.calculate_frechet_distance(*first[:2], *second[:2])  # scipy's sqrtm; ADM's evaluator the same
    assert found == pytest.approx(sqrtm, rel=1e-9)
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    reference = metric_fid.fid_statistics_to_metric(first._asdict(), second._asdict(), verbose=False)
    assert found == pytest.approx(reference[metric_fid.KEY_METRIC_FID], rel=1e-9)


def test_distance_of_2048_dimensions_from_100_samples_is_exact(rng):
    scales = np.linspace(1, 0.01, 2048)
    x, y = rng.gamma(0.5, size=(100, 2048)) * scales, rng.gamma(0.6, size=(120, 2048)) * scales + 0.01
    first, second = statistics_of(x).finalize(), statistics_of(y).finalize()
    assert distance(first, second) == pytest.approx(distance_of_samples(x, y), rel=1e-12)
    assert distance(first, first) < 1e-10


def test_low_rank_is_where_the_product_of_covariances_loses_digits(rng, lpips_package):
    """What others publish is off by rounding there: within 1e-6, their distance of a set from itself below 0."""
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    x, y = rng.gamma(0.5, size=(60, 256)), rng.gamma(0.6, size=(70, 256)) + 0.01
    first, second = statistics_of(x).finalize(), statistics_of(y).finalize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other, itself = (fid_score.calculate_frechet_distance(*first[:2], *g[:2]) for g in (second, first))
    exact = distance_of_samples(x, y)
    assert other == pytest.approx(exact, rel=1e-6) and abs(other / exact - 1) > 1e-10 and abs(itself) > 1e-9
    assert distance(first, second) == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("samples", [20, 400])
def test_distance_of_a_set_from_itself_is_zero_and_of_a_shifted_one_the_shift(features, samples):
    x = features[0][:samples]
    own, shifted = statistics_of(x).finalize(), statistics_of(x + 3e-4).finalize()
    assert 0 <= distance(own, own) < 1e-12
    assert distance(own, shifted) == pytest.approx(48 * 9e-8, rel=1e-6)
    constant = Gaussian(np.full(48, 2.0), np.zeros((48, 48)), 7)
    assert distance(constant, constant) == 0
    assert distance(constant, own) == pytest.approx(np.sum((own.mu - 2) ** 2) + np.trace(own.sigma), rel=1e-12)


def test_distance_is_symmetric(features):
    first, second = (statistics_of(x).finalize() for x in features)
    assert distance(first, second) == pytest.approx(distance(second, first), rel=1e-13)


def test_covariances_kept_in_float32_still_serve(features):
    """Rounding makes some eigenvalues negative, where a Cholesky decomposition ends."""
    x, y = features[0][:20], features[1][:30]
    first, second = (statistics_of(z).finalize() for z in (x, y))
    rounded = [(g.mu.astype(np.float32), g.sigma.astype(np.float32)) for g in (first, second)]
    found = frechet_distance(*rounded[0], *rounded[1])
    assert found == pytest.approx(distance(first, second), rel=3e-5)  # float32 carries no more


def test_statistics_are_written_and_read_back(features, tmp_path):
    statistics = statistics_of(features[0])
    statistics.save(tmp_path / "a.npz")
    found, expected = load_statistics(tmp_path / "a.npz"), statistics.finalize()
    assert found.n == 400 and [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    np.testing.assert_array_equal(found.mu, expected.mu)
    np.testing.assert_array_equal(found.sigma, expected.sigma)


def test_adms_reference_files_hold_two_kinds_of_statistics(rng, tmp_path):
    sigma, sigma_s = np.cov(rng.normal(size=(4, 9))), np.cov(rng.normal(size=(3, 9)))
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=np.zeros((2, 4, 4, 3), np.uint8), mu=np.ones(4), sigma=sigma, mu_s=np.ones(3), sigma_s=sigma_s)
    assert load_statistics(path).n is None
    np.testing.assert_array_equal(load_statistics(path).sigma, sigma)
    np.testing.assert_array_equal(load_statistics(path, spatial=True).sigma, sigma_s)


def test_a_broken_file_of_statistics_is_refused(features, tmp_path):
    good, path = tmp_path / "good.npz", tmp_path / "bad.npz"
    statistics_of(features[0]).save(good)
    for length in (0, 100, good.stat().st_size // 2, good.stat().st_size - 1):
        path.write_bytes(good.read_bytes()[:length])
        with pytest.raises(ValueError, match="bad.npz is no file of statistics"):
            load_statistics(path)
    with pytest.raises(ValueError, match="no mu_s and sigma_s, only mu, n, sigma"):
        load_statistics(good, spatial=True)
    np.savez(path, mu=np.ones(3), sigma=np.ones((2, 2)))
    with pytest.raises(ValueError, match="bad.npz.*must be"):
        load_statistics(path)
    np.savez(path, mu=np.array([None, {}]), sigma=np.ones((2, 2)))  # a pickle, which is never opened
    with pytest.raises(ValueError, match="is no file of statistics"):
        load_statistics(path)


def test_bad_features_are_refused(features):
    statistics = Statistics()
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        statistics.finalize()
    with pytest.raises(ValueError, match=r"one row per image.*\(3,\)"):
        statistics.update(np.ones(3))
    broken = features[0].copy()
    broken[[5, 9], 3] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 400 rows are not finite, the first is row 5"):
        statistics.update(broken)
    statistics.update(features[0])
    for add in (lambda: statistics.update(np.ones((2, 5))), lambda: statistics.merge(statistics_of(np.ones((2, 5))))):
        with pytest.raises(ValueError, match="5 dimensions, those before them had 48"):
            add()


def test_bad_gaussians_are_refused(features):
    mu, sigma, _ = statistics_of(features[0]).finalize()
    for other, message in [
        ((mu[:5], sigma[:5, :5]), "48 dimensions, the second 5"),
        ((mu, sigma[:5]), "must be"),
        ((mu, np.full_like(sigma, np.nan)), "not finite"),
        ((mu, sigma + np.triu(sigma, 1)), "not symmetric"),
        ((mu, sigma - 5 * np.eye(48)), "negative variance"),
        ((mu, np.eye(48) - 0.5 * np.ones((48, 48)) + 0.5 * np.eye(48)), "negative eigenvalues"),
    ]:
        with pytest.raises(ValueError, match=message):
            frechet_distance(mu, sigma, *other)
