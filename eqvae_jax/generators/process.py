"""A process by its config: how a generator learns from a batch, and how it makes one, whichever of the three it is.

    Gaussian diffusion (DiT)    {"kind": "diffusion"}
    an interpolant (SiT, REPA)  {"kind": "interpolant", "path": "linear", "prediction": "velocity", ...}
    masked tokens (MaskGIT)     {"kind": "masking", "schedule": "arccos", "label_smoothing": 0.1, ...}
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eqvae_jax.generators import gaussian_diffusion, interpolant, masking, samplers
from eqvae_jax.generators.draws import example_keys, normal
from eqvae_jax.generators.guidance import guided, noise_levels
from eqvae_jax.generators.networks import latent_shape, predict

KINDS = ("diffusion", "interpolant", "masking")
SAMPLERS = {"diffusion": ("ddpm", "ddim"), "interpolant": ("sde", "sde-heun", "euler", "heun", "dopri5"),
            "masking": masking.SCHEDULES}


# The fields of Sampling that a process has.
FIELDS = {
    "diffusion": ("sampler", "evaluations", "guidance", "guidance_channels", "guidance_noise", "eta"),
    "interpolant": ("sampler", "evaluations", "guidance", "guidance_channels", "guidance_noise", "guidance_times",
                    "form", "norm", "last_step", "last_step_size", "rtol", "atol"),
    "masking": ("sampler", "evaluations", "guidance", "choice_temperature", "inverse_temperature"),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a sample is made; the numbers that differ from these are flags of sample.py and `config.sampling`.

    sampler: of SAMPLERS, "" for the process's own (ddpm; sde; arccos). evaluations: of the network; none for dopri5.
    guidance: scale of classifier-free guidance, 1 for none; of tokens that of the last step, to which it grows from
      none, and so 1 more than the number of MaskGIT's own commands.
    guidance_channels: how many leading channels, 0 for all.
    guidance_times: (low, high), where to guide, in the process's t as REPA has it; guidance_noise: the same as the
      interval's paper has it, low < sigma <= high; at most one of the two, () for everywhere.
    form, norm, last_step, last_step_size: of the SDE. eta: of DDIM. rtol, atol: of dopri5.
    choice_temperature, inverse_temperature: of tokens, as masking.Decoding has them.
    """

    sampler: str = ""
    evaluations: int = 250
    guidance: float = 1.0
    guidance_channels: int = 3
    guidance_times: tuple = ()
    guidance_noise: tuple = ()
    form: str = "sigma"
    norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04
    eta: float = 0.0
    rtol: float = 1e-3
    atol: float = 1e-6
    choice_temperature: float = 4.5
    inverse_temperature: float = 1.0


class Corrupted(NamedTuple):
    """x_t: what the network sees of a batch. t: (B,), the time that it is told. truth: what the loss compares with."""

    x_t: jax.Array
    t: jax.Array
    truth: tuple


class Process(NamedTuple):
    """kind: of KINDS. outputs: C of the latents -> how many channels the network gives; None of masked tokens.

    Latents are (B,h,w,C) float32, and of masked tokens (B,h,w) int32.
    corrupt: (x, key, index (B,)) -> Corrupted; times, noise and masks of an example depend on the key and its index
      alone. loss: (the network's prediction, Corrupted) -> {"loss", ...}, (B,) each.
    sample: (network_of_labels, labels (B,), null, keys (B,), shape of a latent, Sampling) -> latents, those of an
      example depending on its own key alone, but for dopri5, whose steps suit a whole batch.
    """

    kind: str
    outputs: Callable
    corrupt: Callable
    loss: Callable
    sample: Callable


def make_process(kind="interpolant", times="uniform", codes=None, **fields) -> Process:
    """The process of a config's section; fields: of `interpolant.Interpolant`, or of `masking.Masking`.

    codes: how many there are, for masked tokens. Raises ValueError, naming the field, for what cannot be.
    """
    if kind not in KINDS:
        raise ValueError(f"process.kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
    if kind == "masking":
        if wrong := [name for name in fields if name not in masking.Masking.__dataclass_fields__] + (
                ["times"] if times != "uniform" else []):
            raise ValueError(f"process: {', '.join(wrong)} is for an interpolant; masked tokens have no such choice.")
        return _masking(masking.Masking(codes=codes, **fields))
    if kind == "diffusion":
        if fields or times != "uniform":
            raise ValueError(f"process: {', '.join(fields) or 'times'} is for an interpolant; Gaussian diffusion has "
                             "no such choice.")
        return _diffusion(gaussian_diffusion.gaussian_diffusion())
    return _interpolant(interpolant.Interpolant(**fields), times)


def check_sampling(process, settings):
    """Raises ValueError where the settings do not fit the process; the samplers check their own numbers."""
    known = SAMPLERS[process.kind]
    if settings.sampler and settings.sampler not in known:
        raise ValueError(f"sampler is {settings.sampler!r}; this generator's process has {', '.join(known)}.")
    if settings.guidance_channels < 0:
        raise ValueError(f"guidance_channels is {settings.guidance_channels}; it must be at least 0, which is all.")
    if settings.guidance_times and settings.guidance_noise:
        raise ValueError("guidance_times and guidance_noise are two ways to say one interval: give one of them.")
    for name in ("guidance_times", "guidance_noise"):
        if len(getattr(settings, name)) not in (0, 2):
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be two numbers, or none.")
    if process.kind == "masking":
        if settings.guidance_times or settings.guidance_noise:
            raise ValueError("guidance_times and guidance_noise are for processes in time; with masked tokens guidance "
                             "grows from none at the first step.")
        _decoding(settings)
    if process.kind == "diffusion" and settings.guidance_times:
        raise ValueError("guidance_times are those of an interpolant, 0 to 1; for a diffusion's use guidance_noise.")


def _guided(network_of_labels, labels, null, settings, level):
    interval = settings.guidance_times or None
    if settings.guidance_noise:
        interval = noise_levels(*settings.guidance_noise, level)
    return guided(network_of_labels, labels, null, settings.guidance, channels=settings.guidance_channels or None,
                  interval=interval)


def _diffusion(process):
    def corrupt(x, key, index):
        steps_key, noise_key = jax.random.split(key)
        steps = gaussian_diffusion.draw_steps(process, steps_key, index)
        noise = normal(example_keys(noise_key, index), 0, x.shape[1:])
        x_t = gaussian_diffusion.noised(process, x, steps, noise)
        return Corrupted(x_t, gaussian_diffusion.network_time(process, steps), (x, steps, noise))

    def loss(prediction, corrupted):
        return gaussian_diffusion.loss(process, prediction, *corrupted.truth)

    def sample(network_of_labels, labels, null, keys, shape, settings):
        stochastic = settings.sampler in ("", "ddpm")
        # Both on DDPM's grid, which ends at step 999, as EQ-VAE's own command runs DDIM; "ddim250" would end at 996.
        steps = gaussian_diffusion.respace(process, str(settings.evaluations))
        network = _guided(network_of_labels, labels, null, settings, gaussian_diffusion.noise_level(process))
        start, noise = normal(keys, 0, shape), lambda i: normal(keys, 1 + i, shape)
        if stochastic:
            return gaussian_diffusion.ddpm(steps, network, start, noise)
        return gaussian_diffusion.ddim(steps, network, start, noise, settings.eta)

    return Process("diffusion", lambda channels: 2 * channels, corrupt, loss, sample)


def _interpolant(path, times):
    if times not in ("uniform", "lognormal"):
        raise ValueError(f"process.times is {times!r}; it must be \"uniform\" or \"lognormal\".")

    def corrupt(x, key, index):
        times_key, noise_key = jax.random.split(key)
        t = interpolant.draw_times(path, times_key, index, times)
        noise = normal(example_keys(noise_key, index), 0, x.shape[1:])
        return Corrupted(interpolant.noised(path, x, t, noise), t, (x, t, noise))

    def loss(prediction, corrupted):
        return interpolant.loss(path, prediction, *corrupted.truth)

    def sample(network_of_labels, labels, null, keys, shape, settings):
        network = _guided(network_of_labels, labels, null, settings, path.noise_level)
        start, noise, sampler = normal(keys, 0, shape), lambda i: normal(keys, 1 + i, shape), settings.sampler or "sde"
        if sampler.startswith("sde"):
            return samplers.sde(path, network, start, noise, evaluations=settings.evaluations, form=settings.form,
                                norm=settings.norm, last_step=settings.last_step,
                                last_step_size=settings.last_step_size,
                                method="heun" if sampler == "sde-heun" else "euler")
        if sampler == "dopri5":
            return samplers.ode(path, network, start, method=sampler, rtol=settings.rtol, atol=settings.atol)
        return samplers.ode(path, network, start, method=sampler, evaluations=settings.evaluations)

    return Process("interpolant", lambda channels: channels, corrupt, loss, sample)


def _decoding(settings):
    """The masking.Decoding of a Sampling."""
    if settings.guidance < 1:
        raise ValueError(f"guidance is {settings.guidance}; with masked tokens it must be at least 1, which is none.")
    return masking.Decoding(settings.evaluations, settings.sampler or "arccos", settings.guidance - 1,
                            settings.choice_temperature, settings.inverse_temperature)


def _masking(recipe):
    def corrupt(x, key, index):
        ids, masked = recipe.corrupt(example_keys(key, index), x)
        return Corrupted(ids, jnp.zeros(len(x)), (x, masked))

    def loss(prediction, corrupted):
        return recipe.measure(prediction, *corrupted.truth)

    def sample(network_of_labels, labels, null, keys, shape, settings):
        network = lambda ids, labels: network_of_labels(ids, None, labels)
        ids = masking.generate(network, labels, null, keys, math.prod(shape), recipe.codes, _decoding(settings))
        return ids.reshape(-1, *shape)

    return Process("masking", None, corrupt, loss, sample)


def make_images(model, process, settings, decode):
    """(params, decoder's params, keys (B,), labels (B,)) -> (uint8 images (B,H,W,3), whether each is finite (B,)).

    To be jitted by the caller.

    model: a generator's network. decode: (its params, latents as the network knows them) -> images in [-1, 1]. 8 bits
    are DiT's: 127.5 x + 128, cut off, which gives every level back.
    """
    def images(params, decoder, keys, labels):
        network = lambda x, t, labels: predict(model, params, x, t, labels).prediction
        z = process.sample(network, labels, model.null, keys, latent_shape(model), settings)  # (B,h,w,C) or (B,h,w)
        pixels = decode(decoder, z)                                                    # (B,H,W,3)
        finite = jnp.isfinite(pixels).all((1, 2, 3))                                   # NaN would become 0
        return jnp.clip(127.5 * pixels + 128.0, 0.0, 255.0).astype(jnp.uint8), finite

    return images
