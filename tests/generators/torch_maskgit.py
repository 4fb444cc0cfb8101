"""Both MaskGITs in torch, written for these tests, with the names of the public files; what ours are compared with.

`MaskGIT` is the reproduction's network; its initialisation is torch's own. `original` is the MaskGIT paper's, as a
function of the tree that its file holds. Fields are named as ours.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class PreNorm(nn.Module):
    def __init__(self, width, fn):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn

    def forward(self, x):
        return self.fn(self.norm(x))


class Attention(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.mha = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


class FeedForward(nn.Module):
    def __init__(self, width, hidden, dropout):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width),
                                 nn.Dropout(dropout))

    def forward(self, x):
        return self.net(x)


class Transformer(nn.Module):
    def __init__(self, width, depth, heads, hidden, dropout):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([PreNorm(width, Attention(width, heads, dropout)),
                                                    PreNorm(width, FeedForward(width, hidden, dropout))])
                                     for _ in range(depth)])

    def forward(self, x):
        hidden = []
        for attention, mlp in self.layers:
            x = x + attention(x)
            x = x + mlp(x)
            hidden.append(x)
        return x, hidden


class MaskGIT(nn.Module):
    def __init__(self, input_size=16, codes=1024, classes=1000, width=768, depth=24, heads=16, mlp_size=3072,
                 dropout=0.1):
        super().__init__()
        self.codes, tokens, vocabulary = codes, input_size**2, codes + 1 + classes + 1
        self.tok_emb = nn.Embedding(vocabulary, width)
        self.pos_emb = nn.Parameter(0.02 * torch.randn(1, tokens + 1, width))
        norm = lambda: nn.LayerNorm(width, eps=1e-12)
        self.first_layer = nn.Sequential(norm(), nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(), norm(),
                                         nn.Dropout(dropout), nn.Linear(width, width))
        self.transformer = Transformer(width, depth, heads, mlp_size, dropout)
        self.last_layer = nn.Sequential(norm(), nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(), norm())
        self.bias = nn.Parameter(torch.zeros(tokens + 1, vocabulary))

    def forward(self, ids, labels):
        """ids: (B, h, w), labels: (B,) -> logits (B, N, codes + 1), and the blocks' outputs beside them."""
        words = torch.cat([ids.flatten(1), labels[:, None] + self.codes + 1], dim=1)
        x, hidden = self.transformer(self.first_layer(self.tok_emb(words) + self.pos_emb))
        logits = self.last_layer(x) @ self.tok_emb.weight.T + self.bias
        return logits[:, :-1, :self.codes + 1], hidden


def randomise(model, seed=0):
    """Fills every parameter, those that begin as zeros too, so that no part of the network can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            scale = 1.0 if name in ("tok_emb.weight", "pos_emb", "bias") else scale
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


def original_tree(rng, *, input_size=16, codes=1024, classes=1000, width=768, depth=24, heads=16, mlp_size=3072):
    """What the original's file holds under "params", nowhere zero: nested names and float32 arrays."""
    draw = lambda scale, *shape: (scale * rng.normal(size=shape)).astype(np.float32)
    norm = lambda: {"scale": 1 + draw(0.3, width), "bias": draw(0.3, width)}
    dense = lambda i, o: {"kernel": draw(i**-0.5, i, o), "bias": draw(0.3, o)}
    head = lambda: {"kernel": draw(width**-0.5, width, heads, width // heads), "bias": draw(0.3, heads, width // heads)}
    vocabulary = codes + classes + 1
    tree = {
        "Embed_0": {"word_embeddings": {"embedding": draw(1, vocabulary, width)},
                    "position_embeddings": {"embedding": draw(1, input_size**2 + 1, width)}, "embeddings_ln": norm()},
        "MlmLayer_0": {"mlm_dense": dense(width, width), "mlm_ln": norm(), "mlm_bias": {"bias": draw(1, vocabulary)}},
    }
    for i in range(depth):
        out = {"kernel": draw(width**-0.5, heads, width // heads, width), "bias": draw(0.3, width)}
        tree[f"TransformerLayer_{i}"] = {
            "Attention_0": {"self_attention": {"query": head(), "key": head(), "value": head(), "out": out},
                            "attention_output_ln": norm()},
            "Mlp_0": {"intermediate_output": dense(width, mlp_size), "layer_output": dense(mlp_size, width),
                      "layer_output_ln": norm()},
        }
    return tree


def original(tree, ids, labels, codes):
    """Logits (B, N, codes) of ids (B, N), where -1 is the mask, and labels (B,); a list of the blocks' outputs."""
    if isinstance(next(iter(tree["MlmLayer_0"]["mlm_ln"].values())), np.ndarray):
        tree = as_tensors(tree)
    norm = lambda x, ln: F.layer_norm(x, x.shape[-1:], ln["scale"], ln["bias"], eps=1e-12)
    dense = lambda x, layer: x @ layer["kernel"] + layer["bias"]
    project = lambda x, layer: torch.einsum("btd,dhe->bhte", x, layer["kernel"]) + layer["bias"][None, :, None]
    words = tree["Embed_0"]["word_embeddings"]["embedding"]
    sequence = torch.cat([labels[:, None] + codes, ids], dim=1)
    x = words[sequence] + tree["Embed_0"]["position_embeddings"]["embedding"]    # -1 is the last row here too
    x, hidden = norm(x, tree["Embed_0"]["embeddings_ln"]), []
    for i in range(sum(name.startswith("TransformerLayer_") for name in tree)):
        layer = tree[f"TransformerLayer_{i}"]
        attention, mlp = layer["Attention_0"]["self_attention"], layer["Mlp_0"]
        q, k, v = (project(x, attention[name]) for name in ("query", "key", "value"))
        h = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1]**0.5, dim=-1) @ v
        h = torch.einsum("bhte,hed->btd", h, attention["out"]["kernel"]) + attention["out"]["bias"]
        x = norm(h + x, layer["Attention_0"]["attention_output_ln"])
        h = F.gelu(dense(x, mlp["intermediate_output"]), approximate="tanh")
        x = norm(dense(h, mlp["layer_output"]) + x, mlp["layer_output_ln"])
        hidden.append(x)
    last = tree["MlmLayer_0"]
    x = norm(F.gelu(dense(x, last["mlm_dense"]), approximate="tanh"), last["mlm_ln"])
    logits = x @ words.T + last["mlm_bias"]["bias"]
    return logits[:, 1:, :codes], hidden


def as_tensors(tree):
    return {name: as_tensors(value) if isinstance(value, dict) else torch.tensor(value) for name, value in tree.items()}
