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
    return with_preset(sdvae["paper"]())


def quickstart():
    return with_preset(sdvae["quickstart"]())  # small, the two are one graph


def smoke():
    return with_preset(sdvae["smoke"]())


def with_preset(config):
    config.preset = "sdxl"
    return config
