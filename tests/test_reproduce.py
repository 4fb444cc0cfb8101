"""The door: a whole experiment in a tiny setting, its refusals, and its dry run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eqvae_jax import reproduce

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, timeout=900):
    return subprocess.run([sys.executable, "-m", "eqvae_jax.reproduce", *arguments], cwd=ROOT, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=timeout)


def test_an_experiment_from_nothing_to_a_verdict(tmp_path):
    """Figure 3 is the shortest chain with numbers: classifier, start, two arms, their evaluations."""
    found = run("--figure=3", "--scale=smoke", "--seeds=1", "--jobs=2", f"--workdir={tmp_path}")
    assert found.returncode == 0, found.stdout + found.stderr
    result = json.loads((tmp_path / "figure-3-smoke.json").read_text())
    measured = {(entry["row"], entry["column"]): entry for entry in result["numbers"]}
    assert measured["SD-VAE + EQ", "turns"]["mean"] > 0 and measured["SD-VAE + EQ", "turns"]["paper"] == 12
    assert {claim["decision"] for claim in result["claims"]} == {"undecided at this scale"}  # of one seed
    assert "| SD-VAE + EQ | 2 |" in (tmp_path / "figure-3-smoke.md").read_text()
    assert (tmp_path / "figure-3-smoke.html").exists()

    again = run("--figure=3", "--scale=smoke", "--seeds=1", f"--workdir={tmp_path}")
    assert again.returncode == 0 and "0 of 6 stages are to be done" in again.stdout


def test_a_dry_run_prints_commands_that_a_person_can_give(tmp_path, capsys):
    assert reproduce.main(["--table=8", "--scale=tiny", "--seeds=1", f"--workdir={tmp_path}", "--dry-run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python -m eqvae_jax.")]
    assert len(lines) == 20 and "--config.equivariance.p_equivariance=0.7" in "\n".join(lines)
    assert not list(tmp_path.iterdir())


def test_photographs_measure_autoencoders_alone_and_on_crops(tmp_path, capsys):
    assert reproduce.main(["--table=12", "--scale=photos", "--seeds=1", f"--workdir={tmp_path}", "--dry-run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python -m eqvae_jax.")]
    assert {line.split()[2].partition(".")[2] for line in lines} == {"main", "evaluate"}
    measured = [line for line in lines if "eqvae_jax.evaluate" in line]
    assert len(measured) == 4 and all("--crops=100 --min_crop=0.3" in line for line in measured)
    assert "--features" not in "".join(lines) and "lpips" not in "".join(lines)


@pytest.mark.parametrize("what, why", [("--table=2", "nothing"), ("--table=3", "no generators"),
                                       ("--figure=1", "no generators"), ("--figure=3", "too few images")])
def test_what_a_scale_cannot_measure_is_refused(tmp_path, capsys, what, why):
    assert reproduce.main([what, "--scale=photos", f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert why in error and what.removeprefix("--").replace("=", " ") in error and "--scale=photos" in error
    assert not list(tmp_path.iterdir())


def test_images_that_are_not_there_are_refused_before_the_first_stage(tmp_path, capsys):
    assert reproduce.main(["--table=1", f"--workdir={tmp_path}", "--images=idx:nowhere"]) == 2
    assert f"idx:{Path.cwd() / 'nowhere'}" in capsys.readouterr().err
    assert not (tmp_path / "stages").exists()


def test_images_without_splits_are_refused_and_directories_are_absolute(tmp_path, capsys):
    assert reproduce.main(["--table=1", f"--workdir={tmp_path}", f"--images=folder:{tmp_path}"]) == 2
    assert "no splits" in capsys.readouterr().err
    assert reproduce.images("idx:there") == f"idx:{Path.cwd() / 'there'}"  # one name for one data set
    assert reproduce.images("tfds:fashion_mnist") == "tfds:fashion_mnist"


@pytest.mark.parametrize("wrong", [["--seeds=0"], ["--jobs=0"]])
def test_numbers_below_one_are_refused(tmp_path, capsys, wrong):
    assert reproduce.main(["--table=1", f"--workdir={tmp_path}", *wrong]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_help_names_the_scales_and_needs_no_jax():
    code = "import sys; from eqvae_jax import reproduce; reproduce.main(['--help'])"
    found = subprocess.run([sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, text=True, capture_output=True,
                           env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "tiny: Fashion-MNIST" in found.stdout and found.returncode == 0
    assert " jax\n" not in found.stderr


def test_the_papers_images_are_variables_of_its_script(tmp_path, capsys):
    assert reproduce.main(["--table=1", "--scale=paper", f"--workdir={tmp_path}", "--images=idx:DIR"]) == 2
    assert "variables of the script" in capsys.readouterr().err and not list(tmp_path.iterdir())
