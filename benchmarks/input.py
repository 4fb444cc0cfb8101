"""The input pipeline alone against torch's DataLoader with PIL on the same JPEGs, in one run, turn by turn.

It ends with the cores that accelerators need for it:

    python benchmarks/input.py
    python benchmarks/input.py --sizes 500x375 --rounds=10 --json=input.json
    python benchmarks/input.py --machine "mine=4 chips,197 TFLOP/s,40 %,96 vCPUs"

Every JPEG is a crop of one of the photographs `photos`, enlarged or shrunk, with sensor noise, so that the files are
about as large as those of OpenImages (1024x768) or ImageNet (500x375). Both sides cut a random square of half to the
whole of the short side, resize it to --image_size and mirror half of them. Ours reads the folder, by threads and by one
process a core, and ArrayRecord shards of short side 512 made of the same folder (eqvae_jax.data.preparation); it
decodes a JPEG at half size where the crop still has pixels enough, and keeps 8 bits, which the device scales. Torch
opens with PIL, crops, resizes (bilinear, antialiased), and scales to float32 in [-1, 1], as torchvision's resized_crop,
to_tensor and normalize do, one worker a core. Then MNIST-format files of 28 pixels, and a cache of posteriors of
32x32x4, read from its files and from memory.

Each side has a process of its own, is warmed up, and counts whole batches. Images of a core-second are images over
processor seconds (user and system, of the side's process and all its workers, from /proc: Linux only), which other
programs on the machine disturb less than they do the clock; a core is what the system calls one, on most machines a
hyperthread. Ratios are of neighbouring turns: median, least and greatest over the rounds.

The rate that an accelerator asks for is an estimate that no accelerator has confirmed: chips x peak FLOP/s x assumed
share of it / FLOPs of an image, with 2025 GFLOP for the SD-VAE EQ step (the released mix of branches) and 713 for
DiT-XL/2, forward and backward. vCPUs of hosts: cloud.google.com/tpu/docs/v5e and v6e (VM types), and Compute Engine's
a3-highgpu-8g, of which one GPU has an eighth. Needs the [test] extra.
"""

import argparse
import contextlib
import io
import json
import math
import os
import platform
import re
import statistics
import struct
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the pipeline needs no device, and a TPU admits one process
import numpy as np
from PIL import Image
from tqdm import tqdm

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
MACHINES = ["v5e-8=8 chips,197 TFLOP/s,45 %,224 vCPUs", "v5e-16=16 chips,197 TFLOP/s,45 %,448 vCPUs",
            "v6e-8=8 chips,918 TFLOP/s,30 %,180 vCPUs", "H100=1 chip,989 TFLOP/s,35 %,26 vCPUs",
            "8 x H100=8 chips,989 TFLOP/s,35 %,208 vCPUs"]
LATENT = 32, 32, 4
TICKS = os.sysconf("SC_CLK_TCK")  # of a second: the unit of /proc


def write_jpegs(directory, width, height, quality, count, noise):
    """Mean bytes of `count` photographs of that size, made of the installed ones; the same on every call."""
    from eqvae_jax.data.sources import open_source

    source, total = open_source("photos:all"), 0
    directory.mkdir()
    for i in range(count):
        rng = np.random.default_rng((width, height, i))
        photo = Image.fromarray(source[i % len(source)]["image"])
        scale = min(photo.width / width, photo.height / height) * rng.uniform(0.7, 1)
        left, top = rng.random(2) * (photo.width - width * scale, photo.height - height * scale)
        box = left, top, left + width * scale, top + height * scale
        pixels = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, box)).astype(np.float32)
        pixels = np.clip(pixels + noise * rng.standard_normal(pixels.shape, np.float32), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path := directory / f"{i:05d}.jpg", quality=quality)
        total += path.stat().st_size
    return total / count


def write_idx(directory, count):
    """MNIST-format files of noise: their time does not depend on what they show."""
    directory.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
    (directory / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, count, 28, 28) + images.tobytes())
    (directory / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + bytes(count))


def write_latents(directory, count):
    """A cache of noise, in the dtype that `encode` chooses for posteriors."""
    from eqvae_jax.data import latent_cache, latent_records, records

    plan = {"format": latent_cache.FORMAT, "version": latent_cache.VERSION, "shape": LATENT, "dtype": "float32",
            "autoencoder": {"reference": "none", "kind": "kl", "hash": "", "scale": 1.0, "shift": 0.0},
            "preprocessing": {"image_size": 8 * LATENT[0]}, "shard_size": count}
    cache, rng = latent_cache.Cache(directory, plan, 1), np.random.default_rng(0)
    cache.begin()
    packed = (latent_records.pack(i, 0, rng.standard_normal((2, 2, *LATENT), np.float32), "float32")
              for i in range(count))
    records.write_shard(packed, cache.directory / cache.names[0])
    cache.finish(0, {"count": count})
    cache.publish({"count": count, "classes": 1})


def our_images(reference, workers, image_size, batch):
    from eqvae_jax.data.images import train_batches
    from eqvae_jax.data.sources import open_source

    return train_batches(open_source(reference), image_size=image_size, batch_size=batch, seed=0, flip=True,
                         workers=workers)


def our_latents(directory, in_memory, batch):
    from eqvae_jax.data.latent_batches import train_batches
    from eqvae_jax.data.latents import open_latents

    return train_batches(open_latents(directory), batch_size=batch, seed=0, in_memory=in_memory)


def torch_images(directory, workers, image_size, batch):
    """What a training script of torchvision's transforms does; they are written out, since they are few."""
    import torch

    class Photographs(torch.utils.data.Dataset):
        paths = sorted(Path(directory).glob("*.jpg"))

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, i):
            with open(self.paths[i], "rb") as file:
                image = Image.open(file).convert("RGB")
            share, down, across, mirror = torch.rand(4).tolist()
            side = int(min(image.size) * (0.5 + 0.5 * share))
            top, left = int((image.height - side) * down), int((image.width - side) * across)
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
            if mirror < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
            return x.sub_(0.5).div_(0.5), 0

    data = Photographs()
    order = torch.utils.data.RandomSampler(data, replacement=True, num_samples=2**31)
    return iter(torch.utils.data.DataLoader(data, batch, sampler=order, num_workers=workers,
                                            multiprocessing_context="fork" if workers else None))


def turn(opener, arguments, warm, batches):
    """Opens a pipeline, lets it begin, and counts: (examples, seconds, processor seconds)."""
    iterator = opener(*arguments)
    for _ in range(warm):
        next(iterator)
    begun, examples = (time.perf_counter(), processor_seconds()), 0
    for _ in range(batches):
        batch = next(iterator)
        examples += len(batch["label"] if isinstance(batch, dict) else batch[1])
    seconds = time.perf_counter() - begun[0], max(processor_seconds() - begun[1], 1 / TICKS)
    (iterator.close if hasattr(iterator, "close") else iterator._shutdown_workers)()
    return examples, *seconds


def processor_seconds():
    """User and system time of this process and of all that it started, those that still run included."""
    ticks, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            ticks[int(path.parent.name)], parents[int(path.parent.name)] = sum(map(int, fields[11:13])), int(fields[1])
    ours, found = {os.getpid()}, 0
    while len(ours) > found:
        found = len(ours)
        ours |= {process for process, parent in parents.items() if parent in ours}
    return sum(ticks[process] for process in ours) / TICKS


def programs_of(directory, arguments):
    """{name: (side, opener, its arguments, batches to warm up, batches to count)}."""
    from eqvae_jax.data.preparation import prepare
    from eqvae_jax.data.sources import open_source

    programs, size, batch = {}, arguments.image_size, arguments.batch
    count = math.ceil(arguments.images / batch)
    for name in arguments.sizes:
        width, height = map(int, name.split("x"))
        folder, shards = directory / name, directory / f"{name}-shards"
        mean = write_jpegs(folder, width, height, arguments.quality, arguments.files, arguments.noise)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            prepare(open_source(f"folder:{folder}"), str(shards), 512)
        print(f"{arguments.files} JPEGs of {name}, quality {arguments.quality}, {mean / 1000:.0f} kB on average")
        programs |= {
            f"{name} torch": ("torch", torch_images, (folder, CORES, size, batch), 2 * CORES, count),
            f"{name} folder, threads": ("ours", our_images, (f"folder:{folder}", 0, size, batch), 5, count),
            f"{name} folder, workers": (
                "ours", our_images, (f"folder:{folder}", CORES, size, batch), 10 * CORES, count),
            f"{name} arrayrecord, threads": (
                "ours", our_images, (f"arrayrecord:{shards}/*.array_record", 0, size, batch), 5, count),
        }
    write_idx(directory / "idx", 4096)
    write_latents(directory / "latents", arguments.latents)
    many = math.ceil(20 * arguments.images / 256)  # of which each costs a twentieth of a JPEG's time or less
    programs["28x28 idx, threads"] = "ours", our_images, (f"idx:{directory / 'idx'}", 0, 28, 256), 5, many
    for name, in_memory in (("files", False), ("memory", True)):
        programs[f"latents, {name}"] = "ours", our_latents, (str(directory / "latents"), in_memory, 256), 5, many
    return programs


def summary(turns):
    """Rates of one program: a list of (examples, seconds, processor seconds) -> medians, and all rounds."""
    clock, per_core = ([turn[0] / turn[k] for turn in turns] for k in (1, 2))
    return {"per_second": statistics.median(clock), "per_core_second": statistics.median(per_core), "rounds": per_core}


def machine(text):
    """NAME=CHIPS chips,PEAK TFLOP/s,SHARE %,CPUS vCPUs."""
    name, _, numbers = text.rpartition("=")
    found = re.findall(r"[\d.]+", numbers)
    if not name or len(found) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not like {MACHINES[0]!r}")
    return name, dict(zip(("chips", "peak_tflops", "mfu_percent", "cpus"), map(float, found), strict=True))


def cores_needed(machines, per_core, gflops):
    """{machine: its facts, and for each of per_core's programs {"rate", "cores"}}.

    per_core: {program: (task, examples of a core-second)}; gflops: {task: GFLOP of an example}.
    """
    needed = {}
    for name, facts in machines.items():
        flops = facts["chips"] * facts["peak_tflops"] * 1e12 * facts["mfu_percent"] / 100
        rates = {task: flops / (1e9 * gflop) for task, gflop in gflops.items()}
        needed[name] = facts | {"programs": {program: {"rate": rates[task], "cores": rates[task] / speed}
                                             for program, (task, speed) in per_core.items()}}
    return needed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", nargs="+", default=["1024x768", "500x375"], metavar="WxH")
    add("--files", type=int, default=240, help="JPEGs of each size")
    add("--quality", type=int, default=90)
    add("--noise", type=float, default=8.0, help="standard deviation of the sensor noise, of 255")
    add("--image_size", type=int, default=256)
    add("--batch", type=int, default=32)
    add("--images", type=int, default=256, help="images that a turn counts, at least")
    add("--latents", type=int, default=1024, help="in the cache")
    add("--rounds", type=int, default=5)
    add("--machine", type=machine, action="append", default=[], help=f"one more, such as {MACHINES[0]!r}".replace(
        "%", "%%"))
    add("--eq_gflop", type=float, default=2025, help="of an image in the SD-VAE EQ step")
    add("--dit_gflop", type=float, default=713, help="of a latent in DiT-XL/2's step")
    add("--json", help="file for all numbers")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        programs = programs_of(Path(directory), arguments)
        # Two processes, so that torch's workers are not forked from one with JAX's threads.
        sides = {side: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for side in ("torch", "ours")}
        turns = {name: [] for name in programs}
        for _ in tqdm(range(arguments.rounds), unit="round"):
            for name, (side, *program) in programs.items():
                turns[name].append(sides[side].submit(turn, *program).result())
    report(arguments, {name: summary(found) for name, found in turns.items()})


def report(arguments, found):
    print(f"\n{CORES} cores of {processor_name()}, Python {platform.python_version()}; "
          f"medians of {arguments.rounds} rounds, batch {arguments.batch}, to {arguments.image_size} pixels")
    print(f"{'program':34}{'per second':>12}{'per core-second':>17}{'ours / torch, per core':>26}")
    for name, numbers in found.items():
        reference, ratio = found.get(f"{name.split()[0]} torch"), ""
        if reference and numbers is not reference:
            ratios = [a / b for a, b in zip(numbers["rounds"], reference["rounds"], strict=True)]
            numbers["ratio"] = dict(median=statistics.median(ratios), least=min(ratios), greatest=max(ratios))
            ratio = "{median:.2f} ({least:.2f} .. {greatest:.2f})".format(**numbers["ratio"])
        print(f"{name:34}{numbers['per_second']:12.0f}{numbers['per_core_second']:17.1f}{ratio:>26}")

    per_core = {name: ("dit" if name.startswith("latents") else "eq", numbers["per_core_second"])
                for name, numbers in found.items() if not name.startswith("28x28")}
    gflops = {"eq": arguments.eq_gflop, "dit": arguments.dit_gflop}
    needed = cores_needed(dict(map(machine, MACHINES)) | dict(arguments.machine), per_core, gflops)
    print("\nCores needed for the estimated rates of the SD-VAE EQ step and, on latents, of DiT-XL/2")
    print(f"{'':34}" + "".join(f"{name:>12}" for name in needed))
    for label, key in (("EQ step, images/s", "eq"), ("DiT-XL/2, latents/s", "dit")):
        program = next(name for name, (task, _) in per_core.items() if task == key)
        print(f"{label:34}" + "".join(f"{facts['programs'][program]['rate']:12.0f}" for facts in needed.values()))
    for name in per_core:
        print(f"{name:34}" + "".join(f"{facts['programs'][name]['cores']:12.1f}" for facts in needed.values()))
    print(f"{'vCPUs of the hosts':34}" + "".join(f"{facts['cpus']:12.0f}" for facts in needed.values()))
    if arguments.json:
        options = {key: value for key, value in vars(arguments).items() if key != "machine"}
        Path(arguments.json).write_text(json.dumps({
            "processor": processor_name(), "cores": CORES, "options": options, "programs": found,
            "machines": needed}, indent=1) + "\n")


def processor_name():
    return (re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()) or [platform.machine()])[0]


if __name__ == "__main__":
    main()
