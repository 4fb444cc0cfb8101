"""AutoencoderVQ: images to features, features to the nearest codes of a codebook, codes back to images (VQ-GAN).

The latent that tau acts on is the map of features before quantisation, as in the paper; decoding quantises first.
Source: CompVis/taming-transformers, taming/models/vqgan.py and modules/vqvae/quantize.py (VectorQuantizer2).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from eqvae_jax.autoencoders.coders import Autoencoder


class Features(struct.PyTreeNode):
    """The latent of a deterministic encoder, (B, h, w, C) float32, under the names that Posterior has."""

    z: jax.Array

    def mode(self):
        return self.z

    def sample(self, key=None, index=None):
        return self.z


class Quantized(NamedTuple):
    """latent: (B, h, w, C), the codes in value, with z's gradient (straight through). codes: (B, h, w, C), the same
    with the codebook's gradient. indices: (B, h, w) int32 in 0 .. K - 1."""

    latent: jax.Array
    codes: jax.Array
    indices: jax.Array


def nearest_codes(z, codebook):
    """Index of the nearest row of the codebook (K, C) for each vector of z (..., C), int32; of equals the first.

    In float32 at full precision whatever the machine's default: in bfloat16 7 % of assignments change.
    """
    z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
    products = jnp.einsum("...c,kc->...k", z, codebook, precision=jax.lax.Precision.HIGHEST)
    # |z|^2, the same for all codes, is left out of the squared distance.
    return jnp.argmin(jnp.sum(jnp.square(codebook), axis=-1) - 2 * products, axis=-1).astype(jnp.int32)


class AutoencoderVQ(Autoencoder):
    """VQ-GAN's autoencoder. codebook_size: K, how many codes there are; latent_channels: the length C of each."""

    codebook_size: int = 1024

    kind = "vq"

    def setup(self):
        self.encoder, self.decoder = self.coders(self.latent_channels)
        self.quant_conv = self.pointwise(self.latent_channels, self.latent_channels)
        self.post_quant_conv = self.pointwise(self.latent_channels, self.latent_channels)
        bound = 1 / self.codebook_size
        uniform = lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        self.codebook = self.param("codebook", uniform, (self.codebook_size, self.latent_channels))

    def encode(self, x) -> Features:
        """(B, H, W, 3) in [-1, 1] -> features (B, H / f, W / f, latent_channels), before quantisation."""
        return Features(self.quant_conv(self.encoder(x)).astype(jnp.float32))

    def quantize(self, z) -> Quantized:
        """Features (B, h, w, latent_channels) -> their nearest codes."""
        z = z.astype(jnp.float32)
        indices = nearest_codes(z, self.codebook)  # (B, h, w)
        codes = self.codebook[indices]  # (B, h, w, C)
        return Quantized(z + jax.lax.stop_gradient(codes - z), codes, indices)

    def decode_with_features(self, z):
        """(images as `decode` gives them, the input (B, H, W, channels) of the last convolution, Quantized)."""
        quantized = self.quantize(z)
        image, features = self.decoder(self.post_quant_conv(quantized.latent))
        return image.astype(jnp.float32), features, quantized

    def decode_indices(self, indices):
        """Indices (B, h, w) of codes -> images (B, fh, fw, 3), float32, not clipped."""
        return self.decoder(self.post_quant_conv(self.codebook[indices]))[0].astype(jnp.float32)
