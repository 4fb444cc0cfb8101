"""Evaluation batches: one pass, in order, the same each time, with a mask for padding and what is broken."""

import numpy as np
import pytest
from memory_source import Memory, assert_equal, joined, pretend

from eqvae_jax.data.cropping import center_crop, random_crop
from eqvae_jax.data.images import TooManyBroken, evaluation_batches

SIZE = 8


def test_evaluation_is_one_padded_pass_of_centre_crops():
    source = Memory(10)
    data = evaluation_batches(source, image_size=SIZE, batch_size=4)
    first, again = list(data), list(data)
    assert len(data) == len(first) == 3
    x = joined(first)
    assert_equal(x, joined(again))
    assert x["mask"].tolist() == [True] * 10 + [False] * 2
    assert x["index"].tolist() == x["label"].tolist() == [*range(10), 9, 9]
    for i in range(10):
        np.testing.assert_array_equal(x["image"][i], center_crop(source[i]["image"], SIZE))


def test_evaluation_of_part_is_spread_over_the_source():
    x = joined(list(evaluation_batches(Memory(10), image_size=SIZE, batch_size=5, limit=5)))
    assert x["index"].tolist() == [0, 2, 4, 6, 8] and x["mask"].all()
    assert len(evaluation_batches(Memory(10), image_size=SIZE, batch_size=5, limit=99)) == 2


def test_evaluation_of_many_crops():
    source = Memory(3)
    x = joined(list(evaluation_batches(source, image_size=SIZE, batch_size=4, crops=4)))
    assert x["index"].tolist() == [0] * 4 + [1] * 4 + [2] * 4 and x["mask"].all()
    assert len(np.unique(x["image"], axis=0)) == 12
    y = joined(list(evaluation_batches(source, image_size=SIZE, batch_size=6, crops=4)))
    assert_equal(x, y)


def test_evaluation_crops_are_of_the_share_of_the_short_side_that_was_asked_for():
    source = Memory(3)
    x = joined(list(evaluation_batches(source, image_size=SIZE, batch_size=4, crops=4, min_crop=0.9, max_crop=0.95)))
    for position in range(12):
        image = source[position // 4]["image"]
        expected = random_crop(image, SIZE, np.random.default_rng(position), 0.9, 0.95)
        np.testing.assert_array_equal(x["image"][position], expected)
    usual = [joined(list(evaluation_batches(source, image_size=SIZE, batch_size=4, crops=4, **options)))
             for options in ({}, {"min_crop": 0.5, "max_crop": 1.0})]
    assert_equal(*usual)
    assert (x["image"] != usual[0]["image"]).any((1, 2, 3)).sum() > 6  # the images are small: some cuts agree


def test_one_crop_is_the_centre_whatever_the_shares():
    plain, other = (joined(list(evaluation_batches(Memory(3), image_size=SIZE, batch_size=4, **options)))
                    for options in ({}, {"min_crop": 0.2, "max_crop": 0.3}))
    assert_equal(plain, other)


def test_evaluation_over_two_processes(monkeypatch):
    source = Memory(9)
    whole = list(evaluation_batches(source, image_size=SIZE, batch_size=4))
    halves = []
    for k in range(2):
        pretend(monkeypatch, k, 2)
        halves.append(list(evaluation_batches(source, image_size=SIZE, batch_size=4)))
    for one, first, second in zip(whole, *halves, strict=True):
        assert_equal(one, joined([first, second]))


def test_evaluation_masks_what_is_broken():
    reports = []
    data = evaluation_batches(Memory(10, broken=[3, 9]), image_size=SIZE, batch_size=4,
                              on_broken=lambda *report: reports.append(report))
    x = joined(list(data))
    assert x["mask"].tolist() == [True] * 3 + [False] + [True] * 5 + [False] * 3
    assert x["index"].tolist() == [*range(10), 9, 9] and x["label"][3] == 4 and x["label"][9] == 0
    assert reports == [("3.png", "spoilt"), ("9.png", "spoilt")]
    few = Memory(98, broken=[97])  # padded to 100 examples by repeating the last, which counts once
    assert sum(batch["mask"].sum() for batch in evaluation_batches(few, image_size=SIZE, batch_size=10)) == 97
    with pytest.raises(TooManyBroken, match="3 of 100 examples are broken"):
        list(evaluation_batches(Memory(200, broken=[3, 50, 70]), image_size=SIZE, batch_size=4))
    with pytest.raises(TooManyBroken, match="no readable image"):
        list(evaluation_batches(Memory(2, broken=[0, 1]), image_size=SIZE, batch_size=4))


@pytest.mark.parametrize("wrong, says", [
    ({"limit": 0}, "limit=0"), ({"crops": 0}, "crops=0"), ({"batch_size": 0}, "batch_size=0"),
    ({"min_crop": 0.0}, "min_crop=0.0"), ({"min_crop": 0.9, "max_crop": 0.5}, "max_crop=0.5"),
    ({"max_crop": 1.5}, "max_crop=1.5"), ({"min_crop": float("nan")}, "min_crop=nan"),
])
def test_arguments_that_cannot_work_fail_at_once(wrong, says):
    with pytest.raises(ValueError, match=says):  # before the first batch is read
        evaluation_batches(Memory(3), **({"image_size": SIZE, "batch_size": 4, "crops": 2} | wrong))


def test_a_batch_must_divide_over_the_processes(monkeypatch):
    pretend(monkeypatch, 0, 3)
    with pytest.raises(ValueError, match="batch_size=4 does not divide over 3 processes"):
        evaluation_batches(Memory(3), image_size=SIZE, batch_size=4)
