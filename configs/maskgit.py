"""MaskGIT on cached tokens: the recipe of the PyTorch reproduction, which the paper trains, and small variants of it.

    --config=configs/maskgit.py --config.data.latents=DIR      base: 24 blocks of 768; also :big, :huge
    --config=configs/maskgit.py:quickstart                     minutes on two CPU cores: Fashion-MNIST's tokens
    --config=configs/maskgit.py:tiny, :small                   those of python -m eqvae_jax.reproduce
    --config=configs/maskgit.py:smoke                          seconds; for tests

DIR is written by python -m eqvae_jax.encode of a VQ autoencoder, from centre crops; [B] takes random crops. Source: [B]
Besnier & Chen (arXiv 2310.14400) and v1.0 of valeoai/Halton-MaskGIT.
"""

from pathlib import Path
from runpy import run_path

sit = run_path(str(Path(__file__).with_name("sit.py")))  # wherever this is started from


def get_config(variant="base"):
    variants = {"base": recipe, "big": recipe, "huge": recipe, "quickstart": quickstart, "tiny": tiny,
                "small": small, "smoke": smoke}
    if variant not in variants:
        raise ValueError(f"configs/maskgit.py has no variant {variant!r}; it has: {', '.join(variants)}")
    config = variants[variant]()
    if variants[variant] is recipe:
        config.model.preset = variant
    return config


def recipe():
    config = with_tokens(sit["recipe"]())
    config.model = dict(
        preset="base", depth=0, width=0, heads=0, mlp_size=0,  # what is not 0 replaces the size's own
        classes=0,  # 0: as many as the latents have
        dropout=0.1,  # [B]
        dtype="bfloat16", remat=False, scan=True, attention="auto",
    )
    config.data.batch_size = 512  # [B]
    config.optimizer.update(schedule="constant", warmup_steps=2500, b2=0.96, weight_decay=1e-5, clip_norm=1.0)  # [B]
    config.ema_decay = 0.0  # [B] none
    config.training.steps = 755_200  # [B] 300 epochs
    return config


def quickstart():
    config = with_tokens(sit["quickstart"]())
    config.model = dict(preset="base", depth=4, width=128, heads=4, mlp_size=512, classes=0,
                        dropout=0.0,  # drawing what to drop would take most of a CPU's step
                        dtype="float32", remat=False, scan=False, attention="auto")
    config.optimizer.update(b2=0.96, weight_decay=1e-5)
    config.ema_decay = 0.0  # [B] none; from its large embeddings an average would take long to come away
    config.sampling.update(evaluations=8, guidance=2.0)
    return config


def tiny():
    """On 8 x 8 codes, for reproduce.py: narrower than the quickstart, and guided, as the paper's MaskGIT is."""
    config = quickstart()
    reference = sit["tiny"]()
    config.model.update(width=96, mlp_size=384)
    config.data.update(batch_size=32, mirror=False, evaluation_limit=200)  # it sees 64 tokens where DiT sees 16 patches
    config.training.update(reference.training)
    config.training.steps = 800
    config.checkpoint.update(reference.checkpoint)
    return config


def small():
    config = tiny()
    reference = sit["small"]()
    config.model.update(depth=8, width=256, heads=4, mlp_size=1024)
    config.data.batch_size = reference.data.batch_size
    config.optimizer.learning_rate = reference.optimizer.learning_rate
    config.training.update(reference.training)
    config.checkpoint.update(reference.checkpoint)
    return config


def smoke():
    config = quickstart()
    reference = sit["smoke"]()
    config.model.update(depth=1, width=16, heads=2, mlp_size=32, dropout=0.1)
    config.data.update(batch_size=4, evaluation_batch_size=2, evaluation_limit=4)
    config.sampling.evaluations = 2
    for section in ("optimizer", "evaluation", "training"):
        config[section].update(reference[section])
    return config


def with_tokens(config):
    """SiT's config with MaskGIT's process: tokens have no scale, and no time."""
    del config.data.scale
    config.process = dict(
        kind="masking",
        schedule="arccos",  # [B] of a uniform draw: the probability with which each token is masked
        label_smoothing=0.1,  # [B]
        masked_only=False,  # [B] the loss is of all tokens
    )
    config.sampling = dict(
        sampler="arccos",  # [B] also linear, square, root, and the original's cosine
        evaluations=8,  # [B] steps
        guidance=4.0,  # [B] w = 3, at the last step
        choice_temperature=4.5, inverse_temperature=1.0,  # [B]
    )
    return config
