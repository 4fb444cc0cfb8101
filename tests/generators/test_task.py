"""The generators' training step: what it sees of a latent, what it drops, what it averages."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from eqvae_jax.data.latents import LatentSpace
from eqvae_jax.generators.dit import DiT
from eqvae_jax.generators.maskgit import MaskGIT
from eqvae_jax.generators.networks import predict
from eqvae_jax.generators.process import make_process
from eqvae_jax.generators.task import check, generator_task
from eqvae_jax.training.sharding import make_mesh, put

SHAPE, SPACE = (4, 4, 3), LatentSpace(0.5, 2.0, "aa", "workdir:A")


def config_of(**changes):
    config = ConfigDict(dict(
        seed=0, label_dropout=0.25, ema_decay=0.9,
        optimizer=dict(learning_rate=1e-2, schedule="constant", warmup_steps=0, b1=0.9, b2=0.999, eps=1e-8,
                       weight_decay=0.0, clip_norm=0.0),
        training=dict(steps=10, accumulate=1), mesh=dict(data=-1, fsdp=1, min_shard_size=2**18, rules=()),
        data=dict(batch_size=8, evaluation_batch_size=8)))
    config.update_from_flattened_dict(changes)
    return config


class Says(nn.Module):
    """Predicts `weight`, 0 at first, where the label is known, and 10 where it is dropped."""

    input_size: int = 4
    in_channels: int = 3
    out_channels: int = 3
    classes: int = 5
    patch_size: int = 1

    @nn.compact
    def __call__(self, x, t, labels):
        weight = self.param("weight", nn.initializers.zeros, ())
        value = jnp.where(labels == self.classes, 10.0, weight)
        return types.SimpleNamespace(prediction=jnp.zeros_like(x) + value[:, None, None, None])


def task_of(config, model=None, **options):
    mesh = make_mesh(config.mesh)
    task = generator_task(config, model or Says(), make_process(), SPACE, mesh, **options)
    return task, task.init(jax.random.key(0)), mesh


def batch_of(mesh, count=8, mean=2.0, std=0.0, label=1, first=0):
    mean = np.full((count, *SHAPE), mean, np.float32)
    return put(mesh, {"mean": mean, "std": np.full_like(mean, std), "label": np.full(count, label, np.int32),
                      "index": np.arange(first, first + count, dtype=np.int32)})


@pytest.mark.parametrize("mean, std, expected", [
    (2.0, 0.0, 1.0),                        # the latent is the shift: x = 0, and the velocity is the noise alone
    (8.0, 0.0, 1.0 + 3.0**2),               # x = (8 - 2) / 2
    (2.0, 4.0, 1.0 + 2.0**2),               # the posterior is sampled: x has the standard deviation 4 / 2
])
def test_the_network_learns_scaled_samples_of_the_posterior(mean, std, expected):
    task, state, mesh = task_of(config_of())
    values = task.eval_step(state, batch_of(mesh, 2000, mean, std))
    assert values["loss"].shape == (2000,)
    assert float(values["loss"].mean()) == pytest.approx(expected, rel=0.03)


def test_posterior_noise_is_fresh_at_each_step_and_the_same_at_each_evaluation():
    task, state, mesh = task_of(config_of(**{"optimizer.learning_rate": 0.0, "label_dropout": 0.0}))
    batch = batch_of(mesh, std=1.0)
    first, again = task.eval_step(state, batch)["loss"], task.eval_step(state, batch)["loss"]
    np.testing.assert_array_equal(first, again)
    state, one = task.train_step(state, batch, 0)
    state, two = task.train_step(state, batch, 1)
    _, replayed = task.train_step(state, batch, 0)
    assert float(one["loss"]) != float(two["loss"])
    assert float(one["loss"]) == pytest.approx(float(replayed["loss"]), rel=1e-6)


def test_labels_are_dropped_in_training_at_the_configured_rate_and_never_in_evaluation():
    task, state, mesh = task_of(config_of())
    batch = batch_of(mesh, 4000)
    assert float(task.eval_step(state, batch)["loss"].mean()) == pytest.approx(1.0, rel=0.03)
    _, metrics = task.train_step(state, batch, 0)
    assert float(metrics["loss"]) == pytest.approx(1 + 0.25 * 100, rel=0.1)   # 10^2 where dropped


def small_dit(**fields):
    return DiT(input_size=4, in_channels=3, out_channels=3, patch_size=2, width=16, depth=2, heads=2, classes=5,
               **fields)


def test_accumulated_parts_take_the_step_of_the_whole_batch():
    results = []
    for accumulate in (1, 4):
        task, state, mesh = task_of(config_of(**{"training.accumulate": accumulate}), small_dit())
        results.append(task.train_step(state, batch_of(mesh, std=1.0), 0))
    (whole, metrics), (parts, others) = results
    assert float(metrics["gradient_norm"]) > 0
    for name in metrics:
        assert float(metrics[name]) == pytest.approx(float(others[name]), rel=1e-4), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), whole.params, parts.params)


def test_the_average_follows_the_weights_at_its_decay():
    task, state, mesh = task_of(config_of(label_dropout=0.0))
    state, _ = task.train_step(state, batch_of(mesh, mean=8.0), 0)            # Adam's first step is the learning rate
    weight, average = (float(tree["generator"]["weight"]) for tree in (state.params, state.ema))
    assert abs(weight) == pytest.approx(1e-2, rel=1e-3)
    assert average == pytest.approx(0.1 * weight, rel=1e-3)
    measured = task_of(config_of(), measures={"weight": lambda params: params["weight"]})[0].measures["weight"](state)
    assert float(measured) == average


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_acts_in_training_and_not_in_evaluation(monkeypatch, rate):
    """Traced, not run: each example has a key while training, where anything is dropped, and none in evaluation."""
    config, seen = config_of(), []
    model = MaskGIT(input_size=2, codes=6, classes=5, width=16, depth=1, heads=2, mlp_size=16, dropout=rate)
    task = generator_task(config, model, make_process("masking", codes=6), None, make_mesh(config.mesh))

    def recording(*arguments):
        seen.append(arguments[5])
        return predict(*arguments)

    monkeypatch.setattr("eqvae_jax.generators.task.predict", recording)
    count = lambda *shape: jax.ShapeDtypeStruct((8, *shape), np.int32)
    batch = {"tokens": count(2, 2), "label": count(), "index": count()}
    state = jax.eval_shape(task.init, jax.random.key(0))
    jax.eval_shape(lambda state, batch: task.train_step(state, batch, 0), state, batch)
    jax.eval_shape(task.eval_step, state, batch)
    training, evaluation = seen
    assert evaluation is None and (training.shape == (8,) if rate else training is None)


def test_without_an_average_the_weights_themselves_are_evaluated():
    task, state, mesh = task_of(config_of(ema_decay=0.0, label_dropout=0.0))
    assert state.ema is None
    before = float(task.eval_step(state, batch_of(mesh, mean=8.0))["loss"].mean())
    for step in range(5):
        state, _ = task.train_step(state, batch_of(mesh, mean=8.0), step)
    assert float(task.eval_step(state, batch_of(mesh, mean=8.0))["loss"].mean()) < before - 0.1


def test_a_batch_that_is_not_finite_changes_nothing_but_the_count():
    task, state, mesh = task_of(config_of())
    before = jax.tree.map(np.asarray, (state.params, state.ema))
    state, _ = task.train_step(state, batch_of(mesh, mean=np.inf), 0)
    jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.ema))
    assert (int(state.step), int(state.skipped)) == (1, 1)


def test_given_weights_are_where_training_starts():
    given = {"weight": np.float32(3.0)}
    _, state, _ = task_of(config_of(), init_params=given)
    assert float(state.params["generator"]["weight"]) == float(state.ema["generator"]["weight"]) == 3.0


@pytest.mark.parametrize("changes, shape, message", [
    ({"data.batch_size": 0}, SHAPE, "data.batch_size is 0"),
    ({"training.accumulate": 3}, SHAPE, "data.batch_size is 8"),
    ({"data.evaluation_batch_size": 0}, SHAPE, "data.evaluation_batch_size"), ({"label_dropout": 1.0}, SHAPE, "share"),
    ({}, (4, 6, 3), "squares"), ({}, (5, 5, 3), "patches of 2"), ({}, (8, 8, 3), r"takes 4 x 4 x 3"),
    ({}, (4, 4, 4), r"the latents are \(4, 4, 4\)"),
])
def test_what_does_not_fit_is_refused_by_name(changes, shape, message):
    config = config_of(**changes)
    with pytest.raises(ValueError, match=message):
        check(config, small_dit(), make_process(), shape, 5, make_mesh(config.mesh))


def test_labels_that_the_model_would_take_for_none_are_refused():
    config = config_of()
    check(config, small_dit(), make_process(), SHAPE, 5, make_mesh(config.mesh))
    with pytest.raises(ValueError, match="model.classes is 5, and the latents have 6"):
        check(config, small_dit(), make_process(), SHAPE, 6, make_mesh(config.mesh))
