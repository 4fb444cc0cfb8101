"""LPIPS v0.1 on VGG16: a distance between images that agrees with human judgements. Frozen, and always float32.

Source: Zhang et al. 2018 (arXiv 1801.03924); the layout of torchvision's VGG16. Weights: `weights.load_lpips`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

# Width of each convolution, stage by stage. The features are the outputs of each stage's last ReLU, before pooling.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# ImageNet's mean and standard deviation, moved from [0, 1] to [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
SMALLEST = 16                # four poolings leave one pixel


class VGG16(nn.Module):
    """Convolutional trunk: images (B, H, W, 3), normalised -> features after relu1_2, 2_2, 3_3, 4_3 and 5_3."""

    @nn.compact
    def __call__(self, x):                                                       # B H W 3
        features = []
        for i, widths in enumerate(STAGES, 1):
            for j, width in enumerate(widths, 1):
                x = nn.relu(nn.Conv(width, (3, 3), padding=1, dtype=jnp.float32, name=f"conv{i}_{j}")(x))
            features.append(x)                                                   # B H/2^(i-1) W/2^(i-1) C
            if i < len(STAGES):
                x = nn.max_pool(x, (2, 2), (2, 2))
        return features


class LPIPS(nn.Module):
    """Distance of image pairs: x, y (B, H, W, 3) in [-1, 1], at least 16 pixels a side -> (B,), float32."""

    @nn.compact
    def __call__(self, x, y):
        if min(x.shape[1:3]) < SMALLEST:
            raise ValueError(
                f"LPIPS needs images of at least {SMALLEST} pixels a side and got {x.shape[1]} x {x.shape[2]}; "
                "use larger images or scales, or set the perceptual weight to 0."
            )
        trunk = VGG16(name="vgg")
        # Two passes and not one on both: a loss needs the gradient of y alone, which halves the backward pass.
        features_x, features_y = trunk(normalise(x)), trunk(normalise(y))
        distance = jnp.zeros(x.shape[0], jnp.float32)
        for i, (f, g) in enumerate(zip(features_x, features_y, strict=True)):
            weight = self.param(f"lin{i}", nn.initializers.ones, (f.shape[-1],), jnp.float32)
            difference = jnp.square(unit_length(f) - unit_length(g))             # B h w C
            distance += (difference @ weight).mean((1, 2))                       # B
        return distance


def lpips(params, x, y):
    """LPIPS of each pair: params from `weights.load_lpips`; x, y (B, H, W, 3) in [-1, 1] -> (B,), float32.

    Images are not resized and not clipped. Dropout, which the reference's heads apply if left in training mode, is off.
    """
    return LPIPS().apply({"params": params}, x, y)


def normalise(x):
    return (x.astype(jnp.float32) - jnp.array(SHIFT)) / jnp.array(SCALE)


def unit_length(f):
    """f / (|f| + 1e-10) over channels, with gradient 0 instead of NaN where f is 0 everywhere."""
    squared = jnp.square(f).sum(-1, keepdims=True)                               # B h w 1
    dead = squared == 0
    # The inner where keeps sqrt away from 0, whose infinite slope would come through the outer one as NaN.
    inverse = 1.0 / (jnp.sqrt(jnp.where(dead, 1.0, squared)) + 1e-10)
    return f * jnp.where(dead, 0.0, inverse)


def parameter_shapes():
    """Tree of the parameters' shapes: what a file of weights must fill."""
    image = jax.ShapeDtypeStruct((1, 2 * SMALLEST, 2 * SMALLEST, 3), jnp.float32)
    return jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"]
