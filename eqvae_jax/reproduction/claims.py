"""What the numbers say of a claim: it holds, it does not, or it is undecided at this scale."""

import math
from typing import NamedTuple

CONFIDENCE = 0.95
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided at this scale"


class Claim(NamedTuple):
    """One sentence of the paper: the number at `less` is below the number at `more`, both (row, column) of a table."""

    text: str
    less: tuple[str, str]
    more: tuple[str, str]


class Estimate(NamedTuple):
    """A mean over seeds, and its standard error: None of fewer than two."""

    mean: float
    error: float | None
    count: int


class Verdict(NamedTuple):
    """What became of a claim. difference: of `more` minus `less`, seed by seed, so positive is for the claim.

    low, high: of its confidence interval; None of fewer than two seeds. missing: how many seeds have no number, because
    a command failed or what it measured was not finite.
    """

    claim: Claim
    decision: str
    difference: Estimate | None
    low: float | None
    high: float | None
    missing: int = 0


def estimate(values):
    """The mean and its standard error of some numbers; None of none. Not finite ones make a mean that is not finite."""
    values = list(values)
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, None, 1)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(variance / len(values)), len(values))


def judge(claim, numbers):
    """The Verdict on a claim from numbers, {seed: {(row, column): value}}.

    The two arms of a seed share their start, their data's order and their noise, so that differences are taken seed by
    seed. The claim holds where Student's 95 % interval of their mean is above 0, does not where it is below, and is
    undecided otherwise; always of one seed, and where a seed has no number: those that have would be a selection.
    """
    from scipy.stats import t

    pairs = [(row.get(claim.more), row.get(claim.less)) for row in numbers.values()]
    finite = [more - less for more, less in pairs if all(x is not None and math.isfinite(x) for x in (more, less))]
    found, missing = estimate(finite), len(pairs) - len(finite)
    if found is None or found.error is None or missing:
        return Verdict(claim, UNDECIDED, found, None, None, missing)
    half = float(t.ppf(0.5 + CONFIDENCE / 2, found.count - 1)) * found.error
    low, high = found.mean - half, found.mean + half
    decision = HOLDS if low > 0 else FAILS if high < 0 else UNDECIDED
    return Verdict(claim, decision, found, low, high)
