"""The command as a user meets it: what it refuses and how, what it writes, how it goes on."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from eqvae_jax import main
from eqvae_jax.training.checkpoint import load_params

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "configs"))
import eq_sdvae  # noqa: E402


def command(*arguments):
    """Runs the command; returns (exit status, what it printed, seconds)."""
    begun = time.monotonic()
    ended = subprocess.run([sys.executable, "-m", "eqvae_jax.main", *arguments], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(ROOT)})
    return ended.returncode, ended.stdout + ended.stderr, time.monotonic() - begun


def single(steps=4):
    """One training of the smoke variant, without its stages."""
    config = eq_sdvae.get_config("smoke")
    config.stages = {}
    config.training.steps = steps
    return config


def test_the_full_recipe_without_data_says_what_to_get_at_once(tmp_path):
    status, printed, seconds = command("--config=configs/eq_sdvae.py", f"--workdir={tmp_path}")
    assert status == 1 and "Traceback" not in printed
    for needed in ("--config.data.train=folder:DIR", "--config.init=diffusers:", "--config.data.train=photos"):
        assert needed in printed
    assert seconds < 5 or os.getloadavg()[0] > 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag, message", [
    ("--config.trainig.steps=3", 'Did you mean "training"'),
    ("--config.training.stepz=3", 'Did you mean "steps"'),
    ("--config.training.steps=many", "invalid literal for int"),
])
def test_a_mistyped_flag_is_named(tmp_path, flag, message):
    status, printed, _ = command("--config=configs/eq_sdvae.py:smoke", f"--workdir={tmp_path}", flag)
    assert status != 0 and message in printed and "Traceback" not in printed


@pytest.mark.parametrize("change, message", [
    (lambda c: c.loss.update(perceptual_weight=1.0), None),
    (lambda c: c.update(init="workdir:nowhere"), "nowhere"),
    (lambda c: c.update(init="init:larger"), "no such preset"),
    (lambda c: c.data.update(train="folder:nowhere"), "nowhere"),
    (lambda c: c.data.update(image_size=33), "multiple of 2"),
    (lambda c: c.equivariance.update(p_equivariance=1.5), "probability"),
    (lambda c: c.training.update(accumulate=0), "at least 1"),
    (lambda c: c.model.update(dtype="float33"), "float33"),
])
def test_what_cannot_work_is_refused_before_anything_is_compiled(tmp_path, monkeypatch, change, message):
    config = single()
    change(config)
    monkeypatch.setattr("eqvae_jax.training.loop.train", lambda *_: pytest.fail("training began") if message else FakeState())
    if message is None:  # random weights: the perceptual loss is off, and that is recorded
        main.train(config, tmp_path)
        assert config.loss.perceptual_weight == 0.0
        config = single()
        config.loss.perceptual_weight, config.init = 1.0, "ldm:file.ckpt"
        message = "--config.loss.lpips_weights"
    with pytest.raises((ValueError, OSError, RuntimeError), match=message):
        main.train(config, tmp_path)


class FakeState:
    step = 10**9


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The whole smoke variant, once: three trainings, comparison, report."""
    workdir = tmp_path_factory.mktemp("smoke")
    assert main.train_stages(eq_sdvae.get_config("smoke"), workdir) == 0
    return workdir


def test_stages_end_in_a_table_a_report_and_pictures(smoke, capsys):
    document = json.loads((smoke / "metrics.json").read_text())
    assert set(document["results"]) == {"before", "control", "eq"}
    page = (smoke / "report.html").read_text()
    assert "data:image/png;base64," in page and "control" in page
    for stage in ("before", "control", "eq"):
        rows = [json.loads(line) for line in (smoke / stage / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2]
        assert any((smoke / stage / "tensorboard").iterdir())
    pngs = {path.stem for path in smoke.glob("*.png")}
    assert {"tau_1", "latent_pca", "reconstruction"} <= pngs


def test_fine_tuning_starts_from_the_stage_before(smoke):
    before, config, step = load_params(smoke / "before", "params")
    assert step == 2 and config["autoencoder"]["multipliers"] == [1, 2]
    control = json.loads((smoke / "control" / "config.json").read_text())
    assert control["init"] == f"workdir:{smoke}/before" and control["data"]["batch_size"] == 2


def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main.train(single(6), whole)
    flags = ["--config=configs/eq_sdvae.py:smoke", f"--workdir={parts}", "--config.checkpoint.every=4",
             "--config.training.steps=1000000"]
    code = ("import sys; sys.path.insert(0, 'configs'); import eq_sdvae; from eqvae_jax import main; "
            "c = eq_sdvae.get_config('smoke'); c.stages = {}; c.training.steps = 10**6; c.checkpoint.every = 4; "
            f"main.train(c, {str(parts)!r})")
    victim = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not (parts / "checkpoints" / "4").is_dir() and victim.poll() is None:
        time.sleep(0.02)
    victim.kill()
    victim.wait()
    for later in (parts / "checkpoints").glob("[0-9]*"):
        if later.name.isdigit() and int(later.name) > 4:  # it may have been quick: go on from 4 all the same
            __import__("shutil").rmtree(later)
    main.train(single(6), parts)
    states = [load_params(workdir, "params")[0] for workdir in (whole, parts)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    rows = [[{k: v for k, v in json.loads(line).items() if "second" not in k} for line in
             (workdir / "metrics.jsonl").read_text().splitlines()] for workdir in (whole, parts)]
    assert rows[0] == rows[1] and len(flags) == 4


def test_every_config_field_is_read(tmp_path, monkeypatch):
    """A field that nothing reads would be a promise the program does not keep."""
    from ml_collections import ConfigDict

    config = single(2)
    config.loss.update(disc_weight=0.5, disc_layers=1, disc_width=4)
    read, names = set(), {}

    def walk(section, prefix):
        names[id(section)] = prefix
        for key in section:
            value = dict.__getitem__(section._fields, key)
            if isinstance(value, ConfigDict):
                walk(value, f"{prefix}{key}.")

    walk(config, "")
    original = ConfigDict.__getitem__

    def recording(self, key):
        if id(self) in names:
            read.add(names[id(self)] + str(key))
        return original(self, key)

    monkeypatch.setattr(ConfigDict, "__getitem__", recording)
    # Written out for the record: not a reader.
    monkeypatch.setattr("eqvae_jax.training.workdir.resolved", lambda config: {})
    main.train(config, tmp_path)
    monkeypatch.undo()
    leaves = {prefix + key for section_id, prefix in names.items() for key in _keys(config, prefix)}
    unread = {leaf for leaf in leaves if leaf not in read} - {"stages", "autoencoder"}
    assert not unread, sorted(unread)


def _keys(config, prefix):
    for name in prefix.split(".")[:-1]:
        config = config[name]
    return list(config.keys())
