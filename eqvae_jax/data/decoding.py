"""Encoded image files to 8-bit RGB; whatever is not a whole, sane image is a BrokenExample."""

import io
import os

import numpy as np
from PIL import Image

# Only these decoders may run. A file named .jpg whose bytes are another format would otherwise reach
# Pillow's PostScript plugin, which starts an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

# 192 MiB as RGB; several threads decode at once. A few kilobytes of PNG can announce a thousand times more.
MAX_PIXELS = 2**26
# Resizing the short side of a 1 x 50,000 strip to 256 would make an image of 3 billion pixels.
MAX_ASPECT = 64

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenExample(ValueError):
    """An example that cannot be read: `.name` says which, `.reason` why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):  # the default would call BrokenExample(message) in the receiving process
        return BrokenExample, (self.name, self.reason)


def decode(data: bytes | str | os.PathLike, name: str, min_side: int | None = None) -> np.ndarray:
    """Decodes one image file to uint8 RGB (H,W,3), upright.

    EXIF orientation is applied. Greyscale is repeated, palettes are looked up, CMYK is converted without
    colour management (embedded ICC profiles are ignored, as in the released code), 16-bit greyscale is
    scaled by 1/257 and rounded, transparency is laid over white. Of several frames the first is taken.

    Args:
      data: the file's bytes, or its path.
      name: what to call it in errors.
      min_side: where given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size (libjpeg's scaled inverse
        DCT, several times faster) as long as both sides keep at least this many pixels.
    Raises:
      BrokenExample: unreadable, truncated, of another format, larger than MAX_PIXELS, thinner than
        1:MAX_ASPECT, or with 32-bit or floating-point pixels, whose range no file states.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS) as image:
            if min_side is not None:
                image.draft(None, (min_side, min_side))  # does nothing to other formats
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BrokenExample(name, f"{width}x{height} pixels are more than the {MAX_PIXELS} allowed")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise BrokenExample(name, f"{width}x{height} is a strip thinner than 1:{MAX_ASPECT}")
            image.load()  # raises on truncated files
            turn = _UPRIGHT.get(_orientation(image))
            pixels = _rgb(image, name)
            return np.asarray(pixels if turn is None else pixels.transpose(turn))
    except (BrokenExample, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise almost any type on hostile bytes
        # Without the path and the object's address: the name is already there, and the address varies.
        reason = "not a readable image" if "cannot identify" in str(error) else str(error)
        raise BrokenExample(name, f"{reason} ({type(error).__name__})") from error


def rgb8(array: np.ndarray, name: str) -> np.ndarray:
    """Brings a decoded array to uint8 RGB (H,W,3).

    Args:
      array: uint8 or uint16, (H,W), (H,W,1), (H,W,3) or (H,W,4), whose fourth channel is opacity and is
        laid over white.
      name: what to call it in errors.
    Raises:
      BrokenExample: any other dtype or shape, or an empty image.
    """
    x = np.asarray(array)
    if x.ndim == 2:
        x = x[:, :, None]
    if x.ndim != 3 or x.shape[2] not in (1, 3, 4) or x.size == 0 or x.dtype not in (np.uint8, np.uint16):
        raise BrokenExample(name, f"{x.dtype} array of shape {np.shape(array)} is not an image")
    if x.dtype == np.uint16:
        x = _from_16_bit(x)
    if x.shape[2] == 4:
        return np.asarray(_over_white(Image.fromarray(x)))
    return np.repeat(x, 3, axis=2) if x.shape[2] == 1 else x


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing about the pixels, which are whole
        return 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray(_from_16_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("I", "F"):
        raise BrokenExample(name, "32-bit pixels of unknown range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        return _over_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _from_16_bit(x: np.ndarray) -> np.ndarray:
    # 65535 = 255 * 257: white stays white. Pillow's own conversion clips at 255 instead.
    return ((x.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
