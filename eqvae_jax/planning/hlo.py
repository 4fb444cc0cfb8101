"""The text of a compiled program, HLO, as computations of instructions with shapes."""

import math
import re
from functools import cached_property
from typing import NamedTuple

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
NAME = re.compile(r"%([\w.\-]+)")


class Shape(NamedTuple):
    dtype: str
    dims: tuple
    layout: str

    @property
    def bytes(self):
        """As it lies in memory, rounded up to whole tiles."""
        dims = list(self.dims)
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if tile and dims:
            minor_first = [int(axis) for axis in order.split(",") if axis]
            for axis, size in zip(minor_first, reversed([int(n) for n in tile[1].split(",")]), strict=False):
                dims[axis] = -(-dims[axis] // size) * size
        digits = re.search(r"\d+", self.dtype)
        bits = BITS.get(self.dtype, int(digits[0]) if digits else 8)
        return math.prod(dims) * bits // 8

    @property
    def on_chip(self):
        """Whether XLA keeps it in another memory than the large one: S(1) of a TPU is next to its units."""
        return "S(" in self.layout


class Instruction(NamedTuple):
    name: str
    shapes: tuple
    opcode: str
    operands: tuple
    rest: str
    root: bool

    @property
    def bytes(self):
        return sum(shape.bytes for shape in self.shapes)

    @property
    def in_memory(self):
        return sum(shape.bytes for shape in self.shapes if not shape.on_chip)


class Computation:
    """name and instructions, by name in order."""

    def __init__(self, name):
        self.name, self.instructions = name, {}

    @cached_property
    def root(self):
        return next((one for one in self.instructions.values() if one.root), None)

    @cached_property
    def users(self):
        found = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for name in one.operands:
                found.get(name, []).append(one)
        return found

    @cached_property
    def parameters(self):
        """In the order of their numbers."""
        found = [one for one in self.instructions.values() if one.opcode == "parameter"]
        return sorted(found, key=lambda one: int(one.rest))


def result_bytes(text):
    """Bytes of each result of a program on one device, in order."""
    header = re.search(r"entry_computation_layout=\{(.*)", text.partition("\n")[0])
    if not header:
        raise ValueError("this HLO names no entry_computation_layout")
    results = header[1].rpartition("->")[2]
    results = results[:_closing(results) + 1] if results.startswith("(") else results.partition("}")[0] + "}"
    return [shape.bytes for shape in shapes_in(results)]


def parse(text):
    """({name: Computation}, name of the entry) of HLO text."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if line.endswith("{") and (header := _HEADER.match(line)):
            current = computations[header[1]] = Computation(header[1])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            one = _instruction(line.strip())
            current.instructions[one.name] = one
    return computations, entry


def shapes_in(text):
    return tuple(Shape(kind, tuple(int(n) for n in dims.split(",") if n), layout or "")
                 for kind, dims, layout in _SHAPE.findall(re.sub(r"/\*.*?\*/", "", text)))


def _instruction(line):
    name, _, right = line.partition(" = ")
    end = _closing(right) + 1 if right.startswith("(") else right.index(" ")
    shape, right = right[:end], right[end:].strip()
    opcode, _, right = right.partition("(")
    end = _closing("(" + right) - 1
    operands, rest = right[:end], right[end + 1:].lstrip(", ")
    if opcode in ("parameter", "constant"):
        rest = operands  # its number, its value
    return Instruction(name.removeprefix("ROOT ").lstrip("%"), shapes_in(shape), opcode,
                       tuple(NAME.findall(operands)), rest, name.startswith("ROOT "))


def _closing(text):
    """Where the parenthesis that text begins with is closed."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    raise ValueError(f"a parenthesis is not closed in {text[:80]!r}")
