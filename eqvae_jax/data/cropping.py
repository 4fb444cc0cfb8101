"""Crops and resizes: the released code's random crop for training, ADM's centre crop for evaluation."""

import functools
import math

import numpy as np
from PIL import Image
from scipy.sparse import csr_array


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator, min_crop: float = 0.5,
                max_crop: float = 1.0, flip: bool = False) -> np.ndarray:
    """Cuts a random square of min_crop..max_crop of the short side and resizes it.

    Always takes four draws (size, top, left, mirror), so switching `flip` on leaves the crops as they were.
    As in the released code (ldm/data, albumentations' RandomCrop) the largest offset is never drawn.

    Args:
      image: uint8 (H,W,3).
      size: side of the result.
    Returns:
      uint8 (size,size,3).
    """
    height, width = image.shape[:2]
    draws = rng.random(4)
    side = max(1, int(min(height, width) * _share(draws[0], min_crop, max_crop)))
    top, left = int((height - side) * draws[1]), int((width - side) * draws[2])
    square = resize(image[top : top + side, left : left + side], size, size)
    return square[:, ::-1] if flip and draws[3] < 0.5 else square


def side_for_random_crop(size: int, rng: np.random.Generator, min_crop: float = 0.5, max_crop: float = 1.0) -> int:
    """The smallest short side of an image whose random_crop, with a generator in the same state, is not enlarged."""
    return math.ceil(size / _share(rng.random(), min_crop, max_crop))


def _share(draw, min_crop, max_crop):
    return min_crop + (max_crop - min_crop) * draw


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the middle square as ADM does (guided-diffusion, image_datasets.py), and DiT after it.

    Halved with BOX while the short side is at least twice `size`, then BICUBIC, then the middle:
    uint8 (H,W,3) -> (size,size,3).
    """
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes by exact area average where an axis shrinks, by half-pixel bilinear where it grows.

    Shrinking is cv2.INTER_AREA's average over overlapping areas (Pillow's BOX weighs every touched pixel
    alike, which is uneven at fractional ratios); results are rounded half to even, where OpenCV rounds
    half up at the exact ratio 2. Growing differs from cv2.INTER_AREA, which there interpolates linearly
    about pixel corners instead of centres, that is, with pixels of uneven size.

    Args:
      image: uint8 (H,W,3).
    Returns:
      uint8 (height,width,3).
    """
    if image.shape[:2] == (height, width):
        return image.copy()
    rows, columns = _weights(image.shape[0], height, 1), _weights(image.shape[1], width, 3)
    x = image.reshape(len(image), -1)                                           # (H,W*3)
    y = np.empty((x.shape[1], height), np.float32)                              # (W*3,h)
    strip = max(256, 2**16 // len(x))  # numbers that stay in cache; all of a large photograph would be a gigabyte
    for first in range(0, len(y), strip):
        y[first : first + strip] = (rows @ x[:, first : first + strip].astype(np.float32)).T
    y = np.rint(columns @ y).astype(np.uint8)                                   # (w*3,h)
    return np.ascontiguousarray(y.T).reshape(height, width, 3)


@functools.lru_cache(maxsize=2048)  # of some 20 kB each; random crops of photographs have about a thousand sides
def _weights(n: int, out: int, channels: int) -> csr_array:
    """The matrix (out*channels,n*channels) that resizes n rows of interleaved channels to `out`.

    Its product is one pass over the rows that releases the interpreter's lock: twice as fast as adding rows in numpy.
    """
    sources, weights = _taps(n, out)                                                   # (K,out)
    columns = sources.T[:, None] * channels + np.arange(channels)[:, None]             # (out,channels,K)
    values = np.broadcast_to(weights.T[:, None], columns.shape)
    starts = np.arange(0, columns.size + 1, len(sources), np.int32)
    return csr_array((values.ravel(), columns.ravel().astype(np.int32), starts), (out * channels, n * channels))


def _taps(n: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of n rows make each of `out` rows, and with what weight: two arrays (K,out)."""
    if out > n:
        center = np.maximum((np.arange(out) + 0.5) * (n / out) - 0.5, 0)
        first = np.floor(center).astype(np.int64)
        sources = np.minimum(np.stack([first, first + 1]), n - 1)
        fraction = center - first
        return sources, np.stack([1 - fraction, fraction]).astype(np.float32)
    # Output i covers [i*n, (i+1)*n) and source j covers [j*out, (j+1)*out), in units of 1/out: integers,
    # so the overlaps are exact. It touches at most ceil(n/out) + 1 sources.
    start = np.arange(out) * n
    sources = start // out + np.arange(math.ceil(n / out) + 1)[:, None]
    overlap = np.minimum(start + n, (sources + 1) * out) - np.maximum(start, sources * out)
    weights = np.maximum(overlap, 0) / n
    return np.minimum(sources, n - 1), weights.astype(np.float32)
