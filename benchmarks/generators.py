"""DiT's training and sampling steps against a plain DiT in PyTorch, in one run, turn by turn.

    python benchmarks/generators.py                                    # S/2 and B/2 on CPUs, float32
    python benchmarks/generators.py --models S/2 --batch=8 --rounds=10
    python benchmarks/generators.py --models XL/2 --batch=64 --dtype=bfloat16 --compile --peak_tflops=989   # an H100

A training step: mean squared error of the predicted noise, gradients, AdamW. A sampling step: one evaluation of the
network and an Euler update, without gradients. Both sides start from the same shapes, compute in the same dtype (torch
by autocast, ours with float32 residuals as autocast has them) on the same device; torch uses its fused attention, and
with --compile, torch.compile. Minima over rounds that alternate between the programs. A ratio above 1 says how many
times longer torch takes. MFU counts 2 FLOPs a multiply-accumulate and three forward passes a training step, whatever
--remat adds. Needs the [test] extra; for GPUs, builds of jax and torch that find them.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with torch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from eqvae_jax.generators.dit import forward_macs, preset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "generators"))
import torch_dit  # noqa: E402

CHANNELS, CLASSES = 4, 1000


def our_programs(model, batch):
    """{"train", "sample"} -> a function that takes one step and waits for it."""
    x, t, labels, noise = (jax.device_put(array) for array in batch)
    variables = jax.jit(model.init)(jax.random.key(0), x, t, labels)
    optimizer = optax.adamw(1e-4, weight_decay=0.0)

    def loss(variables):
        return jnp.mean((model.apply(variables, x, t, labels).prediction - noise) ** 2)

    def train(state):
        variables, moments = state
        value, gradients = jax.value_and_grad(loss)(variables)
        updates, moments = optimizer.update(gradients, moments, variables)
        return (optax.apply_updates(variables, updates), moments), value

    train = jax.jit(train, donate_argnums=0)
    sample = jax.jit(lambda variables, x: x - 0.004 * model.apply(variables, x, t, labels).prediction)
    state = variables, jax.jit(optimizer.init)(variables)

    def take_step():
        nonlocal state
        state, value = train(state)
        return float(value)

    return {"train": take_step, "sample": lambda: jax.block_until_ready(sample(state[0], x))}


def torch_programs(model, batch, device, compiled):
    """The same of the transcription in torch."""
    network = torch_dit.DiT(model.input_size, model.patch_size, CHANNELS, CHANNELS, model.width, model.depth,
                            model.heads, classes=CLASSES).to(device)
    forward = torch.compile(network) if compiled else network
    fused = {"fused": True} if device == "cuda" else {}
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 1e-4, weight_decay=0.0, **fused)
    x, t, labels, noise = (torch.from_numpy(array).to(device) for array in batch)
    x, noise = (array.permute(0, 3, 1, 2).contiguous() for array in (x, noise))
    labels, half = labels.long(), torch.autocast(device, torch.bfloat16, enabled=model.dtype == "bfloat16")

    def train():
        optimizer.zero_grad(set_to_none=True)
        with half:
            y, _ = forward(x, t, labels)
        loss = torch.mean((y.float() - noise) ** 2)
        loss.backward()
        optimizer.step()
        return float(loss.detach())                      # waits for the device

    def sample():
        with torch.no_grad(), half:
            y = x - 0.004 * forward(x, t, labels)[0]
        return float(y[0, 0, 0, 0])

    return {"train": train, "sample": sample}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["S/2", "B/2"], help="sizes such as S/2 or XL/2")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--input_size", type=int, default=32, help="latents: 32 for images of 256 pixels")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--remat", action="store_true", help="ours only: recompute blocks in the backward pass")
    parser.add_argument("--scan", action="store_true", help="ours only: one compiled block for all")
    parser.add_argument("--compile", action="store_true", help="torch.compile for torch")
    parser.add_argument("--peak_tflops", type=float, help="of the device in this dtype, for MFU; an H100 has 989")
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = True          # as JAX does by itself
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("JAX found a GPU and torch did not; install a build of torch for it, or set JAX_PLATFORMS=cpu")

    print(f"batch {arguments.batch}, {arguments.dtype}, {jax.devices()[0].device_kind}, {threads} threads; "
          f"jax {jax.__version__}, torch {torch.__version__}{', compiled' if arguments.compile else ''}; "
          f"minimum of {arguments.rounds} rounds")
    for name in arguments.models:
        model = preset(name, input_size=arguments.input_size, in_channels=CHANNELS, out_channels=CHANNELS,
                       classes=CLASSES, dtype=arguments.dtype, remat=arguments.remat, scan=arguments.scan)
        rng = np.random.default_rng(0)
        shape = (arguments.batch, arguments.input_size, arguments.input_size, CHANNELS)
        x, noise = rng.normal(size=(2, *shape)).astype(np.float32)
        t = rng.uniform(size=arguments.batch).astype(np.float32)
        batch = x, t, rng.integers(0, CLASSES, arguments.batch, dtype=np.int32), noise
        report(name, model, arguments, time_all({
            "ours": our_programs(model, batch),
            "torch": torch_programs(model, batch, device, arguments.compile),
        }, arguments.rounds))


def time_all(sides, rounds):
    """(side, step) -> best seconds, after one round that compiles."""
    seconds = {(side, step): [] for step in ("train", "sample") for side in sides}
    for counted in [False] + [True] * rounds:
        for (side, step), values in seconds.items():
            begun = time.perf_counter()
            sides[side][step]()
            if counted:
                values.append(time.perf_counter() - begun)
    return {key: min(values) for key, values in seconds.items()}


def report(name, model, arguments, best):
    print(f"\n{'DiT-' + name:10}{'step':8}{'seconds':>10}{'images/s':>10}{'TFLOP/s':>10}{'MFU':>8}{'torch / ours':>14}")
    for (side, step), value in best.items():
        flops = 2 * forward_macs(model) * (3 if step == "train" else 1) * arguments.batch / value
        share = f"{flops / arguments.peak_tflops / 1e12:.1%}" if arguments.peak_tflops else "-"
        ratio = f"{best['torch', step] / value:14.2f}" if side == "ours" else ""
        print(f"{side:10}{step:8}{value:10.3f}{arguments.batch / value:10.2f}{flops / 1e12:10.3f}{share:>8}{ratio}")


if __name__ == "__main__":
    main()
