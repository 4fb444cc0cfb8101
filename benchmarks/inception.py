"""FID's Inception features of images in memory against pytorch-fid in PyTorch, batch by batch in turn, in one run.

    python benchmarks/inception.py
    python benchmarks/inception.py --images=96 --size=256 --batch=16
    taskset -c 0 python benchmarks/inception.py --images=96        # on one core, nothing waits for another thread

Both sides compute 2048 features in float32 on all cores, with the same random weights, which ours loads from a file
that torch saved; ours also computes the spatial features and the logits, and begins with bytes, while torch is given
floats. pytorch-fid is also run with its network in channels-last layout, which it does not do by itself; the faster
one counts. A ratio above 1 says how many times longer torch takes. Processor seconds are of all threads: where other
programs use the machine they say more than the clock. Needs the [test] extra.
"""

import argparse
import copy
import os
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch

from eqvae_jax.features.inception import inception_features
from eqvae_jax.weights.inception import load_inception

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import declare_nms  # noqa: E402  pytorch-fid imports torchvision, which a CPU build of torch breaks


def reference_network():
    """pytorch-fid's model with torch's own random weights, in the file format of the published ones; no download."""
    declare_nms(torch)
    from pytorch_fid import inception
    from torchvision.models.inception import Inception3

    inception.load_state_dict_from_url = lambda *_, **__: {}
    load, Inception3.load_state_dict = Inception3.load_state_dict, lambda *_: None
    torch.manual_seed(0)
    network = inception.fid_inception_v3()
    Inception3.load_state_dict = load
    inception.fid_inception_v3 = lambda: network
    model = inception.InceptionV3([3]).eval()
    with tempfile.TemporaryDirectory() as directory:
        torch.save(network.state_dict(), f"{directory}/inception.pth")
        params, _ = load_inception(f"{directory}/inception.pth")
    return model, jax.device_put(params)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=50, help="pytorch-fid's default is 50")
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads)

    model, params = reference_network()
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)

    def by_torch(model, images):
        with torch.inference_mode():
            return model(images)[0][:, :, 0, 0].numpy()

    programs = {
        "ours": lambda images, floats: np.asarray(inception_features(params, images, "pytorch-fid").pool),
        "pytorch-fid": lambda images, floats: by_torch(model, floats),
        "pytorch-fid, channels last": lambda images, floats: by_torch(channels_last, floats),
    }
    rng = np.random.default_rng(0)
    batches = max(1, arguments.images // arguments.batch)
    clock, processor = ({name: 0.0 for name in programs} for _ in range(2))
    difference = 0.0
    for i in range(-1, batches):                                                 # the first one compiles
        images = rng.integers(0, 256, (arguments.batch, arguments.size, arguments.size, 3), dtype=np.uint8)
        floats, features = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() / 255, {}
        for name, program in programs.items():
            began = time.perf_counter(), time.process_time()
            features[name] = program(images, floats)
            if i >= 0:
                clock[name] += time.perf_counter() - began[0]
                processor[name] += time.process_time() - began[1]
        theirs = features["pytorch-fid"]
        difference = max(difference, np.abs(features["ours"] - theirs).max() / np.abs(theirs).mean())

    count = batches * arguments.batch
    print(f"{count} images of {arguments.size}^2, batch {arguments.batch}, float32, {threads} threads; "
          f"jax {jax.__version__} on {jax.devices()[0].device_kind}, torch {torch.__version__}")
    print(f"{'program':28}{'images/s':>10}{'processor s / image':>22}")
    for name in programs:
        print(f"{name:28}{count / clock[name]:10.2f}{processor[name] / count:22.3f}")
    fastest = min(list(programs)[1:], key=clock.get)
    print(f"ratio {clock[fastest] / clock['ours']:.2f} by the clock and {processor[fastest] / processor['ours']:.2f} "
          f"in processor seconds, against {fastest}; largest difference {difference:.1e} of the features' mean")


if __name__ == "__main__":
    main()
