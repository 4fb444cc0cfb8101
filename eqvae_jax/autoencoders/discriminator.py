"""PatchGAN: scores overlapping 70 x 70 patches of an image as real or reconstructed."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from eqvae_jax.autoencoders.blocks import bias_init

KERNEL = 4
PADDING = ((1, 1), (1, 1))


def around_one(key, shape, dtype=jnp.float32):
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


class BatchNorm(nn.Module):
    """Batch normalisation as torch does it: biased variance to normalise, unbiased variance to remember.

    flax's own layer remembers the biased one, a factor (n - 1) / n smaller. Statistics are float32 and, under `jit`
    on a sharded batch, those of the global batch, so the result does not depend on the number of devices. With `groups`
    the batch is normalised in so many equal parts, each by its own statistics, whose means are remembered: as many as
    devices, and no statistics travel between them.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    groups: int = 1

    @nn.compact
    def __call__(self, x, train: bool):                                          # B H W C
        channels = x.shape[-1]
        scale = self.param("scale", around_one, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))

        groups = 1 if self.is_initializing() or not train else self.groups
        x32 = x.astype(jnp.float32).reshape(groups, -1, *x.shape[1:])            # G B/G H W C
        if train:
            mean = x32.mean((1, 2, 3), keepdims=True)                            # G 1 1 1 C
            # Not E[x^2] - E[x]^2, which cancels to garbage where the mean is large.
            var = jnp.square(x32 - mean).mean((1, 2, 3), keepdims=True)          # G 1 1 1 C
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                n = x.size // (groups * channels)
                unbiased = var * (n / max(n - 1, 1))
                remember = lambda old, new: self.momentum * old + (1 - self.momentum) * new.mean((0, 1, 2, 3))
                running_mean.value = remember(running_mean.value, mean)
                running_var.value = remember(running_var.value, unbiased)
        else:
            mean, var = running_mean.value, running_var.value
        y = (x32 - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.reshape(x.shape).astype(x.dtype)


class PatchDiscriminator(nn.Module):
    """Scores patches of an image: images (B, H, W, 3) in [-1, 1] -> logits (B, h, w, 1), float32.

    With three layers h = H // 8 - 2, so H and W must be at least 24. Variables are `params` and `batch_stats`; pass
    `mutable=["batch_stats"]` with `train=True` to move the running statistics. Convolutions run in `dtype`.
    Source: Isola et al. 2017; taming-transformers' NLayerDiscriminator with its initialisation. Give real and fake
    images in separate calls: their batch statistics must not mix.
    """

    width: int = 64
    layers: int = 3
    dtype: jnp.dtype = jnp.float32
    groups: int = 1  # of each BatchNorm

    @nn.compact
    def __call__(self, x, train: bool = True):                                   # B H W 3
        smallest = 3 * 2**self.layers
        if min(x.shape[1:3]) < smallest:
            raise ValueError(
                f"PatchDiscriminator with layers={self.layers} needs images of at least {smallest} pixels a side and "
                f"got {x.shape[1]} x {x.shape[2]}; use larger images or scales, or fewer layers."
            )

        def conv(name, x, features, stride, bias):
            return nn.Conv(
                features, (KERNEL, KERNEL), (stride, stride), PADDING, use_bias=bias, dtype=self.dtype, name=name,
                kernel_init=nn.initializers.normal(0.02), bias_init=bias_init(KERNEL * KERNEL * x.shape[-1]),
            )(x)

        x = conv("conv_0", x.astype(self.dtype), self.width, 2, bias=True)       # B H/2 W/2 width
        x = nn.leaky_relu(x, 0.2)
        for i in range(1, self.layers + 1):
            stride = 2 if i < self.layers else 1
            x = conv(f"conv_{i}", x, self.width * min(2**i, 8), stride, bias=False)
            x = BatchNorm(name=f"norm_{i}", groups=self.groups)(x, train)
            x = nn.leaky_relu(x, 0.2)
        x = conv("conv_out", x, 1, 1, bias=True)                                 # B h w 1
        return x.astype(jnp.float32)
