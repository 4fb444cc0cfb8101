"""Any source of images into ArrayRecord shards: smaller files, few of them, read at random fast.

    python -m eqvae_jax.data.preparation --images=folder:DIR --output=DIR --size=512

writes images-00000-of-00042.array_record ... and preparation.json; train with arrayrecord:DIR/*.array_record.
Stopped or killed, the same command continues with the first shard that is missing.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterable

import numpy as np
from absl import logging
from PIL import Image
from tqdm import tqdm

from eqvae_jax import commands, distributed
from eqvae_jax.data import records
from eqvae_jax.data.cropping import resize
from eqvae_jax.data.decoding import BrokenExample
from eqvae_jax.data.sources import Source, open_source

ENCODINGS = {"jpeg": b"\xff\xd8\xff", "png": b"\x89PNG"}  # and how such a file begins


def write_arrayrecord(images: Iterable[dict], path: str | os.PathLike) -> int:
    """Writes examples to one ArrayRecord shard, complete or not at all.

    Args:
      images: dicts of image (uint8 (H,W,3), stored losslessly as PNG; or the bytes of an image file, stored
        as they are), label (int) and optionally name (str).
      path: the shard. Its folder is made if needed.
    Returns:
      How many were written.
    Raises:
      OSError: the disk is full or not writable.
    """
    def pack(example):
        image = example["image"]
        image = image if isinstance(image, bytes) else encode(image, "png")
        return records.pack(image, example["label"], example.get("name", ""))

    return records.write_shard(map(pack, images), path)


def prepare(source: Source, output: str, size: int, encoding: str = "jpeg", shard_size: int = 4096,
            workers: int = 0, broken_limit: float = 0.01) -> int:
    """Writes a source to shards, short sides reduced to `size` by area average.

    Smaller images stay as they are, byte for byte where their file is of that encoding already. Broken ones are left
    out, and logged by name.

    Args:
      source: what to write.
      output: folder of the shards and of preparation.json.
      size: pixels of the short side.
      encoding: "jpeg" (quality 95, full colour resolution) or "png" (lossless).
      shard_size: records per shard.
      workers: processes that decode and encode; 0 for this one.
      broken_limit: the largest fraction of the source that may be broken.
    Returns:
      How many records the shards hold, those of earlier runs included.
    Raises:
      ValueError: arguments that cannot work; the folder holds shards prepared otherwise; too many broken.
      OSError: the disk is full or not writable.
    """
    if size < 1 or shard_size < 1 or workers < 0 or encoding not in ENCODINGS:
        raise ValueError(f"size={size}, shard_size={shard_size} must be at least 1, workers={workers} not "
                         f"negative, and encoding={encoding!r} one of {tuple(ENCODINGS)}")
    plan = {"images": repr(source), "records": len(source), "size": size, "encoding": encoding,
            "shard_size": shard_size}
    _agree(plan, output)
    shards = math.ceil(len(source) / shard_size)
    paths = [os.path.join(output, f"images-{k:05d}-of-{shards:05d}.array_record") for k in range(shards)]
    broken = []

    def kept(packed):
        for record, error in packed:
            progress.update()
            if error is None:
                yield record
                continue
            broken.append(str(error))
            logging.warning("Left out: %s", error)
            if len(broken) > max(1, broken_limit * len(source)):
                first = "".join(f"\n  {reason}" for reason in broken[:5])
                raise ValueError(f"{source!r}: more than {broken_limit:.1%} are broken. The first:"
                                 f"{first}\nRepair or remove them, or raise broken_limit.")

    total = 0
    work = source, size, encoding
    _begin(*work)
    pool = multiprocessing.get_context("spawn").Pool(workers, _begin, work) if workers else None
    try:
        with tqdm(total=len(source), unit="image", file=sys.stderr) as progress:
            for k, path in enumerate(paths):
                numbers = range(k * shard_size, min((k + 1) * shard_size, len(source)))
                if os.path.exists(path):
                    total += records.count(path)
                    progress.update(len(numbers))
                    continue
                packed = pool.imap(_pack, numbers, chunksize=8) if pool else map(_pack, numbers)
                total += records.write_shard(kept(packed), path)
    finally:
        if pool:
            pool.terminate()
    return total


def encode(image: np.ndarray, encoding: str) -> bytes:
    """uint8 RGB (H,W,3) as the bytes of an image file."""
    file = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if encoding == "jpeg" else {"compress_level": 4}
    Image.fromarray(image).save(file, encoding.upper(), **options)
    return file.getvalue()


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """Reduces the short side to `size` by area average, or returns a smaller image unchanged."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    return image if scale >= 1 else resize(image, round(height * scale), round(width * scale))


_WORK = ()  # (source, size, encoding) of this process: sent once, not with every record


def _begin(*work):
    global _WORK
    _WORK = work


def _pack(i: int) -> tuple[bytes | None, BrokenExample | None]:
    source, size, encoding = _WORK
    try:
        example = source[i]
    except BrokenExample as error:
        return None, error
    image = shrink(example["image"], size)
    # JPEG again would be lossy, and, at quality 95 and full colour resolution, slower to read.
    file = source.file(i) if image is example["image"] and hasattr(source, "file") else b""
    image = file if file.startswith(ENCODINGS[encoding]) else encode(image, encoding)
    return records.pack(image, example["label"], source.name(i)), None


def _agree(plan: dict, output: str):
    """Records the plan in the folder, or compares it with the one found there."""
    path = os.path.join(output, "preparation.json")
    if os.path.exists(path):
        with open(path) as file:
            found = json.load(file)
        differing = [f"{key}: {found.get(key)!r} there, {value!r} now" for key, value in plan.items()
                     if found.get(key) != value]
        if differing:
            raise ValueError(f"{output} holds shards prepared otherwise ({'; '.join(differing)}); "
                             "name another --output, or delete that folder")
        return
    os.makedirs(output, exist_ok=True)
    with open(path, "w") as file:
        json.dump(plan, file, indent=1)


def main(arguments=None):
    """Runs the command line; returns the process's exit code, 2 for something the user can put right."""
    options = _parser().parse_args(arguments)
    try:
        source = open_source(options.images)
        total = prepare(source, options.output, options.size, options.encoding, options.shard_size, options.workers,
                        options.broken_limit)
    except (ValueError, OSError) as error:
        return distributed.refuse(error)
    except KeyboardInterrupt:
        return distributed.interrupted(f"the same command goes on: finished shards are in {options.output}")
    print(f"{total} of {len(source)} images in {options.output}; "
          f"use them as arrayrecord:{os.path.join(options.output, '*.array_record')}")
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog=commands.program("prepare"), description=commands.as_called(__doc__),
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", required=True, metavar="REFERENCE",
        help="what to write: folder:DIR, tfds:NAME[:SPLIT], arrayrecord:GLOB, idx:DIR[:test] or "
             "photos[:train|:test|:all]")
    add("--output", required=True, metavar="DIR", help="folder of the shards and of preparation.json")
    add("--size", type=int, default=512, metavar="N",
        help="pixels of the short side; smaller images stay as they are (%(default)s)")
    add("--encoding", choices=tuple(ENCODINGS), default="jpeg",
        help="jpeg: quality 95, full colour resolution; png: lossless (%(default)s)")
    add("--shard_size", type=int, default=4096, metavar="N", help="records in a shard (%(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N",
        help="processes that decode; 0: this one alone (%(default)s)")
    add("--broken_limit", type=float, default=0.01, metavar="SHARE",
        help="largest share of images that may be broken, and always one; they are left out (%(default)s)")
    return parser


def run():
    """The command line's entry."""
    sys.exit(main())


if __name__ == "__main__":
    run()
