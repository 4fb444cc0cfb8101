"""Measures autoencoders, and generated images: one table, figures, and metrics.json with how it was made.

    python -m eqvae_jax.evaluate reconstruction --images=folder:VAL \\
        --autoencoder=diffusers:stabilityai/sd-vae-ft-ema
    python -m eqvae_jax.evaluate equivariance --autoencoder=control=workdir:RUNS/control \\
        --autoencoder=EQ=workdir:RUNS/eq --images=photos:test --image_size=64

    python -m eqvae_jax.evaluate generation --reference=VIRTUAL_imagenet256_labeled.npz --generated=SAMPLES.npz \\
        --inception=download
    python -m eqvae_jax.evaluate generation --reference=folder:TRAIN --image_size=64 --inception=download \\
        --write_reference=reference.npz

reconstruction  PSNR, SSIM, L1 and, with --lpips, LPIPS of D(E(x)); of a VQ model also the use of its codes
equivariance    R (quarter turns) and S (scales) of the latent, and the pixel errors of D(tau E(x))
latents         intrinsic dimension, spectrum, moments and scale of E(x)
generation      FID, sFID, Inception Score, precision, recall and KID of generated images against a reference

The first two take --features and then measure rFID too; the first three draw figures. generation keeps features in
--cache by the images' content: the same command goes on where it was interrupted. Each has a --help of its own.
"""

import argparse
import dataclasses
import pathlib
import sys

from eqvae_jax import commands, distributed
from eqvae_jax.evaluation import choices

# JAX and all that imports it is imported where it is first needed: --help and a mistyped flag do not wait for it.


def main(arguments=None):
    """Runs the command line; returns the process's exit code, 2 for something the user can put right."""
    options = _parser().parse_args(arguments)
    import jax

    from eqvae_jax.backend import use_compilation_cache
    from eqvae_jax.data.images import TooManyBroken
    from eqvae_jax.evaluation import figures, provenance, tables

    use_compilation_cache()
    path = pathlib.Path(options.output) / "metrics.json"
    try:
        distributed.start_from(options)
        distributed.agree("the command", lambda: distributed.command(options))
        document, drawings = options.run(options, path.parent)
        if document is None:
            return 0
        print(tables.format_table(document))
        if writes := jax.process_index() == 0:
            provenance.write_json(path, document)
        drawn = [figures.save(figure, path.parent / name)[0].name for name, _, figure in drawings if writes]
    except (TooManyBroken, RuntimeError, ValueError, OSError) as error:
        return distributed.refuse(error)
    except KeyboardInterrupt:
        return distributed.interrupted("nothing was written, and features of finished parts are kept")
    print(f"wrote {path}" + (f"; beside it, as PNG and PDF: {', '.join(drawn)}" if drawn else ""))
    for metric, reason in document.get("left_out", {}).items():
        print(f"{metric} was left out: {reason}", file=sys.stderr)
    for name, column in document["results"].items():
        if unusable := [key for key, value in column.items() if value is None]:
            print(f"{name}: not finite, null in the file: {', '.join(unusable)}", file=sys.stderr)
    return 0


def _autoencoders(options, output):
    """reconstruction, equivariance and latents: the document of comparison.compare, and figures to be drawn."""
    from eqvae_jax import weights
    from eqvae_jax.evaluation import comparison, exhibits, feature_sets

    protocol = _protocol(options)
    batches, broken = comparison.open_batches(protocol)
    models = {name: weights.load_autoencoder(text) for name, text in comparison.named(options.autoencoder).items()}
    distributed.agree("the autoencoders", lambda: {name: spec.hash for name, (_, _, spec) in models.items()})
    lpips = weights.load_lpips(options.lpips) if options.lpips else None
    extractor = None
    if options.features:
        extractor = feature_sets.open_extractor(options.features, options.inception, options.protocol)
    measures, features = (options.measure,), {"lpips": lpips, "extractor": extractor}
    comparison.check(models, protocol, measures, **features)
    output.mkdir(parents=True, exist_ok=True)  # now, not after an hour of measuring
    document = comparison.compare(models, protocol, measures, **features, batches=batches, broken=broken)

    def drawings():  # once the numbers are safe
        yield from exhibits.drawings(document, exhibits.collect(models, batches, protocol, measures))

    return document, drawings()


def _generation(options, output):
    """generation: the document of generation.measure, None where only a reference was to be written; no figures."""
    from eqvae_jax.evaluation import comparison, feature_sets, generation, image_sets

    references = comparison.named(options.generated)
    if "reference" in references:
        raise ValueError("generated images cannot be called 'reference'.")
    if not references and not options.write_reference:
        raise ValueError("there is nothing to do: give --generated, or --write_reference for the reference alone.")
    sets = image_sets.open_sets({"reference": options.reference, **references}, options.image_size)
    reference = sets.pop("reference")
    extractor = feature_sets.open_extractor(options.features, options.inception, options.protocol)
    shared = {"batch_size": options.batch_size, "cache": options.cache or None}
    kid = {"subset_size": options.kid_subset_size, "seed": options.seed}
    if sets:
        generation.plan(reference, sets, extractor, options.metrics, options.kid_subset_size)
        output.mkdir(parents=True, exist_ok=True)
    if options.write_reference:
        made = generation.write_reference(options.write_reference, reference, extractor, **shared)
        print(f"wrote {options.write_reference}: statistics of {made.count:,} images")
    if not sets:
        return None, []
    return generation.measure(reference=reference, generated=sets, extractor=extractor, metrics=options.metrics,
                              **kid, **shared), []


def _protocol(options):
    """The command line as a Protocol: every field that the chosen command has an option for."""
    from eqvae_jax.evaluation import comparison

    fields = {field.name for field in dataclasses.fields(comparison.Protocol)} & set(vars(options))
    values = {name: getattr(options, name) for name in fields}
    return comparison.Protocol(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _parser():
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--autoencoder", action="append", required=True, metavar="[NAME=]REFERENCE",
        help="diffusers:DIR_OR_HUB_ID, ldm:FILE, taming:FILE, workdir:DIR or init:PRESET; repeat it for more columns")
    add("--images", required=True, metavar="REFERENCE",
        help="photos[:train|:test|:all], folder:DIR, arrayrecord:GLOB, tfds:NAME[:SPLIT] or idx:DIR[:test]")
    add("--image_size", type=int, default=256, metavar="N",
        help="side in pixels, a multiple of the downsampling factor (%(default)s)")
    add("--batch_size", type=int, default=8, metavar="N", help="images at a time (%(default)s)")
    add("--limit", type=int, metavar="N", help="this many images, spread evenly over the set (all)")
    add("--crops", type=int, default=1, metavar="N",
        help="1: ADM's centre crop; more: fixed random crops of each image (%(default)s)")
    add("--min_crop", type=float, default=0.5, metavar="SHARE",
        help="of the short side, the smallest random crop; one crop, the centre, ignores it (%(default)s)")
    add("--max_crop", type=float, default=1.0, metavar="SHARE", help="the largest, likewise (%(default)s)")
    add("--output", default="evaluation", metavar="DIR", help="where metrics.json and figures go (%(default)s)")

    network = argparse.ArgumentParser(add_help=False)
    _add_network(network.add_argument, default="")
    decoded = argparse.ArgumentParser(add_help=False)
    add = decoded.add_argument
    add("--posterior", choices=("mode", "sample"), default="mode",
        help="the latent that is decoded; the released evaluation samples (%(default)s)")
    add("--uint8", choices=choices.UINT8, default="round",
        help="8-bit conversion before pixel metrics: round as ADM, truncate as LDM, none (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the posterior's noise (%(default)s)")

    hosts = argparse.ArgumentParser(add_help=False)
    distributed.add_flags(hosts.add_argument_group("several hosts").add_argument)

    layout = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog=commands.program("evaluate"), description=commands.as_called(__doc__),
                                     **layout)
    names = "reconstruction|equivariance|latents|generation"
    kinds = parser.add_subparsers(dest="measure", required=True, metavar=names)

    text = "PSNR, SSIM, L1 and, with --lpips, LPIPS of D(E(x))"
    parents = [shared, decoded, network, hosts]
    plain = kinds.add_parser("reconstruction", parents=parents, help=text, description=text, **layout)
    plain.add_argument("--lpips", metavar="REFERENCE", help="LPIPS weights: a directory, a file or download")
    plain.add_argument("--ssim_range", type=_range, default=2.0, metavar="VALUE|image",
                       help="data range of SSIM; the released evaluation's: image, each pair's own range, and "
                       "decodes neither clipped nor 8-bit (%(default)s)")
    plain.add_argument("--ssim_border", choices=("valid", "reflect"), default="valid",
                       help="windows inside the image only, or continued by reflection; the released evaluation's: "
                       "reflect, or valid with torchmetrics up to 1.4.1 (%(default)s)")
    plain.set_defaults(run=_autoencoders)

    text = "R, S and the pixel errors of D(tau E(x))"
    tau = kinds.add_parser("equivariance", parents=parents, help=text, description=text, **layout)
    tau.add_argument("--turns", type=int, nargs="*", default=[1, 2, 3], metavar="K",
                     help="clockwise quarter turns (1 2 3)")
    tau.add_argument("--scales", type=float, nargs="*", default=[0.25, 0.5, 0.75], metavar="S",
                     help="scales (0.25 0.5 0.75)")
    tau.add_argument("--interpolation", choices=("bilinear", "bicubic"), default="bilinear",
                     help="bilinear as the released code, bicubic as the paper says (%(default)s)")
    tau.add_argument("--antialias", action="store_true", help="antialiased scaling; the released code has none")
    tau.set_defaults(lpips=None, run=_autoencoders)

    text = "intrinsic dimension, spectrum, moments and scale of E(x)"
    latents = kinds.add_parser("latents", parents=[shared, hosts], help=text, description=text, **layout)
    latents.set_defaults(lpips=None, features="", run=_autoencoders)

    text = "FID, sFID, Inception Score, precision, recall and KID of generated images"
    generated = kinds.add_parser("generation", parents=[hosts], help=text, description=text, **layout)
    _add_generation(generated.add_argument)
    generated.set_defaults(run=_generation)
    return parser


def _range(text):
    """"image" -> None, what comparison.Protocol calls a pair's own range."""
    return None if text == "image" else float(text)


def _add_network(add, default):
    add("--features", default=default, metavar="NETWORK", help="network of Fréchet distances: inception, or "
        f"workdir:DIR of a run of configs/fashion_classifier.py ({default or 'none'})")
    add("--inception", default="", metavar="FILE|download",
        help="weights of FID's Inception, pytorch-fid's or torch-fidelity's file")
    add("--protocol", choices=choices.PROTOCOLS, default="adm",
        help="whose resizing for Inception; it rules generation's other metrics too (%(default)s)")


def _add_generation(add):
    images = "npz:FILE or FILE.npz as ADM's, or a reference to images as in --images of the other commands"
    add("--reference", required=True, metavar="REFERENCE", help=f"real images: {images}")
    add("--generated", action="append", default=[], metavar="[NAME=]REFERENCE",
        help="generated images, likewise; repeat it for more columns")
    add("--image_size", type=int, metavar="N",
        help="ADM's centre crop of images that are not in an .npz (the size of the .npz)")
    _add_network(add, default="inception")
    add("--metrics", nargs="+", choices=choices.METRICS, metavar="METRIC",
        help=f"of {' '.join(choices.METRICS)} (all that the sets allow)")
    add("--kid_subset_size", type=int, default=1000, metavar="N",
        help="images in each of KID's 100 subsets (%(default)s)")
    add("--seed", type=int, default=2020, metavar="N", help="of KID's subsets; torch-fidelity's (%(default)s)")
    add("--batch_size", type=int, default=50, metavar="N", help="images at a time (%(default)s)")
    add("--cache", default=str(choices.default_cache()), metavar="DIR",
        help="features by content, 20 kB an image of Inception; empty for none (%(default)s)")
    add("--write_reference", metavar="FILE.npz",
        help="write the reference with its statistics, in ADM's format, to be given as --reference")
    add("--output", default="evaluation", metavar="DIR", help="where metrics.json goes (%(default)s)")


def run():
    """The command line's entry."""
    sys.exit(distributed.run(main))


if __name__ == "__main__":
    run()
