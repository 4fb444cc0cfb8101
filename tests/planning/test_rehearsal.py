"""What memory holds while programs run one after another, on sequences whose answer can be counted."""

import gc
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from eqvae_jax.planning.rehearsal import Call, Program, Rehearsal
from eqvae_jax.training.programs import call

MIB = 2**20


def array(mib=1):
    return jax.ShapeDtypeStruct((mib, 256, 1024), jnp.float32, sharding=SingleDeviceSharding(jax.devices()[0]))


@jax.jit
def double(a):
    return a * 2


@partial(jax.jit, donate_argnums=0)
def consume(a):
    return a + 1


@jax.jit
def pair(a):
    return a + 1, a[:1] - 1


def beside(rehearsal):
    return [one.beside / MIB for one in rehearsal.calls]


def test_what_is_still_referred_to_is_held_beside_a_program_and_what_is_not_is_gone():
    rehearsal = Rehearsal()
    a, other = rehearsal.values(array(2)), rehearsal.values(array(5))
    b = rehearsal(double, a)                     # other is beside
    c = rehearsal(double, b)                     # other and a are
    del a, other
    rehearsal(double, c)                         # b is; the result is dropped at once
    rehearsal(double, c)
    assert beside(rehearsal) == [5, 7, 2, 2]
    assert [one.peak / MIB for one in rehearsal.calls] == [5 + 4, 7 + 4, 2 + 4, 2 + 4]
    assert rehearsal.held() == 4 * MIB


def test_only_a_quick_one_asks_for_the_least_effort(monkeypatch):
    real, asked = jax.stages.Lowered.compile, []

    def compile(self, compiler_options=None):
        asked.append(compiler_options)
        return real(self, compiler_options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    for quick in (True, False):
        rehearsal = Rehearsal(quick=quick)
        rehearsal(double, rehearsal.values(array(2)))
    assert asked == [{"exec_time_optimization_effort": -1.0}, None]


def test_a_donated_argument_makes_room_for_the_result():
    rehearsal = Rehearsal()
    a = rehearsal.values(array(3))
    b = rehearsal(consume, a)                    # a is still referred to, as by the loop, and yet gone
    rehearsal(double, b)
    assert beside(rehearsal) == [0, 0]
    assert [one.peak / MIB for one in rehearsal.calls] == [3, 6]
    assert rehearsal.held() == 3 * MIB


def test_results_count_one_by_one():
    rehearsal = Rehearsal()
    a = rehearsal.values(array(3))
    large, small = rehearsal(pair, a)
    del a, large
    rehearsal(double, small)
    assert rehearsal.calls[1].peak == 2 * MIB and (small.shape, small.dtype) == ((1, 256, 1024), jnp.float32)


def test_residuals_of_a_vjp_live_between_its_two_programs():
    @jax.jit
    def forward(w, x):
        return jax.vjp(lambda w: jnp.sin(w) * x, w)

    @jax.jit
    def backward(pull, y):
        return pull(y)

    def step(w, x, run=call):
        y, pull = run(forward, w, x)
        z = run(double, y)
        return run(backward, pull, z)

    rehearsal = Rehearsal()
    w, x = rehearsal.values((array(), array()))
    (gradient,) = step(w, x, rehearsal)
    # Beside `double`: w, x and what `backward` needs of the two, cos(w) and x or their product.
    assert beside(rehearsal)[1] in (3, 4) and gradient.shape == array().shape
    assert [one.program.name for one in rehearsal.calls] == ["forward", "double", "backward"]
    del gradient
    gc.collect()
    assert rehearsal.held() == 2 * MIB


def test_a_program_is_compiled_once_for_the_same_shapes():
    lines = []
    rehearsal = Rehearsal(lines.append)
    a = rehearsal.values(array())
    rehearsal(double, rehearsal(double, a))
    rehearsal(double, rehearsal.values(array(2)))
    assert len(rehearsal.programs) == 2 and len(rehearsal.calls) == 3
    assert sum(line.startswith("compiled double") for line in lines) == 2


def test_the_peak_of_a_call():
    program = Program("p", arguments=10, temporaries=5, outputs=7, aliased=4, flops=0.0, xla_flops=0.0, xla_bytes=0.0,
                      traffic=None, out=None, out_bytes=(), donated=(), seconds=0.0)
    assert Call(program, beside=100).peak == 100 + 10 + 5 + 7 - 4


def test_a_program_that_xla_refuses_is_named_with_what_it_needs(monkeypatch):
    from eqvae_jax.planning import rehearsal

    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of "
                                       "15.75G hbm. Exceeded hbm capacity by 4.75G.")
    explained = rehearsal._explained("decode", error)
    assert isinstance(explained, rehearsal.DoesNotFit)
    assert str(explained) == "the program decode does not fit into the memory of this chip: 20.50GiB of 15.75GiB"
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    assert rehearsal._explained("decode", other) is other
    with pytest.raises(rehearsal.DoesNotFit):
        raise explained
