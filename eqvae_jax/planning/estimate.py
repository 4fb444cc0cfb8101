"""From what a step does to how long it takes: a roofline of three terms, and the memory it needs."""

from typing import NamedTuple

TERMS = ("compute", "memory", "interconnect")


class Cost(NamedTuple):
    """Of a step on one device, in numbers that can be averaged over kinds of steps.

    flops: of products; moved: bytes to and from the large memory; sent: bytes to other chips; the rest: seconds, each
    term's and `step`, in which a program takes as long as its longest term. cycles: by XLA's own estimate.
    """

    flops: float
    moved: float
    sent: float
    compute: float
    memory: float
    interconnect: float
    step: float
    cycles: float

    @property
    def dominating(self):
        return max(TERMS, key=lambda term: getattr(self, term))


def cost_of(calls, chip, devices) -> Cost:
    """The Cost of a step's calls on a `hardware.Chip`; without one (None), of unknown speed, the seconds are 0."""
    total = [0.0] * len(Cost._fields)
    for program, _ in calls:
        flops, traffic = program.flops / devices, program.traffic
        sent = sum(collective.sent for collective in traffic.collectives)
        seconds = [0.0] * 3 if chip is None else [
            flops / chip.flops, traffic.memory / chip.hbm_bandwidth, sent / chip.link_bandwidth]
        numbers = (flops, traffic.memory, sent, *seconds, max(seconds), traffic.cycles)
        total = [a + b for a, b in zip(total, numbers, strict=True)]
    return Cost(*total)


def collectives_of(calls):
    """{kind: (how many, bytes as XLA names them, bytes sent)} of one step on one device."""
    found = {}
    for program, _ in calls:
        for one in program.traffic.collectives:
            count, size, sent = found.get(one.kind, (0, 0, 0.0))
            found[one.kind] = (count + one.times, size + one.times * one.size, sent + one.sent)
    return found


def largest_batch(batch, peak, fixed, capacity):
    """The largest batch on a device that fits, were memory `fixed` bytes and the rest in proportion to the batch.

    0 where not even one example does.
    """
    growth = max(peak - fixed, 0) / batch
    if capacity <= fixed:
        return 0
    return int((capacity - fixed) / growth) if growth else batch


def smallest_slice(slices, examples, largest):
    """The first of a chip's slices that holds so many examples at `largest` a chip; None where none does."""
    chips = lambda name: _product(int(side) for side in name.split("x"))
    return next((name for name in slices if largest * chips(name) >= examples), None)


def _product(numbers):
    result = 1
    for number in numbers:
        result *= number
    return result
