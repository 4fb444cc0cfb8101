import json
import time

import jax
import numpy as np
import pytest
import toy_regression as toy
from toy_regression import assert_same_bits, metrics_of

from eqvae_jax import hardware
from eqvae_jax.training import sharding
from eqvae_jax.training.checkpoint import saved_steps
from eqvae_jax.training.loop import Data, train
from eqvae_jax.training.stopping import Diverged


def poisoned(*steps):
    """Batches whose targets are not a number at the given steps."""
    def stream(start):
        for step, batch in enumerate(toy.batches(start), start):
            yield batch | {"y": batch["y"] * np.nan} if step in steps else batch
    return stream


def test_six_steps_learn_and_are_logged(uninterrupted):
    workdir, state = uninterrupted
    assert int(state.step) == 6 and int(state.skipped) == 0
    losses = [line["loss"] for line in metrics_of(workdir)]
    assert len(losses) == 6 and losses[-1] < losses[1]
    assert json.loads((workdir / "config.json").read_text())["optimizer"]["learning_rate"] == 0.05


def test_where_time_goes_is_told_apart(tmp_path, monkeypatch):
    """Batches that take 0.1 s, an evaluation of 0.6 s after the second step, and a chip of 1 MFLOP/s."""
    config = toy.get_config(**{"training.steps": 4, "training.log_every": 2, "training.eval_every": 2,
                               "checkpoint.every": 4})
    task = toy.make_task(config, sharding.make_mesh(config.mesh))

    def slowly(start):
        for batch in toy.batches(start):
            time.sleep(0.1)
            yield batch

    def evaluate(state, batch):
        if not isinstance(batch["x"], jax.ShapeDtypeStruct):
            time.sleep(0.3)                                            # there are two batches
        return task.eval_step(state, batch)

    monkeypatch.setattr(hardware, "peak_flops", lambda device: 1e6)
    toy.run(tmp_path, config, slowly, task=task._replace(eval_step=evaluate, model_flops=lambda: 250.0))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    second = next(row for row in rows if row["step"] == 4 and row["split"] == "train")
    seconds = 2 / second["steps_per_second"]                           # of two steps
    assert second["input_wait"] * seconds >= 0.2 and second["evaluation_seconds"] >= 0.6
    lost = 0.2 + second["evaluation_seconds"] + second["checkpoint_seconds"]
    assert second["goodput"] <= 1 - lost / (seconds + second["evaluation_seconds"] + second["checkpoint_seconds"])
    assert 0 <= second["goodput"] < 0.5
    assert second["mfu"] == pytest.approx(second["images_per_second"] * 250 / 1e6)


def test_a_bad_batch_changes_nothing_but_the_counters(tmp_path):
    config = toy.get_config()
    mesh = sharding.make_mesh(config.mesh)
    task = toy.make_task(config, mesh)
    state = jax.jit(task.init, out_shardings=task.shardings)(jax.random.key(3))
    for step in (0, 1):
        state, _ = task.train_step(state, sharding.put(mesh, toy.batch_at(step)), step)
    before = jax.tree.map(np.array, state)
    bad = toy.batch_at(2)
    bad["y"] = bad["y"] * np.nan
    for step in (2, 3):
        state, metrics = task.train_step(state, sharding.put(mesh, bad), step)
    assert np.isnan(metrics["loss"])
    for field in ("params", "opt_state", "ema", "buffers"):
        assert_same_bits(getattr(state, field), getattr(before, field))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (4, 2, 2)
    state, _ = task.train_step(state, sharding.put(mesh, toy.batch_at(4)), 4)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (5, 2, 0)


def test_a_skipped_step_is_counted_and_written_as_null(tmp_path):
    state = toy.run(tmp_path, stream=poisoned(2))
    assert int(state.skipped) == 1
    lines = metrics_of(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert lines[2]["loss"] is None and lines[3]["loss"] > 0
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_bad_updates_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(tmp_path):
    with pytest.raises(Diverged, match=r"3 updates in a row up to step 6.*last good checkpoint is step 4"):
        toy.run(tmp_path, toy.get_config(**{"training.steps": 20}), stream=poisoned(*range(3, 20)))
    # 4 was saved after one skipped update and holds the weights of step 3
    assert saved_steps(tmp_path) == [2, 4]


def test_between_log_lines_metrics_are_averaged_over_the_finite_ones(tmp_path, uninterrupted):
    each = metrics_of(uninterrupted[0])
    toy.run(tmp_path / "pairs", toy.get_config(**{"training.log_every": 4}))
    mean, rest = metrics_of(tmp_path / "pairs")
    assert (mean["step"], rest["step"]) == (4, 6)
    for name in ("loss", "gradient_norm", "learning_rate"):
        np.testing.assert_allclose(mean[name], np.mean([line[name] for line in each[:4]]), rtol=1e-6)
        np.testing.assert_allclose(rest[name], np.mean([line[name] for line in each[4:]]), rtol=1e-6)


def test_evaluation_is_the_masked_mean_over_examples_and_the_best_is_kept(tmp_path):
    config = toy.get_config(**{
        "training.steps": 7, "training.eval_every": 1, "training.preview_every": 7, "checkpoint.keep": 1,
        "checkpoint.keep_best": 2, "checkpoint.best_metric": "error", "checkpoint.best_mode": "max"})
    toy.run(tmp_path, config)
    lines = [line for line in metrics_of(tmp_path) if line["split"] == "eval"]
    batches = list(toy.evaluation())
    inputs = np.concatenate([batch["x"][batch["mask"], 0] for batch in batches])
    assert len(inputs) == 13
    for line in lines:
        np.testing.assert_allclose(line["first_input"], inputs.mean(), rtol=1e-6)
    errors = {line["step"]: line["error"] for line in lines}
    assert len(errors) == 7
    best = sorted(errors, key=errors.get)[-2:]
    assert saved_steps(tmp_path) == sorted({*best, 7}) and 7 not in best
    assert (tmp_path / "previews" / "inputs_00000007.png").exists()


def test_one_device_and_eight_agree(children, uninterrupted):
    directory, code, out, err = children["eight_devices"]
    assert code == 0, err
    seen = json.loads(out.splitlines()[-1])
    assert seen["devices"] == 8
    assert seen["shard"] == [toy.INPUTS, toy.OUTPUTS // 4]
    assert seen["spec"] == seen["mu"] == [None, "fsdp"] and seen["step"] == []
    for here, there in zip(metrics_of(uninterrupted[0]), metrics_of(directory / "eight"), strict=True):
        assert here["step"] == there["step"]
        np.testing.assert_allclose(there["loss"], here["loss"], rtol=1e-5)
        np.testing.assert_allclose(there["gradient_norm"], here["gradient_norm"], rtol=1e-5)


def test_a_run_moves_between_one_and_eight_devices(children, tmp_path):
    directory, code, _, err = children["eight_devices"]
    assert code == 0, err
    constant = toy.get_config(**{"optimizer.schedule": "constant"})
    toy.run(tmp_path, constant)
    moved = metrics_of(directory / "moved")
    assert [line["step"] for line in moved] == [1, 2, 3, 4, 5, 6]
    for here, there in zip(metrics_of(tmp_path), moved, strict=True):
        np.testing.assert_allclose(there["loss"], here["loss"], rtol=1e-5)


@pytest.mark.parametrize("changes, message", [
    ({"training.steps": 0}, "training.steps is 0"),
    ({"training.max_skipped": 0}, "max_skipped"),
    ({"checkpoint.keep": 0}, "checkpoint.keep"),
    ({"checkpoint.best_mode": "low"}, "'min' or 'max'"),
    ({"checkpoint.best_metric": "error"}, "eval_every"),
    ({"checkpoint.best_metric": "psnr", "training.eval_every": 2}, "evaluation gives: error, first_input"),
])
def test_a_config_that_makes_no_sense_fails_before_the_first_step(tmp_path, changes, message):
    def never(start):
        raise AssertionError("a step was about to be taken")

    config = toy.get_config()
    task = toy.make_task(config, sharding.make_mesh(config.mesh))
    with pytest.raises(ValueError, match=message):
        toy.run(tmp_path, toy.get_config(**changes), never, task=task)


def test_what_a_task_or_its_data_must_not_do(tmp_path):
    config = toy.get_config()
    mesh = sharding.make_mesh(config.mesh)
    task = toy.make_task(config, mesh)
    with pytest.raises(ValueError, match="ended before step 3"):
        toy.run(tmp_path / "short", config, lambda start: iter([toy.batch_at(0), toy.batch_at(1)]))
    standing = task._replace(train_step=lambda state, batch, step: (state, {"loss": batch["y"].mean()}))
    with pytest.raises(RuntimeError, match="advance state.step"):
        toy.run(tmp_path / "standing", config, task=standing)
    scalar = task._replace(eval_step=lambda state, batch: {"error": batch["x"].mean()})
    with pytest.raises(ValueError, match="one value per example"):
        toy.run(tmp_path / "scalar", toy.get_config(**{"training.eval_every": 1}), task=scalar)
    with pytest.raises(ValueError, match="no example"):
        evaluating = toy.get_config(**{"training.eval_every": 1})
        train(task, Data(toy.batches, list), evaluating, tmp_path / "none", mesh)


def test_arrays_bound_to_init_become_arguments_and_not_constants(tmp_path):
    config = toy.get_config(**{"training.steps": 1, "optimizer.schedule": "constant"})
    task = toy.make_task(config, sharding.make_mesh(config.mesh))
    kernel = np.linspace(-2, 5, toy.INPUTS * toy.OUTPUTS, dtype=np.float32).reshape(toy.INPUTS, toy.OUTPUTS)
    traced = []

    def init(kernel, key):
        traced.append(isinstance(kernel, jax.core.Tracer))
        state = task.init(key)
        return state.replace(params={"model": state.params["model"] | {"w": kernel}}, ema=None)

    seen = []

    def train_step(state, batch, step):
        seen.append(np.array(state.params["model"]["w"]))
        return state.replace(step=state.step + 1), {"loss": state.params["model"]["b"][0]}

    toy.run(tmp_path, config, task=task._replace(
        init=jax.tree_util.Partial(init, kernel), train_step=train_step,
        shardings=task.shardings.replace(ema=None)))
    np.testing.assert_array_equal(seen[0], kernel)
    assert traced[-1]
