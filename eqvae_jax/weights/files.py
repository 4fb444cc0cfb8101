"""Named tensors from a file, whatever its format: the first step of every reader here."""

import contextlib
import json
import mmap
import pathlib
import re

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from eqvae_jax.atomic import whole
from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.torch_files import read_torch_file

SAFETENSORS_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}

PARTS = ("ema", "model", "state_dict", "model_state_dict")  # where training checkpoints keep weights, the best first
WRAPPERS = re.compile(r"(module\.|_orig_mod\.)+")           # DistributedDataParallel's and torch.compile's


def read_tensors(path):
    """Flat dict of name -> NumPy array from a .safetensors or a torch file; other content of the file is left out.

    The arrays are read-only and map the file, so that only what is used costs memory. Of a checkpoint that holds a
    `state_dict` beside other things (Lightning's), this is what is read.
    Raises WeightsError if the file cannot be read or holds no tensors.
    """
    return read_checkpoint(path)[0]


def read_checkpoint(path):
    """(what `read_tensors` gives, names of what else a torch file holds: optimizer states, counters, settings)."""
    path = pathlib.Path(path)
    tensors, beside = {}, []
    content = map_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        beside = [name for name in content if isinstance(name, str) and name != "state_dict"]
        content = content["state_dict"]
    if isinstance(content, dict):
        tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, np.ndarray)}
    if not tensors:
        raise WeightsError(f"{path}: holds no named tensors, so it is no file of weights")
    return tensors, beside


def read_state(path):
    """Name -> array of the weights in a file, the average where there is one, without the wrappers' prefixes."""
    return read_state_and_numbers(path)[0]


def read_state_and_numbers(path):
    """(what `read_state` gives, the whole numbers that a torch file holds beside the weights: name -> int)."""
    path = pathlib.Path(path)
    content = map_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
    content = content if isinstance(content, dict) else {}
    numbers = {name: value for name, value in content.items() if isinstance(name, str) and type(value) is int}
    content = next((content[part] for part in PARTS if isinstance(content.get(part), dict)), content)
    named = [(WRAPPERS.sub("", name, count=1) if WRAPPERS.match(name) else name, value)
             for name, value in content.items() if isinstance(name, str) and isinstance(value, np.ndarray)]
    if not named:
        raise WeightsError(f"{path}: holds no named tensors, so it is no file of weights")
    if len(dict(named)) != len(named):
        raise WeightsError(f"{path}: holds some tensors twice, with and without the prefix of a wrapper")
    return dict(named), numbers


def map_safetensors(path):
    """Name -> array that maps the file. Layout: 8 bytes of length, a header in JSON, the tensors' bytes."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy"):     # checks every name, type, shape and offset, and reads nothing else
            pass
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        header.pop("__metadata__", None)
        unknown = sorted({entry["dtype"] for entry in header.values()} - SAFETENSORS_TYPES.keys())
        if unknown:
            raise ValueError(f"tensors of type {', '.join(unknown)}")
        return {
            name: np.ndarray(entry["shape"], SAFETENSORS_TYPES[entry["dtype"]], data, begin + entry["data_offsets"][0])
            for name, entry in header.items()
        }
    except Exception as error:           # the library raises several kinds, for a lying header or an unknown dtype
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error


def write_tensors(path, tensors):
    """Write a .safetensors file that torch's tools read too; it appears under its name only when it is complete."""
    with whole_or_nothing(path) as partial:
        save_file({k: np.asarray(v, order="C") for k, v in tensors.items()}, partial, metadata={"format": "pt"})


@contextlib.contextmanager
def whole_or_nothing(path):
    """Gives a path to write to, whose file becomes `path` once all went well; WeightsError and no file otherwise."""
    try:
        with whole(path) as partial:
            yield partial
    except Exception as error:
        raise WeightsError(f"{path}: could not be written ({error})") from error
