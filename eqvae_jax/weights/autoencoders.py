"""Autoencoders from references and into files: `load_autoencoder`, `open_autoencoder` and `save_autoencoder`."""

import dataclasses
import hashlib
import pathlib
from typing import Any, NamedTuple

import flax
import numpy as np

from eqvae_jax.autoencoders.presets import PRESETS, from_description
from eqvae_jax.weights import diffusers_folder, ldm_files, tables
from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.initial import calm, random_parameters
from eqvae_jax.weights.references import nearest, parse_reference

FORMS = "diffusers:DIR, ldm:FILE.safetensors, ldm:FILE.ckpt or, for VQ models, taming:FILE.ckpt or .safetensors"


@dataclasses.dataclass(frozen=True)
class AutoencoderSpec:
    """What a user of latents must know: diffusion models see (z - shift) * scale, and belong to these very weights.

    kind: family of the model, "kl" or "vq". reference: where the weights came from. hash: 16 hexadecimal digits of
    the weights and of the padding between them.
    """

    kind: str
    scale: float
    shift: float
    reference: str
    hash: str


class Opened(NamedTuple):
    """model, params and spec as of `load_autoencoder`; left_out: why -> names of the file's entries not read for it."""

    model: Any
    params: dict
    spec: AutoencoderSpec
    left_out: dict


def load_autoencoder(reference, *, seed=0):
    """(model, params, spec) of an autoencoder reference: see `references.AUTOENCODERS` for the forms.

    params: the dict under "params" of flax variables, float32 NumPy arrays. seed: of the random weights of `init:`.
    Raises WeightsError where the weights cannot be found or do not fit, listing missing, extra and mis-shaped ones.
    """
    return open_autoencoder(reference, seed=seed)[:3]


def open_autoencoder(reference, *, seed=0):
    """What `load_autoencoder` gives, and what of the file is not part of it; raises the same."""
    reference = parse_reference(reference)
    model, params, scale, shift, left_out = LOADERS[reference.kind](reference.rest, seed)
    spec = AutoencoderSpec(model.kind, scale, shift, str(reference), parameter_hash(params, model.padding))
    return Opened(model, params, spec, left_out)


def save_autoencoder(reference, model, params, spec):
    """Writes weights for others: `diffusers:DIR`, `ldm:FILE` or `taming:FILE` (VQ models), .ckpt or .safetensors.

    A folder is for `from_pretrained` of diffusers' AutoencoderKL or VQModel, and keeps the scale and shift of spec;
    the other formats have no place for them. A file appears under its name only once it is complete.
    Raises WeightsError where the parameters are not the model's, its graph is none of theirs, or a file cannot be
    written.
    """
    kind, rest = parse_reference(reference)
    check_writable(reference, model)
    path = pathlib.Path(rest)
    if kind == "diffusers":
        diffusers_folder.write(path, model, params, spec.scale, spec.shift)
    elif kind in ("ldm", "taming") and path.suffix in (".safetensors", ".ckpt"):
        if kind == "taming" and model.kind != "vq":
            raise WeightsError(f"{reference}: files of taming-transformers hold VQ models; this one is for ldm:{rest}")
        ldm_files.write(path, model, params)
    else:
        raise WeightsError(f"{reference}: weights are written as {FORMS}")


def check_writable(reference, model):
    """Raises WeightsError for a model of which no format of others could say what it computes."""
    if model.padding != "zeros":
        raise WeightsError(
            f"{reference}: this autoencoder's convolutions pad with {model.padding!r}, and the graphs of diffusers, "
            "latent-diffusion and taming-transformers pad with zeros and have no field for it: there, its images would "
            "have wrong borders. Use it from its workdir:DIR, or go on training it with --config.model.padding=zeros.")


def parameter_hash(params, padding="zeros"):
    """16 hexadecimal digits that change with any value, name or shape of the parameters, and with the padding."""
    digest = hashlib.sha256(b"" if padding == "zeros" else padding.encode())
    for path, value in sorted(flax.traverse_util.flatten_dict(params, sep="/").items()):
        value = np.ascontiguousarray(value, np.float32)
        digest.update(f"{path} {value.shape} ".encode())
        digest.update(value.data if value.size else b"")
    return digest.hexdigest()[:16]


def load_diffusers(rest, seed):
    return *diffusers_folder.read(diffusers_folder.find(rest)), {}


def load_ldm(rest, seed):
    return ldm_files.read(rest)


def load_taming(rest, seed):
    model, *loaded = ldm_files.read(rest)
    if model.kind != "vq":
        raise WeightsError(f"taming:{rest}: a KL autoencoder (it has no codebook), of latent-diffusion: ldm:{rest}")
    return model, *loaded


def load_workdir(rest, seed):
    from eqvae_jax.training.checkpoint import load_averaged  # needs Orbax, which is slow to import

    try:
        saved, config, item = load_averaged(rest)
    except (FileNotFoundError, ValueError) as error:
        raise WeightsError(f"workdir:{rest}: {error}") from error
    section, params = config.get("autoencoder"), saved.get("autoencoder")
    if not section or not params:
        raise WeightsError(f"workdir:{rest}: its run trained no autoencoder")
    try:
        model, scale, shift = from_description(section), float(section["scale"]), float(section["shift"])
        tables.check_parameters("its parameters", params, tables.parameter_shapes(model))
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"workdir:{rest}: {type(error).__name__}: {error}") from error
    others = [name for name in ("params", "ema", "opt_state", "buffers") if name != item]
    return model, params, scale, shift, {ldm_files.BESIDE: others}


def load_init(rest, seed):
    if rest not in PRESETS:
        hint = nearest(rest, PRESETS) or "."
        raise WeightsError(f"init:{rest}: no such preset{hint} There are {', '.join(PRESETS)}.")
    model, scale, shift = PRESETS[rest]
    return model, calm(model, random_parameters(tables.parameter_shapes(model), seed)), scale, shift, {}


LOADERS = {"diffusers": load_diffusers, "ldm": load_ldm, "taming": load_taming, "workdir": load_workdir,
           "init": load_init}
