"""`evaluate generation`: how fast, in how much memory, and, for Inception, against pytorch-fid on the same files.

    python benchmarks/evaluate_generation.py classifier --workdir=RUN --images 1000 10000 20000
    python benchmarks/evaluate_generation.py inception --images=1000 --size=256

classifier: the command itself, each N in a process of its own: random images of --size in two .npz files, all metrics,
with an empty cache and then with a full one. Peak memory is the process's, with JAX and the program's compilation.
RUN is a run of configs/fashion_classifier.py.
inception: mean and covariance of a folder of PNG files, by our `collect` (which also takes spatial features and logits)
and by pytorch-fid's compute_statistics_of_path, in turn, folder by folder, with the same random weights and batch size;
a ratio above 1 says how many times longer torch takes. Reading files counts on both sides, compiling does not.
Processor seconds are of all threads, and say more than the clock where other programs use the machine. Needs the [test]
extra.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def random_npz(path, count, size, seed):
    from eqvae_jax.evaluation.samples import write_npz

    rng = np.random.default_rng(seed)
    sizes = [min(500, count - start) for start in range(0, count, 500)]
    write_npz(path, (rng.integers(0, 256, (rows, size, size, 3), dtype=np.uint8) for rows in sizes), count)


def classifier(arguments):
    print(f"{'images':>7}{'pass':>8}{'seconds':>9}{'images/s':>10}{'peak MB':>9}   (both sets together)")
    for count in arguments.images:
        with tempfile.TemporaryDirectory() as directory:
            for seed, name in enumerate(("reference", "generated")):
                random_npz(f"{directory}/{name}.npz", count, arguments.size, seed)
            for run in ("cold", "cached"):
                command = [sys.executable, __file__, "one", f"--reference={directory}/reference.npz",
                           f"--generated={directory}/generated.npz", f"--features=workdir:{arguments.workdir}",
                           f"--cache={directory}/cache", f"--output={directory}/out"]  # fmt: skip
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds, peak = json.loads(done.stdout.splitlines()[-1])
                print(f"{count:7}{run:>8}{seconds:9.1f}{2 * count / seconds:10.0f}{peak:9.0f}", flush=True)


def one(arguments):
    """In its own process: the command, then its seconds, without imports, and its largest memory in MB."""
    from eqvae_jax import evaluate

    began = time.perf_counter()
    assert evaluate.main(["generation", *arguments]) == 0
    unit = 2**20 if sys.platform == "darwin" else 2**10
    print(json.dumps([time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit]))


def inception(arguments):
    import jax
    import torch
    from inception import reference_network  # the benchmark beside this one
    from PIL import Image

    from eqvae_jax.evaluation.feature_sets import Extractor, collect
    from eqvae_jax.evaluation.image_sets import open_sets
    from eqvae_jax.features.inception import inception_features

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    model, params = reference_network()
    from pytorch_fid.fid_score import compute_statistics_of_path

    extract = lambda images: inception_features(params, images, "pytorch-fid")._asdict()
    extractor = Extractor("inception", "random", "pytorch-fid", extract)
    rng, clock, processor, difference = np.random.default_rng(0), [0.0, 0.0], [0.0, 0.0], 0.0
    per_folder = max(2, arguments.images[0] // arguments.folders)

    def ours(folder):
        batches = open_sets({"reference": f"folder:{folder}"}, arguments.size)["reference"].batches(arguments.batch)
        return collect(extractor, batches, batch_size=arguments.batch, progress=False).gaussian[:2]

    def theirs(folder):
        return compute_statistics_of_path(str(folder), model, arguments.batch, 2048, "cpu", num_workers=threads)

    for number in range(-1, arguments.folders):  # the first one compiles
        with tempfile.TemporaryDirectory() as folder:
            for i in range(per_folder if number >= 0 else 2):
                pixels = rng.integers(0, 256, (arguments.size, arguments.size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(f"{folder}/{i}.png", compress_level=1)
            found = []
            for i, program in enumerate((ours, theirs)):
                began = time.perf_counter(), time.process_time()
                found.append(program(folder))
                if number >= 0:
                    clock[i] += time.perf_counter() - began[0]
                    processor[i] += time.process_time() - began[1]
        difference = max(difference, np.abs(found[0][0] - found[1][0]).max() / np.abs(found[1][0]).mean())
    count = per_folder * arguments.folders
    print(f"{count} PNG files of {arguments.size}^2 in {arguments.folders} folders, batch {arguments.batch}, {threads} "
          f"threads; jax {jax.__version__} on {jax.devices()[0].device_kind}, torch {torch.__version__}")
    for i, name in enumerate(("ours", "pytorch-fid")):
        print(f"{name:12}{count / clock[i]:8.2f} images/s {processor[i] / count:8.3f} processor s / image")
    print(f"ratio {clock[1] / clock[0]:.2f} by the clock and {processor[1] / processor[0]:.2f} in processor seconds; "
          f"means differ by {difference:.1e} of their mean")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    small = commands.add_parser("classifier")
    small.add_argument("--workdir", required=True)
    large = commands.add_parser("inception")
    large.add_argument("--folders", type=int, default=5, help="the images are split over, to take turns")
    large.add_argument("--batch", type=int, default=50, help="pytorch-fid's default is 50")
    for command, images, size in ((small, [1000, 10_000, 20_000], 32), (large, [1000], 256)):
        command.add_argument("--images", type=int, nargs="+", default=images)
        command.add_argument("--size", type=int, default=size)
    arguments = parser.parse_args()
    {"classifier": classifier, "inception": inception}[arguments.what](arguments)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["one"]:
        one(sys.argv[2:])
    else:
        main()
