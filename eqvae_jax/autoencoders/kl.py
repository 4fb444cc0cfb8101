"""AutoencoderKL: images to a diagonal Gaussian over latents and back.

One family of graphs covers SD-VAE, SD-VAE-16, SDXL-VAE and SD3-VAE; only widths, attention and latent
channels differ. Source: CompVis/latent-diffusion, ldm/models/autoencoder.py and modules/diffusionmodules/model.py.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from eqvae_jax.autoencoders.blocks import AttentionBlock, GroupNorm, ResnetBlock, Upsample, bias_init, conv, kernel_init

# Architectures by name: `init:NAME` builds one with random weights.
PRESETS = {
    "sd": dict(channels=128, multipliers=(1, 2, 4, 4), blocks_per_level=2, latent_channels=4),
    "quickstart": dict(channels=16, multipliers=(1, 2, 4), blocks_per_level=1, latent_channels=8, groups=8),
    "smoke": dict(channels=8, multipliers=(1, 2), blocks_per_level=1, latent_channels=4, groups=4),
}


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


class _Coder(nn.Module):
    """Fields and the middle block that encoder and decoder share."""

    channels: int
    multipliers: tuple
    blocks_per_level: int
    out_channels: int
    attention_levels: tuple
    groups: int
    dtype: Any
    remat: bool

    def block(self, x, level, name):
        # With remat only convolution outputs are kept (0.55 instead of 2.76 GiB an image at 256 x 256 in
        # bf16); what is recomputed is normalisation and swish, never a convolution.
        policy = jax.checkpoint_policies.save_only_these_names("conv")
        module = nn.remat(ResnetBlock, policy=policy) if self.remat else ResnetBlock
        return module(self.channels * self.multipliers[level], self.groups, self.dtype, name=name)(x)

    def middle(self, x):
        x = self.block(x, -1, "mid_block_1")
        x = AttentionBlock(self.groups, self.dtype, name="mid_attention")(x)
        return self.block(x, -1, "mid_block_2")

    def head(self, x):
        features = GroupNorm(self.groups, name="norm_out")(x)
        return conv(features, self.out_channels, 3, "conv_out", self.dtype), features


class Encoder(_Coder):
    """(B, H, W, 3) -> (B, h, w, out_channels), h = H / 2^(levels - 1), floored at every level."""

    @nn.compact
    def __call__(self, x):
        x = conv(x, self.channels, 3, "conv_in", self.dtype)
        for level in range(len(self.multipliers)):
            for j in range(self.blocks_per_level):
                x = self.block(x, level, f"down_{level}_block_{j}")
                if level in self.attention_levels:
                    x = AttentionBlock(self.groups, self.dtype, name=f"down_{level}_attention_{j}")(x)
            if level < len(self.multipliers) - 1:
                # LDM pads bottom and right only; "SAME" would differ for odd sizes.
                x = conv(x, x.shape[-1], 3, f"down_{level}_downsample", self.dtype, 2, ((0, 1), (0, 1)))
        return self.head(self.middle(x))[0]


class Decoder(_Coder):
    """(B, h, w, C) -> (B, H, W, out_channels), not clipped, and the features (B, H, W, channels) it is made from."""

    @nn.compact
    def __call__(self, z):
        x = conv(z, self.channels * self.multipliers[-1], 3, "conv_in", self.dtype)
        x = self.middle(x)
        for level in reversed(range(len(self.multipliers))):
            for j in range(self.blocks_per_level + 1):
                x = self.block(x, level, f"up_{level}_block_{j}")
                if level in self.attention_levels:
                    x = AttentionBlock(self.groups, self.dtype, name=f"up_{level}_attention_{j}")(x)
            if level > 0:
                x = Upsample(self.dtype, name=f"up_{level}_upsample")(x)
        return self.head(x)


class AutoencoderKL(nn.Module):
    """The paper's continuous autoencoder.

    channels, multipliers: width of each level, full resolution first. blocks_per_level: residual blocks in an
    encoder level (a decoder level has one more). attention_levels: levels with attention beside the middle's.
    quant: 1 x 1 convolutions around the latent (absent in SD3). dtype: what convolutions compute in.
    remat: recompute normalisation and activations in the backward pass to save memory.
    """

    channels: int = 128
    multipliers: tuple = (1, 2, 4, 4)
    blocks_per_level: int = 2
    latent_channels: int = 4
    groups: int = 32
    attention_levels: tuple = ()
    quant: bool = True
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def downsampling(self) -> int:
        """f: image side over latent side."""
        return 2 ** (len(self.multipliers) - 1)

    def setup(self):
        common = dict(channels=self.channels, multipliers=self.multipliers, blocks_per_level=self.blocks_per_level,
                      attention_levels=self.attention_levels, groups=self.groups, dtype=self.dtype, remat=self.remat)
        self.encoder = Encoder(out_channels=2 * self.latent_channels, **common)
        self.decoder = Decoder(out_channels=3, **common)
        if self.quant:
            pointwise = lambda features: nn.Conv(features, (1, 1), dtype=self.dtype, kernel_init=kernel_init,
                                                 bias_init=bias_init(features))
            self.quant_conv, self.post_quant_conv = pointwise(2 * self.latent_channels), pointwise(self.latent_channels)

    def encode(self, x) -> Posterior:
        """(B, H, W, 3) in [-1, 1] -> posterior over (B, H / f, W / f, latent_channels), unscaled."""
        moments = self.encoder(x)  # (B, h, w, 2C)
        return Posterior.from_moments(self.quant_conv(moments) if self.quant else moments)

    def decode_with_features(self, z):
        """Images as `decode` gives them, and the input (B, H, W, channels) of the last convolution."""
        image, features = self.decoder(self.post_quant_conv(z) if self.quant else z)
        return image.astype(jnp.float32), features

    def decode(self, z):
        """Unscaled latents (B, h, w, latent_channels) -> images (B, fh, fw, 3), float32, not clipped."""
        return self.decode_with_features(z)[0]

    def __call__(self, x):
        """Reconstruction from the posterior's mode; touches every parameter, so it also initialises."""
        return self.decode(self.encode(x).mode())
