"""How a run ends before its last step: asked to by a signal, or because the updates are no longer finite."""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils

from eqvae_jax import distributed

TWICE = 2.0  # seconds within which two SIGTERM are one
# JAX stops all processes at the number after the highest that any has asked with, and never at one that is passed over:
# a notice that comes before a resumed run's first step, or between two stages, needs numbers that go on from 0.
_ASKED = itertools.count()


class Diverged(RuntimeError):
    """Too many updates in a row were not finite."""


class StopRequest:
    """Inside `with`, the first SIGTERM or SIGINT asks the loop to stop; a second one ends the process at once.

    But for a second SIGTERM right behind the first: some schedulers send theirs to a job and to each of its processes.

    In a run of several processes the signals are left to jax.distributed, which tells all hosts the same step
    to stop at: a handler of our own would replace its own, and one host stopping alone would hang the others.
    """

    def __init__(self, say):
        """say: prints a line."""
        self._say = say
        self._previous, self._first = {}, None
        self.reason = ""

    def __enter__(self):
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive)
                              for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _receive(self, number, _):
        if self._first is None:
            self._first, self.reason = time.monotonic(), signal.Signals(number).name
            self._say(f"{self.reason}: finishing this step and saving; send it again to stop at once")
        elif number != signal.SIGTERM or time.monotonic() - self._first > TWICE:
            self.__exit__()  # so that it has its usual effect
            os.kill(os.getpid(), number)

    def pending(self):
        """Tells whether a signal has come to this process; always False with several processes."""
        return bool(self.reason)

    def code(self):
        """The exit code: 0 if nothing asked to stop, 130 after Ctrl-C, else RESTART, for launchers to go on."""
        return {"": 0, "SIGINT": 130}.get(self.reason, distributed.RESTART)

    def requested(self):
        """Tells whether to stop after this step, the same on all processes, which must ask at every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_ASKED)):
            self.reason = "preemption"
        return bool(self.reason)


@contextlib.contextmanager
def ended_by_sigterm(advice):
    """Inside `with`, SIGTERM ends the program at once, by SystemExit with RESTART: there are no steps to save.

    Of several processes the one that gets it ends the others too: JAX would only note it for the next step.
    advice: what to say then.
    """
    def end(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may come twice, and must not interrupt the end
        print(f"SIGTERM: stopped; {advice}", file=sys.stderr)
        distributed.because("SIGTERM")
        raise SystemExit(distributed.RESTART)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def check_health(state, step, max_skipped, checkpoints):
    """Returns how many updates the run has skipped so far.

    Raises Diverged after `max_skipped` in a row, without saving, and RuntimeError where the state is not at
    `step`.
    """
    at, skipped, in_a_row = map(int, jax.device_get((state.step, state.skipped, state.skipped_in_a_row)))
    if at != step:
        raise RuntimeError(f"after step {step} the state says {at}; train_step must advance state.step by "
                           "one")
    if in_a_row >= max_skipped:
        checkpoints.wait()
        raise Diverged(
            f"{in_a_row} updates in a row up to step {step} were not finite (config.training.max_skipped = "
            f"{max_skipped}). The last good checkpoint is {checkpoints.describe_last_good()} in "
            f"{checkpoints.directory}. Look at the metrics just before; a lower learning rate, a longer "
            "warm-up, a clip_norm or float32 compute are the usual cures")
    return skipped
