"""Sampling along an interpolant, from noise at t = 1 to data at t = 0: its probability-flow ODE and its family of SDEs.

Lengths count EVALUATIONS of the network, since the released commands count three different things:

    released                                            here
    SiT  ode --sampling-method euler, 250 steps         ode(method="euler", evaluations=249): 250 points
    SiT  ode --sampling-method heun2, 126 steps         ode(method="heun", evaluations=250): 125 Heun steps
    SiT  ode --sampling-method dopri5                   ode(method="dopri5"): the number of steps has no effect
    SiT  sde --sampling-method Euler, 250 steps         sde(evaluations=250): 249 noisy steps and the last one
    SiT  sde --sampling-method Heun, 250 steps          sde(method="heun", evaluations=499)
    SiT  sde ..., --last-step None                      one evaluation fewer
    REPA --mode ode, N steps                            ode(method="euler", evaluations=N)
    REPA --mode ode --heun, N steps                     ode(method="heun", evaluations=2 * N - 1)
    REPA --mode sde, 250 steps                          sde(evaluations=250, form="linear"); on the linear path
                                                        that is SiT's default, form="sigma"

Each loop body calls the network once, so that it is compiled once. Coefficients of all steps are made in float64.

Source: willisma/SiT, transport/; sihyun-yu/REPA, samplers.py; SiT (arXiv 2401.08740), section 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqvae_jax.generators.guidance import Guided
from eqvae_jax.generators.interpolant import Interpolant, estimate

ODE_METHODS = ("euler", "heun", "dopri5")
SDE_METHODS = ("euler", "heun")
FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
LAST_STEPS = ("mean", "euler", "tweedie", "")


class _Evaluations(NamedTuple):
    """What happens at each evaluation: x <- keep x + velocity * v + noise * eps, and the new noise's spread; (n,).

    decided_at: the time at which guidance decides; Heun's correction keeps its predictor's.
    """

    time: np.ndarray
    decided_at: np.ndarray
    keep: np.ndarray
    velocity: np.ndarray
    noise: np.ndarray
    spread: np.ndarray


def ode(interpolant: Interpolant, network, noise_x, *, method="euler", evaluations=None, rtol=1e-3, atol=1e-6):
    """Solves the probability-flow ODE from noise_x (B,h,w,C) to latents (B,h,w,C).

    method: "euler": even steps. "heun": even steps of two evaluations (REPA's and torchdiffeq's "heun2"); an odd count
      leaves the last step uncorrected, as REPA and EDM do. "dopri5": adaptive, to rtol and atol.
    evaluations: of the network, for euler and heun; none for dopri5.

    dopri5 is diffrax's. Like torchdiffeq's, which SiT runs, its error is a root mean square over the whole batch, so a
    sample depends slightly on those beside it. Unlike it, the last step ends at the end of the range, where
    torchdiffeq steps past it, asks the network for times outside [0, 1] and interpolates; time is float32, where
    torchdiffeq's is float64; and under guidance the doubled half of the state is not part of the error. Both stay
    within the tolerance, not within rounding, of each other. If 4096 steps do not reach the end, the result is NaN.

    Raises ValueError for a method or a count that cannot be, ImportError for dopri5 without diffrax.
    """
    _choose("method", method, ODE_METHODS)
    end, start = interpolant.sample_range
    if method == "dopri5":
        if evaluations is not None:
            raise ValueError(f"ode: evaluations is {evaluations}, but dopri5 chooses its steps by rtol and atol; leave "
                             "it None.")
        return _dopri5(interpolant, network, noise_x, start, end, rtol, atol)
    _count("ode", evaluations, 1)
    steps = evaluations if method == "euler" else (evaluations + 1) // 2
    times = np.linspace(start, end, steps + 1)
    plan = _plan(times, np.zeros(steps + 1), np.zeros(steps))
    if method == "euler":
        return _euler(interpolant, network, noise_x, plan, None)
    return _heun(interpolant, network, noise_x, _corrected(plan, times, np.zeros(steps + 1), evaluations), None)


def sde(interpolant: Interpolant, network, x1, noise, *, evaluations, form="sigma", norm=1.0, last_step="mean",
        last_step_size=0.04, method="euler"):
    """Solves the reverse SDE dx = (v - w score) dt + sqrt(2 w) dW from noise x1 (B,h,w,C) to latents (B,h,w,C).

    Every w_t >= 0 gives the same marginals; w = 0 is the ODE. Even steps down to last_step_size, then the last step.

    noise: i -> (B,h,w,C), standard normal, for the i-th noisy step (i is traced).
    evaluations: of the network; the last step is one of them.
    form, norm: w_t = norm times 1 ("constant"), lambda_t ("SBDM", the SDE of score models), sigma_t ("sigma"), t
      ("linear"), sin^2(pi t) ("increasing-decreasing"), or (1 - norm cos(pi t))^2 / 4 ("decreasing": towards data).
    last_step: "mean" (without noise), "euler" (of the ODE), "tweedie" (the estimate of the data) or "" (none: the even
      steps go down to the range's end).
    method: "euler" (Euler-Maruyama), or "heun", which adds each step's noise first and corrects the drift.

    Raises ValueError for names or counts that cannot be, and where w score is infinite at a time that is evaluated.
    """
    for name, value, known in (("form", form, FORMS), ("last_step", last_step, LAST_STEPS),
                               ("method", method, SDE_METHODS)):
        _choose(name, value, known)
    if norm < 0:
        raise ValueError(f"sde: norm is {norm}; it scales a variance and must be at least 0.")
    end, start = interpolant.sample_range
    if last_step:
        if not 0 < last_step_size < start:
            raise ValueError(f"sde: last_step_size is {last_step_size}; it must lie between 0 and {start}. For none "
                             "use last_step=\"\".")
        end = last_step_size
    noisy = _noisy_steps(evaluations, method, bool(last_step))
    if form == "SBDM" and start == 1 and interpolant.path != "vp":
        raise ValueError(f"sde: form \"SBDM\" is infinite at t = 1 on path {interpolant.path!r}; give the interpolant "
                         "a sample_eps, such as 1e-3, or use form \"sigma\".")
    if method == "heun" and end == 0 and form not in ("sigma", "SBDM"):
        raise ValueError(f"sde: with last_step=\"\" and form {form!r}, Heun's correction needs the score at t = 0, "
                         "where it is infinite; use a last step, or form \"sigma\".")

    times = np.linspace(start, end, noisy + 1)
    pull, spread = _drift_and_spread(interpolant, form, norm, times)
    plan = _plan(times, pull, spread[:-1])
    corrected = _corrected(plan, times, pull, 2 * noisy) if method == "heun" else plan
    if last_step:
        corrected = _append(corrected, _last(interpolant, last_step, last_step_size, pull[-1]))
    return (_euler if method == "euler" else _heun)(interpolant, network, x1, corrected, noise)


def _drift_and_spread(interpolant, form, norm, times):
    """(what the drift has of the predicted noise, w / sigma; the size of the new noise, sqrt(2 w)), at each time."""
    path = interpolant.coefficients(times)
    with np.errstate(divide="ignore", invalid="ignore"):  # at t = 0, which only Heun evaluates; refused above
        w = {"constant": norm * np.ones_like(times), "SBDM": norm * path.drift_variance, "sigma": norm * path.sigma,
             "linear": norm * times, "decreasing": 0.25 * (1.0 - norm * np.cos(np.pi * times))**2,
             "increasing-decreasing": norm * np.sin(np.pi * times)**2}[form]
        # In closed form where the ratio is finite at sigma = 0.
        pull = {"sigma": norm * np.ones_like(times), "SBDM": norm * path.wronskian / path.alpha}.get(form)
        return w / path.sigma if pull is None else pull, np.sqrt(2.0 * w)


def _noisy_steps(evaluations, method, last_step):
    each = 1 if method == "euler" else 2
    _count("sde", evaluations, each + last_step)
    if (evaluations - last_step) % each:
        raise ValueError(f"sde: evaluations is {evaluations}; with Heun's two a step{' and a last step' * last_step} "
                         f"it must be {'odd' if last_step else 'even'}.")
    return (evaluations - last_step) // each


def _plan(times, pull, spread):
    """One evaluation a step, at its beginning: x <- x - dt (v + pull eps) + sqrt(dt) spread z."""
    dt, at = times[:-1] - times[1:], times[:-1]
    return _Evaluations(at, at, np.ones_like(at), -dt, -dt * pull[:-1], np.sqrt(dt) * spread)


def _corrected(plan, times, pull, evaluations):
    """Two evaluations a step, at its two ends; cut to `evaluations`."""
    second = plan._replace(time=times[1:], noise=plan.velocity * pull[1:], spread=np.zeros_like(plan.spread))
    paired = (np.stack(pair, 1).reshape(-1)[:evaluations] for pair in zip(plan, second, strict=True))
    return _Evaluations(*paired)


def _last(interpolant, last_step, size, pull):
    """The noise-free step from t = size to data."""
    path = interpolant.coefficients(float(size))
    keep, velocity, noise = {
        "mean": (1.0, -size, -size * pull), "euler": (1.0, -size, 0.0),
        "tweedie": (1.0 / path.alpha, 0.0, -path.sigma / path.alpha)}[last_step]
    return _Evaluations(size, size, keep, velocity, noise, 0.0)


def _append(plan, last):
    return _Evaluations(*(np.append(column, value) for column, value in zip(plan, last, strict=True)))


def _ask(interpolant, network, x, at):
    """The estimate at one row of the plan."""
    t = jnp.full(len(x), at.time)
    if isinstance(network, Guided):
        decided_at = jnp.full(len(x), at.decided_at)
        return estimate(interpolant, lambda x, t: network(x, t, decided_at), x, t)
    return estimate(interpolant, network, x, t)


def _rows(plan):
    table = _Evaluations(*(jnp.asarray(column, jnp.float32) for column in plan))
    return lambda i: _Evaluations(*(column[i] for column in table))


def _euler(interpolant, network, x, plan, noise):
    row = _rows(plan)

    def step(i, x):
        at = row(i)
        now = _ask(interpolant, network, x, at)
        x = at.keep * x + at.velocity * now.velocity + at.noise * now.noise
        return x if noise is None else jnp.where(at.spread > 0, x + at.spread * noise(i), x)

    return jax.lax.fori_loop(0, len(plan.time), step, x.astype(jnp.float32))


def _heun(interpolant, network, x, plan, noise):
    """Evaluations alternate: from `base`, the step's beginning, to a prediction x; from there to the corrected x."""
    row = _rows(plan)

    def evaluation(i, carry):
        x, base, change = carry
        at, predicts = row(i), i % 2 == 0
        if noise is not None:
            x = jnp.where(at.spread > 0, x + at.spread * noise(i // 2), x)
        now = _ask(interpolant, network, x, at)
        new = at.velocity * now.velocity + at.noise * now.noise
        base = jnp.where(predicts, x, base)
        x = jnp.where(predicts, at.keep * base + new, base + 0.5 * (change + new))
        return x, base, new

    x = x.astype(jnp.float32)
    return jax.lax.fori_loop(0, len(plan.time), evaluation, (x, x, jnp.zeros_like(x)))[0]


def _dopri5(interpolant, network, x, start, end, rtol, atol):
    try:
        import diffrax
    except ImportError as error:
        raise ImportError("method \"dopri5\" needs diffrax: pip install 'eqvae_jax[ode]', or diffrax itself. Euler and "
                          "Heun work without it.") from error
    field = lambda t, x, _: estimate(interpolant, network, x, jnp.full(len(x), t)).velocity
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field), diffrax.Dopri5(), t0=start, t1=end, dt0=None, y0=x.astype(jnp.float32),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol), max_steps=4096, throw=False)
    # Not diffrax's own exception: it is raised from the first device, to which all samples would have to move.
    return jnp.where(diffrax.is_okay(solution.result), solution.ys[0], jnp.nan)


def _choose(name, value, known):
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it must be one of {list(known)}.")


def _count(sampler, evaluations, least):
    if not isinstance(evaluations, (int, np.integer)) or evaluations < least:
        raise ValueError(f"{sampler}: evaluations is {evaluations!r}; it must be a whole number, at least {least}.")
