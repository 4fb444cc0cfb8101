"""Weights in and out: strict tables and layout changes, and the only place that reads other people's files."""

from eqvae_jax.weights.autoencoders import (
    AutoencoderSpec,
    Opened,
    load_autoencoder,
    open_autoencoder,
    save_autoencoder,
)
from eqvae_jax.weights.dinov2 import DINOv2Spec, load_dinov2
from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.generators import GENERATOR_OPTIONS, GeneratorSpec, load_generator, save_generator
from eqvae_jax.weights.inception import InceptionSpec, fetch_inception, load_inception
from eqvae_jax.weights.loss_networks import Critic, LossWeights, load_loss
from eqvae_jax.weights.lpips import fetch_lpips, load_lpips
from eqvae_jax.weights.references import Reference, parse_reference

__all__ = [
    "GENERATOR_OPTIONS",
    "AutoencoderSpec",
    "Critic",
    "DINOv2Spec",
    "GeneratorSpec",
    "InceptionSpec",
    "LossWeights",
    "Opened",
    "Reference",
    "WeightsError",
    "fetch_inception",
    "fetch_lpips",
    "load_autoencoder",
    "load_dinov2",
    "load_generator",
    "load_inception",
    "load_loss",
    "load_lpips",
    "open_autoencoder",
    "parse_reference",
    "save_autoencoder",
    "save_generator",
]
