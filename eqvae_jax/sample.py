"""Images from a generator: a set in ADM's .npz, which evaluate generation measures, and a picture of the first ones.

    python -m eqvae_jax.sample --generator=workdir:RUNS/sit --count=50000 --output=samples.npz
    python -m eqvae_jax.sample --generator=sit:SiT-XL-2-256x256.pt --autoencoder=diffusers:stabilityai/sd-vae-ft-ema \\
        --guidance=4 --classes=207 --count=16 --output=golden_retriever.npz

Image n is made from the seed and n alone, so a set does not depend on the batch or the devices (but for dopri5, whose
steps suit a whole batch), and one that was interrupted goes on with the same command to the same images. Settings that
are not given are those of the run's config.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import sys

from eqvae_jax import commands, distributed

# JAX and all that imports it is imported where it is first needed: --help and a mistyped flag do not wait for it.

PICTURE, COLUMNS = 64, 16  # images, and classes side by side, at most
PRECISIONS = ("highest", "high", "default")
# Of public files: the process, and how their commands sample where that is not as SiT's and DiT's without guidance.
PUBLISHED = {"dit": {"kind": "diffusion"}, "sit": {"kind": "interpolant"}, "repa": {"kind": "interpolant"},
             "maskgit": {"kind": "masking"}, "maskgit-original": {"kind": "masking"}}
PUBLISHED_SAMPLING = {
    "repa": {"form": "linear", "guidance_channels": 0}, "maskgit": {"evaluations": 8, "guidance": 4.0},
    "maskgit-original": {"evaluations": 8, "sampler": "cosine"},
}


def main(arguments=None):
    """Runs the command line; returns the process's exit code, 2 for something the user can put right."""
    options = _parser().parse_args(arguments)
    from eqvae_jax.backend import use_compilation_cache

    use_compilation_cache()
    try:
        distributed.start_from(options)
        distributed.agree("the command", lambda: distributed.command(options))
        sample(options)
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        return distributed.refuse(error)
    except KeyboardInterrupt:
        return distributed.interrupted("the same command goes on")
    return 0


def sample(options):
    """Makes the set that the command line asks for, or what is missing of it."""
    output = pathlib.Path(options.output).expanduser()
    if output.suffix != ".npz":
        raise ValueError(f"--output={options.output} must end in .npz.")
    if options.count < 1 or options.batch_size < 1:
        raise ValueError(f"--count={options.count} and --batch_size={options.batch_size} must be at least 1.")

    import jax
    from ml_collections import ConfigDict

    from eqvae_jax import weights
    from eqvae_jax.data.latents import LatentSpace
    from eqvae_jax.generators.networks import sees_tokens
    from eqvae_jax.generators.process import check_sampling, make_process
    from eqvae_jax.run.sample_set import partial_path
    from eqvae_jax.run.sampling import Sampler
    from eqvae_jax.training.sharding import make_mesh

    if output.exists() and not options.overwrite and not partial_path(output).exists():  # or its end is to be tidied
        raise ValueError(f"{output} exists: --overwrite writes over it.")
    if options.path and not options.generator.startswith(("sit:", "repa:")):
        raise ValueError(f"--path={options.path}: of sit: and repa: files; {options.generator} has no choice of it.")
    model, params, spec = weights.load_generator(options.generator, scan=True,  # compiles one block instead of all
                                                 **{name: getattr(options, name) for name in weights.GENERATOR_OPTIONS})
    model = model.clone(dtype=options.dtype)
    chosen = {name: getattr(options, name) for name in ("path", "sample_eps") if getattr(options, name) is not None}
    codes = {"codes": model.codes} if sees_tokens(model) else {}
    process = make_process(**PUBLISHED[spec.kind] | spec.process | chosen | codes)
    settings = chosen_settings(options, spec, process)
    check_sampling(process, settings)
    check_classes(options.classes, model)
    reference = options.autoencoder or (spec.latents and spec.latents["reference"])
    if not reference:
        raise ValueError(f"{options.generator} does not say which autoencoder's latents it makes: "
                         "--autoencoder=REFERENCE (released DiT, SiT and REPA: "
                         "diffusers:stabilityai/sd-vae-ft-ema or -mse; MaskGIT: taming:FILE).")
    autoencoder = weights.load_autoencoder(reference)
    distributed.agree("the weights", lambda: {options.generator: spec.hash, reference: autoencoder[2].hash})
    space = LatentSpace(**spec.latents) if spec.latents else LatentSpace.of(autoencoder[2])
    mesh = make_mesh(ConfigDict({"data": -1, "fsdp": 1}))
    sampler = Sampler(model, process, settings, space, autoencoder, mesh, options.batch_size, options.seed)
    made_with = {"generator": dataclasses.asdict(spec), "autoencoder": dataclasses.asdict(autoencoder[2]),
                 "sampling": dataclasses.asdict(settings), "classes": options.classes, "seed": options.seed,
                 "dtype": options.dtype, "precision": options.precision} | chosen
    size = (model.input_size * autoencoder[0].downsampling,) * 2
    evaluations = "" if settings.sampler == "dopri5" else f" of {settings.evaluations} evaluations"
    print(f"{options.generator}: {options.count:,} images of {size[0]} x {size[1]}, {sampler.batch} at a time; "
          f"{settings.sampler or 'its default sampler'}{evaluations}, guidance {settings.guidance:g}; decoded by "
          f"{reference}.")
    with jax.default_matmul_precision(options.precision):
        sampler.check(params)
        make(sampler, params, options, output, made_with, size)


def make(sampler, params, options, output, made_with, size):
    """Fills the set's unfinished file, then writes the .npz and the picture."""
    import numpy as np
    from tqdm import tqdm

    from eqvae_jax.evaluation.samples import write_npz
    from eqvae_jax.run.sample_set import begin

    placed = sampler.place(params)
    unfinished, start = begin(output, size, made_with | {"count": options.count, "batch": sampler.batch})
    labels = sampler.labels(options.classes, np.arange(options.count))
    leads = unfinished is not None  # every host makes its part of each batch; the first one writes
    with unfinished or contextlib.nullcontext():
        if start:
            print(f"going on from image {start:,}")
        with tqdm(total=options.count, initial=start, unit="image", disable=None if leads else True) as bar:
            for first in range(start, options.count, sampler.batch):
                numbers = np.arange(first, min(first + sampler.batch, options.count))
                images = sampler.images(placed, numbers, labels[numbers])
                if leads:
                    unfinished.write(first, images)
                bar.update(len(numbers))
        if not leads:
            return
        write_npz(output, unfinished.batches(), options.count, labels=labels, made_with=made_with)
        in_turn = sampler.model.classes if options.classes == "balanced" else None
        picture = draw(next(unfinished.batches(PICTURE)), output, in_turn)
    unfinished.remove()
    print(f"wrote {output} and {picture}")


def draw(images, output, classes=None):
    """Writes the grid of images beside `output`, a column for each class if so many fit; returns its path."""
    from eqvae_jax.evaluation import figures

    columns = classes if classes and classes <= COLUMNS else None
    shown = images[: len(images) // columns * columns] if columns and len(images) >= columns else images
    figures.save(figures.sample_grid(shown, columns), output.with_suffix(""))
    return output.with_suffix(".png")


def chosen_settings(options, spec, process):
    """The Sampling of the run's config, with what the command line says in its place.

    Raises ValueError for flags that this process does not have.
    """
    from eqvae_jax.generators.process import FIELDS, Sampling

    known = spec.sampling or PUBLISHED_SAMPLING.get(spec.kind, {})
    settings = Sampling(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Sampling)
             if getattr(options, field.name) is not None}
    if wrong := [f"--{name}" for name in given if name not in FIELDS[process.kind]]:
        raise ValueError(f"{', '.join(wrong)}: this generator's process ({process.kind}) has no such choice; it has "
                         f"{', '.join(FIELDS[process.kind])}.")
    return dataclasses.replace(settings, **{name: tuple(value) if isinstance(value, list) else value
                                            for name, value in given.items()})


def check_classes(policy, model):
    """Raises ValueError for a policy that is neither of the two words nor a class of the model."""
    if policy in ("uniform", "balanced"):
        return
    if not policy.isdecimal() or int(policy) > (model.classes - 1 if model.null is None else model.null):
        none = "" if model.null is None else f" ({model.null}: no class)"
        raise ValueError(f"--classes={policy} is neither uniform nor balanced nor a class of this generator, 0 to "
                         f"{model.classes - 1}{none}.")


def _parser():
    parser = argparse.ArgumentParser(prog=commands.program("sample"), description=commands.as_called(__doc__),
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--generator", required=True, metavar="REFERENCE", help="workdir:DIR, dit:FILE, sit:FILE, repa:FILE or "
                                                                   "maskgit:FILE")
    add("--autoencoder", metavar="REFERENCE", help="the decoder (not given: that which the generator's latents are of)")
    add("--count", type=int, default=64, metavar="N", help="images (%(default)s)")
    add("--output", required=True, metavar="FILE.npz", help="the set; its picture is beside it, .png and .pdf")
    add("--classes", default="uniform", help="uniform: drawn at random, as published FIDs; balanced: in turn; or a "
                                             "class's number (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of noise and classes (%(default)s)")
    add("--batch_size", type=int, default=50, metavar="N",
        help="images at a time; changes nothing, but with dopri5 (%(default)s)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the network's blocks (%(default)s)")
    add("--precision", choices=PRECISIONS, default="highest",
        help="of float32 products; default is the accelerator's own, TF32 or bfloat16, and faster (%(default)s)")
    add("--overwrite", action="store_true", help="write over an existing set")
    group = parser.add_argument_group("public files", "what they do not say themselves")
    add = group.add_argument
    add("--heads", type=int, metavar="N", help="of attention, where the width does not tell")
    add("--codes", type=int, metavar="N", help="of a maskgit: file whose vocabulary is not the released one")
    add("--prediction", choices=("velocity", "noise", "score"), help="what a sit: file predicts (velocity)")
    add("--path", choices=("linear", "gvp", "vp"), help="of a sit: or repa: file (linear)")
    group = parser.add_argument_group("sampling", "not given: as in the run's config; of files, DiT's, SiT's and "
                                                  "REPA's own without guidance, and MaskGIT's with it")
    add = group.add_argument
    add("--sampler", metavar="NAME", help="diffusion: ddpm, ddim; interpolant: sde, sde-heun, euler, heun, dopri5; "
                                          "tokens: arccos, linear, square, root, cosine (the original's)")
    add("--evaluations", type=int, metavar="N", help="of the network")
    add("--guidance", type=float, metavar="SCALE", help="of classifier-free guidance; 1: none")
    add("--guidance_channels", type=int, metavar="N", help="guided channels: 3 as released, 0 all")
    add("--guidance_times", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guide where LOW <= t <= HIGH, as REPA")
    add("--guidance_noise", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guide where LOW < sigma <= HIGH")
    add("--form", metavar="NAME",
        help="of the SDE's diffusion: constant, SBDM, sigma, linear, decreasing, increasing-decreasing")
    add("--norm", type=float, metavar="X", help="factor of the SDE's diffusion")
    add("--last_step", metavar="NAME", help="of the SDE: mean, euler, tweedie, or empty for none")
    add("--last_step_size", type=float, metavar="T", help="of the SDE: the time that its last step covers")
    add("--sample_eps", type=float, metavar="T", help="what an interpolant leaves out at the ends of time")
    add("--eta", type=float, metavar="X", help="of DDIM: 0 adds no noise on the way, 1 as much as DDPM")
    add("--choice_temperature", type=float, metavar="T", help="of the noise on tokens' confidences")
    add("--inverse_temperature", type=float, metavar="X", help="tokens' logits are multiplied by it")
    add("--rtol", type=float, metavar="X", help="relative error that dopri5 allows itself")
    add("--atol", type=float, metavar="X", help="absolute error, likewise")
    distributed.add_flags(parser.add_argument_group("several hosts", "which make each batch together").add_argument)
    return parser


def run():
    """The command line's entry."""
    sys.exit(distributed.run(main))


if __name__ == "__main__":
    run()
