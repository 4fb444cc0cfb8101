"""DiT's process: discrete Gaussian diffusion that predicts the noise and an interpolated variance.

Steps are numbered 0 (nearly data) .. T - 1 (noise). The network is a function `network(x (B,h,w,C), t (B,)) ->
(B,h,w,2C)`: the predicted noise, then the logits of the variance; t is the ORIGINAL step, 0 .. 999, as float32, also
where fewer steps are taken. Latents are not clipped anywhere, as in every released command of DiT.

Source: facebookresearch/DiT, diffusion/; Improved DDPM (arXiv 2102.09672) for the variance, DDIM (arXiv 2010.02502).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ORIGINAL_STEPS = 1000


class GaussianDiffusion(NamedTuple):
    """The constants of q(x_t | x_0) and of the posterior q(x_{t-1} | x_t, x_0); T values each, float64.

    timestep_map: what the network is told at each step: the number that step has in the original process, int64.
    """

    timestep_map: np.ndarray
    betas: np.ndarray
    alphas_bar: np.ndarray                # product of 1 - beta up to and including the step
    alphas_bar_prev: np.ndarray           # the same before the step: 1 at step 0
    posterior_mean_x0: np.ndarray         # the posterior's mean is the first times x_0 plus the second times x_t
    posterior_mean_xt: np.ndarray
    posterior_log_variance: np.ndarray    # step 0, whose variance is 0, takes the value of step 1

    @property
    def steps(self):
        return len(self.betas)


def gaussian_diffusion(steps=ORIGINAL_STEPS) -> GaussianDiffusion:
    """The process with noise variances from 1e-4 to 0.02, linear in the step, times 1000 / steps.

    Raises ValueError below 21 steps, where a variance would reach 1; take fewer steps of this one by `respace`.
    """
    if steps < 21:
        raise ValueError(f"gaussian_diffusion({steps}): the last step's variance is {20 / max(steps, 1):.3g} and must "
                         f"be below 1. Use respace(gaussian_diffusion(), \"{steps}\") to take few steps.")
    scale = ORIGINAL_STEPS / steps
    return _from_betas(np.linspace(scale * 1e-4, scale * 0.02, steps), np.arange(steps))


def respace(diffusion: GaussianDiffusion, spacing: str) -> GaussianDiffusion:
    """The process seen at fewer steps only: the same q(x_t | x_0) there, everything else made anew.

    spacing: "250" puts that many steps evenly from the first to the last, each rounded (0, 4, .. 164, 169, .. 999);
      "ddim250" takes every 4th from 0 (.., 996). A count that has no such stride is a ValueError.
    """
    kept = _even_steps(diffusion.steps, spacing)
    alphas_bar = diffusion.alphas_bar[kept]
    betas = 1.0 - alphas_bar / np.append(1.0, alphas_bar[:-1])
    return _from_betas(betas, diffusion.timestep_map[kept])


def _even_steps(total, spacing):
    digits = spacing.removeprefix("ddim")
    if not (digits.isascii() and digits.isdigit() and 1 <= int(digits) <= total):
        raise ValueError(f"spacing is {spacing!r}; it is a number of evaluations, 1 .. {total}, like \"250\", "
                         "or \"ddim250\" for DDIM's grid.")
    count = int(digits)
    if spacing.startswith("ddim"):
        stride = next((s for s in range(1, total + 1) if len(range(0, total, s)) == count), None)
        if stride is None:
            raise ValueError(f"spacing is {spacing!r}: no whole stride gives {count} of {total} steps; use "
                             f"\"{count}\".")
        return np.arange(0, total, stride)
    stride, position, kept = (total - 1) / max(count - 1, 1), 0.0, []
    for _ in range(count):  # a running sum, rounded half to even: the released grid to the last step
        kept.append(round(position))
        position += stride
    return np.array(kept)


def _from_betas(betas, timestep_map):
    alphas_bar = np.cumprod(1.0 - betas)
    previous = np.append(1.0, alphas_bar[:-1])
    variance = betas * (1.0 - previous) / (1.0 - alphas_bar)
    # A process of one step has no step 1 to borrow from; its only step is taken without noise.
    clipped = np.append(variance[1], variance[1:]) if len(betas) > 1 else betas
    return GaussianDiffusion(
        timestep_map=np.asarray(timestep_map, np.int64), betas=betas, alphas_bar=alphas_bar, alphas_bar_prev=previous,
        posterior_mean_x0=betas * np.sqrt(previous) / (1.0 - alphas_bar),
        posterior_mean_xt=(1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - alphas_bar),
        posterior_log_variance=np.log(clipped))


def noise_level(diffusion: GaussianDiffusion):
    """Returns t -> sigma = sqrt((1 - alpha_bar) / alpha_bar), for t as the network is told it (any shape).

    It is the scale of guidance intervals (guidance.noise_levels).
    """
    steps = jnp.asarray(diffusion.timestep_map, jnp.float32)
    sigma = jnp.asarray(np.sqrt(1.0 / diffusion.alphas_bar - 1.0), jnp.float32)
    return lambda t: sigma[jnp.searchsorted(steps, t)]


def draw_steps(diffusion: GaussianDiffusion, key, index):
    """Uniform steps (B,), int32; each depends only on `key` and its example's own index (B,)."""
    draw = lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, diffusion.steps)
    return jax.vmap(draw)(index)


def noised(diffusion: GaussianDiffusion, x, t_index, noise):
    """What the network sees of latents x (B,h,w,C) at steps (B,): sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise."""
    at = _lookup(t_index)
    return at(np.sqrt(diffusion.alphas_bar)) * x + at(np.sqrt(1.0 - diffusion.alphas_bar)) * noise


def network_time(diffusion: GaussianDiffusion, t_index):
    """Steps (B,) of this process as the network is told them: those of the process it was trained on, float32."""
    return jnp.asarray(diffusion.timestep_map, jnp.float32)[t_index]


def loss(diffusion: GaussianDiffusion, output, x, t_index, noise):
    """DiT's loss of each example: {"loss", "mse", "vb"}, each (B,); loss = mse + vb.

    mse is that of the predicted noise; vb is the step's term of the variational bound in bits per value, through which
    only the variance learns. At step 0 it is the likelihood of an 8-bit image, which the released code applies to
    latents as well.

    output: the network's (B,h,w,2C), at `noised` latents and their `network_time`. x: latents (B,h,w,C), in the
    network's scale. t_index: (B,), 0 .. T - 1 of THIS process. noise: (B,h,w,C). Raises ValueError if the network does
    not give 2C channels.
    """
    at, x_t = _lookup(t_index), noised(diffusion, x, t_index, noise)
    eps, logits = _noise_and_variance(output, x_t)
    mse = _mean(jnp.square(noise - eps))

    log_variance = _log_variance(diffusion, logits, at)
    true_mean = _posterior_mean(diffusion, x, x_t, at)
    mean = _posterior_mean(diffusion, _x0(diffusion, jax.lax.stop_gradient(eps), x_t, at), x_t, at)
    kl = _gaussian_kl(true_mean, at(diffusion.posterior_log_variance), mean, log_variance)
    vb = jnp.where(t_index == 0, -_mean(_log_likelihood(x, mean, 0.5 * log_variance)), _mean(kl)) / np.log(2.0)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def ddpm(diffusion: GaussianDiffusion, network, x_T, noise):
    """Ancestral sampling: T network calls from noise x_T (B,h,w,C) to latents (B,h,w,C).

    noise: i -> (B,h,w,C), standard normal, for i = 0 .. T - 2 in the order in which the steps are taken (i is traced).
    The last step adds none. Raises ValueError if the network does not give 2C channels.
    """
    def step(i, x):
        t_index = jnp.full(len(x), diffusion.steps - 1) - i
        at = _lookup(t_index)
        eps, logits = _predict(diffusion, network, x, t_index)
        mean = _posterior_mean(diffusion, _x0(diffusion, eps, x, at), x, at)
        spread = jnp.exp(0.5 * _log_variance(diffusion, logits, at))
        return jnp.where(i < diffusion.steps - 1, mean + spread * noise(i), mean)

    return jax.lax.fori_loop(0, diffusion.steps, step, x_T.astype(jnp.float32))


def ddim(diffusion: GaussianDiffusion, network, x_T, noise=None, eta=0.0):
    """DDIM: T network calls from noise x_T (B,h,w,C) to latents (B,h,w,C).

    The variance's channels, if the network has them, are not used. eta: 0 is deterministic and needs no `noise`; 1 has
    the variance of the posterior. noise: as in `ddpm`. Raises ValueError where eta > 0 comes without noise.
    """
    if eta and noise is None:
        raise ValueError(f"ddim(eta={eta}) is stochastic and needs `noise`, a function i -> {x_T.shape}.")
    bar, previous = diffusion.alphas_bar, diffusion.alphas_bar_prev
    sigma = eta * np.sqrt((1.0 - previous) / (1.0 - bar) * (1.0 - bar / previous))

    def step(i, x):
        t_index = jnp.full(len(x), diffusion.steps - 1) - i
        at = _lookup(t_index)
        eps, _ = _predict(diffusion, network, x, t_index, variance=False)
        mean = at(np.sqrt(previous)) * _x0(diffusion, eps, x, at) + at(np.sqrt(1.0 - previous - sigma**2)) * eps
        return jnp.where(i < diffusion.steps - 1, mean + at(sigma) * noise(i), mean) if eta else mean

    return jax.lax.fori_loop(0, diffusion.steps, step, x_T.astype(jnp.float32))


def _lookup(t_index):
    """Returns table -> its values at the steps (B,), float32, shaped (B,1,1,1)."""
    return lambda table: jnp.asarray(table, jnp.float32)[t_index][:, None, None, None]


def _predict(diffusion, network, x_t, t_index, variance=True):
    return _noise_and_variance(network(x_t, network_time(diffusion, t_index)), x_t, variance)


def _noise_and_variance(output, x_t, variance=True):
    """(noise, logits of the variance), float32, each like x_t, from a network's output."""
    channels = x_t.shape[-1]
    allowed = (2 * channels,) if variance else (channels, 2 * channels)
    if output.shape[:-1] != x_t.shape[:-1] or output.shape[-1] not in allowed:
        shapes = " or ".join(str((*x_t.shape[:-1], c)) for c in allowed)
        raise ValueError(f"The network gave {output.shape} for latents {x_t.shape}; it must give {shapes}: the noise "
                         f"and the logits of its variance (out_channels={2 * channels}).")
    output = output.astype(jnp.float32)
    return output[..., :channels], output[..., channels:]                     # (B,h,w,C) each


def _x0(diffusion, eps, x_t, at):
    return at(np.sqrt(1.0 / diffusion.alphas_bar)) * x_t - at(np.sqrt(1.0 / diffusion.alphas_bar - 1.0)) * eps


def _posterior_mean(diffusion, x_0, x_t, at):
    return at(diffusion.posterior_mean_x0) * x_0 + at(diffusion.posterior_mean_xt) * x_t


def _log_variance(diffusion, logits, at):
    """Between the posterior's (logits -1) and beta's (logits 1), not squashed (Improved DDPM, equation 15)."""
    fraction = 0.5 * (logits + 1.0)
    return fraction * at(np.log(diffusion.betas)) + (1.0 - fraction) * at(diffusion.posterior_log_variance)


def _gaussian_kl(mean, log_variance, other_mean, other_log_variance):
    """KL of the first from the second diagonal Gaussian, in nats, elementwise."""
    ratio = log_variance - other_log_variance
    return 0.5 * (jnp.exp(ratio) - 1.0 - ratio + jnp.square(mean - other_mean) * jnp.exp(-other_log_variance))


def _log_likelihood(x, mean, log_scale):
    """Log-probability of the 8-bit level around x in [-1, 1] under a Gaussian, elementwise."""
    cdf = lambda z: 0.5 * (1.0 + jnp.tanh(np.sqrt(2.0 / np.pi) * (z + 0.044715 * z**3)))
    scaled = lambda edge: (x + edge - mean) * jnp.exp(-log_scale)
    below, above = cdf(scaled(-1.0 / 255.0)), cdf(scaled(1.0 / 255.0))
    probability = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1.0 - below, above - below))
    return jnp.log(jnp.maximum(probability, 1e-12))


def _mean(values):
    return values.mean((1, 2, 3))
