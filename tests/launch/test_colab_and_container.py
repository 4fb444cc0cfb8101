"""The set-up of a Colab runtime, with a fake Python and GPU, and what the container's file promises."""

import re
import shlex
import shutil
import sys

import pytest
from fakes import ROOT, calls, fake, on_path, run


@pytest.fixture
def runtime(tmp_path):
    """Runs colab.sh on a runtime with this GPU (a line of nvidia-smi) or these devices, where JAX sees `seen`."""
    def start(*arguments, gpu="", device="", seen="0.10.2 cpu 1", old=0, **variables):
        path = fake(tmp_path / "bin", "python", f"""\
            case "$2" in
              *version_info*) exit {old} ;;
              *import\\ jax*) echo {shlex.quote(seen)}; [ -n {shlex.quote(seen)} ] ;;
            esac
            """)
        fake(path, "nvidia-smi", f"[ -n {shlex.quote(gpu)} ] && printf '%b\\n' {shlex.quote(gpu)}")
        (path / "log").unlink(missing_ok=True)
        if device:
            (tmp_path / "dev" / device).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "dev" / device).touch()
        status, printed, errors = run(ROOT / "launch/colab.sh", *arguments, PATH=on_path(path), PYTHON="python",
                                      DEVICES=tmp_path / "dev")
        return status, [call[-1] for call in calls(path) if "pip" in call], printed + errors

    return start


@pytest.mark.parametrize("gpu, device, extra, seen", [
    ("", "", ".", "0.10.2 cpu 1"),
    ("Tesla T4, 550.54.15", "", ".[cuda12]", "0.10.2 gpu 1"),
    ("A100, 580.82.07\nA100, 580.82.07", "", ".[cuda]", "0.10.2 gpu 2"),
    ("", "accel0", ".[tpu]", "0.10.2 tpu 8"),
    ("", "vfio/0", ".[tpu]", "0.10.2 tpu 1"),
])
def test_colab_installs_for_the_accelerator_that_is_there(runtime, gpu, device, extra, seen):
    version, backend, count = seen.split()
    status, installed, said = runtime(gpu=gpu, device=device, seen=seen)
    assert status == 0 and installed == [extra] and f"JAX {version}: {count} x {backend}" in said


def test_colab_says_what_is_wrong_with_the_runtime(runtime):
    status, installed, said = runtime("tpu", gpu="T4, 550.1")
    assert status == 2 and installed == [] and "has a gpu, not a tpu: Runtime > Change runtime type" in said
    status, installed, said = runtime(old=1)
    assert status == 2 and installed == [] and "older than 3.11" in said
    status, _, said = runtime(gpu="T4, 550.1", seen="0.10.2 cpu 1")
    assert status == 1 and "JAX runs on cpu" in said and "Restart session" in said
    status, _, said = runtime(gpu="T4, 550.1", seen="")
    assert status == 1 and "JAX did not start" in said
    status, installed, said = runtime("--dry-run", gpu="T4, 550.1")
    assert status == 0 and installed == []
    assert "python -m pip install --quiet --disable-pip-version-check --editable .\\[cuda12\\]" in said


def test_the_container_s_layers(tmp_path):
    text = (ROOT / "launch/Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    step = lambda start: next(n for n, line in enumerate(lines) if line.startswith(start))
    assert re.fullmatch(r"ARG BASE=\S+:\d+\.\d+\.\d+-slim-\w+", lines[0])  # one version, not whatever is newest
    # dependencies from setup.py and the version alone, before the code that changes every day
    order = ["COPY setup.py", "COPY eqvae_jax/__init__.py", "RUN --mount=type=cache", "COPY . .", "USER eqvae"]
    assert sorted(order, key=step) == order
    assert lines[-1].startswith("CMD") and lines[step("USER")] == "USER eqvae"
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "eqvae_jax").mkdir()
    shutil.copy(ROOT / "eqvae_jax/__init__.py", tmp_path / "eqvae_jax")
    assert "touch README.md && mkdir configs " in text
    (tmp_path / "README.md").touch()
    (tmp_path / "configs").mkdir()
    status, _, errors = run(sys.executable, "setup.py", "-q", "egg_info", cwd=tmp_path)
    assert status == 0, errors
    requires = (tmp_path / "eqvae_jax.egg-info/requires.txt").read_text()
    assert requires.startswith("jax>=") and all(f"[{extra}]" in requires for extra in ("cuda", "cuda12", "tpu"))
    ignored = (ROOT / "launch/Dockerfile.dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)
    assert not {"launch", "configs", "eqvae_jax", "setup.py"} & set(ignored)
