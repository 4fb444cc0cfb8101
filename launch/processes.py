#!/usr/bin/env python3
"""Runs a command as N processes that JAX joins into one program, and starts all of them again when one was lost.

    python launch/processes.py 8 -- python -m eqvae_jax.main --config=... --workdir=DIR
    python launch/processes.py 1 --hosts=4 --host=I --coordinator=HOST0:8476 -- python -m ...   on each host I of 0..3
    python launch/processes.py 1 -- python -m ...                                               restarts it, no more

One host with several GPUs needs no launcher: one process drives them all. This is for one process a GPU (each gets
--devices of them), for several hosts without Slurm, and for restarts. Each line of output begins with the number of
its process.

The command says by its exit code what to do. 0: it is done. 75, another host was lost or a lone
process was told to save, or 128 and above, it was killed: the whole group is started again, at most --restarts times,
after pauses that grow. Any other code, and 130 (Ctrl-C), ends the group with that code. SIGTERM and SIGINT are handed
to every process, and nothing is started after them.
Linux, and Python's standard library only.
"""

import argparse
import ctypes
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

LOST = 75             # EX_TEMPFAIL: the same command goes on
INTERRUPTED = 130
NO_COMMAND = 127      # as a shell
LONGEST_PAUSE = 300.0
SIGNALS = {signal.SIGTERM, signal.SIGINT}
PR_SET_PDEATHSIG = 1


def parse(arguments):
    """The options and the command, which begins after the first --."""
    parser = argparse.ArgumentParser(prog="processes.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__, usage="processes.py N [options] -- COMMAND",
                                     allow_abbrev=False)
    add = parser.add_argument
    add("processes", type=int, metavar="N", help="processes on this host")
    add("--devices", type=int, default=1, help="GPUs of each process if N > 1 (1); 0: all see all")
    add("--hosts", type=int, default=1, help="hosts (1); the same command is started on each")
    add("--host", type=int, default=0, help="which of them this is, from 0")
    add("--coordinator", help="HOST:PORT of host 0, for several hosts; a free port of this host without")
    add("--restarts", type=int, default=5, help="at most this many (5)")
    add("--pause", type=float, default=10, help="seconds before the first restart, doubled at each to 300 (10)")
    add("--steady", type=float, default=3600, help="after this many seconds of work restarts are counted anew (3600)")
    add("--at-least", type=int, metavar="M", help="a process that is killed twice in a row is left out, its GPU taken "
        "for broken, while M are left (N: never)")
    add("--settle", type=float, default=5, help="seconds that the others have to fail by themselves (5)")
    add("--grace", type=float, default=30, help="seconds between SIGTERM and SIGKILL of a group that failed (30)")
    add("--state", help="file for: running PID | ended CODE | stopped CODE (after a signal)")
    add("--dry-run", action="store_true", help="print the commands, run none")
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = parser.parse_args(arguments[:cut]), arguments[cut + 1:]
    options.at_least = options.processes if options.at_least is None else options.at_least
    wrong = next((message for message, found in (
        ("there is no command: it goes after --", not command),
        ("N and --hosts are at least 1", options.processes < 1 or options.hosts < 1),
        ("--host is 0 to HOSTS - 1", not 0 <= options.host < options.hosts),
        ("several hosts need --coordinator=HOST:PORT, the same on each", options.hosts > 1 and not options.coordinator),
        ("--coordinator is HOST:PORT",
         options.coordinator and not re.fullmatch(r"\S+:\d+", options.coordinator)),
        ("the other hosts cannot reach a coordinator on this host's loopback",
         options.hosts > 1 and re.match(r"(localhost|127\.|\[?::1)", options.coordinator or "")),
        ("--at-least is 1 to N", not 1 <= options.at_least <= options.processes),
        ("--at-least is for one host", options.hosts > 1 and options.at_least < options.processes),
    ) if found), None)
    if wrong:
        parser.error(wrong)
    return options, command


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def variables(options, slots):
    """What each process is told beside this process's environment, by slot; a lone process is told nothing."""
    total, told = options.hosts * len(slots), {slot: {} for slot in slots}
    coordinator = options.coordinator or f"127.0.0.1:{free_port()}"  # anew at each start: the old one may linger
    for place, slot in enumerate(slots):
        if total > 1:
            told[slot] |= {"EQVAE_COORDINATOR": coordinator, "EQVAE_PROCESSES": str(total),
                           "EQVAE_PROCESS": str(options.host * len(slots) + place)}
        if options.processes > 1 and options.devices:
            first = slot * options.devices
            told[slot]["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(first, first + options.devices)))
    return told


def before_command():
    """In a new process: it hears signals, and SIGTERM if its launcher is killed, lest it hold its GPU for ever."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start(command, told):
    """Starts a process for each slot; returns {slot: Popen} and the threads that copy what they print.

    Each is a session of its own: Ctrl-C reaches it once, through this process, and at the end its data workers can be
    ended with it. A lone process writes to the terminal itself. Raises OSError where there is no such command.
    """
    processes, copying, lock = {}, [], threading.Lock()
    pipe = subprocess.PIPE if len(told) > 1 else None
    for slot, more in told.items():
        processes[slot] = process = subprocess.Popen(
            command, env=os.environ | more, stdout=pipe, stderr=pipe, start_new_session=True,
            preexec_fn=before_command)
        if pipe:
            label = f"[{more['EQVAE_PROCESS']}] ".encode()
            for stream, sink in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
                copying.append(threading.Thread(target=copy, args=(stream, sink, label, lock), daemon=True))
                copying[-1].start()
    return processes, copying


def copy(stream, sink, label, lock):
    """Copies a process's output, each line, or refreshed line of a progress bar, whole and after its label."""
    left = b""

    def write(line):
        with lock:
            sink.write(label + line)
            sink.flush()

    while chunk := os.read(stream.fileno(), 65536):
        *lines, left = re.split(rb"(?<=[\r\n])", left + chunk)
        for line in lines:
            write(line)
    if left:
        write(left + b"\n")


def kill(process):
    """SIGKILL to a process and to what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def code_of(process):
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def restartable(code):
    return code == LOST or (code >= 128 and code != INTERRUPTED)


def wait(processes, options, received):
    """Waits for a group; returns {slot: code} in the order of their ends, of those that ended by themselves.

    When one fails, the others soon fail too, and which code is the cause is not known until they have: they get
    --settle seconds for it, then SIGTERM, then SIGKILL, and what they say then says nothing. A group that was asked to
    stop has all the time it wants: it is saving.
    """
    ended, alive, handed, failed, told = {}, dict(processes), 0, None, False
    while alive:
        for slot in [slot for slot, process in alive.items() if process.poll() is not None]:
            process = alive.pop(slot)
            kill(process)  # what it left behind
            if not told:
                ended[slot] = code_of(process)
                if ended[slot] and failed is None:
                    failed = time.monotonic()
        while handed < len(received):
            for process in alive.values() if received[handed] > 0 else ():
                process.send_signal(received[handed])
            handed += 1
        if failed is not None and alive:
            late = time.monotonic() - failed - options.settle
            if late > 0 and not told:
                told = True
                for process in alive.values():
                    process.terminate()
            if late > options.grace:
                for process in alive.values():
                    kill(process)
        pause(0.05, received)
    return ended


def outcome(codes):
    """The code of a group: of the first process that failed for good, else of the first that failed, else 0."""
    failures = [code for code in codes if code]
    return next((code for code in failures if not restartable(code)), failures[0] if failures else 0)


def describe(ended):
    words = {slot: f"was killed by signal {code - 128}" if code >= 128 else f"ended with {code}"
             for slot, code in ended.items() if code}
    return ", ".join(f"process {slot} {word}" for slot, word in words.items())


def say(message):
    print(f"processes: {message}", file=sys.stderr, flush=True)


def write_state(options, *words):
    if options.state:
        with open(f"{options.state}.new", "w") as file:
            print(*words, file=file)
        os.replace(f"{options.state}.new", options.state)  # a reader sees all of it or what was before


def pause(seconds, received):
    """Waits so long, or until SIGTERM or SIGINT comes, which is appended to a list.

    At shutdown systemd signals every process of a session itself: to hand that on would be a second signal, which
    tells the command to stop without saving. Such a signal is appended negative.
    """
    signalled = signal.sigtimedwait(SIGNALS, seconds)
    if signalled:
        by_systemd = signalled.si_pid == 1 and first_process() == "systemd"
        received.append(-signalled.si_signo if by_systemd else signalled.si_signo)


def first_process():
    """What runs as process 1: systemd, or in a container an init, which signals nobody but the launcher."""
    with open("/proc/1/comm") as file:
        return file.read().strip()


def run(options, command):
    """Runs the group until it is done, failed for good or was stopped; returns its code and whether it was stopped."""
    received, slots, restarts, dying = [], list(range(options.processes)), 0, set()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they are waited for, which tells who sent them
    write_state(options, "running", os.getpid())
    while True:
        begun = time.monotonic()
        try:
            processes, copying = start(command, variables(options, slots))
        except OSError as error:
            say(f"{command[0]}: {error.strerror}")
            return NO_COMMAND, False
        ended = wait(processes, options, received)
        for thread in copying:
            thread.join(timeout=5)
        code = outcome(ended.values())
        if code:
            say(describe(ended))
        if received or not restartable(code):
            return code, bool(received)
        if time.monotonic() - begun >= options.steady:
            restarts = 0
        if restarts >= options.restarts:
            say(f"{restarts} restarts did not help")
            return code, False
        killed = {slot for slot, number in ended.items() if number >= 128}
        for slot in sorted(killed & dying):
            if len(slots) > options.at_least:
                slots.remove(slot)
                say(f"going on without process {slot}")
        dying = killed
        seconds = min(options.pause * 2**restarts, LONGEST_PAUSE)
        restarts += 1
        say(f"restart {restarts} of {options.restarts} in {seconds:g} s, {len(slots)} processes")
        pause(seconds, received)
        if received:  # nothing runs that could save
            return 128 + abs(received[0]), True


def main(arguments):
    options, command = parse(arguments)
    if options.dry_run:
        for more in variables(options, list(range(options.processes))).values():
            print(shlex.join((["env", *(f"{name}={value}" for name, value in more.items())] if more else []) + command))
        return 0
    code, stopped = run(options, command)
    write_state(options, "stopped" if stopped else "ended", code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
