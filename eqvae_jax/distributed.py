"""Several processes as one program: how they find each other, what they must agree on, and how they end together.

A program on several hosts is the same command on each of them. `start` joins the processes, `agree` compares what they
were started with, `meet` lets none go on without the others, and `run` ends them together: where one fails, is killed
or falls silent, the others say which it was and stop, with exit code RESTART, instead of waiting in a collective for
ever. With one process all of it does nothing.

Where they find each other, first of these:

    --coordinator=HOST:PORT --processes=N --process=I      or EQVAE_COORDINATOR, EQVAE_PROCESSES, EQVAE_PROCESS
    Slurm, Open MPI                                        what srun and mpirun set, if there are several tasks
    Cloud TPU                                              the metadata of the slice

EQVAE_LIMIT is after how many seconds without a sign of life a process is lost (60), EQVAE_START_LIMIT how long to wait
for all of them in the beginning (300).

The only user of jax._src.distributed: its key-value store and barriers have time limits, where JAX's public collectives
wait for ever.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter

RESTART = 75  # sysexits' EX_TEMPFAIL: another process was lost; the same command goes on
UNREACHABLE = "{}, which keeps the others together, cannot be reached"
LAST = 24 * 3600.0  # seconds that finished processes wait for the others, which are alive
# What collectives raise where the process at the other end is gone; the watch then says which it was.
_BROKEN = re.compile("Gloo|NCCL|RCCL|UNAVAILABLE:|DEADLINE_EXCEEDED:|coordination service|heartbeat|"
                     "Connection (reset|closed) by peer")


class Disagreement(ValueError):
    """The processes of one program were not started alike."""


class Group:
    """The processes of this program, seen from one of them."""

    def __init__(self, client, coordinator, count, index, limit):
        self.client, self.coordinator, self.count, self.index, self.limit = client, coordinator, count, index, limit
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
        try:
            self.client.wait_at_barrier(f"eqvae_jax/{key}", int(1000 * limit))
        except Exception as error:  # jaxlib's, of several types
            missing = [self.name(k) for k in range(self.count) if k not in self.all(key)]
            if not missing:
                raise
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


_group = None


def start(coordinator=None, processes=None, process=None, *, stops=True):
    """Joins the processes of this program; to be called before JAX is used. Where there is only one, does nothing.

    Args:
      coordinator, processes, process: "HOST:PORT" of process 0, how many there are, and which this is; None: as the
        environment says.
      stops: whether SIGTERM ends the program. A training loop has its own ways: False.
    Raises:
      ValueError: the three do not fit together. RuntimeError: not all came within the time limit.
    """
    global _group
    found = _told(coordinator, processes, process) or _detected()
    if _group or found is None:
        return
    limit, patience = (_seconds(name, default) for name, default in (("EQVAE_LIMIT", 60), ("EQVAE_START_LIMIT", 300)))
    import jax
    from jax._src import distributed

    # JAX's own watch ends a process by abort(), and says little: ours comes first.
    limits = {"initialization_timeout": int(patience), "heartbeat_timeout_seconds": int(max(100, 4 * limit)),
              "shutdown_timeout_seconds": 60}
    jax.config.update("jax_enable_preemption_service", not stops)
    state = distributed.global_state
    address = found.get("coordinator_address", "the coordinator")
    if found.get("process_id") == 0:
        _check_port(address)
    missing = (f"not all processes met at {address} within {patience:.0f} s: start the command on every host, and let "
               "them reach that port.")
    forget = _explain_aborts(lambda: state.coordinator_address, missing)
    try:
        jax.distributed.initialize(**found, **limits)
    except RuntimeError as error:
        if not re.search("DEADLINE|[Tt]imed out|[Tt]imeout", str(error)):
            raise
        raise RuntimeError(missing) from error
    if state.num_processes == 1:
        forget()
        jax.distributed.shutdown()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which JAX's preemption service has taken
        return
    _group = Group(state.client, state.coordinator_address, state.num_processes, state.process_id, limit)
    _group.put("host", socket.gethostname())
    _group.barrier("the start", patience)
    _group.hosts = _group.all("host")
    _group.watch()
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # tables and reports are the first process's; errors are everyone's
    if threading.current_thread() is threading.main_thread():
        if stops:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the door says what is kept
        else:
            _interrupts_as_terminations()


def add_flags(add):
    """Declares the flags of `start` through an argument parser's add_argument."""
    add("--coordinator", metavar="HOST:PORT", help="of process 0, where several processes work together that neither "
                                                   "Slurm nor a TPU slice has started")
    add("--processes", type=int, metavar="N", help="how many there are")
    add("--process", type=int, metavar="I", help="which of them this is, 0 to N-1")


def start_from(options):
    """`start` with the flags that `add_flags` has declared."""
    start(options.coordinator, options.processes, options.process)


def run(main):
    """Calls main() and returns its exit code, for sys.exit; the processes of a program end together."""
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            because(end.code)
    except BaseException as failure:
        if not _group:
            raise
        traceback.print_exc()
        because(failure)
        code = 1
    return _group.leave(code or 0) if _group else code


def refuse(error):
    """Prints an error that the user can put right, keeps it for the other processes to be told; returns exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    because(error)
    return 2


def interrupted(advice):
    """The same of Ctrl-C, or of SIGTERM to one of several processes; returns exit code 130."""
    print(f"stopped; {advice}", file=sys.stderr)
    because("it was interrupted")
    return 130


def because(error):
    """Keeps why this process is about to end, for the others to be told."""
    if _group:
        _group.reason = " ".join(str(error).split())[:500] or type(error).__name__


def command(options):
    """Facts to agree on before a command line's work: its flags, and the code and the versions that run it.

    options: argparse's, or a flat dict.
    """
    flags = dict(options if isinstance(options, dict) else vars(options))
    for own in ("coordinator", "processes", "process", "run"):
        flags.pop(own, None)
    return {f"--{name}": str(value) for name, value in flags.items()} | software()


def software():
    """{"code": the hash of this package's files, "python", "jax" ...: versions} that run this process."""
    root = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"code of eqvae_jax": digest.hexdigest()[:12], "python": platform.python_version()} | versions


def agree(name, facts, limit=None):
    """Compares what all processes know under `name`.

    Args:
      facts: dict, name -> a value that JSON can write, compared as such; or a function that returns it.
      limit: seconds to wait for the others; None: EQVAE_START_LIMIT.
    Raises:
      Disagreement: naming each fact that differs, its values, and which processes have them. All processes raise it.
      RuntimeError: a process did not come.
    """
    if not _group:
        return
    limit = limit or _seconds("EQVAE_START_LIMIT", 300)
    _group.barrier(f"{name}: all are here", limit)
    _group.put(f"facts/{name}", facts() if callable(facts) else facts)
    _group.barrier(name, limit)
    told = _group.all(f"facts/{name}")
    lines = []
    for fact in dict.fromkeys(fact for one in told.values() for fact in one):
        values = {}
        for k in sorted(told):
            values.setdefault(json.dumps(told[k].get(fact, "absent")), []).append(_group.name(k))
        if len(values) > 1:
            lines.append(f"  {fact}: " + ", but ".join(f"{value} on {_some(names)}" for value, names in values.items()))
    if lines:
        raise Disagreement(f"the {len(told)} processes were not started alike ({name}):\n" + "\n".join(lines[:20])
                           + "\ngive every host the same command, code, data and shared workdir.")


def meet(event, limit=600.0):
    """Waits for all processes; raises RuntimeError, naming those that did not come within `limit` seconds."""
    if _group:
        _group.barrier(event, limit)


def gather(name, value):
    """[value of each process], in order; values are such as JSON can write. To be called by all of them."""
    if not _group:
        return [value]
    _group.put(f"gathered/{name}", value)
    _group.barrier(f"{name}: written", LAST)
    found = _group.all(f"gathered/{name}")
    _group.barrier(f"{name}: read", _group.limit)
    return [found[k] for k in sorted(found)]


def alone():
    """Whether this program is one process, as far as `start` knows."""
    return _group is None


def shared(directory):
    """Tells whether all processes see the same `directory`, as a value to `agree` on."""
    if alone():
        return "one process"
    path = pathlib.Path(directory) / ".seen_by_all_processes"
    if _group.index == 0:
        path.write_text(secrets.token_hex(8))
    meet("the directory is marked", LAST)  # others may still be downloading, or reading a long list of files
    seen = path.read_text() if path.exists() else "not the one of process 0"
    meet("the directory is looked at")
    if _group.index == 0:
        path.unlink()
    return seen


def _some(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _told(coordinator, processes, process):
    """Arguments of jax.distributed.initialize from flags or the environment; None where they say nothing."""
    environment = os.environ.get
    coordinator = coordinator or environment("EQVAE_COORDINATOR")
    processes = environment("EQVAE_PROCESSES") if processes is None else processes
    process = environment("EQVAE_PROCESS") if process is None else process
    if coordinator is None and processes is None and process is None:
        return None
    wrong = ValueError(f"coordinator={coordinator}, processes={processes} and process={process} do not fit together: "
                       "--coordinator=HOST:PORT --processes=N --process=I, I from 0 to N-1, name one process of N.")
    if None in (coordinator, processes, process) or not re.fullmatch(r".+:\d+", coordinator):
        raise wrong
    try:
        processes, process = int(processes), int(process)
    except ValueError:
        raise wrong from None
    if not 0 <= process < processes:
        raise wrong
    return {"coordinator_address": coordinator, "num_processes": processes, "process_id": process,
            "cluster_detection_method": "deactivate"}


def _detected():
    """Arguments of jax.distributed.initialize for what started this process; None where that was nobody."""
    environment = os.environ
    tasks = int(environment.get("SLURM_NTASKS", 1))
    if tasks > 1 and "SLURM_STEP_NODELIST" in environment:
        gpus = environment.get("SLURM_GPUS_ON_NODE", "")
        if tasks == int(environment.get("SLURM_NNODES", 0)) and gpus.isdecimal():
            # JAX would take one GPU a task; the only task of a node takes all.
            environment.setdefault("JAX_LOCAL_DEVICE_IDS", ",".join(map(str, range(int(gpus)))))
        return {"cluster_detection_method": "slurm"}
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return {"cluster_detection_method": "ompi"}
    if importlib.util.find_spec("libtpu") and environment.get("JAX_PLATFORMS", "tpu") in ("", "tpu", "tpu,cpu"):
        from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

        return {} if running_in_cloud_tpu_vm else None  # libtpu alone may be there to plan with
    return None


def _check_port(address):
    """Raises RuntimeError where another program has the coordinator's port: JAX would crash."""
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise RuntimeError(f"process 0 cannot listen at port {port} of {address} ({error.strerror}): name another "
                               "--coordinator on all hosts.") from None


def _seconds(name, default):
    value = os.environ.get(name, str(default))
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{name}={value} is no number of seconds.")
    return seconds


def _interrupts_as_terminations():
    """Ctrl-C asks for a coordinated stop, as SIGTERM does, which JAX tells all processes; the second one ends this one.
    """
    def interrupt(*_):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, interrupt)


def _explain_aborts(address, missing):
    """JAX's client calls abort() where it cannot go on: the reason is said, and the exit code is one of ours.

    address: () -> that of process 0. missing: what to say before all have met. Returns what undoes it.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]

    def handle(number):
        if _group is None:
            print(missing, file=sys.stderr, flush=True)
            os._exit(1)
        if _group.code is not None:
            _group.exit()
        host, _, port = address().rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            _group.lose(UNREACHABLE.format(_group.name(0)), tell=False)
        libc.signal(number, before)  # process 0 is there, so this abort is about something else: faulthandler's
        signal.raise_signal(number)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _explain_aborts.kept = handler  # C does not count references
    before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    return lambda: libc.signal(signal.SIGABRT, before)
