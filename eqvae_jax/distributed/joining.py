"""How the processes of one program find each other, and what they set up before JAX is used."""

import ctypes
import importlib.util
import os
import re
import signal
import socket
import sys
import threading

from eqvae_jax.distributed import group
from eqvae_jax.distributed.group import UNREACHABLE, Group, seconds


def start(coordinator=None, processes=None, process=None, *, stops=True):
    """Joins the processes of this program; to be called before JAX is used. Where there is only one, does nothing.

    Args:
      coordinator, processes, process: "HOST:PORT" of process 0, how many there are, and which this is; None: as the
        environment says.
      stops: whether SIGTERM ends the program. A training loop has its own ways: False.
    Raises:
      ValueError: the three do not fit together. RuntimeError: not all came within the time limit.
    """
    found = _told(coordinator, processes, process) or _detected()
    if group.joined or found is None:
        return
    limit, patience = (seconds(name, default) for name, default in (("EQVAE_LIMIT", 60), ("EQVAE_START_LIMIT", 300)))
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
    group.joined = joined = Group(state.client, state.num_processes, state.process_id, limit)
    joined.put("host", socket.gethostname())
    joined.barrier("the start", patience)
    joined.hosts = joined.all("host")
    joined.watch()
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
        if group.joined is None:
            print(missing, file=sys.stderr, flush=True)
            os._exit(1)
        if group.joined.code is not None:
            group.joined.exit()
        host, _, port = address().rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            group.joined.lose(UNREACHABLE.format(group.joined.name(0)), tell=False)
        libc.signal(number, before)  # process 0 is there, so this abort is about something else: faulthandler's
        signal.raise_signal(number)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _explain_aborts.kept = handler  # C does not count references
    before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    return lambda: libc.signal(signal.SIGABRT, before)
