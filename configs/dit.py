"""DiT on cached latents: the paper's recipe, by size and patch, and small variants of it.

    --config=configs/dit.py:XL_2 --config.data.latents=DIR      any of S, B, L, XL with patches of 1, 2, 4, 8
    --config=configs/dit.py:quickstart, :tiny, :small, :smoke   as configs/sit.py

The recipe is SiT's own origin: configs/sit.py with DiT's process. Source: [D] facebookresearch/DiT and its paper.
"""

from pathlib import Path
from runpy import run_path

sit = run_path(str(Path(__file__).with_name("sit.py")))  # wherever this is started from


def get_config(variant="XL_2"):
    return sit["choose"](variant, "dit", recipe, quickstart, tiny, small, smoke)


def recipe():
    return with_diffusion(sit["recipe"]())


def quickstart():
    config = with_diffusion(sit["quickstart"]())
    config.sampling.update(sampler="ddim", evaluations=30)
    return config


def tiny():
    config = with_diffusion(sit["tiny"]())
    config.sampling.sampler = "ddim"
    return config


def small():
    config = with_diffusion(sit["small"]())
    config.sampling.sampler = "ddim"
    return config


def smoke():
    config = with_diffusion(sit["smoke"]())
    config.sampling.update(evaluations=2)
    return config


def with_diffusion(config):
    """SiT's recipe with Gaussian diffusion of 1000 steps, its noise predicted and its variance learnt."""
    config.process = dict(kind="diffusion")  # [D]
    config.sampling.sampler = "ddpm"  # [D]
    return config
