"""Floating-point operations of a program, counted in its jaxpr: two for each multiply-accumulate of products and
convolutions, and none for anything else.

XLA's own cost analysis counts the body of a loop once, however often it runs, and knows only compiled programs; this
count follows the loops, needs no backend, and is what the literature means by a model's FLOPs.
"""

import math

import jax
from jax.interpreters.partial_eval import dce_jaxpr


def count(jaxpr):
    """FLOPs of a ClosedJaxpr, over all devices. A `while` of unknown length counts once, of branches the costliest."""
    return _count(_live(getattr(jaxpr, "jaxpr", jaxpr)))


class FlopCount:
    """A `run` (training.programs) that counts: `total` is the FLOPs of all programs since it was made."""

    def __init__(self):
        self.total = 0

    def __call__(self, program, *args, **static):
        traced = program.trace(*args, **static)
        self.total += count(traced.jaxpr)
        return traced.out_info


def _live(jaxpr):
    # The pullback of a pullback's unused half is traced and never compiled.
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _count(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _dot(equation)
        elif equation.primitive.name == "conv_general_dilated":
            total += _convolution(equation)
        else:
            inner = [_count(part) for part in _inside(equation.params)]
            if equation.primitive.name == "cond":
                total += max(inner)
            else:
                total += equation.params.get("length", 1) * sum(inner) if inner else 0
    return total


def _inside(params):
    """The jaxprs among an equation's parameters."""
    for value in jax.tree.leaves(list(params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns"):
            yield jaxpr


def _dot(equation):
    contracted = equation.params["dimension_numbers"][0][0]
    left = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)


def _convolution(equation):
    """Border pixels count in full; of an input spread out with zeros, as in a transposed one, only what is no zero."""
    numbers, kernel = equation.params["dimension_numbers"].rhs_spec, equation.invars[1].aval.shape
    taps = math.prod(kernel[axis] for axis in numbers[1:])  # input channels of a group, and the window
    return 2 * equation.outvars[0].aval.size * taps // math.prod(equation.params["lhs_dilation"])
