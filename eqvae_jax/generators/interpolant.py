"""SiT's process: a path x_t = alpha_t x + sigma_t eps from data (t = 0) to noise (t = 1), learned in continuous time.

The network is a function `network(x (B,h,w,C), t (B,)) -> (B,h,w,C)` of THIS package's time. SiT's own code runs the
other way (its t is 1 - t, its velocity -v); weights/ and the network's input take care of that, so that the formulas
here are REPA's. Sampling is in samplers.py.

Source: SiT (arXiv 2401.08740) and willisma/SiT, transport/; REPA (arXiv 2410.06940), whose "cosine" path is "gvp".
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PATHS = ("linear", "gvp", "vp")
PREDICTIONS = ("velocity", "score", "noise")
LOSS_WEIGHTS = ("", "velocity", "likelihood")
VP_BETA = (0.1, 20.0)  # beta at t = 0 and at t = 1


class Coefficients(NamedTuple):
    """alpha and sigma of x_t = alpha x + sigma eps, and their derivatives in t; each shaped like t."""

    alpha: jax.Array
    sigma: jax.Array
    alpha_prime: jax.Array
    sigma_prime: jax.Array

    @property
    def wronskian(self):
        """alpha sigma' - alpha' sigma: positive everywhere, so x_t and v together give x and eps at every t."""
        return self.alpha * self.sigma_prime - self.alpha_prime * self.sigma

    @property
    def drift_variance(self):
        """lambda of v = (alpha'/alpha) x_t - lambda score: half of g(t)^2 of the SDE that score models reverse."""
        return self.sigma * self.wronskian / self.alpha


class Estimate(NamedTuple):
    """What an output of the network says, whichever it predicts: (B,h,w,C) each, float32. The score is -noise/sigma."""

    velocity: jax.Array
    noise: jax.Array


@dataclasses.dataclass(frozen=True)
class Interpolant:
    """The path and what the network predicts along it.

    path: "linear" (alpha = 1 - t, sigma = t), "gvp" (alpha = cos(pi t/2), sigma = sin(pi t/2)) or "vp" (the
      variance-preserving SDE with beta from 0.1 to 20).
    prediction: "velocity" (alpha' x + sigma' eps), "score" or "noise" (eps).
    loss_weight: for score and noise: "" (1), "velocity" ((lambda/sigma)^2) or "likelihood" (lambda/sigma^2).
    train_eps, sample_eps: what is cut off the time range [0, 1], at both ends for linear and gvp, at the data's end for
      vp. None takes SiT's: 0 for the velocity on linear and gvp, else 1e-3; vp trains with 1e-5 and samples with 1e-3.
    Raises ValueError for unknown names and for ranges that hold a time at which the formulas divide by 0.
    """

    path: str = "linear"
    prediction: str = "velocity"
    loss_weight: str = ""
    train_eps: float | None = None
    sample_eps: float | None = None

    def __post_init__(self):
        for name, known in (("path", PATHS), ("prediction", PREDICTIONS), ("loss_weight", LOSS_WEIGHTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Interpolant: {name} is {getattr(self, name)!r}; it must be one of {list(known)}.")
        if self.prediction == "velocity" and self.loss_weight:
            raise ValueError(f"Interpolant: loss_weight is {self.loss_weight!r}, but the loss of a velocity has no "
                             "weight; leave it \"\".")
        bounded = self.prediction == "velocity" and self.path != "vp"  # every formula is finite on all of [0, 1]
        defaults = {"train_eps": 0.0 if bounded else 1e-5 if self.path == "vp" else 1e-3,
                    "sample_eps": 0.0 if bounded else 1e-3}
        for name, default in defaults.items():
            value = default if getattr(self, name) is None else float(getattr(self, name))
            if not 0 <= value < 0.5 or (value == 0 and not bounded):
                raise ValueError(f"Interpolant: {name} is {value}; it must lie in [0, 0.5), and above 0 for path="
                                 f"{self.path!r} with prediction={self.prediction!r}, whose formulas divide by 0 at an "
                                 "end of the path.")
            object.__setattr__(self, name, value)

    @property
    def train_range(self):
        """(lowest, highest) time of training."""
        return self.train_eps, 1.0 - (0.0 if self.path == "vp" else self.train_eps)

    @property
    def sample_range(self):
        """(lowest, highest) time of sampling; samplers start at the highest, as if it were pure noise."""
        return self.sample_eps, 1.0 - (0.0 if self.path == "vp" else self.sample_eps)

    def coefficients(self, t) -> Coefficients:
        """alpha, sigma and their derivatives at t (any shape), float64 for NumPy's arrays and floats."""
        xp = np if isinstance(t, (float, np.ndarray)) else jnp
        if self.path == "linear":
            one = xp.ones_like(t)
            return Coefficients(1.0 - t, t, -one, one)
        if self.path == "gvp":
            half = np.pi / 2
            cos, sin = xp.cos(half * t), xp.sin(half * t)
            return Coefficients(cos, sin, -half * sin, half * cos)
        low, high = VP_BETA
        beta = low + t * (high - low)
        log_alpha = -0.25 * t**2 * (high - low) - 0.5 * t * low
        alpha, sigma = xp.exp(log_alpha), xp.sqrt(-xp.expm1(2.0 * log_alpha))
        return Coefficients(alpha, sigma, -0.5 * beta * alpha, 0.5 * beta * alpha**2 / sigma)

    def noise_level(self, t):
        """sigma_t / alpha_t, the sigma of EDM: the scale of guidance intervals (guidance.noise_levels)."""
        path = self.coefficients(t)
        return path.sigma / path.alpha


def estimate(interpolant: Interpolant, network, x_t, t) -> Estimate:
    """Calls the network once at x_t (B,h,w,C) and t (B,), and tells velocity and noise from what it predicts.

    Raises ValueError if the network's output is not shaped like x_t.
    """
    output = _checked(network(x_t, t), x_t)
    path = Coefficients(*(c[:, None, None, None] for c in interpolant.coefficients(t)))
    if interpolant.prediction == "velocity":
        return Estimate(output, (path.alpha * output - path.alpha_prime * x_t) / path.wronskian)
    noise = output if interpolant.prediction == "noise" else -path.sigma * output
    return Estimate((path.alpha_prime * x_t + path.wronskian * noise) / path.alpha, noise)


def noised(interpolant: Interpolant, x, t, noise):
    """x_t = alpha_t x + sigma_t noise: what the network sees of latents x (B,h,w,C) at times t (B,)."""
    at = interpolant.coefficients(t)                                          # (B,) each
    return at.alpha[:, None, None, None] * x + at.sigma[:, None, None, None] * noise


def loss(interpolant: Interpolant, output, x, t, noise):
    """Mean squared error of the network's output at x_t, of each example: {"loss": (B,)}.

    output: (B,h,w,C). x: latents (B,h,w,C), in the network's scale. t: (B,), from `draw_times`. noise: (B,h,w,C),
    standard normal. Raises ValueError if the output is not shaped like x.
    """
    at = interpolant.coefficients(t)                                          # (B,) each
    path = Coefficients(*(c[:, None, None, None] for c in at))                # (B,1,1,1) each
    output = _checked(output, x)
    if interpolant.prediction == "velocity":
        return {"loss": _mean_square(output - (path.alpha_prime * x + path.sigma_prime * noise))}
    residual = output - noise if interpolant.prediction == "noise" else path.sigma * output + noise
    weight = {"": 1.0, "velocity": jnp.square(at.drift_variance / at.sigma),
              "likelihood": at.drift_variance / jnp.square(at.sigma)}[interpolant.loss_weight]
    return {"loss": weight * _mean_square(residual)}


def draw_times(interpolant: Interpolant, key, index, distribution="uniform"):
    """Training times (B,), float32; each depends only on `key` and its example's own index (B,).

    distribution: "uniform" over `train_range`, or REPA's "lognormal" (sigma/alpha = exp of a standard normal; linear
    and gvp only), kept within that range. Raises ValueError for another.
    """
    low, high = interpolant.train_range
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    if distribution == "uniform":
        return jax.vmap(lambda k: jax.random.uniform(k, minval=low, maxval=high))(keys)
    if distribution != "lognormal" or interpolant.path == "vp":
        raise ValueError(f"draw_times: distribution is {distribution!r} on path {interpolant.path!r}; it must be "
                         "\"uniform\", or \"lognormal\" on linear or gvp.")
    level = jnp.exp(jax.vmap(jax.random.normal)(keys))                        # (B,), sigma / alpha
    t = level / (1.0 + level) if interpolant.path == "linear" else 2 / np.pi * jnp.arctan(level)
    return jnp.clip(t, low, high)


def _checked(output, x):
    if output.shape != x.shape:
        raise ValueError(f"The network gave {output.shape} for latents {x.shape}; an interpolant's network gives as "
                         f"many channels as it takes: build it with out_channels={x.shape[-1]}.")
    return output.astype(jnp.float32)


def _mean_square(residual):
    return jnp.square(residual).mean((1, 2, 3))
