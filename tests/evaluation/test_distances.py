import numpy as np
import pytest

from eqvae_jax.evaluation import distances
from eqvae_jax.evaluation.distances import inception_score, kernel_distance, precision_recall


@pytest.fixture
def fidelity(lpips_package):
    """Imports a module of torch-fidelity. lpips_package: so that torchvision is there beside a CPU build of torch."""
    return lambda name: pytest.importorskip(f"torch_fidelity.{name}")


@pytest.fixture
def features(rng):
    """Reference and generated features: the generated ones are fewer, wider on one side, and collapsed on the other."""
    return rng.gamma(0.5, size=(141, 32)), rng.gamma(0.6, size=(91, 32)) * np.linspace(0.2, 1.5, 32)


def test_kernel_distance_is_that_of_torch_fidelity(features, fidelity, torch):
    metric_kid = fidelity("metric_kid")
    reference, generated = features
    found = kernel_distance(reference=reference, generated=generated, subsets=7, subset_size=40, seed=5)
    expected = metric_kid.kid_features_to_metric(
        torch.tensor(generated), torch.tensor(reference), kid_subsets=7, kid_subset_size=40, rng_seed=5, verbose=False
    )
    assert found.mean == pytest.approx(expected[metric_kid.KEY_METRIC_KID_MEAN], rel=1e-10)
    assert found.std == pytest.approx(expected[metric_kid.KEY_METRIC_KID_STD], rel=1e-10)
    swapped = kernel_distance(reference=generated, generated=reference, subsets=7, subset_size=40, seed=5)
    assert swapped.mean != pytest.approx(found.mean, rel=1e-3)  # other subsets are drawn


def test_kernel_distance_has_torch_fidelitys_defaults(fidelity):
    defaults = fidelity("defaults").DEFAULTS
    assert kernel_distance.__kwdefaults__ == {
        "subsets": defaults["kid_subsets"], "subset_size": defaults["kid_subset_size"], "seed": defaults["rng_seed"]}
    assert [defaults[f"kid_kernel{name}"] for name in ("", "_poly_degree", "_poly_gamma", "_poly_coef0")] == [
        "poly", 3, None, 1]


def test_kernel_distance_of_whole_sets_is_its_definition(rng):
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)) + 0.5

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    pairs = [(i, j) for i in range(6) for j in range(6)]
    expected = sum((kernel(x[i], x[j]) + kernel(y[i], y[j])) / 30 for i, j in pairs if i != j)
    expected -= 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 36
    found = kernel_distance(reference=x, generated=y, subsets=2, subset_size=6)
    assert found == (pytest.approx(expected, rel=1e-12), pytest.approx(0, abs=1e-12))


def test_kernel_distance_of_one_distribution_is_zero_on_average(rng):
    x, y = rng.normal(size=(2, 3000, 8))
    found = kernel_distance(reference=x, generated=y, subsets=40, subset_size=300)
    assert abs(found.mean) < 4 * found.std / np.sqrt(40) and found.std > 0
    assert kernel_distance(reference=x, generated=y + 0.3, subsets=10, subset_size=300).mean > 10 * found.std


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_inception_score_is_that_of_torch_fidelity(rng, fidelity, torch, splits):
    metric_isc = fidelity("metric_isc")
    logits = 3 * rng.normal(size=(103, 20)) + 1e3  # 103: parts of unequal length; softmax forgets the offset
    for protocol, shuffle in [("adm", False), ("torch-fidelity", True)]:
        expected = metric_isc.isc_features_to_metric(torch.tensor(logits), splits=splits, shuffle=shuffle)
        found = inception_score(logits, splits, protocol)
        assert found.mean == pytest.approx(expected[metric_isc.KEY_METRIC_ISC_MEAN], rel=1e-10)
        assert found.std == pytest.approx(expected[metric_isc.KEY_METRIC_ISC_STD], rel=1e-7, abs=1e-12)


def test_inception_score_of_adm_takes_consecutive_parts_of_5000(rng):
    logits = 2 * rng.normal(size=(12000, 5))
    logits[:5000] *= 3  # the parts differ
    scores = [inception_score(part, splits=1).mean for part in np.split(logits, [5000, 10000])]
    found = inception_score(logits)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-12)  # a mean of parts, the shorter last one included
    assert found.std == pytest.approx(np.std(scores), rel=1e-12)
    assert inception_score(logits[:300]) == inception_score(logits[:300], splits=1)


def test_inception_score_has_its_extremes():
    sure = 200.0 * np.eye(8)[np.arange(80) % 8]  # every class, each for certain: as many as there are classes
    assert inception_score(sure, splits=10) == (pytest.approx(8), pytest.approx(0, abs=1e-9))
    assert inception_score(np.ones((80, 8)), splits=4).mean == pytest.approx(1)
    never = np.where(np.arange(8) == 7, -2000.0, sure)  # a class that no image has, and probability 0 in float64
    assert inception_score(never[np.arange(80) % 8 < 7], splits=1).mean == pytest.approx(7)


def test_images_sorted_by_class_score_low_in_adms_order_only(rng):
    labels = np.arange(600) % 20
    logits = 8.0 * np.eye(20)[labels] + rng.normal(size=(600, 20))
    by_class = logits[np.argsort(labels, kind="stable")]
    mixed, in_order = inception_score(logits, 10).mean, inception_score(by_class, 10).mean
    assert in_order < 2.5 < 15 < mixed
    assert inception_score(by_class, 10, "torch-fidelity").mean > 0.8 * mixed


@np.errstate(over="ignore", invalid="ignore")
def half_distances(u, v):
    """Squared distances as ADM's graph takes them on a GPU: float16 tensors, sums accumulated in float32."""
    u, v = u.astype(np.float16), v.astype(np.float16)
    norm_u, norm_v = ((np.square(x).astype(np.float32).sum(1)).astype(np.float16) for x in (u, v))
    products = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
    return np.maximum(norm_u[:, None] - np.float16(2) * products + norm_v, 0).astype(np.float32)


def exact_distances(u, v):
    return np.square(u[:, None].astype(np.float64) - v[None]).sum(-1)


def brute_force(reference, generated, k, squared_distances):
    radii = [np.sort(squared_distances(x, x), axis=1)[:, k] for x in (reference, generated)]
    across = squared_distances(reference, generated)
    return (across <= radii[0][:, None]).any(0).mean(), (across <= radii[1]).any(1).mean()


@pytest.fixture(params=[4096, 37])
def block(request, monkeypatch):
    """One block for each set, and several of which the last is padded."""
    monkeypatch.setattr(distances, "ROWS", request.param)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_brute_force(features, block, k):
    reference, generated = features
    found = precision_recall(reference=reference, generated=generated, k=k)
    assert found == brute_force(reference, generated, k, exact_distances)
    assert 0.1 < min(found) and abs(found.precision - found.recall) > 0.1  # a swap would show
    swapped = precision_recall(reference=generated, generated=reference, k=k)
    assert swapped == (found.recall, found.precision)


def test_precision_and_recall_are_those_of_torch_fidelity(features, fidelity, torch):
    metric_prc = fidelity("metric_prc")
    reference, generated = features
    expected = metric_prc.prc_features_to_metric(
        torch.tensor(generated), torch.tensor(reference), prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=True,
        verbose=False)
    found = precision_recall(reference=reference, generated=generated)
    assert found.precision == pytest.approx(expected[metric_prc.KEY_METRIC_PRECISION], rel=1e-6)
    assert found.recall == pytest.approx(expected[metric_prc.KEY_METRIC_RECALL], rel=1e-6)


@pytest.fixture
def eighths(rng):
    """Multiples of 1/8, whose sums float32 holds exactly: the order of summing cannot matter, only the rounding."""
    reference = rng.integers(0, 13, (141, 64)) / 8.0
    return reference, np.concatenate([rng.integers(1, 13, (60, 64)) / 8.0, reference[:20] + 0.125])


def test_each_operation_of_adms_distances_is_rounded(eighths):
    reference, generated = (x.astype(np.float32) * 1.5 for x in eighths)
    found = distances._squared_distances(reference, generated, half=True)
    np.testing.assert_array_equal(found, half_distances(reference, generated))


def test_adms_float16_is_followed_to_the_step(eighths, block):
    reference, generated = eighths
    found = precision_recall(reference=reference, generated=generated, protocol="adm")
    assert found == brute_force(reference, generated, 3, half_distances)
    assert found != brute_force(reference, generated, 3, exact_distances)  # the steps of float16 are felt here
    assert found != precision_recall(reference=reference, generated=generated)


@pytest.mark.parametrize("where", ["within a set", "between the sets"])
def test_adm_takes_float32_where_float16_overflows(eighths, block, where):
    reference, generated = (np.pad(x, ((0, 0), (0, 1))) for x in eighths)
    reference[5, -1] = 150.0  # 4 * 150^2 is beyond float16's 65504, 2 * 150^2 is not
    (reference if where == "within a set" else generated)[70, -1] = -150.0
    pairs = {"within a set": (reference, reference), "between the sets": (reference, generated)}
    assert not np.isfinite(half_distances(*pairs.pop(where))).all()
    assert np.isfinite(half_distances(*pairs.popitem()[1])).all()  # the one place is enough
    found = precision_recall(reference=reference, generated=generated, protocol="adm")
    assert found == brute_force(reference, generated, 3, exact_distances)
    assert found != brute_force(reference, generated, 3, half_distances)


def test_a_point_on_the_edge_of_a_ball_is_inside_it(block):
    reference, generated = np.array([[0.0], [1.0], [3.0]]), np.array([[5.0], [9.0], [10.0]])
    # 5 is on the edge of the ball of 3, whose radius is 2, and 1 on that of the ball of 5, whose radius is 4.
    assert precision_recall(reference=reference, generated=generated, k=1) == (1 / 3, 2 / 3)


def test_copies_are_at_no_distance(rng):
    points = np.repeat(rng.normal(size=(30, 301)) + 7.3, 5, axis=0).astype(np.float32)  # balls of radius 0, for k = 3
    assert not np.diag(distances._squared_distances(points, points, half=False)).any()
    assert precision_recall(reference=points, generated=points[:75]) == (1, 0.5)
    assert precision_recall(reference=points, generated=points + 1e-2) == (0, 0)


def test_a_large_mean_costs_precision_and_recall_no_digits(features):
    expected = precision_recall(reference=features[0], generated=features[1])
    moved = [(x + 3e4).astype(np.float64) for x in features]
    assert precision_recall(reference=moved[0], generated=moved[1]) == expected


def test_bad_features_are_refused(features):
    reference, generated = features
    broken = generated.copy()
    broken[4, 1] = np.nan
    for measure, least in [(precision_recall, 4), (lambda **sets: kernel_distance(subset_size=50, **sets), 50)]:
        with pytest.raises(ValueError, match="generated: 1 of 91 rows are not finite, the first is row 4"):
            measure(reference=reference, generated=broken)
        with pytest.raises(ValueError, match="reference has 32 features and generated 31"):
            measure(reference=reference, generated=generated[:, 1:])
        with pytest.raises(ValueError, match=f"reference has {least - 1} rows.*needs at least {least}"):
            measure(reference=reference[: least - 1], generated=generated)
        with pytest.raises(ValueError, match=r"reference must be \(N, D\)"):
            measure(reference=reference[0], generated=generated)
        with pytest.raises(TypeError):
            measure(reference, generated)  # which is which must be said
    with pytest.raises(ValueError, match="k must be"):
        precision_recall(reference=reference, generated=generated, k=0)
    with pytest.raises(ValueError, match="protocol must be one of"):
        precision_recall(reference=reference, generated=generated, protocol="float16")
    with pytest.raises(ValueError, match="at least 1 subset of at least 2"):
        kernel_distance(reference=reference, generated=generated, subset_size=1)


def test_bad_logits_are_refused(rng):
    logits = rng.normal(size=(9, 4))
    for values, options, message in [
        (logits, {"splits": 10}, "9 rows.*10 splits needs at least 10"),
        (logits[:0], {}, "0 rows"),
        (np.where(logits > 1, np.inf, logits), {"splits": 1}, "not finite"),
        (logits[0], {}, "must be"),
        (logits, {"splits": 0}, "splits must be at least 1"),
        (logits, {"protocol": "openai"}, "'adm', 'torch-fidelity'"),
    ]:
        with pytest.raises(ValueError, match=message):
            inception_score(values, **options)
