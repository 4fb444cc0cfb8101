"""What was compiled, how long it took, and compiling ahead while training already runs."""

import threading
import time
from collections import Counter

import jax.monitoring

# Event names as jax records them (jax/_src/dispatch.py and compiler.py); the first covers a load from the
# cache too.
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class CompileLedger:
    """Counts what XLA compiles in this process, on any thread, inside a `with` block.

    programs: how many; seconds: their summed duration (without tracing); from_cache: how many of them came
    from the persistent cache; names: Counter by the name of the jitted function, where this jax reports it.
    """

    def __init__(self):
        self.programs, self.seconds, self.from_cache, self.names = 0, 0.0, 0, Counter()
        self._lock = threading.Lock()

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        jax.monitoring.unregister_event_listener(self._on_event)

    def _on_duration(self, event, seconds, **labels):
        if event == COMPILE_EVENT:
            with self._lock:
                self.programs += 1
                self.seconds += seconds
                self.names[labels.get("fun_name", "unnamed")] += 1

    def _on_event(self, event, **_):
        if event == CACHE_HIT_EVENT:
            with self._lock:
                self.from_cache += 1

    def __str__(self):
        return f"compiled {self.programs} programs in {self.seconds:.1f} s ({self.from_cache} from the cache)"


class WarmUp:
    """Runs (name, thunk) pairs one after another in a background thread; each thunk compiles one program.

    One thread, because XLA's code generator already uses all cores and tracing holds the interpreter's lock.
    A thunk that fails is reported and does not stop the run: the training step will meet the same error in
    plain sight.
    """

    def __init__(self, say):
        """say: prints a line, from any thread."""
        self._say = say
        self._stop = threading.Event()
        self._thread = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # Ends after the program under way, and waits for it: leaving Python while XLA compiles aborts the
        # process.
        self._stop.set()
        self.join()

    def join(self):
        """Waits until all is compiled."""
        if self._thread:
            self._thread.join()

    def start(self, programs):
        """programs: iterator of (name, thunk), the one needed first first."""
        self._thread = threading.Thread(target=self._run, args=(programs,), name="warm-up", daemon=True)
        self._thread.start()

    def _run(self, programs):
        begun, names = time.monotonic(), ["the list of programs"]
        try:
            for name, compile_one in programs:
                if self._stop.is_set():
                    return
                names.append(name)
                compile_one()
        except Exception as error:
            self._say(f"compiling {names[-1]} ahead failed ({type(error).__name__}: {error}); "
                      "training goes on without")
        else:
            self._say(f"compiled {len(names) - 1} programs ahead in {time.monotonic() - begun:.1f} s")
