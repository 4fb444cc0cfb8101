"""Weights of FID's Inception, from files or by download, with its batch norms folded in. Never random."""

import pathlib
from typing import NamedTuple

import flax
import jax
import numpy as np

from eqvae_jax.features.inception import CLASSES, parameter_shapes
from eqvae_jax.weights.autoencoders import parameter_hash
from eqvae_jax.weights.downloads import cache_directory, fetch
from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.files import read_tensors
from eqvae_jax.weights.tables import LEAVES, read_parameters

EPSILON = 1e-3                                           # of the batch norms
# pytorch-fid's and torch-fidelity's files are the same, byte for byte: 95,628,359 bytes.
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
ADDRESSES = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
ADVICE = (f"Get {ADDRESSES[0]} or {ADDRESSES[1]} (the same file) and give its path, or say \"download\". "
          "torchvision's inception_v3 is another network.")


class InceptionSpec(NamedTuple):
    """Where the weights came from, and a hash that tells them from others whatever the file's format."""

    reference: str
    hash: str


def load_inception(reference):
    """(params for `features.inception.inception_features`, InceptionSpec); params: a tree of float32 NumPy arrays.

    reference: pytorch-fid's pt_inception-2015-12-05-6726825d.pth, torch-fidelity's weights-inception-2015-12-05-
    6726825d.pth, a .safetensors file with the same tensors; or "download".
    The classifier's bias is read, so that the file is the right one, and left out: no metric of ours uses it.
    Raises WeightsError that says which file to get and how to name it, or lists what does not fit.
    """
    if not reference:
        raise WeightsError(f"Inception has no weights.\n{ADVICE}")
    path = fetch_inception() if reference == "download" else pathlib.Path(reference)
    if not path.is_file():
        raise WeightsError(f"Inception weights: there is no file {path}.\n{ADVICE}")
    try:
        # Files written by torch >= 0.4.1 count the batches that the norms have seen.
        tensors = {k: v for k, v in read_tensors(path).items() if not k.endswith(".bn.num_batches_tracked")}
        params = read_parameters(tensors, file_shapes(), key_of, path)
        return folded(params, path), InceptionSpec(str(reference), parameter_hash(params))
    except WeightsError as error:
        raise WeightsError(f"Inception weights, {error}\n{ADVICE}") from error


def key_of(path):
    return ".".join([*path[:-1], LEAVES[path[-1]]])


def file_shapes():
    """The tree of the file's parameters: each of our convolutions is one without bias and a batch norm there."""
    shapes = {}
    for (*layer, leaf), shape in flax.traverse_util.flatten_dict(parameter_shapes()).items():
        if layer == ["fc"]:
            shapes["fc", leaf] = shape
        elif leaf == "kernel":
            shapes[*layer, "conv", leaf] = shape
        else:
            shapes |= {(*layer, "bn", norm): shape for norm in ("scale", "bias", "mean", "var")}
    return flax.traverse_util.unflatten_dict({**shapes, ("fc", "bias"): jax.ShapeDtypeStruct((CLASSES,), np.float32)})


def folded(params, where):
    """Our parameters from the file's: the norm's gain goes into the kernel, the rest into a bias; in float64.

    scale (k * x - mean) / sqrt(var + eps) + bias = (gain k) * x + (bias - gain mean), gain = scale / sqrt(var + eps).
    Raises WeightsError, naming `where`, if the result is not finite.
    """
    file, ours = flax.traverse_util.flatten_dict(params), {("fc", "kernel"): params["fc"]["kernel"]}
    for (*layer, kind, leaf), kernel in file.items():
        if (kind, leaf) == ("conv", "kernel"):
            scale, bias, mean, var = (file[*layer, "bn", name].astype(np.float64) for name in
                                      ("scale", "bias", "mean", "var"))
            with np.errstate(invalid="ignore"):                                  # reported below
                gain = scale / np.sqrt(var + EPSILON)
            ours[*layer, "kernel"] = (kernel * gain).astype(np.float32)
            ours[*layer, "bias"] = (bias - gain * mean).astype(np.float32)
    broken = sorted({".".join(path[:-1]) for path, value in ours.items() if not np.isfinite(value).all()})
    if broken:
        raise WeightsError(f"{where}: values that are not finite, or negative variances, in {', '.join(broken)}")
    return flax.traverse_util.unflatten_dict(ours)


def fetch_inception(directory=None):
    """Downloads the file into a directory (default: the user's cache), unless it is there; returns its path.

    It is checked before it appears under its name. Raises WeightsError without a network or with a wrong checksum.
    """
    directory = pathlib.Path(directory or cache_directory("inception"))
    try:
        return fetch(directory / ADDRESSES[0].rpartition("/")[2], ADDRESSES, "sha256", SHA256)
    except WeightsError as error:
        raise WeightsError(f"Inception weights: {error}\n{ADVICE}") from error
