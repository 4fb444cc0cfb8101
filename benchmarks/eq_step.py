"""The EQ step against a plain SD-VAE step in PyTorch, in one run, turn by turn; and its cost against the size of tau.

    python benchmarks/eq_step.py --channels=32 --image_size=64 --batch=4
    python benchmarks/eq_step.py --channels=128 --image_size=256 --batch=1 --rounds=3

Both sides do the same work in float32 on all cores: forward, L1 + KL, backward to every parameter; no discriminator,
no LPIPS, no optimizer. The torch side is diffusers' AutoencoderKL with the same widths, in both memory layouts; the
faster one counts. Minima over rounds that alternate between the programs, since these machines are noisy.
A ratio above 1 says how many times longer torch takes. Needs the [test] extra.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
import torch

from eqvae_jax.autoencoders.kl import AutoencoderKL
from eqvae_jax.autoencoders.objective import eq_gradients
from eqvae_jax.equivariance import Tau
from eqvae_jax.weights.autoencoders import random_parameters
from eqvae_jax.weights.tables import parameter_shapes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "configs"))
from conftest import declare_nms  # noqa: E402  diffusers imports torchvision, which a CPU build of torch breaks
from eq_sdvae import quickstart  # noqa: E402


def our_step(model, batch):
    """Returns a function of tau that computes gradients and waits for them."""
    config = quickstart()
    config.loss.update(perceptual_weight=0.0, disc_weight=0.0)
    gradients, key = eq_gradients(config, model), jax.random.key(0)
    params = {"autoencoder": jax.device_put(random_parameters(parameter_shapes(model), 0))}

    return lambda tau: jax.block_until_ready(gradients(params, {}, None, batch, tau, key, 0)[0])


def torch_step(model, image, channels_last):
    """The same step by diffusers: a function that leaves gradients in every parameter."""
    declare_nms(torch)
    from diffusers import AutoencoderKL as Reference

    widths = [model.channels * m for m in model.multipliers]
    reference = Reference(block_out_channels=widths, layers_per_block=model.blocks_per_level,
                          latent_channels=model.latent_channels, norm_num_groups=model.groups,
                          down_block_types=["DownEncoderBlock2D"] * len(widths),
                          up_block_types=["UpDecoderBlock2D"] * len(widths))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    reference = reference.to(memory_format=layout)
    x = torch.from_numpy(image).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=layout)

    def step():
        reference.zero_grad(set_to_none=True)
        posterior = reference.encode(x).latent_dist
        y = reference.decode(posterior.sample()).sample
        (((x - y).abs().sum() + 1e-6 * posterior.kl().sum()) / len(x)).backward()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=32, help="width of the first level; SD-VAE has 128")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count())

    model = AutoencoderKL(channels=arguments.channels)
    side = arguments.image_size // model.downsampling
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (arguments.batch, arguments.image_size, arguments.image_size, 3), dtype=np.uint8)
    batch = jax.device_put({"image": image, "index": np.arange(arguments.batch, dtype=np.int32)})
    sizes = [side * k // 8 for k in (2, 4, 6) if side * k // 8 >= 1]
    taus = {"full size": Tau("none")}
    taus |= {f"latent {k} of {side}": Tau("latent", k, k, 1) for k in sizes}
    taus |= {f"image {k} of {side}": Tau("image", k, k) for k in sizes}
    ours = our_step(model, batch)
    programs = {name: (lambda tau=tau: ours(tau)) for name, tau in taus.items()}
    programs["torch"] = torch_step(model, image, channels_last=False)
    programs["torch, channels last"] = torch_step(model, image, channels_last=True)

    seconds = {name: [] for name in programs}
    for counted in [False] + [True] * arguments.rounds:  # the first round compiles
        for name, program in programs.items():
            begun = time.perf_counter()
            program()
            if counted:
                seconds[name].append(time.perf_counter() - begun)
    best = {name: min(values) for name, values in seconds.items()}
    reference = min(best["torch"], best["torch, channels last"])
    print(f"AutoencoderKL, {arguments.channels} channels, {arguments.image_size}^2, batch {arguments.batch}, float32, "
          f"{os.cpu_count()} threads; jax {jax.__version__}, torch {torch.__version__}; "
          f"minimum of {arguments.rounds} rounds")
    print(f"{'program':24}{'seconds':>10}{'of full size':>14}{'torch / ours':>14}")
    # The released mix of branches: 3/8 plain steps, 1/2 with tau on the latent, 1/8 with the image shrunk first.
    latents = [best[name] for name in best if name.startswith("latent")]
    images = [best[name] for name in best if name.startswith("image")]
    best["EQ step, on average"] = 0.375 * best["full size"] + 0.5 * np.mean(latents) + 0.125 * np.mean(images)
    for name, value in best.items():
        print(f"{name:24}{value:10.3f}{value / best['full size']:14.2f}{reference / value:14.2f}")


if __name__ == "__main__":
    main()
