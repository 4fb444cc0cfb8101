"""Generated against reference: each number is the metric's own on the same features, and nothing can be exchanged."""

import json

import numpy as np
import pytest
import toy_features as toys
from PIL import Image

from eqvae_jax import evaluate
from eqvae_jax.evaluation import distances, generation
from eqvae_jax.evaluation.feature_sets import collect
from eqvae_jax.evaluation.image_sets import open_sets

OURS = {"subset_size": 20, "subsets": 5, "progress": False}


@pytest.fixture
def files(tmp_path):
    """A reference of 60 images and 40 generated ones that are darker, as .npz."""
    np.savez(tmp_path / "reference.npz", toys.images(60, seed=1))
    np.savez(tmp_path / "generated.npz", toys.images(40, seed=2, high=200))
    return {name: str(tmp_path / f"{name}.npz") for name in ("reference", "generated")}


def measured(references, extractor, image_size=None, **options):
    sets = open_sets(references, image_size)
    return generation.measure(reference=sets.pop("reference"), generated=sets, extractor=extractor, **OURS | options)


def features(path, extractor):
    return collect(extractor, [np.load(path)["arr_0"]], progress=False)


def test_every_number_is_the_metrics_own_on_these_sets_and_not_on_the_exchanged_ones(files):
    extractor, _ = toys.extractor("inception", protocol="pytorch-fid", spatial=True)
    values = measured(files, extractor)["results"]["generated"]
    theirs, ours = (features(files[name], extractor) for name in ("reference", "generated"))
    pools = {"reference": theirs.pool, "generated": ours.pool}
    kid = distances.kernel_distance(**pools, subsets=5, subset_size=20)
    manifold = distances.precision_recall(**pools)
    expected = {
        "fid": distances.frechet_distance(*theirs.gaussian[:2], *ours.gaussian[:2]),
        "sfid": distances.frechet_distance(*theirs.spatial[:2], *ours.spatial[:2]),
        "inception_score": distances.inception_score(ours.logits).mean,
        "inception_score_std": distances.inception_score(ours.logits).std,
        "precision": manifold.precision, "recall": manifold.recall, "kid": kid.mean, "kid_std": kid.std,
    }  # fmt: skip
    assert values == pytest.approx(expected, rel=1e-9)
    swapped = measured({"reference": files["generated"], "generated": files["reference"]}, extractor)
    for metric in ("inception_score", "precision", "recall"):
        assert abs(swapped["results"]["generated"][metric] - values[metric]) > 1e-3


def test_a_classifiers_numbers_carry_its_name_and_it_has_no_sfid(files):
    extractor, _ = toys.extractor("fashion-cnn")
    document = measured(files, extractor)
    assert "fid(fashion-cnn)" in document["results"]["generated"] and "fid" not in document["results"]["generated"]
    assert list(document["left_out"]) == ["sfid(fashion-cnn)"]
    assert any("FID(fashion-cnn) of 40 images" in warning for warning in document["warnings"])
    assert document["features"] == {"name": "fashion-cnn", "hash": "1234", "protocol": "as is"}
    assert document["generated"]["generated"]["count"] == 40 and document["images"]["count"] == 60


def adm_reference(path, extractor, **others):
    """A reference as ADM's: statistics of 200 images, of which 60 are in the file."""
    whole = collect(extractor, [toys.images(200, seed=1)], progress=False)
    statistics = {"mu": whole.gaussian.mu, "sigma": whole.gaussian.sigma,
                  "mu_s": whole.spatial.mu, "sigma_s": whole.spatial.sigma}  # fmt: skip
    np.savez(path, arr_0=toys.images(200, seed=1)[:60], **statistics | others)
    return whole


def test_statistics_in_the_reference_come_before_those_of_its_images(files):
    extractor, seen = toys.extractor("inception", protocol="adm", spatial=True)
    whole = adm_reference(files["reference"], extractor)
    ours = features(files["generated"], extractor)
    seen.clear()
    document = measured(files, extractor, metrics=["fid", "sfid"])
    assert sum(shape[0] for shape in seen) == 50  # the generated images only, padded
    values = document["results"]["generated"]
    assert values["fid"] == pytest.approx(distances.frechet_distance(*whole.gaussian[:2], *ours.gaussian[:2]))
    assert values["sfid"] == pytest.approx(distances.frechet_distance(*whole.spatial[:2], *ours.spatial[:2]))
    assert document["protocol"]["reference_statistics"] == "stored in its file"
    with_images = measured(files, extractor)
    assert with_images["results"]["generated"]["fid"] == values["fid"]
    assert with_images["images"]["count"] == 60 and "precision" in with_images["results"]["generated"]


def test_a_reference_given_as_the_generated_set_is_noticed(files):
    extractor, _ = toys.extractor("inception", protocol="adm", spatial=True)
    adm_reference(files["reference"], extractor)
    swapped = measured({"reference": files["generated"], "generated": files["reference"]}, extractor)
    assert any("are the two exchanged?" in warning for warning in swapped["warnings"])
    twice = measured({"reference": files["generated"], "copy": files["generated"]}, extractor)
    assert any("copy holds the same images as the reference" in warning for warning in twice["warnings"])


def test_adms_statistics_are_not_taken_for_those_of_another_protocol_or_network(files, tmp_path):
    adm, _ = toys.extractor("inception", protocol="adm", spatial=True)
    adm_reference(files["reference"], adm)
    with pytest.raises(ValueError, match="follow the protocol adm, and features are now taken with pytorch-fid"):
        measured(files, adm._replace(protocol="pytorch-fid"))
    measured(files, adm._replace(protocol="torch-fidelity"))  # the same input
    cnn, _ = toys.extractor("fashion-cnn")
    assert measured(files, cnn)["protocol"]["reference_statistics"] == "of its images"
    np.savez(files["reference"], mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="needs images of the reference, and .* holds statistics only"):
        measured(files, cnn, metrics=["fid"])
    assert set(measured(files, adm)["left_out"]) == {"sfid", "precision_recall", "kid"}


@pytest.mark.parametrize("name", ["inception", "fashion-cnn"])
def test_a_reference_that_was_written_gives_the_same_numbers(files, tmp_path, monkeypatch, name):
    monkeypatch.setattr(generation, "REFERENCE_IMAGES", 25)
    extractor, _ = toys.extractor(name, protocol="adm", spatial=name == "inception")
    direct = measured(files, extractor)["results"]["generated"]
    path = str(tmp_path / "written.npz")
    generation.write_reference(path, open_sets(files)["reference"], extractor, progress=False)
    files["reference"] = path
    document = measured(files, extractor)
    key = "fid" if name == "inception" else "fid(fashion-cnn)"
    assert document["results"]["generated"][key] == pytest.approx(direct[key], rel=1e-12)
    with np.load(path) as file:
        np.testing.assert_array_equal(file["arr_0"], toys.images(60, seed=1)[::3])
        assert ("mu_s" in file) == ("mu" in file) == (name == "inception")
    with pytest.raises(ValueError, match="made with weights 1234 of .*, and these are 77"):
        measured(files, extractor._replace(hash="77"))


def test_the_score_and_the_manifolds_follow_the_protocol(files):
    for protocol, score, half in (("adm", "adm", "adm"), ("torch-fidelity", "torch-fidelity", "float32")):
        extractor, _ = toys.extractor("inception", protocol=protocol, spatial=True)
        document, ours = measured(files, extractor), features(files["generated"], extractor)
        found = document["results"]["generated"]["inception_score"]
        assert found == pytest.approx(distances.inception_score(ours.logits, protocol=score).mean)
        assert document["protocol"]["precision_recall"] == f"{half}, k=3"


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"arr_0": toys.images(60, side=5)}, {}, "holds images of 4 x 4 pixels, and reference is 5 x 5"),
        ({"arr_0": toys.images(60)}, {"image_size": 8}, "4 x 4 pixels, and image_size is 8 x 8"),
        ({"arr_0": toys.images(19)}, {"metrics": ["kid"]}, "kid needs at least 20 images, and the reference has 19"),
        ({"arr_0": toys.images(3)}, {"metrics": ["precision_recall"]}, "needs at least 4 images"),
        ({"arr_0": toys.images(1)}, {"metrics": ["fid"]}, "needs at least 2 images"),
        ({"arr_0": toys.images(60)}, {"metrics": ["psnr"]}, "no metric psnr; there are fid, sfid"),
        ({"arr_0": toys.images(60)}, {"metrics": ["sfid"]}, "sfid needs Inception's spatial features"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, {}, "is empty"),
        ({"arr_0": np.full((60, 4, 4, 3), np.nan)}, {}, "float64: metrics compare 8-bit images"),
    ],
)
def test_sets_that_do_not_compare_are_refused_before_a_feature_is_computed(files, arrays, options, message):
    np.savez(files["reference"], **arrays)
    extractor, seen = toys.extractor("toy")
    with pytest.raises(ValueError, match=message):
        measured(files, extractor, **options)
    assert not seen


@pytest.fixture
def folder(tmp_path):
    """30 smooth images of 40 x 36 pixels and one that is none."""
    (tmp_path / "real").mkdir()
    for i, image in enumerate(toys.images(30, side=5)):
        Image.fromarray(image).resize((36, 40)).save(tmp_path / "real" / f"{i:02}.png")
    return f"folder:{tmp_path / 'real'}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return toys.classifier_run(tmp_path_factory.mktemp("classifier") / "run")


def test_the_command_measures_resumes_and_writes_what_it_did(folder, trained, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", toys.images(24, seed=5, side=8))
    np.savez(tmp_path / "b.npz", toys.images(24, seed=6, side=8, low=100))
    command = ["generation", f"--reference={folder}", f"--generated=control={tmp_path / 'a.npz'}",
               f"--generated=EQ={tmp_path / 'b.npz'}", f"--features=workdir:{trained}", "--kid_subset_size=20",
               "--batch_size=6", f"--cache={tmp_path / 'cache'}", f"--output={tmp_path / 'out'}"]  # fmt: skip
    documents = []
    for _ in range(2):
        assert evaluate.main(command) == 0
        documents.append(json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=pytest.fail))
    printed = capsys.readouterr()
    assert "FID(fashion-cnn)" in printed.out and "sfid(fashion-cnn) was left out" in printed.err
    assert "FID(fashion-cnn) of 24 images" in printed.out
    first, again = documents
    assert first["results"] == again["results"] and list(first["results"]) == ["control", "EQ"]
    assert first["images"]["features_from_cache"] == 0 and again["images"]["features_from_cache"] == 30
    assert first["images"]["crop"] == "ADM centre crop" and first["images"]["image_size"] == 8
    assert again["generated"]["EQ"]["count"] == 24 and again["software"]["jax"]


def test_the_command_writes_a_reference_alone(folder, trained, tmp_path, capsys):
    path = tmp_path / "made" / "reference.npz"
    command = ["generation", f"--reference={folder}", "--image_size=8", f"--features=workdir:{trained}", "--cache=",
               f"--write_reference={path}", f"--output={tmp_path / 'out'}"]  # fmt: skip
    assert evaluate.main(command) == 0 and "statistics of 30 images" in capsys.readouterr().out
    assert {"arr_0", "mu(fashion-cnn)", "made_with"} <= set(np.load(path)) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--generated={folder}"], "give image_size"),
        (["--generated={folder}", "--image_size=8"], "Inception has no weights"),
        (["--generated=reference={folder}", "--image_size=8"], "cannot be called 'reference'"),
        (["--generated=nowhere.npz"], "nowhere.npz: there is no such file"),
        (["--generated={folder}", "--image_size=8", "--features=vgg"], "neither inception nor workdir:DIR"),
        (["--generated={folder}", "--image_size=0"], "must be at least 1"),
    ],
)
def test_command_lines_that_cannot_work_are_refused(folder, tmp_path, capsys, arguments, message):
    arguments = [argument.format(folder=folder) for argument in arguments]
    assert evaluate.main(["generation", f"--reference={folder}", *arguments, f"--output={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
