"""REPA on cached latents and their images: the paper's recipe, by size and patch, and small variants of it.

    --config=configs/repa.py:XL_2 --config.data.latents=DIR --config.alignment.encoder=dinov2:dinov2_vitb14_pretrain.pth
    --config=configs/repa.py:quickstart, :tiny, :small, :smoke
        as configs/sit.py; the encoder is a run of fashion_classifier.py

DIR is written by python -m eqvae_jax.encode --keep_images. 8-bit images are made as DiT's; REPA's own command cuts off
255 (x + 1) / 2, half a level darker. Source: [R] sihyun-yu/REPA and its paper.
"""

from pathlib import Path
from runpy import run_path

sit = run_path(str(Path(__file__).with_name("sit.py")))  # wherever this is started from
DEPTHS = {"S": 4, "B": 4, "L": 8, "XL": 8}  # [R]


def get_config(variant="XL_2"):
    config = sit["choose"](variant, "repa", recipe, quickstart, tiny, small, smoke)
    if variant.partition("_")[0] in DEPTHS:
        config.alignment.depth = DEPTHS[variant.partition("_")[0]]
    return config


def recipe():
    config = with_alignment(sit["recipe"]())
    config.data.mirror = False  # [R] no flips
    config.optimizer.clip_norm = 1.0  # [R]
    config.sampling.update(form="linear", guidance_channels=0)  # [R]; its paper's numbers: guidance 1.8 where t <= 0.7
    return config


def quickstart():
    config = with_alignment(sit["quickstart"]())
    config.alignment.update(depth=2, projector_size=256)
    return config


def tiny():
    config = with_alignment(sit["tiny"]())
    config.alignment.update(depth=2, projector_size=192)
    return config


def small():
    config = with_alignment(sit["small"]())
    config.alignment.update(depth=4, projector_size=512)
    return config


def smoke():
    config = with_alignment(sit["smoke"]())
    config.model.preset = "S/2"  # tokens no finer than what the classifier sees of latents at half the images' side
    config.alignment.update(depth=1, projector_size=8)
    return config


def with_alignment(config):
    """SiT's recipe, aligned after some blocks with an encoder that looks at the clean image."""
    config.alignment = dict(
        encoder="",  # dinov2:FILE, or workdir:DIR of a run of fashion_classifier.py
        depth=8,  # blocks before the projector
        weight=0.5,  # [R] lambda
        projector_size=2048,  # [R] width of its hidden layers
    )
    return config
