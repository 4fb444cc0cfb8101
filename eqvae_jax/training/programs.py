"""How a task's step calls its compiled programs: for real, ahead of time, or rehearsed; and the shapes a step takes on.

A task calls each of its jitted programs as run(program, *args, **static). `call` is what training does. Another `run`
may take shapes for arrays, do what it likes with the program, and return the shapes of its results: the step itself
then says which programs there are, with which arguments and in which order, and no second description can go stale.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np


def call(program, *args, **static):
    return program(*args, **static)


def compile_only(program, *args, **static):
    """Compiles a jitted program for arguments given as shapes, and returns the shapes of its results.

    The executable lands where a later call with such arguments finds it.
    """
    lowered = program.lower(*args, **static)
    return placed(lowered.out_info, lowered.compile().output_shardings)


def placed(shapes, shardings):
    """The ShapeDtypeStructs of `shapes`, each with its sharding."""
    place = lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding)
    return jax.tree.map(place, shapes, shardings)


class Variant(NamedTuple):
    """A kind of step that a task takes now and then, compiled for shapes of its own.

    group: variants of one group differ in `size` alone, a number in which their cost is smooth. share: how often it is
    taken, 0..1. train_step: (state, batch, step, run) as Task.train_step, and always of this kind.
    """

    name: str
    group: str
    share: float
    size: float
    train_step: Callable


def spread(variants, most):
    """At most so many variants of each group (0: all), evenly spread in size from the smallest to the largest."""
    chosen = []
    for group in dict.fromkeys(variant.group for variant in variants):
        members = sorted((v for v in variants if v.group == group), key=lambda variant: variant.size)
        count = min(most or len(members), len(members))
        places = np.linspace(0, len(members) - 1, count) if count > 1 else [len(members) - 1]
        chosen += [members[round(place)] for place in places]
    return chosen


def expected(variants, costs):
    """The mean cost of a step, from costs of some variants of each group, {name: numbers}, interpolated in size.

    Raises ValueError where nothing is known of a group.
    """
    total = 0.0
    for group in dict.fromkeys(variant.group for variant in variants):
        members = [variant for variant in variants if variant.group == group]
        known = sorted((v.size, v.name) for v in members if v.name in costs)
        if not known:
            raise ValueError(f"no cost is known of any variant of {group!r}")
        sizes = [size for size, _ in known]
        columns = np.stack([np.asarray(costs[name], float) for _, name in known], axis=-1)   # (numbers, sizes)
        for variant in members:
            total += variant.share * np.array([np.interp(variant.size, sizes, column) for column in columns])
    return total
