"""Stages are run in order, kept, and gone on with: with small programs in the place of this project's doors."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from eqvae_jax.reproduction import running
from eqvae_jax.reproduction.stages import Output, Stage

# What stands in for the doors: writes its input's text and its own into its folder, or does as its words say.
DOOR = textwrap.dedent("""
    import os, pathlib, sys, time
    *words, last = sys.argv[1:]
    folder = pathlib.Path(last.removeprefix("--output="))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "runs", "a") as file:
        file.write("x")
    texts = [pathlib.Path(w.removeprefix("--of="), "text").read_text() for w in words if w.startswith("--of=")]
    if "--wait" in words:
        (folder / "begun").write_text(str(os.getpid()))
        time.sleep(60)
    if "--fail" in words:
        sys.exit("this cannot work")
    (folder / "metrics.json").touch()
    (folder / "text").write_text("+".join([*texts, *(w for w in words if not w.startswith("--"))]))
""")


@pytest.fixture
def doors(tmp_path, monkeypatch):
    """Every door is the program above."""
    path = tmp_path / "door.py"
    path.write_text(DOOR)

    def command(self, root):
        arguments = [a.form.format(a.stage.result(root)) if isinstance(a, Output) else a for a in self.arguments]
        return [sys.executable, str(path), *arguments, f"--output={self.folder(root)}"]

    monkeypatch.setattr(Stage, "command", command)


def chain():
    first = Stage("first", "evaluate", ("a",))
    second = Stage("second", "evaluate", ("b", Output(first, "--of={}")))
    third = Stage("third", "evaluate", ("c", Output(first, "--of={}"), Output(second, "--of={}")))
    return first, second, third


def text(stage, root):
    return (stage.folder(root) / "text").read_text()


def runs(stage, root):
    return len((stage.folder(root) / "runs").read_text())


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_are_handed_on_and_kept(doors, tmp_path, jobs):
    first, second, third = chain()
    said = []
    running.run([third], tmp_path / "root", jobs, say=said.append)
    assert text(third, tmp_path / "root") == "a+a+b+c"
    record = json.loads(third.record(tmp_path / "root").read_text())
    assert record["name"] == "third" and record["seconds"] > 0 and record["commit"]
    running.run([third, second], tmp_path / "root", jobs, say=said.append)
    assert [runs(stage, tmp_path / "root") for stage in (first, second, third)] == [1, 1, 1]
    assert said[-1] == "3 of 3 stages are done already."


def test_a_failure_is_told_and_keeps_only_what_needs_it_from_being_done(doors, tmp_path):
    first, _, third = chain()
    broken = Stage("broken", "evaluate", ("--fail", Output(first, "--of={}")))
    after = Stage("after", "evaluate", ("z", Output(broken, "--of={}")))
    said = []
    assert running.run([after, third], tmp_path, say=said.append) == [broken]
    told = next(line for line in said if "exit code" in line)
    for part in ("broken ended with exit code 1", "this cannot work", str(broken.log(tmp_path)), "--fail"):
        assert part in told
    assert third.finished(tmp_path) and not broken.finished(tmp_path) and not after.folder(tmp_path).exists()
    assert running.run([after], tmp_path, say=said.append) == [broken] and runs(broken, tmp_path) == 2


def test_a_record_sums_all_attempts(doors, tmp_path):
    stage = Stage("a", "evaluate", ("a",))
    stage.attempts(tmp_path).parent.mkdir(parents=True)
    stage.attempts(tmp_path).write_text('{"commit": "before"}\n{"seconds": 1000.0}\n{"commit": "before"}\n')
    running.run([stage], tmp_path, say=lambda line: None)
    record = json.loads(stage.record(tmp_path).read_text())
    assert record["attempts"] == 3 and 1000 < record["seconds"] < 1100
    assert record["commit"].startswith("before, ") and record["commit"].count("before") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_commands_and_is_told(doors, tmp_path, number):
    before = signal.signal(number, signal.SIG_DFL)  # where the tests run in the background some are ignored
    stage = Stage("waits", "evaluate", ("--wait",))
    begun = stage.folder(tmp_path) / "begun"

    def interrupt():
        while not (begun.exists() and begun.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(running.Interrupted) as stop:
        running.run([stage], tmp_path, say=lambda line: None)
    assert stop.value.code == (130 if number == signal.SIGINT else 75)
    assert len(stage.attempts(tmp_path).read_text().splitlines()) == 2
    thread.join()
    with pytest.raises(ProcessLookupError):  # it was waited for, so that its number is free
        os.kill(int(begun.read_text()), 0)
    assert not stage.finished(tmp_path)
    assert signal.signal(number, before) == signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so(doors, tmp_path):
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stage = Stage("a", "evaluate", ("a",))
        running.run([stage], tmp_path, say=lambda line: os.kill(os.getpid(), signal.SIGHUP))
        assert stage.finished(tmp_path) and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_finished_file_is_a_finished_stage(doors, tmp_path):
    """Killed between a door's end and the record: its file appears whole or not at all, so it is done."""
    stage = Stage("a", "evaluate", ("a",))
    stage.folder(tmp_path).mkdir(parents=True)
    assert not stage.finished(tmp_path)
    (stage.folder(tmp_path) / "metrics.json").write_text("{}")
    assert stage.finished(tmp_path)
    training = Stage("a", "main", ("--config=configs/sit.py:smoke",))  # whose folder does not say
    training.folder(tmp_path).mkdir()
    assert not training.finished(tmp_path)
    training.record(tmp_path).write_text("{}")
    assert training.finished(tmp_path)
    training.folder(tmp_path).rmdir()
    assert not training.finished(tmp_path)


def test_two_runs_in_one_workdir_are_refused(tmp_path):
    with running.alone(tmp_path):
        code = ("from eqvae_jax.reproduction import running\n"
                f"with running.alone({str(tmp_path)!r}): pass")
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode and "another run, or" in other.stderr
    with running.alone(tmp_path):
        pass


def test_what_a_killed_run_left_behind_keeps_others_out(doors, tmp_path):
    stage = Stage("waits", "evaluate", ("--wait",))
    with running.alone(tmp_path) as lock:
        command = running._start(stage, tmp_path, 0, 1, lock)
    try:
        with pytest.raises(ValueError, match="left behind"), running.alone(tmp_path):
            pass
    finally:
        command.process.kill()
        command.process.wait()
    with running.alone(tmp_path):
        pass


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (83, "1:23"), (4000, "1:06:40")])
def test_times_read_as_clocks(seconds, text):
    assert running.as_time(seconds) == text


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_jobs_share_the_cores_and_leave_ours_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Stage, "command", lambda self, root: [
        sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)), os.environ.get('XLA_FLAGS', ''))"])
    ours, stages = os.sched_getaffinity(0), [Stage(name, "evaluate", (name,)) for name in "ab"]
    running.run(stages, tmp_path, jobs=2, say=lambda line: None)
    printed = [stage.log(tmp_path).read_text().splitlines()[-1] for stage in stages]
    shares = [set(json.loads(line[: line.index("]") + 1])) for line in printed]
    assert not shares[0] & shares[1] and shares[0] | shares[1] == ours == os.sched_getaffinity(0)
    assert ("intra_op_parallelism_threads=1" in printed[0]) == (len(ours) == 2)
