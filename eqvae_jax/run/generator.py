"""Wires the training of a generator on cached latents: configs/dit.py, configs/sit.py."""

# JAX and all that imports it is imported where it is first needed: a config that cannot work is refused in a second.

NEEDS = """This config needs a cache of latents: --config.data.latents=DIR, which
  python -m eqvae_jax.encode --autoencoder=REFERENCE --images=REFERENCE --output=DIR
writes. To see a generator learn in minutes on a CPU: the README, "Train a generator"."""
NEEDS_REFERENCE = """evaluation.features is {features}: a Fréchet distance needs real images to compare with, as
  --config.evaluation.reference=FILE.npz or any reference to images, folder:DIR and the like;
  --config.evaluation.features="" trains without."""
NO_DECODER = """The autoencoder of these latents cannot be opened, and previews show decoded samples:
  {error}
Name it: --config.data.autoencoder=REFERENCE; or train without pictures: --config.training.preview_every=0
--config.evaluation.features=""."""


def preflight(config):
    """Checks what can be checked without JAX; raises ValueError that says what to set."""
    if not config.data.latents:
        raise ValueError(NEEDS)
    if config.evaluation.features and not config.evaluation.reference:
        raise ValueError(NEEDS_REFERENCE.format(features=config.evaluation.features))
    if config.data.scale not in ("autoencoder", "measured"):
        raise ValueError(f"data.scale is {config.data.scale!r}; it must be \"autoencoder\" or \"measured\".")
    if config.model.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype is {config.model.dtype!r}; it must be \"float32\" or \"bfloat16\".")


def train(config, workdir):
    """Trains one config in `workdir`, going on where a former run stopped; returns 0, or 1 if it was interrupted."""
    from clu import parameter_overview

    from eqvae_jax.data import latents as cache
    from eqvae_jax.generators import dit
    from eqvae_jax.generators.process import Sampling, check_sampling, make_process
    from eqvae_jax.generators.task import check, generator_task
    from eqvae_jax.training import loop
    from eqvae_jax.training.sharding import make_mesh

    mesh, data = make_mesh(config.mesh), config.data
    latents = cache.open_latents(data.latents)
    held_out = cache.open_latents(data.evaluation) if data.evaluation else latents
    latents.space.require(held_out.space)
    space = chosen_space(latents, data.scale)
    process, sampling = make_process(**config.process), Sampling(**config.sampling)
    check_sampling(process, sampling)
    model = build(config.model, latents, process)
    check(config, model, process, latents.shape, mesh)
    with config.unlocked():  # what weights.load_generator("workdir:...") rebuilds the model from
        config.generator = dit.describe(model) | dict(config.process) | dict(kind=KINDS[process.kind])
        config.latents = space._asdict()
    preview, measures = pictures(config, model, process, sampling, space, latents, mesh)
    task = generator_task(config, model, process, space, mesh, preview=preview, measures=measures)
    describe(config, model, process, latents, held_out, space, mesh, parameter_overview)
    batches = loop.Data(
        train=lambda start: cache.train_batches(latents, batch_size=data.batch_size, seed=config.seed,
                                                start_step=start, mirror=data.mirror),
        evaluation=lambda: cache.evaluation_batches(held_out, data.evaluation_batch_size,
                                                    data.evaluation_limit or None))
    state = loop.train(task, batches, config, workdir, mesh)
    return int(int(state.step) < config.training.steps)


KINDS = {"diffusion": "dit", "interpolant": "sit"}  # process -> the public files it shares a layout with


def chosen_space(latents, scale):
    """The LatentSpace that a generator learns in: the autoencoder's own, or one in which latents have mean 0 and std 1.

    scale: "autoencoder" or "measured". Raises ValueError where the autoencoder's would leave latents far from 1, which
    neither process is made for.
    """
    statistics, space = latents.manifest["statistics"], latents.space
    if scale == "measured":
        return space._replace(scale=1.0 / statistics["overall_std"], shift=statistics["overall_mean"])
    spread = statistics["overall_std"] * space.scale
    if not 0.3 < spread < 3.0:
        raise ValueError(f"latents of {space.reference} times its scale {space.scale:g} have a standard deviation of "
                         f"{spread:.3g}, and generators learn those of about 1: --config.data.scale=measured.")
    return space


def build(section, latents, process):
    """The network of config.model for these latents; fields that are 0 are the preset's."""
    from eqvae_jax.generators import dit

    fields = dict(section)
    name = fields.pop("preset")
    sizes = {key: fields.pop(key) for key in ("depth", "width", "heads", "patch_size")}
    channels = latents.shape[2]
    fields |= {key: value for key, value in sizes.items() if value}
    return dit.preset(name, input_size=latents.shape[0], in_channels=channels, out_channels=process.outputs(channels),
                      reversed_time=process.kind == "interpolant", classes=fields.pop("classes") or
                      latents.manifest["classes"], **fields)


def pictures(config, model, process, sampling, space, latents, mesh):
    """(preview, measures) for the task: decoded samples of fixed seeds, and their Fréchet distance if asked for."""
    from eqvae_jax import weights
    from eqvae_jax.run.sampling import Sampler

    settings = config.evaluation
    if not config.training.preview_every and not settings.features:
        return None, None
    try:
        autoencoder = weights.load_autoencoder(config.data.autoencoder or space.reference)
    except ValueError as error:
        raise ValueError(NO_DECODER.format(error=error)) from error
    sampler = Sampler(model, process, sampling, space, autoencoder, mesh, settings.batch_size, seed=config.seed)

    def preview(params, batch):
        labels = sampler.labels("balanced", range(settings.preview))
        images = sampler.images(params, range(settings.preview), labels)
        return {"samples": images.astype("float32") / 127.5 - 1.0}

    return preview, frechet(config, sampler, latents) if settings.features else None


def frechet(config, sampler, latents):
    """{name: params -> Fréchet distance of a few samples}: a number to watch, called by its features and its count."""
    from eqvae_jax.evaluation import feature_sets
    from eqvae_jax.evaluation.gaussians import frechet_distance
    from eqvae_jax.evaluation.generation import reference_gaussian
    from eqvae_jax.evaluation.image_sets import open_sets

    settings = config.evaluation
    extractor = feature_sets.open_extractor(settings.features, settings.inception, settings.protocol)
    side = latents.manifest["preprocessing"]["image_size"]
    reference = open_sets({"reference": settings.reference}, side)["reference"]
    real = reference_gaussian(reference, extractor, cache=feature_sets.default_cache())
    numbers = range(settings.samples)
    labels = sampler.labels("uniform", numbers)

    def measure(params):
        made = (sampler.images(params, numbers[i:i + sampler.batch], labels[i:i + sampler.batch])
                for i in range(0, settings.samples, sampler.batch))
        ours = feature_sets.collect(extractor, made, settings.samples, name="samples").gaussian
        return frechet_distance(real.mu, real.sigma, ours.mu, ours.sigma)

    return {f"{feature_sets.label('FID', extractor)}_of_{settings.samples}": measure}


def describe(config, model, process, latents, held_out, space, mesh, overview):
    """Prints, before the first step, the numbers that decide what a run costs and does."""
    import jax
    import jax.numpy as jnp

    from eqvae_jax.generators.dit import forward_macs

    x = jnp.zeros((1, *latents.shape))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]
    count = overview.count_parameters(shapes)
    print(f"{config.data.latents}: {len(latents):,} latents of {' x '.join(map(str, latents.shape))} in "
          f"{latents.manifest['classes']} classes, times {space.scale:.4g} after - {space.shift:.4g}; evaluated on "
          f"{'the same' if held_out is latents else held_out.directory}.\n"
          f"{count:,} parameters in {model.depth} blocks of {model.width}, "
          f"{(model.input_size // model.patch_size) ** 2} tokens, computed in {config.model.dtype}; "
          f"{6 * forward_macs(model) / 1e9:.3g} GFLOP an image of training.\n"
          f"Batch {config.data.batch_size} = {mesh.size} devices x "
          f"{config.data.batch_size // (mesh.size * config.training.accumulate)} x accumulation "
          f"{config.training.accumulate}; {dict(config.process)}.")
