"""Training a generator as a user does: what is refused, what is written, how it goes on, what its numbers mean."""

import json
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from eqvae_jax import convert, encode, evaluate, main, sample
from eqvae_jax.run.generator import build
from eqvae_jax.training.checkpoint import load_params

ROOT = pathlib.Path(__file__).resolve().parents[1]


def get_config(name="sit", variant="smoke"):
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](variant)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Caches of photographs: at 8 pixels, of two autoencoders, and at 16."""
    root = tmp_path_factory.mktemp("caches")
    kinds = (("one", "init:smoke", 8), ("other", "init:sd3-smoke", 8), ("large", "init:smoke", 16))
    for name, autoencoder, side in kinds:
        arguments = [f"--autoencoder={autoencoder}", "--images=photos", f"--image_size={side}", "--batch_size=3"]
        assert encode.main([*arguments, f"--output={root / name}"]) == 0
    return root


def small(caches, name="sit", **changes):
    config = get_config(name)
    config.data.latents, config.training.preview_every = str(caches / "one"), 0
    config.update_from_flattened_dict(changes)
    return config


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


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


@pytest.mark.parametrize("variant", ["XL_3", "M_2", "tiny"])
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


@pytest.fixture(scope="module")
def finished(caches, tmp_path_factory):
    """Six steps without a break, with everything that has state."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert main.train(long(caches, 6), workdir) == 0
    return workdir


def long(caches, steps, **changes):
    return small(caches, **{"training.steps": steps, "training.accumulate": 2, "optimizer.clip_norm": 1.0,
                            "data.batch_size": 8, "data.evaluation_batch_size": 8, "model.scan": True} | changes)


def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(caches, finished, tmp_path):
    workdir = tmp_path / "run"
    assert main.train(long(caches, 4), workdir) == 0 and main.train(long(caches, 6), workdir) == 0
    for which in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, *(load_params(run, which)[0] for run in (finished, workdir)))
    losses = [[row["loss"] for row in rows_of(run) if row["split"] == "train"] for run in (finished, workdir)]
    assert losses[0] == losses[1] and len(losses[0]) == 6 and all(np.isfinite(losses[0]))


def on_eight_devices(name, workdir, **changes):
    """The rows of a run of configs/NAME.py:smoke over 8 devices, its parameters over pairs of them."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    changes |= {"training.preview_every": 0, "mesh.fsdp": 2, "mesh.min_shard_size": 64, "data.batch_size": 8}
    arguments = [f"--config.{field}={value}" for field, value in changes.items()]
    ended = subprocess.run([sys.executable, "-m", "eqvae_jax.main", f"--config=configs/{name}.py:smoke",
                            f"--workdir={workdir}", *arguments], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0 and "Batch 8 = 8 devices" in ended.stdout, ended.stdout + ended.stderr
    return rows_of(workdir)


def test_eight_devices_learn_what_one_does(caches, finished, tmp_path):
    rows = on_eight_devices("sit", tmp_path / "run", **{
        "data.latents": caches / "one", "training.steps": 6, "training.accumulate": 1, "optimizer.clip_norm": 1.0,
        "data.evaluation_batch_size": 8, "model.scan": True})
    for one, eight in zip(rows_of(finished), rows, strict=True):
        assert one["loss"] == pytest.approx(eight["loss"], rel=1e-4)


def test_the_distance_while_training_is_that_of_the_set_that_sample_makes(caches, tmp_path):
    classifier = runpy.run_path(str(ROOT / "configs" / "fashion_classifier.py"))["get_config"]("smoke")
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


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier of two steps, which looks at images of 8 x 8 as 2 x 2 places."""
    config = runpy.run_path(str(ROOT / "configs" / "fashion_classifier.py"))["get_config"]("smoke")
    config.data.image_size = 8
    workdir = tmp_path_factory.mktemp("classifier") / "cnn"
    assert main.train(config, workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def with_images(tmp_path_factory):
    output = tmp_path_factory.mktemp("with_images") / "latents"
    assert encode.main(["--autoencoder=init:smoke", "--images=photos", "--image_size=8", "--batch_size=3",
                        "--keep_images", f"--output={output}"]) == 0
    return output


def aligned(with_images, classifier, **changes):
    config = get_config("repa")
    config.data.latents, config.training.preview_every = str(with_images), 0
    config.alignment.encoder = f"workdir:{classifier}"
    config.model.patch_size = 2                               # 4 x 4 latents, 2 x 2 tokens, 2 x 2 places
    config.update_from_flattened_dict(changes)
    return config


def test_repa_trains_resumes_and_samples(with_images, classifier, tmp_path):
    longer = aligned(with_images, classifier, **{"training.steps": 4, "optimizer.learning_rate": 0.05})
    assert main.train(longer, tmp_path / "run") == 0
    rows = [row for row in rows_of(tmp_path / "run") if row["split"] == "train"]
    assert all(row["loss"] == pytest.approx(row["denoising"] + 0.5 * row["alignment"], rel=1e-5) for row in rows)
    longer.training.steps = 2
    assert main.train(longer, tmp_path / "again") == 0
    longer.training.steps = 4
    assert main.train(longer, tmp_path / "again") == 0
    jax.tree.map(np.testing.assert_array_equal, *(load_params(tmp_path / run, "ema")[0] for run in ("run", "again")))
    from eqvae_jax import weights

    model, params, spec = weights.load_generator(f"workdir:{tmp_path / 'run'}")
    assert spec.kind == "repa" and not model.reversed_time and "projector_out" in params
    assert sample.main([f"--generator=workdir:{tmp_path / 'run'}", "--count=2", f"--output={tmp_path / 's.npz'}"]) == 0
    started = aligned(with_images, classifier, **{"init": f"workdir:{tmp_path / 'run'}", "training.steps": 1,
                                                  "optimizer.learning_rate": 0.0})
    assert main.train(started, tmp_path / "started") == 0
    start = load_params(tmp_path / "started", "params")[0]["generator"]
    jax.tree.map(np.testing.assert_array_equal, start, load_params(tmp_path / "run", "ema")[0]["generator"])
    (tmp_path / "run").rename(tmp_path / "moved")             # what it began with is not needed to go on
    started.training.steps = 2
    assert main.train(started, tmp_path / "started") == 0


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


@pytest.mark.parametrize("changes, message", [
    ({"alignment.encoder": ""}, "dinov2:FILE"), ({"alignment.encoder": "clip:x"}, "must be one of"),
    ({"data.latents": "{caches}/one"}, "encode again with --keep_images"), ({"alignment.depth": 2}, "blocks 1 to 1"),
    ({"model.patch_size": 1}, "sees 4 places in images of 8 x 8, and the generator has 4 x 4 tokens"),
    ({"init": "init"}, "does not say what it is"),
    ({"data.evaluation": "{caches}/one"}, "alignment looks at those of both"),
])
def test_alignments_that_cannot_be_are_refused(caches, with_images, classifier, tmp_path, changes, message):
    changes = {name: value.format(caches=caches) if isinstance(value, str) else value
               for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        main.train(aligned(with_images, classifier, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_weights_of_the_same_model_only(caches, finished, tmp_path):
    config = small(caches, **{"init": f"workdir:{finished}", "model.width": 32})
    with pytest.raises(ValueError, match="another model than this config's: width 16 instead of 32"):
        main.train(config, tmp_path / "run")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    output = tmp_path_factory.mktemp("tokens") / "latents"
    assert encode.main(["--autoencoder=init:vqgan-smoke", "--images=photos", "--image_size=8", "--batch_size=3",
                        f"--output={output}"]) == 0
    return output


def masked(tokens, **changes):
    config = get_config("maskgit")
    config.data.latents, config.training.preview_every = str(tokens), 0
    config.update_from_flattened_dict(changes)
    return config


def test_maskgit_trains_resumes_samples_and_is_converted(tokens, tmp_path, capsys):
    changes = {"optimizer.learning_rate": 0.01, "training.accumulate": 2, "training.preview_every": 2, "ema_decay": 0.5}
    for steps, name in ((4, "run"), (2, "again"), (4, "again")):
        assert main.train(masked(tokens, **changes | {"training.steps": steps}), tmp_path / name) == 0
    jax.tree.map(np.testing.assert_array_equal, *(load_params(tmp_path / run, "ema")[0] for run in ("run", "again")))
    row = next(row for row in rows_of(tmp_path / "run") if row["split"] == "eval")
    assert 0 <= row["accuracy_masked"] <= 1 and 0 < row["masked"] < 1 and np.isfinite(row["loss"])
    assert [path.name for path in (tmp_path / "run" / "previews").iterdir()][0].startswith("samples_")

    run, made = f"--generator=workdir:{tmp_path / 'run'}", {}
    for batch in (2, 5):
        output = tmp_path / f"{batch}.npz"
        assert sample.main([run, "--count=5", f"--batch_size={batch}", "--evaluations=3", f"--output={output}"]) == 0
        made[batch] = np.load(output)["arr_0"]
    np.testing.assert_array_equal(made[2], made[5])
    assert made[5].shape == (5, 8, 8, 3) and len({image.tobytes() for image in made[5]}) > 1

    file = f"maskgit:{tmp_path / 'm.pth'}"
    assert convert.main([f"--from=workdir:{tmp_path / 'run'}", f"--to={file}"]) == 0
    assert "verified" in capsys.readouterr().out
    assert sample.main([f"--generator={file}", "--autoencoder=init:vqgan-smoke", "--count=5", "--batch_size=5",
                        "--evaluations=3", "--guidance=2", f"--output={tmp_path / 'file.npz'}"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "file.npz")["arr_0"], made[5])  # the public file has 4 as guidance


@pytest.mark.parametrize("changes, message", [
    ({"data.latents": "{caches}/one"}, r"holds posteriors of init:smoke, and this config learns tokens"),
    ({"sampling.guidance": 0.5}, "must be at least 1"), ({"sampling.sampler": "ddpm"}, "has arccos, linear"),
    ({"sampling.evaluations": 17, "training.preview_every": 2}, "of 16 tokens; take fewer"),
    ({"process.path": "linear"}, "path is for an interpolant"),
    ({"process.schedule": "cubic"}, "schedule is 'cubic'"), ({"model.heads": 3}, "3 heads"),
    ({"model.preset": "small"}, "no MaskGIT named 'small'"),
])
def test_masked_tokens_that_cannot_be_learnt_are_refused(caches, tokens, tmp_path, changes, message):
    changes = {name: value.format(caches=caches) if isinstance(value, str) else value
               for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        main.train(masked(tokens, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_sit_of_tokens_is_refused(tokens, caches, tmp_path):
    with pytest.raises(ValueError, match="holds tokens of init:vqgan-smoke, and this config learns posteriors"):
        main.train(small(caches, **{"data.latents": str(tokens)}), tmp_path / "run")


def test_maskgits_sizes_and_recipe_are_the_reproductions():
    class Cache:
        shape, manifest = (16, 16), {"classes": 1000, "autoencoder": {"codes": 1024}}

    config = get_config("maskgit", "base")
    from eqvae_jax.generators.process import make_process
    from eqvae_jax.run.generator import parameter_shapes

    model = build(config.model, Cache, make_process(**config.process, codes=1024))
    assert sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(model))) == 174_160_874
    assert (config.data.batch_size, config.ema_decay, config.training.steps) == (512, 0.0, 755_200)
    assert (config.optimizer.b2, config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.96, 1e-5, 1.0)
    with pytest.raises(ValueError, match="no variant 'B_2'; it has: base"):
        get_config("maskgit", "B_2")


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
