"""Slurm: what is submitted, and what the job makes of the end of its command. Slurm itself is a fake."""

import os
import signal
import subprocess

import pytest
from fakes import HOSTILE, ROOT, calls, fake, on_path, run, until


def test_slurm_submits_what_it_shows(tmp_path):
    logs = str(tmp_path / "l")
    arguments = ["--gpus-per-node=8", "--nodes=4", "--partition=p q", "--sbatch=--qos=$x", f"--logs={logs}",
                 "--container=im age", "--mounts=/a:/b", "--", "python", *HOSTILE]
    expected = ["sbatch", "--job-name=eqvae", "--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=64",
                "--time=24:00:00", "--signal=B:USR1@300", "--requeue", "--open-mode=append", f"--output={logs}/%j.log",
                f"--chdir={ROOT}", "--gpus-per-node=8", "--qos=$x", "--partition=p q", "launch/slurm_job.sh",
                "--gpus=8", "--requeues=50", "--restarts=3", f"--logs={logs}", "--container=im age", "--mounts=/a:/b",
                "--", "python", *HOSTILE]
    status, shown, _ = run(ROOT / "launch/slurm.sh", "--dry-run", *arguments, PATH="/usr/bin:/bin")
    assert status == 0 and len(shown.splitlines()) == 2 and not (tmp_path / "l").exists()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text('#!/bin/bash\nprintf "%s\\0" sbatch "$@"\n')  # any character but NUL
    (tmp_path / "bin/sbatch").chmod(0o755)
    path = on_path(tmp_path / "bin")
    for printed in (run(ROOT / "launch/slurm.sh", *arguments, PATH=path)[1],
                    run("bash", "-c", shown, PATH=path)[1]):  # shown lines can be pasted
        assert printed.split("\0")[:-1] == expected
    assert (tmp_path / "l").is_dir()


def test_slurm_gives_each_gpu_a_task_or_none_if_asked():
    dry = [ROOT / "launch/slurm.sh", "--dry-run"]
    per_gpu = run(*dry, "--per-gpu", "--gpus-per-node=4", "--cpus-per-gpu=3", "--", "x")[1]
    assert "--ntasks-per-node=4 --cpus-per-task=3 " in per_gpu and "--per-gpu -- x" in per_gpu
    none = run(*dry, "--gpus-per-node=0", "--", "x")[1]
    assert "--ntasks-per-node=1 --cpus-per-task=8 " in none and "gpus-per-node" not in none


@pytest.fixture
def job(tmp_path):
    """Runs slurm_job.sh with a fake srun: each of its lines is `CODE [CODE OF A TASK ...]`, or wait, until scancel."""
    path = fake(tmp_path / "bin", "srun", """\
        env | grep -E '^(JAX_LOCAL|SRUN_)' | sort >"$here/env"
        set -- $(next ends)
        if [ "$1" = wait ]; then
          touch "$here/waits"
          until [ -e "$here/cancelled" ]; do sleep 0.05; done
          rm "$here/cancelled" "$here/waits"
          exit "$2"
        fi
        code=$1; shift
        for task in "$@"; do echo "srun: error: n1: task 1: Exited with exit code $task" >&2; done
        exit "$code"
        """)
    fake(path, "scancel", 'touch "$here/cancelled"')
    fake(path, "scontrol", "")
    (tmp_path / "logs").mkdir()
    (tmp_path / "launch").symlink_to(ROOT / "launch")

    def start(ends, *options, then=None, requeued=0):
        (path / "ends").write_text("\n".join(ends) + "\n")
        process = subprocess.Popen(
            [ROOT / "launch/slurm_job.sh", "--requeues=2", "--restarts=2", f"--logs={tmp_path / 'logs'}", *options,
             "--", "train", *HOSTILE], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PATH": on_path(path), "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[0-1]",
                              "SLURM_CPUS_PER_TASK": "6", "SLURM_RESTART_COUNT": str(requeued), "EQVAE_PAUSE": "0"})
        if then:
            until((path / "waits").exists)
            process.send_signal(then)
        errors = process.communicate(timeout=20)[1]
        log = (path / "log").read_text().splitlines()
        return process.returncode, [line.split()[0] for line in log], errors

    start.path = path
    return start


def test_slurm_job_runs_the_command_itself_on_every_node_with_all_its_gpus(job):
    status, done, _ = job(["0"], "--gpus=4")
    assert status == 0 and done == ["srun"]
    assert calls(job.path) == [["srun", "--kill-on-bad-exit=1", "train", *HOSTILE]]
    assert (job.path / "env").read_text() == "JAX_LOCAL_DEVICE_IDS=0,1,2,3\nSRUN_CPUS_PER_TASK=6\n"


def test_slurm_job_leaves_a_task_a_gpu_to_jax_and_enters_a_container(job, tmp_path):
    assert job(["0"], "--gpus=4", "--per-gpu", "--container=i", "--mounts=/a:/b")[0] == 0
    assert "JAX" not in (job.path / "env").read_text()
    assert (job.path / "log").read_text().startswith(
        f"srun --kill-on-bad-exit=1 --container-image=i --container-workdir={tmp_path} "
        f"--container-mounts={tmp_path}:{tmp_path}\\,/a:/b train ")
    assert job(["0"], "--container=i")[0] == 0
    assert f"--container-mounts={tmp_path}:{tmp_path} train" in (job.path / "log").read_text()


@pytest.mark.parametrize("ends, status, times", [
    (["75 75", "137 75", "0"], 0, 3),  # lost nodes: again
    (["75 75 1", "0"], 1, 1),          # 75 is the highest code, 1 the one that matters
    (["2 2", "0"], 2, 1),
    (["130", "0"], 130, 1),
    (["75"], 75, 3),                   # at most two restarts
])
def test_slurm_job_restarts_what_another_try_may_mend(job, ends, status, times):
    assert job(ends)[:2] == (status, ["srun"] * times)


def test_slurm_job_saves_and_requeues_before_its_time_is_up_but_not_for_ever(job):
    status, done, errors = job(["wait 0"], then=signal.SIGUSR1)
    assert status == 0 and done == ["srun", "scancel", "scontrol"] and "time is up: requeued" in errors
    assert calls(job.path)[1:] == [["scancel", "--signal=TERM", "77"], ["scontrol", "requeue", "77"]]
    (job.path / "log").unlink()
    status, done, errors = job(["wait 0"], then=signal.SIGUSR1, requeued=2)
    assert status == 2 and done == ["srun", "scancel"] and "2 requeues were allowed" in errors


def test_slurm_job_that_is_cancelled_or_failed_is_not_requeued(job):
    assert job(["wait 0"], then=signal.SIGTERM)[:2] == (0, ["srun", "scancel"])
    assert job(["wait 1"], then=signal.SIGUSR1)[:2] == (1, ["srun", "scancel"] * 2)
