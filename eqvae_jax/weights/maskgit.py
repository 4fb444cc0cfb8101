"""MaskGIT's weights from and into files: the PyTorch reproduction's layout, and the original's.

    reproduction    {"model_state_dict": ..., "iter": ..., "global_epoch": ...} as MaskGIT_ImageNet_256.pth, or its
                    tensors alone, .pth, .pt or .safetensors
    original        {"params": ...} in flax's msgpack, recognised by its first byte

Neither says how its vocabulary divides into codes and labels, and the first not how many heads there are. The numbers
of the released models are taken where the vocabulary is theirs; .pth files written here hold them beside the weights.
"""

import math
import pathlib
import re

import flax
import jax.numpy as jnp
import numpy as np

from eqvae_jax.generators.maskgit import MaskGIT
from eqvae_jax.generators.maskgit_original import OriginalMaskGIT
from eqvae_jax.weights import tables
from eqvae_jax.weights.blocks import parameter_shapes
from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.files import read_state_and_numbers, write_tensors
from eqvae_jax.weights.msgpack_files import is_msgpack, read_msgpack, write_msgpack
from eqvae_jax.weights.torch_writer import write_torch_file

NETWORKS = {"maskgit": MaskGIT, "maskgit-original": OriginalMaskGIT}
CODES, CLASSES, HEADS = 1024, 1000, 16   # of the released models, whatever their width
SUFFIXES = (".pth", ".pt", ".safetensors")
NAMES = {
    "tokens": "tok_emb", "positions": "pos_emb", "bias": "bias",
    "first_norm_1": "first_layer.0", "first_1": "first_layer.2", "first_norm_2": "first_layer.4",
    "first_2": "first_layer.6",
    "last_norm_1": "last_layer.0", "last": "last_layer.2", "last_norm_2": "last_layer.4",
    "attention_norm": "0.norm", "qkv": "0.fn.mha.in_proj", "proj": "0.fn.mha.out_proj",
    "mlp_norm": "1.norm", "fc1": "1.fn.net.0", "fc2": "1.fn.net.3",
}
ORIGINAL_NAMES = {
    "tokens": "Embed_0/word_embeddings", "positions": "Embed_0/position_embeddings/embedding",
    "first_norm": "Embed_0/embeddings_ln", "bias": "MlmLayer_0/mlm_bias/bias", "last": "MlmLayer_0/mlm_dense",
    "last_norm": "MlmLayer_0/mlm_ln",
    "proj": "Attention_0/self_attention/out", "attention_norm": "Attention_0/attention_output_ln",
    "fc1": "Mlp_0/intermediate_output", "fc2": "Mlp_0/layer_output", "mlp_norm": "Mlp_0/layer_output_ln",
}


def read(path, heads=None, codes=None):
    """(model, params, kind) of a file of either layout; kind is of NETWORKS, params are float32 with blocks apart.

    heads, codes: None to take what the file says, or the released numbers. Raises WeightsError where it is no such
    file, does not say enough, or lists what does not fit.
    """
    original = is_msgpack(path)
    tensors, numbers = (flat_original(path), {}) if original else read_state_and_numbers(path)
    try:
        if empty := [name for name, value in tensors.items() if not value.size]:
            raise WeightsError(f"its tensors {', '.join(empty[:5])} are empty")  # whose other sides could be any number
        model = (original_of if original else reproduction_of)(
            tensors, heads or numbers.get("heads"), codes or numbers.get("codes"))
        parameter_shapes(model)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except (KeyError, IndexError, ValueError, ArithmeticError, AttributeError) as error:
        raise WeightsError(f"{path}: not a MaskGIT ({type(error).__name__}: {error}); it holds "
                           f"{', '.join(list(tensors)[:5])} ...") from error
    if original:
        return model, read_original(tensors, model, path), "maskgit-original"
    if tensors["pos_emb"].shape[:1] == (1,):
        tensors["pos_emb"] = tensors["pos_emb"][0]
    return model, tables.read_parameters(tensors, parameter_shapes(model), key_of, path), "maskgit"


def write(path, model, params):
    """Writes parameters, blocks apart, in the layout of the model's own code: .pth, .pt or .safetensors, or .msgpack.

    Raises WeightsError where the parameters are not the model's, or the format has no place for it.
    """
    path = pathlib.Path(path)
    if isinstance(model, OriginalMaskGIT):
        if path.suffix != ".msgpack":
            raise WeightsError(f"{path}: the original's weights are written as .msgpack")
        if (model.codes, model.classes) != (CODES, CLASSES):
            raise WeightsError(f"{path}: such files do not say what their vocabulary is; readers take {CODES} codes "
                               f"and {CLASSES} classes, and this model has {model.codes} and {model.classes}")
        write_msgpack(path, {"params": to_original(params, model)})
        return
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"{path}: the reproduction's weights are written as {', '.join(SUFFIXES)}")
    tensors = tables.write_parameters(params, parameter_shapes(model), key_of)
    tensors["pos_emb"] = tensors["pos_emb"][None]
    if path.suffix != ".safetensors":
        # The reproduction's loader reads the two counters, and no others.
        write_torch_file(path, tensors, under="model_state_dict",
                         beside={"iter": 0, "global_epoch": 0, "codes": model.codes, "heads": model.heads})
    elif (model.codes, model.classes, model.heads) == (CODES, CLASSES, HEADS):
        write_tensors(path, tensors)
    else:
        raise WeightsError(f"{path}: such files do not say how many codes and heads a model has; readers take {CODES}, "
                           f"{CLASSES} classes and {HEADS} heads, and this one has {model.codes}, {model.classes} and "
                           f"{model.heads}. Write .pth, which has a place for them")


def key_of(path):
    """The reproduction's key of a path of ours, such as ("block_3", "qkv", "kernel")."""
    if len(path) == 1:
        return NAMES[path[0]]
    *block, layer, leaf = path
    prefix = f"transformer.layers.{block[0].removeprefix('block_')}." if block else ""
    joint = "_" if layer == "qkv" else "."                # nn.MultiheadAttention's in_proj_weight
    return f"{prefix}{NAMES[layer]}{joint}{'weight' if leaf == 'embedding' else tables.LEAVES[leaf]}"


def reproduction_of(tensors, heads, codes):
    """The model that the shapes in a file of the reproduction describe."""
    vocabulary, width = tensors["tok_emb.weight"].shape
    blocks = {m[1] for m in map(re.compile(r"transformer\.layers\.(\d+)\.").match, tensors) if m}
    codes, classes = divided(vocabulary - 2, codes)
    heads = heads or (HEADS if vocabulary == CODES + CLASSES + 2 else None)
    if heads is None:
        raise WeightsError("it does not say how many heads it has; say heads=N")
    return MaskGIT(input_size=side_of(tensors["pos_emb"].shape[-2]), codes=codes, classes=classes, width=width,
                   depth=len(blocks), heads=heads,
                   mlp_size=tensors["transformer.layers.0.1.fn.net.0.weight"].shape[0])


def original_of(tensors, heads, codes):
    """The model that the shapes in a file of the original describe, which tell the heads."""
    vocabulary, width = tensors["Embed_0/word_embeddings/embedding"].shape
    blocks = {m[1] for m in map(re.compile(r"TransformerLayer_(\d+)/").match, tensors) if m}
    codes, classes = divided(vocabulary - 1, codes)
    first = "TransformerLayer_0/"
    return OriginalMaskGIT(input_size=side_of(len(tensors[ORIGINAL_NAMES["positions"]])), codes=codes, classes=classes,
                           width=width, depth=len(blocks),
                           heads=tensors[f"{first}Attention_0/self_attention/query/kernel"].shape[1],
                           mlp_size=tensors[f"{first}{ORIGINAL_NAMES['fc1']}/kernel"].shape[1])


def divided(words, codes):
    """(codes, classes) of a vocabulary without its masks and the label of none."""
    if codes is None and words != CODES + CLASSES:
        raise WeightsError(f"its vocabulary does not tell how many of its {words} words are codes; say codes=N")
    codes = CODES if codes is None else codes
    if not 0 < codes < words:
        raise WeightsError(f"its vocabulary has {words} words, of which codes={codes} leaves no labels")
    return codes, words - codes


def side_of(places):
    """Side of the square of tokens, from how many positions there are: theirs and the label's."""
    side = math.isqrt(max(places - 1, 0))
    if side == 0 or side**2 + 1 != places:
        raise WeightsError(f"it has {places} positions; it must be those of a square and one more")
    return side


def flat_original(path):
    """Name -> array of the weights in a file of the original, names joined by slashes."""
    tree = read_msgpack(path).get("params")
    if not isinstance(tree, dict):
        raise WeightsError(f"{path}: holds no parameters under \"params\", as the original MaskGIT's file does")
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    if wrong := [name for name, value in flat.items()
                 if not isinstance(value, np.ndarray) or not jnp.issubdtype(value.dtype, jnp.floating)]:
        raise WeightsError(f"{path}: {', '.join(wrong[:5])} are no arrays of real numbers")
    return flat


def original_layout(model):
    """Our path -> [(name in the original's file, shape there), ...]; several lie side by side in one of ours."""
    split = (model.heads, model.width // model.heads)
    layout = {}
    for path, leaf in flax.traverse_util.flatten_dict(parameter_shapes(model)).items():
        prefix = f"TransformerLayer_{path[0].removeprefix('block_')}/" if len(path) == 3 else ""
        name = path[-2] if len(path) > 1 else path[0]
        end = f"/{path[-1]}" if len(path) > 1 else ""
        if name == "qkv":
            shape = (*leaf.shape[:-1], *split)
            layout[path] = [(f"{prefix}Attention_0/self_attention/{one}{end}", shape)
                            for one in ("query", "key", "value")]
        else:
            joined = name == "proj" and path[-1] == "kernel"
            layout[path] = [(f"{prefix}{ORIGINAL_NAMES[name]}{end}", (*split, model.width) if joined else leaf.shape)]
    return layout


def read_original(tensors, model, where):
    """Our parameters from the original's, all of them and nothing else."""
    layout = original_layout(model)
    shapes = dict(pair for pairs in layout.values() for pair in pairs)
    tables.refuse_if_any(
        where, missing=sorted(shapes.keys() - tensors.keys()), extra=sorted(tensors.keys() - shapes.keys()),
        misfit=[f"{name}: {tensors[name].shape} instead of {shapes[name]}"
                for name in sorted(shapes.keys() & tensors.keys()) if tensors[name].shape != shapes[name]])
    leaves = flax.traverse_util.flatten_dict(parameter_shapes(model))
    params = {}
    for path, pairs in layout.items():
        shape = (*leaves[path].shape[:-1], leaves[path].shape[-1] // len(pairs))
        params[path] = np.concatenate([tensors[name].reshape(shape).astype(np.float32) for name, _ in pairs], -1)
    return flax.traverse_util.unflatten_dict(params)


def to_original(params, model):
    """What `read_original` undoes, as the nested dict of the original's file."""
    tables.check_parameters("parameters to save", params, parameter_shapes(model))
    params, tree = flax.traverse_util.flatten_dict(params), {}
    for path, pairs in original_layout(model).items():
        parts = np.split(np.asarray(params[path], np.float32), len(pairs), -1)
        tree |= {name: part.reshape(shape) for (name, shape), part in zip(pairs, parts, strict=True)}
    return flax.traverse_util.unflatten_dict(tree, sep="/")
