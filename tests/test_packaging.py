"""The package as people get it: a wheel that holds the configs and works in any directory."""

import configparser
import email
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml

import eqvae_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*command, cwd, **variables):
    """Runs a command away from the checkout; returns (exit status, stdout, stderr)."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    ended = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=environment)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built from a copy: building leaves files behind."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("eqvae_jax", "configs", "tests", "launch", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    status, out, err = run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                           "--no-index", "--wheel-dir", output, source, cwd=output)
    assert status == 0, out + err
    return next(output.glob("*.whl"))


@pytest.fixture(scope="session")
def eqvae(wheel, tmp_path_factory):
    """Runs the installed command in a directory: (exit status, stdout, stderr)."""
    installed = tmp_path_factory.mktemp("installed")
    status, out, err = run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target",
                           installed, wheel, cwd=installed)
    assert status == 0, out + err
    _, found, _ = run(sys.executable, "-c", "import eqvae_jax; print(eqvae_jax.__file__)", cwd=installed,
                      PYTHONPATH=str(installed))
    assert found.strip() == str(installed / "eqvae_jax/__init__.py")  # not the checkout's
    return lambda *arguments, cwd: run(installed / "bin/eqvae", *arguments, cwd=cwd, PYTHONPATH=str(installed))


def test_the_wheel_holds_the_package_and_its_configs_and_nothing_else(wheel):
    expected = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "eqvae_jax").rglob("*")
                if path.suffix == ".py" or path.name == "py.typed"}
    expected |= {f"eqvae_jax/configs/{path.name}": path for path in (ROOT / "configs").glob("*.py")}
    assert {"eqvae_jax/py.typed", "eqvae_jax/weights/pickles.py", "eqvae_jax/configs/eq_sdvae.py"} <= set(expected)
    with zipfile.ZipFile(wheel) as files:
        held = {name for name in files.namelist() if ".dist-info/" not in name}
        assert held == set(expected)
        for name, path in expected.items():
            assert files.read(name) == path.read_bytes(), name
        about = f"eqvae_jax-{eqvae_jax.__version__}.dist-info"
        metadata = email.message_from_bytes(files.read(f"{about}/METADATA"))
        entries = configparser.ConfigParser()
        entries.read_string(files.read(f"{about}/entry_points.txt").decode())
        assert files.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert dict(entries["console_scripts"]) == {"eqvae": "eqvae_jax.commands:run"}
    assert metadata["Version"] == eqvae_jax.__version__ and metadata["Requires-Python"] == ">=3.11"
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert "jax>=0.10" in needed and not any(line.startswith(("torch", "tensorflow>")) for line in needed)


def test_changelog_and_citation_are_of_this_version():
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest == citation["version"] == eqvae_jax.__version__
    paper = citation["preferred-citation"]
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Kouzelis", "Kakogeorgiou", "Gidaris", "Komodakis"]
    assert "arXiv:2502.09509" in [entry["value"] for entry in paper["identifiers"]] and paper["year"] == 2025


def test_the_files_for_github_are_forms_and_run_what_is_there():
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "config", "question", "result"]
    for form in forms:
        content = yaml.safe_load(form.read_text())
        if form.stem == "config":
            continue
        assert content["name"] and content["description"]
        fields = [field["id"] for field in content["body"]]
        assert len(set(fields)) == len(fields) and all(field["attributes"]["label"] for field in content["body"])
        if form.stem in ("bug", "result"):
            assert {"command", "config", "hardware", "versions"} <= set(fields)
            assert "eqvae --version" in form.read_text()
    job = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]
    steps = [step["run"] for step in job["steps"] if "run" in step]
    assert steps == ["launch/test.sh", ".venv/bin/ruff check ."] and job["strategy"]["matrix"]["python"][0] == "3.11"
    assert os.access(ROOT / "launch/test.sh", os.X_OK)


def test_the_installed_command_explains_itself_and_refuses_as_in_a_checkout(eqvae, tmp_path):
    status, out, _ = eqvae("train", "--help", cwd=tmp_path)
    assert status == 0 and out.startswith("usage: eqvae train ") and "configs: dit, eq_sd3vae, eq_sdvae," in out
    assert eqvae("--version", cwd=tmp_path)[1].startswith(f"eqvae_jax {eqvae_jax.__version__}\n")
    status, _, err = eqvae("train", "--config=configs/eq_sdvae.py", f"--workdir={tmp_path / 'run'}", cwd=tmp_path)
    assert status == 1 and "--config.data.train=folder:DIR" in err and "Traceback" not in err
    status, _, err = eqvae("plan", "--config=dit:XL_3", "--topology=here", cwd=tmp_path)
    assert status == 1 and "configs/dit.py has no variant 'XL_3'" in err
    status, _, err = eqvae("encode", "--output=x", cwd=tmp_path)
    assert status == 2 and "eqvae encode: error: the following arguments are required: --autoencoder, --images" in err
    assert not list(tmp_path.iterdir())


def test_the_installed_command_trains(eqvae, tmp_path):
    status, out, err = eqvae("train", "--config=configs/eq_sdvae16.py:smoke", "--workdir=run", "--config.stages={}",
                             cwd=tmp_path)
    assert status == 0, out + err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2]
    assert json.loads((tmp_path / "run/config.json").read_text())["preset"] == "sd16"
