"""Programs that are not here, as small fakes that note how they are called; toy commands; arguments hard to quote."""

import os
import pathlib
import shlex
import subprocess
import sys
import textwrap
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOSTILE = ["a b", "it's", '"', "$HOME", "`id`", "*", "x;y", "", "--zone=q", "é\n", "\\"]


def run(*command, cwd=ROOT, timeout=30, **variables):
    """Runs a command with more environment variables; returns (exit status, standard output, standard error)."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env=os.environ | {name: str(value) for name, value in variables.items()})
    return done.returncode, done.stdout, done.stderr


def fake(directory, name, body):
    """An executable that appends its arguments, one line a call, to DIRECTORY/log, and then does what body says."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f'#!/usr/bin/env bash\nset -u\nhere={shlex.quote(str(directory))}\n'
                    f'{{ printf "%q " {name} "$@"; echo; }} >>"$here/log"\n'
                    'next() {  # the first line of a file, taken away unless it is the last\n'
                    '  head -n 1 "$here/$1"\n'
                    '  if [ "$(wc -l <"$here/$1")" -gt 1 ]; then sed -i 1d "$here/$1"; fi\n'
                    '}\n' + textwrap.dedent(body))
    path.chmod(0o755)
    return directory


def read(line):
    """The words of a line as bash reads them; shlex does not know its $'...'."""
    return run("bash", "-c", f"printf '%s\\0' {line}")[1].split("\0")[:-1]


def calls(directory):
    return [read(line) for line in (directory / "log").read_text().splitlines()]


def on_path(directory):
    return f"{directory}:{os.environ['PATH']}"


def until(true, seconds=15):
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < seconds, "it did not happen"
        time.sleep(0.05)


def toy(tmp_path, body):
    """A command that runs body; `me` is its number, `turn` how often it was started before, `at` a directory."""
    (tmp_path / "toy.py").write_text(textwrap.dedent("""\
        import os, pathlib, signal, sys, time
        me, at = os.environ.get("EQVAE_PROCESS", "-"), pathlib.Path(__file__).parent
        turn = len(list(at.glob(f"turn-{me}-*")))
        (at / f"turn-{me}-{turn}").write_text(str(os.getpid()))
        """) + textwrap.dedent(body))
    return [sys.executable, str(tmp_path / "toy.py")]
