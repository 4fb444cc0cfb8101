import numpy as np
import pytest
import toy_autoencoder as toys
from PIL import Image

from eqvae_jax.evaluation import comparison, exhibits

PROTOCOL = comparison.Protocol("photos:test", 32, batch_size=4, turns=(1,), scales=(0.5,))
MODELS = {"control": 0.5, "EQ": 0.0}


def loaded(names=MODELS):
    return {name: toys.load(f"toy:{tilt}") for name, tilt in names.items()}


def test_the_images_are_different_ones_even_among_many_crops():
    images = np.random.default_rng(1).integers(0, 255, (3, 2, 32, 32, 3), dtype=np.uint8)
    both = np.array([True, True])
    batches = [{"image": pair, "index": np.array([i, i]), "mask": both} for i, pair in enumerate(images)]
    shown = exhibits.collect(loaded({"toy": 0}), batches, PROTOCOL)["toy"]
    np.testing.assert_array_equal(np.rint((shown["image"] + 1) * 127.5), images[:, 0])
    assert shown["moved"]["90"].shape == shown["first"]["90"].shape == (3, 32, 32, 3)
    assert len(exhibits.collect(loaded({"toy": 0}), batches, PROTOCOL, count=2)["toy"]["image"]) == 2


@pytest.mark.parametrize("measure, expected", [
    ("reconstruction", ["reconstruction"]),
    ("equivariance", ["tau_1", "tau_2", "errors", "transforms"]),
    ("latents", ["latent_pca", "spectrum"]),
])  # fmt: skip
def test_each_measure_leaves_its_figures_as_png_and_pdf(tmp_path, measure, expected):
    models = loaded()
    batches, _ = comparison.open_batches(PROTOCOL)
    document = comparison.compare(models, PROTOCOL, (measure,), batches=batches, broken={}, progress=False)
    shown = exhibits.collect(models, batches, PROTOCOL, (measure,))
    paths = exhibits.write(document, shown, tmp_path / "figures")
    assert [path.stem for path in paths] == expected
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.{suffix}" for name in expected for suffix in ("png", "pdf")
    }
    assert all(Image.open(path).width > 100 for path in paths)


def test_a_model_that_diverged_does_not_take_the_figures_of_the_others_away(tmp_path):
    models = loaded({"control": 0.5, "diverged": "nan"})
    batches, _ = comparison.open_batches(PROTOCOL)
    document = comparison.compare(models, PROTOCOL, batches=batches, broken={}, progress=False)
    shown = exhibits.collect(models, batches, PROTOCOL)
    names = [path.stem for path in exhibits.write(document, shown, tmp_path)]
    assert {"latent_pca", "spectrum", "reconstruction", "errors", "transforms", "tau_1"} <= set(names)
