"""The roofline's arithmetic, and what follows from it."""

import numpy as np
import pytest

from eqvae_jax.hardware import Chip
from eqvae_jax.planning.estimate import collectives_of, cost_of, largest_batch, smallest_slice
from eqvae_jax.planning.rehearsal import Call, Program
from eqvae_jax.planning.traffic import Collective, Traffic
from eqvae_jax.training.programs import Variant, expected, spread

CHIP = Chip("toy", flops=100.0, hbm=1000, hbm_bandwidth=10.0, link_bandwidth=5.0, slices=("2x2", "2x4", "4x4"))


def program(flops, memory, *collectives):
    return Call(Program("p", 0, 0, 0, 0, flops, 0.0, 0.0, Traffic(collectives, memory, 11, 0), None, (), (), 0.0), 0)


def test_a_step_takes_the_longest_term_of_each_of_its_programs():
    gather = Collective("all-gather", 40, 4, 2)  # 2 x 30 bytes sent: 12 s
    calls = [program(4 * 500.0, 20), program(4 * 100.0, 80, gather), program(0.0, 0, gather)]
    cost = cost_of(calls, CHIP, devices=4)
    assert (cost.flops, cost.moved, cost.sent, cost.cycles) == (600, 100, 120, 33)
    assert (cost.compute, cost.memory, cost.interconnect) == (5 + 1, 2 + 8, 12 + 12)
    assert cost.step == 5 + 12 + 12 and cost.dominating == "interconnect"
    assert collectives_of(calls) == {"all-gather": (4, 160, 120.0)}


def test_an_unknown_chip_has_no_seconds():
    cost = cost_of([program(500.0, 20)], None, devices=1)
    assert (cost.flops, cost.moved, cost.step) == (500, 20, 0)


def test_the_largest_batch_and_the_smallest_slice():
    assert largest_batch(4, peak=600, fixed=200, capacity=1000) == 8
    assert largest_batch(1, peak=600, fixed=200, capacity=500) == 0
    assert largest_batch(1, peak=600, fixed=700, capacity=500) == 0
    assert smallest_slice(CHIP.slices, 32, largest=8) == "2x2"
    assert smallest_slice(CHIP.slices, 33, largest=8) == "2x4"
    assert smallest_slice(CHIP.slices, 129, largest=8) is None


def variants():
    return [Variant(f"{group} {size}", group, share, size, None)
            for group, size, share in (("a", 3, 0.1), ("a", 1, 0.2), ("a", 9, 0.3), ("a", 5, 0.1), ("b", 7, 0.3))]


def test_variants_are_spread_by_size_with_both_ends():
    names = lambda most: [variant.name for variant in spread(variants(), most)]
    assert names(1) == ["a 9", "b 7"] and names(2) == ["a 1", "a 9", "b 7"]
    assert names(3) == ["a 1", "a 5", "a 9", "b 7"] and len(names(0)) == 5


def test_costs_between_compiled_sizes_are_interpolated_and_weighed_by_their_share():
    every = variants()
    linear = lambda size: np.array([2 * size + 1, size])
    known = {f"a {size}": linear(size) for size in (1, 9)} | {"b 7": [100.0, 0.0]}
    mean = 0.1 * linear(3) + 0.2 * linear(1) + 0.3 * linear(9) + 0.1 * linear(5) + 0.3 * np.array([100.0, 0.0])
    np.testing.assert_allclose(expected(every, known), mean)
    with pytest.raises(ValueError, match="'b'"):
        expected(every, {"a 1": [1.0]})
