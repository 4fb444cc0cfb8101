"""Encoder, decoder and the fields around them: the graph that all of the paper's autoencoders share.

Widths, attention and latent channels are what tells SD-VAE, SD-VAE-16, SDXL-VAE, SD3-VAE and VQ-GAN apart, and what
stands between encoder and decoder: kl.py and vq.py. Source: CompVis/latent-diffusion,
ldm/modules/diffusionmodules/model.py, which is taming-transformers' file.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eqvae_jax.autoencoders.blocks import AttentionBlock, GroupNorm, ResnetBlock, Upsample, bias_init, conv, kernel_init


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
    padding: str

    def block(self, x, level, name):
        # With remat only convolution outputs are kept (0.55 instead of 2.76 GiB an image at 256 x 256 in
        # bf16); what is recomputed is normalisation and swish, never a convolution.
        policy = jax.checkpoint_policies.save_only_these_names("conv")
        module = nn.remat(ResnetBlock, policy=policy) if self.remat else ResnetBlock
        return module(self.channels * self.multipliers[level], self.groups, self.dtype, self.padding, name=name)(x)

    def middle(self, x):
        x = self.block(x, -1, "mid_block_1")
        x = AttentionBlock(self.groups, self.dtype, name="mid_attention")(x)
        return self.block(x, -1, "mid_block_2")

    def head(self, x):
        features = GroupNorm(self.groups, name="norm_out")(x)
        return conv(features, self.out_channels, 3, "conv_out", self.dtype, padding=self.padding), features


class Encoder(_Coder):
    """(B, H, W, 3) -> (B, h, w, out_channels), h = H / 2^(levels - 1), floored at every level."""

    @nn.compact
    def __call__(self, x):
        x = conv(x, self.channels, 3, "conv_in", self.dtype, padding=self.padding)
        beyond = "reflect" if self.padding == "reflect" else "zeros"
        for level in range(len(self.multipliers)):
            for j in range(self.blocks_per_level):
                x = self.block(x, level, f"down_{level}_block_{j}")
                if level in self.attention_levels:
                    x = AttentionBlock(self.groups, self.dtype, name=f"down_{level}_attention_{j}")(x)
            if level < len(self.multipliers) - 1:
                # LDM pads bottom and right only; "SAME" would differ for odd sizes.
                x = conv(x, x.shape[-1], 3, f"down_{level}_downsample", self.dtype, 2, ((0, 1), (0, 1)), beyond)
        return self.head(self.middle(x))[0]


class Decoder(_Coder):
    """(B, h, w, C) -> (B, H, W, out_channels), not clipped, and the features (B, H, W, channels) it is made from."""

    @nn.compact
    def __call__(self, z):
        x = conv(z, self.channels * self.multipliers[-1], 3, "conv_in", self.dtype, padding=self.padding)
        x = self.middle(x)
        for level in reversed(range(len(self.multipliers))):
            for j in range(self.blocks_per_level + 1):
                x = self.block(x, level, f"up_{level}_block_{j}")
                if level in self.attention_levels:
                    x = AttentionBlock(self.groups, self.dtype, name=f"up_{level}_attention_{j}")(x)
            if level > 0:
                x = Upsample(self.dtype, self.padding, name=f"up_{level}_upsample")(x)
        return self.head(x)


class Autoencoder(nn.Module):
    """Fields and conversions that every autoencoder has; its subclasses say what a latent is.

    channels, multipliers: width of each level, full resolution first. blocks_per_level: residual blocks in an
    encoder level (a decoder level has one more). latent_channels: C of the latent. attention_levels: levels with
    attention beside the middle's. padding: what convolutions see beyond the border, of blocks.PADDINGS. dtype: what
    convolutions compute in. remat: recompute normalisation and activations in the backward pass to save memory.
    """

    channels: int = 128
    multipliers: tuple = (1, 2, 4, 4)
    blocks_per_level: int = 2
    latent_channels: int = 4
    groups: int = 32
    attention_levels: tuple = ()
    padding: str = "zeros"
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def downsampling(self) -> int:
        """f: image side over latent side."""
        return 2 ** (len(self.multipliers) - 1)

    def coders(self, moments):
        """Encoder to `moments` channels, and decoder to images."""
        common = dict(channels=self.channels, multipliers=self.multipliers, blocks_per_level=self.blocks_per_level,
                      attention_levels=self.attention_levels, groups=self.groups, dtype=self.dtype, remat=self.remat,
                      padding=self.padding)
        return Encoder(out_channels=moments, **common), Decoder(out_channels=3, **common)

    def pointwise(self, features, fan_in):
        """A 1 x 1 convolution beside the latent."""
        return nn.Conv(features, (1, 1), dtype=self.dtype, kernel_init=kernel_init, bias_init=bias_init(fan_in))

    def decode(self, z):
        """Unscaled latents (B, h, w, latent_channels) -> images (B, fh, fw, 3), float32, not clipped."""
        return self.decode_with_features(z)[0]

    def __call__(self, x):
        """Reconstruction of (B, H, W, 3) from the latent's mode; touches every parameter, so it also initialises."""
        return self.decode(self.encode(x).mode())
