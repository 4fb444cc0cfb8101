"""What a compiled program moves, read from its HLO text: collectives and traffic of the memory, loops followed.

XLA's cost_analysis() knows no collectives, and counts the body of a loop once however often it runs.
"""

import math
import re
from typing import NamedTuple

from eqvae_jax.planning.hlo import NAME, parse

CALLERS = ("while", "conditional", "call", "async-start", "fusion")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
# Instructions that move nothing of themselves; the second half of an asynchronous pair waits for what the first moves.
_STILL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
          "opt-barrier", "copy-done", "send-done", "recv-done", "async-done", "async-update", "slice-done"}


class Collective(NamedTuple):
    """size: bytes of the whole array on one device: the result, or a reduce-scatter's operand. devices: of a group.

    times: how often it runs in one call of the program.
    """

    kind: str
    size: int
    devices: int
    times: int

    @property
    def sent(self):
        """Bytes that a device sends, all times together, when they go around a ring, the least that suffices."""
        share = 1 if self.kind == "collective-permute" else (self.devices - 1) / self.devices
        return self.times * self.size * share * (2 if self.kind == "all-reduce" else 1)


class Traffic(NamedTuple):
    """Of one call of a program on one device.

    memory: bytes read from and written to the device's large memory, by the instructions that XLA left; cycles: XLA's
    own estimate of its instructions' clock cycles, 0 where its backend makes none. unknown_loops: how many loops of
    unknown length were counted as running once.
    """

    collectives: tuple
    memory: int
    cycles: int
    unknown_loops: int


def measure(text) -> Traffic:
    """The Traffic of a compiled program, from compiled.as_text(); raises ValueError where it has no entry."""
    computations, entry = parse(text)
    if entry is None:
        raise ValueError("this HLO has no entry computation")
    walk = _Walk(computations)
    memory, cycles = walk.visit(computations[entry], 1)
    return Traffic(tuple(walk.collectives.values()), memory, cycles, walk.unknown_loops)


class _Walk:
    """Adds up a program's instructions; `collectives` are kept by channel, because a TPU names one in several fusions:
    where it starts, where it is worked at and where it ends.
    """

    def __init__(self, computations):
        self.computations, self.collectives, self.unknown_loops = computations, {}, 0

    def visit(self, computation, times):
        """(bytes, cycles) of a computation that runs so many times."""
        memory = cycles = 0
        for one in computation.instructions.values():
            estimated = re.search(r'"estimated_cycles":"(\d+)"', one.rest)
            cycles += times * int(estimated[1]) if estimated else 0
            inner = [self.computations[name] for name in self._called(one)] if one.opcode in CALLERS else []
            if one.opcode == "while":
                length = trip_count(one, self.computations)
                self.unknown_loops += length is None
                extra = [self.visit(inner[0], times * (1 if length is None else length))]
            elif one.opcode == "conditional":
                extra = [max((self.visit(branch, times) for branch in inner), default=(0, 0))]
            elif one.opcode in ("call", "async-start"):
                extra = [self.visit(called, times) for called in inner]
            else:
                if one.opcode == "fusion":
                    self._collectives_inside(inner[0], times)
                self._collective(one, computation, times)
                extra = [(times * self._moved(one, computation), 0)]
            memory, cycles = memory + sum(m for m, _ in extra), cycles + sum(c for _, c in extra)
        return memory, cycles

    def _called(self, one):
        branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
        if branches:
            return NAME.findall(branches[1])
        return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.rest) or _CALLED.findall(one.rest)[:1]

    def _collectives_inside(self, computation, times):
        for one in computation.instructions.values():
            self._collective(one, computation, times)
            if one.opcode == "fusion":
                self._collectives_inside(self.computations[self._called(one)[0]], times)

    def _collective(self, one, computation, times):
        kind = one.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return
        known = computation.instructions
        operands = sum(known[name].bytes for name in one.operands if name in known)
        # The start of a pair returns the operand beside the result, and so the larger of the two is the whole array.
        size = operands if kind in ("reduce-scatter", "collective-permute", "all-to-all") else max(
            operands, one.bytes - (operands if one.opcode.endswith("-start") and kind == "all-gather" else 0))
        if kind == "all-reduce":
            size = operands or one.bytes
            if computation.name.startswith("all-reduce-scatter"):  # a TPU's fusion of the reduction and a slice of it
                kind = "reduce-scatter"
        channel = re.search(r"channel_id=(\d+)", one.rest)
        key = channel[1] if channel else (computation.name, one.name)
        self.collectives[key] = Collective(kind, size, group_size(one.rest), times)

    def _moved(self, one, computation):
        """Bytes that an instruction reads and writes in the large memory."""
        opcode = one.opcode.removesuffix("-start")
        if one.opcode in _STILL or one.opcode.endswith("-done"):
            return 0
        sources = [computation.instructions[name] for name in one.operands if name in computation.instructions]
        if opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * one.in_memory
        if opcode == "dynamic-update-slice":
            return 2 * sources[1].in_memory
        if opcode == "fusion":
            inner = self.computations[self._called(one)[0]]
            read = sum(self._read(inner, parameter) for parameter, source in zip(inner.parameters, sources, strict=True)
                       if source.in_memory)
            return read + _written(inner, one)
        written = one.shapes[0].bytes * (not one.shapes[0].on_chip) if one.opcode.endswith("-start") else one.in_memory
        return written + sum(source.in_memory for source in sources)


    def _read(self, computation, parameter):
        """Bytes of a fusion's operand that it reads: of a stack of layers often one."""
        if not parameter.in_memory:
            return 0
        total, pending = 0, [parameter]
        while pending:
            current = pending.pop()
            for user in computation.users[current.name]:
                if user.opcode == "bitcast":
                    pending.append(user)
                elif user.opcode == "fusion":
                    inner = self.computations[self._called(user)[0]]
                    total += self._read(inner, inner.parameters[user.operands.index(current.name)])
                elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == current.name:
                    total += user.bytes
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == current.name:
                    continue  # written in place
                elif user.opcode != "tuple":
                    return parameter.bytes
        return min(total, parameter.bytes)


def _written(computation, fusion):
    """Bytes that a fusion writes: where it updates a part of an operand in place, that part."""
    root = computation.root
    parts = [computation.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for part, shape in zip(parts, fusion.shapes, strict=False):
        while part.opcode == "bitcast" and part.operands[0] in computation.instructions:
            part = computation.instructions[part.operands[0]]
        if part.opcode == "dynamic-update-slice":
            part, shape = part, computation.instructions[part.operands[1]].shapes[0]
            total += 0 if part.shapes[0].on_chip else shape.bytes
        else:
            total += 0 if shape.on_chip else shape.bytes
    return total


def trip_count(loop, computations):
    """How often a `while` runs: as XLA says, or by the constant that its counter is compared with; None if unknown."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if known:
        return int(known[1])
    name = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    instructions = list(computations[name[1]].instructions.values()) if name else []
    for one in list(instructions):
        if one.opcode == "fusion":
            instructions += computations[_CALLED.search(one.rest)[1]].instructions.values()
    bounds = [one.rest for one in instructions if one.opcode == "constant" and re.fullmatch(r"\d+", one.rest)]
    compares = [one for one in instructions if one.opcode == "compare"]
    if len(bounds) != 1 or len(compares) != 1 or "direction=LT" not in compares[0].rest:
        return None
    return int(bounds[0])


def group_size(text):
    """Devices of one group of a collective's replica_groups, however they are written; 1 where they are not."""
    found = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if found:
        return found[1].count(",") + 1
    found = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text)
    if found:
        return int(found[2])
    found = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\)\))? \{(.*?)\}", text)
    if found:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
    return 1
