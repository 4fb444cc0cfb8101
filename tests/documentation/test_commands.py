"""Every command and every Python block of README.md and docs/ does what the page says, small.

A command of a door is parsed as it stands and run in smoke form (doors.py). A launcher shows its commands, and those
are parsed in their turn. What is left is in LISTED with the reason. A command of which nothing is known fails, with its
page and line.
"""

import ast
import contextlib
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from pages import BLOCKS, COMMANDS, LANGUAGES, ROOT, Command, blocks, commands

# First words -> why they are not run.
LISTED = {
    ("pip", "install", "libtpu"): "a download, and it slows the start of JAX in every later test",
    ("pip", "install", "tensorflow", "tensorflow-datasets"): "a download",
    ("tfds", "build"): "needs TensorFlow, and a download",
    ("tensorboard", "--logdir=runs"): "a server",
    ("mkdocs", "serve"): "a server; test_site.py builds the same pages",
    ("ruff", "check", "."): "the lint of the whole checkout, a check of its own",
}
LAUNCHERS = ("launch/tpu.sh", "launch/slurm.sh", "launch/processes.py")  # with --dry-run
SCRIPTS = ("launch/quickstart.sh", "launch/test.sh", "launch/generators.sh")  # with a python that only says its words


def check(command, world):
    words = command.words
    if words[:2] == ("python", "-m") and words[2].startswith("eqvae_jax."):
        check_door(words[2].removeprefix("eqvae_jax."), list(words[3:]), world)
    elif words[:2] == ("python", "-c"):
        ended = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        check_benchmark(words[1], words[2:])
    elif words[:3] == ("pip", "install", "-e"):
        check_extras(words[3])
    elif words[0] in LAUNCHERS:
        check_launcher(command)
    elif words[0] in SCRIPTS:
        check_script(command, world.root)
    elif words[0] == "docker":
        check_docker(command)
    else:
        known = [listed for listed in LISTED if words[: len(listed)] == listed]
        assert known, (f"{command.where}: this test knows nothing about {shlex.join(words)!r}: make it runnable in "
                       "tests/documentation, or list it there with the reason")


def check_door(door, words, world):
    from doors import SMALL, parse

    if door == "reproduce":
        check_reproduce(words, world.root)
        return
    assert door in SMALL, f"there is no door eqvae_jax.{door}"
    parse(door, words)
    world.run(door, words)


def check_reproduce(words, directory):
    """With --dry-run: a table takes an hour even when it is tiny."""
    ended = subprocess.run([sys.executable, "-m", "eqvae_jax.reproduce", *words, "--dry-run"], cwd=directory, text=True,
                           capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0, ended.stderr


def check_inner(command, words):
    """A command within another one: only parsed, for a cluster is what it needs."""
    from doors import parse

    assert words[:2] == ["python", "-m"] and words[2].startswith("eqvae_jax."), f"{command.where}: {words}"
    parse(words[2].removeprefix("eqvae_jax."), words[3:])


def check_launcher(command):
    cut = command.words.index("--") if "--" in command.words else len(command.words)
    words = [*command.words[:cut], "--dry-run", *command.words[cut:]]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout, ended.stderr
    if cut < len(command.words):
        check_inner(command, list(command.words[cut + 1:]))


def check_script(command, directory):
    """Runs a script in an environment whose python notes its words, and parses what it would have run."""
    venv = directory / "venv"
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    (venv / "bin" / "activate").write_text(f'PATH="{venv}/bin:$PATH"\n')
    (venv / "bin" / "python").write_text('#!/usr/bin/env bash\n{ printf "%q " "$@"; echo; } >>"$NOTES"\n')
    (venv / "bin" / "python").chmod(0o755)
    notes = directory / "notes"
    notes.write_text("")
    words = [str(directory / "FASHION") if word == "DIR" else word for word in command.words]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"VENV": str(venv), "NOTES": str(notes), "RUNS": str(directory / "runs")})
    assert ended.returncode == 0, ended.stderr
    noted = [shlex.split(line) for line in notes.read_text().splitlines()]
    run = [line for line in noted if line[:3] != ["-m", "pip", "install"]]
    assert run
    for line in run:
        if line[:2] != ["-m", "pytest"]:
            check_inner(command, ["python", *line])


def check_benchmark(path, words):
    """Its flags are among those that the file declares: it times torch beside us, for minutes."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    known = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {word.partition("=")[0] for word in words} <= known


def check_extras(target):
    """pip install -e .[EXTRA]: a download; setup.py has the extra."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    name = re.fullmatch(r"\.(?:\[(\w+)\])?", target)
    assert name and (not name[1] or f'"{name[1]}": [' in setup)


def check_docker(command):
    """docker build and run: there is no daemon; the Dockerfile is there, and what is run is parsed."""
    words = list(command.words)
    assert words[1] in ("build", "run")
    if words[1] == "build":
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    else:
        check_inner(command, words[words.index("python"):])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.where)
def test_a_command_of_the_pages(command, world):
    check(command, world)


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.language == "python"}))
def test_python_blocks_of_a_page_run_in_their_order(page, world):
    names = {"x": np.zeros((1, 32, 32, 3), np.float32)}  # the README's images
    with contextlib.chdir(world.root):
        for block in BLOCKS:
            if (block.page, block.language) == (page, "python"):
                exec(compile("\n" * (block.line - 1) + "\n".join(block.lines), page, "exec"), names)
    if page == "README.md":
        assert names["y"].shape == names["x"].shape
    if page == "autoencoders.md":
        assert names["turned"].max() < 1e-6 < names["shrunk"].min()


def test_every_block_says_what_it_is():
    """A block without a language, or of another one, would be run by nobody."""
    wrong = [f"{block.page}:{block.line - 1} {block.language!r}" for block in BLOCKS if block.language not in LANGUAGES]
    assert not wrong, f"the languages are {', '.join(LANGUAGES)}: {', '.join(wrong)}"


def test_what_is_not_run_is_on_the_pages():
    listed = {key for key in LISTED for command in COMMANDS if command.words[: len(key)] == key}
    assert listed == set(LISTED)


@pytest.mark.parametrize("words", [
    "python -m eqvae_jax.train --config=configs/sit.py", "rm -rf runs", "python benchmarks/plans.py --slice=v5e:4x4",
    "pip install -e .[gpu]", "python -m eqvae_jax.encode --image=folder:TRAIN",
    "python -m eqvae_jax.main --config=configs/sit.py:XL_3 --workdir=runs/a --config.data.latents=runs/latents",
    "python -m eqvae_jax.main --config=configs/sit.py --workdir=runs/a --config.training.step=3",
    "launch/slurm.sh --gpus-per-nodes=8 -- python -m eqvae_jax.main --config=configs/sit.py --workdir=runs/a",
    "launch/processes.py 8 -- python -m eqvae_jax.main --config=configs/sit.py --workdir=runs/a",
])
def test_a_command_that_is_wrong_fails(words, world):
    """The last lacks its latents, which main refuses."""
    with pytest.raises((AssertionError, SystemExit, ValueError, KeyError, AttributeError, flags.Error)):
        check(Command("page.md", 1, tuple(words.split())), world)


def test_commands_are_read_as_a_shell_reads_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```sh\na --b=1   # c\n\nd 'e f' \\\n    --g\n```\n")
    (block,) = blocks(page)
    assert commands(block) == [Command("page.md", 4, ("a", "--b=1")), Command("page.md", 6, ("d", "e f", "--g"))]
    page.write_text("```sh\na\n")
    with pytest.raises(ValueError, match="page.md:1: this fence is not closed"):
        blocks(pathlib.Path(page))
