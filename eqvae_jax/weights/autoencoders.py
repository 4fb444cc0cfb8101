"""Autoencoders from references and into files: `load_autoencoder` and `save_autoencoder`."""

import dataclasses
import hashlib
import pathlib
import re

import flax
import numpy as np

from eqvae_jax.autoencoders.kl import PRESETS, AutoencoderKL
from eqvae_jax.weights import diffusers_folder, tables
from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.files import read_tensors, select, write_tensors
from eqvae_jax.weights.references import nearest, parse_reference

SD_SCALE = 0.18215


@dataclasses.dataclass(frozen=True)
class AutoencoderSpec:
    """What a user of latents must know: diffusion models see (z - shift) * scale, and belong to these very weights.

    kind: family of the model, "kl". reference: where the weights came from. hash: 16 hexadecimal digits of the weights.
    """

    kind: str
    scale: float
    shift: float
    reference: str
    hash: str


def load_autoencoder(reference, *, seed=0):
    """(model, params, spec) of an autoencoder reference: see `references.AUTOENCODERS` for the forms.

    params: the dict under "params" of flax variables, float32 NumPy arrays. seed: of the random weights of `init:`.
    Raises WeightsError where the weights cannot be found or do not fit, listing missing, extra and mis-shaped ones.
    """
    reference = parse_reference(reference)
    model, params, scale, shift = LOADERS[reference.kind](reference.rest, seed)
    return model, params, AutoencoderSpec("kl", scale, shift, str(reference), parameter_hash(params))


def save_autoencoder(reference, model, params, spec):
    """Writes weights as `diffusers:DIR`, for `diffusers.AutoencoderKL.from_pretrained`, or as `ldm:FILE.safetensors`.

    spec gives the scale and shift of the latents. A file appears under its name only once it is complete.
    Raises WeightsError where the parameters are not the model's, or a file cannot be written.
    """
    kind, rest = parse_reference(reference)
    shapes, levels, path = tables.parameter_shapes(model), len(model.multipliers), pathlib.Path(rest)
    if kind == "diffusers":
        tensors = tables.write_parameters(params, shapes, lambda p: tables.diffusers_key(p, levels))
        diffusers_folder.write(path, diffusers_folder.config_of(model, spec.scale, spec.shift), tensors)
    elif kind == "ldm" and path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tables.write_parameters(params, shapes, tables.ldm_key, attention_as_convolution=True))
    else:
        raise WeightsError(f"{reference}: weights are written as diffusers:DIR or ldm:FILE.safetensors")


def parameter_hash(params):
    """16 hexadecimal digits that change with any value, name or shape of the parameters."""
    digest = hashlib.sha256()
    for path, value in sorted(flax.traverse_util.flatten_dict(params, sep="/").items()):
        value = np.ascontiguousarray(value, np.float32)
        digest.update(f"{path} {value.shape} ".encode())
        digest.update(value.data if value.size else b"")
    return digest.hexdigest()[:16]


def load_diffusers(rest, seed):
    folder = diffusers_folder.find(rest)
    fields, scale, shift = diffusers_folder.read_config(folder)
    model = AutoencoderKL(**fields)
    levels, shapes = len(model.multipliers), tables.parameter_shapes(model)
    tensors = tables.new_attention_names(diffusers_folder.read(folder))
    params = tables.read_parameters(tensors, shapes, lambda p: tables.diffusers_key(p, levels), folder)
    return model, params, scale, shift


def load_ldm(rest, seed):
    tensors = read_tensors(rest)
    # A whole Stable Diffusion carries its autoencoder under a prefix.
    for prefix in ("first_stage_model.", "vae."):
        tensors = select(tensors, prefix) or tensors
    # Beside the autoencoder, training checkpoints hold the loss's networks.
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    own = {name: value for name, value in tensors.items() if name.startswith(parts)}
    if "quantize.embedding.weight" in tensors:
        raise WeightsError(f"{rest}: a VQ model (it has a codebook); ldm: reads KL autoencoders")
    try:
        fields = ldm_fields(own)
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(
            f"{rest}: not an autoencoder of latent-diffusion ({error}); it holds {', '.join(list(tensors)[:5])} ..."
        ) from error
    model = AutoencoderKL(**fields)
    params = tables.read_parameters(own, tables.parameter_shapes(model), tables.ldm_key, rest)
    # The file does not say; 4 channels are Stable Diffusion's (SDXL's looks the same: give its scale to the spec).
    return model, params, SD_SCALE if model.latent_channels == 4 else 1.0, 0.0


def ldm_fields(tensors):
    """AutoencoderKL's fields from the shapes in a file of latent-diffusion, where norms always have 32 groups."""
    levels = 1 + max(int(m[1]) for m in map(re.compile(r"encoder\.down\.(\d+)\.block").match, tensors) if m)
    widths = [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    first_level = re.compile(r"encoder\.down\.0\.block\.\d+\.conv1\.weight")
    return dict(
        **diffusers_folder.widths_as_multiples(widths),
        blocks_per_level=len([name for name in tensors if first_level.fullmatch(name)]),
        latent_channels=tensors["decoder.conv_in.weight"].shape[1],
        attention_levels=tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in tensors),
        quant="quant_conv.weight" in tensors,
    )


def load_workdir(rest, seed):
    from eqvae_jax.training.checkpoint import load_params  # needs Orbax, which is slow to import

    try:
        try:
            saved, config, _ = load_params(rest, "ema")
        except ValueError:                                   # this run keeps no average of its weights
            saved, config, _ = load_params(rest, "params")
    except FileNotFoundError as error:
        raise WeightsError(f"workdir:{rest}: {error}") from error
    section, params = config.get("autoencoder"), saved.get("autoencoder")
    if not section or not params:
        raise WeightsError(f"workdir:{rest}: its run trained no autoencoder")
    names = {field.name for field in dataclasses.fields(AutoencoderKL)} - {"dtype", "remat", "parent", "name"}
    fields = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in section.items() if k in names}
    model = AutoencoderKL(**fields)
    tables.check_parameters(f"workdir:{rest}", params, tables.parameter_shapes(model))
    return model, params, section["scale"], section["shift"]


def load_init(rest, seed):
    if rest not in PRESETS:
        raise WeightsError(f"init:{rest}: no such preset{nearest(rest, PRESETS)} There are {', '.join(PRESETS)}.")
    model = AutoencoderKL(**PRESETS[rest])
    params = random_parameters(tables.parameter_shapes(model), seed)
    return model, calm(params), SD_SCALE if rest == "sd" else 1.0, 0.0


def calm(params):
    """The same parameters with residual branches that begin at zero and a posterior that begins narrow.

    Training a small autoencoder from torch's initialisation first has to undo both: after 250 steps of the
    quickstart its reconstructions of unseen photographs are 1.7 dB worse.
    """
    flat = flax.traverse_util.flatten_dict(params)
    for path in flat:
        if path[-2] in ("conv2", "out"):                     # a ResnetBlock's last convolution, attention's output
            flat[path] = np.zeros_like(flat[path])
    bias = flat["quant_conv", "bias"] if ("quant_conv", "bias") in flat else flat["encoder", "conv_out", "bias"]
    bias[len(bias) // 2:] = -5.0                             # log-variance: a standard deviation of 0.08
    return flax.traverse_util.unflatten_dict(flat)


def random_parameters(shapes, seed):
    """Parameters as model.init draws them in distribution (torch's default), without compiling for half a minute."""
    rng, params = np.random.default_rng(seed), {}
    flat = flax.traverse_util.flatten_dict(shapes)
    for path, leaf in flat.items():
        kernel = flat.get((*path[:-1], "kernel"))
        if kernel is None:                                   # a normalisation
            params[path] = np.full(leaf.shape, path[-1] == "scale", np.float32)
        else:
            bound = np.prod(kernel.shape[:-1]) ** -0.5
            params[path] = (rng.random(leaf.shape, np.float32) * 2 - 1) * np.float32(bound)
    return flax.traverse_util.unflatten_dict(params)


LOADERS = {"diffusers": load_diffusers, "ldm": load_ldm, "workdir": load_workdir, "init": load_init}
