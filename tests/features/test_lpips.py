"""LPIPS against the lpips package, and its weights from every kind of file."""

import hashlib
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from eqvae_jax.features.lpips import LPIPS, lpips, parameter_shapes, unit_length
from eqvae_jax.weights import WeightsError, fetch_lpips, load_lpips
from eqvae_jax.weights import lpips as lpips_weights


@pytest.fixture(scope="module")
def reference(torch, lpips_package):
    """The package's own LPIPS: random trunk, real heads."""
    torch.manual_seed(0)
    return lpips_package.LPIPS(net="vgg", pretrained=True, pnet_rand=True, verbose=False)


@pytest.fixture(scope="module")
def directory(torch, lpips_package, reference, tmp_path_factory):
    """The two files as people have them: torchvision's checkpoint (here random) and the package's heads."""
    directory = tmp_path_factory.mktemp("lpips")
    heads = pathlib.Path(lpips_package.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    assert hashlib.md5(heads.read_bytes()).hexdigest() == lpips_weights.SOURCES["vgg.pth"][2]
    shutil.copy(heads, directory)
    trunk = {}
    for name, value in reference.net.state_dict().items():
        trunk["features." + name.split(".", 1)[1]] = value
    trunk["classifier.6.bias"] = torch.randn(1000)
    torch.save(trunk, directory / "vgg16-397923af.pth")
    return directory


@pytest.fixture(scope="module")
def params(directory):
    return load_lpips(str(directory))


def pair(rng, size):
    x = rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    return x, np.clip(x + rng.normal(0, 0.3, x.shape), -1.2, 1.2).astype(np.float32)


def to_torch(torch, image):
    return torch.tensor(image).permute(0, 3, 1, 2)


def test_distance_matches_the_lpips_package(torch, rng, reference, params):
    x, y = pair(rng, (64, 64))
    with torch.no_grad():
        theirs = reference(to_torch(torch, x), to_torch(torch, y))[:, 0, 0, 0].numpy()
    ours = jax.jit(lpips)(params, x, y)
    assert ours.shape == (2,) and theirs.min() > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_distance_and_gradient_match_the_lpips_package_at_odd_sizes(torch, rng, reference, params):
    x, y = pair(rng, (35, 51))
    t_y = to_torch(torch, y).requires_grad_()
    theirs = reference(to_torch(torch, x), t_y)[:, 0, 0, 0]
    (gradient,) = torch.autograd.grad(theirs.sum(), t_y)
    gradient = gradient.permute(0, 2, 3, 1).numpy()

    @jax.jit
    def ours_of(params, x, y):
        distance, pull = jax.vjp(lambda y: lpips(params, x, y), y)
        return distance, pull(jnp.ones_like(distance))[0]

    ours, ours_gradient = ours_of(params, x, y)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4)
    # A ReLU or pooling that rounding tips over changes single entries by more; in float64 the two agree to 1e-7.
    difference = ours_gradient - gradient
    assert np.linalg.norm(difference) < 1e-2 * np.linalg.norm(gradient)
    assert np.median(np.abs(difference)) < 1e-4 * np.median(np.abs(gradient))


def test_gradient_is_finite_where_all_features_are_zero():
    f = np.random.default_rng(0).normal(size=(1, 2, 2, 5)).astype(np.float32)
    f[0, 0, 0] = 0
    ours = unit_length(f)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=-1), [[[0, 1], [1, 1]]], rtol=1e-6)
    gradient = jax.grad(lambda f: (unit_length(f) * np.arange(5)).sum())(f)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[0, 0, 0]) and np.any(gradient[0, 1, 1])


def test_computes_in_float32_whatever_comes_in():
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), "bfloat16")
    assert jax.eval_shape(lpips, parameter_shapes(), x, x).dtype == np.float32


def test_too_small_an_image_is_explained():
    x = jax.ShapeDtypeStruct((2, 12, 32, 3), "float32")
    with pytest.raises(ValueError, match="at least 16 pixels a side and got 12 x 32"):
        jax.eval_shape(LPIPS().init, jax.random.key(0), x, x)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


def test_every_parameter_has_its_place(params):
    shapes = parameter_shapes()
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    assert jax.tree.map(lambda p: p.shape, params) == jax.tree.map(lambda s: s.shape, shapes)
    assert sum(p.size for p in jax.tree.leaves(params)) == 14_714_688 + 64 + 128 + 256 + 512 + 512


def test_one_file_holds_both(torch, reference, params, directory, tmp_path):
    both = {k: v.numpy() for f in directory.iterdir() for k, v in torch.load(f, map_location="cpu").items()}
    safetensors.numpy.save_file(both, tmp_path / "lpips.safetensors")
    same(load_lpips(str(tmp_path / "lpips.safetensors")), params)

    state = {f"loss.perceptual_loss.{k}": v for k, v in reference.state_dict().items() if not k.startswith("lins.")}
    state["encoder.conv_in.weight"] = torch.randn(3)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.ckpt")
    same(load_lpips(str(tmp_path / "model.ckpt")), params)


def test_missing_and_wrong_files_say_what_to_get(torch, lpips_package, directory, tmp_path):
    def message(reference):
        with pytest.raises(WeightsError) as error:
            load_lpips(str(reference))
        assert "--config.loss.lpips_weights=DIR" in str(error.value)
        assert "vgg16-397923af.pth (https://download.pytorch.org" in str(error.value)
        return str(error.value)

    assert "no weights" in message("")
    assert "there is no" in message(tmp_path / "nowhere")
    assert "has no vgg16-397923af.pth and no vgg.pth" in message(tmp_path)
    shutil.copy(directory / "vgg16-397923af.pth", tmp_path)
    assert "has no vgg.pth" in message(tmp_path)
    old = pathlib.Path(lpips_package.__file__).parent / "weights" / "v0.0" / "vgg.pth"
    shutil.copy(old, tmp_path)
    assert "v0.0" in message(tmp_path)
    shutil.copy(directory / "vgg.pth", tmp_path)

    trunk = torch.load(directory / "vgg16-397923af.pth", map_location="cpu")
    del trunk["features.5.bias"]
    trunk["features.7.weight"] = trunk["features.7.weight"][:, :3]
    trunk["features.30.weight"] = trunk["features.28.weight"]
    torch.save(trunk, tmp_path / "vgg16-397923af.pth")
    text = message(tmp_path)
    assert "missing (1): vgg/conv2_1/bias" in text and "not expected (1): features.30.weight" in text
    assert "vgg/conv2_2/kernel: (128, 3, 3, 3) instead of (128, 128, 3, 3)" in text


def test_download_checks_before_it_keeps(directory, tmp_path, monkeypatch):
    def source(name, kind, beginning):
        return (directory / name).as_uri(), kind, beginning

    digest = hashlib.sha256((directory / "vgg16-397923af.pth").read_bytes()).hexdigest()
    real_md5 = lpips_weights.SOURCES["vgg.pth"][2]
    monkeypatch.setattr(lpips_weights, "SOURCES", {
        "vgg16-397923af.pth": source("vgg16-397923af.pth", "sha256", digest[:8]),
        "vgg.pth": source("vgg.pth", "md5", "0" * 32),
    })
    target = tmp_path / "cache"
    with pytest.raises(WeightsError, match="does not have the md5 00000000"):
        fetch_lpips(target)
    assert [path.name for path in target.iterdir()] == ["vgg16-397923af.pth"]       # complete, verified, and kept

    lpips_weights.SOURCES["vgg.pth"] = source("vgg.pth", "md5", real_md5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch_lpips() == tmp_path / "eqvae_jax" / "lpips"
    assert sorted(path.name for path in fetch_lpips().iterdir()) == ["vgg.pth", "vgg16-397923af.pth"]

    lpips_weights.SOURCES["vgg.pth"] = ("http://127.0.0.1:9/vgg.pth", "md5", real_md5)
    with pytest.raises(WeightsError) as error:
        fetch_lpips(target)
    message = str(error.value)
    assert len(message.splitlines()) == 2 and "could not download http://127.0.0.1:9/vgg.pth" in message
