"""Training a generator as a user does: what is refused, what is written, how it goes on, what its numbers mean."""

import json
import pathlib

import jax
import numpy as np
import pytest
from generator_configs import aligned, get_config, long, masked, on_eight_devices, rows_of, small
from ml_collections import ConfigDict

from eqvae_jax import evaluate, main, sample
from eqvae_jax.run.generator import build
from eqvae_jax.training.checkpoint import load_params


class Shape:
    """As much of a cache as `build` looks at."""

    shape, manifest = (32, 32, 4), {"classes": 1000}


@pytest.mark.parametrize("name, variant, parameters", [
    ("dit", "S_8", 33_142_016), ("dit", "B_4", 130_426_496), ("dit", "L_2", 457_840_672), ("dit", "XL_2", 674_834_720),
    ("sit", "XL_2", 675_111_184 - 256 * 1152), ("sit", "S_2", 32_957_200 - 256 * 384),
])
def test_variants_are_the_published_sizes_with_the_papers_recipe(name, variant, parameters):
    from eqvae_jax.generators.process import make_process

    config = get_config(name, variant)
    process = make_process(**config.process)
    model = build(config.model, Shape, process)
    one = np.zeros(1, np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 4), np.float32),
                            one.astype(np.float32), one)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    assert model.reversed_time == (name == "sit") and model.scan and model.dtype == "bfloat16"
    assert (config.data.batch_size, config.ema_decay, config.training.steps) == (256, 0.9999, 400_000)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay, config.label_dropout) == (1e-4, 0.0, 0.1)


@pytest.mark.parametrize("variant", ["XL_3", "M_2", "large"])
def test_an_unknown_variant_is_named_with_the_known_ones(variant):
    with pytest.raises(ValueError, match=rf"no variant '{variant}'; it has a size and a patch size, such as B_2"):
        get_config("dit", variant)


@pytest.mark.parametrize("changes, message", [
    ({"data.latents": ""}, "python -m eqvae_jax.encode"),
    ({"data.evaluation": "{caches}/large"}, r"has the shape \(8, 8, 4\), and .* \(4, 4, 4\)"),
    ({"training.preview_every": 2, "sampling.sampler": "sde", "sampling.evaluations": 1}, "evaluations is 1"),
    ({"training.preview_every": 2, "evaluation.preview": 0}, "evaluation.preview is 0"),
    ({"label_dropout": 0.0}, "guidance needs a network"), ({"init": "workdir:nowhere"}, "nowhere"),
    ({"data.latents": "{caches}"}, "holds no cache of latents"),
    ({"data.evaluation": "{caches}/other"}, "another autoencoder"), ({"data.scale": "none"}, "data.scale is 'none'"),
    ({"data.scale": "autoencoder"}, "data.scale=measured"), ({"model.preset": "M/2"}, "no DiT named 'M/2'"),
    ({"process.path": "cosine"}, "'cosine'"), ({"sampling.sampler": "ddim"}, "this generator's process has sde"),
    ({"model.patch_size": 3}, "patches of 3"), ({"evaluation.features": "inception"}, "needs real images"),
    ({"data.autoencoder": "init:sd3-smoke", "training.preview_every": 2}, "is another autoencoder"),
    ({"data.autoencoder": "workdir:nowhere", "training.preview_every": 2}, "--config.training.preview_every=0"),
    ({"model.dtype": "float16"}, "model.dtype"),
])
def test_what_cannot_work_is_refused_before_anything_is_written(caches, tmp_path, changes, message):
    changes = {name: value.format(caches=caches) if isinstance(value, str) else value
               for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        main.train(small(caches, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(caches, finished, tmp_path):
    workdir = tmp_path / "run"
    assert main.train(long(caches, 4), workdir) == 0 and main.train(long(caches, 6), workdir) == 0
    for which in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, *(load_params(run, which)[0] for run in (finished, workdir)))
    losses = [[row["loss"] for row in rows_of(run) if row["split"] == "train"] for run in (finished, workdir)]
    assert losses[0] == losses[1] and len(losses[0]) == 6 and all(np.isfinite(losses[0]))


def test_eight_devices_learn_what_one_does(caches, finished, tmp_path):
    rows = on_eight_devices("sit", tmp_path / "run", **{
        "data.latents": caches / "one", "training.steps": 6, "training.accumulate": 1, "optimizer.clip_norm": 1.0,
        "data.evaluation_batch_size": 8, "model.scan": True})
    for one, eight in zip(rows_of(finished), rows, strict=True):
        assert one["loss"] == pytest.approx(eight["loss"], rel=1e-4)


def test_the_distance_while_training_is_that_of_the_set_that_sample_makes(caches, tmp_path):
    classifier = get_config("fashion_classifier")
    classifier.data.image_size = 8
    assert main.train(classifier, tmp_path / "cnn") == 0
    config = small(caches, **{
        "evaluation.features": f"workdir:{tmp_path / 'cnn'}", "evaluation.reference": "photos", "evaluation.samples": 5,
        "training.preview_every": 2, "checkpoint.best_metric": "FID(fashion-cnn)_of_5", "checkpoint.keep_best": 1})
    assert main.train(config, tmp_path / "run") == 0
    logged = next(row for row in rows_of(tmp_path / "run") if row["split"] == "eval")["FID(fashion-cnn)_of_5"]
    assert [path.name for path in (tmp_path / "run" / "previews").iterdir()] == ["samples_00000002.png"]

    run = f"--generator=workdir:{tmp_path / 'run'}"
    assert sample.main([run, "--count=5", "--batch_size=3", f"--output={tmp_path / 's.npz'}"]) == 0
    assert evaluate.main(["generation", "--reference=photos", f"--generated={tmp_path / 's.npz'}", "--metrics", "fid",
                          f"--features=workdir:{tmp_path / 'cnn'}", "--cache=", f"--output={tmp_path}"]) == 0
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert next(iter(results.values()))["fid(fashion-cnn)"] == pytest.approx(logged, rel=1e-3)


@pytest.mark.parametrize("name", ["repa", "maskgit"])
def test_eight_devices_learn_what_one_does_of_images_and_of_tokens(with_images, classifier, tokens, tmp_path, name):
    given = {"data.latents": tokens}
    if name == "repa":
        given = {"data.latents": with_images, "alignment.encoder": f"workdir:{classifier}", "model.patch_size": 2}
    config = get_config(name)
    config.update_from_flattened_dict({field: str(value) if isinstance(value, pathlib.Path) else value
                                       for field, value in given.items()})
    config.data.batch_size, config.training.preview_every = 8, 0
    assert main.train(config, tmp_path / "one") == 0
    for one, eight in zip(rows_of(tmp_path / "one"), on_eight_devices(name, tmp_path / "eight", **given), strict=True):
        assert one["loss"] == pytest.approx(eight["loss"], rel=1e-4)


def test_a_run_starts_from_weights_of_the_same_model_only(caches, finished, tmp_path):
    config = small(caches, **{"init": f"workdir:{finished}", "model.width": 32})
    with pytest.raises(ValueError, match="another model than this config's: width 16 instead of 32"):
        main.train(config, tmp_path / "run")


@pytest.mark.parametrize("name", ["sit", "dit", "repa", "maskgit"])
def test_every_config_field_is_read(caches, tokens, with_images, classifier, tmp_path, monkeypatch, name):
    """A field that nothing reads would be a promise the program does not keep."""
    changes = {"training.preview_every": 2, "checkpoint.best_metric": "loss", "checkpoint.keep_best": 1}
    if name == "repa":
        config = aligned(with_images, classifier, **changes)
    else:
        config = masked(tokens, **changes) if name == "maskgit" else small(caches, name, **changes)
    with config.unlocked():
        config.data.ignored = 1.0
    read, names = set(), {id(config): ""}
    names |= {id(section): f"{key}." for key, section in config.items() if isinstance(section, ConfigDict)}
    leaves = {prefix + key for prefix in names.values() for key in (config[prefix[:-1]] if prefix else config)}
    original = ConfigDict.__getitem__

    def recording(self, key):
        read.add(names.get(id(self), "elsewhere.") + str(key))
        return original(self, key)

    for module in ("workdir", "checkpoint"):  # the config is also written out whole
        monkeypatch.setattr(f"eqvae_jax.training.{module}.resolved",
                            lambda config: {"optimizer": {"schedule": config.optimizer.schedule}})
    monkeypatch.setattr(ConfigDict, "__getitem__", recording)
    main.train(config, tmp_path)
    monkeypatch.undo()
    # Without evaluation.features nothing asks for the other four.
    unused = {f"evaluation.{key}" for key in ("inception", "protocol", "reference", "samples")}
    assert leaves - read == {"data.ignored", "stages", *unused}
