"""Weights of DINOv2 from Meta's .pth files and from Hugging Face's folders; both give the same tree. Never random.

Published files hold a mask_token too, which only pretraining uses: it is left out.
"""

import pathlib
import re
from typing import NamedTuple

import flax
import jax
import numpy as np

from eqvae_jax.features.dinov2 import EPSILON, HEAD, DINOv2, parameter_shapes
from eqvae_jax.weights.autoencoders import parameter_hash
from eqvae_jax.weights.diffusers_folder import CONFIG, read_files, read_json
from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.files import read_tensors
from eqvae_jax.weights.tables import LEAVES, read_parameters

ADVICE = (
    "Get https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth (vits14, vitl14, vitg14 "
    "likewise; with registers dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth), or config.json and model.safetensors of "
    "facebook/dinov2-base on the Hugging Face Hub, and give the path of the file or of the folder."
)


class Layout(NamedTuple):
    """How a kind of file names what we have. block: before a block's number. names: ours -> the file's.

    parts: what one of our matrices is there, several that are stacked along their outputs.
    """

    block: str
    names: dict
    parts: dict


META = Layout("blocks.", {
    "cls_token": "cls_token", "pos_embed": "pos_embed", "register_tokens": "register_tokens",
    "mask_token": "mask_token", "patch": "patch_embed.proj", "norm": "norm", "qkv": "attn.qkv", "proj": "attn.proj",
    "scale1": "ls1.gamma", "scale2": "ls2.gamma", "fc1": "mlp.fc1", "fc2": "mlp.fc2", "w12": "mlp.w12", "w3": "mlp.w3",
}, {})
HUGGING_FACE = Layout("encoder.layer.", {
    "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens", "mask_token": "embeddings.mask_token",
    "patch": "embeddings.patch_embeddings.projection", "norm": "layernorm", "proj": "attention.output.dense",
    "scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
    "w12": "mlp.weights_in", "w3": "mlp.weights_out",
}, {"qkv": tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))})
# As transformers 5 names them in memory, and so in what torch.save writes of its models.
HUGGING_FACE_5 = Layout(
    HUGGING_FACE.block, HUGGING_FACE.names | {"proj": "attention.o_proj", "w3": "mlp.down_proj"},
    {"qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "w12": ("mlp.gate_proj", "mlp.up_proj")},
)


class DINOv2Spec(NamedTuple):
    """Where the weights came from, and a hash that tells them from others whatever the file's format."""

    reference: str
    hash: str


def load_dinov2(reference):
    """(model, params, DINOv2Spec); params: the dict under "params" of flax variables, float32 NumPy arrays.

    reference: Meta's dinov2_vit{s,b,l,g}14[_reg4]_pretrain.pth; a folder of transformers' Dinov2Model or
    Dinov2WithRegistersModel; a .safetensors, .pth or .bin file with the tensors of either. Sizes are those of the
    tensors; of a model with a head, whose names begin with "dinov2.", the head is left out.
    Raises WeightsError that says which file to get, or lists what is missing, left over and mis-shaped.
    """
    if not reference:
        raise WeightsError(f"DINOv2 has no weights.\n{ADVICE}")
    path = pathlib.Path(reference).expanduser()
    if not path.exists():
        raise WeightsError(f"DINOv2 weights: there is no {path}.\n{ADVICE}")
    try:
        tensors = backbone(read_folder(path) if path.is_dir() else read_tensors(path), path)
        layout = layout_of(tensors)
        model = model_of(tensors, layout, path)
        if path.is_dir():
            check_config(path / CONFIG, model)
        tensors.pop(layout.names["mask_token"], None)
        shapes = file_shapes(parameter_shapes(model), layout)
        params = joined(read_parameters(tensors, shapes, lambda p: key_of(p, layout), path), layout)
        check_finite(params, path)
    except WeightsError as error:
        raise WeightsError(f"DINOv2 weights, {error}\n{ADVICE}") from error
    return model, params, DINOv2Spec(str(reference), parameter_hash(params))


def read_folder(folder):
    """Name -> array of a folder of Hugging Face's: model.safetensors, one or several, or an old pytorch_model.bin."""
    return read_files(folder, "model" if any(folder.glob("model*.safetensors")) else "pytorch_model")


def backbone(tensors, where):
    """The tensors of DINOv2 alone, with the names that they have without a head and without FSDP's chunks of blocks."""
    if any(name.startswith("dinov2.") for name in tensors):
        tensors = {name.removeprefix("dinov2."): t for name, t in tensors.items() if name.startswith("dinov2.")}
    renamed = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): tensor for name, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise WeightsError(f"{where}: holds some blocks twice, in one chunk and in another")
    return renamed


def layout_of(tensors):
    if not any(name.startswith(("embeddings.", HUGGING_FACE.block)) for name in tensors):
        return META
    return HUGGING_FACE_5 if any(".attention.q_proj." in name for name in tensors) else HUGGING_FACE


def model_of(tensors, layout, where):
    """The model that the shapes in a file describe."""
    if empty := [name for name, tensor in tensors.items() if not tensor.size]:
        raise WeightsError(f"{where}: its tensors {', '.join(empty[:5])} are empty")  # other sides could be any number
    shape = lambda *path: tensors[key_of(path, layout)].shape
    try:
        (_, _, width), (_, tokens, _) = shape("cls_token"), shape("pos_embed")
        swiglu = key_of(("block_0", "w3", "kernel"), layout) in tensors
        hidden = shape("block_0", "w3" if swiglu else "fc2", "kernel")[1]
        registers = shape("register_tokens")[1] if layout.names["register_tokens"] in tensors else 0
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(f"{where}: not a DINOv2 ({type(error).__name__}: {error}); it holds "
                           f"{', '.join(list(tensors)[:5])} ...") from error
    grid = round((tokens - 1) ** 0.5)
    if tokens < 2 or grid**2 != tokens - 1:
        raise WeightsError(f"{where}: it has positions for {tokens} tokens, which are no square and one more")
    if width % HEAD:
        raise WeightsError(f"{where}: its width of {width} does not divide into heads of {HEAD} channels")
    blocks = {m[1] for m in map(re.compile(rf"{re.escape(layout.block)}(\d+)\.").match, tensors) if m}
    return DINOv2(width, len(blocks), hidden, swiglu, registers, grid)


def check_config(path, model):
    """Raises WeightsError for what a folder's config.json says and the tensors' shapes do not show."""
    if not path.is_file():
        return
    config = read_json(path)
    kind = config.get("model_type")
    if kind not in ("dinov2", "dinov2_with_registers"):
        raise WeightsError(f"{path}: describes a {kind!r}, which is no dinov2 and no dinov2_with_registers")
    wanted = {"num_attention_heads": model.width // HEAD, "layer_norm_eps": EPSILON, "hidden_act": "gelu",
              "qkv_bias": True}
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise WeightsError(f"{path}: {name} is {config[name]!r}, and a DINOv2 of width {model.width} has {value!r}")


def file_shapes(shapes, layout):
    """Our tree of shapes, with the parts that the file keeps apart in place of what we have in one."""
    flat = flax.traverse_util.flatten_dict(shapes)
    for path, shape in list(flat.items()):
        if parts := len(path) == 3 and layout.parts.get(path[1]):
            size = (*shape.shape[:-1], shape.shape[-1] // len(parts))
            flat |= {(path[0], part, path[2]): jax.ShapeDtypeStruct(size, shape.dtype) for part in parts}
            del flat[path]
    return flax.traverse_util.unflatten_dict(flat)


def joined(params, layout):
    """Our parameters from the file's: its parts side by side, in order."""
    flat = flax.traverse_util.flatten_dict(params)
    wholes = {parts[0]: (whole, parts) for whole, parts in layout.parts.items()}
    for path in list(flat):
        if len(path) == 3 and path[1] in wholes:
            whole, parts = wholes[path[1]]
            flat[path[0], whole, path[2]] = np.concatenate([flat.pop((path[0], part, path[2])) for part in parts], -1)
    return flax.traverse_util.unflatten_dict(flat)


def key_of(path, layout):
    """The file's key of a path such as ("block_3", "qkv", "kernel"), ("block_3", "scale1") or ("cls_token",)."""
    prefix = ""
    if path[0].startswith("block_"):
        prefix, path = f"{layout.block}{path[0].removeprefix('block_')}.", path[1:]
    name = prefix + layout.names.get(path[0], path[0])
    return name if len(path) == 1 else f"{name}.{LEAVES[path[1]]}"


def check_finite(params, where):
    broken = [name for name, value in flax.traverse_util.flatten_dict(params, sep=".").items()
              if not np.isfinite(value).all()]
    if broken:
        raise WeightsError(f"{where}: values that are not finite, in {', '.join(broken[:8])}")
