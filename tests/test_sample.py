"""The command that makes images: one set whatever the batch, the devices or the interruptions; and what it refuses."""

import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from eqvae_jax import encode, main, sample
from eqvae_jax.evaluation.samples import open_samples
from eqvae_jax.run.sample_set import partial_path
from eqvae_jax.run.sampling import Sampler

ROOT = pathlib.Path(__file__).resolve().parents[1]
COUNT, CLASSES = 11, 3
CHILD = """
import os, signal, sys
import jax
from eqvae_jax import distributed, sample
from eqvae_jax.run.sampling import Sampler
from eqvae_jax.training import sharding

mode, *arguments = sys.argv[1:]
if mode == "killed":  # in the middle of the third batch
    images, made = Sampler.images, []

    def killed(self, params, numbers, labels):
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(numbers)
        return images(self, params, numbers, labels)

    Sampler.images = killed
elif mode.startswith("process"):  # whose devices are not beside one another in the mesh, as on TPU pods
    port, number = mode.split(":")[1:]
    arguments += [f"--coordinator=localhost:{port}", "--processes=2", f"--process={number}"]
    make_mesh = sharding.make_mesh
    sharding.make_mesh = lambda config: make_mesh(config, [jax.devices()[i] for i in (0, 2, 1, 3)])
sys.exit(distributed.run(lambda: sample.main(arguments)))
"""


def child(mode, arguments, devices=1):
    flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen([sys.executable, "-c", CHILD, mode, *arguments], stdout=subprocess.PIPE,
                            env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}, stderr=subprocess.STDOUT,
                            text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Arguments that name a SiT of two steps on 4 x 4 latents of 3 classes; its images have 8 x 8 pixels."""
    root = tmp_path_factory.mktemp("trained")
    for i in range(2 * CLASSES):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        (root / "images" / "abc"[i % CLASSES]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "images" / "abc"[i % CLASSES] / f"{i}.png")
    arguments = ["--autoencoder=init:smoke", f"--images=folder:{root / 'images'}", "--image_size=8", "--batch_size=3"]
    assert encode.main([*arguments, f"--output={root / 'latents'}"]) == 0
    config = runpy.run_path(str(ROOT / "configs" / "sit.py"))["get_config"]("smoke")
    config.data.latents, config.training.preview_every = str(root / "latents"), 0
    config.optimizer.learning_rate = 0.1                     # zero at first, the last layer must say something
    assert main.train(config, root / "sit") == 0
    return [f"--generator=workdir:{root / 'sit'}", "--guidance=2", "--sampler=sde", "--evaluations=4",
            f"--count={COUNT}", "--batch_size=4", "--seed=5"]


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """The bytes of the set, made without a break."""
    output = tmp_path_factory.mktemp("whole") / "samples.npz"
    assert sample.main([*trained, f"--output={output}"]) == 0
    assert sorted(path.name for path in output.parent.iterdir()) == ["samples.npz", "samples.pdf", "samples.png"]
    return output.read_bytes()


def images_of(path):
    return np.load(path)["arr_0"]


def test_the_set_is_adms_and_says_how_it_was_made(whole, tmp_path):
    (tmp_path / "s.npz").write_bytes(whole)
    with np.load(tmp_path / "s.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (COUNT, 8, 8, 3) and images.dtype == np.uint8 and images.std() > 5
    assert labels.shape == (COUNT,) and labels.dtype == np.int64
    assert len({image.tobytes() for image in images}) == COUNT
    made = open_samples(tmp_path / "s.npz").made_with
    assert (made["seed"], made["sampling"]["evaluations"], made["sampling"]["guidance"]) == (5, 4, 2.0)
    assert made["sampling"]["guidance_channels"] == 0         # of the run's config; the released ones guide 3
    assert made["autoencoder"]["hash"] == made["generator"]["latents"]["hash"]


def test_another_batch_eight_devices_and_two_hosts_make_the_same_images(trained, whole, tmp_path):
    (tmp_path / "whole.npz").write_bytes(whole)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = [child("eight", [*trained, f"--output={tmp_path / 'eight.npz'}"], devices=8)]
    running += [child(f"process:{port}:{i}", [*trained, f"--output={tmp_path / 'hosts.npz'}"], devices=2)
                for i in range(2)]
    try:
        assert sample.main([*trained, "--batch_size=64", f"--output={tmp_path / 'large.npz'}"]) == 0
        printed = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0, 0], printed
    assert "8 at a time" in printed[0]
    expected = images_of(tmp_path / "whole.npz").astype(int)
    for name in ("large", "eight", "hosts"):
        assert np.abs(images_of(tmp_path / f"{name}.npz") - expected).max() <= 1, name


def test_a_killed_set_goes_on_to_the_same_bytes_and_so_does_one_killed_at_its_end(trained, whole, tmp_path):
    output = tmp_path / "samples.npz"
    killed = child("killed", [*trained, f"--output={output}"])
    assert killed.wait(timeout=300) == -signal.SIGKILL
    unfinished = partial_path(output)
    assert unfinished.stat().st_size == 8 * 8 * 8 * 3 and not output.exists()
    beside, rows = unfinished.with_suffix(".json").read_bytes(), None
    assert sample.main([*trained, f"--output={output}"]) == 0
    assert output.read_bytes() == whole
    rows = images_of(output).tobytes()                        # as if it had been killed before it could tidy up
    unfinished.write_bytes(rows)
    unfinished.with_suffix(".json").write_bytes(beside)
    assert sample.main([*trained, f"--output={output}"]) == 0
    assert output.read_bytes() == whole and not unfinished.exists()


@pytest.mark.parametrize("lost", [0, 5])                      # bytes of the file's end that a crash took away
def test_an_interrupted_set_goes_on_to_the_same_bytes(trained, whole, tmp_path, monkeypatch, capsys, lost):
    output, made = tmp_path / "samples.npz", []
    real = Sampler.images

    def interrupted(self, params, numbers, labels):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(numbers)
        return real(self, params, numbers, labels)

    monkeypatch.setattr(Sampler, "images", interrupted)
    assert sample.main([*trained, f"--output={output}"]) == 130
    unfinished = partial_path(output)
    assert unfinished.stat().st_size == 8 * 8 * 8 * 3 and not output.exists()
    os.truncate(unfinished, unfinished.stat().st_size - lost)
    assert sample.main([*trained, f"--output={output}", "--seed=6"]) == 2
    assert "other seed" in capsys.readouterr().err
    monkeypatch.undo()
    assert sample.main([*trained, f"--output={output}"]) == 0
    assert f"going on from image {4 if lost else 8}" in capsys.readouterr().out
    assert output.read_bytes() == whole
    assert not unfinished.exists() and not unfinished.with_suffix(".json").exists()


def test_classes_are_drawn_taken_in_turn_or_one(trained, whole, tmp_path):
    (tmp_path / "whole.npz").write_bytes(whole)
    found = {"uniform": np.load(tmp_path / "whole.npz")["arr_1"]}
    for policy in ("balanced", "1", str(CLASSES)):
        output = tmp_path / f"{policy}.npz"
        assert sample.main([*trained, f"--classes={policy}", "--count=5", f"--output={output}"]) == 0
        found[policy] = np.load(output)["arr_1"]
    assert found["balanced"].tolist() == [0, 1, 2, 0, 1]
    assert found["1"].tolist() == [1] * 5 and found[str(CLASSES)].tolist() == [CLASSES] * 5
    assert set(found["uniform"].tolist()) == {0, 1, 2} and found["uniform"].tolist() != (np.arange(COUNT) % 3).tolist()


def test_images_of_nan_are_refused_by_number(trained, tmp_path, capsys, monkeypatch):
    place = Sampler.place
    broken = lambda self, params: jax.tree.map(lambda leaf: leaf * np.nan, place(self, params))
    monkeypatch.setattr(Sampler, "place", broken)
    assert sample.main([*trained, f"--output={tmp_path / 'x.npz'}"]) == 2
    assert "images 0, 1, 2, 3 (in all 4) came out as NaN" in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


def test_sbdm_runs_once_the_end_of_time_is_left_out(trained, tmp_path, capsys):
    arguments = [*trained, "--form=SBDM", "--count=2", f"--output={tmp_path / 'x.npz'}"]
    assert sample.main(arguments) == 2
    assert "sample_eps" in capsys.readouterr().err
    assert sample.main([*arguments, "--sample_eps=0.01"]) == 0
    assert open_samples(tmp_path / "x.npz").made_with["sample_eps"] == 0.01


@pytest.mark.parametrize("arguments, message", [
    (["--autoencoder=init:sd3-smoke"], "is another autoencoder (hash "),
    (["--classes=7"], "neither uniform nor balanced nor a class of this generator, 0 to 2"),
    (["--heads=2"], "a run says it itself"), (["--path=gvp"], "--path=gvp: of sit: and repa: files"),
    (["--eta=1"], r"--eta: this generator's process (interpolant) has no such choice; it has sampler"),
    (["--generator=maskgit:x.pth", "--prediction=noise"], "prediction cannot be said; such files have no choice of it"),
    (["--classes=first"], "--classes=first"), (["--sampler=ddpm"], "this generator's process has sde"),
    (["--count=0"], "at least 1"), (["--generator=workdir:nowhere"], "nowhere"),
    (["--output=set.npy"], "must end in .npz"), (["--evaluations=1"], "evaluations is 1"),
])
def test_what_cannot_be_made_is_refused(trained, tmp_path, capsys, arguments, message):
    assert sample.main([*trained, f"--output={tmp_path / 'x.npz'}", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


def test_an_existing_set_is_kept_unless_told_otherwise(trained, whole, tmp_path, capsys):
    output = tmp_path / "samples.npz"
    output.write_bytes(b"mine")
    assert sample.main([*trained, f"--output={output}"]) == 2
    assert output.read_bytes() == b"mine" and "--overwrite" in capsys.readouterr().err
    assert sample.main([*trained, f"--output={output}", "--overwrite"]) == 0
    assert output.read_bytes() == whole


@pytest.mark.parametrize("kind, sampler", [("dit", "ddpm"), ("sit", "sde")])
def test_a_public_file_needs_to_be_told_its_autoencoder(tmp_path, capsys, kind, sampler):
    from eqvae_jax.generators.dit import DiT
    from eqvae_jax.weights.generators import GeneratorSpec, save_generator

    out = {"dit": 8, "sit": 4}[kind]
    model = DiT(input_size=4, in_channels=4, out_channels=out, patch_size=2, width=64, depth=1, heads=1, classes=5,
                reversed_time=kind == "sit")
    x, one = np.zeros((1, 4, 4, 4), np.float32), np.zeros(1, np.int32)
    params = jax.device_get(model.init(jax.random.key(0), x, one.astype(np.float32), one)["params"])
    save_generator(f"{kind}:{tmp_path / 'model.pt'}", model, params, GeneratorSpec(kind, 5, "here", "aa"))
    arguments = [f"--generator={kind}:{tmp_path / 'model.pt'}", "--count=2", "--batch_size=2", "--evaluations=3",
                 f"--output={tmp_path / 's.npz'}"]
    assert sample.main(arguments) == 2
    assert "diffusers:stabilityai/sd-vae-ft-ema" in capsys.readouterr().err
    assert sample.main([*arguments, "--autoencoder=init:smoke", "--guidance=1.5"]) == 0
    assert images_of(tmp_path / "s.npz").shape == (2, 8, 8, 3)
    made = open_samples(tmp_path / "s.npz").made_with
    assert made["sampling"]["guidance_channels"] == 3 and made["autoencoder"]["reference"] == "init:smoke"
