"""Folders in diffusers' layout: config.json beside diffusion_pytorch_model.safetensors, on disk or on the Hub."""

import contextlib
import json
import math
import pathlib
import re

from eqvae_jax.autoencoders.kl import AutoencoderKL
from eqvae_jax.autoencoders.vq import AutoencoderVQ
from eqvae_jax.weights import tables
from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.files import read_tensors, whole_or_nothing, write_tensors
from eqvae_jax.weights.ldm_files import widths_as_multiples

CONFIG = "config.json"
STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
CLASSES = ("AutoencoderKL", "VQModel")
LARGEST_SIZE = 2**20
FILES = [CONFIG, f"{STEM}.safetensors", INDEX, f"{STEM}-*.safetensors"]


def find(rest):
    """The local folder of `diffusers:REST`: a directory, or ORG/NAME[/SUBFOLDER] of the Hub, downloaded and cached."""
    folder = pathlib.Path(rest)
    if folder.is_dir():
        if not (folder / CONFIG).is_file() and (folder / "vae" / CONFIG).is_file():
            raise WeightsError(f"{folder}: holds a whole pipeline; its autoencoder is diffusers:{folder / 'vae'}")
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)?", rest):
        raise WeightsError(f"diffusers:{rest}: no such directory, and not the ORG/NAME of a model on the Hub either")
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    organisation, name, *subfolder = rest.split("/")
    patterns = ["/".join([*subfolder, file]) for file in FILES]
    try:
        snapshot = pathlib.Path(snapshot_download(f"{organisation}/{name}", allow_patterns=patterns))
        if not any(snapshot.joinpath(*subfolder).glob("*.safetensors")):       # only old uploads have no safetensors
            patterns.append("/".join([*subfolder, f"{STEM}.bin"]))
            snapshot = pathlib.Path(snapshot_download(f"{organisation}/{name}", allow_patterns=patterns))
    except Exception as error:                               # of many kinds: offline, unknown, gated, interrupted
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        raise WeightsError(
            f"diffusers:{rest}: no such directory, and it could not be had from the Hugging Face Hub: {reason}\n"
            f"Download its {CONFIG} and {STEM}.safetensors elsewhere and name their folder: diffusers:DIR"
        ) from error
    return snapshot.joinpath(*subfolder)


def read(folder):
    """(model, params, scale, shift) of a folder; raises WeightsError, with the lists, where they do not fit."""
    model, scale, shift = read_config(folder)
    levels, tensors = len(model.multipliers), tables.new_attention_names(read_files(folder))
    try:
        shapes = tables.parameter_shapes(model)
    except WeightsError as error:
        raise WeightsError(f"{folder / CONFIG}: {error}") from error
    params = tables.read_parameters(tensors, shapes, lambda p: tables.diffusers_key(p, levels), folder)
    return model, params, scale, shift


def read_files(folder, stem=STEM):
    """Name -> array of all tensors in a folder: one safetensors file, several with an index, or an old .bin.

    stem: the files' name up to the suffix.
    """
    whole, old = folder / f"{stem}.safetensors", folder / f"{stem}.bin"
    if whole.is_file():
        return read_tensors(whole)
    for index in (folder / f"{stem}.safetensors.index.json", folder / f"{stem}.bin.index.json"):
        if not index.is_file():
            continue
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(map(is_file_name, shards.values())):
            raise WeightsError(f"{index}: its weight_map does not name files of this folder")
        files = [read_tensors(folder / file) for file in sorted(set(shards.values()))]
        return {name: value for tensors in files for name, value in tensors.items()}
    if old.is_file():
        return read_tensors(old)
    raise WeightsError(f"{folder}: holds neither {whole.name} nor {old.name}")


def is_file_name(name):
    return isinstance(name, str) and pathlib.PurePath(name).name == name != ".."


def read_config(folder):
    """(model, scale, shift) from config.json; raises WeightsError for what our models cannot be."""
    path = folder / CONFIG
    if not path.is_file():
        raise WeightsError(f"{folder}: has no {CONFIG}, so it is no folder of diffusers")
    config = read_json(path)
    class_name = config.get("_class_name")
    if class_name not in CLASSES:
        raise WeightsError(f"{path}: describes a {class_name}; {' and '.join(CLASSES)} are read")
    # diffusers leaves out nothing today, but older files lack what was added later: these are its defaults.
    fixed = {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "mid_block_add_attention": True}
    if class_name == "AutoencoderKL":
        quant = bool(config.get("use_quant_conv", True))
        fixed |= {"latents_mean": None, "latents_std": None}
        if config.get("use_post_quant_conv", True) != quant:
            raise WeightsError(f"{path}: use_post_quant_conv is {not quant} and use_quant_conv is {quant}; this "
                               "package's autoencoders have both convolutions or neither")
    else:
        fixed |= {"norm_type": "group"}
        if config.get("vq_embed_dim") not in (None, config.get("latent_channels")):
            raise WeightsError(f"{path}: vq_embed_dim is {config['vq_embed_dim']} and latent_channels "
                               f"{config.get('latent_channels')}; only models in which they are equal are read")
    for name, wanted in fixed.items():
        if config.get(name, wanted) != wanted:
            raise WeightsError(f"{path}: {name} is {config[name]!r}, and this package's autoencoders have {wanted!r}")
    try:
        widths = [positive(width) for width in config["block_out_channels"]]
        down = [attends(kind, "Down", "Encoder") for kind in config["down_block_types"]]
        up = [attends(kind, "Up", "Decoder") for kind in config["up_block_types"]]
        if not len(widths) == len(down) == len(up) or down != up[::-1]:
            raise ValueError("down_block_types and up_block_types do not mirror each other")
        fields = dict(
            **widths_as_multiples(widths), blocks_per_level=positive(config["layers_per_block"]),
            latent_channels=positive(config["latent_channels"]), groups=positive(config["norm_num_groups"]),
            attention_levels=tuple(i for i, attention in enumerate(down) if attention),
        )
        if class_name == "AutoencoderKL":
            model = AutoencoderKL(**fields, quant=quant)
        else:
            model = AutoencoderVQ(**fields, codebook_size=positive(config["num_vq_embeddings"]))
        # diffusers' own default; a VAE without a shift says null.
        scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor")
        shift = 0.0 if shift is None else float(shift)
        if not (0 < float(scale) < math.inf and math.isfinite(shift)):
            raise ValueError(f"scaling_factor {scale} or shift_factor {shift} cannot be")
        return model, float(scale), shift
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise WeightsError(f"{path}: {type(error).__name__}: {error}") from error


def positive(value):
    """The value if it can be a size."""
    if type(value) is not int or not 0 < value <= LARGEST_SIZE:
        raise ValueError(f"{value!r} where a size of 1 to {LARGEST_SIZE} belongs")
    return value


def attends(kind, direction, side):
    """Whether a block type of diffusers has attention; ValueError for one that is not of this family."""
    names = [f"{direction}{side}Block2D", f"Attn{direction}{side}Block2D"]
    if kind not in names:
        raise ValueError(f"block type {kind!r} is neither of {names}")
    return kind == names[1]


def config_of(model, scale, shift):
    """The config.json of a model; raises WeightsError for a shift where diffusers has no place for one."""
    attention = ["Attn" if i in model.attention_levels else "" for i in range(len(model.multipliers))]
    common = {
        "_diffusers_version": "0.30.0", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
        "block_out_channels": [model.channels * m for m in model.multipliers],
        "down_block_types": [f"{a}DownEncoderBlock2D" for a in attention],
        "up_block_types": [f"{a}UpDecoderBlock2D" for a in reversed(attention)],
        "layers_per_block": model.blocks_per_level, "latent_channels": model.latent_channels,
        "norm_num_groups": model.groups, "sample_size": 256, "scaling_factor": scale, "mid_block_add_attention": True,
    }
    if model.kind == "kl":
        return {
            "_class_name": "AutoencoderKL", **common, "shift_factor": shift or None,
            "latents_mean": None, "latents_std": None, "force_upcast": True,
            "use_quant_conv": model.quant, "use_post_quant_conv": model.quant,
        }
    if shift:
        raise WeightsError(f"diffusers' VQModel has no place for a shift of its latents, and this one's is {shift}")
    return {
        "_class_name": "VQModel", **common, "num_vq_embeddings": model.codebook_size,
        "vq_embed_dim": model.latent_channels, "norm_type": "group", "lookup_from_codebook": False,
        "force_upcast": False,
    }


def write(folder, model, params, scale, shift):
    """Writes the two files of a folder; the config comes last, so a folder that has one is complete.

    Raises WeightsError, before anything is written, where the parameters are not the model's.
    """
    levels, shapes = len(model.multipliers), tables.parameter_shapes(model)
    config = config_of(model, scale, shift)
    tensors = tables.write_parameters(params, shapes, lambda p: tables.diffusers_key(p, levels))
    if (folder / INDEX).is_file():
        raise WeightsError(f"{folder}: has an {INDEX}, whose shards diffusers would load instead; name another folder")
    with contextlib.suppress(OSError):
        (folder / CONFIG).unlink()                           # an older one would complete these tensors with its scale
    write_tensors(folder / f"{STEM}.safetensors", tensors)
    with whole_or_nothing(folder / CONFIG) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n")


def read_json(path):
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: not a JSON object")
    return content
