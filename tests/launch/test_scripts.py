"""What holds for every launcher: it is sound shell, explains itself, and refuses before anything is done."""

import pathlib
import shutil
import sys

import pytest
from fakes import ROOT, fake, on_path, run

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))

def test_shellcheck_finds_nothing():
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = beside if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed; it is in the test extra")
    status, printed, _ = run(shellcheck, "-x", "--shell=bash", *SCRIPTS)
    assert status == 0, printed


@pytest.mark.parametrize("script", ["tpu.sh", "slurm.sh", "colab.sh", "processes.py"])
def test_help_is_the_head_of_the_script(script):
    status, printed, _ = run(ROOT / "launch" / script, "--help")
    assert status == 0 and f"launch/{script}" in printed and "--dry-run" in printed
    assert "set -euo" not in printed and "import" not in printed


@pytest.mark.parametrize("arguments, said", [
    (["tpu.sh"], "the first argument is create"),
    (["tpu.sh", "create", "A"], "'A' is not a name"),
    (["tpu.sh", "create", "a"], "--zone=ZONE is needed"),
    (["tpu.sh", "create", "a", "--zone=z"], "--type=TYPE is needed"),
    (["tpu.sh", "create", "a", "--zone=z", "--type=v9-8"], "name it with --version"),
    (["tpu.sh", "create", "a", "--zone=z", "--type", "v4-8"], "unknown option --type"),
    (["tpu.sh", "create", "a", "--zone=z", "--type=v4-8", "--", "x"], "create takes no command"),
    (["tpu.sh", "run", "a", "--zone=z"], "there is no command"),
    (["tpu.sh", "run", "a", "--zone=z", "--bucket=b", "--", "x"], "go together"),
    (["tpu.sh", "run", "a", "--zone=z", "--bucket=b", "--mount=m", "--", "x"], "go together"),
    (["tpu.sh", "run", "a", "--zone=z", "--bucket=gs://b", "--mount=/m", "--", "x"], "without gs://"),
    (["tpu.sh", "run", "a", "--zone=z", "--", "x", "--workdir=gs://b/r"], "mount the bucket"),
    (["tpu.sh", "run", "a", "--zone=z", "--restarts=many", "--", "x"], "takes a whole number"),
    (["slurm.sh", "--", "x"], "--gpus-per-node=G is needed"),
    (["slurm.sh", "--gpus-per-node=8"], "there is no command"),
    (["slurm.sh", "--gpus-per-node=8", "--nodes=0", "--", "x"], "--nodes is at least 1"),
    (["slurm.sh", "--gpus-per-node=8", "--warn=99999", "--", "x"], "1 to 65535"),
    (["slurm.sh", "--gpus-per-node=0", "--per-gpu", "--", "x"], "--per-gpu needs"),
    (["slurm.sh", "--gpus-per-node=8", "--mounts=a:b", "--", "x"], "belongs to --container"),
    (["slurm.sh", "--gpus-per-node=8", "--", "x", "gs://b"], "directories that all nodes see"),
    (["colab.sh", "npu"], "unknown argument npu"),
    (["processes.py", "2"], "there is no command"),
    (["processes.py", "0", "--", "x"], "at least 1"),
    (["processes.py", "1", "--hosts=2", "--", "x"], "need --coordinator"),
    (["processes.py", "1", "--hosts=2", "--coordinator=localhost:1", "--", "x"], "loopback"),
    (["processes.py", "1", "--hosts=2", "--host=2", "--coordinator=h:1", "--", "x"], "0 to HOSTS - 1"),
    (["processes.py", "1", "--coordinator=h", "--", "x"], "HOST:PORT"),
    (["processes.py", "2", "--at-least=3", "--", "x"], "1 to N"),
])
def test_wrong_arguments_are_refused_before_anything_is_done(tmp_path, arguments, said):
    for tool in ("gcloud", "sbatch", "git"):
        fake(tmp_path / "bin", tool, "exit 1")
    status, _, errors = run(ROOT / "launch" / arguments[0], *arguments[1:], PATH=on_path(tmp_path / "bin"))
    assert status == 2 and said in errors
    assert not (tmp_path / "bin/log").exists()


@pytest.mark.parametrize("arguments, said", [
    (["tpu.sh", "status", "a", "--zone=z"], "gcloud is not installed: https://"),
    (["slurm.sh", "--gpus-per-node=1", "--", "x"], "sbatch is not installed: submit from"),
])
def test_a_missing_tool_is_named(tmp_path, arguments, said):
    for tool in ("bash", "env", "dirname", "mkdir"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    status, _, errors = run(ROOT / "launch" / arguments[0], *arguments[1:], PATH=tmp_path)
    assert status == 2 and said in errors
