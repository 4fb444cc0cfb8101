"""MaskGIT: a bidirectional transformer that predicts the tokens of an image from those that are not masked.

This is the network of the PyTorch reproduction (v1), which the EQ-VAE paper trains. The original one, of the MaskGIT
paper, is another network: `maskgit_original`. Parameters are float32; `dtype` is the type in which the blocks multiply
matrices, while the residual stream, layer norms, softmax and the logits stay float32.
Source: Besnier & Chen, "A Pytorch Reproduction of Masked Generative Image Transformer" (arXiv 2310.14400), v1.0 of
valeoai/Halton-MaskGIT; Chang et al., "MaskGIT" (arXiv 2202.04200).
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eqvae_jax.generators.dit import Output, attention_kernel

BLOCK_EPSILON = 1e-5   # of the layer norms in the blocks, torch's default
STACK_EPSILON = 1e-12  # of those before and after the blocks

# name -> depth, width, heads, width of the MLPs; 174, 342 and 510 million parameters for images of 256 pixels
SIZES = {"base": (24, 768, 16, 3072), "big": (32, 1024, 16, 3072), "huge": (48, 1024, 16, 3072)}

layer_norm = partial(nn.LayerNorm, use_fast_variance=False, dtype=jnp.float32)  # the fast variance cancels


class MaskGIT(nn.Module):
    """Logits of every token of an image, the mask among them; the defaults are the released model for 256 pixels.

    input_size: side of the square of tokens. codes: how many the tokenizer has; `codes` itself is the mask. classes:
    how many labels; `classes` itself means "no label". mlp_size: hidden width of the MLPs. dropout: of attention's
    probabilities, inside and after the MLPs, and in the stacks before and after the blocks; while training only.
    dtype: what the blocks compute in. remat: keep only the blocks' inputs for the backward pass. scan: one compiled
    block for all; its parameters are stacked under "blocks". attention: "xla", "cudnn", or "auto"
    (`dit.attention_kernel`); where dropout acts on the probabilities it is XLA's, whatever is asked for.
    """

    input_size: int = 16
    codes: int = 1024
    classes: int = 1000
    width: int = 768
    depth: int = 24
    heads: int = 16
    mlp_size: int = 3072
    dropout: float = 0.1
    dtype: Any = "float32"
    remat: bool = False
    scan: bool = False
    attention: str = "auto"

    @property
    def null(self):
        """The label that means none."""
        return self.classes

    @property
    def outputs(self):
        """K, how many logits a token has: the codes, and the mask."""
        return self.codes + 1

    @nn.compact
    def __call__(self, ids, labels, train=False) -> Output:
        """Logits (B, N, codes + 1) float32 as `prediction`, rows of tokens one after another.

        ids: int (B, h, w) or (B, N), 0..codes. labels: int (B,), 0..classes. train: dropout acts, with the rng
        "dropout". `hidden` are the blocks' outputs (B, N + 1, D), the label's token last. Raises ValueError where
        fields or shapes do not fit together.
        """
        check(self, ids, labels)
        tokens, width, rate = self.input_size**2, self.width, self.dropout if train else 0.0
        vocabulary = nn.Embed(self.codes + self.classes + 2, width, embedding_init=nn.initializers.normal(1.0),
                              name="tokens")
        places = self.param("positions", nn.initializers.normal(0.02), (tokens + 1, width))
        bias = self.param("bias", nn.initializers.zeros, (tokens + 1, vocabulary.num_embeddings))

        norm, drop = partial(layer_norm, epsilon=STACK_EPSILON), nn.Dropout(rate, deterministic=False)
        words = jnp.concatenate([ids.reshape(-1, tokens), labels[:, None] + self.codes + 1], axis=1)  # (B, N + 1)
        x = vocabulary(words) + places                                                           # (B, N + 1, D)
        x = linear(width, width, self.dtype, "first_1")(drop(norm(name="first_norm_1")(x)))
        x = norm(name="first_norm_2")(gelu(x).astype(jnp.float32))
        x = linear(width, width, self.dtype, "first_2")(drop(x)).astype(jnp.float32)

        x, hidden = stacked(Block, self, rate)(x)

        # The label's token and its logits have no target and no reader, so that they are not computed.
        x = linear(width, width, self.dtype, "last")(drop(norm(name="last_norm_1")(x[:, :tokens])))
        x = norm(name="last_norm_2")(gelu(x).astype(jnp.float32))
        logits = x @ vocabulary.embedding[:self.outputs].T + bias[:tokens, :self.outputs]        # (B, N, codes + 1)
        return Output(logits, hidden)


class Block(nn.Module):
    """Attention and MLP, each after a layer norm and added to the residual stream: x (B, T, D) -> (x, x).

    rate: of dropout, 0 where not training.
    """

    heads: int
    mlp_size: int
    rate: float
    dtype: Any
    attention: str

    @nn.compact
    def __call__(self, x):
        width, norm = x.shape[-1], partial(layer_norm, epsilon=BLOCK_EPSILON)
        drop = nn.Dropout(self.rate, deterministic=False)
        # Of torch's nn.MultiheadAttention: Xavier's bound of queries, keys and values together, and no biases.
        h = norm(name="attention_norm")(x).astype(self.dtype)
        h = nn.Dense(3 * width, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype, name="qkv")(h)
        h = attend(self, h, self.heads, self.rate, self.dtype, self.attention)
        h = nn.Dense(width, kernel_init=torch_kernel, dtype=self.dtype, name="proj")(h)
        x = x + h.astype(jnp.float32)

        h = linear(width, self.mlp_size, self.dtype, "fc1")(norm(name="mlp_norm")(x))
        h = linear(self.mlp_size, width, self.dtype, "fc2")(drop(gelu(h)))
        x = x + drop(h).astype(jnp.float32)
        return x, x


def attend(module, qkv, heads, rate, dtype, attention):
    """Attention between all tokens: queries, keys and values (B, T, 3 D) -> (B, T, D).

    module: whose rng "dropout" drops probabilities, at `rate`; 0 draws nothing.
    """
    batch, tokens, triple = qkv.shape
    qkv = qkv.reshape(batch, tokens, 3, heads, -1)
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]                          # (B, T, heads, D / heads)
    if rate:  # which jax.nn's function and cuDNN's kernel do not have
        h = nn.dot_product_attention(query, key, value, dropout_rng=module.make_rng("dropout"), dropout_rate=rate,
                                     broadcast_dropout=False, dtype=dtype, force_fp32_for_softmax=True)
    else:
        kernel = attention_kernel(dtype, query.shape[-1]) if attention == "auto" else attention
        h = jax.nn.dot_product_attention(query, key, value, implementation=kernel)
    return h.reshape(batch, tokens, triple // 3)


def stacked(block, model, rate):
    """x (B, T, D) -> (x, hidden) through the model's blocks; hidden is (depth, B, T, D), or a tuple without `scan`."""
    block = nn.remat(block, prevent_cse=not model.scan) if model.remat else block
    fields = (model.heads, model.mlp_size, rate, model.dtype, model.attention)
    if model.scan:
        return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True},
                       length=model.depth)(*fields, name="blocks")

    def one_by_one(x):
        hidden = ()
        for i in range(model.depth):
            x, _ = block(*fields, name=f"block_{i}")(x)
            hidden += (x,)
        return x, hidden

    return one_by_one


gelu = partial(nn.gelu, approximate=False)
torch_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within +- fan_in ** -0.5


def linear(inputs, features, dtype, name):
    """torch's nn.Linear, whose kernel and bias begin uniform within +- inputs ** -0.5."""
    bias = lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -inputs**-0.5, inputs**-0.5)
    return nn.Dense(features, kernel_init=torch_kernel, bias_init=bias, dtype=dtype, name=name)


def check(model, ids, labels):
    """Raises ValueError, naming the field, where a MaskGIT's fields or what it is given do not fit together."""
    if jnp.dtype(model.dtype) not in (jnp.float32, jnp.bfloat16):  # float16 needs a scaled loss, and fails on CPUs
        raise ValueError(f"MaskGIT: dtype is {model.dtype!r}; it must be 'float32' or 'bfloat16'.")
    if model.width % model.heads:
        raise ValueError(f"MaskGIT: a width of {model.width} does not divide into {model.heads} heads; change width "
                         "or heads.")
    if not 0 <= model.dropout < 1:
        raise ValueError(f"MaskGIT: dropout is {model.dropout}; it is a share, 0 or more and below 1.")
    grid = (model.input_size, model.input_size)
    if ids.shape[1:] not in (grid, (model.input_size**2,)) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"MaskGIT: this model takes integer ids (B, {grid[0]}, {grid[1]}) or (B, {grid[0]**2}), not "
                         f"{ids.dtype} {ids.shape}.")
    if labels.shape != ids.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"MaskGIT: {len(ids)} images need integer labels ({len(ids)},), not {labels.dtype} "
                         f"{labels.shape}.")


def preset(name, **fields):
    """The MaskGIT of a name: base, big or huge. fields: of MaskGIT, in place of the released ones.

    Raises ValueError, with the names there are, for any other.
    """
    if name not in SIZES:
        raise ValueError(f"there is no MaskGIT named {name!r}; the sizes are {', '.join(SIZES)}")
    depth, width, heads, mlp_size = SIZES[name]
    return MaskGIT(**dict(depth=depth, width=width, heads=heads, mlp_size=mlp_size) | fields)


def forward_macs(model):
    """Multiply-accumulates of one image's forward pass; a step of training takes 6 * forward_macs FLOPs an image."""
    width, images = model.width, model.input_size**2
    tokens = images + 1
    block = ((4 * width**2 + 2 * width * model.mlp_size) * tokens  # projections and MLP
             + 2 * tokens**2 * width)                             # attention
    stacks = 2 * width**2 * tokens + width**2 * images            # before and after the blocks
    return model.depth * block + stacks + images * width * model.outputs
