"""The transformer of DiT and SiT: patches of a latent, conditioned on time and class by adaLN-Zero.

NHWC throughout. Parameters are float32; `dtype` is the type in which the blocks multiply matrices, while the residual
stream, layer norms, softmax, time, modulation and the last layer stay float32, as they do under torch's autocast.
Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", facebookresearch/DiT models.py; willisma/SiT.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

FREQUENCIES = 128   # of time; twice as many features
EPSILON = 1e-6      # of the layer norms in DiT's own code
HEAD_EPSILON = 1e-5  # of those inside attention, which is timm's and has torch's default

# name -> depth, width, heads
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

# Xavier's bound of a matrix as a whole: queries, keys and values together, and patches as (p p C, D), as in DiT.
dense = partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
zero_dense = partial(nn.Dense, kernel_init=nn.initializers.zeros, dtype=jnp.float32)
layer_norm = partial(nn.LayerNorm, epsilon=EPSILON, use_scale=False, use_bias=False, use_fast_variance=False,
                     dtype=jnp.float32)  # the fast variance, E[x^2] - E[x]^2, cancels


class Output(NamedTuple):
    """prediction: (B, h, w, C_out), float32. hidden: what each block returns, (B, N, D) float32; one (depth, B, N, D)
    array where the model has `scan`, a tuple of depth arrays otherwise.
    """

    prediction: jax.Array
    hidden: Any


class DiT(nn.Module):
    """Predicts noise, velocity or score from a noisy latent; the defaults are DiT-XL/2 for images of 256 pixels.

    input_size: h and w of the latent. in_channels, out_channels: C of what comes in and goes out (DiT predicts noise
    and variance, 8; SiT velocity, 4). mlp_ratio: hidden width of the MLPs over `width`. classes: how many labels; one
    more, `classes` itself, means "no label". reversed_time: the network was trained on 1 - t, as the public SiT was.
    qk_norm: layer norms on queries and keys. dtype: what the blocks compute in. remat: keep only the blocks' inputs
    for the backward pass. scan: one compiled block for all; its parameters are stacked under "blocks".
    attention: "xla", "cudnn", or "auto" (`attention_kernel`).
    """

    input_size: int = 32
    in_channels: int = 4
    out_channels: int = 8
    patch_size: int = 2
    width: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    classes: int = 1000
    reversed_time: bool = False
    qk_norm: bool = False
    dtype: Any = "float32"
    remat: bool = False
    scan: bool = False
    attention: str = "auto"

    @property
    def null(self):
        """The label that means none."""
        return self.classes

    @nn.compact
    def __call__(self, x, t, labels) -> Output:
        """x: (B, h, w, C). t: (B,), in [0, 1] with 0 for data, or DiT's steps 0..999. labels: int (B,), 0..classes.

        Labels are dropped outside (`drop_labels`). Raises ValueError where fields or shapes do not fit together.
        """
        self._check(x, t, labels)
        batch, grid, patch = len(x), self.input_size // self.patch_size, self.patch_size
        x = x.astype(jnp.float32).reshape(batch, grid, patch, grid, patch, self.in_channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch * grid**2, -1)  # (B N, p p C): row, column, channel of a patch
        x = dense(self.width, name="patch")(x).reshape(batch, grid**2, self.width)  # (B, N, D)
        x = x + positions(self.width, grid)

        t = 1 - t if self.reversed_time else t
        narrow = nn.initializers.normal(0.02)
        time = nn.Dense(self.width, kernel_init=narrow, name="time_in")(time_features(t))  # (B, D)
        time = nn.Dense(self.width, kernel_init=narrow, name="time_out")(nn.silu(time))
        label = nn.Embed(self.classes + 1, self.width, embedding_init=narrow, name="labels")(labels)
        c = nn.silu(time + label)                              # every layer that sees it begins with this SiLU

        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        block = partial(block, self.heads, self.mlp_ratio, self.qk_norm, self.dtype, self.attention)
        if self.scan:
            blocks = nn.scan(block.func, variable_axes={"params": 0}, split_rngs={"params": True},
                             in_axes=nn.broadcast, length=self.depth)
            x, hidden = blocks(*block.args, name="blocks")(x, c)
        else:
            hidden = ()
            for i in range(self.depth):
                x, _ = block(name=f"block_{i}")(x, c)
                hidden += (x,)

        shift, scale = jnp.split(zero_dense(2 * self.width, name="final_modulation")(c)[:, None], 2, axis=-1)
        x = (layer_norm()(x) * (1 + scale) + shift).reshape(batch * grid**2, self.width)
        x = zero_dense(patch**2 * self.out_channels, name="final")(x)
        x = x.reshape(batch, grid, grid, patch, patch, self.out_channels).transpose(0, 1, 3, 2, 4, 5)
        return Output(x.reshape(batch, self.input_size, self.input_size, self.out_channels), hidden)

    def _check(self, x, t, labels):
        if jnp.dtype(self.dtype) not in (jnp.float32, jnp.bfloat16):  # float16 needs a scaled loss, and fails on CPUs
            raise ValueError(f"DiT: dtype is {self.dtype!r}; it must be 'float32' or 'bfloat16'.")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"DiT: a width of {self.width} does not divide into {self.heads} heads, or by 4 for the "
                             "positions; change width or heads.")
        if self.input_size % self.patch_size:
            raise ValueError(f"DiT: latents of {self.input_size} x {self.input_size} do not divide into patches of "
                             f"{self.patch_size}; change input_size or patch_size.")
        expected = (self.input_size, self.input_size, self.in_channels)
        if x.ndim != 4 or x.shape[1:] != expected:
            raise ValueError(f"DiT: this model takes latents (B, {', '.join(map(str, expected))}), not {x.shape}.")
        if t.shape != x.shape[:1] or labels.shape != x.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(f"DiT: {len(x)} latents need times ({len(x)},) and integer labels ({len(x)},), not "
                             f"{t.shape} and {labels.dtype} {labels.shape}.")


class Block(nn.Module):
    """Attention and MLP, each modulated by c and gated into the residual stream: x (B, N, D), c (B, D) -> (x, x)."""

    heads: int
    mlp_ratio: float
    qk_norm: bool
    dtype: Any
    attention: str

    @nn.compact
    def __call__(self, x, c):
        batch, tokens, width = x.shape
        layer = partial(dense, dtype=self.dtype)
        modulation = jnp.split(zero_dense(6 * width, name="modulation")(c)[:, None], 6, axis=-1)  # six of (B, 1, D)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation

        # Tokens of all examples in one matrix: on CPUs XLA is twice as slow with the kernels' gradients otherwise.
        h = (layer_norm()(x) * (1 + scale) + shift).astype(self.dtype).reshape(batch * tokens, width)
        h = layer(3 * width, name="qkv")(h).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = h[:, :, 0], h[:, :, 1], h[:, :, 2]                            # (B, N, heads, D / heads)
        if self.qk_norm:
            norm = partial(nn.LayerNorm, epsilon=HEAD_EPSILON, use_fast_variance=False, dtype=jnp.float32)
            query = norm(name="query_norm")(query).astype(self.dtype)
            key = norm(name="key_norm")(key).astype(self.dtype)
        kernel = attention_kernel(self.dtype, query.shape[-1]) if self.attention == "auto" else self.attention
        h = jax.nn.dot_product_attention(query, key, value, implementation=kernel).reshape(batch * tokens, width)
        x = x + gate * layer(width, name="proj")(h).reshape(x.shape)

        h = (layer_norm()(x) * (1 + mlp_scale) + mlp_shift).astype(self.dtype).reshape(batch * tokens, width)
        h = nn.gelu(layer(round(width * self.mlp_ratio), name="fc1")(h), approximate=True)          # (B N, 4 D)
        x = x + mlp_gate * layer(width, name="fc2")(h).reshape(x.shape)
        return x, x


def attention_kernel(dtype, head_size):
    """"cudnn" where its fused kernel can be used, else "xla"; both keep softmax in float32.

    jax.nn.dot_product_attention takes "xla" wherever it is not told (jax 0.10), so the choice is made here. cuDNN's
    kernel takes 16-bit types and heads of at most 128 in multiples of 8, on NVIDIA GPUs since Ampere.
    """
    if jax.default_backend() != "gpu" or jnp.dtype(dtype).itemsize != 2 or head_size % 8 or head_size > 128:
        return "xla"
    major = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")[0]  # AMD's is no number
    return "cudnn" if major.isdigit() and int(major) >= 8 else "xla"


def time_rates():
    """The 128 frequencies of `time_features`, from 1 down to 1e-4, float32.

    Rounded as torch's: a frequency one step away turns the angle of DiT's last step, 999, by 6e-5.
    """
    exponents = np.float32(-np.log(10000)) * np.arange(FREQUENCIES, dtype=np.float32) / np.float32(FREQUENCIES)
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


def time_features(t):
    """Cosines, then sines, of (B,) times at 128 frequencies: (B, 256) float32.

    DiT's steps reach 999, where a time in bfloat16 would be off by several radians, so t is made float32 first.
    """
    angles = t.astype(jnp.float32)[:, None] * time_rates()
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def positions(width, grid):
    """Fixed sines, then cosines, of a token's column, and after them of its row: (grid * grid, width) float32."""
    quarter = width // 4
    angles = np.arange(grid)[:, None] * 10000.0 ** -(np.arange(quarter) / quarter)                # (grid, D/4)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)                              # (grid, D/2)
    columns, rows = np.tile(axis, (grid, 1)), np.repeat(axis, grid, axis=0)                       # (N, D/2)
    return np.concatenate([columns, rows], axis=-1).astype(np.float32)


def drop_labels(keys, labels, rate, classes):
    """Labels (B,) of which each is replaced by `classes`, "no label", with probability `rate`.

    keys: one key, or (B,) of them, one for each example, where the result must not depend on the batch.
    """
    draw = jax.random.uniform(keys, labels.shape) if keys.ndim == 0 else jax.vmap(jax.random.uniform)(keys)
    return jnp.where(draw < rate, classes, labels)


def preset(name, **fields):
    """The DiT of a name such as "XL/2", its size and patch size. fields: of DiT, in place of the published ones.

    Raises ValueError, with the names there are, for any other.
    """
    size, _, patch = name.partition("/")
    if size not in SIZES or not patch.isdecimal() or int(patch) < 1:
        raise ValueError(f"there is no DiT named {name!r}; a name is one of the sizes {', '.join(SIZES)}, a slash and "
                         "the patch size (published: 2, 4, 8), such as B/2")
    depth, width, heads = SIZES[size]
    return DiT(**dict(depth=depth, width=width, heads=heads, patch_size=int(patch)) | fields)


def forward_macs(model):
    """Multiply-accumulates of one image's forward pass: what the DiT paper calls flops. Real ones are twice as many.

    A step of training takes three forward passes' worth, so 6 * forward_macs FLOPs an image.
    """
    width, tokens = model.width, (model.input_size // model.patch_size) ** 2
    block = ((4 + 2 * model.mlp_ratio) * width**2 * tokens  # projections and MLP
             + 2 * tokens**2 * width                        # attention
             + 6 * width**2)                                # modulation
    patches = tokens * width * model.patch_size**2 * (model.in_channels + model.out_channels)
    conditioning = 2 * FREQUENCIES * width + width**2 + 2 * width**2
    return int(model.depth * block + patches + conditioning)
