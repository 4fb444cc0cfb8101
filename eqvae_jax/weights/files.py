"""Named tensors from a file, whatever its format: the first step of every reader here."""

import pathlib

import ml_dtypes  # noqa: F401  gives NumPy the name bfloat16, which safetensors asks it for
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.torch_files import read_torch_file


def read_tensors(path):
    """Flat dict of name -> NumPy array from a .safetensors or a torch file; other content of the file is left out.

    Of a checkpoint that holds a `state_dict` beside other things (Lightning's), this is what is read.
    Raises WeightsError if the file cannot be read or holds no tensors.
    """
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise WeightsError(f"{path}: no such file")
        try:
            with safe_open(path, framework="numpy") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        except Exception as error:       # the library raises several kinds, for a lying header or an unknown dtype
            raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error
    content = read_torch_file(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = {}
    if isinstance(content, dict):
        tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, np.ndarray)}
    if not tensors:
        raise WeightsError(f"{path}: holds no named tensors, so it is no file of weights")
    return tensors


def write_tensors(path, tensors):
    """Write a .safetensors file that torch's tools read too; it appears under its name only when it is complete."""
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, partial, metadata={"format": "pt"})
        partial.replace(path)
    except Exception as error:
        partial.unlink(missing_ok=True)
        raise WeightsError(f"{path}: could not be written ({error})") from error


def select(tensors, prefix):
    """The tensors whose name begins with prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
