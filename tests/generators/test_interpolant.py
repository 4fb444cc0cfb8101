import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sit_transcription import sit_path, sit_score, sit_velocity

from eqvae_jax.generators import interpolant
from eqvae_jax.generators.interpolant import PATHS, PREDICTIONS, Interpolant, draw_times, estimate

TIMES = np.array([0.02, 0.3, 0.5, 0.97])


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def spread(values):
    return np.asarray(values)[:, None, None, None]


def truth(path, prediction, x, noise, t):
    """(x_t, what the network should predict), float64."""
    alpha, sigma, d_alpha, d_sigma, *_ = (spread(np.broadcast_to(c, t.shape)) for c in sit_path(path, 1 - t))
    target = {"velocity": -d_alpha * x - d_sigma * noise, "noise": noise, "score": -noise / sigma}[prediction]
    return alpha * x + sigma * noise, target


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_those_of_sit_seen_from_the_other_end(path):
    alpha, sigma, d_alpha, d_sigma, _, variance = sit_path(path, 1 - TIMES)
    at = Interpolant(path).coefficients(TIMES)
    assert at.sigma_prime.dtype == np.float64
    for ours, theirs in zip(at, (alpha, sigma, -d_alpha * np.ones(4), -d_sigma * np.ones(4)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    np.testing.assert_allclose(at.drift_variance, variance, rtol=1e-10)
    np.testing.assert_allclose(Interpolant(path).noise_level(TIMES), sigma / alpha, rtol=1e-10)
    traced = jax.jit(Interpolant(path).coefficients)(jnp.float32(TIMES))
    for ours, precise in zip(traced, at, strict=True):
        np.testing.assert_allclose(ours, precise, rtol=2e-6, atol=3e-7)


@pytest.mark.parametrize("path", PATHS)
def test_the_derivatives_are_the_derivatives(path):
    f, h = Interpolant(path).coefficients, 1e-6
    numeric = lambda name: (getattr(f(TIMES + h), name) - getattr(f(TIMES - h), name)) / (2 * h)
    np.testing.assert_allclose(f(TIMES).alpha_prime, numeric("alpha"), rtol=1e-7)
    np.testing.assert_allclose(f(TIMES).sigma_prime, numeric("sigma"), rtol=1e-7)
    ends = f(np.array([1e-9, 1.0]))
    np.testing.assert_allclose([ends.alpha[0], ends.sigma[1]], [1, 1], atol=3e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_a_perfect_prediction_costs_nothing_and_gives_velocity_and_noise(rng, path, prediction):
    x, noise = normal(rng, 4, 3, 3, 2), normal(rng, 4, 3, 3, 2)
    x_t, target = truth(path, prediction, x, noise, TIMES)
    process, perfect, t = Interpolant(path, prediction), jnp.asarray(target, jnp.float32), jnp.float32(TIMES)
    np.testing.assert_allclose(interpolant.noised(process, x, t, noise), x_t, rtol=1e-5, atol=1e-6)
    cost = interpolant.loss(process, perfect, x, t, noise)["loss"]
    np.testing.assert_allclose(cost, np.zeros(4), atol=1e-10 * np.square(target).max())

    velocity, found = estimate(process, lambda x, t: perfect, np.float32(x_t), jnp.float32(TIMES))
    _, exact = truth(path, "velocity", x, noise, TIMES)
    np.testing.assert_allclose(velocity, exact, atol=1e-5 * np.abs(exact).max())
    np.testing.assert_allclose(found, noise, atol=5e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_velocity_and_score_of_any_prediction_are_sits(rng, path, prediction):
    x, weight = rng.normal(size=(1, 3, 3, 2)), rng.normal(size=(2, 2))
    network = lambda x, t: x @ weight + t[:, None, None, None]
    for t in TIMES:
        ours = estimate(Interpolant(path, prediction), network, np.float32(x), jnp.float32([t]))
        sigma = sit_path(path, 1 - t)[1]
        for mine, theirs in ((-ours.velocity, sit_velocity(path, prediction, network, x, 1 - t)),
                             (-ours.noise / sigma, sit_score(path, prediction, network, x, 1 - t))):
            np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("weight", ["", "velocity", "likelihood"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_losses_are_sits(rng, path, prediction, weight):
    if prediction == "velocity" and weight:
        return
    x, noise, output = normal(rng, 4, 3, 3, 2), normal(rng, 4, 3, 3, 2), normal(rng, 4, 3, 3, 2)
    ours = interpolant.loss(Interpolant(path, prediction, weight), output, x, jnp.float32(TIMES), noise)
    _, sigma, _, _, _, variance = sit_path(path, 1 - TIMES)
    residual = {"velocity": output - truth(path, "velocity", x, noise, TIMES)[1], "noise": output - noise,
                "score": spread(sigma) * output + noise}[prediction]
    factor = {"": np.ones(4), "velocity": (variance / sigma) ** 2, "likelihood": variance / sigma**2}[weight]
    np.testing.assert_allclose(ours["loss"], factor * np.square(residual).mean((1, 2, 3)), rtol=2e-5)


def test_time_ranges_are_sits():
    ranges = lambda *fields: (Interpolant(*fields).train_range, Interpolant(*fields).sample_range)
    for path in ("linear", "gvp"):
        assert ranges(path, "velocity") == ((0, 1), (0, 1))
        assert ranges(path, "noise") == ranges(path, "score") == ((1e-3, 1 - 1e-3), (1e-3, 1 - 1e-3))
    for prediction in PREDICTIONS:
        assert ranges("vp", prediction) == ((1e-5, 1), (1e-3, 1))
    assert Interpolant("linear", "noise", train_eps=0.1).sample_range == (1e-3, 1 - 1e-3)
    assert Interpolant(sample_eps=0.2).sample_range == (0.2, 0.8)


def test_drawn_times_fill_the_range_and_belong_to_their_example():
    key, index = jax.random.key(0), jnp.arange(20000)
    process = Interpolant("linear", "noise", train_eps=0.2)
    times = np.asarray(draw_times(process, key, index))
    np.testing.assert_allclose([times.min(), times.mean(), times.max()], [0.2, 0.5, 0.8], atol=5e-3)
    np.testing.assert_array_equal(draw_times(process, key, index[5:9]), times[5:9])
    for path in ("linear", "gvp"):
        times = draw_times(Interpolant(path), key, index, "lognormal")
        level = np.log(Interpolant(path).noise_level(np.float64(times)))
        np.testing.assert_allclose([level.mean(), level.std()], [0, 1], atol=0.03)
    for path, name in (("vp", "lognormal"), ("linear", "normal")):
        with pytest.raises(ValueError, match="distribution"):
            draw_times(Interpolant(path), key, index, name)


@pytest.mark.parametrize("fields, complaint", [
    (dict(path="cosine"), "'cosine'; it must be one of"), (dict(prediction="v"), "prediction is 'v'"),
    (dict(prediction="noise", loss_weight="snr"), "loss_weight is 'snr'"), (dict(loss_weight="velocity"), "no weight"),
    (dict(train_eps=0.5), "train_eps is 0.5"), (dict(sample_eps=-1e-3), "sample_eps is -0.001"),
    (dict(prediction="score", sample_eps=0.0), "divide by 0"), (dict(path="vp", train_eps=0.0), "divide by 0"),
])
def test_impossible_interpolants_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        Interpolant(**fields)


def test_a_network_with_variance_channels_is_refused(rng):
    x = normal(rng, 2, 4, 4, 4)
    with pytest.raises(ValueError, match="out_channels=4"):
        interpolant.loss(Interpolant(), jnp.concatenate([x, x], -1), x, jnp.ones(2), x)
