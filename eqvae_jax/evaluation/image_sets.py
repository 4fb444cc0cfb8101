"""Whole sets of images by reference, generated or real, for metrics of distributions: 8-bit, of one size, streamed."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

from eqvae_jax import distributed
from eqvae_jax.data.images import evaluation_batches
from eqvae_jax.data.sources import BrokenExample, fingerprint, open_source
from eqvae_jax.evaluation.samples import Samples, open_samples, read_images


class ImageSet(NamedTuple):
    """Images of one size under a reference, opened but not read.

    count: how many, 0 where there are statistics only. image_size: (H, W), None for statistics only.
    batches: (rows, every=1) -> iterator of uint8 (B, H, W, 3), B <= rows, of every `every`-th image of the set.
    preparation: what is done to the images. samples: of an .npz. broken: name -> reason, filled as images are read.
    """

    reference: str
    count: int
    image_size: tuple[int, int] | None
    batches: Callable
    preparation: str
    samples: Samples | None
    broken: dict


def npz_path(reference):
    """The path in npz:FILE or FILE.npz, None for other references."""
    if reference.startswith("npz:"):
        return reference.removeprefix("npz:")
    return reference if reference.endswith(".npz") else None


def open_sets(references, image_size=None):
    """ImageSet of each reference, all of one size.

    references: name -> npz:FILE, FILE.npz, or as data.sources.open_source, cut to image_size with ADM's centre crop.
    image_size: side in pixels; None for that of the .npz files.

    Raises:
      ValueError: a reference names nothing readable, the sizes differ, or nothing says which size is meant.
    """
    files = {name: open_samples(path) for name, text in references.items() if (path := npz_path(text)) is not None}
    sizes = {name: file.image_size for name, file in files.items() if file.count}
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size} must be at least 1.")
    size = (image_size, image_size) if image_size else next(iter(sizes.values()), None)
    for name, other in sizes.items():
        if other != size:
            raise ValueError(f"{name} ({references[name]}) holds images of {by(other)} pixels, and "
                             f"{'image_size' if image_size else next(iter(sizes))} is {by(size)}: sets of different "
                             "resolutions do not compare; take a reference of the generated images' size.")
    for name, text in references.items():
        if name not in files and (size is None or size[0] != size[1]):
            problem = f"the .npz holds images of {by(size)}" if size else "nothing says which: give image_size"
            raise ValueError(f"{name} ({text}) must be cut to squares of one size, and {problem}.")
    sets = {name: _from_file(text, files[name]) if name in files else _from_source(text, size)
            for name, text in references.items()}
    distributed.agree("the sets of images", lambda: {name: _fingerprint(one) for name, one in sets.items()})
    return sets


def _fingerprint(images):
    if images.samples:
        return f"{images.count:,} images in {pathlib.Path(images.samples.path).stat().st_size} bytes"
    return fingerprint(open_source(images.reference))


def by(size):
    return f"{size[0]} x {size[1]}"


def _from_file(reference, samples):
    return ImageSet(reference, samples.count, samples.image_size,
                    lambda rows, every=1: _each(read_images(samples, rows), every), "none", samples, {})


def _from_source(reference, size):
    source, broken = open_source(reference), {}
    preparation = "ADM centre crop"
    try:
        found = source[0]["image"].shape[:2]
        if found == size:
            preparation = "none"
        elif min(found) < size[0]:
            preparation += f", enlarged (the first image has {by(found)} pixels)"
    except (BrokenExample, IndexError):
        pass  # the first batch says so

    def batches(rows, every=1):
        found = evaluation_batches(source, image_size=size[0], batch_size=rows, whole=True,
                                   on_broken=broken.__setitem__)
        return _each((batch["image"][batch["mask"]] for batch in found), every)

    return ImageSet(reference, len(source), size, batches, preparation, None, broken)


def _each(batches, every):
    """Images 0, every, 2 every ... of those that come."""
    start = 0
    for images in batches:
        yield images[-start % every :: every]
        start += len(images)
