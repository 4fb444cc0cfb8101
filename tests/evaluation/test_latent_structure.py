import json

import numpy as np
import pytest
import toy_autoencoder as toys
from test_latents import PARAMS, batches_of, deterministic, gaussian

from eqvae_jax.evaluation import comparison, latents, provenance, tables
from eqvae_jax.evaluation.intrinsic import two_nn
from eqvae_jax.evaluation.spectrum import SpectrumMeter


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (30, 16, 24, 3), np.uint8)


@pytest.fixture
def modes(images):
    """(30, 4, 6, 4) modes of the posteriors."""
    return np.asarray(gaussian(PARAMS, images.astype(np.float32) / 127.5 - 1).mean)


@pytest.fixture
def structure(images):
    padded = np.concatenate([images, np.full((2, 16, 24, 3), 255, np.uint8)])
    masks = [[1] * 16, [1] * 14 + [0] * 2]
    return latents.latent_structure(gaussian, PARAMS, batches_of(padded, masks), progress=False)


def test_one_pass_gives_moments_spectrum_and_dimension_of_the_modes_without_padding(images, modes, structure):
    alone = latents.latent_statistics(gaussian, PARAMS, batches_of(images, [[1] * 30]), progress=False)
    assert structure.statistics.count == 30 and structure.shape == (4, 6, 4)
    assert structure.statistics.std == pytest.approx(alone.std, rel=1e-6)
    spectrum = SpectrumMeter()
    spectrum.add(modes)
    np.testing.assert_allclose(structure.spectrum.energy, spectrum.result().energy, rtol=1e-4)
    expected = two_nn(modes)
    assert structure.dimension.n == 30 and structure.dimension.duplicates == 0 and structure.why_no_dimension == ""
    assert structure.dimension.dimension == pytest.approx(expected.dimension, rel=1e-4) and expected.dimension > 2


def test_the_measures_state_how_many_points_they_rest_on_and_how_many_were_left_out(images):
    twice = np.concatenate([images, images[:5]])
    structure = latents.latent_structure(deterministic, PARAMS, batches_of(twice, [[1] * 35]), progress=False)
    values, details, warnings = latents.latent_measures(structure, scale=0.5, shift=0.0)
    assert values["intrinsic_points"] == 30 and values["intrinsic_duplicates"] == 5 and not warnings
    spectrum = structure.spectrum
    assert values["spectrum_above_0.25"] == spectrum.share_above(0.25) > values["spectrum_above_0.5"] > 0
    assert values["latent_scaled_std"] == structure.statistics.std / 2
    deviations = structure.statistics.channel_std
    assert (values["latent_channel_std_min"], values["latent_channel_std_max"]) == (deviations.min(), deviations.max())
    assert details["channel_std"] == deviations.tolist() and details["shape"] == [4, 6, 4]
    assert details["unit_scale"] == 1 / structure.statistics.std and details["unit_shift"] == 0
    curve = details["spectrum"]
    assert np.sum(np.array(curve["energy"]) * curve["coefficients"]) == pytest.approx(
        np.sum(spectrum.energy.mean(1) * spectrum.coefficients)
    )
    _, details, _ = latents.latent_measures(structure, scale=0.5, shift=0.1)
    assert details["unit_shift"] == structure.statistics.mean
    json.dumps([values, details], allow_nan=False)


def test_too_few_or_equal_images_leave_what_can_be_said_and_say_why(images):
    few = latents.latent_structure(gaussian, PARAMS, batches_of(images[:2], [[1] * 2]), progress=False)
    values, _, warnings = latents.latent_measures(few, 1.0, 0.0)
    assert np.isnan(values["intrinsic_dimension"]) and values["latent_std"] > 0
    assert len(warnings) == 1 and "2 different points of 2" in warnings[0]
    constant = lambda params, x: deterministic(params | {"offset": 0}, x * 0)
    flat = latents.latent_structure(constant, PARAMS, batches_of(images, [[1] * 30]), progress=False)
    values, details, warnings = latents.latent_measures(flat, 1.0, 0.0)
    assert np.isnan(values["spectrum_above_0.5"]) and values["latent_std"] == 0 and "unit_scale" not in details
    assert len(warnings) == 2 and "constant" in warnings[1]


def test_latents_that_are_not_finite_are_told_from_an_empty_set(images):
    broken = PARAMS | {"offset": np.array([0, np.nan, 0, 0], np.float32)}
    with pytest.raises(latents.NotFinite, match="first 30 images"):
        latents.latent_structure(gaussian, broken, batches_of(images, [[1] * 30]), progress=False)
    with pytest.raises(ValueError, match="the set is empty"):
        latents.latent_structure(gaussian, PARAMS, batches_of(images, [[0] * 30]), progress=False)


def compared(names, measures, **options):
    models = {name: toys.load(f"toy:{tilt}") for name, tilt in names.items()}
    protocol = comparison.Protocol("photos:test", 32, batch_size=2, crops=2, **options)
    return comparison.compare(models, protocol, measures, progress=False)


def test_a_comparison_of_latents_has_a_table_curves_and_its_protocol():
    document = compared({"control": 0.5, "EQ": 0.0}, ("latents",))
    column = document["results"]["EQ"]
    assert column["intrinsic_points"] == document["images"]["count"] == 6 and "psnr" not in column
    assert list(document["latents"]) == ["control", "EQ"] and document["latents"]["EQ"]["shape"] == [8, 8, 3]
    assert "TwoNN" in document["protocol"]["intrinsic_dimension"] and document["warnings"] == []
    text = tables.format_table(document)
    line = next(line for line in text.splitlines() if "points it rests on" in line)
    assert line.split()[-2:] == ["6", "6"] and "lower" not in line
    assert "energy above 1/4 of Nyquist" in text and "after the model's scale" in text
    # White noise of the posterior, deviation 0.1, is part of what is measured.
    assert column["latent_std"] > column["latent_channel_std_min"] > 0.1
    json.dumps(provenance.finite(document), allow_nan=False)


def test_a_broken_model_beside_others_is_left_out_with_a_warning_and_alone_refused():
    document = compared({"control": 0.5, "diverged": "nan"}, ("reconstruction", "latents"))
    assert document["results"]["diverged"]["psnr"] is None and "latent_std" not in document["results"]["diverged"]
    assert document["results"]["control"]["latent_std"] > 0 and list(document["latents"]) == ["control"]
    (warning,) = document["warnings"]
    assert warning.startswith("diverged: ") and "not finite" in warning
    assert f"note: {warning}" in tables.format_table(document)
    with pytest.raises(ValueError, match="not finite"):
        compared({"diverged": "nan"}, ("latents",))
