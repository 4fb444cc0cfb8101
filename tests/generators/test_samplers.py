import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sit_transcription import repa_ode, repa_sde, sit_ode, sit_sde

from eqvae_jax.generators.interpolant import PATHS, Interpolant
from eqvae_jax.generators.samplers import FORMS, LAST_STEPS, ode, sde

WEIGHT = 0.4 * np.random.default_rng(9).normal(size=(2, 2))
EVERYWHERE = (0.0, 1.0)


def numpy_network(x, t):
    return x @ WEIGHT + np.sin(3 * t[:, None, None, None] + x)


def network(x, t):
    return x @ WEIGHT.astype(np.float32) + jnp.sin(3 * t[:, None, None, None] + x)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def run(sampler, *args, **how):
    return jax.jit(lambda x: sampler(args[0], args[1], x, *args[3:], **how))(args[2])


def close(ours, theirs, tolerance=2e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def exact(process, mean, std):
    """The velocity of data distributed as N(mean, std^2), and where its ODE takes x_1: a straight line's image."""
    def velocity(x, t):
        at = process.coefficients(t[:, None, None, None])
        noise = at.sigma * (x - at.alpha * mean) / (at.alpha**2 * std**2 + at.sigma**2)
        data = mean + at.alpha * std**2 * (x - at.alpha * mean) / (at.alpha**2 * std**2 + at.sigma**2)
        return at.alpha_prime * data + at.sigma_prime * noise

    return velocity, lambda x: mean + std * x


def seen_times(sample):
    """The times at which a sampler calls its network, in order."""
    times = []

    def spy(x, t):
        jax.debug.callback(lambda t: times.append(np.asarray(t)), t, ordered=True)
        return jnp.zeros_like(x)

    jax.block_until_ready(sample(spy, jnp.ones((3, 1, 1, 1))))
    jax.effects_barrier()
    assert all(np.all(t == t[0]) for t in times)
    return np.array([t[0] for t in times])


def test_grids_are_the_released_ones():
    process, still = Interpolant(), lambda i: jnp.zeros((3, 1, 1, 1))
    released = np.linspace(0, 0.96, 250)
    times = seen_times(lambda f, x: sde(process, f, x, still, evaluations=250))
    np.testing.assert_allclose(times, 1 - released, atol=1e-6)
    np.testing.assert_allclose(times[0] - times[1], 0.0038554217, rtol=1e-4)
    times = seen_times(lambda f, x: ode(process, f, x, evaluations=249))
    np.testing.assert_allclose(times, 1 - np.linspace(0, 1, 250)[:-1], atol=1e-6)
    times = seen_times(lambda f, x: ode(process, f, x, method="heun", evaluations=250))
    points = 1 - np.linspace(0, 1, 126)
    np.testing.assert_allclose(times, np.stack([points[:-1], points[1:]], 1).reshape(-1), atol=1e-6)
    times = seen_times(lambda f, x: sde(process, f, x, still, method="heun", evaluations=499))
    assert len(times) == 499 and times[-1] == np.float32(0.04)
    vp = Interpolant("vp")
    np.testing.assert_allclose(seen_times(lambda f, x: ode(vp, f, x, evaluations=2)), [1, 0.5005], atol=1e-6)


def test_the_network_is_traced_once():
    calls = []
    counted = lambda x, t: calls.append(1) or network(x, t)
    x = jnp.ones((1, 2, 2, 2))
    for sample in (lambda: ode(Interpolant(), counted, x, evaluations=5),
                   lambda: ode(Interpolant(), counted, x, method="heun", evaluations=5),
                   lambda: sde(Interpolant(), counted, x, lambda i: x, evaluations=5)):
        calls.clear()
        jax.make_jaxpr(sample)()
        assert len(calls) == 1


@pytest.mark.parametrize("prediction", ["velocity", "score", "noise"])
@pytest.mark.parametrize("path", PATHS)
def test_odes_take_the_written_out_steps(rng, path, prediction):
    x, process = normal(rng, 2, 3, 3, 2), Interpolant(path, prediction)
    low, high = process.sample_range
    for method in ("euler", "heun"):
        ours = run(ode, process, network, x, method=method, evaluations=8)
        points = 9 if method == "euler" else 5
        close(ours, sit_ode(path, prediction, numpy_network, np.float64(x), points, method, 1 - high, 1 - low), 1e-4)


CASES = ([("linear", "velocity", form, "mean", "euler") for form in FORMS]
         # Heun without a last step: the transcription, as the released code, divides 0 by 0; it has a test below.
         + [("linear", "velocity", "sigma", last, method) for last in LAST_STEPS for method in ("euler", "heun")
            if (last, method) != ("", "heun")]
         + [("gvp", "noise", form, "euler", "heun") for form in FORMS]
         + [("vp", "score", form, last, "euler") for form in FORMS for last in ("tweedie", "")])


@pytest.mark.parametrize("path, prediction, form, last_step, method", CASES)
def test_sdes_take_the_written_out_steps(rng, path, prediction, form, last_step, method):
    sbdm = form == "SBDM" and path == "linear"
    process = Interpolant(path, prediction, sample_eps=0.01 if sbdm else None)
    x, table = normal(rng, 2, 3, 3, 2), normal(rng, 5, 2, 3, 3, 2)
    evaluations = (5 if method == "euler" else 10) + bool(last_step)
    how = dict(form=form, norm=0.7, last_step=last_step, last_step_size=0.1, method=method)
    noise = lambda i: jnp.asarray(table)[i]
    ours = run(sde, process, network, x, noise, evaluations=evaluations, **how)
    theirs = sit_sde(path, prediction, numpy_network, np.float64(x), np.float64(table), steps=6,
                     start=1 - process.sample_range[1], eps=process.sample_eps, **how)
    close(ours, theirs, 1e-4)


def test_the_sigma_form_is_finite_at_both_ends_with_heun_and_no_last_step(rng):
    x, table = normal(rng, 2, 3, 3, 2), normal(rng, 3, 2, 3, 3, 2)
    how = dict(evaluations=6, last_step="", method="heun")
    ours = run(sde, Interpolant(), network, x, lambda i: jnp.asarray(table)[i], **how)
    drift = lambda x, t: -(2 - t) * numpy_network(x, np.full(2, t)) - x        # facts: (1 + s) v - x in SiT's time
    y = np.float64(x)
    for i, t in enumerate((1.0, 2 / 3, 1 / 3)):
        y = y + np.sqrt(2 * t / 3) * table[i]
        first = drift(y, t)
        y = y + (first + drift(y + first / 3, t - 1 / 3)) / 6
    close(ours, y)


@pytest.mark.parametrize("heun", [False, True])
def test_odes_take_repas_steps(rng, heun):
    x = normal(rng, 2, 3, 3, 2)
    method, evaluations = ("heun", 13) if heun else ("euler", 7)
    ours = run(ode, Interpolant(), network, x, method=method, evaluations=evaluations)
    close(ours, repa_ode(numpy_network, None, 1.0, (2.0, 2.0), np.float64(x), 7, heun))


def test_the_sde_takes_repas_steps(rng):
    x, table = normal(rng, 2, 3, 3, 2), normal(rng, 7, 2, 3, 3, 2)
    theirs = repa_sde(numpy_network, None, 1.0, (2.0, 2.0), np.float64(x), np.float64(table), 8)
    for form in ("linear", "sigma"):
        ours = run(sde, Interpolant(), network, x, lambda i: jnp.asarray(table)[i], evaluations=8, form=form)
        close(ours, theirs)


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_odes_converge_at_their_order(rng, path, method, order):
    process, x = Interpolant(path), normal(rng, 4, 4, 4, 2)
    velocity, answer = exact(process, 0.3, 0.5)
    steps = lambda n: n * (2 if method == "heun" else 1)
    solve = lambda n: run(ode, process, velocity, x, method=method, evaluations=steps(n))
    error = [np.abs(solve(n) - answer(x)).max() for n in (20, 40)]
    np.testing.assert_allclose(np.log2(error[0] / error[1]), order, atol=0.15)
    assert error[1] < 0.05


@pytest.mark.parametrize("path, form, last_step, method", [
    ("linear", "sigma", "mean", "euler"), ("linear", "increasing-decreasing", "tweedie", "heun"),
    ("gvp", "linear", "mean", "heun"), ("vp", "SBDM", "euler", "euler")])
def test_sdes_reach_the_datas_distribution(rng, path, form, last_step, method):
    process, mean, std = Interpolant(path), 0.3, 0.5
    velocity, _ = exact(process, mean, std)
    noise = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(3), i), (256, 8, 8, 2))
    how = dict(evaluations=251, form=form, last_step=last_step, method=method)
    x = np.asarray(run(sde, process, velocity, normal(rng, 256, 8, 8, 2), noise, **how))
    # Monte-Carlo error is 0.003; the steps' own, and the noise that the last one leaves out, add the rest.
    np.testing.assert_allclose([x.mean(), x.std()], [mean, std], atol=0.012)


def test_dopri5_solves_to_its_tolerance_within_the_range(rng):
    pytest.importorskip("diffrax")
    x = normal(rng, 3, 2, 2, 2)
    velocity, answer = exact(Interpolant("gvp"), 0.3, 0.5)
    ours = run(ode, Interpolant("gvp"), velocity, x, method="dopri5", rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours, answer(x), atol=2e-4)
    times = seen_times(lambda f, x: ode(Interpolant("vp"), f, x, method="dopri5"))
    assert times.max() <= 1 and times.min() >= np.float32(1e-3) and len(times) > 6


def test_dopri5_that_does_not_reach_the_end_gives_no_number():
    pytest.importorskip("diffrax")
    wall = lambda x, t: jnp.broadcast_to(1 / (t[:, None, None, None] - 0.5) ** 2, x.shape)
    assert np.all(np.isnan(run(ode, Interpolant(), wall, jnp.ones((1, 2, 2, 2)), method="dopri5")))


def test_dopri5_without_diffrax_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"pip install 'eqvae_jax\[ode\]'"):
        ode(Interpolant(), network, jnp.ones((1, 2, 2, 2)), method="dopri5")


def test_a_sample_depends_on_itself_only(rng):
    x, table = normal(rng, 3, 3, 3, 2), normal(rng, 4, 3, 3, 3, 2)
    together = run(sde, Interpolant(), network, x, lambda i: jnp.asarray(table)[i], evaluations=5)
    alone = run(sde, Interpolant(), network, x[1:2], lambda i: jnp.asarray(table)[i, 1:2], evaluations=5)
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields, complaint", [
    (dict(method="rk4"), "method is 'rk4'"), (dict(evaluations=None), "evaluations is None"),
    (dict(evaluations=0), "at least 1"), (dict(method="dopri5", evaluations=4), "dopri5 chooses"),
])
def test_impossible_odes_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        ode(Interpolant(), network, jnp.ones((1, 2, 2, 2)), **fields)


@pytest.mark.parametrize("fields, complaint", [
    (dict(form="sbdm"), "form is 'sbdm'"), (dict(last_step="Mean"), "last_step is 'Mean'"),
    (dict(method="dopri5"), "method is 'dopri5'"), (dict(evaluations=1), "at least 2"),
    (dict(method="heun", evaluations=10), "must be odd"), (dict(method="heun", last_step="", evaluations=5), "even"),
    (dict(last_step_size=0.0), "last_step_size is 0.0"), (dict(last_step_size=1.0), "last_step_size is 1.0"),
    (dict(form="SBDM"), "infinite at t = 1"), (dict(norm=-1.0), "norm is -1.0"),
    (dict(method="heun", last_step="", form="linear", evaluations=4), "the score at t = 0"),
])
def test_impossible_sdes_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        sde(Interpolant(), network, jnp.ones((1, 2, 2, 2)), lambda i: 0.0, **dict(evaluations=5) | fields)
