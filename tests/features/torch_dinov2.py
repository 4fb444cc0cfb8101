"""DINOv2 in torch, written for these tests, with the names of Meta's files and the way Meta's code fits positions; and
timm's way, which REPA takes.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, width // 64, 64).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / 8).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))


class Block(nn.Module):
    def __init__(self, width, mlp):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width), mlp
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)

    def forward(self, x):
        x = x + self.ls1.gamma * self.attn(self.norm1(x))
        return x + self.ls2.gamma * self.mlp(self.norm2(x))


class DINOv2(nn.Module):
    """Takes the tensors of a file strictly."""

    def __init__(self, tensors):
        super().__init__()
        width, swiglu = tensors["cls_token"].shape[-1], "blocks.0.mlp.w3.weight" in tensors
        hidden = tensors[f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight"].shape[1]
        for name in ("cls_token", "pos_embed", "mask_token", "register_tokens"):
            self.register_parameter(name, nn.Parameter(torch.empty(tensors[name].shape)) if name in tensors else None)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 14, 14)
        depth = sum(name.endswith("ls1.gamma") for name in tensors)
        self.blocks = nn.Sequential(*(Block(width, (SwiGLU if swiglu else Mlp)(width, hidden)) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})

    @torch.no_grad()
    def forward(self, x):
        """(B, 3, H, W) -> (B, tokens, D)."""
        height, width = x.shape[2] // 14, x.shape[3] // 14
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions(height, width)
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        return self.norm(self.blocks(x))

    def positions(self, height, width):
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if height == width == side:
            return self.pos_embed
        if self.register_tokens is not None:             # interpolate_antialias=True, interpolate_offset=0.0
            how = dict(size=(height, width), antialias=True)
        else:
            how = dict(scale_factor=((height + 0.1) / side, (width + 0.1) / side))
        return resampled(self.pos_embed, **how)


def resampled(table, **how):
    """A table of positions (1, 1 + n n, D) interpolated behind its first token."""
    side = round((table.shape[1] - 1) ** 0.5)
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, mode="bicubic", **how)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def timm_resampled(table, side):
    """timm.layers.resample_abs_pos_embed(table, [side, side]) with its defaults."""
    return resampled(table, size=(side, side), antialias=True)
