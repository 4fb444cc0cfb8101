"""The network of the MaskGIT paper, for its public weights; the reproduction's, which is trained here, is `maskgit`.

The two share little but their size: this one normalises after adding (as BERT does), takes the label first, has no
label for "none" and so no guidance, and its logits do not have the mask among them. Its vocabulary is the codes, the
labels, and in the last row the mask, which the released code calls -1 and which an embedding finds there by wrapping.
Source: Chang et al., "MaskGIT" (arXiv 2202.04200), google-research/maskgit, nets/maskgit_transformer.py.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eqvae_jax.generators.dit import Output
from eqvae_jax.generators.maskgit import STACK_EPSILON, MaskGIT, attend, check, layer_norm, stacked


def narrow(key, shape, dtype=jnp.float32):
    """Normal within two standard deviations, times 0.02; what is cut off is not made up for."""
    return 0.02 * jax.random.truncated_normal(key, -2, 2, shape, dtype)


dense = partial(nn.Dense, kernel_init=narrow)
norm = partial(layer_norm, epsilon=STACK_EPSILON)
gelu = partial(nn.gelu, approximate=True)


class OriginalMaskGIT(MaskGIT):
    """Logits of every token of an image; fields as `maskgit.MaskGIT`'s, and the defaults are the released model's too.

    dropout: of the embeddings, of attention's probabilities and output, and of the MLPs' output.
    """

    @property
    def null(self):
        """None: there is no label that means none."""
        return None

    @property
    def outputs(self):
        """K, how many logits a token has: the codes."""
        return self.codes

    @nn.compact
    def __call__(self, ids, labels, train=False) -> Output:
        """Logits (B, N, codes) float32 as `prediction`, rows of tokens one after another.

        ids: int (B, h, w) or (B, N), 0..codes, where `codes` is the mask. labels: int (B,), 0..classes - 1. train:
        dropout acts, with the rng "dropout". `hidden` are the blocks' outputs (B, N + 1, D), the label's token first.
        Raises ValueError where fields or shapes do not fit together.
        """
        check(self, ids, labels)
        tokens, rate = self.input_size**2, self.dropout if train else 0.0
        vocabulary = nn.Embed(self.codes + self.classes + 1, self.width, embedding_init=narrow, name="tokens")
        places = self.param("positions", narrow, (tokens + 1, self.width))
        bias = self.param("bias", nn.initializers.zeros, (vocabulary.num_embeddings,))

        ids = ids.reshape(-1, tokens)
        words = jnp.where(ids == self.codes, self.codes + self.classes, ids)
        words = jnp.concatenate([labels[:, None] + self.codes, words], axis=1)               # (B, N + 1)
        x = norm(name="first_norm")(vocabulary(words) + places)                              # (B, N + 1, D)
        x = nn.Dropout(rate, deterministic=False)(x)
        x, hidden = stacked(Block, self, rate)(x)
        x = dense(self.width, dtype=self.dtype, name="last")(x[:, 1:])
        x = norm(name="last_norm")(gelu(x).astype(jnp.float32))
        logits = x @ vocabulary.embedding[:self.codes].T + bias[:self.codes]                 # (B, N, codes)
        return Output(logits, hidden)


class Block(nn.Module):
    """Attention and MLP, each added to what it was given and then normalised: x (B, T, D) -> (x, x)."""

    heads: int
    mlp_size: int
    rate: float
    dtype: Any
    attention: str

    @nn.compact
    def __call__(self, x):
        layer, drop = partial(dense, dtype=self.dtype), nn.Dropout(self.rate, deterministic=False)
        h = layer(3 * x.shape[-1], name="qkv")(x)
        h = layer(x.shape[-1], name="proj")(attend(self, h, self.heads, self.rate, self.dtype, self.attention))
        x = norm(name="attention_norm")(x + drop(h).astype(jnp.float32))
        h = gelu(layer(self.mlp_size, name="fc1")(x))
        h = layer(x.shape[-1], name="fc2")(h)
        x = norm(name="mlp_norm")(x + drop(h).astype(jnp.float32))
        return x, x
