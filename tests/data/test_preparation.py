"""Shards made from a folder: what they hold, continuing after a stop, and refusals."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from eqvae_jax.data.cropping import resize
from eqvae_jax.data.preparation import prepare, write_arrayrecord
from eqvae_jax.data.sources import open_source


@pytest.fixture
def folder(tmp_path):
    for k in range(7):
        y, x = np.mgrid[: 40 + k, :50]
        image = np.stack([x * 5, y * 4, (x + 3 * y) // (k + 1)], -1).astype(np.uint8)
        path = tmp_path / "images" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "images"


def shards(output):
    return sorted(output.glob("*.array_record"))


def test_shards_hold_the_reduced_images(folder, tmp_path):
    source = open_source(f"folder:{folder}")
    assert prepare(source, str(tmp_path / "out"), size=20, encoding="png", shard_size=3) == 7
    names = [path.name for path in shards(tmp_path / "out")]
    assert names == [f"images-0000{k}-of-00003.array_record" for k in range(3)]
    stored = open_source(f"arrayrecord:{tmp_path}/out/*.array_record")
    assert len(stored) == 7
    for i in range(7):
        original = source[i]["image"]
        width = round(50 * 20 / original.shape[0])
        np.testing.assert_array_equal(stored[i]["image"], resize(original, 20, width))
        assert stored[i]["label"] == source[i]["label"]


def test_jpeg_is_close_and_small_images_keep_their_size(folder, tmp_path):
    source = open_source(f"folder:{folder}")
    prepare(source, str(tmp_path / "out"), size=512)
    stored = open_source(f"arrayrecord:{tmp_path}/out/*.array_record")
    for i in range(7):
        difference = stored[i]["image"].astype(int) - source[i]["image"]
        assert np.abs(difference).mean() < 2


def test_small_files_of_the_same_encoding_are_copied(tmp_path):
    for name, side in ("a.jpg", 20), ("b.jpg", 60), ("c.png", 20):
        Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)).save(tmp_path / name)
    source = open_source(f"folder:{tmp_path}")
    prepare(source, str(tmp_path / "out"), size=20)
    stored = open_source(f"arrayrecord:{tmp_path}/out/*.array_record")
    assert stored.file(0) == source.file(0) == (tmp_path / "a.jpg").read_bytes()
    assert stored.file(1) != source.file(1) and stored[1]["image"].shape == (20, 20, 3)
    assert stored.file(2).startswith(b"\xff\xd8\xff")
    prepare(stored, str(tmp_path / "again"), size=20)  # nothing is lost a second time
    again = open_source(f"arrayrecord:{tmp_path}/again/*.array_record")
    assert [again.file(i) for i in range(3)] == [stored.file(i) for i in range(3)]


def test_a_stopped_preparation_continues(folder, tmp_path):
    source, output = open_source(f"folder:{folder}"), tmp_path / "out"
    prepare(source, str(output), size=20, shard_size=3)
    before = [path.read_bytes() for path in shards(output)]
    kept, lost = shards(output)[0], shards(output)[1]
    lost.rename(f"{lost}.partial")  # as a killed process leaves it
    os.utime(kept, (1, 1))
    assert prepare(source, str(output), size=20, shard_size=3) == 7
    assert [path.read_bytes() for path in shards(output)] == before
    assert kept.stat().st_mtime == 1 and not list(output.glob("*.partial"))  # neither rewritten nor left over


def test_other_settings_are_refused(folder, tmp_path):
    source = open_source(f"folder:{folder}")
    prepare(source, str(tmp_path / "out"), size=20)
    with pytest.raises(ValueError, match="size: 20 there, 30 now.*another --output"):
        prepare(source, str(tmp_path / "out"), size=30)
    with pytest.raises(ValueError, match="encoding='gif'"):
        prepare(source, str(tmp_path / "new"), size=30, encoding="gif")
    assert not (tmp_path / "new").exists()


def test_broken_images_are_left_out_up_to_a_limit(folder, tmp_path):
    (folder / "a" / "0.png").write_bytes(b"no image")
    source = open_source(f"folder:{folder}")
    assert prepare(source, str(tmp_path / "out"), size=20) == 6
    labels = open_source(f"arrayrecord:{tmp_path}/out/*.array_record")
    assert [labels[i]["label"] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    (folder / "b" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="(?s)more than 1.0% are broken.*a/0.png: not a readable.*b/1.png"):
        prepare(source, str(tmp_path / "out2"), size=20)
    assert not shards(tmp_path / "out2")


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    def images():
        yield {"image": np.arange(48, dtype=np.uint8).reshape(4, 4, 3), "label": 0}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_arrayrecord(images(), tmp_path / "out" / "a.array_record")
    assert not list((tmp_path / "out").iterdir())


def test_full_disk(tmp_path):
    # A limit on the size of files is what a full disk looks like to the native writer, and needs no root.
    code = """
import resource, signal, sys, numpy as np
from eqvae_jax.data.preparation import write_arrayrecord
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
write_arrayrecord([{"image": image, "label": 0}] * 30, sys.argv[1])
"""
    done = run("-c", code, str(tmp_path / "a.array_record"))
    assert "OSError" in done.stderr and "could not be written; is the disk full?" in done.stderr
    assert not list(tmp_path.iterdir())


def run(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_command_line(folder, tmp_path):
    output = tmp_path / "out"
    command = ["-m", "eqvae_jax.data.preparation", f"--output={output}",
               "--size=20", "--shard_size=4", "--workers=2"]
    done = run(*command, f"--images=folder:{folder}")
    assert done.returncode == 0, done.stderr
    assert f"7 of 7 images in {output}; use them as arrayrecord:{output}/*.array_record" in done.stdout
    assert "7/7" in done.stderr  # progress
    assert json.loads((output / "preparation.json").read_text())["size"] == 20
    in_process = tmp_path / "again"
    prepare(open_source(f"folder:{folder}"), str(in_process), size=20, shard_size=4)
    assert [a.read_bytes() for a in shards(output)] == [b.read_bytes() for b in shards(in_process)]
    failed = run(*command, "--images=folder:/no/such/place")
    assert failed.returncode == 2 and failed.stderr.strip() == "error: folder:/no/such/place: does not exist"
