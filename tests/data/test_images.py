"""Training batches: the same examples from any start, number of processes or workers; broken images; limits."""

import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from memory_source import Memory, assert_equal, joined, pretend
from PIL import Image

from eqvae_jax.data.cropping import center_crop, random_crop, side_for_random_crop
from eqvae_jax.data.images import TooManyBroken, train_batches
from eqvae_jax.data.sources import open_source

SIZE = 8


def batches(source, count, **options):
    options = {"image_size": SIZE, "batch_size": 4, "seed": 3} | options
    iterator = train_batches(source, **options)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def test_batches_are_what_the_seed_and_the_position_say():
    source = Memory(10)
    x = joined(batches(source, 5))
    assert x["image"].shape == (20, SIZE, SIZE, 3) and x["image"].dtype == np.uint8
    assert x["label"].dtype == x["index"].dtype == np.int32
    assert x["index"].tolist() == list(range(20))
    for epoch in x["label"].reshape(2, 10):
        assert sorted(epoch) == list(range(10))
    assert x["label"][:10].tolist() != x["label"][10:].tolist() != list(range(10))
    for position in 0, 7, 19:
        image = source[x["label"][position]]["image"]
        expected = random_crop(image, SIZE, np.random.default_rng((3, position)))
        np.testing.assert_array_equal(x["image"][position], expected)


def test_the_seed_changes_order_and_crops():
    source = Memory(10)
    a, b = joined(batches(source, 5)), joined(batches(source, 5, seed=4))
    assert a["label"].tolist() != b["label"].tolist()
    # Were the epoch added to the seed, the second epoch of seed 3 would be the first of seed 4.
    assert a["label"][10:].tolist() != b["label"][:10].tolist()
    one = Memory(1)
    assert (joined(batches(one, 1))["image"] != joined(batches(one, 1, seed=4))["image"]).any()


@pytest.mark.parametrize("start", [1, 3, 1000])
def test_starting_later_is_skipping(start):
    source, end = Memory(10), start + 2
    expected = batches(source, end)[start:] if start < 10 else None
    got = batches(source, 2, start_step=start)
    assert got[0]["index"].tolist() == list(range(4 * start, 4 * start + 4))
    if expected:
        assert_equal(joined(got), joined(expected))


def test_positions_wrap_at_int32():
    got = batches(Memory(10), 2, start_step=2**29 - 1)
    assert joined(got)["index"].tolist() == [2**31 - 4, 2**31 - 3, 2**31 - 2, 2**31 - 1, 0, 1, 2, 3]


def test_two_processes_have_the_halves_of_one(monkeypatch):
    source = Memory(10)
    whole = batches(source, 4, start_step=1)
    halves = []
    for k in range(2):
        pretend(monkeypatch, k, 2)
        halves.append(batches(source, 4, start_step=1))
    for one, first, second in zip(whole, *halves, strict=True):
        assert_equal(one, joined([first, second]))


def test_workers_change_nothing_and_report_what_is_broken():
    source = Memory(10, broken=[4])
    reports = [], []
    options = {"start_step": 2, "broken_limit": 0.5}
    a = batches(source, 7, **options, on_broken=lambda *report: reports[0].append(report))
    b = batches(source, 7, **options, on_broken=lambda *report: reports[1].append(report), workers=2)
    assert_equal(joined(a), joined(b))
    assert reports[0] == reports[1] == [("4.png", "spoilt")]


def test_workers_outlive_signals_but_not_their_parent():
    code = """
import multiprocessing, sys
from eqvae_jax.data.images import train_batches
from eqvae_jax.data.sources import open_source
if __name__ == "__main__":
    batches = train_batches(open_source("photos"), image_size=8, batch_size=2, seed=0, workers=1)
    print(next(batches)["index"].tolist(), flush=True)
    print(multiprocessing.active_children()[0].pid, flush=True)
    sys.stdin.readline()
    for _ in range(9):
        batch = next(batches)
    print(batch["index"].tolist(), flush=True)
    sys.stdin.readline()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code], text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, env=environment)
    with parent:
        try:
            assert parent.stdout.readline() == "[0, 1]\n"
            worker = int(parent.stdout.readline())
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
            parent.stdin.write("\n")
            parent.stdin.flush()
            assert parent.stdout.readline() == "[18, 19]\n"
        finally:
            parent.kill()
    deadline = time.monotonic() + 20
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)


def alive(pid):
    try:  # a process that nobody waits for stays in the table as a zombie
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_crop_and_flip_choices():
    source = Memory(3)
    plain, flipped = joined(batches(source, 6)), joined(batches(source, 6, flip=True))
    same = (plain["image"] == flipped["image"]).all((1, 2, 3))
    mirrored = (plain["image"] == flipped["image"][:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all() and 4 < same.sum() < 20
    middle = joined(batches(source, 3, crop="center"))
    for image, label in zip(middle["image"], middle["label"], strict=True):
        np.testing.assert_array_equal(image, center_crop(source[label]["image"], SIZE))
    full = joined(batches(source, 3, min_crop=1.0))
    assert (full["image"] != plain["image"][:12]).any()


def test_broken_image_is_replaced_by_the_next_readable_one():
    whole, spoilt = Memory(10), Memory(10, broken=[4, 5, 9])
    reports = []
    a = joined(batches(whole, 5))
    b = joined(batches(spoilt, 5, broken_limit=1, on_broken=lambda *report: reports.append(report)))
    moved = {4: 6, 5: 6, 9: 0}
    assert b["label"].tolist() == [moved.get(label, label) for label in a["label"]]
    kept = ~np.isin(a["label"], list(moved))
    np.testing.assert_array_equal(b["image"][kept], a["image"][kept])
    p = int(np.flatnonzero(a["label"] == 4)[0])
    expected = random_crop(whole[6]["image"], SIZE, np.random.default_rng((3, p)))
    np.testing.assert_array_equal(b["image"][p], expected)
    assert sorted(reports) == [("4.png", "spoilt"), ("5.png", "spoilt"), ("9.png", "spoilt")]  # once each


def test_a_few_broken_images_are_tolerated_and_more_are_not():
    assert len(batches(Memory(200, broken=[17]), 60)) == 60  # half a percent
    seen = []
    says = r"(?s)Memory\(50\): 2 of 1\d\d examples.*17.png: spoilt\nRepair"
    with pytest.raises(TooManyBroken, match=says) as caught:
        for batch in train_batches(Memory(50, broken=[17]), image_size=SIZE, batch_size=4, seed=3):
            seen.append(batch)
    assert 24 <= len(seen) < 50  # not judged before 100 examples
    assert "broken_limit=0.01" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_stops_at_once(workers):
    with pytest.raises(TooManyBroken, match=r"(?s)no readable image was found.*\d.png: spoilt"):
        batches(Memory(6, broken=range(6)), 1, workers=workers, broken_limit=1)


def test_folder_with_a_broken_jpeg(tmp_path):
    for k in range(4):
        y, x = np.mgrid[:64, :80]
        image = np.stack([x * 3, y * 4 - k, (x + y) // (k + 1)], -1).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"{k}.jpg", quality=95)
    data = (tmp_path / "2.jpg").read_bytes()
    (tmp_path / "2.jpg").write_bytes(data[: len(data) // 2])
    reports = []
    x = batches(open_source(f"folder:{tmp_path}"), 4, broken_limit=1, on_broken=lambda *r: reports.append(r))
    assert joined(x)["image"].shape == (16, SIZE, SIZE, 3)
    assert [name for name, _ in reports] == ["2.jpg"] and "truncated" in reports[0][1]


def test_each_crop_is_of_the_smallest_decode_that_it_is_not_enlarged_from(tmp_path):
    y, x = np.mgrid[:96, :128]
    Image.fromarray(np.stack([x * 2, y * 2, (x + y) % 256], -1).astype(np.uint8)).save(tmp_path / "0.jpg", quality=95)
    source, decoded = open_source(f"folder:{tmp_path}"), []
    crops = joined(batches(source, 4, image_size=36))["image"]
    for position, crop in enumerate(crops):
        side = side_for_random_crop(36, np.random.default_rng((3, position)))
        image = source.at_least(side)[0]["image"]
        decoded.append(image.shape[0])
        np.testing.assert_array_equal(crop, random_crop(image, 36, np.random.default_rng((3, position))))
    assert set(decoded) == {48, 96}  # a crop of 3/4 of 48 pixels is not enlarged, one of less is


@pytest.mark.parametrize("wrong, says", [
    ({"batch_size": 0}, "batch_size=0"), ({"image_size": 0}, "image_size=0"), ({"seed": -1}, "seed=-1"),
    ({"min_crop": 0.0}, "min_crop=0.0"), ({"min_crop": 0.9, "max_crop": 0.5}, "max_crop=0.5"),
    ({"start_step": -1}, "start_step=-1"), ({"workers": -1}, "workers=-1"), ({"crop": "centre"}, "'centre'"),
    ({"broken_limit": 1.5}, "broken_limit=1.5"),
])
def test_arguments_that_cannot_work_fail_at_once(wrong, says):
    with pytest.raises(ValueError, match=says):  # before the first next()
        train_batches(Memory(3), **({"image_size": SIZE, "batch_size": 4, "seed": 0} | wrong))


def test_other_arguments_that_cannot_work(monkeypatch):
    with pytest.raises(ValueError, match=r"Memory\(0\) holds no example"):
        train_batches(Memory(0), image_size=SIZE, batch_size=4, seed=0)
    pretend(monkeypatch, 0, 3)
    with pytest.raises(ValueError, match="batch_size=4 does not divide over 3 processes"):
        train_batches(Memory(3), image_size=SIZE, batch_size=4, seed=0)
