"""Batches of latents: which they are, from memory and from disk, of images beside them, on several processes."""

import itertools

import numpy as np
import pytest
from latent_folder import IMAGE_SHAPE, SHAPE, batches, image_of, label_of, moments_of, tokens_of, write
from memory_source import assert_equal, joined, pretend

from eqvae_jax.data.latent_batches import evaluation_batches, train_batches
from eqvae_jax.data.latents import open_latents


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_kept_images_come_with_their_latents_and_are_mirrored_with_them(tmp_path, dtype, in_memory):
    write(tmp_path / "cache", dtype=dtype, images=True)
    latents = open_latents(tmp_path / "cache")
    assert latents.image_shape == IMAGE_SHAPE and latents.image_bytes == 10 * 75
    np.testing.assert_array_equal(latents[3]["image"], image_of(3))
    x = joined(batches(latents, 10, images=True, in_memory=in_memory))
    assert x["image"].dtype == np.uint8 and x["image"].shape == (40, *IMAGE_SHAPE)
    mirrors = 0
    for b, image in enumerate(x["image"]):
        i = next(i for i in range(10) if any((image == seen).all() for seen in (image_of(i), image_of(i)[:, ::-1])))
        mirror = bool((image != image_of(i)).any())
        mirrors += mirror
        assert x["label"][b] == label_of(i)
        if dtype == "uint16":
            np.testing.assert_array_equal(x["tokens"][b], tokens_of(i)[int(mirror)])
        else:
            np.testing.assert_array_equal(x["mean"][b], moments_of(i)[int(mirror), 0])
    assert 5 < mirrors < 35
    found = joined(list(evaluation_batches(latents, 4, images=True)))
    np.testing.assert_array_equal(found["image"][:10], [image_of(i) for i in range(10)])
    assert "image" not in batches(latents, 1, in_memory=in_memory)[0]


def test_batches_are_what_the_seed_and_the_position_say(folder):
    latents = open_latents(folder)
    x = joined(batches(latents, 15))
    assert x["mean"].shape == x["std"].shape == (60, *SHAPE)
    assert x["mean"].dtype == x["std"].dtype == np.float32 and x["label"].dtype == x["index"].dtype == np.int32
    assert x["index"].tolist() == list(range(60))
    which = (x["mean"][:, 0, 0, 0] // 25).astype(int)
    for epoch in which.reshape(6, 10):
        assert sorted(epoch) == list(range(10))
    assert which[:10].tolist() != which[10:20].tolist()
    assert x["label"].tolist() == [label_of(i) for i in which]
    mirrored = np.array([(x["mean"][p] == moments_of(i)[1, 0]).all() for p, i in enumerate(which)])
    assert 15 < mirrored.sum() < 45
    for p, i in enumerate(which):  # mean and standard deviation are of one image, the same
        mean, std = moments_of(i)[int(mirrored[p])]
        np.testing.assert_array_equal(x["mean"][p], mean)
        np.testing.assert_array_equal(x["std"][p], std)
    plain = joined(batches(latents, 15, mirror=False))
    np.testing.assert_array_equal(plain["mean"], [moments_of(i)[0, 0] for i in which])
    other = joined(batches(latents, 15, seed=4))
    assert (other["mean"][:, 0, 0, 0] // 25).astype(int).tolist() != which.tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_from_memory_as_from_disk(tmp_path, dtype):
    write(tmp_path / "cache", dtype=dtype)
    latents = open_latents(tmp_path / "cache")
    disk = joined(batches(latents, 7, in_memory=False))
    assert_equal(disk, joined(batches(latents, 7, in_memory=True)))
    assert_equal(disk, joined(batches(latents, 7)))


def test_auto_keeps_in_memory_what_fits(folder, monkeypatch):
    latents, calls = open_latents(folder), []
    monkeypatch.setattr(type(latents), "take", lambda *_: calls.append(1) or {"label": np.zeros(4, np.int32)})
    batches(latents, 2, memory_budget=latents.nbytes)
    assert not calls
    batches(latents, 2, memory_budget=latents.nbytes - 1)
    assert calls


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("start", [1, 3, 1000])
def test_starting_later_is_skipping(folder, in_memory, start):
    latents = open_latents(folder)
    got = joined(batches(latents, 2, start_step=start, in_memory=in_memory))
    assert got["index"].tolist() == list(range(4 * start, 4 * start + 8))
    if start < 10:
        assert_equal(got, joined(batches(latents, start + 2, in_memory=in_memory)[start:]))


def test_positions_wrap_at_int32(folder):
    got = batches(open_latents(folder), 2, start_step=2**29 - 1)
    assert joined(got)["index"].tolist() == [2**31 - 4, 2**31 - 3, 2**31 - 2, 2**31 - 1, 0, 1, 2, 3]


def test_two_processes_have_the_halves_of_one(folder, monkeypatch):
    latents, kinds = open_latents(folder), (lambda: batches(latents, 4, start_step=1),
                                            lambda: list(evaluation_batches(latents, 4)))
    whole, halves = [kind() for kind in kinds], []
    for k in range(2):
        pretend(monkeypatch, k, 2)
        halves.append([kind() for kind in kinds])
    for one, first, second in zip(itertools.chain(*whole), *map(lambda half: itertools.chain(*half), halves),
                                  strict=True):
        assert_equal(one, joined([first, second]))


def test_evaluation_is_one_padded_pass_without_mirror_images(folder):
    data = evaluation_batches(open_latents(folder), 4)
    first, again = list(data), list(data)
    assert len(data) == len(first) == 3
    x = joined(first)
    assert_equal(x, joined(again))
    assert x["mask"].tolist() == [True] * 10 + [False] * 2
    assert x["index"].tolist() == [*range(10), 9, 9]
    np.testing.assert_array_equal(x["mean"], [moments_of(i)[0, 0] for i in x["index"]])
    np.testing.assert_array_equal(x["std"], [moments_of(i)[0, 1] for i in x["index"]])
    part = joined(list(evaluation_batches(open_latents(folder), 3, limit=5)))
    assert part["index"].tolist() == [0, 2, 4, 6, 8, 8] and part["mask"].tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("wrong, says", [
    ({"batch_size": 0}, "batch_size=0"), ({"seed": -1}, "seed=-1"), ({"start_step": -1}, "start_step=-1"),
    ({"in_memory": "yes"}, "in_memory='yes'"),
])
def test_arguments_that_cannot_work_fail_at_once(folder, wrong, says):
    with pytest.raises(ValueError, match=says):  # before the first next()
        batches(open_latents(folder), 0, **wrong)


def test_evaluations_arguments_and_processes_that_do_not_divide(folder, monkeypatch):
    latents = open_latents(folder)
    for wrong, says in (({"batch_size": 0}, "batch_size=0"), ({"batch_size": 2, "limit": 0}, "limit=0")):
        with pytest.raises(ValueError, match=says):
            evaluation_batches(latents, **wrong)
    pretend(monkeypatch, 0, 3)
    with pytest.raises(ValueError, match="batch_size=4 does not divide over 3 processes"):
        train_batches(latents, batch_size=4, seed=0)
