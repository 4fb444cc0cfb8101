"""Weights of LPIPS: torchvision's VGG16 and the linear heads, from files or by download. Never random."""

import pathlib
import re

import jax

from eqvae_jax.features.lpips import STAGES, parameter_shapes
from eqvae_jax.weights.downloads import cache_directory, checksum, fetch
from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.files import read_tensors
from eqvae_jax.weights.tables import read_parameters

TRUNK, HEADS = "vgg16-397923af.pth", "vgg.pth"
# name -> address, hash function, beginning of the hash
SOURCES = {
    TRUNK: ("https://download.pytorch.org/models/vgg16-397923af.pth", "sha256", "397923af"),
    HEADS: ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth", "md5",
            "d507d7349b931f0638a25a48a722f98a"),
}
HEADS_V00_MD5 = "0f3eb8ca7dcd95b6cbffbb9fe7ee0335"       # the version before inputs were scaled, under the same name
INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)       # of the convolutions in torchvision's VGG16
CONVOLUTIONS = [f"conv{i}_{j}" for i, widths in enumerate(STAGES, 1) for j in range(1, len(widths) + 1)]
ADVICE = (
    f"Put {TRUNK} ({SOURCES[TRUNK][0]}) and {HEADS} ({SOURCES[HEADS][0]}) into one directory and name it: "
    "--config.loss.lpips_weights=DIR (or a file that holds both; --config.loss.perceptual_weight=0 does without)."
)


def load_lpips(reference):
    """Parameters for `features.lpips.lpips`: a dict of float32 NumPy arrays.

    reference: a directory with torchvision's vgg16-397923af.pth and lpips' vgg.pth (v0.1); one .safetensors or torch
    file with the tensors of both; an LDM or EQ-VAE .ckpt, which carries them; or "download".
    Raises WeightsError that says which files to get and how to name them, or lists what does not fit.
    """
    if not reference:
        raise WeightsError(f"LPIPS has no weights.\n{ADVICE}")
    path = fetch_lpips() if reference == "download" else pathlib.Path(reference).expanduser()
    if path.is_dir():
        absent = [name for name in SOURCES if not (path / name).is_file()]
        if absent:
            raise WeightsError(f"LPIPS weights: {path} has no {' and no '.join(absent)}.\n{ADVICE}")
        if checksum(path / HEADS, "md5") == HEADS_V00_MD5:
            raise WeightsError(f"{path / HEADS} is of LPIPS v0.0, which was made for unscaled inputs.\n{ADVICE}")
        tensors = {**read_tensors(path / TRUNK), **read_tensors(path / HEADS)}
    elif path.is_file():
        tensors = read_tensors(path)
    else:
        raise WeightsError(f"LPIPS weights: there is no {path}.\n{ADVICE}")
    tensors = {name.removeprefix("loss.perceptual_loss."): value for name, value in tensors.items()}
    try:
        return lpips_parameters(tensors, path)
    except WeightsError as error:
        raise WeightsError(f"LPIPS weights, {error}\n{ADVICE}") from error


def lpips_parameters(tensors, where):
    """LPIPS' parameters from tensors of these names; raises WeightsError, naming `where`, unless all are there."""
    params = read_parameters(relevant(tensors), flat_shapes(), "/".join, where)
    return {**params, **{name: head.reshape(-1) for name, head in params.items() if name.startswith("lin")}}


def flat_shapes():
    """Our shapes, with the heads as the files have them: 1 x 1 convolutions to one channel, (1, C, 1, 1)."""
    shapes = parameter_shapes()
    for name in [name for name in shapes if name.startswith("lin")]:
        shapes[name] = jax.ShapeDtypeStruct((1, *shapes[name].shape, 1, 1), shapes[name].dtype)
    return shapes


def relevant(tensors):
    """The tensors of LPIPS under our names. VGG's classifier and the rest of a checkpoint are left out."""
    renamed = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)", name):
            index, leaf = int(match[1]), {"weight": "kernel", "bias": "bias"}[match[2]]
            # An index that is no convolution of VGG16 (of VGG19, or with batch norm) is kept: it must not pass unseen.
            renamed[f"vgg/{CONVOLUTIONS[INDICES.index(index)]}/{leaf}" if index in INDICES else name] = value
        elif match := re.fullmatch(r"(lin\d)\.model\.1\.weight", name):
            renamed[match[1]] = value
    return renamed


def fetch_lpips(directory=None):
    """Downloads the two files into a directory (default: the user's cache), unless they are there; returns it.

    Each is checked before it appears under its name. Raises WeightsError without a network or with a wrong checksum.
    """
    directory = pathlib.Path(directory or cache_directory("lpips"))
    for name, (address, kind, beginning) in SOURCES.items():
        try:
            fetch(directory / name, [address], kind, beginning)
        except WeightsError as error:
            raise WeightsError(f"LPIPS weights: {error}\n{ADVICE}") from error
    return directory
