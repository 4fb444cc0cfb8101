"""The cache that the command writes: its latents and statistics, kills, several devices and processes, refusals."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from eqvae_jax import encode, weights
from eqvae_jax.data.cropping import center_crop
from eqvae_jax.data.latents import open_latents
from eqvae_jax.data.sources import open_source

SIDE = 16
COUNT = 11
CHILD = """
import itertools, os, signal, sys
import jax
from eqvae_jax import distributed, encode
from eqvae_jax.data import records

mode, *arguments = sys.argv[1:]
if mode == "killed":  # in the middle of the third shard
    write, shards = records.write_shard, itertools.count(1)

    def killed(packed, path):
        if next(shards) < 3:
            return write(packed, path)
        def until():
            yield next(packed)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(until(), path)

    records.write_shard = killed
elif mode.startswith("process"):
    port, number = mode.split(":")[1:]
    arguments += [f"--coordinator=localhost:{port}", "--processes=2", f"--process={number}"]


def main():
    code = encode.main(arguments)
    print(jax.device_count(), "devices", file=sys.stderr)
    return code


sys.exit(distributed.run(main))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven images of two classes, of several sizes."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for i in range(COUNT):
        field = np.cumsum(np.cumsum(rng.normal(size=(20 + i, 33 - i, 3)), 0), 1)
        path = root / "ab"[i > 5] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.uint8(255 * (field - field.min()) / np.ptp(field))).save(path)
    return root


def arguments(folder, output, **changes):
    options = {"images": f"folder:{folder}", "autoencoder": "init:smoke", "output": output, "image_size": SIDE,
               "batch_size": 2, "shard_size": 3} | changes
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("cache") / "latents"
    assert encode.main(arguments(folder, output)) == 0
    return output


@pytest.fixture(scope="module")
def children(folder, tmp_path_factory):
    """Processes side by side: {mode: (output, exit code, out, err)}."""
    root = tmp_path_factory.mktemp("children")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    eight = {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"}
    modes = {"killed": ("killed", {}, {}), "eight": ("eight", eight, {"batch_size": 8}),
             "process:0": ("shared", {}, {}), "process:1": ("shared", {}, {})}
    running = {}
    for mode, (name, environment, changes) in modes.items():
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
        command = [sys.executable, "-c", CHILD, mode.replace("process", f"process:{port}"),
                   *arguments(folder, root / name, **changes)]
        running[mode] = root / name, subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                                                      stderr=subprocess.PIPE)
    try:
        return {mode: (output, *reversed(process.communicate(timeout=240)), process)
                for mode, (output, process) in running.items()}
    finally:
        for _, process in running.values():
            process.kill()


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refused(capsys, *args, **changes):
    code = encode.main(arguments(*args, **changes))
    assert code == 2
    return capsys.readouterr().err


def test_latents_are_what_the_autoencoder_gives_of_the_image_and_of_its_mirror_image(folder, cache):
    model, params, spec = weights.load_autoencoder("init:smoke")
    source, latents = open_source(f"folder:{folder}"), open_latents(cache, verify=True)
    assert len(latents) == COUNT and latents.shape == (8, 8, 4)
    means = []
    for i in range(COUNT):
        found, image = latents[i], center_crop(source[i]["image"], SIDE)
        assert (found["index"], found["label"]) == (i, int(i > 5))
        for prefix, pixels in ("", image), ("mirror_", image[:, ::-1]):
            x = pixels[None].astype(np.float32) / 127.5 - 1
            posterior = model.apply({"params": params}, x, method="encode")
            np.testing.assert_allclose(found[f"{prefix}mean"], posterior.mean[0], atol=2e-6)
            np.testing.assert_allclose(found[f"{prefix}std"], posterior.std[0], rtol=2e-5)
        means.append([found["mean"], found["mirror_mean"]])
    assert np.abs(np.array(means)[:, 0] - np.array(means)[:, 1]).max() > 0.1
    assert latents.space == (spec.scale, spec.shift, spec.hash, "init:smoke")


def test_codes_and_kept_images_are_those_of_the_image_and_of_its_mirror_image(folder, tmp_path, capsys):
    output = tmp_path / "tokens"
    assert encode.main([*arguments(folder, output, autoencoder="init:vqgan-smoke"), "--keep_images"]) == 0
    model, params, _ = weights.load_autoencoder("init:vqgan-smoke")
    source, latents = open_source(f"folder:{folder}"), open_latents(output, verify=True)
    assert len(latents) == COUNT and latents.shape == (8, 8) and latents.dtype == "uint16"
    codes = []
    for i in range(COUNT):
        found, image = latents[i], center_crop(source[i]["image"], SIDE)
        np.testing.assert_array_equal(found["image"], image)
        for prefix, pixels in ("", image), ("mirror_", image[:, ::-1]):
            z = model.apply({"params": params}, pixels[None].astype(np.float32) / 127.5 - 1, method="encode").z
            np.testing.assert_array_equal(found[f"{prefix}tokens"],
                                          model.apply({"params": params}, z, method="quantize").indices[0])
            codes.append(found[f"{prefix}tokens"])
    used = len(np.unique(codes))
    assert used > 1 and latents.manifest["statistics"]["codes_used"] == used
    assert latents.manifest["autoencoder"]["codes"] == 16 and latents.manifest["preprocessing"]["images"] is True
    assert f"{used} of 16 codes are used" in capsys.readouterr().out


def test_a_cache_begun_with_images_is_not_continued_without(folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "cache"
    monkeypatch.setattr(encode, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert encode.main([*arguments(folder, output), "--keep_images"]) == 130
    monkeypatch.undo()
    assert "preprocessing.images: True there, None now" in refused(capsys, folder, output)
    assert encode.main([*arguments(folder, output), "--keep_images"]) == 0


def test_the_manifest_says_what_there_is(folder, cache):
    manifest, latents = json.loads((cache / "manifest.json").read_text()), open_latents(cache)
    mean, std = (np.array([[latents[i][f"{prefix}{kind}"] for prefix in ("", "mirror_")] for i in range(COUNT)],
                          np.float64) for kind in ("mean", "std"))
    axes, found = (0, 1, 2, 3), manifest["statistics"]
    np.testing.assert_allclose(found["mean"], mean.mean(axes), rtol=1e-9)
    np.testing.assert_allclose(found["std"], np.sqrt(mean.var(axes) + np.square(std).mean(axes)), rtol=1e-9)
    np.testing.assert_allclose(found["overall_mean"], mean.mean(), rtol=1e-9)
    np.testing.assert_allclose(found["overall_std"], np.sqrt(mean.var() + np.square(std).mean()), rtol=1e-9)
    assert manifest["count"] == COUNT and manifest["classes"] == 2 and manifest["class_names"] == ["a", "b"]
    assert manifest["autoencoder"] == {"reference": "init:smoke", "kind": "kl", "hash": latents.space.hash,
                                       "scale": 1.0, "shift": 0.0, "downsampling": 2}
    assert manifest["preprocessing"] == {"image_size": SIDE, "crop": "center", "mirror": True,
                                         "precision": "highest"}
    assert manifest["source"]["images"] == f"folder:{folder}" and manifest["broken"]["count"] == 0
    assert [entry["count"] for entry in manifest["shards"]] == [3, 3, 3, 2]
    assert sorted(files(cache)) == sorted(["manifest.json", *(entry["file"] for entry in manifest["shards"])])


def test_killed_and_continued_is_byte_for_byte_never_killed(folder, cache, children):
    output, _, _, process = children["killed"]
    assert process.returncode == -9
    names = sorted(files(output))
    assert names == ["encoding.json", "latents-00000-of-00004.array_record", "latents-00000-of-00004.json",
                     "latents-00001-of-00004.array_record", "latents-00001-of-00004.json",
                     "latents-00002-of-00004.array_record.partial"]
    with pytest.raises(ValueError, match="unfinished cache"):
        open_latents(output)
    first, second = (output / name for name in (names[1], names[3]))
    os.utime(first, (1, 1))
    data = bytearray(second.read_bytes())
    data[len(data) // 2] ^= 1  # a shard that was damaged meanwhile is written again
    second.write_bytes(data)
    assert encode.main(arguments(folder, output)) == 0
    assert files(output) == files(cache)
    assert first.stat().st_mtime == 1


def test_a_complete_cache_is_left_alone_and_a_lost_shard_is_replaced(folder, cache, tmp_path, capsys):
    output = tmp_path / "copy"
    output.mkdir()
    for name, data in files(cache).items():
        (output / name).write_bytes(data)
        os.utime(output / name, (1, 1))
    for name in "encoding.json", "latents-00000-of-00004.json", ".manifest.json.17":  # killed after the manifest
        (output / name).write_text("{}")
    assert encode.main(arguments(folder, output)) == 0
    assert "complete already" in capsys.readouterr().out
    assert files(output).keys() == files(cache).keys()
    assert all(path.stat().st_mtime == 1 for path in output.iterdir())
    (output / "latents-00001-of-00004.array_record").unlink()
    assert encode.main(arguments(folder, output, batch_size=3)) == 0  # how many at a time does not matter
    rewritten = {path.name for path in output.iterdir() if path.stat().st_mtime != 1}
    assert rewritten == {"latents-00001-of-00004.array_record", "manifest.json"}
    ours, theirs = open_latents(output, verify=True), open_latents(cache)
    for i in range(COUNT):
        np.testing.assert_allclose(ours[i]["mean"], theirs[i]["mean"], atol=2e-6)


@pytest.mark.parametrize("change, says", [
    ({"image_size": 32}, "preprocessing.image_size: 16 there, 32 now"),
    ({"dtype": "float16"}, "dtype: 'float32' there, 'float16' now"),
    ({"shard_size": 4}, "shard_size: 3 there, 4 now"), ({"limit": 5}, "source.used: 11 there, 5 now"),
    ({"images": "photos"}, "source.images: 'folder:"), ({"precision": "default"}, "preprocessing.precision"),
    ({"autoencoder": "init:sd16-smoke"}, "autoencoder.hash"),
])
def test_another_argument_is_refused_by_name(folder, cache, capsys, change, says):
    before = files(cache)
    error = refused(capsys, folder, cache, **change)
    assert says in error and "name another --output" in error
    assert files(cache) == before


def test_eight_devices_give_what_one_gives(cache, children):
    output, err, out, process = children["eight"]
    assert process.returncode == 0, err
    assert "8 devices" in err and jax.device_count() == 1
    ours, theirs = open_latents(cache), open_latents(output, verify=True)
    for i in range(COUNT):
        for key, value in ours[i].items():
            np.testing.assert_allclose(theirs[i][key], value, rtol=2e-5, atol=2e-6)


def test_two_processes_write_the_bytes_of_one(cache, children):
    for mode in "process:0", "process:1":
        _, err, out, process = children[mode]
        assert process.returncode == 0, err
        assert "2 devices" in err
    assert "use them as" in children["process:0"][2] and "use them as" not in children["process:1"][2]
    assert files(children["process:0"][0]) == files(cache)


def test_broken_images_are_left_out_counted_and_named(folder, tmp_path, capsys):
    images = tmp_path / "images"
    for path in folder.rglob("*.png"):
        (images / path.parent.name).mkdir(parents=True, exist_ok=True)
        (images / path.parent.name / path.name).write_bytes(path.read_bytes())
    for name in "a/03.png", "b/08.png":
        (images / name).write_bytes(b"no image")
    for _ in "first", "again":  # one is then in a shard that is finished
        error = refused(capsys, images, tmp_path / "few", broken_limit=0.1)
        assert "2 images are broken, and --broken_limit=0.1 is exceeded" in error
        assert "a/03.png: not a readable" in error
    for name in "a/04.png", "a/05.png":  # now all of the second shard
        (images / name).write_bytes(b"no image")
    assert encode.main(arguments(images, tmp_path / "many", broken_limit=0.5)) == 0
    latents = open_latents(tmp_path / "many", verify=True)
    assert [latents[i]["index"] for i in range(len(latents))] == [0, 1, 2, 6, 7, 9, 10]
    assert latents.manifest["broken"]["count"] == 4
    assert latents.manifest["broken"]["examples"][0] == {"index": 3, "name": "a/03.png",
                                                         "reason": "not a readable image (UnidentifiedImageError)"}
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    error = refused(capsys, images, tmp_path / "none", broken_limit=1)
    assert "no readable image was found" in error


def test_classes_without_names_are_counted_from_the_labels(folder, tmp_path, monkeypatch):
    opened = encode.open_source

    def unnamed(reference):
        source = opened(reference)
        source.class_names = None
        return source

    monkeypatch.setattr(encode, "open_source", unnamed)
    assert encode.main(arguments(folder, tmp_path / "cache")) == 0
    manifest = open_latents(tmp_path / "cache").manifest
    assert manifest["classes"] == 2 and manifest["class_names"] is None


def test_part_of_a_set_in_half_precision(folder, cache, tmp_path):
    assert encode.main(arguments(folder, tmp_path / "part", limit=4, dtype="float16")) == 0
    part, whole = open_latents(tmp_path / "part", verify=True), open_latents(cache)
    assert [part[i]["index"] for i in range(4)] == [0, 2, 5, 8]  # spread evenly: a folder is sorted by class
    for i in range(4):
        np.testing.assert_allclose(part[i]["mean"], whole[part[i]["index"]]["mean"], rtol=1e-3, atol=1e-3)
