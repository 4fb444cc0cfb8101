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

from eqvae_jax.atomic import whole
from eqvae_jax.reproduction.stages import in_order

GRACE = 120.0  # seconds for the running commands to save, once they have been asked to stop
POLL = 0.2
TAIL = 12  # lines of a failed command's output


class Failed(RuntimeError):
    """A stage's command did not succeed."""


class Interrupted(Exception):
    """The run was asked to stop; what is done is kept."""


@contextlib.contextmanager
def alone(root):
    """Holds the workdir: a second run in it at the same time would do everything twice. Raises ValueError."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is at work in {root}: wait for it, or take another --workdir.") from None
        yield


def run(stages, root, jobs=1, estimate=lambda stage: None, say=print):
    """Does what is not done of the stages and of all they need; returns when all is.

    Of several jobs each gets an equal share of the CPU's cores, and one thread for each. What a command prints is in
    root/logs.

    Args:
      stages: a list of Stage. root: the workdir. jobs: commands at a time.
      estimate: stage -> seconds or None, for the time that is left. say: is told a line at every start and end.
    Raises:
      Failed: a command failed; the others have been stopped, and saved what they had. Interrupted: by a signal.
    """
    stages = in_order(stages)
    waiting = [stage for stage in stages if not stage.finished(root)]
    done = {stage.key for stage in stages} - {stage.key for stage in waiting}
    total, running, begun = len(waiting), {}, time.monotonic()
    if done:
        say(f"{len(done)} of {len(stages)} stages are done already.")
    slots = list(range(jobs))
    with _signals() as asked:
        try:
            while waiting or running:
                if asked:
                    raise Interrupted
                ready = [stage for stage in waiting if all(needed.key in done for needed in stage.inputs)]
                for stage in ready[: len(slots)]:
                    slot = slots.pop(0)
                    waiting.remove(stage)
                    running[slot] = (stage, _start(stage, root, slot, jobs), time.monotonic())
                    say(f"[{total - len(waiting)}/{total}] {stage.name} ...")
                time.sleep(POLL)
                for slot, (stage, process, started) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[slot]
                    slots.append(slot)
                    _finish(stage, process, root, time.monotonic() - started)
                    done.add(stage.key)
                    left = _left([*waiting, *(one for one, _, _ in running.values())], estimate, jobs)
                    say(
                        f"      {stage.name}: done in {as_time(time.monotonic() - started)}"
                        + (f", about {as_time(left)} left" if left else "")
                    )
        finally:
            _stop([process for _, process, _ in running.values()])
    if total:
        say(f"{total} stages in {as_time(time.monotonic() - begun)}.")


def as_time(seconds):
    """83 -> "1:23", 4000 -> "1:06:40"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _left(stages, estimate, jobs):
    known = [seconds for stage in stages if (seconds := estimate(stage)) is not None]
    return sum(known) / jobs


def _start(stage, root, slot, jobs):
    log = stage.log(root)
    log.parent.mkdir(parents=True, exist_ok=True)
    stage.folder(root).parent.mkdir(parents=True, exist_ok=True)
    cores = _cores(slot, jobs)
    environment = dict(os.environ)
    if jobs > 1 and cores and len(cores) == 1:  # one thread on one core does more than several on it
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}".strip()
    with open(log, "a") as file, _on(cores):
        file.write(f"$ {stage.as_text(root)}\n")
        file.flush()
        # A session of its own: a terminal's Ctrl-C comes here alone, and is passed on as a request to save.
        return subprocess.Popen(
            stage.command(root), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True, env=environment,
        )  # fmt: skip


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


def _finish(stage, process, root, seconds):
    from eqvae_jax.evaluation.provenance import commit

    if process.returncode:
        lines = stage.log(root).read_text(errors="replace").splitlines()[-TAIL:]
        raise Failed(
            "\n".join(
                [
                    f"{stage.name} ended with exit code {process.returncode}:",
                    *lines,
                    "",
                    f"all of it: {stage.log(root)}",
                    f"by hand: {stage.as_text(root)}",
                    "The same command goes on from here.",
                ]
            )
        )
    record = {
        "name": stage.name,
        "command": stage.as_text(root),
        "seconds": seconds,
        "work": list(stage.work),
        "commit": commit(),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with whole(stage.record(root)) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")


def _stop(processes):
    """Asks processes to save and end; kills what has not after GRACE seconds."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def _signals():
    """A list that holds the signals, SIGINT or SIGTERM, that came within the block."""
    asked = []

    def note(number, frame):
        if not asked:
            print("\nstopping: the running commands save what they have ...", file=sys.stderr, flush=True)
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
