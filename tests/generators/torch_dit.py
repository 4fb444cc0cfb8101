"""DiT in torch, written for these tests, with the names of the public files; what ours is compared with and timed
against.

`SiT` is the same network as willisma/SiT ships it: of a head with twice the channels it keeps the first half. Fields
are named as ours. The initialisation is torch's own; tests fill every parameter with `randomise`.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(h.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, width, heads, mlp_ratio, qk_norm):
        super().__init__()
        self.attn, self.mlp = Attention(width, heads, qk_norm), Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(modulated(x, shift_msa, scale_msa))
        return x + gate_mlp[:, None] * self.mlp(modulated(x, shift_mlp, scale_mlp))


class PatchEmbed(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedding(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        rates = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angles = t[:, None].float() * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedding(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels):
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    def __init__(self, width, features):
        super().__init__()
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated(x, shift, scale))


def position_table(width, grid):
    """Entry by entry, from the facts: sine first, the column in the first half of the features."""
    table = np.zeros((grid * grid, width))
    for token, k in np.ndindex(grid * grid, width // 4):
        row, column = divmod(token, grid)
        for half, place in enumerate((column, row)):
            angle = place / 10000 ** (k / (width / 4))
            table[token, half * width // 2 + k] = math.sin(angle)
            table[token, half * width // 2 + width // 4 + k] = math.cos(angle)
    return torch.tensor(table, dtype=torch.float32)[None]


class DiT(nn.Module):
    def __init__(self, input_size=32, patch_size=2, in_channels=4, out_channels=8, width=1152, depth=28, heads=16,
                 mlp_ratio=4.0, classes=1000, qk_norm=False):
        super().__init__()
        self.patch_size, self.out_channels = patch_size, out_channels
        self.x_embedder = PatchEmbed(in_channels, width, patch_size)
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder = LabelEmbedding(classes, width)
        self.pos_embed = nn.Parameter(position_table(width, input_size // patch_size), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads, mlp_ratio, qk_norm) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch_size**2 * out_channels)

    def forward(self, x, t, labels):
        """x: (B, C, h, w), t: (B,), labels: (B,) -> (B, C_out, h, w), and the blocks' outputs beside it."""
        grid, patch = x.shape[-1] // self.patch_size, self.patch_size
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(labels)
        hidden = []
        for block in self.blocks:
            x = block(x, c)
            hidden.append(x)
        x = self.final_layer(x, c).reshape(len(x), grid, grid, patch, patch, self.out_channels)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(len(x), self.out_channels, grid * patch, grid * patch), hidden


class SiT(DiT):
    def forward(self, x, t, labels):
        y, hidden = super().forward(x, t, labels)
        return y.chunk(2, dim=1)[0], hidden


def randomise(model, seed=0):
    """Fills every trained parameter, those that begin as zeros too, so that no part of the network can hide.

    Matrices keep the size of what they multiply: softmax is far from uniform, and rounding errors do not grow.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                scale = 1.0 if "embedding_table" in name else scale
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
                if "norm.weight" in name:
                    parameter.add_(1)
    return model.eval()
