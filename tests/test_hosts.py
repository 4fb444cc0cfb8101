"""The commands on two real processes: what they write is what one process writes."""

import json
import os
import pathlib
import re
import runpy
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from eqvae_jax import encode, evaluate, main, sample
from eqvae_jax.evaluation.samples import open_samples
from eqvae_jax.run.sample_set import partial_path
from eqvae_jax.run.sampling import Sampler
from eqvae_jax.training.checkpoint import load_params

ROOT = pathlib.Path(__file__).resolve().parents[1]
EVALUATE = ["--images=photos:test", "--autoencoder=init:smoke", "--image_size=32", "--batch_size=2", "--limit=3"]
# Several commands in the same processes, whose start is most of what a small one costs.
COMMANDS = """
import json, sys
from eqvae_jax import distributed, encode, evaluate, sample

doors = {"encode": encode, "evaluate": evaluate, "sample": sample}
codes = (doors[door].main(arguments) for door, *arguments in json.loads(sys.argv[1]))
sys.exit(distributed.run(lambda: next(filter(None, codes), 0)))
"""


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def together(module, *arguments, own=lambda k: (), where=lambda k: ROOT):
    """Starts two processes of a command, each `where`; returns them."""
    flags = [f"--coordinator=localhost:{free_port()}", "--processes=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "EQVAE_START_LIMIT": "300"}
    command = [sys.executable, "-m", f"eqvae_jax.{module}", *arguments, *flags]
    return [subprocess.Popen([*command, *own(k), f"--process={k}"], cwd=where(k), env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for k in range(2)]


def in_turn(count, *commands):
    """Starts so many processes, each of one device, which do these commands together; returns them."""
    told = {"EQVAE_COORDINATOR": f"localhost:{free_port()}", "EQVAE_PROCESSES": str(count), "EQVAE_START_LIMIT": "300",
            "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    return [subprocess.Popen(command, env=os.environ | told | {"EQVAE_PROCESS": str(k)}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for k in range(count)]


def ended(processes, codes=(0, 0)):
    """What they wrote, standard output and errors of each, once they have ended with these codes."""
    try:
        written = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == list(codes), written
    return written


ENCODE = ["--autoencoder=init:smoke", "--images=photos:train", "--image_size=8", "--batch_size=3", "--shard_size=2"]
LEARN = {"training.preview_every": 2, "data.batch_size": 4, "data.evaluation_batch_size": 4, "evaluation.preview": 4,
         "optimizer.learning_rate": 0.05}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    output = tmp_path_factory.mktemp("latents") / "cache"
    assert encode.main([*ENCODE, f"--output={output}"]) == 0
    return output


@pytest.fixture(scope="module")
def generator(latents, tmp_path_factory):
    """The workdir of a SiT that one process has trained."""
    config = runpy.run_path(str(ROOT / "configs" / "sit.py"))["get_config"]("smoke")
    config.update_from_flattened_dict(LEARN | {"data.latents": str(latents)})
    workdir = tmp_path_factory.mktemp("one") / "sit"
    assert main.train(config, workdir) == 0
    return workdir


def same_numbers(one, two, rel):
    """Compares two directories of `evaluate`: numbers of metrics.json, names of files."""
    ours, theirs = (json.loads((directory / "metrics.json").read_text()) for directory in (two, one))
    assert ours["images"] == theirs["images"]
    ours, theirs = ours["results"]["init:smoke"], theirs["results"]["init:smoke"]
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=rel, abs=1e-6), name
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    return theirs


def test_a_generator_learns_and_shows_on_two_what_it_does_on_one(latents, generator, tmp_path):
    flags = [f"--config.{name}={value}" for name, value in (LEARN | {"data.latents": latents}).items()]
    running = together("main", "--config=configs/sit.py:smoke", f"--workdir={tmp_path / 'two'}", *flags)
    (out, err), (silent, _) = ended(running)
    assert "2 devices" in out and "is saved" in err and "devices" not in silent
    one, two = ([json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
                for workdir in (generator, tmp_path / "two"))
    assert [(row["step"], row["split"]) for row in two] == [(row["step"], row["split"]) for row in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    pictures = [np.asarray(Image.open(next((workdir / "previews").glob("*2.png"))), int)
                for workdir in (generator, tmp_path / "two")]
    assert pictures[0].shape == pictures[1].shape and np.abs(pictures[0] - pictures[1]).max() <= 1
    one, two = (load_params(workdir, "params")[0]["generator"] for workdir in (generator, tmp_path / "two"))
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-4), two, one)


def test_two_encode_go_on_with_samples_and_measure_as_one_does(latents, generator, tmp_path, monkeypatch):
    config = runpy.run_path(str(ROOT / "configs" / "fashion_classifier.py"))["get_config"]("smoke")
    assert main.train(config, tmp_path / "cnn") == 0
    make = [f"--generator=workdir:{generator}", "--count=6", "--batch_size=4", "--evaluations=3"]
    measures = {"equivariance": ["--turns", "1", "--scales", "0.5"],
                "reconstruction": [f"--features=workdir:{tmp_path / 'cnn'}"]}
    one, two = tmp_path / "one", tmp_path / "two"
    real, batches = Sampler.images, []

    def interrupted(self, params, numbers, labels):
        batches.append(numbers)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return real(self, params, numbers, labels)

    one.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "images", interrupted)
        assert sample.main([*make, f"--output={one / 's.npz'}"]) == 130
    shutil.copytree(one, two)
    begun = np.fromfile(partial_path(two / "s.npz"), np.uint8)
    (255 - begun).tofile(partial_path(two / "s.npz"))           # which tells those that are there from new ones
    measure = lambda at: [[name, *EVALUATE, *more, f"--output={at / name}"] for name, more in measures.items()]
    running = in_turn(2, ["encode", *ENCODE, f"--output={two / 'cache'}"],
                      ["sample", *make, f"--output={two / 's.npz'}"],
                      *(["evaluate", *command] for command in measure(two)))
    assert sample.main([*make, f"--output={one / 's.npz'}"]) == 0
    for command in measure(one):
        assert evaluate.main(command) == 0
    (out, _), (silent, _) = ended(running)
    assert "going on from image 4" in out and "R, mean of the turns" in out and "rFID" in out
    assert not any(said in silent for said in ("going on", "R, mean", "rFID"))
    assert ([(path.name, path.read_bytes()) for path in sorted((two / "cache").glob("*.array_record"))]
            == [(path.name, path.read_bytes()) for path in sorted(latents.glob("*.array_record"))])
    ours, theirs = (np.load(directory / "s.npz")["arr_0"].astype(int) for directory in (two, one))
    assert ours.shape == theirs.shape == (6, 8, 8, 3)
    np.testing.assert_array_equal(ours[:4], 255 - theirs[:4])
    assert np.abs(ours[4:] - theirs[4:]).max() <= 1
    assert open_samples(two / "s.npz").made_with == open_samples(one / "s.npz").made_with
    for name, known in (("equivariance", "R"), ("reconstruction", "rfid(fashion-cnn)")):
        assert same_numbers(one / name, two / name, rel=1e-3)[known] > 0
    pictures = (np.asarray(Image.open(at / "equivariance" / "tau_1.png"), int) for at in (one, two))
    assert np.abs(np.subtract(*pictures)).max() <= 4


def test_other_code_on_one_host_is_refused_and_both_are_named(tmp_path):
    shutil.copytree(ROOT / "eqvae_jax", tmp_path / "eqvae_jax", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "eqvae_jax" / "equivariance.py", "a") as file:
        file.write("# another day\n")
    running = together("evaluate", "equivariance", *EVALUATE, f"--output={tmp_path / 'out'}",
                       where=lambda k: [ROOT, tmp_path][k])  # the package in the working directory comes first
    for _, err in ended(running, (2, 2)):
        assert re.search(r'code of eqvae_jax: "\w{12}" on process 0 \(.+\), but "\w{12}" on process 1 \(', err), err
        assert "give every host the same command, code" in err
    assert not (tmp_path / "out").exists()


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
