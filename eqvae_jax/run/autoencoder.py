"""Wires the training of an autoencoder: configs/eq_*.py."""

import dataclasses

from absl import logging

# JAX and all that imports it is imported where it is first needed: a config that cannot work is refused in a second.

NEEDS = """This config needs:
{needs}
Try it without either, on photographs that ship with the installed packages and on random weights:
  --config.data.train=photos --config.init=init:{preset}
or see the method work in minutes on a CPU: the variant :quickstart of this config"""
NEEDS_DATA = """  images to train on: --config.data.train=folder:DIR (any tree of JPEG or PNG files), arrayrecord:GLOB,
    tfds:NAME. The paper's are the 1.7 million of OpenImages.
    To shard a folder: python -m eqvae_jax.data.preparation --help"""
NEEDS_INIT = """  weights to start from: --config.init={published},
    or another of diffusers:DIR_OR_HUB_ID, ldm:FILE, taming:FILE, workdir:DIR (a run of this project)."""
NEEDS_LPIPS = """  weights of the perceptual loss: --config.loss.lpips_weights=download (553 MB), or a directory
    that holds vgg16-397923af.pth and vgg.pth, or a file with both (a .ckpt of latent-diffusion or
    taming-transformers has them; as config.init it is looked into of itself);
    or --config.loss.perceptual_weight=0 to train without."""


# config.preset -> where the weights of the paper's starting point are
PUBLISHED = {
    "sd": "diffusers:stabilityai/sd-vae-ft-ema (335 MB)",
    "sd16": "ldm:FILE, with model.ckpt of latent-diffusion's kl-f16",
    "sdxl": "diffusers:stabilityai/sdxl-vae",
    "sd3": "diffusers:stabilityai/stable-diffusion-3-medium-diffusers/vae (gated)",
    "vqgan": "taming:FILE, with last.ckpt of taming-transformers' vqgan_imagenet_f16_1024",
}
PADDINGS = ("", "zeros", "reflect", "reflect_but_downsampling")  # of autoencoders.blocks, and that of config.init
CARRIERS = ("ldm:", "taming:")  # their files may hold the loss's networks beside the autoencoder, and never a scale


def refuse(config, needs):
    """Raises ValueError with what a config needs, if anything."""
    if needs:
        raise ValueError(NEEDS.format(needs="\n".join(needs), preset=config.preset))


def preflight(config):
    """Resolves and checks what can be checked without JAX; raises ValueError that says what to set.

    `init:` starts from random weights, which is a trial of the machinery and nothing the recipe could fine-tune:
    there the perceptual loss, unless its weights are named, is off, and the log says so.
    """
    needs = [] if config.data.train else [NEEDS_DATA]
    needs += [] if config.init else [NEEDS_INIT.format(published=PUBLISHED[config.preset])]
    if config.loss.perceptual_weight and not config.loss.lpips_weights:
        if config.init.startswith("init:"):
            logging.warning("%s is random weights and loss.lpips_weights is not set: the perceptual loss is off.",
                            config.init)
            config.loss.perceptual_weight = 0.0
        elif config.init and not (config.loss.from_init and config.init.startswith(CARRIERS)):
            needs.append(NEEDS_LPIPS)
    refuse(config, needs)
    for name in ("p_equivariance", "p_low_resolution"):
        if not 0 <= config.equivariance[name] <= 1:
            raise ValueError(f"equivariance.{name} is {config.equivariance[name]}; it is a probability, 0 to 1.")
    if config.training.accumulate < 1:
        raise ValueError(f"training.accumulate is {config.training.accumulate}; it must be at least 1.")
    if config.model.dtype not in ("float32", "bfloat16"):
        raise ValueError(f'model.dtype is {config.model.dtype!r}; it must be "float32" or "bfloat16".')
    if config.model.padding not in PADDINGS:
        raise ValueError(f"model.padding is {config.model.padding!r}; it must be one of "
                         f"{', '.join(map(repr, PADDINGS))}.")


def train(config, workdir):
    """Trains one config in `workdir`, going on where a former one stopped; returns 0 or an interruption's exit code."""
    from clu import parameter_overview

    from eqvae_jax import weights
    from eqvae_jax.autoencoders import presets
    from eqvae_jax.autoencoders.task import autoencoder_task, check
    from eqvae_jax.run.images import open_images
    from eqvae_jax.training import loop
    from eqvae_jax.training.checkpoint import saved_steps
    from eqvae_jax.training.sharding import make_mesh
    from eqvae_jax.training.workdir import saved_value

    mesh, data, accumulate = make_mesh(config.mesh), config.data, config.training.accumulate
    source, batches = open_images(config)  # a mistyped directory shows before anything is downloaded
    model, params, spec = weights.load_autoencoder(config.init, seed=config.seed)
    seen = batches.identity
    batches = batches._replace(identity=lambda: seen() | {config.init: spec.hash})
    spec = with_published_scale(config, model, spec)
    if config.model.padding not in ("", model.padding):
        logging.info("%s was trained with padding %r and goes on with %r.", config.init, model.padding,
                     config.model.padding)
    model = presets.configured(model, config.model)
    if not data.batch_size:  # a run keeps the batch it began with when it goes on with other devices
        data.batch_size = (saved_value(workdir, "data.batch_size")
                           or data.batch_per_device * mesh.size * accumulate)
    check(config, model, mesh)
    with config.unlocked():  # what weights.load_autoencoder("workdir:...") rebuilds the model from
        config.autoencoder = presets.describe(model) | dict(scale=spec.scale, shift=spec.shift)
    lpips, critic = loss_networks(config, resuming=bool(saved_steps(workdir)))
    describe(config, model, spec, mesh, len(source), parameter_overview.count_parameters(params))
    task = autoencoder_task(config, model, params, mesh, lpips, critic)
    return loop.train(task, batches, config, workdir, mesh)[1]


def with_published_scale(config, model, spec):
    """The spec, with the scale and shift of config.preset where the file cannot say: SDXL's looks like SD's."""
    from eqvae_jax.autoencoders import presets

    preset = presets.PRESETS[config.preset]
    if config.init.startswith(CARRIERS) and presets.describe(preset.model) == presets.describe(model):
        return dataclasses.replace(spec, scale=preset.scale, shift=preset.shift)
    return spec


def loss_networks(config, resuming=False):
    """(parameters of LPIPS or None, a trained discriminator's variables or None) of a config, and resolves its logvar.

    Released training checkpoints hold both networks: a discriminator that knows this autoencoder spares the new one's
    first, wild steps; a run that is resumed has its own. Raises ValueError where LPIPS is needed and not found, or a
    discriminator is of another shape.
    """
    from eqvae_jax import weights

    loss, found = config.loss, weights.LossWeights()
    if loss.from_init:
        found = weights.load_loss(config.init, discriminator=bool(loss.disc_weight) and not resuming,
                                  lpips=bool(loss.perceptual_weight) and not loss.lpips_weights)
    lpips = critic = None
    if loss.perceptual_weight:
        lpips = weights.load_lpips(loss.lpips_weights) if loss.lpips_weights else found.lpips
        refuse(config, [] if lpips else [NEEDS_LPIPS])
    if found.discriminator:
        shape = (found.discriminator.width, found.discriminator.layers)
        if shape != (loss.disc_width, loss.disc_layers):
            raise ValueError(
                f"the discriminator in {config.init} has width {shape[0]} and {shape[1]} layers, the config "
                f"{loss.disc_width} and {loss.disc_layers}: set --config.loss.disc_width={shape[0]} "
                f"--config.loss.disc_layers={shape[1]}, or --config.loss.from_init=False to start a new one.")
        critic = {"params": found.discriminator.params, "batch_stats": found.discriminator.batch_stats}
        print(f"{config.init}: going on with the discriminator in it.")
    if loss.logvar is None:
        loss.logvar = found.logvar or 0.0
    return lpips, critic


def describe(config, model, spec, mesh, images, parameters):
    """Prints, before the first step, the numbers that decide what a run costs and does."""
    data, accumulate, eq = config.data, config.training.accumulate, config.equivariance
    print(f"{data.train}: {images:,} images at {data.image_size} pixels. {config.init}: {parameters:,} parameters, "
          f"computed in {config.model.dtype}; latents x {spec.scale:g}"
          f"{f' after - {spec.shift:g}' if spec.shift else ''}.\nBatch {data.batch_size} = {mesh.size} devices x "
          f"{data.batch_size // (mesh.size * accumulate)} x accumulation {accumulate}.", end=" ")
    if eq.p_equivariance or eq.p_low_resolution:
        side = data.image_size // model.downsampling
        print(f"tau: {len(eq.sizes)} scales from {min(eq.sizes) / side:.3g} to {max(eq.sizes) / side:.3g}, "
              f"P(equivariance) {eq.p_equivariance}, P(low resolution) "
              f"{(1 - eq.p_equivariance) * eq.p_low_resolution:.3g}"
              f"{f', shifts of up to {eq.max_shift} pixels' if eq.p_equivariance and eq.max_shift else ''}.")
    else:
        print("Plain training, without tau.")
