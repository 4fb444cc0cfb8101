"""EQ fine-tuning of SD-VAE-16 (latent-diffusion's kl-f16): f = 16, 16 channels, attention at the lowest level.

Variants as configs/eq_sdvae.py, whose recipe it is but for what stands here: the paper does not give another.
"""

from pathlib import Path
from runpy import run_path

sdvae = run_path(str(Path(__file__).with_name("eq_sdvae.py")))  # wherever this is started from


def get_config(variant="paper"):
    return sdvae["choose"](variant, "eq_sdvae16", paper, quickstart, smoke)


def paper():
    config = sdvae["paper"]()
    config.preset = "sd16"
    # Sixteenths: of the released grid of 32nds every other size is no whole number of 16-pixel latents.
    config.equivariance.sizes = tuple(range(4, 16))
    return config


def quickstart():
    """At f = 8, the most that 64 pixels leave anything of to turn."""
    config = sdvae["quickstart"]()
    config.preset = "sd16"
    config.init = "init:sd16-quickstart"
    config.data.image_size = 64
    config.equivariance.sizes = (2, 4, 6, 8)  # of 8
    return config


def smoke():
    config = sdvae["smoke"]()
    config.preset = "sd16"
    config.init = "init:sd16-smoke"
    return config
