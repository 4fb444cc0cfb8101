"""The pages of the documentation, and what stands in their fenced blocks."""

import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("sh", "python", "text")  # run, run, neither
_FENCE = re.compile(r"^ *(```+|~~~+)(.*)$")


class Block(NamedTuple):
    """page: file name. line: of its first line of text, from 1. language: what follows the fence."""

    page: str
    line: int
    language: str
    lines: list


class Command(NamedTuple):
    """One command of an `sh` block; words: as the shell hands them on."""

    page: str
    line: int
    words: tuple

    @property
    def where(self):
        return f"{self.page}:{self.line}"


def blocks(path):
    """Every fenced Block of a page. Raises ValueError for a fence that is not closed."""
    found, opened = [], None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened = Block(path.name, number + 1, fence[2].strip(), [])
        elif opened is not None and fence and not fence[2].strip():
            found.append(opened)
            opened = None
        elif opened is not None:
            opened.lines.append(line)
    if opened is not None:
        raise ValueError(f"{opened.page}:{opened.line - 1}: this fence is not closed")
    return found


def commands(block):
    """The Commands of an `sh` block: a line each, or several that end in a backslash; # begins a comment."""
    found, begun, text = [], None, ""
    for number, line in enumerate(block.lines, start=block.line):
        begun = begun or number
        text += line.removesuffix("\\") + " " if line.endswith("\\") else line
        if line.endswith("\\"):
            continue
        if words := shlex.split(text, comments=True):
            found.append(Command(block.page, begun, tuple(words)))
        begun, text = None, ""
    if text:
        raise ValueError(f"{block.page}:{begun}: the last line goes on")
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [command for block in BLOCKS if block.language == "sh" for command in commands(block)]
