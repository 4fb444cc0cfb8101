"""AutoencoderKL: images to a diagonal Gaussian over latents and back.

SD-VAE, SD-VAE-16, SDXL-VAE and SD3-VAE (presets.py). Source: CompVis/latent-diffusion, ldm/models/autoencoder.py and
modules/distributions.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from eqvae_jax.autoencoders.coders import Autoencoder


class Posterior(struct.PyTreeNode):
    """Diagonal Gaussian over latents: mean and log-variance, each (B, h, w, C), unscaled, float32."""

    mean: jax.Array
    logvar: jax.Array

    @classmethod
    def from_moments(cls, moments):
        """Splits (B, h, w, 2C): mean first, then log-variance, clipped to [-30, 20] as LDM does."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))

    @property
    def std(self):
        return jnp.exp(0.5 * self.logvar)

    def mode(self):
        return self.mean

    def sample(self, key, index=None):
        """A draw of the latent, (B, h, w, C).

        With `index` (B,) each example's noise depends only on `key` and its own index, so the draw does
        not change with the mesh or with an example's place in the batch.
        """
        if index is None:
            noise = jax.random.normal(key, self.mean.shape)
        else:
            draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), self.mean.shape[1:])
            noise = jax.vmap(draw)(index)
        return self.mean + self.std * noise

    def kl(self):
        """KL divergence from the standard normal in nats, summed over the latent, (B,)."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


def latent_noise(z, gamma, key, index):
    """(1 - t) z + t gamma eps, with t uniform in 0..1 for each example and eps standard normal; (B, h, w, C).

    gamma: the noise's standard deviation, in the unit of z. key, index: of the posterior's sample, whose noise is
    another; an example's draw, too, depends on them alone. Source: l-DeTok (arXiv 2507.15856), its models/detok.py.
    """
    key = jax.random.fold_in(key, np.uint32(2**32 - 1))  # no example's index, each of which is a key of the sample's

    def corrupt(z, i):
        level, noise = jax.random.split(jax.random.fold_in(key, i))
        t = jax.random.uniform(level)
        return (1 - t) * z + t * gamma * jax.random.normal(noise, z.shape)

    return jax.vmap(corrupt)(z, index)


class AutoencoderKL(Autoencoder):
    """The paper's continuous autoencoders. quant: 1 x 1 convolutions around the latent (absent in SD3)."""

    quant: bool = True

    kind = "kl"

    def setup(self):
        self.encoder, self.decoder = self.coders(2 * self.latent_channels)
        if self.quant:
            self.quant_conv = self.pointwise(2 * self.latent_channels, 2 * self.latent_channels)
            self.post_quant_conv = self.pointwise(self.latent_channels, self.latent_channels)

    def encode(self, x) -> Posterior:
        """(B, H, W, 3) in [-1, 1] -> posterior over (B, H / f, W / f, latent_channels), unscaled."""
        moments = self.encoder(x)  # (B, h, w, 2C)
        return Posterior.from_moments(self.quant_conv(moments) if self.quant else moments)

    def decode_with_features(self, z):
        """(images as `decode` gives them, the input (B, H, W, channels) of the last convolution, None)."""
        image, features = self.decoder(self.post_quant_conv(z) if self.quant else z)
        return image.astype(jnp.float32), features, None
