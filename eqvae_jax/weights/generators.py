"""Generators from references and into files: `load_generator` and `save_generator`; strict tables for DiT, SiT, REPA.
MaskGIT's are in `maskgit`.

They share names and shapes. Public SiT runs the other way through time (weights/sit.py). REPA's files have 4 channels,
our own time, and the projector.
"""

import dataclasses
import math
import pathlib
import re

import jax.numpy as jnp
import numpy as np

from eqvae_jax.generators.dit import DiT, positions
from eqvae_jax.generators.networks import as_kind, describe, from_description
from eqvae_jax.generators.repa import REPA
from eqvae_jax.weights import maskgit, tables
from eqvae_jax.weights.autoencoders import parameter_hash
from eqvae_jax.weights.blocks import parameter_shapes, stack_blocks, unstack_blocks
from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.files import read_state, write_tensors
from eqvae_jax.weights.references import GENERATORS, parse_reference
from eqvae_jax.weights.sit import from_sit, to_sit
from eqvae_jax.weights.torch_writer import write_torch_file

KINDS = {"dit": DiT, "sit": DiT, "repa": REPA} | maskgit.NETWORKS
# What a file may be asked to be told: option of load_generator -> kinds that do not say it themselves.
GENERATOR_OPTIONS = {"heads": ("dit", "sit", "repa", "maskgit"), "prediction": ("sit",), "codes": ("maskgit",)}
LATENTS = ("hash", "reference", "scale", "shift")       # what a run knows of the autoencoder it learnt latents of
POSITIONS, PATCH = "pos_embed", "x_embedder.proj.weight"
NAMES = {
    "patch": "x_embedder.proj", "time_in": "t_embedder.mlp.0", "time_out": "t_embedder.mlp.2",
    "labels": "y_embedder.embedding_table", "final": "final_layer.linear",
    "final_modulation": "final_layer.adaLN_modulation.1",
    "modulation": "adaLN_modulation.1", "qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
    "query_norm": "attn.q_norm", "key_norm": "attn.k_norm",
    "projector_in": "projectors.0.0", "projector_hidden": "projectors.0.2", "projector_out": "projectors.0.4",
}


@dataclasses.dataclass(frozen=True)
class GeneratorSpec:
    """What a user of a generator must know beside its network.

    kind: "dit" (Gaussian diffusion), "sit" (an interpolant), "repa" (one with a projector), or "maskgit" or
    "maskgit-original" (masked tokens; the reproduction's network or the paper's). classes: labels run to classes - 1,
    and `classes` is "no label", which "maskgit-original" alone does not have. source: where the weights came from.
    hash: 16 hexadecimal digits of the
    weights, the same stacked or not. latents: {"hash", "reference", "scale", "shift"} of the autoencoder, or None,
    since public files do not say. process: what is known of the process it was trained on, such as {"prediction":
    "velocity"}. sampling: how its run samples, the config's section of that name, or None.
    """

    kind: str
    classes: int
    source: str
    hash: str
    latents: dict | None = None
    process: dict = dataclasses.field(default_factory=dict)
    sampling: dict | None = None


def load_generator(reference, *, scan=False, **options):
    """(model, params, spec) of a generator reference: see GENERATORS for the forms.

    params: the dict under "params" of flax variables, float32 NumPy arrays; a run's average of the weights where it
    keeps one, and so a file's. scan: for a model with `scan`.
    options: heads, of a file whose width does not tell; prediction ("velocity"), of a `sit:` file, since only the
    velocity changes its sign with the direction of time; codes, of a `maskgit:` file whose vocabulary is not the
    released one. Those that are None are as if not given.
    Raises WeightsError for options that the reference has no place for, and where the weights cannot be found or do not
    fit, listing missing, extra and mis-shaped ones.
    """
    reference = parse_reference(reference, GENERATORS)
    options = {name: value for name, value in options.items() if value is not None}
    if wrong := [name for name in options if reference.kind not in GENERATOR_OPTIONS[name]]:
        advice = "a run says it itself" if reference.kind == "workdir" else "such files have no choice of it"
        raise WeightsError(f"{reference}: {', '.join(wrong)} cannot be said; {advice}")
    if reference.kind == "workdir":
        model, params, kind, known = load_workdir(reference.rest)
    elif reference.kind == "maskgit":
        (model, params, kind), known = maskgit.read(reference.rest, **options), {}
    else:
        kind, prediction = reference.kind, options.get("prediction", "velocity")
        known = {"process": {"prediction": prediction}} if kind == "sit" else {}
        model, params = read(reference.rest, kind, options.get("heads"), prediction)
    spec = GeneratorSpec(kind, model.classes, str(reference), parameter_hash(params), **known)
    return model.clone(scan=scan), stack_blocks(params) if scan else params, spec


def save_generator(reference, model, params, spec):
    """Writes weights for others: dit:FILE, sit:FILE or repa:FILE, .pt (the tensors alone, as released) or .safetensors;
    maskgit:FILE as `maskgit.write` has it.

    params: with blocks one by one or stacked. The file appears under its name only once it is complete. A `sit:` file
    has the public 8 channels, the second half zeros; a model that counts time from data is turned round in its first
    layer. Raises WeightsError where the parameters are not the model's, or the format has no place for it.
    """
    kind, rest = parse_reference(reference, GENERATORS)
    path = pathlib.Path(rest)
    fitting = "maskgit" if spec.kind in maskgit.NETWORKS else spec.kind
    if kind == "workdir":
        raise WeightsError(f"{reference}: weights are written as dit:FILE, sit:FILE, repa:FILE or maskgit:FILE")
    if kind != fitting:
        raise WeightsError(f"{reference}: these weights are a {spec.kind}'s, {spec.source}; write {fitting}:{rest}")
    if kind == "maskgit":
        maskgit.write(path, model, unstack_blocks(params))
        return
    if path.suffix not in (".pt", ".safetensors"):
        raise WeightsError(f"{reference}: weights are written as dit:FILE, sit:FILE or repa:FILE, .pt or .safetensors")
    if model.heads != heads_of(model.width):
        raise WeightsError(f"{reference}: such files do not say how many heads a model has; readers take "
                           f"{heads_of(model.width)} for a width of {model.width}, and this one has {model.heads}")
    params = unstack_blocks(params)
    tables.check_parameters("parameters to save", params, parameter_shapes(model))
    if kind != "sit" and model.reversed_time:
        raise WeightsError(f"{reference}: this model is given reversed times, which {kind}'s own code does not do")
    if kind == "sit":
        model, params = to_sit(model, params, spec.process.get("prediction", "velocity"), reference)
    tensors = tables.write_parameters(params, parameter_shapes(model), key_of)
    patch = (model.width, model.patch_size, model.patch_size, model.in_channels)
    tensors[PATCH] = tensors[PATCH].reshape(patch).transpose(0, 3, 1, 2)                  # (D, C, p, p)
    tensors[POSITIONS] = positions(model.width, model.input_size // model.patch_size)[None]
    if path.suffix == ".pt":
        write_torch_file(path, tensors, under=None)
    else:
        write_tensors(path, tensors)


def key_of(path):
    """The public key of a path of ours, such as ("block_3", "qkv", "kernel")."""
    *block, layer, leaf = path
    prefix = f"blocks.{block[0].removeprefix('block_')}." if block else ""
    return f"{prefix}{NAMES[layer]}.{'weight' if leaf == 'embedding' else tables.LEAVES[leaf]}"


def heads_of(width):
    """Heads of the published models: 64 channels each, but 72 in XL; None where a width leaves it open."""
    return 16 if width == 1152 else width // 64 if width % 64 == 0 else None


def read(path, kind, heads, prediction):
    """(model, params) of a public file; raises WeightsError where it is no such file, or lists what does not fit."""
    tensors = read_state(path)
    known_depth = None
    if kind == "repa":
        tensors, known_depth = whole_blocks(tensors)
    try:
        model = model_of(tensors, heads)
        if kind == "repa":
            model = repa_of(model, tensors, known_depth)
        shapes = parameter_shapes(model)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except (KeyError, IndexError, ValueError, ArithmeticError) as error:
        raise WeightsError(f"{path}: not a DiT or SiT ({type(error).__name__}: {error}); it holds "
                           f"{', '.join(list(tensors)[:5])} ...") from error
    fixed, patches = tensors.pop(POSITIONS), tensors[PATCH]
    tensors[PATCH] = patches.transpose(0, 2, 3, 1).reshape(len(patches), -1)              # (D, p p C)
    params = tables.read_parameters(tensors, shapes, key_of, path)
    # A file in 16 bits holds rounded positions. Anything else is another model, whatever its names say.
    tolerance = max(1e-5, float(jnp.finfo(fixed.dtype).eps))
    expected = positions(model.width, model.input_size // model.patch_size)
    if not np.allclose(fixed[0].astype(np.float32), expected, rtol=0, atol=tolerance):
        raise WeightsError(f"{path}: its pos_embed is not DiT's table of sines and cosines; learnt or interpolated "
                           "positions are not supported")
    return from_sit(model, params, prediction, path) if kind == "sit" else (model, params)


def model_of(tensors, heads):
    """The model that the shapes in a file describe. heads: None to take the published number for its width."""
    if empty := [name for name, value in tensors.items() if not value.size]:
        raise WeightsError(f"its tensors {', '.join(empty[:5])} are empty")  # and their other sides could be any number
    width, channels, patch, _ = tensors[PATCH].shape
    one, tokens, across = tensors[POSITIONS].shape
    grid = math.isqrt(tokens)
    if one != 1 or across != width or grid * grid != tokens:
        raise WeightsError(f"its pos_embed is {tensors[POSITIONS].shape}; it must be (1, tokens of a square, {width})")
    heads = heads or heads_of(width)
    if heads is None:
        raise WeightsError(f"its width of {width} does not tell how many heads it has; say heads=N")
    blocks = {m[1] for m in map(re.compile(r"blocks\.(\d+)\.").match, tensors) if m}
    features = tensors["final_layer.linear.weight"].shape[0]
    if features % patch**2:
        raise WeightsError(f"its last layer makes {features} numbers, which do not divide into patches of {patch}")
    return DiT(
        input_size=grid * patch, in_channels=channels, out_channels=features // patch**2, patch_size=patch,
        width=width, depth=len(blocks), heads=heads,
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
        classes=tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
    )


def whole_blocks(tensors):
    """The tensors of a REPA file with the names of today, and the projector's depth if the names tell it.

    Older files counted the blocks behind the projector anew.
    """
    first = {name.split(".")[1] for name in tensors if re.match(r"blocks\.\d+\.", name)}
    later = re.compile(r"decoder_blocks\.(\d+)\.")
    renamed = {later.sub(lambda m: f"blocks.{int(m[1]) + len(first)}.", name): value for name, value in tensors.items()}
    return renamed, len(first) if renamed.keys() != tensors.keys() else None


def repa_of(model, tensors, known_depth):
    """The REPA of a DiT and of the projector in a file; of a depth it does not say: 8 blocks in L and XL, 4 in B."""
    sizes = [tensors[f"{NAMES[name]}.weight"].shape[0] for name in ("projector_hidden", "projector_out")]
    depth = known_depth or min(8 if model.depth >= 24 else 4, model.depth)
    return as_kind(model, REPA, alignment_depth=depth, projector_size=sizes[0], feature_size=sizes[1])


def load_workdir(rest):
    """(model, params, kind, more of its spec) of a run of ours, with its average of the weights if there is one."""
    from eqvae_jax.training.checkpoint import load_averaged  # needs Orbax, which is slow to import

    try:
        saved, config, _ = load_averaged(rest)
    except (FileNotFoundError, ValueError) as error:
        raise WeightsError(f"workdir:{rest}: {error}") from error
    section, params, latents = config.get("generator"), saved.get("generator"), config.get("latents")
    if not section or not params:
        raise WeightsError(f"workdir:{rest}: its run trained no generator")
    try:
        kind = section["kind"]
        if kind not in KINDS:
            raise ValueError(f"a generator of kind {kind!r}; this version knows {', '.join(KINDS)}")
        model = from_description(section, KINDS[kind])
        latents = {name: latents[name] for name in LATENTS} if latents else None
        params = unstack_blocks(params)
        tables.check_parameters("its parameters", params, parameter_shapes(model))
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"workdir:{rest}: {type(error).__name__}: {error}") from error
    process = {name: value for name, value in section.items() if name not in {"kind", *describe(model)}}
    return model, params, kind, dict(latents=latents, process=process, sampling=config.get("sampling"))
