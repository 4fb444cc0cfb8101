"""Folders in diffusers' layout: config.json beside diffusion_pytorch_model.safetensors, on disk or on the Hub."""

import json
import pathlib
import re

from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.files import read_tensors, write_tensors

CONFIG = "config.json"
STEM = "diffusion_pytorch_model"
FILES = [CONFIG, f"{STEM}.safetensors", f"{STEM}.safetensors.index.json", f"{STEM}-*.safetensors"]


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
    """Name -> array of all tensors in a folder: one safetensors file, several with an index, or an old .bin."""
    whole, index, old = (folder / f"{STEM}{suffix}" for suffix in (".safetensors", ".safetensors.index.json", ".bin"))
    if whole.is_file():
        return read_tensors(whole)
    if index.is_file():
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
        if not files or any(not isinstance(file, str) or pathlib.Path(file).name != file for file in files):
            raise WeightsError(f"{index}: its weight_map does not name files of this folder")
        return {name: value for file in files for name, value in read_tensors(folder / file).items()}
    if old.is_file():
        return read_tensors(old)
    raise WeightsError(f"{folder}: holds neither {whole.name} nor {old.name}")


def read_config(folder):
    """AutoencoderKL's fields, scale and shift from config.json; raises WeightsError for what our model cannot be."""
    path = folder / CONFIG
    if not path.is_file():
        raise WeightsError(f"{folder}: has no {CONFIG}, so it is no folder of diffusers")
    config = read_json(path)
    class_name = config.get("_class_name")
    if class_name != "AutoencoderKL":
        raise WeightsError(f"{path}: describes a {class_name}; only AutoencoderKL is read")
    # diffusers leaves out nothing today, but older files lack what was added later: these are its defaults.
    quant, post_quant = config.get("use_quant_conv", True), config.get("use_post_quant_conv", True)
    fixed = [
        ("act_fn", config.get("act_fn", "silu"), "silu"),
        ("in_channels", config.get("in_channels", 3), 3),
        ("out_channels", config.get("out_channels", 3), 3),
        ("mid_block_add_attention", config.get("mid_block_add_attention", True), True),
        ("use_post_quant_conv", post_quant, quant),
        ("latents_mean", config.get("latents_mean"), None),
        ("latents_std", config.get("latents_std"), None),
    ]
    for name, value, wanted in fixed:
        if value != wanted:
            raise WeightsError(f"{path}: {name} is {value!r}, and this package's AutoencoderKL has {wanted!r}")
    try:
        widths = list(config["block_out_channels"])
        down = [attends(kind, "Down", "Encoder") for kind in config["down_block_types"]]
        up = [attends(kind, "Up", "Decoder") for kind in config["up_block_types"]]
        if not len(widths) == len(down) == len(up) or down != up[::-1]:
            raise ValueError("down_block_types and up_block_types do not mirror each other")
        fields = dict(
            **widths_as_multiples(widths), blocks_per_level=int(config["layers_per_block"]),
            latent_channels=int(config["latent_channels"]), groups=int(config["norm_num_groups"]),
            attention_levels=tuple(i for i, attention in enumerate(down) if attention), quant=bool(quant),
        )
        # diffusers' own default; a VAE without a shift says null.
        return fields, float(config.get("scaling_factor", 0.18215)), float(config.get("shift_factor") or 0.0)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: {type(error).__name__}: {error}") from error


def attends(kind, direction, side):
    """Whether a block type of diffusers has attention; ValueError for one that is not of this family."""
    names = [f"{direction}{side}Block2D", f"Attn{direction}{side}Block2D"]
    if kind not in names:
        raise ValueError(f"block type {kind!r} is neither of {names}")
    return kind == names[1]


def widths_as_multiples(widths):
    """channels and multipliers from the levels' widths."""
    if any(width % widths[0] for width in widths):
        raise ValueError(f"widths {widths} that are no multiples of the first")
    return {"channels": widths[0], "multipliers": tuple(width // widths[0] for width in widths)}


def config_of(model, scale, shift):
    """The config.json of a model."""
    levels = range(len(model.multipliers))
    attention = ["Attn" if i in model.attention_levels else "" for i in levels]
    return {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0",
        "act_fn": "silu", "in_channels": 3, "out_channels": 3,
        "block_out_channels": [model.channels * m for m in model.multipliers],
        "down_block_types": [f"{a}DownEncoderBlock2D" for a in attention],
        "up_block_types": [f"{a}UpDecoderBlock2D" for a in reversed(attention)],
        "layers_per_block": model.blocks_per_level, "latent_channels": model.latent_channels,
        "norm_num_groups": model.groups, "sample_size": 256, "scaling_factor": scale, "shift_factor": shift or None,
        "latents_mean": None, "latents_std": None, "force_upcast": True, "mid_block_add_attention": True,
        "use_quant_conv": model.quant, "use_post_quant_conv": model.quant,
    }


def write(folder, config, tensors):
    """Writes the two files of a folder; the config comes last, so a folder that has one is complete."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / f"{STEM}.safetensors", tensors)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise WeightsError(f"{folder}: could not be written ({error})") from error


def read_json(path):
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: not a JSON object")
    return content
