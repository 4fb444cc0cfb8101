"""Weights from one format into another, checked by reading back what was written.

    python -m eqvae_jax.convert --from=workdir:RUNS/eq --to=diffusers:OUT
    python -m eqvae_jax.convert --from=workdir:RUNS/eq --to=diffusers:OUT --latent-stats=folder:VAL --limit=2000
    python -m eqvae_jax.convert --from=ldm:sdxl_vae.safetensors --to=diffusers:OUT --scale=0.13025
    python -m eqvae_jax.convert --from=taming:last.ckpt --to=taming:vqgan.safetensors
    python -m eqvae_jax.convert --from=diffusers:stabilityai/sd-vae-ft-ema
    python -m eqvae_jax.convert --from=workdir:RUNS/sit --to=sit:SiT.pt

Without --to it only says what is there. A folder written as diffusers:OUT is loaded by
diffusers.AutoencoderKL.from_pretrained("OUT"), or VQModel for a VQ-GAN. Diffusion models see (latent - shift) * scale:
--latent-stats measures both on images, as fine-tuning changes them.
"""

import argparse
import dataclasses
import math
import sys

from eqvae_jax import commands
from eqvae_jax.run.conversion import FEW_NAMES, aligned, check_target, left_out, parameter_table, show

# JAX and all that imports it is imported where it is first needed: --help and a mistyped flag do not wait for it.

TARGETS = {
    "diffusers": "diffusers:DIR, config.json and safetensors",
    "ldm": "ldm:FILE.safetensors or ldm:FILE.ckpt, of latent-diffusion and Stable Diffusion",
    "taming": "taming:FILE.safetensors or taming:FILE.ckpt, of taming-transformers (VQ models)",
    "dit": "dit:FILE.pt or dit:FILE.safetensors, of facebookresearch/DiT",
    "sit": "sit:FILE.pt or sit:FILE.safetensors, of willisma/SiT",
    "repa": "repa:FILE.pt or repa:FILE.safetensors, of sihyun-yu/REPA",
    "maskgit": "maskgit:FILE.pth or maskgit:FILE.safetensors, of the PyTorch reproduction; .msgpack of the original",
}
PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv", "codebook")
KEEPS_SCALE = ("diffusers",)  # the other formats leave scale and shift to the diffusion model's own config
IMAGE_OPTIONS = ("image_size", "batch_size", "limit", "crops", "min_crop", "max_crop")
FEW_CHANNELS = 32  # shown without --verbose


def main(arguments=None):
    """Runs the command line; returns the process's exit code, 2 for something the user can put right."""
    options = _options(arguments)
    from eqvae_jax.backend import use_compilation_cache
    from eqvae_jax.data.images import TooManyBroken

    use_compilation_cache()
    try:
        convert(options)
    except (ValueError, OSError, TooManyBroken) as error:
        sys.stdout.flush()  # what was done comes before why it stopped
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(options):
    """Describes, measures, writes and verifies, as the command line says; what can be refused early is."""
    from eqvae_jax import weights
    from eqvae_jax.evaluation import comparison
    from eqvae_jax.run.generator_conversion import convert_generator, is_generator
    from eqvae_jax.weights.references import AUTOENCODERS, GENERATORS

    source = weights.parse_reference(options.source, AUTOENCODERS | GENERATORS)
    target = weights.parse_reference(options.target, TARGETS) if options.target else None
    if target:
        check_target(source, target, options.overwrite)
    if is_generator(source, target):
        return convert_generator(options, source, target)
    if unused := [f"--{name}" for name in weights.GENERATOR_OPTIONS if getattr(options, name) is not None]:
        raise ValueError(f"{', '.join(unused)}: only with a file of a generator.")
    if options.latent_stats:
        chosen = {name: getattr(options, name) for name in IMAGE_OPTIONS if getattr(options, name) is not None}
        protocol = comparison.Protocol(images=options.latent_stats, **chosen)
        batches, broken = comparison.open_batches(protocol)

    opened = weights.open_autoencoder(str(source), seed=options.seed)
    model, params, spec = opened.model, opened.params, opened.spec
    if target:
        check_form(target, model, spec, options.shift)
    if options.latent_stats:
        comparison.check({str(source): (model, params, spec)}, protocol, measures=())
    show(describe(model, spec), parameter_table(params, PARTS, options.verbose),
         left_out(opened.left_out, options.verbose))

    given = {name: getattr(options, name) for name in ("scale", "shift") if getattr(options, name) is not None}
    if options.latent_stats:
        statistics, given = measure(model, params, spec, batches)
        show(statistics_table(statistics, protocol, broken, options.verbose))
    new = dataclasses.replace(spec, **given)
    if given:
        show([f"{name:<12}{getattr(spec, name):.6g} -> {value:.6g}" for name, value in given.items()])
    if target:
        weights.save_autoencoder(str(target), model, params, new)
        show([f"wrote       {target}", *verify(target, model, new)])


def check_form(target, model, spec, shift):
    """Raises ValueError where the target's format cannot hold the model; now, not after an hour of measuring."""
    from eqvae_jax.weights import ldm_files
    from eqvae_jax.weights.autoencoders import check_writable

    check_writable(target, model)
    if target.kind == "taming" and spec.kind != "vq":
        raise ValueError(
            f"{target}: {spec.reference} is a {spec.kind} model, and taming-transformers has VQ models only: "
            f"write diffusers:DIR or ldm:{target.rest}."
        )
    if target.kind == "diffusers" and spec.kind == "vq" and shift:
        raise ValueError(f"{target}: diffusers' VQModel has no place for a shift; leave out --shift={shift:g}.")
    if target.kind != "diffusers" and model.groups != ldm_files.GROUPS:
        raise ValueError(
            f"{target}: {spec.reference} has {model.groups} groups a normalisation; {target.kind}: files do not "
            f"say how many, and there it is always {ldm_files.GROUPS}: write diffusers:DIR."
        )


def describe(model, spec):
    """Lines that say what a reference holds: kind, graph, latent, scale and shift, hash."""
    from eqvae_jax.autoencoders import presets

    kinds = {"kl": "continuous latents with a Gaussian posterior", "vq": "discrete latents from a codebook"}
    levels = ", ".join(map(str, model.attention_levels)) or "none"
    names = presets.names_of(model)
    quant = "with" if getattr(model, "quant", True) else "without"
    widths = " ".join(str(model.channels * multiplier) for multiplier in model.multipliers)
    graph = f"that of preset {' and '.join(names)}" if names else "no preset's"
    lines = [
        f"reference   {spec.reference}",
        f"kind        {spec.kind}, {kinds[spec.kind]}",
        f"graph       {graph}; widths {widths}, blocks a level: {model.blocks_per_level}, "
        f"groups: {model.groups},",
        f"            attention on levels: {levels}, {quant} quant convolutions, padding: {model.padding}",
        f"latent      {model.latent_channels} channels, 1/{model.downsampling} of the image's sides",
    ]
    if spec.kind == "vq":
        lines.append(f"codebook    {model.codebook_size:,} codes of length {model.latent_channels}")
    kind = spec.reference.partition(":")[0]
    source = f" (assumed: {kind}: files keep none)" if kind in TARGETS and kind not in KEEPS_SCALE else ""
    numbers = [f"{name:<12}{getattr(spec, name):.6g}{source}" for name in ("scale", "shift")]
    return [*lines, *numbers, f"hash        {spec.hash}"]


def measure(model, params, spec, batches):
    """(LatentStatistics, {"scale", "shift"}) on images; the shift stays 0 where the model has none."""
    from eqvae_jax.evaluation import latents, reconstruction

    encode, _ = reconstruction.functions(model)
    statistics = latents.latent_statistics(encode, params, batches)
    shifted = spec.shift != 0 or not getattr(model, "quant", True)  # SD3's family, without quant convolutions
    scale, shift = latents.scale_and_shift(statistics, with_shift=shifted)
    return statistics, {"scale": scale, "shift": shift}


def statistics_table(statistics, protocol, broken, verbose=False):
    """Lines of a table of the latents' mean and standard deviation, per channel and overall."""
    side = protocol.image_size
    lines = [f"latents of {statistics.count:,} images of {side} x {side} pixels from {protocol.images}"]
    if broken:
        lines.append(f"{len(broken)} broken images are left out: {', '.join(list(broken)[:FEW_NAMES])}")
    rows = [[str(i), mean, std] for i, (mean, std) in enumerate(zip(*statistics[1:3], strict=True))]
    hidden = 0 if verbose else max(0, len(rows) - FEW_CHANNELS)
    rows = [*rows[: len(rows) - hidden], ["all", statistics.mean, statistics.std]]
    numbers = [[name, f"{mean:.4f}", f"{std:.4f}"] for name, mean, std in rows]
    lines += aligned([["channel", "mean", "std"], *numbers])
    return [*lines, f"({hidden} more channels: --verbose)"] if hidden else lines


def verify(target, model, spec):
    """Reads the target back; returns lines that say what was compared and what its format does not keep.

    Raises ValueError where anything differs from what was to be written.
    """
    from eqvae_jax import weights
    from eqvae_jax.autoencoders import presets

    advice = "Do not use it; write it again, and if that does not help, to another disk."
    try:
        back, _, found = weights.load_autoencoder(str(target))
    except (ValueError, OSError) as error:
        raise ValueError(f"{target} was written but cannot be read back: {error}\n{advice}") from error
    same = [("hash", spec.hash, found.hash), ("graph", presets.describe(model), presets.describe(back))]
    keeps = target.kind in KEEPS_SCALE
    same += [(name, getattr(spec, name), getattr(found, name)) for name in ("scale", "shift") if keeps]
    different = [f"{name} is {new} instead of {old}" for name, old, new in same if old != new]
    if different:
        raise ValueError(f"{target} was written but reads back differently: {'; '.join(different)}.\n{advice}")
    lines = [f"verified    read back with the same {', '.join(name for name, *_ in same)} ({found.hash})"]
    if not keeps:
        lines.append(f"note        {target.kind}: files keep no scale and no shift; whoever uses this one must be told "
                     f"scale {spec.scale:.6g}, shift {spec.shift:.6g}")
        if (found.scale, found.shift) != (spec.scale, spec.shift):
            lines.append(f"            (eqvae_jax itself will assume {found.scale:.6g} and {found.shift:.6g})")
    return lines


def _options(arguments):
    """The command line, with what contradicts itself refused as argparse refuses (exit code 2)."""
    parser = argparse.ArgumentParser(
        prog=commands.program("convert"), description=commands.as_called(__doc__), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, metavar="REFERENCE",
        help="diffusers:DIR_OR_HUB_ID, ldm:FILE, taming:FILE, init:PRESET, dit:FILE, sit:FILE, repa:FILE, "
        "maskgit:FILE or workdir:DIR")
    add("--to", dest="target", metavar="REFERENCE",
        help="diffusers:DIR, ldm:FILE or taming:FILE (.safetensors or .ckpt), of generators dit:FILE, sit:FILE, "
        "repa:FILE or maskgit:FILE (.pt or .safetensors); without it nothing is written")
    add("--overwrite", action="store_true", help="write over files that exist")
    add("--scale", type=_finite, metavar="X", help="the latents' scale, where the source does not know it")
    add("--shift", type=_finite, metavar="X", help="the latents' shift, where the source does not know it")
    add("--verbose", action="store_true", help="list every tensor and every channel")
    add("--seed", type=int, default=0, metavar="N", help="of the random weights of init: (%(default)s)")
    add("--heads", type=int, metavar="N", help="of a generator's file, where the width does not tell")
    add("--codes", type=int, metavar="N", help="of a maskgit: file whose vocabulary is not the released one")
    add("--prediction", choices=("velocity", "noise", "score"), help="what a sit: file predicts (velocity)")
    group = parser.add_argument_group("scale and shift measured on images")
    add = group.add_argument
    add("--latent-stats", "--latent_stats", metavar="IMAGES",
        help="photos[:train|:test|:all], folder:DIR, arrayrecord:GLOB, tfds:NAME[:SPLIT] or idx:DIR[:test]: "
        "scale becomes 1 / std of these images' latents, and shift, in models that have one, their mean")
    add("--image_size", type=int, metavar="N", help="side in pixels, a multiple of the downsampling factor (256)")
    add("--batch_size", type=int, metavar="N", help="images at a time (8)")
    add("--limit", type=int, metavar="N", help="this many images, spread evenly over the set (all)")
    add("--crops", type=int, metavar="N", help="1: ADM's centre crop; more: fixed random crops of each image (1)")
    add("--min_crop", type=float, metavar="SHARE", help="of the short side, the smallest random crop (0.5)")
    add("--max_crop", type=float, metavar="SHARE", help="of the short side, the largest random crop (1.0)")
    options = parser.parse_args(arguments)
    if options.latent_stats is None:
        if unused := [f"--{name}" for name in IMAGE_OPTIONS if getattr(options, name) is not None]:
            parser.error(f"{', '.join(unused)}: only with --latent-stats=IMAGES")
    elif options.scale is not None or options.shift is not None:
        parser.error("--latent-stats measures scale and shift: give either it or --scale and --shift")
    if options.scale is not None and not options.scale > 0:
        parser.error(f"--scale={options.scale:g} is not positive")
    if options.overwrite and not options.target:
        parser.error("--overwrite: only with --to=REFERENCE")
    return options


def _finite(text):
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def run():
    """The command line's entry."""
    sys.exit(main())


if __name__ == "__main__":
    run()
