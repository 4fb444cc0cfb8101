"""Where each parameter of an autoencoder is found in other people's files, and how its axes are turned.

A table is one function from our path, such as ("encoder", "down_0_block_1", "conv1", "kernel"), to a file's key; both
directions use it, so they cannot disagree. Axes: torch keeps kernels as (O, I, kh, kw), flax as (kh, kw, I, O).
"""

import functools
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np

from eqvae_jax.weights.errors import WeightsError

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
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
    """The key of latent-diffusion's files, whose levels count from full resolution, as ours."""
    return ".".join([*(rename(part, LDM) for part in path[:-1]), LEAVES[path[-1]]])


def diffusers_key(path, levels):
    """The key of diffusers' files, whose decoder counts its levels from the lowest resolution."""
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
    """Tree of ShapeDtypeStruct of a model's parameters, without computing anything; not to be changed by the caller."""
    image = jax.ShapeDtypeStruct((1, 2 * model.downsampling, 2 * model.downsampling, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def from_torch(value, shape):
    """A tensor of a file in our layout: float32, contiguous. shape: ours, which tells a kernel by its rank."""
    if value.ndim == 4 and len(shape) == 2 and value.shape[2:] == (1, 1):
        value = value[:, :, 0, 0]                        # LDM keeps attention's projections as 1 x 1 convolutions
    if value.ndim == len(shape) and value.ndim in (2, 4):
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return np.ascontiguousarray(value, np.float32)


def to_torch(value, attention_as_convolution=False):
    """A parameter of ours in torch's layout."""
    value = np.asarray(value, np.float32)
    if value.ndim == 4:
        return np.ascontiguousarray(value.transpose(3, 2, 0, 1))
    if value.ndim == 2:
        value = np.ascontiguousarray(value.T)
        return value[:, :, None, None] if attention_as_convolution else value
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
        params[path] = from_torch(tensors[key], expected.shape)
        if params[path].shape != expected.shape:
            wanted = to_torch(np.broadcast_to(np.float32(0), expected.shape)).shape
            misfit.append(f"{key}: {tuple(tensors[key].shape)} instead of {wanted}")
    extra = sorted(set(tensors) - {key_of(path) for path in shapes})
    refuse_if_any(where, missing=sorted(missing), extra=extra, misfit=misfit)
    return flax.traverse_util.unflatten_dict(params)


def write_parameters(params, shapes, key_of, attention_as_convolution=False):
    """A file's tensors from our parameters; raises WeightsError where they are not the model's."""
    check_parameters("parameters to save", params, shapes)
    flat = flax.traverse_util.flatten_dict(params)
    return {key_of(path): to_torch(value, attention_as_convolution) for path, value in flat.items()}


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
