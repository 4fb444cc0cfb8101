"""A training step gone through with shapes in place of arrays: its programs compiled, and what memory holds meanwhile.

The step itself calls its programs (training.programs), so nothing is described twice. What an array would be is a
`Value` here, and lives as long: until nothing in Python refers to it, or a program that it is donated to takes it. So
the residuals that lie in memory between two programs count exactly as long as the step's own code keeps them.
"""

import re
import time
import weakref
from typing import NamedTuple

import jax
import numpy as np

from eqvae_jax.planning.hlo import result_bytes
from eqvae_jax.planning.traffic import Traffic, measure
from eqvae_jax.training.flops import count

# XLA's least effort for the program's own speed: one convolution's gradient takes the TPU's compiler 2 s instead of 11
# to 16, and leaves in the large memory what would otherwise be kept in the small one.
QUICK = {"exec_time_optimization_effort": -1.0}


class DoesNotFit(ValueError):
    """XLA refuses a program whose own arguments and temporaries are more than the device has."""


class Value(jax.ShapeDtypeStruct):
    """A ShapeDtypeStruct that one can ask whether it is still referred to."""


class Program(NamedTuple):
    """A compiled program, bytes on one device. flops: over all devices, of its products (training.flops).

    out: its results' ShapeDtypeStructs, and out_bytes what each takes. donated: of its arguments' leaves, whether they
    are given up. xla_flops, xla_bytes: XLA's own numbers on one device, in which a loop's body counts once.
    """

    name: str
    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    flops: float
    xla_flops: float
    xla_bytes: float
    traffic: Traffic
    out: object
    out_bytes: tuple
    donated: tuple
    seconds: float


class Call(NamedTuple):
    """One run of a program. beside: bytes on a device that are neither arguments of it nor its doing."""

    program: Program
    beside: int

    @property
    def peak(self):
        """Bytes on a device while it runs."""
        p = self.program
        return self.beside + p.arguments + p.temporaries + p.outputs - p.aliased


class Rehearsal:
    """A `run` for Task.train_step: compiles each program once, and notes each call in `calls`."""

    def __init__(self, say=lambda line: None, quick=False):
        """say: is told which program is compiled, and how long it took. quick: compiles with `QUICK`."""
        self.calls, self.programs, self._say, self._options = [], {}, say, QUICK if quick else None
        self._live = {}  # id -> (weak reference, bytes on a device)

    def values(self, shapes):
        """The tree of Values for a tree of ShapeDtypeStructs with shardings: in memory from now on."""
        return jax.tree.map(lambda leaf: self._value(leaf, device_bytes(leaf)), shapes)

    def held(self):
        """Bytes on a device of all Values that are alive."""
        return sum(size for value, size in self._live.values() if value() is not None)

    def __call__(self, program, *args, **static):
        compiled = self._compiled(program, args, static)
        leaves = jax.tree.leaves(args)
        mine = {id(leaf) for leaf in leaves}
        beside = sum(size for number, (value, size) in self._live.items() if number not in mine and value() is not None)
        self.calls.append(Call(compiled, beside))
        for leaf, donated in zip(leaves, compiled.donated, strict=True):
            if donated:
                self._live.pop(id(leaf), None)
        out, structure = jax.tree.flatten(compiled.out)
        return structure.unflatten(map(self._value, out, compiled.out_bytes))

    def _value(self, leaf, size):
        value = Value(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        number, live = id(value), self._live
        live[number] = (weakref.ref(value, lambda gone: live.pop(number, None)), size)
        return value

    def _compiled(self, program, args, static):
        leaves, structure = jax.tree.flatten(args)
        key = (id(program), structure, tuple(map(_kind, leaves)), tuple(sorted(static.items())))
        if key not in self.programs:
            plain = structure.unflatten([_plain(leaf) for leaf in leaves])
            self.programs[key] = compile_and_measure(program, plain, static, self._say, self._options)
        return self.programs[key]


def compile_and_measure(program, args, static, say, options=None):
    """The Program of a jitted function for arguments given as shapes. DoesNotFit where XLA runs out of memory.

    options: of jax.stages.Lowered.compile.
    """
    begun = time.monotonic()
    traced = program.trace(*args, **static)
    name, lowered = getattr(program, "__name__", "program"), traced.lower()
    say(f"compiling {name}{_largest(args)} ...")
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        raise _explained(name, error) from error
    seconds = time.monotonic() - begun
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis() or {}, compiled.as_text()
    place = lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding)
    out = jax.tree.map(place, lowered.out_info, compiled.output_shardings)
    say(f"compiled {name} in {seconds:.0f} s: {memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries")
    return Program(
        name, memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes,
        memory.alias_size_in_bytes, count(traced.jaxpr), cost.get("flops", 0.0), cost.get("bytes accessed", 0.0),
        measure(text), out, tuple(result_bytes(text)),
        tuple(info.donated for info in jax.tree.leaves(lowered.args_info[0])), seconds)


def device_bytes(leaf):
    """Bytes of one device's part of a ShapeDtypeStruct."""
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return int(np.prod(shape)) * leaf.dtype.itemsize


def _plain(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if isinstance(leaf, Value) else leaf


def _kind(leaf):
    """What of an argument decides which program is compiled."""
    return (getattr(leaf, "shape", ()), str(getattr(leaf, "dtype", type(leaf))), getattr(leaf, "sharding", None))


def _largest(args):
    leaves = [leaf for leaf in jax.tree.leaves(args) if getattr(leaf, "ndim", 0) > 1]
    images = [leaf for leaf in leaves if leaf.ndim == 4 and leaf.shape[-1] == 3 and leaf.shape[1] > 8]
    return f" for images {' x '.join(map(str, images[0].shape))}" if images else ""


def _explained(name, error):
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) and not used:
        return error
    numbers = f": {used[1]}iB of {used[2]}iB" if used else ""
    return DoesNotFit(f"the program {name} does not fit into the memory of this chip{numbers}")
