"""SiT on cached latents: the paper's recipe, by size and patch, and small variants of it.

    --config=configs/sit.py:XL_2 --config.data.latents=DIR      any of S, B, L, XL with patches of 1, 2, 4, 8
    --config=configs/sit.py:quickstart                          minutes on two CPU cores: Fashion-MNIST's latents
    --config=configs/sit.py:tiny, :small                        those of python -m eqvae_jax.reproduce
    --config=configs/sit.py:smoke                               seconds; for tests

DIR is written by python -m eqvae_jax.encode. Sources: [S] willisma/SiT's train.py and its paper, [D] DiT's, from which
SiT takes the recipe.
"""

import re

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(variant="XL_2"):
    return choose(variant, "sit", recipe, quickstart, tiny, small, smoke)


def choose(variant, file, recipe, *functions):
    """The config of the function that is called as the variant, or the recipe at a size such as B_2."""
    variants = {function.__name__: function for function in functions}
    if variant in variants:
        return variants[variant]()
    if not re.fullmatch(r"(S|B|L|XL)_[1248]", variant):
        raise ValueError(f"configs/{file}.py has no variant {variant!r}; it has a size and a patch size, such as B_2 "
                         f"(S, B, L, XL; 1, 2, 4, 8), and {', '.join(variants)}")
    config = recipe()
    config.model.preset = variant.replace("_", "/")
    return config


def recipe():
    config = ConfigDict()
    config.task = "generator"  # of main.TASKS
    config.seed = 0  # [D]
    config.init = ""  # weights to start from: workdir:DIR, or a public file as dit:FILE; "": drawn

    config.data = dict(
        latents="",  # DIR of a cache
        evaluation="",  # another, of held-out images and the same autoencoder; "": the first latents of the same
        autoencoder="",  # that decodes previews; "": where the cache says it came from
        scale="autoencoder",  # "measured": latents are brought to mean 0 and standard deviation 1
        batch_size=256,  # [D] per update, over all devices
        mirror=True,  # [D] half of the images are mirrored
        evaluation_batch_size=64,  # rounded up to the devices
        evaluation_limit=512,
    )

    # A published size; what is not 0 beside it replaces the size's own.
    config.model = dict(
        preset="XL/2", depth=0, width=0, heads=0, patch_size=0, mlp_ratio=4.0, qk_norm=False,
        classes=0,  # 0: as many as the latents have
        dtype="bfloat16",  # of the blocks' matrix products; parameters, norms, softmax and losses are float32
        remat=False,  # recompute blocks in the backward pass: less memory, a third more time
        scan=True,  # one compiled block for all: compiles in the time of one
        attention="auto",  # "cudnn" or "xla", or whichever the device can do
    )
    config.process = dict(
        kind="interpolant",
        path="linear", prediction="velocity", loss_weight="",  # [S]
        times="uniform",  # [S]
        train_eps=placeholder(float), sample_eps=placeholder(float),  # cut off the ends of time; none: [S]
    )
    config.alignment = dict()  # configs/repa.py's
    config.label_dropout = 0.1  # [D] share of labels replaced by "no label", for guidance

    # How previews and evaluation make samples; sample.py takes these unless its flags say otherwise.
    config.sampling = dict(
        sampler="sde",  # [S] the paper's numbers; also sde-heun, euler, heun, dopri5
        evaluations=250,  # [S] of the network
        guidance=1.0, guidance_channels=3,  # [S] of the first three of four channels
        guidance_times=(), guidance_noise=(),  # where to: low <= t <= high, or low < sigma <= high; (): everywhere
        form="sigma", norm=1.0, last_step="mean", last_step_size=0.04,  # [S] of the SDE
        eta=0.0,  # of DDIM
        rtol=1e-3, atol=1e-6,  # [S] of dopri5
    )

    config.optimizer = dict(learning_rate=1e-4, schedule="constant", warmup_steps=0, b1=0.9, b2=0.999, eps=1e-8,
                            weight_decay=0.0, clip_norm=0.0)  # [D]
    config.ema_decay = 0.9999  # [D]

    # A number to watch while training: it is of few samples, and no FID to publish. Off without features.
    config.evaluation = dict(
        preview=16, batch_size=16,  # samples in a picture; samples made at once
        features="",  # inception, or workdir:DIR of a run of configs/fashion_classifier.py
        inception="", protocol="adm",  # weights of Inception, and whose resizing
        reference="",  # FILE.npz of statistics, or real images
        samples=2000,
    )
    config.training = dict(
        steps=400_000,  # [D] of the paper's tables; the published models have 7 M
        accumulate=1,  # parts of a batch that are computed one after another, for memory
        log_every=100, eval_every=10_000, preview_every=10_000,
        max_skipped=20,  # stop (at the next log or save) after so many updates in a row with non-finite gradients
    )
    config.checkpoint = dict(every=10_000, keep=3, keep_best=0, best_metric="", best_mode="min")
    # fsdp=N splits parameters and optimizer over N devices, by size or as rules say: training/sharding.py. XL on chips
    # of 16 GB needs it, and model.remat=True: docs/plans.md.
    config.mesh = dict(data=-1, fsdp=1, min_shard_size=2**18, rules=())
    config.stages = dict()
    return config


def quickstart():
    """A small transformer on 7 x 7 latents of Fashion-MNIST (configs/eq_sdvae.py:fashion)."""
    config = recipe()
    config.model.update(preset="S/1", depth=4, width=128, heads=2, dtype="float32", scan=False)
    config.data.update(scale="measured", batch_size=64, evaluation_batch_size=100, evaluation_limit=1000)
    config.sampling.update(sampler="heun", evaluations=30, guidance=1.5, guidance_channels=0)
    config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=100, clip_norm=1.0)
    config.ema_decay = 0.998
    config.evaluation.update(preview=50, batch_size=50, samples=500)
    config.training.update(steps=2500, log_every=100, eval_every=1250, preview_every=1250)
    config.checkpoint.update(every=500, keep=1)
    return config


def tiny():
    """On 8 x 8 latents in patches of 2, for reproduce.py: a small part of the quickstart's work. No guidance."""
    config = quickstart()
    config.model.update(preset="S/2", width=96)
    config.data.update(mirror=False, evaluation_limit=500)  # Fashion-MNIST's shoes all point one way
    config.sampling.update(evaluations=20, guidance=1.0)
    config.ema_decay = 0.995
    config.training.update(steps=1000, eval_every=500, preview_every=0)
    config.checkpoint.every = 500
    return config


def small():
    """The same on a GPU: 10 million parameters, larger and more steps, finer sampling."""
    config = tiny()
    config.model.update(depth=8, width=256, heads=4)
    config.data.update(batch_size=256)
    config.sampling.update(evaluations=50)
    config.optimizer.learning_rate = 5e-4
    config.ema_decay = 0.999
    config.training.update(steps=10_000, eval_every=2500)
    config.checkpoint.every = 2500
    return config


def smoke():
    config = quickstart()
    config.model.update(depth=1, width=16, heads=2)
    config.data.update(batch_size=4, evaluation_batch_size=2, evaluation_limit=4)
    config.sampling.update(evaluations=2)
    config.optimizer.update(schedule="constant", warmup_steps=0)
    config.evaluation.update(preview=2, batch_size=2, samples=4)
    config.training.update(steps=2, log_every=1, eval_every=2, preview_every=2)
    return config
