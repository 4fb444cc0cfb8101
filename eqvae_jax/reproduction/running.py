"""Runs stages, several at a time, each in a process of its own; keeps what is done, and goes on from there."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from eqvae_jax.atomic import whole
from eqvae_jax.distributed import RESTART
from eqvae_jax.reproduction.stages import Stage, in_order

GRACE = 120.0  # seconds for the running commands to save, once they have been asked to stop
POLL = 0.2
TAIL = 12  # lines of a failed command's output


class Interrupted(Exception):
    """The run was asked to stop, by the signal `number`; what is done is kept."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        # As a training's: a launcher is to go on, but not after Ctrl-C.
        self.code = 130 if number == signal.SIGINT else RESTART


@contextlib.contextmanager
def alone(root):
    """Holds the workdir; yields the file that does. A second run would write the same files. Raises ValueError.

    Whoever inherits the file holds it too: commands that outlive this process, when it is killed, keep others out.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run, or a command that a killed one left behind, is at work in {root}: wait for it, or take "
                "another --workdir."
            ) from None
        yield file


def run(stages, root, jobs=1, estimate=lambda stage: None, say=print, lock=None):
    """Does what is not done of the stages and of all they need; returns the stages whose commands failed.

    What needs a failed stage is left undone, and all else is done. Of several jobs each gets an equal share of the
    CPU's cores. What a command prints is in root/logs.

    Args:
      stages: a list of Stage. root: the workdir. jobs: commands at a time. lock: the file of `alone`.
      estimate: stage -> seconds or None, for the time that is left. say: is told a line at every start and end.
    Raises:
      Interrupted: by a signal; the running commands have saved what they had.
    """
    stages = in_order(stages)
    waiting = [stage for stage in stages if not stage.finished(root)]
    done = {stage.key for stage in stages} - {stage.key for stage in waiting}
    total, running, failed, begun = len(waiting), {}, [], time.monotonic()
    if done:
        say(f"{len(done)} of {len(stages)} stages are done already.")
    slots = list(range(jobs))
    with _signals() as asked:
        try:
            while True:
                if asked:
                    raise Interrupted(asked[0])
                ready = [stage for stage in waiting if all(needed.key in done for needed in stage.inputs)]
                for stage in ready[: len(slots)]:
                    slot = slots.pop(0)
                    waiting.remove(stage)
                    running[slot] = _start(stage, root, slot, jobs, lock)
                    say(f"[{total - len(waiting)}/{total}] {stage.name} ...")
                if not running:
                    break
                time.sleep(POLL)
                for slot, command in list(running.items()):
                    if command.process.poll() is None:
                        continue
                    del running[slot]
                    slots.append(slot)
                    stage, seconds = command.stage, _ended(command, root)
                    if command.process.returncode:
                        failed.append(stage)
                        say(_failure(command, root))
                        continue
                    _record(command, root)
                    done.add(stage.key)
                    left = _left([*waiting, *(other.stage for other in running.values())], estimate, jobs)
                    rest = f", about {as_time(left)} left" if left else ""
                    say(f"      {stage.name}: done in {as_time(seconds)}{rest}")
        finally:
            _stop([command.process for command in running.values()], asked)
            for command in running.values():
                _ended(command, root)
    if total:
        say(f"{total - len(waiting) - len(failed)} stages in {as_time(time.monotonic() - begun)}.")
    return failed


def as_time(seconds):
    """83 -> "1:23", 4000 -> "1:06:40"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _left(stages, estimate, jobs):
    known = [seconds for stage in stages if (seconds := estimate(stage)) is not None]
    return sum(known) / jobs


class Command(NamedTuple):
    """A stage's command at work."""

    stage: Stage
    process: subprocess.Popen
    started: float


def _start(stage, root, slot, jobs, lock):
    from eqvae_jax.evaluation.provenance import commit

    log = stage.log(root)
    log.parent.mkdir(parents=True, exist_ok=True)
    stage.folder(root).mkdir(parents=True, exist_ok=True)
    cores, environment = _cores(slot, jobs), dict(os.environ)
    if jobs > 1:
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / jobs:.2f}")  # of a GPU that they share
    if cores and len(cores) == 1:  # one thread on one core does more than several on it
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}".strip()
    with open(log, "a") as file, _on(cores):
        file.write(f"$ {stage.as_text(root)}\n")
        file.flush()
        process = subprocess.Popen(
            stage.command(root), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            # A session of its own: a terminal's Ctrl-C comes here alone, and is passed on as a request to save.
            start_new_session=True, pass_fds=(lock.fileno(),) if lock else (),
        )  # fmt: skip
    _note(stage, root, {"commit": commit()})
    return Command(stage, process, time.monotonic())


def _cores(slot, jobs):
    """The slot's share of this process's cores; None where the system cannot say, or there is one job."""
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs] or [cores[slot % len(cores)]]


@contextlib.contextmanager
def _on(cores):
    """Puts this thread on some cores for a moment, for a process that is started to inherit."""
    before = cores and os.sched_getaffinity(0)
    try:
        if cores:
            os.sched_setaffinity(0, cores)
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, before)


def _failure(command, root):
    stage = command.stage
    lines = stage.log(root).read_text(errors="replace").splitlines()[-TAIL:]
    return "\n".join([
        f"\n{stage.name} ended with exit code {command.process.returncode}:", *lines, "",
        f"all of it: {stage.log(root)}", f"by hand: {stage.as_text(root)}", "",
    ])  # fmt: skip


def _note(stage, root, line):
    """Adds to the stage's attempts: a line with the commit where one starts, and one with its seconds where it ends."""
    with open(stage.attempts(root), "a") as file:
        file.write(json.dumps(line) + "\n")


def _ended(command, root):
    """Notes that a command has ended; returns its seconds."""
    seconds = time.monotonic() - command.started
    _note(command.stage, root, {"seconds": seconds})
    return seconds


def _record(command, root):
    """Writes down how a stage was made. One of several attempts lacks the seconds of those that were killed with us."""
    stage = command.stage
    lines = [json.loads(line) for line in stage.attempts(root).read_text().splitlines()]
    commits = [str(line["commit"]) for line in lines if "commit" in line]
    record = {
        "name": stage.name, "command": stage.as_text(root), "work": list(stage.work), "attempts": len(commits),
        "seconds": sum(line.get("seconds", 0.0) for line in lines), "commit": ", ".join(dict.fromkeys(commits)),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip
    with whole(stage.record(root)) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")


def _stop(processes, asked):
    """Asks processes to save and end; kills what has not after GRACE seconds, or when asked a second time."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline or len(asked) > 1:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        time.sleep(POLL)


@contextlib.contextmanager
def _signals():
    """A list that holds the signals that ask to stop, and came within the block."""
    asked = []

    def note(number, frame):
        if not asked:
            text = "\nstopping: the running commands save what they have ... (once more: at once, without)"
            print(text, file=sys.stderr, flush=True)
        asked.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
