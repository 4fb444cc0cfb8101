"""The work of `python -m eqvae_jax.encode`: images are read, encoded with their mirror images, written in shards."""

import functools
import itertools
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from eqvae_jax import distributed
from eqvae_jax.autoencoders.objective import to_float
from eqvae_jax.data import latent_cache, latent_records, records
from eqvae_jax.data.cropping import center_crop
from eqvae_jax.data.decoding import BrokenExample
from eqvae_jax.data.images import TooManyBroken
from eqvae_jax.training.sharding import put

THREADS = 16  # that read and decode images
NAMED = 5  # broken images in an error


@functools.partial(jax.jit, static_argnums=0)
def latent_and_mirrored(model, params, image):
    """uint8 (B,H,W,3) -> of the image and its mirror image: [mean, std] of the posterior, (B,2,2,h,w,C) float32, or the
    tokens of a VQ autoencoder, (B,2,h,w) int32.
    """
    def of(x):
        latent = model.apply({"params": params}, x, method=model.encode)
        if model.kind == "vq":
            return model.apply({"params": params}, latent.z, method=model.quantize).indices  # (B,h,w)
        return jnp.stack([latent.mean, latent.std], 1)                             # (B,2,h,w,C)

    x = to_float(image)
    return jnp.stack([of(x), of(x[:, :, ::-1])], 1)


def write_shards(cache, cuts, source, encode, mesh, options):
    """Writes those of this host's shards, every jax.process_count()-th, that are not finished yet.

    Args:
      cache: data.latent_cache.Cache, begun. cuts: for each shard, the numbers of its images in the source.
      encode: uint8 (B,H,W,3) -> latents, as `latent_and_mirrored`.
      mesh: of this host's devices. options: the command line; its dtype is that of the cache.

    Raises:
      TooManyBroken: more images than options.broken_limit cannot be read.
      ValueError: a latent is not finite, or a label is negative.
    """
    mine = range(jax.process_index(), len(cuts), jax.process_count())
    kept = {k: entry for k in mine if (entry := cache.finished(k))}
    distributed.meet("shards are verified", distributed.LAST)
    todo = [k for k in mine if k not in kept]
    broken = [example for entry in kept.values() for example in entry["broken"]]
    share = options.broken_limit * sum(len(cuts[k]) for k in mine)
    allowed = max(1, share) if share else 0  # one image of a small set is not a broken set
    with tqdm(total=sum(len(cuts[k]) for k in mine), initial=sum(len(cuts[k]) for k in kept), unit="image",
              file=sys.stderr, disable=jax.process_index() > 0) as progress:
        encoded = _one_ahead(_batches(source, cuts, todo, options), encode, mesh, options.batch_size)
        for k, parts in itertools.groupby(encoded, key=lambda part: part[0]):
            facts = {"count": 0, "broken": [], "classes": 0, "statistics": None}
            path = str(cache.directory / cache.names[k])
            records.write_shard(_records(parts, facts, broken, allowed, options, source, progress), path)
            cache.finish(k, facts)


def _batches(source, cuts, todo, options):
    """Yields (shard, examples), at most batch_size of one shard, as a thread pool reads and crops them in order."""
    def load(i):
        i = int(i)
        try:
            example = source[i]
        except BrokenExample as error:
            return {"index": i, "name": error.name, "reason": error.reason}
        if example["label"] < 0:
            raise ValueError(f"{source.name(i)} has label {example['label']}: classes are counted from 0.")
        return {"index": i, "label": example["label"], "image": center_crop(example["image"], options.image_size)}

    if not todo:
        return
    wanted = grain.MapDataset.source(np.concatenate([cuts[k] for k in todo])).map(load)
    read = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=max(THREADS, 2 * options.batch_size))
    examples = iter(wanted.to_iter_dataset(read))
    try:
        for k in todo:
            for first in range(0, len(cuts[k]), options.batch_size):
                rows = min(options.batch_size, len(cuts[k]) - first)
                yield k, list(itertools.islice(examples, rows))
    finally:
        examples.close()


def _one_ahead(batches, encode, mesh, batch_size):
    """Yields (shard, examples, latents (B,2,..)); the device computes one batch while the host writes another."""
    waiting = None
    for k, examples in batches:
        images = [example["image"] for example in examples if "image" in example]
        latents = None
        if images:
            images += [images[-1]] * (batch_size - len(images))  # one shape, so one compiled program
            latents = encode(put(mesh, {"image": np.stack(images)})["image"])
        if waiting:
            yield waiting
        waiting = k, examples, latents
    if waiting:
        yield waiting


def _records(parts, facts, broken, allowed, options, source, progress):
    """Yields the packed records of one shard, and fills in what is to be known of it."""
    statistics = []
    for _, examples, latents in parts:
        found = [example for example in examples if "image" not in example]
        for example in found:
            logging.warning("Left out: %s: %s", example["name"], example["reason"])
        facts["broken"] += found
        broken += found
        if len(broken) > allowed:
            first = "".join(f"\n  {example['name']}: {example['reason']}" for example in broken[:NAMED])
            raise TooManyBroken(f"{source!r}: {len(broken)} images are broken, and --broken_limit="
                                f"{options.broken_limit:g} is exceeded. The first:{first}\nRepair or remove them, or "
                                "raise --broken_limit if they may be left out.")
        whole = [example for example in examples if "image" in example]
        if whole:
            with np.errstate(over="ignore"):  # which is refused below, by name
                stored = np.asarray(latents)[: len(whole)].astype(options.dtype)
            for example, values in zip(whole, stored, strict=True):
                if not np.isfinite(values).all():
                    raise ValueError(f"{source.name(example['index'])}: its latent is not finite in {options.dtype}; "
                                     "the autoencoder is broken, or its numbers need --dtype=float32.")
                yield latent_records.pack(example["index"], example["label"], values, options.dtype,
                                          example["image"] if options.keep_images else None)
            statistics.append(latent_cache.statistics_of(stored))
            facts["count"] += len(whole)
            facts["classes"] = max(facts["classes"], 1 + max(example["label"] for example in whole))
        progress.update(len(examples))
    facts["statistics"] = latent_cache.combine(statistics) if statistics else None
