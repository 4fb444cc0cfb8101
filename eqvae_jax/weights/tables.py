"""Where each parameter of an autoencoder is found in other people's files, and how its axes are turned.

A table is one function from our path, such as ("encoder", "down_0_block_1", "conv1", "kernel"), to a file's key; both
directions use it, so they cannot disagree. Axes: torch keeps kernels as (O, I, kh, kw), flax as (kh, kw, I, O); all
else is laid out alike.
"""

import functools
import mmap
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np

from eqvae_jax.weights.errors import WeightsError

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
MOST_LEVELS, MOST_BLOCKS = 12, 64                       # beyond, only a file made to keep us busy
CODEBOOK = "quantize.embedding.weight"
LDM = (
    (r"(down|up)_(\d+)_block_(\d+)", r"\1.\2.block.\3"),
    (r"(down|up)_(\d+)_attention_(\d+)", r"\1.\2.attn.\3"),
    (r"(down|up)_(\d+)_(downsample|upsample)", r"\1.\2.\3.conv"),
    (r"mid_block_(\d)", r"mid.block_\1"),
    (r"mid_attention", "mid.attn_1"),
    (r"shortcut", "nin_shortcut"),
    (r"query", "q"), (r"key", "k"), (r"value", "v"), (r"out", "proj_out"),
)
DIFFUSERS = (
    (r"(down|up)_(\d+)_block_(\d+)", r"\1_blocks.\2.resnets.\3"),
    (r"(down|up)_(\d+)_attention_(\d+)", r"\1_blocks.\2.attentions.\3"),
    (r"(down|up)_(\d+)_(downsample|upsample)", r"\1_blocks.\2.\3rs.0.conv"),
    (r"mid_block_1", "mid_block.resnets.0"), (r"mid_block_2", "mid_block.resnets.1"),
    (r"mid_attention", "mid_block.attentions.0"),
    (r"shortcut", "conv_shortcut"), (r"norm_out", "conv_norm_out"), (r"norm", "group_norm"),
    (r"query", "to_q"), (r"key", "to_k"), (r"value", "to_v"), (r"out", "to_out.0"),
)
# Files written before diffusers 0.18.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def ldm_key(path):
    """The key of latent-diffusion's and taming's files, whose levels count from full resolution, as ours."""
    if path == ("codebook",):
        return CODEBOOK
    return ".".join([*(rename(part, LDM) for part in path[:-1]), LEAVES[path[-1]]])


def diffusers_key(path, levels):
    """The key of diffusers' files, whose decoder counts its levels from the lowest resolution."""
    if path == ("codebook",):
        return CODEBOOK
    parts = [re.sub(r"^up_(\d+)", lambda m: f"up_{levels - 1 - int(m[1])}", part) for part in path[:-1]]
    return ".".join([*(rename(part, DIFFUSERS) for part in parts), LEAVES[path[-1]]])


def rename(part, table):
    for pattern, target in table:
        if match := re.fullmatch(pattern, part):
            return match.expand(target)
    return part


def new_attention_names(tensors):
    """The tensors with the attention names that diffusers has used since 0.18."""
    pattern = re.compile(r"(attentions\.\d+\.)(query|key|value|proj_attn)(?=\.)")
    return {pattern.sub(lambda m: m[1] + OLD_ATTENTION[m[2]], name): value for name, value in tensors.items()}


@functools.cache                                        # tracing takes most of a second
def parameter_shapes(model):
    """Tree of ShapeDtypeStruct of a model's parameters, without computing anything; not to be changed by the caller.

    Raises WeightsError where the model's own fields do not fit together.
    """
    if len(model.multipliers) > MOST_LEVELS or model.blocks_per_level > MOST_BLOCKS:
        raise WeightsError(f"no autoencoder has {len(model.multipliers)} levels of {model.blocks_per_level} blocks")
    image = jax.ShapeDtypeStruct((1, 2 * model.downsampling, 2 * model.downsampling, 3), jnp.float32)
    try:
        return jax.eval_shape(lambda image: model.init(jax.random.key(0), image), image)["params"]
    except (ValueError, TypeError, ArithmeticError, IndexError) as error:
        raise WeightsError(f"no autoencoder has these sizes: {str(error).strip().splitlines()[0]}") from error


def from_torch(value, path, shape):
    """A tensor of a file with its axes in our order, a view. path, shape: of the parameter it becomes."""
    if path[-1] != "kernel" or value.ndim not in (2, 4):
        return value
    if value.ndim == 4 and len(shape) == 2 and value.shape[2:] == (1, 1):
        value = value[:, :, 0, 0]                        # LDM keeps attention's projections as 1 x 1 convolutions
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def copied(view):
    """A float32 copy in one piece. Of what it copied, the pages of a mapped file are given back to the system."""
    copy = np.empty(view.shape, np.float32)
    if view.ndim < 2:
        copy[...] = view
    else:
        for i in range(0, view.shape[-2], 32):           # what fits a cache: up to 5 times faster than all at once
            copy[..., i:i + 32, :] = view[..., i:i + 32, :]
    while not isinstance(view, mmap.mmap) and hasattr(view, "base"):
        view = view.base
    if isinstance(view, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        view.madvise(mmap.MADV_DONTNEED)                 # halves the peak of loading a checkpoint
    return copy


def to_torch(value, path, attention_as_convolution=False):
    """A parameter of ours in torch's layout, as a view where it is float32."""
    value = np.asarray(value, np.float32)
    if path[-1] == "kernel" and value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if path[-1] == "kernel" and value.ndim == 2:
        return value.T[:, :, None, None] if attention_as_convolution else value.T
    return value


def read_parameters(tensors, shapes, key_of, where):
    """Our parameters from a file's tensors, all of them and nothing else.

    tensors: name -> array. shapes: tree of what to fill. key_of: our path -> name. where: the file, for messages.
    Raises WeightsError with the lists of what is missing, left over and mis-shaped.
    """
    shapes = flax.traverse_util.flatten_dict(shapes)
    params, missing, misfit = {}, [], []
    for path, expected in shapes.items():
        key = key_of(path)
        if key not in tensors:
            missing.append(key)
            continue
        view = from_torch(tensors[key], path, expected.shape)
        if view.shape == expected.shape:
            params[path] = copied(view)
        else:
            wanted = to_torch(np.broadcast_to(np.float32(0), expected.shape), path).shape
            misfit.append(f"{key}: {tuple(tensors[key].shape)} instead of {wanted}")
    extra = sorted(set(tensors) - {key_of(path) for path in shapes})
    refuse_if_any(where, missing=sorted(missing), extra=extra, misfit=misfit)
    return flax.traverse_util.unflatten_dict(params)


def write_parameters(params, shapes, key_of, attention_as_convolution=False):
    """A file's tensors from our parameters; raises WeightsError where they are not the model's."""
    check_parameters("parameters to save", params, shapes)
    flat = flax.traverse_util.flatten_dict(params)
    return {key_of(path): to_torch(value, path, attention_as_convolution) for path, value in flat.items()}


def check_parameters(where, params, shapes):
    """Raises WeightsError, with the lists, where parameters of ours are not the model's."""
    params, shapes = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (params, shapes))
    refuse_if_any(
        where, missing=sorted(shapes.keys() - params.keys()), extra=sorted(params.keys() - shapes.keys()),
        misfit=[f"{name}: {params[name].shape} instead of {shapes[name].shape}"
                for name in sorted(shapes.keys() & params.keys()) if params[name].shape != shapes[name].shape],
    )


def refuse_if_any(where, missing, extra, misfit):
    """Raises WeightsError with all three lists unless they are empty."""
    if missing or extra or misfit:
        lists = [("missing", missing), ("not expected", extra), ("of another shape", misfit)]
        report = [f"  {title} ({len(names)}): {', '.join(names) or 'none'}" for title, names in lists]
        raise WeightsError("\n".join([f"{where}: the parameters do not fit the model", *report]))
