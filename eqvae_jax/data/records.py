"""One image as an ArrayRecord record, and shards of them.

A record is a MessagePack map {"image": bytes of an image file, "label": int, "name": str}; `name` may be
missing. Any MessagePack library reads and writes it.
"""

import os

import msgpack
from array_record.python import array_record_module

# One record per group: random access decompresses nothing but the record it reads. Image files do not
# compress further.
_OPTIONS = "group_size:1,uncompressed"


def pack(image: bytes, label: int, name: str = "") -> bytes:
    """One example (the bytes of an image file, a class number, what to call it) as a record."""
    return msgpack.packb({"image": image, "label": int(label), "name": name})


def unpack(record: bytes) -> dict:
    """The inverse of `pack`: {"image": bytes, "label": int, "name": str}.

    Raises:
      ValueError: not such a record.
    """
    example = msgpack.unpackb(record)
    fields = example if isinstance(example, dict) else {}
    if not isinstance(fields.get("image"), bytes) or not isinstance(fields.get("label"), int):
        raise ValueError("not a map with image bytes and an integer label")
    return {"image": example["image"], "label": example["label"], "name": str(example.get("name", ""))}


def count(path: str | os.PathLike) -> int:
    """How many records a shard holds.

    Raises:
      ValueError: not an ArrayRecord file, or a truncated one.
    """
    try:
        reader = array_record_module.ArrayRecordReader(os.fspath(path))
        records = reader.num_records()
        reader.close()
        return records
    except Exception as error:  # the native module has one exception type for everything
        raise ValueError(f"{path} is not a complete ArrayRecord file ({error}); write it again") from error


def write_shard(records, path: str | os.PathLike) -> int:
    """Writes packed records to one shard, which appears under its name only when it is complete.

    Returns:
      How many were written.
    Raises:
      OSError: the disk is full or not writable; the unfinished file is removed.
    """
    partial = f"{os.fspath(path)}.partial"
    os.makedirs(os.path.dirname(partial) or ".", exist_ok=True)
    written = 0
    try:
        with open(partial, "wb"):  # a folder that cannot be written gives Python's own clear error here
            pass
        writer = array_record_module.ArrayRecordWriter(partial, _OPTIONS)
        for record in records:
            writer.write(record)
            written += 1
        writer.close()
        os.replace(partial, path)
    except BaseException as error:
        if os.path.exists(partial):
            os.remove(partial)
        if isinstance(error, RuntimeError):
            raise OSError(f"{path} could not be written; is the disk full? ({error})") from error
        raise
    return written
