"""Crops and resizes: the released code's random crop for training, ADM's centre crop for evaluation."""

import functools
import math

import numpy as np
from PIL import Image


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
    side = max(1, int(min(height, width) * (min_crop + (max_crop - min_crop) * draws[0])))
    top, left = int((height - side) * draws[1]), int((width - side) * draws[2])
    square = resize(image[top : top + side, left : left + side], size, size)
    return square[:, ::-1] if flip and draws[3] < 0.5 else square


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
    x = _resize_rows(image, height)                                     # (h,W,3) float32
    x = _resize_rows(np.ascontiguousarray(x.swapaxes(0, 1)), width)     # (w,h,3)
    return np.ascontiguousarray(np.rint(x).astype(np.uint8).swapaxes(0, 1))


def _resize_rows(x: np.ndarray, rows: int) -> np.ndarray:
    if x.shape[0] == rows:
        return x.astype(np.float32)
    sources, weights = _taps(x.shape[0], rows)                  # (K,rows)
    y = np.zeros((rows, *x.shape[1:]), np.float32)
    for first in range(0, rows, 32):  # few enough rows to stay in cache: twice as fast on large crops
        part = slice(first, first + 32)
        for source, weight in zip(sources[:, part], weights[:, part], strict=True):
            y[part] += x[source] * weight[:, None, None]
    return y


@functools.lru_cache(maxsize=1024)
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
