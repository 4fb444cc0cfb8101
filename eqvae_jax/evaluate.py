"""Measures autoencoders on images: prints one table and writes metrics.json with how it was made.

    python -m eqvae_jax.evaluate reconstruction --images=folder:VAL \\
        --autoencoder=diffusers:stabilityai/sd-vae-ft-ema
    python -m eqvae_jax.evaluate equivariance --autoencoder=control=workdir:RUNS/control \\
        --autoencoder=EQ=workdir:RUNS/eq --images=photos:test --image_size=64

reconstruction: PSNR, SSIM, L1 and, with --lpips, LPIPS of D(E(x)); of a VQ model also the use of its codes.
equivariance: R (quarter turns) and S (scales) of the latent, and the pixel errors of D(tau E(x)).
"""

import argparse
import dataclasses
import pathlib
import sys

from eqvae_jax import weights
from eqvae_jax.backend import use_compilation_cache
from eqvae_jax.data.images import TooManyBroken
from eqvae_jax.evaluation import comparison, metrics, provenance, tables


def main(arguments=None):
    """Runs the command line; returns the process's exit code, 2 for something the user can put right."""
    options = _parser().parse_args(arguments)
    use_compilation_cache()
    path = pathlib.Path(options.output) / "metrics.json"
    try:
        protocol = _protocol(options)
        batches, broken = comparison.open_batches(protocol)
        models = {name: weights.load_autoencoder(text) for name, text in comparison.named(options.autoencoder).items()}
        lpips = weights.load_lpips(options.lpips) if options.lpips else None
        comparison.check(models, protocol, (options.measure,), lpips)
        path.parent.mkdir(parents=True, exist_ok=True)  # now, not after an hour of measuring
    except (ValueError, OSError) as error:
        return _refuse(error)
    images = {"batches": batches, "broken": broken}
    try:
        document = comparison.compare(models, protocol, (options.measure,), lpips=lpips, **images)
        print(tables.format_table(document))
        provenance.write_json(path, document)
    except (TooManyBroken, ValueError, OSError) as error:
        return _refuse(error)
    print(f"wrote {path}")
    for name, column in document["results"].items():
        if unusable := [key for key, value in column.items() if value is None]:
            print(f"{name}: not finite, null in the file: {', '.join(unusable)}", file=sys.stderr)
    return 0


def _protocol(options):
    """The command line as a Protocol: every field that the chosen command has an option for."""
    fields = {field.name for field in dataclasses.fields(comparison.Protocol)} & set(vars(options))
    values = {name: getattr(options, name) for name in fields}
    return comparison.Protocol(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _refuse(error):
    print(f"error: {error}", file=sys.stderr)
    return 2


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
    add("--posterior", choices=("mode", "sample"), default="mode",
        help="the latent that is decoded; the released evaluation samples (%(default)s)")
    add("--uint8", choices=tuple(metrics.UINT8_CONVENTIONS), default="round",
        help="8-bit conversion before pixel metrics: round as ADM, truncate as LDM, none (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the posterior's noise (%(default)s)")
    add("--output", default="evaluation", metavar="DIR", help="where metrics.json goes (%(default)s)")

    layout = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m eqvae_jax.evaluate", description=__doc__, **layout)
    commands = parser.add_subparsers(dest="measure", required=True, metavar="reconstruction|equivariance")

    text = "PSNR, SSIM, L1 and, with --lpips, LPIPS of D(E(x))"
    plain = commands.add_parser("reconstruction", parents=[shared], help=text, description=text, **layout)
    plain.add_argument("--lpips", metavar="REFERENCE", help="LPIPS weights: a directory, a file or download")

    text = "R, S and the pixel errors of D(tau E(x))"
    tau = commands.add_parser("equivariance", parents=[shared], help=text, description=text, **layout)
    tau.add_argument("--turns", type=int, nargs="*", default=[1, 2, 3], metavar="K",
                     help="clockwise quarter turns (1 2 3)")
    tau.add_argument("--scales", type=float, nargs="*", default=[0.25, 0.5, 0.75], metavar="S",
                     help="scales (0.25 0.5 0.75)")
    tau.add_argument("--interpolation", choices=("bilinear", "bicubic"), default="bilinear",
                     help="bilinear as the released code, bicubic as the paper says (%(default)s)")
    tau.add_argument("--antialias", action="store_true", help="antialiased scaling; the released code has none")
    tau.set_defaults(lpips=None)
    return parser


if __name__ == "__main__":
    sys.exit(main())
