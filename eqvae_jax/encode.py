"""Images into a cache of latents: sharded posteriors, or tokens of a VQ autoencoder, on which generators train.

    python -m eqvae_jax.encode --images=folder:TRAIN --autoencoder=diffusers:OUT --output=LATENTS
    python -m eqvae_jax.encode --images=photos --autoencoder=init:smoke --image_size=32 --output=LATENTS

Of each image: the posterior's mean and standard deviation, unscaled, or the codes, of the image and of its mirror
image; its label; its number in the source; with --keep_images the cropped image. manifest.json has their statistics,
the autoencoder's hash, scale and shift, and each shard's checksum. Stopped or killed, the same command goes on with the
first shard that is missing, and the files end up as if it had never stopped. With several hosts each writes its
own shards to one shared folder.
"""

import argparse
import functools
import importlib.metadata
import sys

import numpy as np
from ml_collections import ConfigDict

from eqvae_jax import commands, distributed
from eqvae_jax.data import latent_cache, latent_records
from eqvae_jax.data.sources import fingerprint, open_source

# JAX and all that imports it is imported where it is first needed: --help and a mistyped flag do not wait for it.

PRECISIONS = ("highest", "high", "default")


def main(arguments=None):
    """Runs the command line; returns the process's exit code, 2 for something the user can put right."""
    options = _parser().parse_args(arguments)
    from eqvae_jax.backend import use_compilation_cache
    from eqvae_jax.data.images import TooManyBroken

    use_compilation_cache()
    try:
        distributed.start_from(options)
        distributed.agree("the command", lambda: distributed.command(options))
        encode(options)
    except (TooManyBroken, RuntimeError, ValueError, OSError) as error:
        return distributed.refuse(error)
    except KeyboardInterrupt:
        return distributed.interrupted(f"the same command goes on: finished shards are in {options.output}")
    return 0


def encode(options):
    """Writes the cache that the command line asks for, or what is missing of it; returns its manifest."""
    for name in ("batch_size", "shard_size", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name}={getattr(options, name)} must be at least 1.")
    if not 0 <= options.broken_limit <= 1:
        raise ValueError(f"--broken_limit={options.broken_limit:g} is not a fraction between 0 and 1.")

    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from eqvae_jax import weights
    from eqvae_jax.run.encoding import latent_and_mirrored, write_shards
    from eqvae_jax.training.sharding import make_mesh

    mesh = make_mesh(ConfigDict({"data": -1, "fsdp": 1}), jax.local_devices())  # hosts do not wait for each other
    if options.batch_size % mesh.size:
        raise ValueError(f"--batch_size={options.batch_size} does not divide over the {mesh.size} devices of this "
                         "host: take a multiple.")
    source = open_source(options.images)
    model, params, spec = weights.load_autoencoder(options.autoencoder)
    distributed.agree("the images and the autoencoder", lambda: {
        options.images: fingerprint(source), options.autoencoder: spec.hash})
    options.dtype = stored_dtype(options.dtype, model, spec)
    side, factor = options.image_size, model.downsampling
    if side < factor or side % factor:
        nearest = " or ".join(str(multiple) for multiple in (side // factor * factor, (side // factor + 1) * factor)
                              if multiple > 0)
        raise ValueError(f"{spec.reference} downsamples by {factor} and --image_size={side} is no multiple of it: "
                         f"take {nearest}.")

    chosen = np.arange(n := min(options.limit or len(source), len(source))) * len(source) // n
    cuts = [chosen[first : first + options.shard_size] for first in range(0, n, options.shard_size)]
    plan = _plan(options, source, model, spec, n, _latent_shape(model, params, side))
    cache = latent_cache.Cache(options.output, plan, len(cuts))
    if _begin(cache):
        print(f"{options.output} is complete already; use it as latents:{options.output}")
        return cache.published()
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    encoder = functools.partial(latent_and_mirrored, model, placed)
    with jax.default_matmul_precision(options.precision):
        write_shards(cache, cuts, source, encoder, mesh, options)
    manifest = _finish(cache, source, options)
    if jax.process_index() == 0:
        print("\n".join(describe(manifest, options.output)))
    return manifest


def describe(manifest, output):
    """Lines that say what a cache holds, from its manifest."""
    statistics, autoencoder = manifest["statistics"], manifest["autoencoder"]
    if "perplexity" in statistics:
        numbers = (f"{statistics['codes_used']:,} of {autoencoder['codes']:,} codes are used; perplexity "
                   f"{statistics['perplexity']:,.1f}")
    else:
        numbers = (f"mean {statistics['overall_mean']:.4f}, std {statistics['overall_std']:.4f}; times the scale "
                   f"{autoencoder['scale']:g}: {statistics['overall_std'] * autoencoder['scale']:.4f}")
    broken = manifest["broken"]["count"]
    size = sum(entry["bytes"] for entry in manifest["shards"]) / 2**20
    return [
        f"{manifest['count']:,} latents of shape {' x '.join(map(str, manifest['shape']))}, and of the mirror images, "
        f"in {len(manifest['shards'])} shards, {size:,.1f} MiB",
        numbers,
        *([f"{broken} broken images are left out; manifest.json names them"] if broken else []),
        f"use them as latents:{output}",
    ]


def stored_dtype(wanted, model, spec):
    """The dtype of a cache: uint16 for codes, which have no other; raises ValueError where they do not fit."""
    if model.kind != "vq":
        return wanted or "float32"
    if wanted:
        raise ValueError(f"--dtype={wanted}: the latents of {spec.reference} are codes, stored as "
                         f"{latent_records.TOKENS}.")
    if model.codebook_size > 2**16:
        raise ValueError(f"{spec.reference} has {model.codebook_size:,} codes; {latent_records.TOKENS} holds 65,536.")
    return latent_records.TOKENS


def _plan(options, source, model, spec, count, shape):
    """What decides every byte of the shards: the part of the manifest that is known beforehand."""
    return {
        "format": latent_cache.FORMAT, "version": latent_cache.VERSION,
        "shape": list(shape), "dtype": options.dtype,
        "autoencoder": {"reference": spec.reference, "kind": spec.kind, "hash": spec.hash, "scale": float(spec.scale),
                        "shift": float(spec.shift), "downsampling": model.downsampling}
                       | ({"codes": model.codebook_size} if model.kind == "vq" else {}),
        "preprocessing": {"image_size": options.image_size, "crop": options.crop, "mirror": True,
                          "precision": options.precision} | ({"images": True} if options.keep_images else {}),
        "source": {"images": options.images, "description": repr(source), "records": len(source), "used": count},
        "shard_size": options.shard_size,
    }


def _latent_shape(model, params, side):
    import jax

    from eqvae_jax.run.encoding import latent_and_mirrored

    image = jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)
    stored = jax.eval_shape(functools.partial(latent_and_mirrored, model), params, image).shape
    return stored[2:] if model.kind == "vq" else stored[3:]


def _begin(cache):
    """Records or compares the plan, on every host; tells whether there is nothing to do."""
    import jax

    if jax.process_index() == 0:
        complete = cache.begin()
    distributed.meet("the plan is written")
    if jax.process_index():
        cache.check()
        complete = cache.published() is not None
    return complete


def _finish(cache, source, options):
    """The first host writes the manifest once all shards are there; all return it."""
    import jax

    from eqvae_jax.data.images import TooManyBroken

    distributed.meet("all shards are written", distributed.LAST)
    if jax.process_index() == 0:
        entries = cache.entries()
        broken = [example for entry in entries for example in entry["broken"]]
        if not (statistics := [entry["statistics"] for entry in entries if entry["statistics"]]):
            raise TooManyBroken(f"{source!r}: no readable image was found.")
        names = getattr(source, "class_names", None)
        versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "pillow")}
        cache.publish({
            "count": sum(entry["count"] for entry in entries),
            "classes": max([len(names or ()), *(entry["classes"] for entry in entries)]), "class_names": names,
            "statistics": latent_cache.summary(latent_cache.combine(statistics)),
            "broken": {"count": len(broken), "examples": broken}, "versions": versions,
        })
    distributed.meet("the manifest is written")
    return cache.published()


def _parser():
    layout = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog=commands.program("encode"), description=commands.as_called(__doc__), **layout)
    add = parser.add_argument
    add("--autoencoder", required=True, metavar="REFERENCE",
        help="diffusers:DIR_OR_HUB_ID, ldm:FILE, taming:FILE, workdir:DIR or init:PRESET")
    add("--images", required=True, metavar="REFERENCE",
        help="photos[:train|:test|:all], folder:DIR, arrayrecord:GLOB, tfds:NAME[:SPLIT] or idx:DIR[:test]")
    add("--output", required=True, metavar="DIR", help="folder of the shards and of manifest.json")
    add("--image_size", type=int, default=256, metavar="N",
        help="side in pixels, a multiple of the downsampling factor (%(default)s)")
    add("--crop", choices=("center",), default="center", help="ADM's centre crop, DiT's and SiT's (%(default)s)")
    add("--batch_size", type=int, default=32, metavar="N",
        help="images at a time on each host; it may change when a cache is continued (%(default)s)")
    add("--limit", type=int, metavar="N", help="this many images, spread evenly over the set (all)")
    add("--shard_size", type=int, default=4096, metavar="N", help="images in a shard (%(default)s)")
    add("--dtype", choices=tuple(latent_records.DTYPES),
        help="of the stored numbers; float16 halves the cache (float32; codes are uint16)")
    add("--keep_images", action="store_true",
        help="store the cropped images too, as PNG: configs/repa.py looks at them beside the latents")
    add("--precision", choices=PRECISIONS, default="highest",
        help="of the network's products; default is the accelerator's own, TF32 or bfloat16, and faster (%(default)s)")
    add("--broken_limit", type=float, default=0.01, metavar="SHARE",
        help="largest share of images that may be broken, and always one unless it is 0; they are left out "
             "(%(default)s)")
    distributed.add_flags(parser.add_argument_group("several hosts").add_argument)
    return parser


def run():
    """The command line's entry."""
    sys.exit(distributed.run(main))


if __name__ == "__main__":
    run()
