"""EQ fine-tuning of SD3-VAE: 16 latent channels, no convolutions around the latent, a latent shift beside the scale.

Variants as configs/eq_sdvae.py, whose recipe it is but for what stands here: the paper does not give another. The
published weights come without a discriminator, so a new one starts with the run.
"""

from pathlib import Path
from runpy import run_path

sdvae = run_path(str(Path(__file__).with_name("eq_sdvae.py")))  # wherever this is started from


def get_config(variant="paper"):
    return sdvae["choose"](variant, "eq_sd3vae", paper, quickstart, smoke)


def paper():
    config = sdvae["paper"]()
    config.preset = "sd3"
    return config


def quickstart():
    config = sdvae["quickstart"]()
    config.preset = "sd3"
    config.init = "init:sd3-quickstart"
    return config


def smoke():
    config = sdvae["smoke"]()
    config.preset = "sd3"
    config.init = "init:sd3-smoke"
    return config
