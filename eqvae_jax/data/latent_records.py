"""One image's latent as an ArrayRecord record.

A record is a MessagePack map {"index": int, "label": int, "moments": bytes, "crc": int}. moments are the numbers of an
array (2, 2, h, w, C), little-endian: [image, mirror image] x [mean, standard deviation] of the posterior, unscaled.
crc is the CRC-32 (zlib's) of index and label, as two little-endian int64, and moments.
"""

import math
import struct
import zlib

import msgpack
import numpy as np

DTYPES = {"float32": "<f4", "float16": "<f2"}


def pack(index: int, label: int, moments: np.ndarray, dtype: str) -> bytes:
    """One latent as a record: its image's number in the source, its class, and moments (2,2,h,w,C)."""
    data = np.ascontiguousarray(moments, DTYPES[dtype]).tobytes()
    return msgpack.packb({"index": int(index), "label": int(label), "moments": data,
                          "crc": _crc(index, label, data)})


def unpack(record: bytes, shape: tuple[int, int, int], dtype: str) -> tuple[int, int, np.ndarray]:
    """The inverse of `pack`: (index, label, moments), a read-only array (2,2,h,w,C) of the stored dtype.

    Raises:
      ValueError: not such a record, of another shape, or its checksum says that it was damaged.
    """
    try:
        fields = msgpack.unpackb(record)
        index, label, data, crc = (fields[name] for name in ("index", "label", "moments", "crc"))
        damaged = _crc(index, label, data) != crc
    except Exception as error:  # msgpack and struct raise several types on damaged bytes
        raise ValueError(f"not a record of a latent ({type(error).__name__}: {error})") from error
    if damaged:
        raise ValueError("its checksum does not match: the record is damaged")
    stored = np.dtype(DTYPES[dtype])
    if len(data) != 4 * math.prod(shape) * stored.itemsize:
        raise ValueError(f"{len(data)} bytes are no moments of shape {tuple(shape)} in {dtype}")
    return index, label, np.frombuffer(data, stored).reshape(2, 2, *shape)


def _crc(index, label, data):
    return zlib.crc32(data, zlib.crc32(struct.pack("<qq", index, label)))
