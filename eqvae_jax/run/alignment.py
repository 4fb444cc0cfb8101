"""The frozen encoders that REPA aligns a generator with, by reference."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FORMS = ("dinov2:FILE, weights of DINOv2", "workdir:DIR, a run of configs/fashion_classifier.py")


class Encoder(NamedTuple):
    """features: (params, uint8 images (B,H,W,3)) -> (B, grid * grid, feature_size) float32, row by row."""

    params: Any
    features: Callable
    feature_size: int


def open_encoder(reference, grid, image_shape, dtype="float32"):
    """The Encoder of a reference, for images of this shape (H,W,3) and a generator of grid x grid tokens.

    image_shape: None of latents whose images were not kept. dtype: what DINOv2 computes in. Raises ValueError where
    there is no such encoder, or where it does not see as many places as there are tokens.
    """
    kind, _, rest = reference.partition(":")
    if kind not in OPENED or not rest:
        raise ValueError(f"alignment.encoder is {reference!r}; it must be one of\n  " + "\n  ".join(FORMS))
    if image_shape is None:
        raise ValueError("alignment.encoder looks at the images, and these latents were encoded without: encode again "
                         "with --keep_images.")
    encoder = OPENED[kind](rest, grid, dtype)
    shape = jax.eval_shape(encoder.features, encoder.params, jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)).shape
    if shape[1] != grid**2:
        raise ValueError(f"alignment.encoder: {reference} sees {shape[1]} places in images of {image_shape[0]} x "
                         f"{image_shape[1]}, and the generator has {grid} x {grid} tokens: choose another patch_size "
                         "or encoder.")
    return encoder


def dinov2(path, grid, dtype):
    """As REPA prepares it: its places are patches of 14 pixels, so images are resized to 14 for each token."""
    from eqvae_jax.weights.dinov2 import load_dinov2

    model, params, _ = load_dinov2(path)
    return dinov2_encoder(model, params, grid, dtype)


def dinov2_encoder(model, params, grid, dtype):
    """Of a model and its parameters, or their shapes."""
    from eqvae_jax.features.dinov2 import HEAD, repa_features
    from eqvae_jax.generators.dit import attention_kernel

    model = model.clone(dtype=dtype, attention=attention_kernel(dtype, HEAD))
    features = lambda params, images: repa_features(model, params, images, side=14 * grid)
    return Encoder(params, features, model.width)


def classifier(workdir, grid, dtype):
    """What the classifier's last convolution sees, averaged over the places of a token where they are finer."""
    from eqvae_jax.autoencoders.objective import to_float
    from eqvae_jax.evaluation.feature_sets import load_classifier

    model, params, _ = load_classifier(workdir)

    def features(params, images):
        seen = model.apply({"params": params}, to_float(images)).map                  # (B,h,w,Z)
        b, h, w, z = seen.shape
        if h % grid == 0 and w % grid == 0:
            seen = seen.reshape(b, grid, h // grid, grid, w // grid, z).mean((2, 4))  # (B,grid,grid,Z)
        return seen.reshape(b, -1, z)

    return Encoder(params, features, 4 * model.channels)


OPENED = {"dinov2": dinov2, "workdir": classifier}
