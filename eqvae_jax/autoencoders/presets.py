"""The paper's autoencoders by name, and small ones of the same kinds for CPUs and tests."""

import dataclasses
from typing import NamedTuple

from eqvae_jax.autoencoders.blocks import PADDINGS
from eqvae_jax.autoencoders.coders import Autoencoder
from eqvae_jax.autoencoders.kl import AutoencoderKL
from eqvae_jax.autoencoders.vq import AutoencoderVQ

MODELS = {model.kind: model for model in (AutoencoderKL, AutoencoderVQ)}


class Preset(NamedTuple):
    """A graph, and the scale and shift at which its published weights hand latents to diffusion models."""

    model: Autoencoder
    scale: float = 1.0
    shift: float = 0.0


_F16 = dict(multipliers=(1, 1, 2, 2, 4), attention_levels=(4,))
_SMALL = dict(channels=16, multipliers=(1, 2, 4), blocks_per_level=1, groups=8)
_MIDDLE = dict(channels=32, multipliers=(1, 2, 4), blocks_per_level=2, groups=8)
_SMOKE = dict(channels=8, multipliers=(1, 2), blocks_per_level=1, groups=4)

PRESETS = {
    "sd": Preset(AutoencoderKL(), 0.18215),  # kl-f8 of latent-diffusion, Stable Diffusion's
    "sd16": Preset(AutoencoderKL(**_F16, latent_channels=16)),  # kl-f16; no scale was published
    "sdxl": Preset(AutoencoderKL(), 0.13025),  # SD-VAE's graph, other weights
    "sd3": Preset(AutoencoderKL(latent_channels=16, quant=False), 1.5305, 0.0609),
    "vqgan": Preset(AutoencoderVQ(**_F16, latent_channels=256, codebook_size=1024)),  # taming's imagenet_f16_1024
    # Each kind at a size that two CPU cores train in minutes, and at one that tests compile in seconds.
    "quickstart": Preset(AutoencoderKL(**_SMALL, latent_channels=8)),
    "fashion": Preset(AutoencoderKL(**_SMALL, latent_channels=4)),
    "small": Preset(AutoencoderKL(**_MIDDLE, latent_channels=4)),
    "vqgan-small": Preset(AutoencoderVQ(**_MIDDLE, attention_levels=(2,), latent_channels=8, codebook_size=256)),
    "sd16-quickstart": Preset(AutoencoderKL(**_SMALL | dict(multipliers=(1, 1, 2, 4), attention_levels=(3,)),
                                            latent_channels=16)),
    "sd3-quickstart": Preset(AutoencoderKL(**_SMALL, latent_channels=16, quant=False)),
    "vqgan-quickstart": Preset(AutoencoderVQ(**_SMALL, attention_levels=(2,), latent_channels=8, codebook_size=256)),
    "smoke": Preset(AutoencoderKL(**_SMOKE)),
    "sd16-smoke": Preset(AutoencoderKL(**_SMOKE, attention_levels=(1,))),
    "sd3-smoke": Preset(AutoencoderKL(**_SMOKE, quant=False), 1.5305, 0.0609),
    "vqgan-smoke": Preset(AutoencoderVQ(**_SMOKE, attention_levels=(1,), codebook_size=16)),
}

_HOW = ("dtype", "remat", "parent", "name")  # fields that say how a model is computed, not which one it is


def describe(model):
    """The model as plain values, {"kind": "kl", "channels": 128, ...}: what a run's config keeps of it."""
    fields = [field.name for field in dataclasses.fields(model) if field.name not in _HOW]
    return {"kind": model.kind} | {name: getattr(model, name) for name in fields}


def from_description(values):
    """The model that `describe` described; entries that are no fields of it are left out.

    Raises ValueError where the kind is not one of MODELS, or the padding not of PADDINGS.
    """
    kind = values.get("kind", "kl")
    if kind not in MODELS:
        raise ValueError(f"an autoencoder of kind {kind!r}; this version knows {', '.join(MODELS)}")
    names = {field.name for field in dataclasses.fields(MODELS[kind])} - set(_HOW)
    check_padding(values.get("padding", "zeros"))
    as_field = lambda value: tuple(value) if isinstance(value, (list, tuple)) else value
    return MODELS[kind](**{name: as_field(value) for name, value in values.items() if name in names})


def configured(model, settings):
    """The model with the dtype, remat and padding of a config's section `model`; padding "" is the model's own.

    Raises ValueError where the padding is not of PADDINGS.
    """
    check_padding(settings.padding or model.padding)
    return model.clone(dtype=settings.dtype, remat=settings.remat, padding=settings.padding or model.padding)


def check_padding(padding):
    if padding not in PADDINGS:
        raise ValueError(f"an autoencoder with padding {padding!r}; this version knows {', '.join(PADDINGS)}")


def names_of(model):
    """Names of the presets with exactly this graph, whatever it is computed in."""
    return [name for name, preset in PRESETS.items() if describe(preset.model) == describe(model)]
