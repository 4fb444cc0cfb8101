"""The processes of one program, seen from one of them: signs of life, barriers with time limits, and a common end."""

import json
import os
import re
import sys
import threading
import time
from collections import Counter

RESTART = 75  # sysexits' EX_TEMPFAIL: another process was lost; the same command goes on
UNREACHABLE = "{}, which keeps the others together, cannot be reached"
LAST = 24 * 3600.0  # seconds that finished processes wait for the others, which are alive
# What collectives raise where the process at the other end is gone; the watch then says which it was.
_BROKEN = re.compile("Gloo|NCCL|RCCL|UNAVAILABLE:|DEADLINE_EXCEEDED:|coordination service|heartbeat|"
                     "Connection (reset|closed) by peer")

joined = None  # the Group of this process, once there is one


class Group:
    """The processes of this program, seen from one of them."""

    def __init__(self, client, count, index, limit):
        self.client, self.count, self.index, self.limit = client, count, index, limit
        self.every = min(1.0, limit / 10)  # seconds between signs of life
        self.hosts = {}
        self.reason = ""  # of an end that is near
        self.code, self.say = None, ""  # of one that has begun
        self._calls = Counter()  # a barrier's name can be used once
        self._leaving = threading.Event()
        self._lock = threading.Lock()

    def name(self, index):
        """ "process 3 (node-b)". """
        return f"process {index} ({self.hosts.get(index, 'its host is not known')})"

    def put(self, key, value):
        self.client.key_value_set(f"eqvae_jax/{key}/{self.index}", json.dumps(value), allow_overwrite=True)

    def all(self, key):
        """{process: value} of those that have put one."""
        found = self.client.key_value_dir_get(f"eqvae_jax/{key}/")
        return {int(name.rpartition("/")[2]): json.loads(value) for name, value in found}

    def barrier(self, name, limit):
        """Waits for all processes; raises RuntimeError, naming those that did not come within `limit` seconds."""
        self._calls[name] += 1
        key = f"met/{name}/{self._calls[name]}"
        self.put(key, True)
        errors = []

        def wait():
            try:
                self.client.wait_at_barrier(f"eqvae_jax/{key}", int(1000 * limit))
            except Exception as error:  # jaxlib's, of several types
                errors.append(error)

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        while waiting.is_alive():
            waiting.join(1.0)  # not in one go, so that this thread sees signals
        for error in errors:
            missing = [self.name(k) for k in range(self.count) if k not in self.all(key)]
            if not missing:
                raise error
            raise RuntimeError(f"{', '.join(missing)} did not come to {name!r} within {limit:.0f} s") from error

    def watch(self):
        """Begins to give signs of life and to look for those of the others."""
        self._polled = time.monotonic()
        for work in self._watch, self._watch_the_watch:
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def _watch(self):
        beat, turn, seen = 0, time.monotonic(), {k: (None, time.monotonic()) for k in range(self.count)
                                                 if k != self.index}
        while not self._leaving.wait(self.every):
            beat += 1
            try:
                self.put("life", beat)
                life, ended = self.all("life"), self.all("ended")
            except Exception:  # of a service that is gone
                return self.lose(UNREACHABLE.format(self.name(0)), tell=False)
            now = self._polled = time.monotonic()
            if now - turn > 4 * self.every:  # this process stood still itself, and has not listened
                seen = {k: (None, now) for k in seen}
            turn = now
            for k, (last, when) in seen.items():
                if end := ended.get(k):
                    # What a person must mend is not to be tried again on the other hosts.
                    self.lose(end["reason"], code=end["code"] if end["code"] in (1, 2, 130) else RESTART)
                elif life.get(k) != last:
                    seen[k] = life[k], now
                elif now - when > self.limit:
                    self.lose(f"{self.name(k)} has given no sign of life for {self.limit:.0f} s")

    def _watch_the_watch(self):
        """Asking process 0 has no time limit where its host hangs or has lost power."""
        turn = time.monotonic()
        while not self._leaving.wait(self.every):
            now = time.monotonic()
            if now - turn > 4 * self.every:
                self._polled = now
            turn = now
            if self.index and now - self._polled > self.limit:
                self.lose(UNREACHABLE.format(self.name(0)), tell=False)

    def lose(self, message, tell=True, code=RESTART):
        """Ends this process, because another one is gone: a collective would wait for it for ever."""
        with self._lock:
            if self._leaving.is_set():
                return
            self._leaving.set()
            kept = ("; what is complete on disk is kept, and the same command on all hosts, also on fewer, goes on from"
                    " there") if code == RESTART else ""
            self._end(code, message, tell, f"\n{message}. {self.name(self.index)} stops too{kept}.")

    def leave(self, code):
        """Ends with an exit code, and tells the others: they go on to their own end (0), or stop too. May not return.
        """
        if code == 0:
            self.barrier("the end", LAST)
            with self._lock:
                self._leaving.set()
            import jax

            jax.distributed.shutdown()
            return 0
        if _BROKEN.search(self.reason):
            time.sleep(2 * self.limit)  # the watch knows more, and ends this process
        with self._lock:
            self._leaving.set()
            self._end(code, f"{self.name(self.index)} has stopped: {self.reason or f'exit code {code}'}")

    def _end(self, code, reason, tell=True, say=""):
        self.code, self.say = code, say
        if tell:  # from a thread: with a host that hangs it may take for ever
            telling = threading.Thread(target=lambda: self.put("ended", {"code": code, "reason": reason}), daemon=True)
            telling.start()
            telling.join(4 * self.every)
            time.sleep(4 * self.every)  # for the others to read it: with process 0 goes what it is written on
        self.exit()

    def exit(self):
        """Ends now, not by exit handlers, which would wait for the others."""
        try:
            if self.say:  # last, behind what the main thread and JAX say of a broken collective
                print(self.say, file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(self.code)


def seconds(name, default):
    """A number of seconds from the environment; raises ValueError for anything else."""
    value = os.environ.get(name, str(default))
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{name}={value} is no number of seconds.")
    return seconds
