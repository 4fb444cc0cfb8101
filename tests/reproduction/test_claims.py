"""Verdicts on claims: known answers of paired differences."""

import math

import pytest

from eqvae_jax.reproduction.claims import FAILS, HOLDS, UNDECIDED, Claim, estimate, judge

CLAIM = Claim("EQ is lower", ("EQ", "FID"), ("plain", "FID"))


def numbers(pairs):
    return {seed: {("plain", "FID"): plain, ("EQ", "FID"): eq} for seed, (plain, eq) in enumerate(pairs)}


def test_the_standard_error_is_of_the_mean():
    found = estimate([1.0, 2.0, 6.0])
    assert found.mean == 3 and found.count == 3
    assert found.error == pytest.approx(math.sqrt(7) / math.sqrt(3))  # variance (4 + 1 + 9) / 2
    assert estimate([2.5]) == (2.5, None, 1) and estimate([]) is None


def test_seeds_are_compared_one_by_one():
    """Seeds differ by tens and arms by one: only the differences, seed by seed, can tell."""
    verdict = judge(CLAIM, numbers([(10, 9), (30, 28.8), (50, 49.1)]))
    assert verdict.decision == HOLDS
    assert verdict.difference.mean == pytest.approx((1 + 1.2 + 0.9) / 3)
    mean, half = verdict.difference.mean, 4.302653 * verdict.difference.error  # Student's, of two degrees of freedom
    assert (verdict.low, verdict.high) == pytest.approx((mean - half, mean + half))


def test_what_is_the_other_way_round_does_not_hold():
    assert judge(CLAIM, numbers([(9, 10), (28.8, 30), (49.1, 50)])).decision == FAILS


@pytest.mark.parametrize("pairs", [[(10, 9), (30, 31), (50, 49.5)], [(10, 5)], [(10, math.nan), (20, 1)], []])
def test_noise_one_seed_or_no_number_decides_nothing(pairs):
    assert judge(CLAIM, numbers(pairs)).decision == UNDECIDED


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_seeds_without_a_number_leave_a_selection_which_decides_nothing(nothing):
    """The other two alone would decide."""
    assert judge(CLAIM, numbers([(10, 9), (12, 11)])).decision == HOLDS
    found = judge(CLAIM, numbers([(10, 9), (nothing, 4), (12, 11)]))
    assert found.decision == UNDECIDED and found.missing == 1 and found.low is None
    assert found.difference.count == 2 and found.difference.mean == pytest.approx(1)
