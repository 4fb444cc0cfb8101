"""One image's latent as an ArrayRecord record.

A record is a MessagePack map {"index": int, "label": int, "moments" or "tokens": bytes, "crc": int}, and "image": bytes
where the images are kept. The numbers are little-endian, of the image and then of its mirror image:

    moments   (2, 2, h, w, C), float32 or float16: the posterior's mean and standard deviation, unscaled
    tokens    (2, h, w), uint16: codes of a VQ autoencoder

image is the cropped image as PNG. crc is the CRC-32 (zlib's) of index and label, as two little-endian int64, and of the
bytes of both.
"""

import io
import math
import struct
import zlib
from typing import NamedTuple

import msgpack
import numpy as np
from PIL import Image

DTYPES = {"float32": "<f4", "float16": "<f2"}
TOKENS = "uint16"
_STORED = DTYPES | {TOKENS: "<u2"}


class Record(NamedTuple):
    """index: the image's number in the source. latent: read-only, as stored. image: PNG, or None where none is kept."""

    index: int
    label: int
    latent: np.ndarray
    image: bytes | None = None

    def pixels(self) -> np.ndarray:
        """The kept image, uint8 (H,W,3)."""
        with Image.open(io.BytesIO(self.image)) as image:
            return np.asarray(image)


def stored_shape(shape, dtype):
    """Of what a record holds of a latent of this shape: (h,w,C), or (h,w) of tokens."""
    return (2, *shape) if dtype == TOKENS else (2, 2, *shape)


def pack(index: int, label: int, latent: np.ndarray, dtype: str, image: np.ndarray | None = None) -> bytes:
    """One latent as a record; image: uint8 (H,W,3), to be kept."""
    fields = {"index": int(index), "label": int(label),
              _field(dtype): np.ascontiguousarray(latent, _STORED[dtype]).tobytes()}
    if image is not None:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        fields["image"] = file.getvalue()
    return msgpack.packb(fields | {"crc": _crc(index, label, fields[_field(dtype)], fields.get("image"))})


def unpack(record: bytes, shape: tuple[int, ...], dtype: str) -> Record:
    """The inverse of `pack`.

    Raises:
      ValueError: not such a record, of another shape, or its checksum says that it was damaged.
    """
    try:
        fields = msgpack.unpackb(record)
        index, label, data, crc = (fields[name] for name in ("index", "label", _field(dtype), "crc"))
        image = fields.get("image")
        damaged = _crc(index, label, data, image) != crc
    except Exception as error:  # msgpack and struct raise several types on damaged bytes
        raise ValueError(f"not a record of a latent ({type(error).__name__}: {error})") from error
    if damaged:
        raise ValueError("its checksum does not match: the record is damaged")
    stored, whole = np.dtype(_STORED[dtype]), stored_shape(shape, dtype)
    if len(data) != math.prod(whole) * stored.itemsize:
        raise ValueError(f"{len(data)} bytes are no {_field(dtype)} of shape {tuple(shape)} in {dtype}")
    return Record(index, label, np.frombuffer(data, stored).reshape(whole), image)


def _field(dtype):
    return "tokens" if dtype == TOKENS else "moments"


def _crc(index, label, data, image):
    return zlib.crc32(image or b"", zlib.crc32(data, zlib.crc32(struct.pack("<qq", index, label))))
