"""EQ fine-tuning of SD-VAE (kl-f8): the paper's recipe, and small variants of it.

    --config=configs/eq_sdvae.py                the paper's, at full size; needs --config.data.train and --config.init
    --config=configs/eq_sdvae.py:quickstart     minutes on two CPU cores: before / control / EQ on photographs
    --config=configs/eq_sdvae.py:fashion        the same on Fashion-MNIST, for the generators' quickstart; needs
        --config.data.train=idx:DIR:train --config.data.evaluation=idx:DIR:test
    --config=configs/eq_sdvae.py:tiny, :small   one training of python -m eqvae_jax.reproduce, on the same data
    --config=configs/eq_sdvae.py:photos         likewise, on crops of photographs
    --config=configs/eq_sdvae.py:smoke, :trial  seconds; for tests

The other autoencoders' configs are this one with what differs. Sources: [C] the released train_eqvae configuration
and code, [P] the paper. What is [B] goes beyond it, is off, and is described with its sources in docs/beyond.md.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(variant="paper"):
    return choose(variant, "eq_sdvae", paper, quickstart, fashion, tiny, small, photos, trial, smoke)


def choose(variant, file, *functions):
    """The config of the function that is called as the variant."""
    variants = {function.__name__: function for function in functions}
    if variant not in variants:
        raise ValueError(f"configs/{file}.py has no variant {variant!r}; it has: {', '.join(variants)}")
    return variants[variant]()


def paper():
    config = ConfigDict()
    config.task = "autoencoder"  # of main.TASKS
    config.seed = 23  # [C]

    # Weights to start from: diffusers:DIR_OR_HUB_ID, ldm:FILE, taming:FILE, workdir:DIR, or init:PRESET, random ones.
    config.init = ""
    config.preset = "sd"  # whose latent scale and shift weights have where their file does not say
    config.model = dict(
        dtype="bfloat16",  # of convolutions; parameters, normalisation, softmax and losses are float32
        remat=True,  # 0.55 instead of 2.76 GiB of activations an image
        # [B] What convolutions see beyond the border: "zeros" or "reflect"; "reflect_but_downsampling" for weights that
        # were trained under torch's padding_mode="reflect", as Anzhc's MS-LC-EQ-D-VR. "": as config.init has it.
        padding="",
    )

    config.data = dict(
        train="",  # folder:DIR, arrayrecord:GLOB, tfds:NAME, idx:DIR or photos; the paper's is OpenImages
        evaluation="photos:test",  # held out; measured every eval_every steps
        image_size=256,  # [C]
        batch_per_device=10,  # [C] images in one forward pass
        batch_size=0,  # images per update, over all devices; 0: batch_per_device x devices x accumulate
        crop="random",  # [C]; "center" is ADM's centre crop
        min_crop=0.5, max_crop=1.0,  # [C] side of the random square crop over the image's short side
        flip=False,  # [C]
        workers=0,  # reader processes; 0: threads
        broken_limit=0.01,  # the run stops when more than this share of the images cannot be read
        evaluation_batch_size=8, evaluation_limit=256, evaluation_crops=1,  # limit 0: all; crops > 1: random ones
    )

    config.equivariance = dict(
        sizes=tuple(range(8, 32)),  # [C] latent sides to scale to, of 32: s = 8/32 .. 31/32
        turns=(1, 2, 3),  # [C] quarter turns; (0,) for scaling only
        anisotropic=False,  # [C]
        p_equivariance=0.5,  # [C] called p_prior there; the paper's 1 - p_alpha
        p_low_resolution=0.25,  # [C] given that the equivariance branch was not taken; the paper has no such branch
        method="bilinear", antialias=False,  # [C]; the paper says bicubic
        # "explicit" and "explicit_stop_gradient" are the ablation of [P] A.1: plain reconstruction, and
        # loss.explicit_weight x ||tau E(x) - E(tau x)||^2 whenever the equivariance branch is taken.
        objective="implicit",
        # [B] The equivariance branch also shifts the image by up to so many pixels, and the latent by the downsampling
        # factor less: AF-LDM (arXiv 2503.09419), whose VAE goes up to 3/8 of the side. 0: no shifts.
        max_shift=0,
    )

    config.loss = dict(
        kl_weight=1e-6,  # [C]
        perceptual_weight=1.0,  # [C]
        lpips_weights="",  # file or directory of LPIPS weights, or "download"; "": those in config.init's file
        disc_weight=0.5, disc_factor=1.0, disc_start=0,  # [C]
        disc_width=64, disc_layers=3,  # [C] PatchGAN
        # Its batch statistics: of the whole batch, whatever the devices, or "per_device" as [C], of 10 images each.
        disc_batch_norm="synchronised",
        logvar=placeholder(float),  # [C] constant: in no optimizer there. None: config.init's, where it says, or 0
        from_init=True,  # go on with the discriminator, logvar and LPIPS of config.init, where its file has them
        explicit_weight=0.1,  # [P] table 7; only equivariance.objective="explicit..." uses it
        # [B] Plain steps add so much of a second reconstruction, of the image shrunk by one of the factors from the
        # latent shrunk alike: Skorokhodov et al. (arXiv 2502.14831), who take 0.25, and 2 to 4. 0: none.
        scale_equivariance_weight=0.0, scale_equivariance_factors=(2, 4),
        # [B] Decode (1 - t) z + t x this x standard normal noise, t uniform in 0..1 for each image: l-DeTok
        # (arXiv 2507.15856), which takes 3.0. In the unit of the latents, and SD-VAE's are about 5.5 wide. 0: none.
        latent_noise=0.0,
    )

    # [C] Adam, no weight decay, clipping or schedule. The released command gives 4.5e-6 x 8 GPUs x batch 10 x
    # accumulation 2 = 7.2e-4, but its resume also restores the learning rate inside kl-f8's checkpoint, which
    # may be lower: if losses jump at the start, try 1e-4.
    config.optimizer = dict(learning_rate=7.2e-4, schedule="constant", warmup_steps=0, b1=0.5, b2=0.9, eps=1e-8,
                            weight_decay=0.0, clip_norm=0.0)
    config.ema_decay = 0.0  # 0: no average. The authors' eq-vae-ema has one of unpublished decay

    config.training = dict(
        steps=50_000,  # [P] 5 epochs of OpenImages; "10K steps" an epoch at 160 images an update
        accumulate=2,  # [C] micro-batches an update, each with its own tau
        log_every=50, eval_every=1000, preview_every=1000,
        max_skipped=20,  # stop (at the next log or save) after so many updates in a row with non-finite gradients
        warm_up=True,  # compile all sizes of tau in the background from the first step on
    )
    config.checkpoint = dict(every=1000, keep=3, keep_best=1, best_metric="psnr", best_mode="max")
    # fsdp=N splits parameters and optimizer over N devices, by size or as rules say: training/sharding.py.
    config.mesh = dict(data=-1, fsdp=1, min_shard_size=2**18, rules=())
    # Runs made of several trainings list them here by name; each overrides what it names.
    config.stages = dict()
    return config


def quickstart():
    """A small SD-VAE on photographs: trained plainly, then fine-tuned with EQ and, as a control, plainly on."""
    config = paper()
    config.init = "init:quickstart"
    config.model.update(dtype="float32", remat=False)
    config.data.update(train="photos:train", evaluation="photos:test", image_size=48, batch_per_device=8, min_crop=0.3,
                       flip=True,  # nine photographs: every bit of variety helps
                       evaluation_batch_size=16, evaluation_limit=0, evaluation_crops=16)
    config.equivariance.update(sizes=(3, 5, 8, 12))  # of 12: s = 0.25, 0.42, 0.67 and turning alone
    config.loss.update(perceptual_weight=0.0, disc_weight=0.0)  # no downloaded weights; too short for a GAN
    config.optimizer.update(learning_rate=2e-3, b1=0.9, b2=0.99, schedule="cosine", warmup_steps=20, clip_norm=0.0)
    config.training.update(steps=700, accumulate=1, log_every=50, eval_every=200, preview_every=0, warm_up=False)
    config.checkpoint.update(every=500, keep=1, keep_best=0, best_metric="")
    plain = dict(p_equivariance=0.0, p_low_resolution=0.0)
    config.stages = dict(
        before=dict(equivariance=plain),
        control=dict(init="workdir:{workdir}/before", equivariance=plain, training=dict(steps=400)),
        eq=dict(init="workdir:{workdir}/before", training=dict(steps=400)),
    )
    return config


def fashion():
    """The quickstart on images of 28 pixels, whose latents of 7 x 7 x 4 a generator learns in minutes."""
    config = quickstart()
    config.init = "init:fashion"
    config.data.update(train="", evaluation="", image_size=28, batch_per_device=16, crop="center", min_crop=1.0,
                       evaluation_batch_size=50, evaluation_limit=500, evaluation_crops=1)
    config.equivariance.update(sizes=(2, 3, 5, 7))  # of 7
    config.training.update(steps=1200)
    config.stages.control.training.steps = 600
    config.stages.eq.training.steps = 600
    return config


def tiny():
    """One training on Fashion-MNIST at 32 pixels, for reproduce.py: 8 x 8 latents, and EQ as the paper's text says."""
    config = fashion()
    config.stages = dict()
    config.data.update(image_size=32, evaluation_limit=200)
    config.equivariance.update(sizes=(2, 4, 6),  # of 8: the scales that S(s) is measured at
                               p_low_resolution=0.0)
    config.training.update(steps=800, log_every=100, eval_every=0)
    return config


def small():
    """The same on a GPU: a larger network, and more and larger steps."""
    config = tiny()
    config.init = "init:small"
    config.data.update(batch_per_device=64, workers=4, evaluation_batch_size=100)
    config.equivariance.sizes = (2, 3, 4, 5, 6, 7)
    config.training.update(steps=3000, log_every=200)
    return config


def photos():
    """One training on crops of photographs, for reproduce.py: the quickstart's network, and EQ as the paper says."""
    config = quickstart()
    config.stages = dict()
    config.data.update(batch_per_device=16, evaluation_crops=4)
    config.equivariance.update(sizes=(3, 6, 9),  # of 12
                               p_low_resolution=0.0)
    config.training.update(steps=600, log_every=100, eval_every=0)
    return config


def trial():
    """One training of the smoke variant: what reproduce.py makes where it only shows that it runs."""
    config = smoke()
    config.stages = dict()
    return config


def smoke():
    config = quickstart()
    config.init = "init:smoke"
    config.data.update(image_size=32, batch_per_device=2, evaluation_batch_size=2, evaluation_limit=2,
                       evaluation_crops=1)
    config.equivariance.update(sizes=(8,), p_equivariance=1.0)
    config.optimizer.update(schedule="constant", warmup_steps=0)
    config.training.update(steps=2, log_every=1, eval_every=2)
    config.stages.control.training.steps = 2
    config.stages.eq.training.steps = 2
    return config
