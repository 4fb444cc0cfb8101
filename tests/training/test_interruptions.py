"""What interrupts a run costs no step: signals, kills, evaluations that fail, full disks."""

import contextlib
import os
import signal
import subprocess
import time

import jax
import pytest
import toy_regression as toy
from toy_regression import assert_same_bits, metrics_of

from eqvae_jax.training import sharding, stopping
from eqvae_jax.training.checkpoint import SaveError, saved_steps


def test_killed_while_saving_then_resumed_is_as_if_never_killed(children, uninterrupted, capsys):
    workdir, code, _, err = children["killed"]
    assert code == -signal.SIGKILL, err
    assert saved_steps(workdir) == [4]
    assert list((workdir / "checkpoints").glob("6.*")), "the process was to die with step 6 half written"
    assert [line["step"] for line in metrics_of(workdir)][-1] > 4  # lines that must not appear twice
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "split": "tr')

    state = toy.run(workdir, toy.get_config(**{"checkpoint.every": 4}))
    assert_same_bits(state, uninterrupted[1])
    assert metrics_of(workdir) == metrics_of(uninterrupted[0])
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "6"]
    assert "going on from step 4" in capsys.readouterr().err


def test_sigterm_saves_and_resumes_as_if_never_stopped(children, uninterrupted):
    workdir, code, out, err = children["signalled"]
    assert code == 0, err
    assert "returned at step 5" in out
    assert "step 5 of 6 is saved" in err and "give the same command again" in err
    assert saved_steps(workdir) == [4, 5]
    assert_same_bits(toy.run(workdir, toy.get_config(**{"checkpoint.every": 4})), uninterrupted[1])
    assert metrics_of(workdir) == metrics_of(uninterrupted[0])


@pytest.mark.parametrize("number, at_once, ends", [
    (signal.SIGINT, True, True), (signal.SIGTERM, False, True), (signal.SIGTERM, True, False)])
def test_a_second_signal_ends_at_once_but_for_one_that_a_scheduler_sends_twice(
        tmp_path, monkeypatch, number, at_once, ends):
    monkeypatch.setattr(stopping, "TWICE", 60.0 if at_once else 0.0)

    def signalled_twice(start):
        for step, batch in enumerate(toy.batches(start), start):
            if step == 1:
                for _ in range(2):
                    os.kill(os.getpid(), number)
                    time.sleep(0.05)                                   # two that wait together are one
            yield batch

    def end(*_):
        raise KeyboardInterrupt

    outside = signal.signal(number, end)                               # a shell's background jobs ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt) if ends else contextlib.nullcontext():
            toy.run(tmp_path, stream=signalled_twice)
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, outside)
    assert saved_steps(tmp_path) == ([] if ends else [2])


@pytest.mark.parametrize("number, at, code", [(signal.SIGTERM, 1, 75), (signal.SIGINT, 1, 130),
                                              (signal.SIGTERM, 5, 75)])
def test_the_exit_code_says_whether_a_launcher_is_to_go_on(tmp_path, number, at, code):
    def signalled(start):
        for step, batch in enumerate(toy.batches(start), start):
            if step == at:
                os.kill(os.getpid(), number)
            yield batch

    outside = signal.signal(number, signal.SIG_DFL)  # a shell's background jobs ignore SIGINT
    try:
        assert toy.end(tmp_path, stream=signalled)[1] == code  # in the last of 6 steps, too
    finally:
        signal.signal(number, outside)


@pytest.mark.parametrize("broken", ["eval_step", "preview"])
@pytest.mark.parametrize("ranking", ["", "error"])
def test_an_evaluation_that_fails_costs_no_step_and_is_made_up_for(tmp_path, broken, ranking):
    changes = {"training.eval_every": 3, "training.preview_every": 3, "checkpoint.every": 6}
    changes |= {"checkpoint.best_metric": ranking, "checkpoint.keep_best": 1} if ranking else {}
    config = toy.get_config(**changes)
    task = toy.make_task(config, sharding.make_mesh(config.mesh))
    real, calls = getattr(task, broken), []

    def fails(state, batch):
        if isinstance(state.step, jax.Array) and not isinstance(state.step, jax.core.Tracer):
            calls.append(int(state.step))
            if calls[-1] == 6:
                raise RuntimeError("out of memory")
        return real(state, batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        toy.run(tmp_path / "run", config, task=task._replace(**{broken: fails}))
    assert saved_steps(tmp_path / "run")[-1] == 6
    toy.run(tmp_path / "run", config)
    toy.run(tmp_path / "whole", config)
    evaluations = [[row for row in metrics_of(tmp_path / name) if row["split"] == "eval"] for name in ("run", "whole")]
    assert evaluations[0] == evaluations[1] and [row["step"] for row in evaluations[0]] == [3, 6]
    assert len(list((tmp_path / "run" / "previews").iterdir())) == 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system needs root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("changes, error, good", [
    ({"training.log_every": 0}, SaveError, "step [24]"),
    ({"training.preview_every": 5, "checkpoint.every": 5}, OSError, "none yet"),
])
def test_a_full_disk_is_explained_and_the_run_goes_on_afterwards(small_disk, changes, error, good):
    config = toy.get_config(**changes)

    def filling(start):
        for step, batch in enumerate(toy.batches(start), start):
            if step == 4:
                with open(small_disk / "filler", "wb", buffering=0) as file:
                    try:
                        while file.write(b"x" * 512):
                            pass
                    except OSError:
                        pass
            yield batch

    with pytest.raises(error, match=f"(?s)No space left on device.*last good checkpoint is {good}") as raised:
        toy.run(small_disk, config, filling)
    assert str(small_disk) in str(raised.value)
    files, before = lambda: sorted(map(str, small_disk.rglob("*"))), None
    while before != (before := files()):                               # Orbax's threads may still be at it
        time.sleep(0.5)
    (small_disk / "filler").unlink()
    config.training.log_every = 1
    assert int(toy.run(small_disk, config).step) == 6
    assert metrics_of(small_disk)[-1]["step"] == 6
