"""Checkpoints of latent-diffusion and taming-transformers: bare, of a whole Stable Diffusion, KL or VQ.

The two share their module names, so one table serves both; what a file holds is told by its tensors' names and shapes.
"""

import re
from typing import NamedTuple

from eqvae_jax.autoencoders.kl import AutoencoderKL
from eqvae_jax.autoencoders.presets import PRESETS
from eqvae_jax.autoencoders.vq import AutoencoderVQ
from eqvae_jax.weights import tables
from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.files import read_checkpoint, write_tensors
from eqvae_jax.weights.torch_writer import write_torch_file

GROUPS = 32                               # of every normalisation there; files do not say
# A whole Stable Diffusion carries its autoencoder under a prefix.
PREFIXES = ("first_stage_model.", "vae.", "")
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
# Why tensors outside of the autoencoder are not read, by how their names begin.
LOSS, AVERAGE = "networks of the training loss", "a running average of the weights, kept beside them"
REST = "the rest of a diffusion model: its denoiser, text encoders and schedule"
OTHER, BESIDE = "of no part that this package knows", "the state of the training, beside the weights that were read"


class Contents(NamedTuple):
    """A file's tensors, sorted. autoencoder, loss: name without prefix -> array (loss without "loss.", too).

    left_out: reason in words -> names, as the file has them, of what belongs to neither.
    """

    autoencoder: dict
    loss: dict
    left_out: dict


def read_contents(path):
    """Contents of an LDM or taming checkpoint; raises WeightsError where it cannot be read."""
    tensors, beside = read_checkpoint(path)
    prefix = next((p for p in PREFIXES if any(name.startswith(f"{p}decoder.") for name in tensors)), "")
    autoencoder, loss, left_out = {}, {}, {}
    for name, value in tensors.items():
        own = name.removeprefix(prefix)
        if name.startswith("model_ema."):
            left_out.setdefault(AVERAGE, []).append(name)
        elif not name.startswith(prefix):
            left_out.setdefault(REST, []).append(name)
        elif own.startswith(PARTS):
            autoencoder[own] = value
        elif own.startswith("loss."):
            loss[own.removeprefix("loss.")] = value
            left_out.setdefault(LOSS, []).append(name)
        else:
            left_out.setdefault(OTHER, []).append(name)
    return Contents(autoencoder, loss, left_out | ({BESIDE: beside} if beside else {}))


def read(path):
    """(model, params, scale, shift, left_out) of a checkpoint, KL or VQ.

    Raises WeightsError where the file is no autoencoder of this family or its tensors do not fit, with the lists.
    """
    tensors, _, left_out = read_contents(path)
    try:
        model = model_of(tensors)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except (KeyError, IndexError, ValueError, ArithmeticError) as error:
        held = ", ".join([*tensors, *(name for names in left_out.values() for name in names)][:5])
        raise WeightsError(
            f"{path}: not an autoencoder of latent-diffusion or taming-transformers ({error}); it holds {held} ..."
        ) from error
    try:
        shapes = tables.parameter_shapes(model)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    params = tables.read_parameters(tensors, shapes, tables.ldm_key, path)
    return model, params, *published_scale(model), left_out


def model_of(tensors):
    """The model that the shapes in a file describe."""
    levels = 1 + max(int(m[1]) for m in map(re.compile(r"encoder\.down\.(\d+)\.block").match, tensors) if m)
    widths = [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    first_level = re.compile(r"encoder\.down\.0\.block\.\d+\.conv1\.weight")
    fields = dict(
        **widths_as_multiples(widths),
        blocks_per_level=len([name for name in tensors if first_level.fullmatch(name)]),
        latent_channels=tensors["decoder.conv_in.weight"].shape[1],
        attention_levels=tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in tensors),
        groups=GROUPS,
    )
    quant = tensors.get("quant_conv.weight")
    if quant is not None and quant.shape[0] != quant.shape[1]:
        raise WeightsError(f"its quant_conv maps {quant.shape[1]} channels to {quant.shape[0]}; only autoencoders "
                           "whose z_channels equal their embed_dim are read")
    if not any(name.startswith("quantize.") for name in tensors):
        return AutoencoderKL(**fields, quant=quant is not None)
    if tables.CODEBOOK not in tensors:
        raise WeightsError(f"its quantiser has no {tables.CODEBOOK}: another kind than VQ-GAN's nearest codes")
    return AutoencoderVQ(**fields, codebook_size=tensors[tables.CODEBOOK].shape[0])


def widths_as_multiples(widths):
    """channels and multipliers from the levels' widths."""
    if any(width % widths[0] for width in widths):
        raise ValueError(f"widths {widths} that are no multiples of the first")
    return {"channels": widths[0], "multipliers": tuple(width // widths[0] for width in widths)}


def published_scale(model):
    """(scale, shift) of the published weights of this form. The file does not say, and SDXL's looks like SD's."""
    known = None
    if model.kind == "kl":
        known = {(4, True): "sd", (16, False): "sd3"}.get((model.latent_channels, model.quant))
    return (PRESETS[known].scale, PRESETS[known].shift) if known else (1.0, 0.0)


def write(path, model, params):
    """Writes `path`, a .safetensors or a .ckpt; raises WeightsError where parameters or format do not allow it."""
    if model.groups != GROUPS:
        raise WeightsError(f"{path}: files of latent-diffusion and taming-transformers do not say how many groups "
                           f"normalisations have, and there it is always {GROUPS}; this model has {model.groups}. "
                           "Write diffusers:DIR instead.")
    tensors = tables.write_parameters(
        params, tables.parameter_shapes(model), tables.ldm_key, attention_as_convolution=True)
    writer = {".safetensors": write_tensors, ".ckpt": write_torch_file}[path.suffix]
    writer(path, tensors)
