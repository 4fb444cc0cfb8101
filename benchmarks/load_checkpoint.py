"""Time and memory of loading a full-size SD-VAE (84 M parameters, 335 MB) from a file, each format in a fresh process.

    JAX_PLATFORMS=cpu python benchmarks/load_checkpoint.py

A process of its own writes the files first, the checkpoint with torch.save. `load` is load_autoencoder with its hash;
`process` is everything from start to exit. Peak memory is the whole process's, mapped pages of the file included.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
WRITE = """
import sys
import numpy as np
import torch
from eqvae_jax.weights import load_autoencoder, save_autoencoder, tables

model, params, spec = load_autoencoder("init:sd")
save_autoencoder(f"diffusers:{sys.argv[1]}/folder", model, params, spec)
tensors = tables.write_parameters(params, tables.parameter_shapes(model), tables.ldm_key, attention_as_convolution=True)
state = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in tensors.items()}
torch.save({"state_dict": state, "epoch": 1, "callbacks": {torch.nn.Linear: {}}}, f"{sys.argv[1]}/sd.ckpt")
"""
LOAD = """
import json, resource, sys, time
from eqvae_jax.weights import load_autoencoder

begun = time.perf_counter()
if len(sys.argv) > 1:
    load_autoencoder(sys.argv[1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024      # Linux counts in KiB
print(json.dumps({"seconds": time.perf_counter() - begun, "peak": peak}))
"""


def run(code, *arguments):
    """What a fresh process prints, and how long it takes from start to exit."""
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ | {"PYTHONPATH": str(ROOT)}
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, check=True, stdout=subprocess.PIPE)
    return done.stdout, time.perf_counter() - begun


def main():
    with tempfile.TemporaryDirectory() as directory:
        run(WRITE, directory)
        for name, arguments in (("only importing", []), ("ldm .ckpt", [f"ldm:{directory}/sd.ckpt"]),
                                ("diffusers folder", [f"diffusers:{directory}/folder"])):
            results = [(json.loads(printed), whole) for printed, whole in (run(LOAD, *arguments) for _ in range(3))]
            load = min(result["seconds"] for result, _ in results)
            whole, peak = min(whole for _, whole in results), max(result["peak"] for result, _ in results)
            print(f"{name:17} load {load:5.2f} s   process {whole:5.2f} s   peak {peak / 1e6:6.0f} MB", flush=True)


if __name__ == "__main__":
    main()
