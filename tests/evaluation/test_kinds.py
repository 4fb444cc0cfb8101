"""The doors on every kind of autoencoder at once: attention, no quant convolutions, a codebook."""

import json

import jax
import numpy as np
import pytest

from eqvae_jax import equivariance, evaluate, weights
from eqvae_jax.data.images import evaluation_batches
from eqvae_jax.data.sources import open_source

COLUMNS = {"SD": "init:smoke", "SD-16": "init:sd16-smoke", "SD3": "init:sd3-smoke", "VQ": "init:vqgan-smoke"}
SIDE, IMAGES = 12, "photos:test"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What one call of each measure prints and writes, for all four columns."""
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        for measure, extra in {"reconstruction": ["--posterior=sample"],
                               "equivariance": ["--turns", "1", "--scales", "0.5"]}.items():
            output, printed = tmp_path_factory.mktemp(measure), []
            patch.setattr("builtins.print", lambda *texts, printed=printed, **options: printed.extend(texts))
            columns = [f"--autoencoder={name}={reference}" for name, reference in COLUMNS.items()]
            shared = [f"--images={IMAGES}", f"--image_size={SIDE}", "--batch_size=2", "--limit=3", f"--output={output}"]
            assert evaluate.main([measure, *columns, *shared, *extra]) == 0
            document = json.loads((output / "metrics.json").read_text(), parse_constant=pytest.fail)
            results[measure] = document, "\n".join(printed)
    return results


@pytest.fixture(scope="module")
def images():
    """The photographs behind the numbers, (3, SIDE, SIDE, 3) in [-1, 1]."""
    (batch,) = evaluation_batches(open_source(IMAGES), image_size=SIDE, batch_size=3, limit=3)
    return batch["image"].astype(np.float32) / 127.5 - 1


def test_every_kind_is_reconstructed_and_only_vq_has_a_codebook(measured):
    document, text = measured["reconstruction"]
    assert list(document["results"]) == list(COLUMNS) and document["images"]["count"] == 3
    for name, column in document["results"].items():
        codebook = {"codebook_usage", "codebook_perplexity"} if name == "VQ" else set()
        assert set(column) == {"psnr", "ssim", "l1", "mse"} | codebook, name
        assert all(np.isfinite(value) for value in column.values()), name
    kinds = {name: (each["kind"], each.get("codebook_size")) for name, each in document["autoencoders"].items()}
    assert kinds == {"SD": ("kl", None), "SD-16": ("kl", None), "SD3": ("kl", None), "VQ": ("vq", 16)}
    assert document["autoencoders"]["SD3"]["shift"] == 0.0609
    usage = next(line for line in text.splitlines() if "share of the codes" in line)
    assert usage.split()[-1] == f"{document['results']['VQ']['codebook_usage']:.4f}" and usage.count("n/a") == 3


def test_the_codebooks_numbers_are_those_of_the_codes_of_all_images(measured, images):
    model, params, _ = weights.load_autoencoder(COLUMNS["VQ"])
    z = model.apply({"params": params}, images, method="encode").mode()
    indices = np.ravel(model.apply({"params": params}, z, method="quantize").indices)
    p = np.bincount(indices, minlength=16) / indices.size
    column = measured["reconstruction"][0]["results"]["VQ"]
    assert column["codebook_usage"] == np.count_nonzero(p) / 16
    assert column["codebook_perplexity"] == pytest.approx(np.exp(-np.sum(p[p > 0] * np.log(p[p > 0]))))


@pytest.mark.parametrize("name", COLUMNS)
def test_the_latent_error_is_that_of_the_posteriors_mean_or_of_features_before_quantisation(measured, images, name):
    document, text = measured["equivariance"]
    model, params, _ = weights.load_autoencoder(COLUMNS[name])
    encode = jax.jit(lambda x: model.apply({"params": params}, x, method="encode").mode())
    column, half = document["results"][name], (SIDE // model.downsampling // 2,) * 2
    for key, options in {"R/90": {"turns": 1}, "S/0.5": {"size": half}}.items():
        expected = np.mean(equivariance.error(encode, images, factor=model.downsampling, **options))
        assert column[key] == pytest.approx(float(expected), rel=1e-3) and expected > 1e-3
    sampled = {key for key in column if "_sample" in key}
    assert sampled == (set() if name == "VQ" else {"R_sample/90", "R_sample", "S_sample/0.5", "S_sample"})
    assert column["excess_l1/S"] == pytest.approx(column["pixel_l1/S"] - column["floor_l1/S"])
    assert "R of posterior samples" in text and "Above the floor" in text
