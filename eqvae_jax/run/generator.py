"""Wires the training of a generator on cached latents: configs/dit.py, sit.py, repa.py and maskgit.py."""

from typing import Any, NamedTuple

from absl import logging

# JAX and all that imports it is imported where it is first needed: a config that cannot work is refused in a second.

NEEDS = """This config needs a cache of latents: --config.data.latents=DIR, which
  python -m eqvae_jax.encode --autoencoder=REFERENCE --images=REFERENCE --output=DIR
writes. To see a generator learn on a CPU: docs/recipes.md, "Fashion-MNIST on a CPU"."""
NEEDS_REFERENCE = """evaluation.features is {features}: a Fréchet distance needs real images to compare with, as
  --config.evaluation.reference=FILE.npz or any reference to images, folder:DIR and the like;
  --config.evaluation.features="" trains without."""
NO_DECODER = """The autoencoder of these latents cannot be opened, and previews show decoded samples:
  {error}
Name it: --config.data.autoencoder=REFERENCE; or train without pictures: --config.training.preview_every=0
--config.evaluation.features=""."""
NEEDS_ENCODER = """This config aligns the generator with what a frozen encoder sees: --config.alignment.encoder=
  dinov2:FILE     weights of DINOv2 (dinov2_vitb14_pretrain.pth, or Hugging Face's model.safetensors)
  workdir:DIR     a run of configs/fashion_classifier.py"""


def preflight(config):
    """Checks what can be checked without JAX; raises ValueError that says what to set."""
    if not config.data.latents:
        raise ValueError(NEEDS)
    if config.alignment and not config.alignment.encoder:
        raise ValueError(NEEDS_ENCODER)
    if config.training.preview_every and config.evaluation.preview < 1:
        raise ValueError(f"evaluation.preview is {config.evaluation.preview}; a picture has at least 1 sample. "
                         "--config.training.preview_every=0 draws none.")
    if config.evaluation.features and config.evaluation.samples < 2:
        raise ValueError(f"evaluation.samples is {config.evaluation.samples}; a Fréchet distance needs at least 2.")
    if config.evaluation.features and not config.evaluation.reference:
        raise ValueError(NEEDS_REFERENCE.format(features=config.evaluation.features))
    if not config.label_dropout and config.sampling.guidance != 1:
        raise ValueError(f"sampling.guidance is {config.sampling.guidance:g} but label_dropout 0: guidance needs a "
                         "network that has learnt without labels too.")
    if config.process.kind != "masking" and config.data.scale not in ("autoencoder", "measured"):
        raise ValueError(f"data.scale is {config.data.scale!r}; it must be \"autoencoder\" or \"measured\".")
    if config.model.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype is {config.model.dtype!r}; it must be \"float32\" or \"bfloat16\".")


def train(config, workdir):
    """Trains one config in `workdir`, going on where a former one stopped; returns 0 or an interruption's exit code."""
    from clu import parameter_overview

    from eqvae_jax.data.latent_batches import evaluation_batches, train_batches
    from eqvae_jax.data.latents import open_latents
    from eqvae_jax.generators import networks
    from eqvae_jax.generators.task import check, generator_task
    from eqvae_jax.training import loop
    from eqvae_jax.training.sharding import make_mesh

    mesh, data = make_mesh(config.mesh), config.data
    latents = open_latents(data.latents)
    held_out = open_latents(data.evaluation) if data.evaluation else latents
    check_held_out(latents, held_out, images=bool(config.alignment))
    check_kind(latents, config.process.kind)
    model, process, sampling, space, alignment = network(config, latents)
    check(config, model, process, latents.shape, latents.manifest["classes"], mesh)
    with config.unlocked():  # what weights.load_generator("workdir:...") rebuilds the model from
        kind = "repa" if alignment else KINDS[process.kind]
        config.generator = networks.describe(model) | dict(config.process) | dict(kind=kind)
        config.latents = space._asdict()
    preview, measures = pictures(config, model, process, sampling, space, latents, mesh)
    task = generator_task(config, model, process, space, mesh, alignment=alignment, preview=preview, measures=measures,
                          init_params=initial(config, model, workdir))
    describe(config, model, process, latents, held_out, space, mesh, parameter_overview)
    batches = loop.Data(
        train=lambda start: train_batches(latents, batch_size=data.batch_size, seed=config.seed, start_step=start,
                                          mirror=data.mirror, images=bool(alignment)),
        evaluation=lambda: evaluation_batches(held_out, -(-data.evaluation_batch_size // mesh.size) * mesh.size,
                                              data.evaluation_limit or None, images=bool(alignment)),
        identity=lambda: {"data.latents": latents.fingerprint(), "data.evaluation": held_out.fingerprint()})
    return loop.train(task, batches, config, workdir, mesh)[1]


KINDS = {"diffusion": "dit", "interpolant": "sit", "masking": "maskgit"}  # process -> whose files' layout


def check_kind(latents, process):
    """Raises ValueError where a process is given latents of the other kind."""
    if latents.is_tokens != (process == "masking"):
        here, there = ("tokens", "posteriors") if latents.is_tokens else ("posteriors", "tokens")
        configs = "maskgit.py" if latents.is_tokens else "dit.py, sit.py or repa.py"
        raise ValueError(f"{latents!r} holds {here} of {latents.space.reference}, and this config learns {there}: take "
                         f"configs/{configs}.")


def check_held_out(latents, held_out, images):
    """Raises ValueError where the latents of evaluation are none that the generator could have learnt."""
    latents.space.require(held_out.space)
    if images and held_out.image_shape != latents.image_shape:
        raise ValueError(f"data.evaluation: {held_out!r} holds images {held_out.image_shape}, and {latents!r} "
                         f"{latents.image_shape}; alignment looks at those of both: encode again with --keep_images.")
    for name, ours, theirs in (("shape", latents.shape, held_out.shape),
                               ("class names", *(one.manifest.get("class_names") for one in (latents, held_out)))):
        if ours != theirs:
            raise ValueError(f"data.evaluation: {held_out!r} has the {name} {theirs}, and {latents!r} {ours}; both "
                             "must be the same.")
    if held_out.manifest["classes"] > latents.manifest["classes"]:
        raise ValueError(f"data.evaluation: {held_out!r} has {held_out.manifest['classes']} classes, and {latents!r} "
                         f"{latents.manifest['classes']}.")


def initial(config, model, workdir):
    """The parameters of config.init, stacked where the model scans; None where they are drawn, or restored.

    Raises ValueError where they are of another model.
    """
    from eqvae_jax import weights
    from eqvae_jax.generators import networks
    from eqvae_jax.training.checkpoint import saved_steps

    if not config.init or saved_steps(workdir):
        return None
    prediction = config.process.get("prediction", "velocity")
    told = {"prediction": prediction} if config.init.startswith("sit:") else {}
    found, params, spec = weights.load_generator(config.init, scan=model.scan, **told)
    if (learnt := spec.process.get("prediction", prediction)) != prediction:
        raise ValueError(f"init: {config.init} predicts the {learnt}, and this config's process the {prediction}.")
    ours, theirs = networks.describe(model), networks.describe(found)
    ours.pop("dropout", None)  # which has no weights, as has the depth that a file does not say
    if not config.init.startswith("workdir:"):
        ours.pop("alignment_depth", None)
    if different := [f"{name} {theirs.get(name)} instead of {value}" for name, value in ours.items()
                     if theirs.get(name) != value]:
        raise ValueError(f"init: {config.init} is another model than this config's: {', '.join(different)}.")
    return params


class Wired(NamedTuple):
    """What a config's sections make for some latents. alignment: a repa.Alignment, or None."""

    model: Any
    process: Any
    sampling: Any
    space: Any
    alignment: Any


def network(config, latents, open_encoder=None) -> Wired:
    """The network and what surrounds it, of a config and latents; open_encoder: in place of run.alignment's.

    Raises ValueError, naming the config's field, for what cannot be.
    """
    from eqvae_jax.generators.process import Sampling, check_sampling, make_process

    if latents.is_tokens:
        space, codes = latents.space, {"codes": latents.manifest["autoencoder"]["codes"]}
    else:
        space, codes = chosen_space(latents, config.data.scale), {}
    process, sampling = make_process(**config.process, **codes), Sampling(**config.sampling)
    check_sampling(process, sampling)
    model, alignment = build(config.model, latents, process), None
    if config.alignment:
        model, alignment = aligned(model, config.alignment, latents, open_encoder)
    return Wired(model, process, sampling, space, alignment)


def aligned(model, section, latents, open_encoder=None):
    """(repa.REPA like the model, repa.Alignment) of config.alignment."""
    from eqvae_jax.generators.networks import as_kind
    from eqvae_jax.generators.repa import REPA, Alignment
    from eqvae_jax.run import alignment

    grid, opened = model.input_size // model.patch_size, open_encoder or alignment.open_encoder
    encoder = opened(section.encoder, grid, latents.image_shape, model.dtype)
    model = as_kind(model, REPA, reversed_time=False, alignment_depth=section.depth, feature_size=encoder.feature_size,
                    projector_size=section.projector_size)
    return model, Alignment(encoder.params, encoder.features, section.weight)


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


SIZES = ("depth", "width", "heads", "patch_size", "mlp_size", "classes")  # fields of config.model that 0 leaves open


def build(section, latents, process):
    """The network of config.model for these latents; fields that are 0 are the preset's."""
    from eqvae_jax.generators import dit, maskgit

    fields = {key: value for key, value in section.items() if key not in SIZES or value}
    name = fields.pop("preset")
    fields = dict(input_size=latents.shape[0], classes=latents.manifest["classes"]) | fields
    if process.kind == "masking":
        return maskgit.preset(name, codes=latents.manifest["autoencoder"]["codes"], **fields)
    channels = latents.shape[2]
    return dit.preset(name, in_channels=channels, out_channels=process.outputs(channels),
                      reversed_time=process.kind == "interpolant", **fields)


def pictures(config, model, process, sampling, space, latents, mesh):
    """(preview, measures) for the task: decoded samples of fixed seeds, and their Fréchet distance if asked for."""
    from eqvae_jax import weights
    from eqvae_jax.run.sampling import NotFinite, Sampler

    settings = config.evaluation
    if not config.training.preview_every and not settings.features:
        return None, None
    try:
        autoencoder = weights.load_autoencoder(config.data.autoencoder or space.reference)
    except ValueError as error:
        raise ValueError(NO_DECODER.format(error=error)) from error
    sampler = Sampler(model, process, sampling, space, autoencoder, mesh, settings.batch_size, seed=config.seed)
    sampler.check(parameter_shapes(model))

    def preview(params, batch):
        labels = sampler.labels("balanced", range(settings.preview))
        try:
            images = sampler.images(params, range(settings.preview), labels)
        except NotFinite as error:
            logging.warning("No picture: %s", error)
            return {}
        return {"samples": images.astype("float32") / 127.5 - 1.0}

    return preview, frechet(config, sampler, latents) if settings.features else None


def frechet(config, sampler, latents):
    """{name: params -> Fréchet distance of a few samples}: a number to watch, called by its features and its count."""
    from eqvae_jax.evaluation import choices, feature_sets
    from eqvae_jax.evaluation.gaussians import frechet_distance
    from eqvae_jax.evaluation.generation import reference_gaussian
    from eqvae_jax.evaluation.image_sets import open_sets

    settings = config.evaluation
    extractor = feature_sets.open_extractor(settings.features, settings.inception, settings.protocol)
    side = latents.manifest["preprocessing"]["image_size"]
    reference = open_sets({"reference": settings.reference}, side)["reference"]
    real = reference_gaussian(reference, extractor, cache=choices.default_cache())
    numbers = range(settings.samples)
    labels = sampler.labels("uniform", numbers)

    def measure(params):
        made = (sampler.images(params, numbers[i:i + sampler.batch], labels[i:i + sampler.batch])
                for i in range(0, settings.samples, sampler.batch))
        try:
            ours = feature_sets.collect(extractor, made, settings.samples, name="samples").gaussian
        except ValueError as error:  # samples of an early or broken network: a number to watch must not end the run
            logging.warning("No Fréchet distance: %s", error)
            return float("nan")
        return frechet_distance(real.mu, real.sigma, ours.mu, ours.sigma)

    return {f"{feature_sets.label('FID', extractor)}_of_{settings.samples}": measure}


def parameter_shapes(model):
    """Of the parameters under "params", nothing computed."""
    import jax

    from eqvae_jax.generators.networks import example_inputs

    return jax.eval_shape(model.init, jax.random.key(0), *example_inputs(model))["params"]


def describe(config, model, process, latents, held_out, space, mesh, overview):
    """Prints, before the first step, the numbers that decide what a run costs and does."""
    from eqvae_jax.generators import dit, maskgit

    count = overview.count_parameters(parameter_shapes(model))
    macs = (maskgit if latents.is_tokens else dit).forward_macs(model)
    numbers = (f"{latents.manifest['autoencoder']['codes']:,} codes" if latents.is_tokens else
               f"times {space.scale:.4g} after - {space.shift:.4g}")
    print(f"{config.data.latents}: {len(latents):,} latents of {' x '.join(map(str, latents.shape))} in "
          f"{latents.manifest['classes']} classes, {numbers}; evaluated on "
          f"{'the same' if held_out is latents else held_out.directory}.\n"
          f"{count:,} parameters in {model.depth} blocks of {model.width}, "
          f"{(model.input_size // getattr(model, 'patch_size', 1)) ** 2} tokens, computed in {config.model.dtype}; "
          f"{6 * macs / 1e9:.3g} GFLOP an image of training.\n"
          f"Batch {config.data.batch_size} = {mesh.size} devices x "
          f"{config.data.batch_size // (mesh.size * config.training.accumulate)} x accumulation "
          f"{config.training.accumulate}; {dict(config.process)}.")
