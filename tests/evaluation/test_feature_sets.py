"""One pass over a set: the right statistics, one program, flat memory, and a cache that knows images by content."""

import json
import logging
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import toy_features as toys

from eqvae_jax.evaluation import feature_sets
from eqvae_jax.evaluation.feature_sets import Extractor, classifier_extractor, collect, label, open_extractor, too_few
from eqvae_jax.features.classifier import Classifier
from eqvae_jax.weights.errors import WeightsError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(feature_sets, "SHARD", 10)


@pytest.fixture
def quiet():
    return {"progress": False, "batch_size": 4}


def test_statistics_and_features_are_those_of_all_images_whatever_the_batches(quiet):
    extractor, seen = toys.extractor(spatial=True)
    images = toys.images(37)
    expected = extractor.extract(images)
    seen.clear()
    features = collect(extractor, toys.batches(images, 3, 0, 19), 37, **quiet)
    assert set(seen) == {(4, 4, 4, 3)}  # one shape, so one program
    np.testing.assert_allclose(features.pool, expected["pool"], rtol=1e-6)
    np.testing.assert_allclose(features.logits, expected["logits"], rtol=1e-6)
    np.testing.assert_allclose(features.gaussian.sigma, np.cov(expected["pool"], rowvar=False), rtol=1e-5)
    np.testing.assert_allclose(features.spatial.mu, expected["spatial"].mean(0), rtol=1e-5)
    assert (features.count, features.image_size, features.cached) == (37, (4, 4), 0)
    assert isinstance(features.pool, np.memmap) and features.pool.dtype == np.float32


def test_cached_shards_are_not_computed_again_and_give_the_same_numbers(tmp_path, quiet):
    extractor, seen = toys.extractor()
    images = toys.images(25)
    first = collect(extractor, [images], cache=tmp_path, **quiet)
    assert first.cached == 0 and len(seen) == 3 + 3 + 2
    seen.clear()
    again = collect(extractor, toys.batches(images, 7), cache=tmp_path, **quiet)
    assert not seen and again.cached == 25
    np.testing.assert_array_equal(again.gaussian.sigma, first.gaussian.sigma)
    np.testing.assert_array_equal(again.pool, first.pool)
    assert again.hash == first.hash
    images[12] += 1
    changed = collect(extractor, [images], cache=tmp_path, **quiet)
    assert changed.cached == 15 and changed.hash != first.hash


def test_another_network_or_protocol_finds_nothing_in_the_cache(tmp_path, quiet):
    for options in ({}, {"name": "b"}, {"hash": "99"}, {"protocol": "other"}):
        extractor, _ = toys.extractor(**options)
        assert collect(extractor, [toys.images(12)], cache=tmp_path, **quiet).cached == 0


def test_an_interrupted_pass_goes_on_to_the_same_numbers(tmp_path, quiet):
    extractor, seen = toys.extractor()
    images = toys.images(35)
    whole = collect(extractor, [images], **quiet)

    def interrupted():
        yield images[:28]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(extractor, interrupted(), cache=tmp_path, **quiet)
    resumed = collect(extractor, [images], cache=tmp_path, **quiet)
    assert resumed.cached == 20
    np.testing.assert_array_equal(resumed.gaussian.sigma, whole.gaussian.sigma)
    np.testing.assert_array_equal(resumed.logits, whole.logits)


@pytest.mark.parametrize("damage", ["cut", "flip", "rows", "nan", "other"])
def test_a_damaged_shard_is_computed_anew_with_a_warning(tmp_path, quiet, caplog, damage):
    extractor, seen = toys.extractor()
    images = toys.images(10)
    first = collect(extractor, [images], cache=tmp_path, **quiet)
    (path,) = tmp_path.rglob("*.npz")
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:200])
    elif damage == "flip":
        path.write_bytes(content[:150] + bytes([content[150] ^ 1]) + content[151:])
    else:
        with np.load(path) as file:
            arrays = dict(file)
        if damage == "other":
            del arrays["logits"]
        else:
            arrays["pool"] = arrays["pool"][:5] if damage == "rows" else arrays["pool"] * np.nan
        np.savez(path, **arrays)
    with caplog.at_level(logging.WARNING):
        again = collect(extractor, [images], cache=tmp_path, **quiet)
    assert again.cached == 0 and "damaged" in caplog.text and path.name in caplog.text
    np.testing.assert_array_equal(again.pool, first.pool)
    assert collect(extractor, [images], cache=tmp_path, **quiet).cached == 10  # repaired


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "0 images"),
        ([toys.images(1)], "1 images; a distribution needs at least 2"),
        ([toys.images(9), toys.images(9, side=5)], "5 x 5 where those before were 4 x 4"),
        ([toys.images(9).astype(np.float32)], "float32: metrics compare 8-bit"),
        ([np.full((9, 4, 4, 3), np.nan)], "9 of these 9 images hold NaN"),
        ([toys.images(9, high=2)], "images in \\[0, 1\\]"),
        ([toys.images(9)[0]], "channels last"),
    ],
)
def test_sets_that_cannot_be_measured_are_refused(tmp_path, quiet, batches, message):
    extractor, _ = toys.extractor()
    with pytest.raises(ValueError, match=message):
        collect(extractor, batches, cache=tmp_path, **quiet)


def test_features_that_are_not_finite_are_refused_and_not_cached(tmp_path, quiet):
    broken = Extractor("b", "", "", lambda images: {"pool": images[:, 0, 0] / np.zeros(3), "logits": images[:, 0, 0]})
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="pool: .* rows are not finite"):
        collect(broken, [toys.images(4)], cache=tmp_path, **quiet)
    assert not list(tmp_path.rglob("*.npz"))


def test_names_say_whose_features_they_are():
    assert label("FID", toys.extractor("inception")[0]) == "FID"
    assert label("FID", toys.extractor("fashion-cnn")[0]) == "FID(fashion-cnn)"
    assert too_few("FID", 50_000) is None and "49,999" in too_few("FID", 49_999)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return toys.classifier_run(tmp_path_factory.mktemp("classifier") / "run")


def test_a_trained_classifier_gives_its_features(trained):
    from eqvae_jax.training.checkpoint import load_params

    extractor = classifier_extractor(trained)
    images = toys.images(6, side=12)
    found = extractor.extract(images)
    saved, config, _ = load_params(trained, "params")
    expected = Classifier(**config["model"]).apply({"params": saved["classifier"]}, images / np.float32(127.5) - 1)
    np.testing.assert_allclose(found["pool"], expected.features, atol=1e-5)
    np.testing.assert_allclose(found["logits"], expected.logits, atol=1e-5)
    assert extractor.name == "fashion-cnn" and len(extractor.hash) == 16


def test_runs_that_trained_no_classifier_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="workdir:.*it holds none"):
        classifier_extractor(tmp_path)
    with pytest.raises(ValueError, match="neither inception nor workdir:DIR"):
        open_extractor("resnet")
    with pytest.raises(WeightsError, match="pytorch-fid"):
        open_extractor("inception")
    with pytest.raises(ValueError, match="no protocol"):
        open_extractor("inception", protocol="tf")


DEVICES = """
import json, sys
import numpy as np, jax
from eqvae_jax.evaluation.feature_sets import collect, classifier_extractor
images = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), dtype=np.uint8)
features = collect(classifier_extractor(sys.argv[1]), [images], batch_size=3, progress=False)
print(json.dumps([jax.device_count(), features.gaussian.sigma.tolist()]))
"""


def test_eight_devices_give_what_one_gives(trained):
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", DEVICES, str(trained)]
    root = pathlib.Path(__file__).resolve().parents[2]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    devices, sigma = json.loads(done.stdout.splitlines()[-1])
    here = collect(classifier_extractor(trained), [toys.images(23, side=8)], batch_size=3, progress=False)
    assert devices == 8 and jax.device_count() == 1
    np.testing.assert_allclose(sigma, here.gaussian.sigma, rtol=1e-4, atol=1e-7)
