"""EQ fine-tuning of SDXL-VAE: SD-VAE's graph with other weights and another latent scale, 0.13025.

Variants as configs/eq_sdvae.py, whose recipe it is: the paper does not give another. The published weights come
without a discriminator, so a new one starts with the run.
"""

from pathlib import Path
from runpy import run_path

sdvae = run_path(str(Path(__file__).with_name("eq_sdvae.py")))  # wherever this is started from


def get_config(variant="paper"):
    return sdvae["choose"](variant, "eq_sdxlvae", paper, quickstart, smoke)


def paper():
    config = sdvae["paper"]()
    config.published.update(reference="diffusers:stabilityai/sdxl-vae", preset="sdxl")
    return config


def quickstart():
    return sdvae["quickstart"]()  # small, the two are one graph


def smoke():
    return sdvae["smoke"]()
