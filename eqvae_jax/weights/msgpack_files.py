"""Trees of arrays in flax's msgpack files, read and written; nothing in a file is executed or resolved by name.

Layout: maps whose keys are text, and arrays as extension 1 (NumPy scalars: 3), which hold (shape, dtype's name, bytes)
in msgpack again. Source: flax/serialization.py.
"""

import math
import mmap
import pathlib

import ml_dtypes
import msgpack
import numpy as np

from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.files import whole_or_nothing

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)} | {
    name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "uint32", "uint8", "bool")}
ARRAY, SCALAR = 1, 3
# A list is only an array's shape or a few numbers. Longer ones would be allocated before their elements are looked for.
LONGEST_LIST, LONGEST_MAP, LONGEST_TEXT, DEEPEST = 64, 65_536, 4096, 32


def is_msgpack(path):
    """Whether a file begins as a map of msgpack that is not empty, which no file of torch's does."""
    path = pathlib.Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.read(1)
    return bool(first) and (0x81 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))


def read_msgpack(path):
    """Nested dicts with read-only NumPy arrays, as the file has them.

    Raises WeightsError where the file is broken, or holds what flax would not write for weights.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tree = unpack(data, extensions=True)
        check_tree(tree)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:           # the library raises several kinds: ValueError, its own, OverflowError, ...
        raise WeightsError(f"{path}: not a readable msgpack file, perhaps a partial download "
                           f"({type(error).__name__}: {error})") from error
    return tree


def write_msgpack(path, tree):
    """Writes nested dicts of arrays as flax does; the file appears under its name only when it is complete."""
    def extension(value):
        value = np.asarray(value, order="C")
        return msgpack.ExtType(ARRAY, msgpack.packb((value.shape, value.dtype.name, value.tobytes())))

    with whole_or_nothing(path) as partial, open(partial, "wb") as file:
        file.write(msgpack.packb(tree, default=extension, strict_types=True))


def unpack(data, extensions):
    """The object in a piece of msgpack, within limits that any file of weights keeps."""
    def refuse(code, data):
        raise WeightsError(f"an extension of kind {code} inside an array")

    return msgpack.unpackb(data, ext_hook=array if extensions else refuse, raw=False, strict_map_key=True,
                           max_str_len=LONGEST_TEXT, max_array_len=LONGEST_LIST, max_map_len=LONGEST_MAP,
                           max_bin_len=len(data), max_ext_len=len(data))


def array(code, data):
    """The array of an extension."""
    if code not in (ARRAY, SCALAR):
        raise WeightsError(f"an extension of kind {code}, where flax writes arrays as {ARRAY}")
    content = unpack(data, extensions=False)
    shape, name, values = content if isinstance(content, list) and len(content) == 3 else (None, None, None)
    if not isinstance(shape, list) or len(shape) > 32 or any(type(n) is not int or n < 0 for n in shape):
        raise WeightsError("an array whose shape is no list of sizes")
    if not isinstance(name, str) or name not in DTYPES:
        raise WeightsError(f"an array of a type that is none of {', '.join(DTYPES)}")
    if not isinstance(values, bytes) or len(values) != math.prod(shape) * DTYPES[name].itemsize:
        raise WeightsError(f"an array of shape {tuple(shape)} and type {name} with other than its bytes")
    return np.frombuffer(values, DTYPES[name]).reshape(shape)


def check_tree(tree):
    level, depth = [tree], 0
    while level:
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)
                 if isinstance(child, (dict, list))]
        depth += 1
        if depth > DEEPEST:
            raise WeightsError(f"a tree of more than {DEEPEST} levels")
