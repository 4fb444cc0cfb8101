import json

import numpy as np
import pytest
import toy_autoencoder as toys
import toy_features
from PIL import Image

from eqvae_jax import evaluate, weights
from eqvae_jax.evaluation import comparison, feature_sets


@pytest.fixture
def folder(tmp_path, rng):
    """Five smooth images in a folder."""
    (tmp_path / "images").mkdir()
    for i in range(5):
        field = np.cumsum(np.cumsum(rng.normal(size=(40, 36, 3)), 0), 1)
        pixels = np.uint8(255 * (field - field.min()) / np.ptp(field))
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return f"folder:{tmp_path / 'images'}"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the command with toy autoencoders; returns its exit code, output, errors and metrics.json."""
    monkeypatch.setattr(weights, "load_autoencoder", toys.load)

    def run(*arguments):
        code = evaluate.main([*arguments, f"--output={tmp_path / 'out'}"])
        captured, path = capsys.readouterr(), tmp_path / "out" / "metrics.json"
        strict = {"parse_constant": pytest.fail}
        return code, captured.out, captured.err, json.loads(path.read_text(), **strict) if path.exists() else None

    return run


def test_equivariance_makes_columns_a_table_and_a_file_that_says_how(run, folder):
    code, out, err, document = run(
        "equivariance", "--autoencoder=control=toy:0.5", "--autoencoder=EQ=toy:0", f"--images={folder}",
        "--image_size=32", "--batch_size=2", "--scales", "0.5",
    )  # fmt: skip
    assert code == 0 and err == ""
    assert list(document["results"]) == ["control", "EQ"] and document["baseline"] == "control"
    assert document["results"]["EQ"]["R"] == pytest.approx(0, abs=1e-8)
    assert document["results"]["control"]["R/180"] > 0.01
    assert "psnr" not in document["results"]["EQ"]
    assert "R, mean of the turns" in out and "5 images of 32 x 32 pixels" in out
    assert document["images"]["count"] == 5 and document["images"]["reference"] == folder
    assert document["autoencoders"]["EQ"]["reference"] == "toy:0" and document["autoencoders"]["EQ"]["hash"]
    assert document["protocol"]["posterior"] == "mode" and document["protocol"]["interpolation"] == "bilinear"
    sizes = document["protocol"]["transforms"]["EQ"]
    assert sizes["0.5"] == {"latent": [4, 4], "image": [16, 16], "scale": 0.5}
    assert sizes["90"] == {"degrees_clockwise": 90}
    assert document["software"]["jax"]


def test_reconstruction_takes_a_limit_and_says_what_is_not_finite(run, folder, monkeypatch):
    code, out, _, document = run(
        "reconstruction", "--autoencoder=toy:0", f"--images={folder}", "--image_size=32", "--batch_size=2", "--limit=3"
    )
    assert code == 0 and document["images"]["count"] == 3
    assert set(document["results"]["toy:0"]) == {"psnr", "ssim", "l1", "mse"} and "PSNR" in out

    loaded = toys.load("toy:nan")
    monkeypatch.setattr(weights, "load_autoencoder", lambda reference: loaded)
    code, out, err, document = run("reconstruction", "--autoencoder=toy:0", f"--images={folder}", "--image_size=32")
    assert code == 0 and document["results"]["toy:0"]["psnr"] is None
    assert "n/a" in out and "not finite" in err and "psnr" in err


def test_latents_have_a_table_and_a_spectrum_to_look_at(run, folder, tmp_path):
    code, out, _, document = run("latents", "--autoencoder=toy:0", f"--images={folder}", "--image_size=32")
    assert code == 0 and {"intrinsic_dimension", "latent_std"} <= set(document["results"]["toy:0"])
    assert "intrinsic dimension" in out and "beside it, as PNG and PDF" in out
    assert {"spectrum.png", "spectrum.pdf"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("measure", ["reconstruction", "equivariance"])
def test_features_bring_rfid_under_their_name_and_the_figures(run, folder, tmp_path, monkeypatch, measure):
    extractor, _ = toy_features.extractor("fashion-cnn")
    asked = []
    monkeypatch.setattr(feature_sets, "open_extractor", lambda *what: asked.append(what) or extractor)
    code, out, _, document = run(
        measure, "--autoencoder=toy:0", f"--images={folder}", "--image_size=32", "--features=workdir:W",
        "--protocol=pytorch-fid",
    )  # fmt: skip
    assert code == 0 and asked == [("workdir:W", "", "pytorch-fid")]
    assert any(key.startswith("rfid(fashion-cnn)") for key in document["results"]["toy:0"])
    assert "rFID(fashion-cnn)" in out and document["protocol"]["rfid"]["hash"] == "1234"
    assert list((tmp_path / "out").glob("*.pdf"))


def test_the_released_evaluations_ssim_can_be_asked_for(run, folder):
    arguments = "--autoencoder=toy:0", f"--images={folder}", "--image_size=32"
    ours = run("reconstruction", *arguments)[3]
    theirs = run("reconstruction", *arguments, "--ssim_range=image", "--ssim_border=reflect")[3]
    assert "range of each pair" in theirs["protocol"]["ssim"] and "data range 2" in ours["protocol"]["ssim"]
    assert theirs["results"]["toy:0"]["ssim"] != ours["results"]["toy:0"]["ssim"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image_size=30",), "downsamples by 4 and image_size=30 is no multiple of it: take 28 or 32"),
        (("--image_size=2",), "take 4"),
        (("--image_size=8",), "use larger images"),
        (("--images=nonsense",), "photos"),
        (("--images=folder:/nowhere",), "/nowhere"),
        (("--autoencoder=a=toy:1",), "two columns are called 'a'"),
        (("--turns", "--scales"), "at least one turn or scale"),
        (("--turns", "4"), "not 4"),
        (("--crops=2", "--min_crop=0.9", "--max_crop=0.8"), "min_crop=0.9, max_crop=0.8"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(run, folder, monkeypatch, arguments, message):
    monkeypatch.setattr(toys.Toy, "__hash__", lambda self: 0)
    compiled = []
    monkeypatch.setattr(comparison, "compare", lambda *a, **k: compiled.append(a))
    code, _, err, document = run(
        "equivariance", "--autoencoder=a=toy:0", f"--images={folder}", "--image_size=32", *arguments
    )
    assert code == 2 and message in err and not compiled and document is None


def test_random_crops_are_of_the_share_that_was_asked_for_and_say_so(run, folder):
    arguments = ("reconstruction", "--autoencoder=toy:0", f"--images={folder}", "--image_size=32", "--crops=2")
    _, _, _, usual = run(*arguments)
    _, out, _, whole = run(*arguments, "--min_crop=0.75", "--max_crop=1")
    assert usual["images"]["crop"] == "2 fixed random crops of each image, 0.5 to 1 of its short side"
    assert whole["images"]["crop"] == "2 fixed random crops of each image, 0.75 to 1 of its short side"
    assert whole["images"]["count"] == usual["images"]["count"] == 10
    # A larger part of the picture at the same size has more detail to lose.
    assert whole["results"]["toy:0"]["psnr"] < usual["results"]["toy:0"]["psnr"] - 0.1
    _, _, _, centre = run(*arguments[:-1], "--min_crop=0.75")
    assert centre["images"]["crop"] == "ADM centre crop"


def test_small_images_have_no_ssim(run, folder):
    code, _, err, _ = run("reconstruction", "--autoencoder=toy:0", f"--images={folder}", "--image_size=8")
    assert code == 2 and "SSIM needs images of at least 11" in err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--help"])
    assert exit.value.code == 0 and "--images=photos:test" in capsys.readouterr().out
