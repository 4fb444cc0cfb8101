"""EQ fine-tuning of VQ-GAN (taming-transformers' imagenet_f16_1024): tau acts on the features before quantisation.

Variants as configs/eq_sdvae.py. Sources: [T] taming-transformers' imagenet_vqgan.yaml and VQLPIPSWithDiscriminator; the
transform and what is not named here are those of eq_sdvae.py, since no VQ code was released.
"""

from pathlib import Path
from runpy import run_path

sdvae = run_path(str(Path(__file__).with_name("eq_sdvae.py")))  # wherever this is started from


def get_config(variant="paper"):
    return sdvae["choose"](variant, "eq_vqgan", paper, quickstart, fashion, tiny, small, photos, trial, smoke)


def paper():
    config = with_codebook(sdvae["paper"]())
    config.data.batch_per_device = 12  # [T]
    config.training.accumulate = 1  # [T]
    # [T] starts its discriminator at step 250,001, which the published weights have behind them.
    config.loss.update(disc_weight=0.8, disc_start=0)  # [T]
    config.optimizer.learning_rate = 4.3e-4  # [T] 4.5e-6 x 8 GPUs x batch 12
    # Sixteenths: of the released grid of 32nds every other size is no whole number of 16-pixel latents.
    config.equivariance.sizes = tuple(range(4, 16))
    return config


def quickstart():
    return with_codebook(sdvae["quickstart"](), init="init:vqgan-quickstart")


def fashion():
    """The quickstart on images of 28 pixels, whose 7 x 7 codes MaskGIT learns in minutes."""
    return with_codebook(sdvae["fashion"](), init="init:vqgan-quickstart")


def tiny():
    return with_codebook(sdvae["tiny"](), init="init:vqgan-quickstart")


def small():
    return with_codebook(sdvae["small"](), init="init:vqgan-small")


def photos():
    return with_codebook(sdvae["photos"](), init="init:vqgan-quickstart")


def trial():
    config = smoke()
    config.stages = dict()
    return config


def smoke():
    return with_codebook(sdvae["smoke"](), init="init:vqgan-smoke")


def with_codebook(config, init=""):
    """A KL recipe turned into VQ-GAN's: a codebook loss in the place of the posterior's; losses are means."""
    config.init, config.preset = init, "vqgan"
    del config.loss.kl_weight
    config.loss.codebook_weight = 1.0  # [T]
    config.loss.codebook_beta = 0.25  # [T]
    config.loss.codebook_legacy = True  # [T] beta weighs the codebook's part, not the commitment as VQ-VAE has it
    return config
