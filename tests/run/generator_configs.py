"""Configs of generators that take seconds to train, and what their runs write."""

import json
import os
import pathlib
import runpy
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def get_config(name="sit", variant="smoke"):
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](variant)


def small(caches, name="sit", **changes):
    config = get_config(name)
    config.data.latents, config.training.preview_every = str(caches / "one"), 0
    config.update_from_flattened_dict(changes)
    return config


def long(caches, steps, **changes):
    return small(caches, **{"training.steps": steps, "training.accumulate": 2, "optimizer.clip_norm": 1.0,
                            "data.batch_size": 8, "data.evaluation_batch_size": 8, "model.scan": True} | changes)


def aligned(with_images, classifier, **changes):
    config = get_config("repa")
    config.data.latents, config.training.preview_every = str(with_images), 0
    config.alignment.encoder = f"workdir:{classifier}"
    config.model.patch_size = 2                               # 4 x 4 latents, 2 x 2 tokens, 2 x 2 places
    config.update_from_flattened_dict(changes)
    return config


def masked(tokens, **changes):
    config = get_config("maskgit")
    config.data.latents, config.training.preview_every = str(tokens), 0
    config.update_from_flattened_dict(changes)
    return config


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def on_eight_devices(name, workdir, **changes):
    """The rows of a run of configs/NAME.py:smoke over 8 devices, its parameters over pairs of them."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    changes |= {"training.preview_every": 0, "mesh.fsdp": 2, "mesh.min_shard_size": 64, "data.batch_size": 8}
    arguments = [f"--config.{field}={value}" for field, value in changes.items()]
    ended = subprocess.run([sys.executable, "-m", "eqvae_jax.main", f"--config=configs/{name}.py:smoke",
                            f"--workdir={workdir}", *arguments], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0 and "Batch 8 = 8 devices" in ended.stdout, ended.stdout + ended.stderr
    return rows_of(workdir)
