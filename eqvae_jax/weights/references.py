"""References: `kind:rest`, the one way in which every command line names weights."""

import difflib
import os
from typing import NamedTuple

from eqvae_jax.weights.errors import WeightsError

AUTOENCODERS = {
    "diffusers": "diffusers:DIR or diffusers:ORG/NAME[/SUBFOLDER] on the Hugging Face Hub",
    "ldm": "ldm:FILE, a .ckpt or .safetensors of latent-diffusion, Stable Diffusion or EQ-VAE",
    "taming": "taming:FILE, a .ckpt or .safetensors of a VQ-GAN in the layout of taming-transformers",
    "workdir": "workdir:DIR of a training run of this project",
    "init": "init:PRESET, random weights",
}
GENERATORS = {
    "dit": "dit:FILE, a .pt or .safetensors in the layout of facebookresearch/DiT",
    "sit": "sit:FILE, a .pt or .safetensors in the layout of willisma/SiT",
    "repa": "repa:FILE, a .pt or .safetensors in the layout of sihyun-yu/REPA",
    "maskgit": "maskgit:FILE, a .pth or .safetensors of the PyTorch reproduction of MaskGIT, or the original's msgpack",
    "workdir": "workdir:DIR of a training run of this project",
}


class Reference(NamedTuple):
    kind: str
    rest: str

    def __str__(self):
        return f"{self.kind}:{self.rest}"


def parse_reference(reference, kinds=AUTOENCODERS):
    """Splits "kind:rest" into a Reference.

    kinds: name -> the form it takes, for messages; by default the autoencoders'. Raises WeightsError, which lists the
    kinds and names the nearest, for an unknown kind or one without a rest.
    """
    kind, colon, rest = str(reference).partition(":")
    if kind in kinds and rest:
        return Reference(kind, os.path.expanduser(rest))  # shells leave a ~ behind a colon alone
    if not colon:
        problem = f"{reference!r} does not say what it is: write KIND:{reference}"
    elif kind in kinds:
        problem = f"{reference!r} names nothing after {kind}:"
    else:
        problem = f"{reference!r}: there is no kind {kind!r}{nearest(kind, kinds)}"
    raise WeightsError("\n".join([f"{problem}. The kinds are", *(f"  {form}" for form in kinds.values())]))


def nearest(name, names):
    """", did you mean 'x'?" for the name that looks most like it, or nothing."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f", did you mean {close[0]!r}?" if close else ""
