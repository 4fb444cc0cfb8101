"""FID's Inception against pytorch-fid's and torch-fidelity's own modules, with random weights in their own formats."""

import importlib

import jax
import numpy as np
import pytest

from eqvae_jax.features.inception import (
    PROTOCOLS,
    SIDE,
    Inception,
    average_pool,
    inception_features,
    maximum_pool,
    parameter_shapes,
    preprocess,
)
from eqvae_jax.weights.inception import file_shapes, key_of, load_inception

SIZES = [(32, 32), (64, 80), (256, 256), (299, 299)]
TOLERANCE = 3e-5             # of the features' mean; float32 in torch is 1 to 2e-5 away from its own float64


@pytest.fixture(scope="module")
def pytorch_fid(torch, lpips_package):          # the latter makes torchvision importable beside a CPU build of torch
    pytest.importorskip("pytorch_fid")
    return importlib.import_module("pytorch_fid.inception")


@pytest.fixture(scope="module")
def torch_fidelity(torch, lpips_package):
    return pytest.importorskip("torch_fidelity")


def random_tensors(torch):
    """A file's tensors: kernels that keep the size of what they convolve, norms that are far from doing nothing."""
    rng, tensors = np.random.default_rng(0), {}
    shapes, _ = jax.tree.flatten_with_path(file_shapes())
    for path, shape in shapes:
        path, shape = tuple(key.key for key in path), shape.shape
        if path[-1] == "kernel":
            value = rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)
            value = value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)
        elif path[-1] in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(0, 0.3, shape)
        tensors[key_of(path)] = torch.tensor(value, dtype=torch.float32)
    return tensors


@pytest.fixture(scope="module")
def network(torch, pytorch_fid):
    """pytorch-fid's network, which takes our names strictly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: random_tensors(torch))
        return pytorch_fid.fid_inception_v3().eval()


@pytest.fixture(scope="module")
def file(torch, network, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def params(file):
    return load_inception(str(file))[0]


@pytest.fixture(scope="module")
def program(params):
    """The network alone: compiling takes seconds, so it happens once, for two images."""
    apply = jax.jit(Inception().apply)
    return lambda x: apply({"params": params}, x)


@pytest.fixture(scope="module")
def by_pytorch_fid(torch, pytorch_fid, network):
    """uint8 images -> what pytorch-fid computes, and what is inside its network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid, "fid_inception_v3", lambda: network)
        model = pytorch_fid.InceptionV3([3]).eval()

    def features(images):
        with torch.inference_mode(), seen(network.Mixed_6d.branch1x1) as spatial:
            pool = model(torch.tensor(images).permute(0, 3, 1, 2) / 255)[0][:, :, 0, 0]
            return pool.numpy(), first_seven(spatial), (pool @ network.fc.weight.T).numpy()

    return features


@pytest.fixture(scope="module")
def by_torch_fidelity(torch, torch_fidelity, file):
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    model = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"],
                                               feature_extractor_weights_path=str(file))

    def features(images):
        with torch.inference_mode(), seen(model.Mixed_6d.branch1x1) as spatial:
            pool, logits = model(torch.tensor(images).permute(0, 3, 1, 2))
            return pool.numpy(), first_seven(spatial), logits.numpy()

    return features


class seen:
    """While open, keeps what a module returns."""

    def __init__(self, module):
        self.values = []
        self.hook = module.register_forward_hook(lambda module, inputs, output: self.values.append(output.clone()))

    def __enter__(self):
        return self.values

    def __exit__(self, *_):
        self.hook.remove()


def first_seven(spatial):
    (value,) = spatial
    return value[:, :7].permute(0, 2, 3, 1).flatten(1).numpy()


def pictures(rng, size):
    """Smooth and noisy: two different images."""
    y, x = np.mgrid[:size[0], :size[1]] / 9
    smooth = 127 + 120 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)
    return np.stack([smooth, rng.uniform(0, 256, (*size, 3))]).astype(np.uint8)


def assert_close(ours, theirs):
    """Within a fraction of the features' mean size."""
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        a = np.asarray(a)
        assert a.shape == b.shape and a.dtype == np.float32
        error = np.abs(a - b).max() / np.abs(b).mean()
        assert error < TOLERANCE, f"{name}: {error}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("protocol", ["pytorch-fid", "torch-fidelity"])
def test_features_match_the_reference(rng, program, by_pytorch_fid, by_torch_fidelity, protocol, size):
    images = pictures(rng, size)
    theirs = {"pytorch-fid": by_pytorch_fid, "torch-fidelity": by_torch_fidelity}[protocol](images)
    assert_close(program(preprocess(images, protocol)), theirs)


def test_the_resize_shows_in_the_features_far_above_the_tolerance(rng, program):
    images = pictures(rng, (64, 80))
    legacy, centred = (program(preprocess(images, name)) for name in ("adm", "pytorch-fid"))
    for a, b in zip(legacy, centred, strict=True):
        assert np.abs(a - b).mean() > 100 * TOLERANCE * np.abs(b).mean()


def test_one_function_goes_from_bytes_to_features(rng, params, by_torch_fidelity):
    images = pictures(rng, (32, 32))
    features = inception_features(params, images)
    assert features.pool.shape == (2, 2048) and features.spatial.shape == (2, 2023)
    assert features.logits.shape == (2, 1008)
    assert_close(features, by_torch_fidelity(images))


@pytest.mark.parametrize("size", [*SIZES, (1, 1), (2, 5), (700, 301)])
def test_resizing_is_that_of_the_references(torch, torch_fidelity, rng, size):
    images = rng.integers(0, 256, (1, *size, 3), dtype=np.uint8)
    x = torch.tensor(images).permute(0, 3, 1, 2).float()
    legacy = torch_fidelity.interpolate_compat_tensorflow.interpolate_bilinear_2d_like_tensorflow1x(
        x, (SIDE, SIDE), align_corners=False)
    centred = torch.nn.functional.interpolate(x / 255, (SIDE, SIDE), mode="bilinear", align_corners=False)
    references = {"torch-fidelity": (legacy - 128) / 128, "adm": (legacy - 128) / 128, "pytorch-fid": 2 * centred - 1}
    assert references.keys() == PROTOCOLS.keys()
    for protocol, theirs in references.items():
        theirs = theirs.permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(preprocess(images, protocol), theirs, rtol=0, atol=1e-5)


def test_pooling_does_not_see_its_padding(rng):
    x = rng.normal(-5, 1, (1, 5, 4, 2)).astype(np.float32)
    average, maximum = average_pool(x), maximum_pool(x, 1, padding=1)
    assert average.shape == maximum.shape == x.shape
    for i, j in np.ndindex(5, 4):
        window = x[0, max(i - 1, 0):i + 2, max(j - 1, 0):j + 2]
        np.testing.assert_allclose(average[0, i, j], window.mean((0, 1)), rtol=1e-5)
        np.testing.assert_array_equal(maximum[0, i, j], window.max((0, 1)))
    np.testing.assert_array_equal(maximum_pool(x, 2)[0, :, 0], x[0, [[0, 1, 2], [2, 3, 4]], :3].max((1, 2)))


def test_parameters_are_counted(params):
    shapes = parameter_shapes()
    assert jax.tree.map(lambda p: p.shape, params) == jax.tree.map(lambda s: s.shape, shapes)
    # With three more vectors for each norm and the classifier's bias, the 95.6 MB of the published file.
    assert sum(p.size for p in jax.tree.leaves(params)) == 23_832_736
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("images", "message"), [
    (np.zeros((2, 8, 8, 3), np.float32), "uint8 images .* and got float32"),
    (np.zeros((2, 8, 8), np.uint8), r"got uint8 \(2, 8, 8\)"),
    (np.zeros((2, 8, 8, 4), np.uint8), r"got uint8 \(2, 8, 8, 4\)"),
    (np.zeros((2, 0, 8, 3), np.uint8), r"got uint8 \(2, 0, 8, 3\)"),
])
def test_other_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        preprocess(images, "adm")


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match="'clean-fid'; there are adm, torch-fidelity, pytorch-fid"):
        inception_features({}, np.zeros((1, 8, 8, 3), np.uint8), "clean-fid")
