"""Real processes on one machine: they train as one does, and end together whatever becomes of one of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from eqvae_jax.training.checkpoint import load_params, saved_steps

HERE = Path(__file__).parent
LIMIT = 4  # seconds without a sign of life


class Processes:
    """`count` processes of the toy run, each with `devices`, in one workdir."""

    def __init__(self, workdir, count, *options, devices=1, each=lambda k: (), start_limit=300):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        workdir.mkdir(exist_ok=True)
        self.workdir, self.running = workdir, []
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        shared = os.environ | {
            "PYTHONPATH": str(HERE.parents[1]), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags,
            "EQVAE_COORDINATOR": f"localhost:{port}", "EQVAE_PROCESSES": str(count), "EQVAE_LIMIT": str(LIMIT),
            "EQVAE_START_LIMIT": str(start_limit)}
        for k in range(count):
            command = [sys.executable, str(HERE / "toy_regression.py"), "together", str(workdir), *options, *each(k)]
            self.running.append(subprocess.Popen(command, env=shared | {"EQVAE_PROCESS": str(k)}, text=True,
                                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE))

    def at(self, step):
        """Waits until a process is about to take a step, and has saved those before."""
        deadline = time.monotonic() + 300
        while not (self.workdir / f"at_{step}").exists() or step - 1 not in saved_steps(self.workdir):
            assert time.monotonic() < deadline and all(p.poll() is None for p in self.running), self.end()
            time.sleep(0.05)
        return self

    def send(self, number, k):
        self.running[k].send_signal(number)
        return self

    def end(self, timeout=400):
        """(exit codes, standard outputs, standard errors)."""
        try:
            written = [process.communicate(timeout=timeout) for process in self.running]
        finally:
            for process in self.running:
                process.kill()
        outputs, errors = zip(*written, strict=True)
        # Gloo's own lines come from several threads, and so does what is left of them.
        own = [[line for line in out.splitlines() if line and "[Gloo]" not in line] for out in outputs]
        return [process.returncode for process in self.running], own, errors


def history(workdir):
    """{(step, split): loss or error} of a run's metrics."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], line["split"]): line.get("loss", line.get("error")) for line in lines}


def weights(workdir):
    return load_params(workdir, "ema")[0]["model"]["w"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: (workdir, exit codes, outputs, errors)} of six steps on four devices, side by side."""
    root = tmp_path_factory.mktemp("runs")
    kinds = {"one": (1, 4), "two": (2, 2), "four": (4, 1)}
    running = {name: Processes(root / name, count, devices=devices) for name, (count, devices) in kinds.items()}
    return {name: (root / name, *processes.end()) for name, processes in running.items()}


@pytest.mark.parametrize("name, count", [("two", 2), ("four", 4)])
def test_processes_learn_what_one_learns(runs, name, count):
    workdir, codes, outputs, errors = runs[name]
    assert codes == [0] * count and runs["one"][1] == [0], errors
    ours, theirs = history(workdir), history(runs["one"][0])
    assert ours.keys() == theirs.keys() and {(6, "train"), (6, "eval")} < ours.keys()
    for key in ours:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    np.testing.assert_allclose(weights(workdir), weights(runs["one"][0]), rtol=1e-5, atol=1e-6)
    assert outputs[0] == ["returned at step 6"] and not any(outputs[1:])   # one of them speaks
    assert "step 6 of 6 is saved" in errors[0] and not any("is saved" in error for error in errors[1:])


def test_what_the_first_of_them_has_written_none_of_them_does_again(runs):
    workdir = runs["two"][0]
    before = (workdir / "metrics.jsonl").read_text()
    codes, outputs, errors = Processes(workdir, 2, devices=2).end(timeout=60)
    assert codes == [0, 0] and "going on from step 6" in errors[0], errors
    assert (workdir / "metrics.jsonl").read_text() == before and (6, "eval") in history(workdir)


@pytest.mark.parametrize("victim, count, then", [(0, 2, 1), (2, 4, 2)])
def test_one_that_is_killed_ends_the_others_and_a_restart_on_fewer_goes_on_as_if_nothing_had_been(
        runs, tmp_path, victim, count, then):
    workdir = tmp_path / "run"
    processes = Processes(workdir, count, "wait_at=4", f"who={victim}", "then=wait", devices=4 // count).at(4)
    begun = time.monotonic()
    codes, _, errors = processes.send(signal.SIGKILL, victim).end()
    assert time.monotonic() - begun < 6 * LIMIT
    assert [code for k, code in enumerate(codes) if k != victim] == [75] * (count - 1)
    says = "cannot be reached" if victim == 0 else "has given no sign of life for 4 s"
    for k in set(range(count)) - {victim}:
        last = errors[k].strip().splitlines()[-1]
        assert last.startswith(f"process {victim} (") and says in last and f"process {k} (" in last
        assert "the same command on all hosts, also on fewer, goes on from there" in last
    saved = saved_steps(workdir)[-1]
    assert saved in (3, 4)
    codes, outputs, errors = Processes(workdir, then, devices=4 // then).end()
    assert codes == [0] * then and f"going on from step {saved}" in errors[0], errors
    ours, theirs = history(workdir), history(runs["one"][0])
    assert ours == pytest.approx(theirs, rel=1e-5)
    np.testing.assert_allclose(weights(workdir), weights(runs["one"][0]), rtol=1e-5, atol=1e-6)


def test_sigterm_to_one_saves_one_step_on_all_and_resuming_is_exact(runs, tmp_path):
    workdir = tmp_path / "run"
    processes = Processes(workdir, 2, "wait_at=2", "then=stop", "steps=500", devices=2).at(2)
    codes, outputs, errors = processes.send(signal.SIGTERM, 1).end()
    assert codes == [0, 0], errors
    saved = saved_steps(workdir)[-1]
    assert 2 < saved < 240 and outputs[0] == [f"returned at step {saved}"]
    assert f"stopped by preemption: step {saved} of 500 is saved" in errors[0]
    # Again, and before the first step of a run that goes on.
    processes = Processes(workdir, 2, f"wait_at={saved}", "then=stop", "steps=500", devices=2).at(saved)
    codes, outputs, errors = processes.send(signal.SIGTERM, 0).end()
    assert codes == [0, 0] and saved < saved_steps(workdir)[-1] < 480, errors
    saved = saved_steps(workdir)[-1]
    steps = saved + 2
    straight, resumed = Processes(tmp_path / "straight", 2, f"steps={steps}", devices=2), \
        Processes(workdir, 2, f"steps={steps}", devices=2)
    for processes in straight, resumed:
        assert processes.end()[0] == [0, 0]
    np.testing.assert_array_equal(weights(workdir), weights(tmp_path / "straight"))


def test_the_reason_of_one_is_told_to_the_others(tmp_path):
    codes, _, errors = Processes(tmp_path / "run", 2, "wait_at=2", "who=1", "then=raise").end()
    assert codes == [1, 1]  # which no launcher tries again
    assert "OSError: [Errno 5] the disk is on fire" in errors[1]
    assert "process 1 (" in errors[0] and "has stopped: [Errno 5] the disk is on fire" in errors[0]


def test_processes_that_were_started_differently_are_refused_before_the_first_step(tmp_path):
    codes, _, errors = Processes(tmp_path / "run", 2, each=lambda k: ["data=other"] if k == 1 else []).end()
    assert codes == [1, 1]
    for error in errors:
        assert 'data: "same" on process 0 (' in error
        assert '), but "other" on process 1 (' in error
    assert not saved_steps(tmp_path / "run")


def test_one_that_never_comes_is_missed(tmp_path):
    processes = Processes(tmp_path / "run", 2, start_limit=5)
    processes.send(signal.SIGKILL, 1)
    codes, _, errors = processes.end()
    assert codes == [1, -signal.SIGKILL]
    assert "not all processes met at localhost:" in errors[0]
    assert "within 5 s: start the command on every host" in errors[0]
