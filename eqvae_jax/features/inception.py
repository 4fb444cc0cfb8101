"""The Inception network of FID: TensorFlow's graph of 2015 (1008 classes), which is not torchvision's. Frozen, float32.

Average pooling divides by the pixels it covers, Mixed_7c pools by maximum, and batch norms are part of the
convolutions: `weights.load_inception` folds them in. Sources: Szegedy et al. 2015 (arXiv 1512.00567); pytorch-fid
0.3.0 and torch-fidelity 0.4.0, whose names are kept; evaluations/evaluator.py of openai/guided-diffusion (ADM).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SIDE = 299                   # pixels of the network's input
CLASSES = 1008
SPATIAL_CHANNELS = 7         # of the 192 that leave Mixed_6d's first branch: what ADM's sFID compares, at 17 x 17


class Conv(NamedTuple):
    """A convolution with ReLU: the channels that leave it, the height and width of its kernel, stride, padding."""

    channels: int
    height: int = 1
    width: int = 1
    stride: int = 1
    padding: str = "SAME"


class Fork(NamedTuple):
    """Two convolutions side by side, at the end of a branch."""

    a: Conv
    b: Conv


class Block(NamedTuple):
    """Branches side by side, then the pooled one; their outputs are joined in this order.

    branches: name -> convolutions one after another. pool: "average" or "maximum". pooled: channels of the convolution
    after the pooling; 0 for none, and then the block halves the sides, so that the pooling has stride 2, no padding.
    """

    branches: tuple
    pool: str
    pooled: int


def half(channels):
    return Conv(channels, 3, 3, stride=2, padding="VALID")


def block_35(pooled):
    """The kind that works at 35 x 35 pixels, torchvision's InceptionA."""
    return Block((
        ("branch1x1", (Conv(64),)),
        ("branch5x5", (Conv(48), Conv(64, 5, 5))),
        ("branch3x3dbl", (Conv(64), Conv(96, 3, 3), Conv(96, 3, 3))),
    ), "average", pooled)


def block_17(c):
    """The kind that works at 17 x 17 pixels, InceptionC."""
    return Block((
        ("branch1x1", (Conv(192),)),
        ("branch7x7", (Conv(c), Conv(c, 1, 7), Conv(192, 7, 1))),
        ("branch7x7dbl", (Conv(c), Conv(c, 7, 1), Conv(c, 1, 7), Conv(c, 7, 1), Conv(192, 1, 7))),
    ), "average", 192)


def block_8(pool):
    """The kind that works at 8 x 8 pixels, InceptionE."""
    return Block((
        ("branch1x1", (Conv(320),)),
        ("branch3x3", (Conv(384), Fork(Conv(384, 1, 3), Conv(384, 3, 1)))),
        ("branch3x3dbl", (Conv(448), Conv(384, 3, 3), Fork(Conv(384, 1, 3), Conv(384, 3, 1)))),
    ), pool, 192)


POOL = "pool"                                                                    # 3 x 3 maximum, stride 2
LAYERS = {
    "Conv2d_1a_3x3": Conv(32, 3, 3, 2, "VALID"),                                 # 149 x 149 x 32
    "Conv2d_2a_3x3": Conv(32, 3, 3, 1, "VALID"),                                 # 147 x 147 x 32
    "Conv2d_2b_3x3": Conv(64, 3, 3),                                             # 147 x 147 x 64
    "pool1": POOL,                                                               #  73 x  73 x 64
    "Conv2d_3b_1x1": Conv(80),                                                   #  73 x  73 x 80
    "Conv2d_4a_3x3": Conv(192, 3, 3, 1, "VALID"),                                #  71 x  71 x 192
    "pool2": POOL,                                                               #  35 x  35 x 192
    "Mixed_5b": block_35(32),                                                    #  35 x  35 x 256
    "Mixed_5c": block_35(64),                                                    #  35 x  35 x 288
    "Mixed_5d": block_35(64),                                                    #  35 x  35 x 288
    "Mixed_6a": Block((
        ("branch3x3", (half(384),)),
        ("branch3x3dbl", (Conv(64), Conv(96, 3, 3), half(96))),
    ), "maximum", 0),                                                            #  17 x  17 x 768
    "Mixed_6b": block_17(128),                                                   #  17 x  17 x 768
    "Mixed_6c": block_17(160),                                                   #  17 x  17 x 768
    "Mixed_6d": block_17(160),                                                   #  17 x  17 x 768
    "Mixed_6e": block_17(192),                                                   #  17 x  17 x 768
    "Mixed_7a": Block((
        ("branch3x3", (Conv(192), half(320))),
        ("branch7x7x3", (Conv(192), Conv(192, 1, 7), Conv(192, 7, 1), half(192))),
    ), "maximum", 0),                                                            #   8 x   8 x 1280
    "Mixed_7b": block_8("average"),                                              #   8 x   8 x 2048
    "Mixed_7c": block_8("maximum"),                                              #   8 x   8 x 2048
}


class InceptionFeatures(NamedTuple):
    """What metrics read of B images, float32.

    pool: (B, 2048), TensorFlow's pool_3. spatial: (B, 2023), 17 x 17 x 7 flattened in this order. logits: (B, 1008),
    without the bias, as the Inception Score takes them in ADM and torch-fidelity.
    """

    pool: jax.Array
    spatial: jax.Array
    logits: jax.Array


class Mixed(nn.Module):
    """One block of branches: (B, h, w, C) -> (B, h', w', C')."""

    block: Block

    @nn.compact
    def __call__(self, x):
        outputs = []
        for branch, steps in self.block.branches:
            y = [x]
            for i, step in enumerate(steps, 1):
                name = f"{branch}_{i}" if len(steps) > 1 else branch
                ends = ((step.a, f"{name}a"), (step.b, f"{name}b")) if isinstance(step, Fork) else ((step, name),)
                y = [nn.relu(convolution(conv, name)(y[0])) for conv, name in ends]
            outputs += y
        if self.block.pool == "average":
            # A 1 x 1 convolution and its bias commute with averaging; convolving first leaves fewer channels to pool.
            y = nn.relu(average_pool(convolution(Conv(self.block.pooled), "branch_pool")(x)))
        elif self.block.pooled:
            y = nn.relu(convolution(Conv(self.block.pooled), "branch_pool")(maximum_pool(x, 1, padding=1)))
        else:
            y = maximum_pool(x, 2)
        return jnp.concatenate([*outputs, y], -1)


class Inception(nn.Module):
    """x (B, 299, 299, 3) as `preprocess` gives it -> InceptionFeatures."""

    @nn.compact
    def __call__(self, x):
        for name, layer in LAYERS.items():
            if layer is POOL:
                x = maximum_pool(x, 2)
            elif isinstance(layer, Conv):
                x = nn.relu(convolution(layer, name)(x))
            else:
                x = Mixed(layer, name=name)(x)
            if name == "Mixed_6d":
                spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)          # B 2023
        pool = x.mean((1, 2))                                                    # B 2048
        logits = nn.Dense(CLASSES, use_bias=False, precision=lax.Precision.HIGHEST, name="fc")(pool)
        return InceptionFeatures(pool, spatial, logits)


def convolution(conv, name):
    """The convolution and its bias, without the ReLU.

    HIGHEST: otherwise TPUs multiply in bfloat16 and GPUs in TF32, and features would depend on the device.
    """
    return nn.Conv(conv.channels, (conv.height, conv.width), conv.stride, conv.padding, dtype=jnp.float32,
                   precision=lax.Precision.HIGHEST, name=name)


def windows(x, axis, stride=1):
    """The first, the second and the third pixel of every window of three along an axis."""
    count = (x.shape[axis] - 3) // stride + 1
    return [lax.slice_in_dim(x, i, i + (count - 1) * stride + 1, stride, axis) for i in range(3)]


def maximum_pool(x, stride, padding=0):
    """Maximum over 3 x 3 pixels. Along one axis after the other: on CPUs 5 times faster than XLA's reduce_window."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=-jnp.inf)
    for axis in (1, 2):
        x = functools.reduce(jnp.maximum, windows(x, axis, stride))
    return x


def average_pool(x):
    """Average over those of 3 x 3 pixels that lie inside: TensorFlow's "SAME" padding is not counted."""
    for axis in (1, 2):
        inside = np.full(x.shape[axis], 3, np.float32)
        inside[[0, -1]] -= 1
        padding = [(1, 1) if i == axis else (0, 0) for i in range(4)]
        x = sum(windows(jnp.pad(x, padding), axis)) / np.expand_dims(inside, tuple({0, 1, 2, 3} - {axis}))
    return x


def legacy_positions(size):
    """Where TensorFlow 1 samples `size` pixels for the input's: no offset of half a pixel, corners not aligned."""
    return np.arange(SIDE, dtype=np.float32) * np.float32(size / SIDE)


def centred_positions(size):
    """Where torch's `interpolate(mode="bilinear", align_corners=False)` samples: pixels' centres on pixels' centres."""
    half_pixel = np.float32(0.5)
    return np.maximum((np.arange(SIDE, dtype=np.float32) + half_pixel) * np.float32(size / SIDE) - half_pixel, 0)


class Protocol(NamedTuple):
    """How images become the network's input: sampled at `positions`, then (value - shift) / scale. No antialiasing."""

    positions: Callable
    shift: float
    scale: float


# ADM's graph resizes by itself, and torch-fidelity follows it. pytorch-fid's README puts its FIDs 0.08 from these.
PROTOCOLS = {
    "adm": Protocol(legacy_positions, 128.0, 128.0),
    "torch-fidelity": Protocol(legacy_positions, 128.0, 128.0),
    "pytorch-fid": Protocol(centred_positions, 127.5, 127.5),
}


def preprocess(images, protocol):
    """uint8 images (B, H, W, 3) -> the network's input (B, 299, 299, 3), float32; protocol: a name in PROTOCOLS.

    Raises ValueError for other images, and for a protocol that is not known.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"no protocol of Inception's input is called {protocol!r}; there are {', '.join(PROTOCOLS)}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"Inception takes uint8 images of shape (B, H, W, 3), and got {images.dtype} {images.shape}; "
                         "metrics compare 8-bit images, so round to [0, 255] first")
    positions, shift, scale = PROTOCOLS[protocol]
    x = jnp.asarray(images)                                                      # B H W 3
    for axis in (2, 1):                              # torch-fidelity's order; gathering is exact on every device
        at = positions(x.shape[axis])
        low = at.astype(np.int32)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        fraction = np.expand_dims(at - low, tuple({0, 1, 2, 3} - {axis}))
        a, b = (jnp.take(x, i, axis).astype(jnp.float32) for i in (low, high))
        x = a + (b - a) * fraction
    return (x - shift) / scale


@functools.partial(jax.jit, static_argnames="protocol")
def inception_features(params, images, protocol="adm"):
    """InceptionFeatures of uint8 images (B, H, W, 3), of any size; params from `weights.load_inception`.

    protocol: "adm" or "torch-fidelity" (both resize as TensorFlow 1 does), or "pytorch-fid". Compiles once for each
    batch, size and protocol. Raises ValueError as `preprocess`.
    """
    return Inception().apply({"params": params}, preprocess(images, protocol))


def parameter_shapes():
    """Tree of the parameters' shapes."""
    x = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    return jax.eval_shape(Inception().init, jax.random.key(0), x)["params"]
