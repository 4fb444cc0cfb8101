"""The convolutional blocks that all of the paper's autoencoders share (LDM's `Encoder` and `Decoder`).

NHWC throughout. Parameters are float32; `dtype` is the type convolutions compute in, while normalisation
statistics and softmax stay float32. Submodule names are the keys of the weight tables in `weights/`.
Source: CompVis/latent-diffusion, ldm/modules/diffusionmodules/model.py.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

EPSILON = 1e-6  # LDM's GroupNorm; torch's default is 1e-5


def bias_init(fan_in):
    """torch's default for biases, U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


# torch's default for kernels is the same uniform: a variance of 1 / (3 fan_in).
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


# What convolutions see beyond the border. LDM has zeros. "reflect" is the mirror image, everywhere; the third leaves
# zeros in the downsampling, as those do who set padding_mode="reflect" on every padding Conv2d of torch: there LDM and
# diffusers pad by a function of its own. That is what Anzhc's MS-LC-EQ-D-VR needs (kohya-ss/sd-scripts, issue 2189).
PADDINGS = ("zeros", "reflect", "reflect_but_downsampling")


def padded(x, amounts, padding, mode="reflect"):
    """(x, padding still to do): of (B, H, W, C), by amounts = ((top, bottom), (left, right)) pixels.

    padding: of PADDINGS; "zeros" is left to the convolution. mode: of jnp.pad, for the others. A map that is one pixel
    wide has no mirror image; it continues as that pixel (torch refuses it).
    """
    if padding == "zeros":
        return x, amounts
    return jnp.pad(x, ((0, 0), *amounts, (0, 0)), mode=mode), ((0, 0), (0, 0))


def conv(x, features, size, name, dtype, stride=1, amounts=None, padding="zeros"):
    """Biased size x size convolution initialised as torch does, its output tagged "conv" for remat policies.

    amounts: pixels of padding, as of `padded`; None for what keeps the size.
    """
    x, rest = padded(x, ((size // 2, size // 2),) * 2 if amounts is None else amounts, padding)
    layer = nn.Conv(features, (size, size), stride, rest, dtype=dtype, kernel_init=kernel_init,
                    bias_init=bias_init(size * size * x.shape[-1]), name=name)
    return checkpoint_name(layer(x), "conv")


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_norm(x, scale, bias, groups, swish):
    """GroupNorm of (B, H, W, C) over consecutive channels, then optionally swish; statistics in float32.

    Written out, with its gradient, because it is the pass that costs most after the convolutions: against
    flax's GroupNorm and swish it is about twice as fast on CPU, and it saves only x for the backward pass
    (benchmarks/group_norm.py). The variance is the two-pass one: E[x^2] - E[x]^2 cancels.
    """
    return _group_norm_forward(x, scale, bias, groups, swish)[0]


def _over_groups(v, groups):
    """Means of (B, C) over each group's channels, as (B, 1, 1, C) ready to broadcast."""
    batch, channels = v.shape
    means = jnp.mean(v.reshape(batch, groups, channels // groups), axis=-1, keepdims=True)
    return jnp.broadcast_to(means, (batch, groups, channels // groups)).reshape(batch, 1, 1, channels)


def _group_norm_forward(x, scale, bias, groups, swish):
    wide = x.astype(jnp.float32)
    mean = _over_groups(jnp.mean(wide, axis=(1, 2)), groups)
    variance = _over_groups(jnp.mean(jnp.square(wide - mean), axis=(1, 2)), groups)
    inverse = lax.rsqrt(variance + EPSILON)
    y = (wide - mean) * (inverse * scale) + bias
    return (nn.swish(y) if swish else y).astype(x.dtype), (x, mean, inverse, scale, bias)


def _group_norm_backward(groups, swish, saved, dy):
    x, mean, inverse, scale, bias = saved
    normal = (x.astype(jnp.float32) - mean) * inverse
    dy = dy.astype(jnp.float32)
    if swish:
        y = normal * scale + bias
        gate = nn.sigmoid(y)
        dy = dy * gate * (1 + y * (1 - gate))
    dbias, dscale = jnp.sum(dy, axis=(1, 2)), jnp.sum(dy * normal, axis=(1, 2))  # (B, C)
    pixels = x.shape[1] * x.shape[2]
    dx = inverse * (dy * scale - _over_groups(dbias * scale, groups) / pixels
                    - normal * _over_groups(dscale * scale, groups) / pixels)
    return dx.astype(x.dtype), jnp.sum(dscale, axis=0), jnp.sum(dbias, axis=0)


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


class GroupNorm(nn.Module):
    """GroupNorm with eps 1e-6 and an optional swish, (B, H, W, C) -> (B, H, W, C)."""

    groups: int = 32
    swish: bool = True

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(f"GroupNorm: {channels} channels do not divide into {self.groups} groups; "
                             "change the autoencoder's channels or groups.")
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        return group_norm(x, scale, bias, self.groups, self.swish)


class ResnetBlock(nn.Module):
    """Two normalised 3 x 3 convolutions and a shortcut, (B, H, W, C) -> (B, H, W, features)."""

    features: int
    groups: int = 32
    dtype: Any = jnp.float32
    padding: str = "zeros"

    @nn.compact
    def __call__(self, x):
        h = GroupNorm(self.groups, name="norm1")(x)
        h = conv(h, self.features, 3, "conv1", self.dtype, padding=self.padding)
        h = GroupNorm(self.groups, name="norm2")(h)
        h = conv(h, self.features, 3, "conv2", self.dtype, padding=self.padding)
        if x.shape[-1] != self.features:  # the shortcut sees the raw input, not the normalised one
            x = conv(x, self.features, 1, "shortcut", self.dtype)
        return x + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions with a residual, (B, h, w, C) -> (B, h, w, C)."""

    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        dense = partial(nn.Dense, channels, dtype=self.dtype, kernel_init=kernel_init, bias_init=bias_init(channels))
        h = GroupNorm(self.groups, swish=False, name="norm")(x).reshape(batch, height * width, 1, channels)
        query, key, value = dense(name="query")(h), dense(name="key")(h), dense(name="value")(h)  # (B, N, 1, C)
        # One head as wide as the map (512): more than cuDNN's fused kernel takes, so XLA's it is. Softmax in float32.
        h = jax.nn.dot_product_attention(query, key, value)
        return x + dense(name="out")(h).reshape(x.shape)


class Upsample(nn.Module):
    """Nearest-neighbour doubling followed by a 3 x 3 convolution, (B, h, w, C) -> (B, 2h, 2w, C).

    Computed without ever building the doubled map: each of the four output phases sees the 3 x 3 kernel
    fold onto 2 x 2 input pixels, so the same sums cost 16 instead of 36 multiplications per input pixel.
    """

    dtype: Any = jnp.float32
    padding: str = "zeros"

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        kernel = self.param("kernel", kernel_init, (3, 3, channels, channels))
        bias = self.param("bias", bias_init(9 * channels), (channels,))
        # Phase 0 of an axis sees the taps as (k0, k1 + k2), phase 1 as (k0 + k1, k2); folded in float32.
        fold = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], jnp.float32)  # (phase, tap of 2, tap of 3)
        kernels = jnp.einsum("pyh,qxw,hwio->pqyxio", fold, fold, kernel, precision=lax.Precision.HIGHEST)
        kernels = kernels.astype(self.dtype)

        def phase(p, q):
            # The first pixel of the doubled map's mirror image is a copy of the outermost pixel.
            framed, rest = padded(x, ((1 - p, p), (1 - q, q)), self.padding, mode="edge")
            return lax.conv_general_dilated(framed.astype(self.dtype), kernels[p, q], (1, 1), rest,
                                            dimension_numbers=("NHWC", "HWIO", "NHWC"))

        rows = [jnp.stack([phase(p, 0), phase(p, 1)], axis=3) for p in (0, 1)]  # (B, h, w, 2, C)
        y = jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels)
        return checkpoint_name(y + bias.astype(self.dtype), "conv")
