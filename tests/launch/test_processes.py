"""Groups of processes, as toy commands: who is told what, what is started again, and what is not."""

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types

import pytest
from fakes import HOSTILE, ROOT, run, toy, until

PROCESSES = [sys.executable, str(ROOT / "launch/processes.py")]


def turns(tmp_path, me):
    return len(list(tmp_path.glob(f"turn-{me}-*")))


QUICK = ["--pause=0", "--settle=0.2", "--grace=0.5"]


def test_processes_are_told_who_they_are_and_their_lines_are_labelled(tmp_path):
    command = toy(tmp_path, """\
        print(os.environ["EQVAE_COORDINATOR"], os.environ["EQVAE_PROCESSES"], os.environ["JAX_LOCAL_DEVICE_IDS"])
        print("half ", end=""); sys.stdout.flush(); time.sleep(0.2); print("a line\\rbar", end="")
        print("wrong", file=sys.stderr)
        """)
    status, printed, errors = run(*PROCESSES, "3", "--devices=2", *QUICK, "--", *command)
    assert status == 0
    lines = sorted(re.split(r"[\r\n]+", printed.strip()))
    (coordinator,) = {line.split()[1] for line in lines if "127.0.0.1" in line}
    assert lines == sorted(line for n in range(3) for line in (
        f"[{n}] {coordinator} 3 {2 * n},{2 * n + 1}", f"[{n}] half a line", f"[{n}] bar"))
    assert sorted(errors.splitlines()) == [f"[{n}] wrong" for n in range(3)]


def test_a_lone_process_is_told_nothing_and_one_of_several_hosts_its_number():
    dry = [*PROCESSES, "1", "--dry-run"]
    assert run(*dry, "--", "python", *HOSTILE)[1] == shlex.join(["python", *HOSTILE]) + "\n"
    assert run(*dry, "--hosts=4", "--host=2", "--coordinator=h:8476", "--", "x")[1] == (
        "env EQVAE_COORDINATOR=h:8476 EQVAE_PROCESSES=4 EQVAE_PROCESS=2 x\n")
    second = run(*PROCESSES, "2", "--dry-run", "--hosts=2", "--host=1", "--coordinator=h:1", "--", "x")[1]
    assert second.splitlines() == [
        f"env EQVAE_COORDINATOR=h:1 EQVAE_PROCESSES=4 EQVAE_PROCESS={n} JAX_LOCAL_DEVICE_IDS={n - 2} x" for n in (2, 3)]


def test_a_lost_host_restarts_all_that_wait_for_it(tmp_path):
    command = toy(tmp_path, """\
        if turn == 0:
            while me == "1" and len(list(at.glob("turn-*-0"))) < 3: time.sleep(0.01)  # which takes as long as it takes
            time.sleep(60 if me != "1" else 0)
            sys.exit(75)
        """)
    status, _, errors = run(*PROCESSES, "3", *QUICK, f"--state={tmp_path / 'state'}", "--", *command)
    assert status == 0 and "process 1 ended with 75" in errors and "restart 1 of 5 in 0 s, 3 processes" in errors
    assert [turns(tmp_path, n) for n in range(3)] == [2, 2, 2]
    assert (tmp_path / "state").read_text() == "ended 0\n"


def test_a_killed_process_restarts_all_even_those_that_do_not_listen(tmp_path):
    command = toy(tmp_path, """\
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if turn == 0:
            if me == "0":
                while not (at / "turn-1-0").exists(): time.sleep(0.01)
                time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        """)
    status, _, errors = run(*PROCESSES, "2", *QUICK, "--", *command)
    assert status == 0 and "process 0 was killed by signal 9" in errors
    for n in range(2):
        assert turns(tmp_path, n) == 2
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"turn-{n}-0").read_text()), 0)


def test_a_process_killed_again_and_again_is_left_out_where_allowed(tmp_path):
    command = toy(tmp_path, """\
        if os.environ.get("JAX_LOCAL_DEVICE_IDS") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        print("ran as", me, "of", os.environ.get("EQVAE_PROCESSES"), "on", os.environ["JAX_LOCAL_DEVICE_IDS"])
        """)
    status, printed, errors = run(*PROCESSES, "3", *QUICK, "--at-least=2", "--", *command)
    assert status == 0 and "going on without process 1" in errors
    assert printed.splitlines().count("[1] ran as 1 of 2 on 2") == 1
    status, _, errors = run(*PROCESSES, "3", *QUICK, "--restarts=2", "--", *command)
    assert status == 137 and "without" not in errors


@pytest.mark.parametrize("code", [1, 2, 130])
def test_what_a_person_must_mend_is_not_restarted_whoever_ends_first(tmp_path, code):
    command = toy(tmp_path, f"""\
        if me == "0":
            sys.exit(75)  # it noticed first that the other one, which failed, no longer answers
        time.sleep(0.1)
        sys.exit({code})
        """)
    status, _, errors = run(*PROCESSES, "2", *QUICK, "--settle=5", f"--state={tmp_path / 'state'}", "--", *command)
    assert status == code and "restart" not in errors and turns(tmp_path, 1) == 1
    assert (tmp_path / "state").read_text() == f"ended {code}\n"


def test_restarts_end_and_pauses_grow(tmp_path):
    command = toy(tmp_path, "sys.exit(75)")
    begun = time.monotonic()
    status, _, errors = run(*PROCESSES, "1", "--restarts=2", "--pause=0.2", "--", *command)
    assert status == 75 and turns(tmp_path, "-") == 3 and "2 restarts did not help" in errors
    assert "in 0.2 s" in errors and "in 0.4 s" in errors and time.monotonic() - begun > 0.6
    # after steady work they are counted anew
    command = toy(tmp_path, "sys.exit(75 if turn < 5 else 0)")
    assert run(*PROCESSES, "1", "--restarts=1", "--pause=0", "--steady=0", "--", *command)[0] == 0


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_reach_every_process_once_and_nothing_is_started_after_them(tmp_path, number, code):
    command = toy(tmp_path, f"""\
        count, begun = [], time.monotonic()
        signal.signal({int(number)}, lambda *_: count.append(1))
        (at / f"ready-{{me}}").touch()
        while not count and time.monotonic() < begun + 60: time.sleep(0.01)
        time.sleep(0.3)
        print("heard", len(count))
        sys.exit({code})
        """)
    launcher = subprocess.Popen([*PROCESSES, "2", *QUICK, f"--state={tmp_path / 'state'}", "--", *command],
                                stdout=subprocess.PIPE, text=True)
    until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    assert (tmp_path / "state").read_text() == f"running {launcher.pid}\n"
    launcher.send_signal(number)
    printed, _ = launcher.communicate(timeout=15)
    assert sorted(printed.splitlines()) == ["[0] heard 1", "[1] heard 1"] and launcher.returncode == code
    assert (tmp_path / "state").read_text() == f"stopped {code}\n" and turns(tmp_path, 0) == 1


@pytest.mark.parametrize("sender, first, handed", [(1, "systemd", 0), (1, "tini", 1), (77, "systemd", 1)])
def test_systemd_s_signal_is_not_handed_on_for_it_signals_all(monkeypatch, sender, first, handed):
    spec = importlib.util.spec_from_file_location("processes", ROOT / "launch/processes.py")
    processes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(processes)
    sent = iter([types.SimpleNamespace(si_signo=15, si_pid=sender), None, None])
    monkeypatch.setattr(processes.signal, "sigtimedwait", lambda *_: next(sent))
    monkeypatch.setattr(processes, "first_process", lambda: first)
    heard, ends = [], iter([None, None, 0])
    process = types.SimpleNamespace(poll=lambda: next(ends), send_signal=heard.append, returncode=0, pid=999999999)
    received = []
    assert processes.wait({0: process}, types.SimpleNamespace(settle=0, grace=0), received) == {0: 0}
    assert heard == [15] * handed and [abs(number) for number in received] == [15]


def test_a_signal_in_a_pause_ends_it(tmp_path):
    command = toy(tmp_path, "sys.exit(75)")
    launcher = subprocess.Popen([*PROCESSES, "1", "--pause=60", f"--state={tmp_path / 'state'}", "--", *command],
                                stderr=subprocess.PIPE, text=True)
    until(lambda: "restart 1" in launcher.stderr.readline())
    launcher.terminate()
    assert launcher.wait(timeout=5) == 143 and (tmp_path / "state").read_text() == "stopped 143\n"
    with launcher.stderr:
        assert launcher.stderr.read() == ""  # nothing was started that was ended again


def test_processes_of_a_killed_launcher_are_told_to_end(tmp_path):
    command = toy(tmp_path, """\
        signal.signal(signal.SIGTERM, lambda *_: ((at / f"told-{me}").touch(), sys.exit(0)))
        (at / f"ready-{me}").touch()
        time.sleep(60)
        """)
    launcher = subprocess.Popen([*PROCESSES, "2", "--", *command])
    until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    launcher.kill()
    launcher.wait()
    until(lambda: len(list(tmp_path.glob("told-*"))) == 2)


def test_a_command_that_does_not_exist_is_an_error_at_once(tmp_path):
    status, _, errors = run(*PROCESSES, "2", f"--state={tmp_path / 'state'}", "--", tmp_path / "none")
    assert status == 127 and "No such file" in errors and (tmp_path / "state").read_text() == "ended 127\n"
