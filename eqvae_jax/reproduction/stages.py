"""Stages: one command of this project each, known by what decides its result.

A stage's key is a hash of its command, in which the results of other stages stand by their keys and a config by its
leaves. So what two tables share is made once, and what a changed config touches is made anew.
"""

import functools
import hashlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from eqvae_jax import recipes

FORMAT = 1  # part of every key: raise it where the meaning of a command changes

# Door -> the flag that says where its result goes, what that is within the stage's folder, and the file that is there
# once, and only once, all is done; "" where a door's folder does not say so.
DOORS = {
    "main": ("--workdir={}", "", ""),
    "encode": ("--output={}", "", "manifest.json"),
    "sample": ("--output={}", "samples.npz", "samples.npz"),
    "evaluate": ("--output={}", "", "metrics.json"),
    "report": ("--output={}", "", "report.html"),
}


class Output(NamedTuple):
    """In a stage's arguments: the place of another stage's result, as in Output(stage, "--generator=workdir:{}")."""

    stage: "Stage"
    form: str = "{}"


class Stage(NamedTuple):
    """One command: python -m eqvae_jax.DOOR ARGUMENTS, whose result goes to a folder of its own.

    name: for people, unique among the stages of a plan. arguments: str and Output, in order. work: (kind, amount) that
    estimates.py turns into seconds, such as ("dit", steps). disk: bytes that it leaves, about.
    """

    name: str
    door: str
    arguments: tuple
    work: tuple[str, float] = ("other", 1.0)
    disk: float = 0.0

    @property
    def inputs(self):
        """The stages that must be done before."""
        return tuple(argument.stage for argument in self.arguments if isinstance(argument, Output))

    @property
    def key(self):
        """A hash, 10 hexadecimal digits, of all that decides the result but the code."""
        return _key(self)

    def folder(self, root):
        return Path(root) / "stages" / f"{re.sub(r'[^a-z0-9.]+', '-', self.name.lower())}-{self.key}"

    def result(self, root):
        """Path of the result: a folder, or a file in it."""
        inside = DOORS[self.door][1]
        return self.folder(root) / inside if inside else self.folder(root)

    def command(self, root):
        """The command as a list, for this interpreter."""
        flag = DOORS[self.door][0].format(self.result(root))
        arguments = [
            argument.form.format(argument.stage.result(root)) if isinstance(argument, Output) else argument
            for argument in self.arguments
        ]
        return [sys.executable, "-m", f"eqvae_jax.{self.door}", *arguments, flag]

    def as_text(self, root):
        """The command as a line for a shell."""
        return shlex.join(["python", *self.command(root)[1:]])

    def finished(self, root):
        """Whether its result is there, whole."""
        product = DOORS[self.door][2]
        if product:  # which appears whole, or not at all
            return (self.folder(root) / product).exists()
        return self.record(root).exists() and self.folder(root).is_dir()

    def record(self, root):
        """Path of the JSON that says how it was made, once it is done."""
        return Path(root) / "stages" / f"{self.folder(root).name}.json"

    def attempts(self, root):
        """Path of JSON lines, of all attempts at making it: running.py."""
        return self.log(root).with_suffix(".jsonl")

    def log(self, root):
        return Path(root) / "logs" / f"{self.folder(root).name}.txt"


@functools.cache
def _key(stage):
    arguments = [
        [argument.form, argument.stage.key] if isinstance(argument, Output) else argument
        for argument in stage.arguments
    ]
    named = [argument for argument in arguments if isinstance(argument, str) and argument.startswith("--config=")]
    config = leaves_of(named[0].partition("=")[2]) if stage.door == "main" else {}
    identity = [FORMAT, stage.door, [a for a in arguments if a not in named or stage.door != "main"], config]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


@functools.cache
def leaves_of(config):
    """A config file's values as it is written, nested dicts, from FILE.py:VARIANT."""
    return recipes.load(config).to_dict()


def in_order(stages):
    """These stages and all they need, each once, what is needed before what needs it."""
    found = {}

    def visit(stage):
        if stage.key not in found:
            for needed in stage.inputs:
                visit(needed)
            found[stage.key] = stage

    for stage in stages:
        visit(stage)
    return list(found.values())
