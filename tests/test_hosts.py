"""The commands on two real processes: what they write is what one process writes."""

import json
import os
import pathlib
import runpy
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from eqvae_jax import encode, evaluate, main
from eqvae_jax.training.checkpoint import load_params

ROOT = pathlib.Path(__file__).resolve().parents[1]
EVALUATE = ["--images=photos:test", "--autoencoder=init:smoke", "--image_size=32", "--batch_size=2", "--limit=3"]


def together(module, *arguments, own=lambda k: (), where=lambda k: ROOT):
    """Starts two processes of a command, each `where`; returns them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [f"--coordinator=localhost:{port}", "--processes=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "EQVAE_START_LIMIT": "300"}
    command = [sys.executable, "-m", f"eqvae_jax.{module}", *arguments, *flags]
    return [subprocess.Popen([*command, *own(k), f"--process={k}"], cwd=where(k), env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for k in range(2)]


def ended(processes, codes=(0, 0)):
    """What they wrote, standard output and errors of each, once they have ended with these codes."""
    try:
        written = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == list(codes), written
    return written


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    output = tmp_path_factory.mktemp("latents") / "cache"
    assert encode.main(["--autoencoder=init:smoke", "--images=photos:train", "--image_size=8", "--batch_size=3",
                        f"--output={output}"]) == 0
    return output


def test_a_generator_learns_and_shows_on_two_what_it_does_on_one(latents, tmp_path, capsys):
    config = runpy.run_path(str(ROOT / "configs" / "sit.py"))["get_config"]("smoke")
    changes = {"data.latents": str(latents), "training.preview_every": 2, "data.batch_size": 4,
               "data.evaluation_batch_size": 4, "evaluation.preview": 4, "optimizer.learning_rate": 0.05}
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    running = together("main", "--config=configs/sit.py:smoke", f"--workdir={tmp_path / 'two'}", *flags)
    config.update_from_flattened_dict(changes)
    assert main.train(config, tmp_path / "one") == 0
    (out, err), (silent, _) = ended(running)
    assert "2 devices" in out and "is saved" in err and "devices" not in silent
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                for name in ("one", "two"))
    assert [(row["step"], row["split"]) for row in two] == [(row["step"], row["split"]) for row in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    pictures = [np.asarray(Image.open(next((tmp_path / name / "previews").glob("*2.png"))), int)
                for name in ("one", "two")]
    assert pictures[0].shape == pictures[1].shape and np.abs(pictures[0] - pictures[1]).max() <= 1
    one, two = (load_params(tmp_path / name, "params")[0]["generator"] for name in ("one", "two"))
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-4), two, one)


def test_equivariance_is_measured_on_two_as_on_one(tmp_path):
    running = together("evaluate", "equivariance", *EVALUATE, f"--output={tmp_path / 'two'}")
    assert evaluate.main(["equivariance", *EVALUATE, f"--output={tmp_path / 'one'}"]) == 0
    (out, _), (silent, _) = ended(running)
    assert "R, mean of the turns" in out and "R, mean" not in silent
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["images"] == one["images"] and two["images"]["count"] == 3
    ours, theirs = two["results"]["init:smoke"], one["results"]["init:smoke"]
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    assert np.abs(np.asarray(Image.open(tmp_path / "one" / "tau_1.png"), int)
                  - np.asarray(Image.open(tmp_path / "two" / "tau_1.png"), int)).max() <= 4


def test_another_config_on_one_host_is_refused_and_both_are_named(latents, tmp_path):
    flags = ["--config=configs/sit.py:smoke", f"--workdir={tmp_path / 'run'}", f"--config.data.latents={latents}"]
    running = together("main", *flags, own=lambda k: [f"--config.optimizer.learning_rate={[0.1, 0.2][k]}"])
    for _, err in ended(running, (1, 1)):
        assert "config.optimizer.learning_rate: 0.1 on process 0 (" in err and "but 0.2 on process 1 (" in err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_other_images_on_one_host_are_refused_and_both_are_named(tmp_path):
    for k in range(2):
        (tmp_path / str(k) / "images").mkdir(parents=True)
        for i in range(2 + k):
            Image.fromarray(np.full((40, 40, 3), 50 * i, np.uint8)).save(tmp_path / str(k) / "images" / f"{i}.png")
    arguments = ["reconstruction", *EVALUATE[1:], "--images=folder:images", f"--output={tmp_path / 'out'}"]
    for _, err in ended(together("evaluate", *arguments, where=lambda k: tmp_path / str(k)), (2, 2)):
        assert 'folder:images: "2 examples, ' in err and 'on process 0 (' in err and 'but "3 examples, ' in err
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("flags, message", [
    (["--processes=2"], "coordinator=None, processes=2 and process=None do not fit together"),
    (["--coordinator=here:1", "--processes=2", "--process=2"], "I from 0 to N-1"),
    (["--coordinator=here", "--processes=2", "--process=0"], "--coordinator=HOST:PORT"),
])
def test_flags_that_do_not_fit_together_are_refused(flags, message, tmp_path, capsys):
    assert evaluate.main(["equivariance", *EVALUATE, f"--output={tmp_path}", *flags]) == 2
    assert message in capsys.readouterr().err
