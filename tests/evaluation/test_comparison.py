import numpy as np
import pytest
import toy_autoencoder as toys

from eqvae_jax.autoencoders.presets import PRESETS
from eqvae_jax.evaluation import comparison, tables
from eqvae_jax.evaluation.feature_sets import Extractor


def test_names_may_stand_before_a_reference_that_has_an_equals_sign():
    assert comparison.named(["EQ=workdir:/a=b", "ldm:/c=d.ckpt", "runs/lr=1", "new=runs/lr=2"]) == {
        "EQ": "workdir:/a=b",
        "ldm:/c=d.ckpt": "ldm:/c=d.ckpt",
        "runs/lr=1": "runs/lr=1",
        "new": "runs/lr=2",
    }


@pytest.mark.parametrize("texts, says", [
    (["a=runs/1", "b=runs/1", "a=runs/2"], "'a', runs/1 and runs/2: give each its own name, as NAME=runs/2"),
    (["init:sd", "init:sd"], "'init:sd', init:sd and init:sd: give each"),
])  # fmt: skip
def test_a_name_is_given_once(texts, says):
    with pytest.raises(ValueError, match=f"two columns are called {says}"):
        comparison.named(texts)


def test_what_has_a_codebook_says_how_large_it_is():
    describe = lambda model, kind: comparison._describe(model, {}, toys.Spec("init:x", kind=kind))
    vq, kl = describe(PRESETS["vqgan"].model, "vq"), describe(PRESETS["sd"].model, "kl")
    assert vq["kind"] == "vq" and vq["codebook_size"] == 1024 and vq["downsampling"] == 16
    assert kl["kind"] == "kl" and "codebook_size" not in kl


def corner(images):
    """A hand-made network: the colours of two pixels."""
    return {"pool": np.asarray(images, np.float64)[:, [0, 1], [0, 2]].reshape(len(images), 6) / 255}


@pytest.mark.parametrize("name, key, label", [("inception", "rfid", "rFID"),
                                              ("fashion-cnn", "rfid(fashion-cnn)", "rFID(fashion-cnn)")])
def test_rfid_is_named_for_its_features_and_warns_once_of_few_images(name, key, label):
    models = {column: toys.load(f"toy:{tilt}") for column, tilt in {"control": 0.5, "EQ": 0.0}.items()}
    protocol = comparison.Protocol("photos:test", 32, batch_size=4, crops=3, turns=(1,), scales=(0.5,))
    extractor = Extractor(name, "0123abcd", "as it is", corner)
    measures = ("reconstruction", "equivariance")
    document = comparison.compare(models, protocol, measures, extractor=extractor, progress=False)
    for column in document["results"].values():
        assert {each for each in column if each.startswith("rfid")} == {
            key, f"{key}/90", f"{key}_R", f"{key}/0.5", f"{key}_S"
        }  # fmt: skip
        assert all(column[each] > 0 for each in column if each.startswith("rfid"))
    assert document["protocol"]["rfid"] == {"name": name, "hash": "0123abcd", "protocol": "as it is"}
    text = tables.format_table(document)
    assert f"{label} of D(tau E(x)) against tau x" in text and text.count("note: ") == 1
    (warning,) = document["warnings"]
    assert warning.startswith(f"{label} of {document['images']['count']} ") and "50,000" in warning
    assert ("rFID " in text) == (name == "inception")  # never without its name


def test_the_next_autoencoder_gets_the_numbers_it_would_get_alone():
    protocol = comparison.Protocol("photos:test", 32, batch_size=4, crops=3, turns=(1,), scales=(0.5,))
    extractor = Extractor("inception", "0123abcd", "as it is", corner)
    columns = {"control": toys.load("toy:0.5"), "EQ": toys.load("toy:0.0")}
    together = comparison.compare(columns, protocol, extractor=extractor, progress=False)["results"]["EQ"]
    alone = comparison.compare({"EQ": columns["EQ"]}, protocol, extractor=extractor, progress=False)["results"]["EQ"]
    assert together == {key: pytest.approx(value, rel=1e-9) for key, value in alone.items()}


def test_the_protocol_names_the_variant_of_ssim_and_refuses_others():
    ours, released = (
        comparison._ssim(comparison.Protocol("photos", **options))
        for options in ({}, {"ssim_range": None, "ssim_border": "reflect"})
    )
    assert ours.endswith("data range 2, inside windows only")
    assert released.endswith("unclipped, range of each pair, images continued by reflection")
    with pytest.raises(ValueError, match="ssim_border='same' is none of valid, reflect"):
        comparison.Protocol("photos", ssim_border="same")
    with pytest.raises(ValueError, match="ssim_range=0 is no range"):
        comparison.Protocol("photos", ssim_range=0)
