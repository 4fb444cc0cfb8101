"""The small classifier: it learns, it is measured image by image, and what cannot work is refused."""

import functools
import pathlib
import runpy

import jax
import numpy as np
import pytest

from eqvae_jax import main
from eqvae_jax.evaluation.classifier_task import check, classifier_task
from eqvae_jax.features.classifier import Classifier
from eqvae_jax.training.checkpoint import load_params
from eqvae_jax.training.sharding import make_mesh, put

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs" / "fashion_classifier.py"


def get_config(variant="smoke"):
    return runpy.run_path(str(CONFIG))["get_config"](variant)


def stripes(rows):
    """Images of horizontal (0) and vertical (1) stripes of random phase: labels that a convolution can learn."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, rows).astype(np.int32)
    wave = (np.arange(8) + rng.integers(0, 4, (rows, 1))) % 4 < 2  # rows 8
    image = np.where(label[:, None, None] == 1, wave[:, None, :], wave[:, :, None])
    return {"image": np.repeat(image[..., None] * 255, 3, -1).astype(np.uint8), "label": label,
            "mask": np.ones(rows, bool)}


def test_it_learns_what_a_convolution_can_tell_and_measures_each_image():
    config = get_config()
    config.data.image_size, config.model.classes, config.loss.label_smoothing = 8, 2, 0.1
    mesh = make_mesh(config.mesh)
    task, batch = classifier_task(config, mesh), put(mesh, stripes(32))
    state = jax.jit(lambda init, key: init(key), out_shardings=task.shardings)(
        jax.tree_util.Partial(task.init), jax.random.key(0))
    for step in range(60):
        state, metrics = task.train_step(state, batch, step)
    assert metrics["accuracy"] == 1 and 0.19 < metrics["loss"] < 0.4  # smoothed labels leave an entropy of 0.199
    values = task.eval_step(state, batch)
    assert values["accuracy"].shape == values["cross_entropy"].shape == (32,)
    found = Classifier(**config.model).apply({"params": state.params["classifier"]}, batch["image"] / 127.5 - 1)
    assert found.features.shape == (32, 8) and found.features.min() == 0 < found.features.max()
    log_p = jax.nn.log_softmax(found.logits)
    expected = -np.take_along_axis(np.asarray(log_p), np.asarray(batch["label"])[:, None], 1)[:, 0]
    np.testing.assert_allclose(values["cross_entropy"], expected, atol=1e-4)


def test_a_bad_batch_changes_nothing_but_the_counters():
    config = get_config()
    config.optimizer.clip_norm = 0.0
    mesh = make_mesh(config.mesh)
    task, place = classifier_task(config, mesh), functools.partial(put, mesh)
    state = jax.jit(task.init, out_shardings=task.shardings)(jax.random.key(0))
    state = state.replace(params=jax.tree.map(lambda a: a * np.nan, state.params))
    batch = {"image": np.zeros((4, 28, 28, 3), np.uint8), "label": np.zeros(4, np.int32)}
    state, _ = task.train_step(state, place(batch), 0)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (1, 1, 1)


@pytest.mark.parametrize("change, message", [
    (lambda c: c.data.update(batch_size=0), "data.batch_size is 0"),
    (lambda c: c.data.update(image_size=3), "4 pixels"),
    (lambda c: c.model.update(classes=1), "classes at least 2"),
    (lambda c: c.loss.update(label_smoothing=1.0), "label_smoothing"),
])
def test_numbers_that_make_no_sense_are_refused(change, message):
    config = get_config()
    change(config)
    with pytest.raises(ValueError, match=message):
        check(config, make_mesh(config.mesh, jax.devices()[:1]))


def test_the_config_asks_for_labelled_images_and_smoke_runs_through_main(tmp_path):
    with pytest.raises(ValueError, match="idx:DIR:train"):
        main.train(get_config("fashion"), tmp_path)
    assert main.train(get_config(), tmp_path) == 0
    params, config, step = load_params(tmp_path, "params")
    assert step == 2 and config["name"] == "fashion-cnn" and params["classifier"]["out"]["kernel"].shape == (8, 10)


def test_a_task_nobody_knows_is_refused(tmp_path):
    config = get_config()
    config.task = "regression"
    with pytest.raises(ValueError, match="task is 'regression'; it must be one of autoencoder, classifier"):
        main.train(config, tmp_path)
