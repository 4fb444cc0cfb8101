"""REPA: SiT whose blocks, at one depth, are also asked for what a frozen encoder sees in the clean image.

Nothing else of SiT changes, and nothing of it is needed for sampling: the projector is left out there.
Source: REPA (arXiv 2410.06940) and sihyun-yu/REPA, models/sit.py and loss.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from eqvae_jax.generators.dit import DiT, dense


class Alignment(NamedTuple):
    """What a generator is aligned with, and how strongly.

    params: of the frozen encoder. encode: (params, uint8 images (B,H,W,3)) -> features (B,N,Z), one for each token of
    the generator, row by row. weight: of the alignment beside the process's own loss (lambda in the paper, 0.5).
    """

    params: Any
    encode: Callable
    weight: float = 0.5


class AlignedOutput(NamedTuple):
    """As dit.Output; projected: (B, N, Z) float32, what the tokens say of the encoder's features."""

    prediction: jax.Array
    hidden: Any
    projected: jax.Array


class REPA(DiT):
    """A DiT with a projector on its tokens.

    alignment_depth: after how many blocks (8 for L and XL, 4 for B). projector_size: width of its hidden layers.
    feature_size: Z of the encoder (768 of DINOv2-B).
    """

    alignment_depth: int = 8
    projector_size: int = 2048
    feature_size: int = 768

    @nn.compact
    def __call__(self, x, t, labels) -> AlignedOutput:
        """Arguments and errors as of DiT."""
        if not 1 <= self.alignment_depth <= self.depth:
            raise ValueError(f"REPA: alignment_depth is {self.alignment_depth}; this model has blocks 1 to "
                             f"{self.depth}.")
        prediction, hidden = super().__call__(x, t, labels)
        tokens = hidden[self.alignment_depth - 1]                                          # (B, N, D)
        h = nn.silu(dense(self.projector_size, dtype=self.dtype, name="projector_in")(tokens))
        h = nn.silu(dense(self.projector_size, dtype=self.dtype, name="projector_hidden")(h))
        projected = dense(self.feature_size, dtype=self.dtype, name="projector_out")(h)    # (B, N, Z)
        return AlignedOutput(prediction, hidden, projected.astype(jnp.float32))


def projector_macs(model):
    """Multiply-accumulates of an image in the projector, which `dit.forward_macs` leaves out."""
    tokens, hidden = (model.input_size // model.patch_size) ** 2, model.projector_size
    return tokens * hidden * (model.width + hidden + model.feature_size)


def alignment_loss(projected, features):
    """Minus the cosine between what tokens say and what the encoder sees, averaged over tokens: (B,) from (B,N,Z) each.

    It lies in [-1, 1]. Raises ValueError where the two differ in shape.
    """
    if projected.shape != features.shape:
        raise ValueError(f"alignment: the generator projects its tokens to {projected.shape} (images, tokens, features)"
                         f", and the encoder gives {features.shape}; both must be the same.")
    return -jnp.sum(_unit(projected) * _unit(features), axis=-1).mean(-1)


def _unit(x):
    # The clamp is inside the root: the gradient of a norm is not finite at 0.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
