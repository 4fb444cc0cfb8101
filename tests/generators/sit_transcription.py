"""SiT's and REPA's samplers, written out in NumPy and float64, each in its own time and with its own quirks.

`network(x, t)` is this package's (t = 0 data, the velocity from data to noise); it is turned for SiT at one place. SiT:
s = 0 is noise, s = 1 is data. Source: willisma/SiT, transport/{path,transport,integrators}.py; sihyun-yu/REPA,
samplers.py.
"""

import numpy as np


def sit_path(path, s):
    """(alpha, sigma, alpha', sigma', alpha'/alpha, lambda) at SiT's time s."""
    if path == "linear":
        with np.errstate(divide="ignore"):  # at s = 0, where the velocity needs neither
            return s, 1 - s, 1.0, -1.0, 1 / s, (1 - s) / s
    if path == "gvp":
        alpha, sigma = np.sin(np.pi * s / 2), np.cos(np.pi * s / 2)
        d_alpha, d_sigma = np.pi / 2 * sigma, -np.pi / 2 * alpha
        ratio = np.pi / (2 * np.tan(np.pi * s / 2))
        return alpha, sigma, d_alpha, d_sigma, ratio, ratio * sigma**2 - sigma * d_sigma
    beta = 0.1 + (1 - s) * 19.9
    log_alpha = -0.25 * (1 - s) ** 2 * 19.9 - 0.5 * (1 - s) * 0.1
    alpha, sigma = np.exp(log_alpha), np.sqrt(1 - np.exp(2 * log_alpha))
    return alpha, sigma, alpha * beta / 2, -np.exp(2 * log_alpha) * beta / 2 / sigma, beta / 2, beta / 2


def sit_velocity(path, prediction, network, x, s):
    output = network(x, np.full(len(x), 1 - s))
    if prediction == "velocity":
        return -output
    _, sigma, _, _, ratio, variance = sit_path(path, s)
    return ratio * x + variance * (output if prediction == "score" else -output / sigma)


def sit_score(path, prediction, network, x, s):
    output = network(x, np.full(len(x), 1 - s))
    alpha, sigma, d_alpha, d_sigma, _, _ = sit_path(path, s)
    if prediction == "velocity":
        inverse = alpha / d_alpha
        return (inverse * -output - x) / (sigma**2 - inverse * d_sigma * sigma)
    return output if prediction == "score" else -output / sigma


def sit_diffusion(path, form, norm, s):
    _, sigma, _, _, _, variance = sit_path(path, s)
    return {"constant": lambda: norm, "SBDM": lambda: norm * variance, "sigma": lambda: norm * sigma,
            "linear": lambda: norm * (1 - s), "decreasing": lambda: 0.25 * (norm * np.cos(np.pi * s) + 1) ** 2,
            "increasing-decreasing": lambda: norm * np.sin(np.pi * s) ** 2}[form]()


def sit_ode(path, prediction, network, x, points, method, start=0.0, end=1.0):
    """torchdiffeq's euler and heun2 through `points` points."""
    times = np.linspace(start, end, points)
    velocity = lambda x, s: sit_velocity(path, prediction, network, x, s)
    for s, following in zip(times[:-1], times[1:], strict=True):
        first, dt = velocity(x, s), following - s
        x = x + dt * (first if method == "euler" else 0.5 * (first + velocity(x + dt * first, following)))
    return x


def sit_sde(path, prediction, network, x, table, *, form, norm, last_step, last_step_size, steps, method,
            start=0.0, eps=0.0):
    """`steps` is the released argument: steps - 1 noisy ones, then the last."""
    end = 1 - (last_step_size if last_step else eps)
    times = np.linspace(start, end, steps)
    dt = times[1] - times[0]
    velocity = lambda x, s: sit_velocity(path, prediction, network, x, s)
    score = lambda x, s: sit_score(path, prediction, network, x, s)
    drift = lambda x, s: velocity(x, s) + sit_diffusion(path, form, norm, s) * score(x, s)
    for s, z in zip(times[:-1], table[: steps - 1], strict=True):
        new_noise = np.sqrt(2 * sit_diffusion(path, form, norm, s) * dt) * z
        if method == "euler":
            x = x + drift(x, s) * dt + new_noise
        else:
            noisy = x + new_noise
            first = drift(noisy, s)
            x = noisy + 0.5 * dt * (first + drift(noisy + dt * first, s + dt))
    if last_step == "mean":
        return x + drift(x, end) * last_step_size
    if last_step == "euler":
        return x + velocity(x, end) * last_step_size
    if last_step == "tweedie":
        alpha, sigma, *_ = sit_path(path, end)
        return x / alpha + sigma**2 / alpha * score(x, end)
    return x


def repa_guided(cond, uncond, scale, interval, x, t, decided_at):
    if interval[0] <= decided_at <= interval[1]:
        return uncond(x, np.full(len(x), t)) + scale * (cond(x, np.full(len(x), t)) - uncond(x, np.full(len(x), t)))
    return cond(x, np.full(len(x), t))


def repa_ode(cond, uncond, scale, interval, x, steps, heun):
    """REPA's euler_sampler: with `heun`, the last step is not corrected, and guidance is decided once a step."""
    times = np.linspace(1, 0, steps + 1)
    for i, (t, following) in enumerate(zip(times[:-1], times[1:], strict=True)):
        at = lambda x, time, t=t: repa_guided(cond, uncond, scale, interval, x, time, t)
        first, dt = at(x, t), following - t
        predicted = x + dt * first
        x = x + dt * 0.5 * (first + at(predicted, following)) if heun and i < steps - 1 else predicted
    return x


def repa_sde(cond, uncond, scale, interval, x, table, steps):
    """REPA's euler_maruyama_sampler on its linear path: its w is 2 t."""
    times = np.append(np.linspace(1, 0.04, steps), 0.0)
    for i, (t, following) in enumerate(zip(times[:-1], times[1:], strict=True)):
        velocity, dt = repa_guided(cond, uncond, scale, interval, x, t, t), following - t
        score = -(x + (1 - t) * velocity) / t
        x = x + dt * (velocity - 0.5 * 2 * t * score)
        x = x + np.sqrt(2 * t) * np.sqrt(-dt) * table[i] if i < steps - 1 else x
    return x
