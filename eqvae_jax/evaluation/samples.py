"""Sets of images as .npz files in ADM's format: 8-bit images and statistics of their features, streamed both ways.

    arr_0                       uint8 (N, H, W, 3)
    arr_1                       int64 (N,), the classes of generated images, where known
    mu, sigma                   (D,), (D, D) of Inception's pool features; mu_s, sigma_s of its spatial ones (sFID)
    mu(NAME), sigma(NAME)       ours: of another network's features; no other tool takes them for Inception's
    made_with                   ours: JSON that says which network and how many images the statistics are of

Other tools read what they know and leave the rest. In ADM's own references the statistics are of the whole training set
and arr_0 holds 10,000 images of it. Source: evaluations/evaluator.py of openai/guided-diffusion.
"""

import contextlib
import json
import math
import os
import pathlib
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from eqvae_jax.atomic import whole

IMAGES = "arr_0"
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, KeyError, ValueError)


class Samples(NamedTuple):
    """What an .npz holds, before any image is read.

    count: images, 0 for a file of statistics only. image_size: (H, W), or None. members: names of the arrays.
    made_with: what `write_npz` was told, or None.
    """

    path: pathlib.Path
    count: int
    image_size: tuple[int, int] | None
    members: frozenset
    made_with: dict | None


def open_samples(path):
    """Samples of an .npz; reads its directory and headers.

    Raises:
      ValueError: there is no such file, it is none, is cut short, its images are not uint8 (N, H, W, 3) with N > 0, or
        it holds neither images nor statistics.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    with _explained(path), zipfile.ZipFile(path) as archive:
        members = frozenset(name.removesuffix(".npy") for name in archive.namelist())
        made_with = None
        if "made_with" in members:
            with archive.open("made_with.npy") as file:
                made_with = json.loads(str(np.lib.format.read_array(file, allow_pickle=False)))
        if IMAGES not in members:
            if not {"mu", "sigma"} <= members:
                raise ValueError(f"it holds neither images (arr_0) nor statistics (mu, sigma), only {sorted(members)}")
            return Samples(path, 0, None, members, made_with)
        with archive.open(f"{IMAGES}.npy") as file:
            shape = _image_shape(file)
            stored, needed = archive.getinfo(f"{IMAGES}.npy").file_size - file.tell(), math.prod(shape)
        if stored != needed:
            raise ValueError(f"arr_0 is cut short: {stored} of the {needed} bytes of its {shape[0]} images are there")
    return Samples(path, shape[0], shape[1:3], members, made_with)


def read_images(samples, rows):
    """Yields uint8 (B, H, W, 3) of at most `rows` images in the file's order, without holding the others.

    The file's own checksum is verified on the way. Raises ValueError for a damaged file.
    """
    height, width = samples.image_size
    with _explained(samples.path), zipfile.ZipFile(samples.path) as archive, archive.open(f"{IMAGES}.npy") as file:
        _image_shape(file)  # to the first byte after the header
        for start in range(0, samples.count, rows):
            batch = np.empty((min(rows, samples.count - start), height, width, 3), np.uint8)
            view, filled = memoryview(batch).cast("B"), 0
            while filled < len(view):  # a zip member may give fewer bytes than it was asked for
                read = file.readinto(view[filled : filled + 2**20])
                if not read:
                    raise ValueError(f"arr_0 is cut short: image {start + filled // (3 * height * width)} is missing")
                filled += read
            yield batch


def write_npz(path, batches, count, *, labels=None, statistics=None, spatial=None, made_with=None):
    """Writes images, and statistics if given, whole or not at all; memory does not grow with their number.

    Args:
      batches: iterable of uint8 (B, H, W, 3), of `count` images in all.
      labels: int (N,), or None.
      statistics, spatial: Gaussian of pool features and of spatial ones.
      made_with: dict for JSON; its "features" is the network's name, which must be given with statistics. ADM's names
        (mu, sigma) are used for "inception" only.

    Raises:
      ValueError: other images, or another number of them.
    """
    suffix = statistics_suffix(made_with["features"]) if made_with and (statistics or spatial) else ""
    with whole(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        with _member(archive, IMAGES) as file:
            size, written = None, 0
            for batch in batches:
                batch = checked_images(batch, size)
                if size is None:
                    size = batch.shape[1:3]
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size, 3)}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(memoryview(np.ascontiguousarray(batch)).cast("B"))
                written += len(batch)
            if written != count or not count:
                raise ValueError(f"{path}: {written} images came, {count} were announced; nothing was written.")
        arrays = {} if labels is None else {"arr_1": np.asarray(labels, np.int64)}
        for gaussian, end in ((statistics, ""), (spatial, "_s")):
            if gaussian is not None:
                arrays |= {f"mu{end}{suffix}": gaussian.mu, f"sigma{end}{suffix}": gaussian.sigma}
        if made_with:
            arrays["made_with"] = np.array(json.dumps(made_with))
        for name, array in arrays.items():
            with _member(archive, name) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _member(archive, name):
    # A ZipInfo of its own has no time in it: the same set gives the same bytes.
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def statistics_suffix(features):
    """What follows mu and sigma in the names of arrays: nothing for Inception's, as everyone writes them."""
    return "" if features == "inception" else f"({features})"


def checked_images(images, size=None):
    """Images as NumPy, if they are uint8 (B, H, W, 3) of (H, W) = size; else ValueError that says what is wrong."""
    images = np.asarray(images)
    if images.dtype != np.uint8:
        broken = 0
        if images.ndim and np.issubdtype(images.dtype, np.floating):
            broken = int(np.sum(~np.isfinite(images.reshape(len(images), -1)).all(1)))
        also = f", and {broken} of these {len(images)} images hold NaN or inf" if broken else ""
        raise ValueError(f"images are {images.dtype}{also}: metrics compare 8-bit images. Those in [-1, 1] become "
                         "uint8 as clip(127.5 x + 128, 0, 255), those in [0, 1] as clip(255 x + 0.5, 0, 255).")
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"images must be of shape (N, H, W, 3), channels last, and these are {images.shape}.")
    if size is not None and images.shape[1:3] != tuple(size):
        raise ValueError(f"images are {images.shape[1]} x {images.shape[2]} where those before were {size[0]} x "
                         f"{size[1]}: a set has one size.")
    return images


def _image_shape(file):
    """(N, H, W, 3) of the member that is open at its start, which is left after its header."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"arr_0 is in version {version} of NumPy's format, which images do not need")
    shape, fortran, dtype = read[version](file)
    if not shape or not shape[0]:
        raise ValueError(f"arr_0 is empty, of shape {shape}")
    checked_images(np.broadcast_to(np.zeros((), dtype), (1, *shape[1:])))
    if fortran:
        raise ValueError("arr_0 is stored columns first: write np.ascontiguousarray of it")
    return shape


@contextlib.contextmanager
def _explained(path):
    """Names the file in every error about its content."""
    try:
        yield
    except _UNREADABLE as error:
        cut = " (is it cut short?)" if isinstance(error, zipfile.BadZipFile | EOFError | zlib.error) else ""
        reason = str(error.args[0] if error.args else type(error).__name__).rstrip(".")
        raise ValueError(f"{os.fspath(path)}: {reason}{cut}.") from error
