"""Weights of FID's Inception from every kind of file. Full-size ones: tests/features/test_inception.py."""

import hashlib

import flax
import jax
import numpy as np
import pytest
import safetensors.numpy

from eqvae_jax.weights import WeightsError
from eqvae_jax.weights import inception as weights
from eqvae_jax.weights.inception import fetch_inception, file_shapes, load_inception

SMALL = {
    "Conv2d_1a_3x3": {"kernel": (3, 3, 3, 4), "bias": (4,)},
    "Mixed_5b": {"branch1x1": {"kernel": (1, 1, 4, 5), "bias": (5,)},
                 "branch7x7_2": {"kernel": (1, 7, 4, 2), "bias": (2,)}},
    "fc": {"kernel": (5, 1008)},
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Inception with three convolutions."""
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), SMALL, is_leaf=lambda s: isinstance(s, tuple))
    monkeypatch.setattr(weights, "parameter_shapes", lambda: shapes)


@pytest.fixture
def tensors(rng):
    """What the published file holds of these layers, under its names."""
    values = {}
    for name, kernel in (("Conv2d_1a_3x3", (4, 3, 3, 3)), ("Mixed_5b.branch1x1", (5, 4, 1, 1)),
                         ("Mixed_5b.branch7x7_2", (2, 4, 1, 7))):
        values[f"{name}.conv.weight"] = rng.normal(size=kernel)
        values[f"{name}.bn.weight"] = rng.uniform(0.5, 1.5, kernel[0])
        values[f"{name}.bn.bias"] = rng.normal(size=kernel[0])
        values[f"{name}.bn.running_mean"] = rng.normal(size=kernel[0])
        values[f"{name}.bn.running_var"] = rng.uniform(0.001, 2, kernel[0])
    values |= {"fc.weight": rng.normal(size=(1008, 5)), "fc.bias": rng.normal(size=1008)}
    return {name: value.astype(np.float32) for name, value in values.items()}


@pytest.fixture
def file(tensors, tmp_path):
    path = tmp_path / "inception.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_norm_is_folded_exactly(tensors, file, rng):
    params, _ = load_inception(file)
    assert jax.tree.map(np.shape, params) == SMALL
    for layer in ("branch1x1", "branch7x7_2"):
        values = {name.removeprefix(f"Mixed_5b.{layer}."): value.astype(np.float64) for name, value in tensors.items()
                  if name.startswith(f"Mixed_5b.{layer}.")}
        x = rng.normal(size=(50, 4, *values["conv.weight"].shape[2:]))           # what the kernel sees, 50 times
        y = np.einsum("ncij,ocij->no", x, values["conv.weight"])
        y = (y - values["bn.running_mean"]) / np.sqrt(values["bn.running_var"] + 0.001)
        y = y * values["bn.weight"] + values["bn.bias"]
        ours = np.einsum("ncij,ijco->no", x, params["Mixed_5b"][layer]["kernel"]) + params["Mixed_5b"][layer]["bias"]
        np.testing.assert_allclose(ours, y, rtol=1e-5, atol=1e-6 * np.abs(y).max())
    np.testing.assert_array_equal(params["fc"]["kernel"], tensors["fc.weight"].T)


def test_every_format_gives_the_same_parameters_and_hash(torch, tensors, file, tmp_path):
    old = {name: torch.tensor(value) for name, value in tensors.items()}
    new = {**old, "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(3)}
    torch.save(old, tmp_path / "pt.pth", _use_new_zipfile_serialization=False)   # as the published file of 2018
    torch.save(new, tmp_path / "weights.pth")
    params, spec = load_inception(str(file))
    assert spec.reference == str(file) and len(spec.hash) == 16
    for name in ("pt.pth", "weights.pth"):
        same(load_inception(tmp_path / name)[0], params)
        assert load_inception(tmp_path / name)[1].hash == spec.hash

    tensors["fc.bias"][7] += 1e-6                        # even what is left out tells one file from another
    safetensors.numpy.save_file(tensors, tmp_path / "other.safetensors")
    assert load_inception(tmp_path / "other.safetensors")[1].hash != spec.hash


def message(reference):
    with pytest.raises(WeightsError) as error:
        load_inception(reference)
    assert "Get https://github.com/mseitzer/pytorch-fid" in str(error.value) and '"download"' in str(error.value)
    return str(error.value)


def test_absent_files_say_what_to_get(tmp_path):
    assert "Inception has no weights" in message("") and "Inception has no weights" in message(None)
    assert f"there is no file {tmp_path / 'nowhere.pth'}" in message(tmp_path / "nowhere.pth")
    assert f"there is no file {tmp_path}" in message(tmp_path)
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    assert "page.pth: not a file that torch.save wrote" in message(tmp_path / "page.pth")


def test_another_network_is_refused_with_lists(tensors, tmp_path):
    path = tmp_path / "torchvision.safetensors"
    tensors["AuxLogits.fc.weight"] = np.zeros((1000, 768), np.float32)
    tensors["fc.bias"] = tensors["fc.bias"][:1000]
    del tensors["Mixed_5b.branch1x1.bn.running_var"]
    safetensors.numpy.save_file(tensors, path)
    text = message(path)
    assert "missing (1): Mixed_5b.branch1x1.bn.running_var" in text
    assert "not expected (1): AuxLogits.fc.weight" in text
    assert "of another shape (1): fc.bias: (1000,) instead of (1008,)" in text
    assert "torchvision's inception_v3 is another network" in text


@pytest.mark.parametrize(("name", "value"), [
    ("Mixed_5b.branch1x1.bn.running_var", -1.0), ("Mixed_5b.branch1x1.bn.running_var", np.nan),
    ("Mixed_5b.branch1x1.conv.weight", np.inf), ("Mixed_5b.branch1x1.bn.bias", np.nan),
])
def test_broken_numbers_are_refused(tensors, tmp_path, name, value):
    tensors[name].flat[1] = value
    safetensors.numpy.save_file(tensors, tmp_path / "broken.safetensors")
    assert "negative variances, in Mixed_5b.branch1x1\n" in message(tmp_path / "broken.safetensors")


def test_the_file_has_the_published_names():
    flat = {weights.key_of(path): value.shape for path, value in flax.traverse_util.flatten_dict(file_shapes()).items()}
    assert flat["Mixed_5b.branch7x7_2.conv.weight"] == (1, 7, 4, 2) and flat["fc.bias"] == (1008,)
    assert flat["Mixed_5b.branch7x7_2.bn.running_mean"] == (2,) and len(flat) == 3 * 5 + 2


def test_download_checks_before_it_keeps(file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = tmp_path / "cache" / "eqvae_jax" / "inception"
    monkeypatch.setattr(weights, "ADDRESSES", ("http://127.0.0.1:9/a.safetensors", file.as_uri()))
    with pytest.raises(WeightsError, match="(?s)could not download http://127.0.0.1:9/.*sha256 6726825d"):
        fetch_inception()
    assert not list(kept.iterdir())

    monkeypatch.setattr(weights, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    params, spec = load_inception("download")            # the first address fails, the second has the same file
    same(params, load_inception(file)[0])
    assert spec.reference == "download"
    assert [path.name for path in kept.iterdir()] == ["a.safetensors"]

    monkeypatch.setattr(weights, "ADDRESSES", ("http://127.0.0.1:9/a.safetensors",))
    assert fetch_inception() == kept / "a.safetensors"   # without the network

    (tmp_path / "in the way").touch()
    with pytest.raises(WeightsError, match="could not download"):
        fetch_inception(tmp_path / "in the way" / "directory")
