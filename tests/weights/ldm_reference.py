"""Latent-diffusion's and taming's autoencoders and discriminator in torch, under the names their checkpoints have.

Transcribed for the tests: what each module computes and is called, with nothing that training needs.
"""

import torch
from torch import nn
from torch.nn import functional


def normalise(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def convolution(features_in, features_out, size=3, **options):
    return nn.Conv2d(features_in, features_out, size, padding=size // 2, **options)


class Resnet(nn.Module):
    def __init__(self, features_in, features_out):
        super().__init__()
        self.norm1, self.conv1 = normalise(features_in), convolution(features_in, features_out)
        self.norm2, self.conv2 = normalise(features_out), convolution(features_out, features_out)
        if features_in != features_out:
            self.nin_shortcut = convolution(features_in, features_out, 1)

    def forward(self, x):
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = normalise(channels)
        self.q, self.k, self.v, self.proj_out = (convolution(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        query, key, value = (project(h).flatten(2) for project in (self.q, self.k, self.v))         # B C N
        logits = torch.einsum("bci,bcj->bij", query, key) * x.shape[1] ** -0.5                      # B N N
        h = torch.einsum("bij,bcj->bci", logits.softmax(-1), value)
        return x + self.proj_out(h.reshape(x.shape))


class Resample(nn.Module):
    def __init__(self, channels, up):
        super().__init__()
        self.up = up
        self.conv = convolution(channels, channels) if up else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        if self.up:
            return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(functional.pad(x, (0, 1, 0, 1)))                 # right and bottom only


class Middle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.block_1, self.block_2 = Resnet(channels, channels), Resnet(channels, channels)
        self.attn_1 = Attention(channels)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


def level(widths, attends, resample=None, up=False):
    """One resolution: residual blocks, attention after each where it attends, and a change of resolution."""
    module = nn.Module()
    module.block = nn.ModuleList([Resnet(a, b) for a, b in zip(widths, widths[1:], strict=False)])
    module.attn = nn.ModuleList([Attention(b) for b in widths[1:]] if attends else [])
    if resample:
        setattr(module, resample, Resample(widths[-1], up))
    return module


def through(module, x):
    for j, block in enumerate(module.block):
        x = block(x)
        x = module.attn[j](x) if len(module.attn) else x
    return x


class Encoder(nn.Module):
    def __init__(self, widths, blocks, attention, out):
        super().__init__()
        self.conv_in = convolution(3, widths[0])
        self.down = nn.ModuleList([
            level([below, *[width] * blocks], i in attention, "downsample" if i + 1 < len(widths) else None)
            for i, (below, width) in enumerate(zip([widths[0], *widths], widths, strict=False))])
        self.mid, self.norm_out = Middle(widths[-1]), normalise(widths[-1])
        self.conv_out = convolution(widths[-1], out)

    def forward(self, x):
        x = self.conv_in(x)
        for module in self.down:
            x = through(module, x)
            x = module.downsample(x) if hasattr(module, "downsample") else x
        return self.conv_out(functional.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, widths, blocks, attention, channels):
        super().__init__()
        above = [*widths[1:], widths[-1]]                                 # the width that comes in from below
        self.conv_in, self.mid = convolution(channels, widths[-1]), Middle(widths[-1])
        self.up = nn.ModuleList([
            level([above[i], *[width] * (blocks + 1)], i in attention, "upsample" if i else None, up=True)
            for i, width in enumerate(widths)])
        self.norm_out, self.conv_out = normalise(widths[0]), convolution(widths[0], 3)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for module in reversed(self.up):
            x = through(module, x)
            x = module.upsample(x) if hasattr(module, "upsample") else x
        return self.conv_out(functional.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """KL, or VQ where `codes` says how many."""

    def __init__(self, widths, blocks, attention=(), channels=4, codes=None, quant=True):
        super().__init__()
        moments = channels if codes else 2 * channels
        self.encoder = Encoder(widths, blocks, attention, moments)
        self.decoder = Decoder(widths, blocks, attention, channels)
        if codes:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(codes, channels)
        if quant:
            self.quant_conv, self.post_quant_conv = convolution(moments, moments, 1), convolution(channels, channels, 1)
        self.codes = codes

    @torch.no_grad()
    def outputs(self, x):
        """The latent (mean and log-variance, or features) and the image it decodes to; NCHW."""
        h = self.quant_conv(self.encoder(x)) if hasattr(self, "quant_conv") else self.encoder(x)
        latent = [h] if self.codes else list(h.chunk(2, 1))
        z = latent[0]
        if self.codes:
            table = self.quantize.embedding.weight                        # K C
            distances = (z[:, None] - table[None, :, :, None, None]).square().sum(2)                # B K h w
            z = table[distances.argmin(1)].permute(0, 3, 1, 2)
        return *latent, self.decoder(self.post_quant_conv(z) if hasattr(self, "post_quant_conv") else z)


def discriminator(width, layers):
    """taming's NLayerDiscriminator: a module whose `main` is the sequence."""
    widths = [3, *(width * min(2**i, 8) for i in range(layers + 1))]
    sequence = []
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        sequence.append(nn.Conv2d(a, b, 4, stride=2 if i < layers else 1, padding=1, bias=i == 0))
        sequence.extend([nn.BatchNorm2d(b)] * (i > 0))
        sequence.append(nn.LeakyReLU(0.2))
    module = nn.Module()
    module.main = nn.Sequential(*sequence, nn.Conv2d(widths[-1], 1, 4, padding=1))
    return module


def perturbed(module, seed=0):
    """The same module with every parameter moved away from its fresh value: normalisations begin as 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval()
