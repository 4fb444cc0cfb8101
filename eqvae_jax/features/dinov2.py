"""DINOv2: the vision transformers whose patch tokens REPA aligns a generator with. Frozen, NHWC.

ViT-S, B, L and g with patches of 14 pixels, with and without registers. Parameters are float32; `dtype` is the type in
which the blocks multiply matrices, while patches, residual stream, layer norms and softmax stay float32, as they do
under torch's autocast. Sources: Oquab et al. 2023 (arXiv 2304.07193); Darcet et al. 2023 (arXiv 2309.16588) for
registers; facebookresearch/dinov2 models/vision_transformer.py; sihyun-yu/REPA train.py and utils.py for its input.
Weights: `weights.load_dinov2`.
"""

import functools
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PATCH = 14                   # pixels a side
HEAD = 64                    # channels of an attention head, in every published model
EPSILON = 1e-6               # of the layer norms
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                         # ImageNet's, of values in [0, 1]

# name -> depth, width, hidden width of the MLP. g's MLP is a SwiGLU, of 2/3 of the usual four times the width.
SIZES = {"S": (12, 384, 1536), "B": (12, 768, 3072), "L": (24, 1024, 4096), "g": (40, 1536, 4096)}


class Resampling(NamedTuple):
    """How a table of positions is fitted to a grid, bicubically. offset: tokens added to the grid's side before the
    table's side is divided by it, which shrinks the step between samples.
    """

    antialias: bool
    offset: float = 0.0


# Who fits -> how, without and with registers. Meta's own code keeps a workaround of DINO's for rounding, the offset,
# in the models without registers; transformers' Dinov2Model drops it, so that its features are others, except at 518 x
# 518 pixels. timm's, which REPA takes whatever the model, is that of the models with registers.
POSITIONS = {
    "dinov2": (Resampling(antialias=False, offset=0.1), Resampling(antialias=True)),
    "transformers": (Resampling(antialias=False), Resampling(antialias=True)),
    "repa": (Resampling(antialias=True), Resampling(antialias=True)),
}

layer_norm = partial(nn.LayerNorm, epsilon=EPSILON, use_fast_variance=False, dtype=jnp.float32)


class Tokens(NamedTuple):
    """What the last layer norm returns, float32: cls (B, D), registers (B, R, D), patches (B, N, D) row by row."""

    cls: jax.Array
    registers: jax.Array
    patches: jax.Array


class DINOv2(nn.Module):
    """x (B, H, W, 3), normalised with ImageNet's mean and deviation -> Tokens; the defaults are ViT-B/14.

    depth, width: of the transformer; heads have 64 channels. hidden: width inside the MLPs. swiglu: these are gated
    with SiLU, not GELU. registers: tokens between the first and the patches'. grid: side of the learnt table of
    positions, in patches. positions: how that table is fitted to another grid, a name in POSITIONS. dtype: what the
    blocks compute in, "float32" or "bfloat16". attention: "xla" or "cudnn", the kernel that jax's attention calls.
    """

    width: int = 768
    depth: int = 12
    hidden: int = 3072
    swiglu: bool = False
    registers: int = 0
    grid: int = 37
    positions: str = "dinov2"
    dtype: Any = "float32"
    attention: str = "xla"

    @nn.compact
    def __call__(self, x) -> Tokens:
        """Raises ValueError where fields do not fit together, or H or W is no multiple of 14."""
        self._check(x)
        batch, height, width = x.shape[0], x.shape[1] // PATCH, x.shape[2] // PATCH
        narrow = nn.initializers.truncated_normal(0.02)
        x = nn.Conv(self.width, (PATCH, PATCH), PATCH, "VALID", name="patch")(x.astype(jnp.float32))      # B h w D
        first = self.param("cls_token", narrow, (1, 1, self.width))
        table = self.param("pos_embed", narrow, (1, 1 + self.grid**2, self.width))
        resampling = POSITIONS[self.positions][self.registers > 0]
        x = x.reshape(batch, -1, self.width) + fit_positions(table[:, 1:], (height, width), resampling)   # B N D
        tokens = [first + table[:, :1]]                                          # registers have no position
        if self.registers:
            tokens.append(self.param("register_tokens", narrow, (1, self.registers, self.width)))
        x = jnp.concatenate([*(jnp.broadcast_to(t, (batch, *t.shape[1:])) for t in tokens), x], axis=1)   # B 1+R+N D

        for i in range(self.depth):
            x = Block(self.hidden, self.swiglu, self.dtype, self.attention, name=f"block_{i}")(x)
        x = layer_norm(name="norm")(x)
        return Tokens(x[:, 0], x[:, 1:1 + self.registers], x[:, 1 + self.registers:])

    def _check(self, x):
        if jnp.dtype(self.dtype) not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"DINOv2: dtype is {self.dtype!r}; it must be 'float32' or 'bfloat16'.")
        if self.width % HEAD:
            raise ValueError(f"DINOv2: a width of {self.width} does not divide into heads of {HEAD} channels.")
        check_protocol(self.positions)
        if x.ndim != 4 or x.shape[-1] != 3 or 0 in x.shape[1:] or x.shape[1] % PATCH or x.shape[2] % PATCH:
            raise ValueError(f"DINOv2: images are (B, H, W, 3) with H and W multiples of {PATCH}, not {x.shape}; "
                             "resize or crop them first.")


class Block(nn.Module):
    """Attention and MLP, each scaled by channel into the residual stream: (B, N, D) -> (B, N, D)."""

    hidden: int
    swiglu: bool
    dtype: Any
    attention: str

    @nn.compact
    def __call__(self, x):
        batch, tokens, width = x.shape
        layer = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.truncated_normal(0.02))
        layer_scale = lambda name: self.param(name, nn.initializers.ones, (width,))

        # Tokens of all examples in one matrix, as in DiT: XLA's kernels for CPUs are faster so.
        h = layer_norm(name="norm1")(x).astype(self.dtype).reshape(batch * tokens, width)
        h = layer(3 * width, name="qkv")(h).reshape(batch, tokens, 3, width // HEAD, HEAD)
        h = jax.nn.dot_product_attention(h[:, :, 0], h[:, :, 1], h[:, :, 2], implementation=self.attention)
        h = layer(width, name="proj")(h.reshape(batch * tokens, width))
        x = x + layer_scale("scale1") * h.reshape(x.shape)

        h = layer_norm(name="norm2")(x).astype(self.dtype).reshape(batch * tokens, width)
        if self.swiglu:
            gate, up = jnp.split(layer(2 * self.hidden, name="w12")(h), 2, axis=-1)
            h = layer(width, name="w3")(nn.silu(gate) * up)
        else:
            h = layer(width, name="fc2")(nn.gelu(layer(self.hidden, name="fc1")(h), approximate=False))
        return x + layer_scale("scale2") * h.reshape(x.shape)


def check_protocol(positions):
    """Raises ValueError for a name that is not in POSITIONS."""
    if positions not in POSITIONS:
        raise ValueError(f"DINOv2: there is no way to fit positions called {positions!r}; there are "
                         f"{', '.join(POSITIONS)}")


def fit_positions(table, size, resampling):
    """The patches' positions (1, n n, D) on another grid of size (height, width): (1, height * width, D), float32.

    At the table's own size they are returned as they are, whatever the offset, as in every reference.
    """
    side = round(table.shape[1] ** 0.5)
    if tuple(size) == (side, side):
        return table
    rows, columns = (bicubic_matrix(side, n, resampling.antialias, side / (n + resampling.offset)) for n in size)
    table = table.reshape(side, side, -1)                                        # n n D
    return resample(table[None], rows, columns).reshape(1, -1, table.shape[-1])


def resample(x, rows, columns):
    """x (B, H, W, C) by matrices (h, H) and (w, W) -> (B, h, w, C), float32.

    HIGHEST: in the default precision of TPUs, bfloat16, pixels would be off by a level of 255.
    """
    x = jnp.einsum("hi,biwc->bhwc", rows, x.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return jnp.einsum("wj,bhjc->bhwc", columns, x, precision=lax.Precision.HIGHEST)


@functools.lru_cache(maxsize=64)
def bicubic_matrix(size, out, antialias=False, step=None):
    """Matrix (out, size), float32, that resamples an axis as torch's bicubic `interpolate` does, corners not aligned.

    antialias: the kernel widens where the axis shrinks, has Keys' a = -0.5 and is cut off at the edge; otherwise
    a = -0.75 and the edge is repeated. step: between two samples, in input pixels; size / out unless it is told, as
    torch takes 1 / scale_factor where it is given one.
    """
    step = size / out if step is None else step
    # Rounded as torch's float32 does with a fused multiply-add: where 512 pixels become 448, exact centres would put
    # normalised values of noise 3e-4 from torch's, and these 2e-6. All else is in float64.
    centres = (np.float64(np.float32(step)) * (np.arange(out) + 0.5) - 0.5).astype(np.float32)
    centres = centres[:, None].astype(np.float64)                                # (out, 1)
    if antialias:
        matrix = cubic((np.arange(size) - centres) / max(step, 1.0), -0.5)
        return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)
    taps = np.floor(centres) + np.arange(-1, 3)                                  # (out, 4)
    matrix = np.zeros((out, size))
    np.add.at(matrix, (np.arange(out)[:, None], taps.astype(int).clip(0, size - 1)), cubic(taps - centres, -0.75))
    return matrix.astype(np.float32)


def cubic(x, a):
    """Keys' kernel of cubic convolution at distances x, with slope `a` at distance 1."""
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x**2 + 1, a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def repa_preprocess(images, side=None):
    """The network's input as REPA makes it: uint8 images (B, S, S, 3) -> (B, side, side, 3), float32.

    In this order: /255, ImageNet's mean and deviation, bicubic without antialiasing; nothing is clipped. side: a
    multiple of 14; by default REPA's own 224 * (S // 256), for images whose side is a multiple of 256.
    Raises ValueError for other images and sides.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"DINOv2's input is made of uint8 images of shape (B, S, S, 3), not {images.dtype} "
                         f"{images.shape}")
    size = images.shape[1]
    if images.shape[2] != size:
        raise ValueError(f"REPA's images are square, and these are {size} x {images.shape[2]}; crop them first")
    if side is None:
        if size % 256:
            raise ValueError(f"REPA resizes images of 256 and 512 pixels to 224 and 448; for images of {size} say "
                             f"which side to resize to: side={PATCH} * GRID, for GRID x GRID patches")
        side = 224 * (size // 256)
    if side < PATCH or side % PATCH:
        raise ValueError(f"a side of {side} pixels does not divide into patches of {PATCH}; take side={PATCH} * GRID, "
                         "for GRID x GRID patches")
    x = (jnp.asarray(images) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)                      # B S S 3
    return x if side == size else resample(x, bicubic_matrix(size, side), bicubic_matrix(size, side))


@partial(jax.jit, static_argnames=("model", "side"))
def repa_features(model, params, images, side=None):
    """What REPA aligns with: uint8 images (B, S, S, 3) -> patch tokens after the last norm, (B, N, D) float32.

    model, params: of `weights.load_dinov2`; positions are fitted as timm does, whatever model.positions says. N is
    (side / 14)^2, row by row: 256 for images of 256 pixels. side: see `repa_preprocess`, whose ValueErrors this raises.
    """
    return model.clone(positions="repa").apply({"params": params}, repa_preprocess(images, side)).patches


def preset(name, **fields):
    """The published DINOv2 of a size: "S", "B", "L" or "g". fields: in place of the published ones, as registers=4.

    Raises ValueError, with the names there are, for any other.
    """
    if name not in SIZES:
        raise ValueError(f"there is no DINOv2 of size {name!r}; there are {', '.join(SIZES)}")
    depth, width, hidden = SIZES[name]
    return DINOv2(**dict(depth=depth, width=width, hidden=hidden, swiglu=name == "g") | fields)


@functools.cache                                         # tracing takes most of a second
def parameter_shapes(model):
    """Tree of the parameters' shapes, without computing anything; not to be changed by the caller."""
    x = jax.ShapeDtypeStruct((1, PATCH, PATCH, 3), jnp.float32)
    shapes = jax.eval_shape(model.clone(depth=1).init, jax.random.key(0), x)["params"]
    block = shapes.pop("block_0")
    return shapes | {f"block_{i}": block for i in range(model.depth)}
