import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import torch

from eqvae_jax.training.optimizer import ema_update, make_optimizer, make_schedule


def settings(**changes):
    return ml_collections.ConfigDict({
        "learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0, "b1": 0.5, "b2": 0.9, "eps": 1e-8,
        "weight_decay": 0.0, "clip_norm": 0.0} | changes)


def test_two_adam_steps_by_hand():
    optimizer, _ = make_optimizer(settings(eps=0.5), steps=10)
    update, weight = jax.jit(optimizer.update), {"w": jnp.array([1.0])}
    updates, state = update({"w": jnp.array([2.0])}, optimizer.init(weight), weight)
    # m = 0.5*2 = 1, v = 0.1*4 = 0.4; corrected 1/0.5 = 2 and 0.4/0.1 = 4; 0.1 * 2 / (sqrt(4) + 0.5)
    np.testing.assert_allclose(updates["w"], [-0.08], rtol=1e-6)
    updates, state = update({"w": jnp.array([-1.0])}, state, weight)
    # m = 0.5*1 - 0.5 = 0, so nothing moves
    np.testing.assert_allclose(updates["w"], [0.0], atol=1e-7)
    updates, state = update({"w": jnp.array([3.0])}, state, weight)
    # m = 1.5, /(1 - 0.125); v = 0.9*(0.9*0.4 + 0.1) + 0.9 = 1.314, /(1 - 0.729)
    expected = -0.1 * (1.5 / 0.875) / (np.sqrt(1.314 / 0.271) + 0.5)
    np.testing.assert_allclose(updates["w"], [expected], rtol=1e-6)


@pytest.mark.parametrize("decay, clip, eps", [(0.0, 0.0, 1e-8), (0.03, 0.0, 1e-3), (0.01, 0.7, 1e-8)])
def test_same_path_as_torch(decay, clip, eps):
    rng = np.random.default_rng(5)
    start = {"kernel": rng.standard_normal((3, 4)), "bias": rng.standard_normal(4)}
    start = {name: value.astype(np.float32) for name, value in start.items()}
    target = rng.standard_normal((3, 4)).astype(np.float32)
    optimizer, schedule = make_optimizer(
        settings(b1=0.9, b2=0.99, weight_decay=decay, clip_norm=clip, eps=eps, warmup_steps=3,
                 schedule="cosine", learning_rate=0.05), steps=12)

    @jax.jit
    def ours_step(weights, state):
        gradients = {"kernel": 2 * (weights["kernel"] - target) + weights["bias"],
                     "bias": jnp.sin(3 * weights["bias"])}
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    ours, state = start, optimizer.init(start)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    reference = torch.optim.AdamW(theirs.values(), lr=1.0, betas=(0.9, 0.99), eps=eps, weight_decay=decay)
    for step in range(10):
        ours, state = ours_step(ours, state)

        theirs["kernel"].grad = (2 * (theirs["kernel"] - torch.tensor(target)) + theirs["bias"]).detach()
        theirs["bias"].grad = torch.sin(3 * theirs["bias"]).detach()
        if clip:
            norm = torch.sqrt(sum((p.grad ** 2).sum() for p in theirs.values()))
            for parameter in theirs.values():
                parameter.grad *= min(1.0, clip / float(norm))
        reference.param_groups[0]["lr"] = float(schedule(step))
        reference.step()
    for name in start:
        np.testing.assert_allclose(ours[name], theirs[name].detach().numpy(), rtol=2e-5, atol=1e-6)
        assert np.abs(ours[name] - start[name]).max() > 0.1


def test_schedules_in_closed_form():
    constant = make_schedule("constant", 0.4, 4, 10)
    rates = [constant(n) for n in range(7)]
    np.testing.assert_allclose(rates, [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4], rtol=1e-6)
    cosine = make_schedule("cosine", 2.0, 2, 10)
    np.testing.assert_allclose([cosine(n) for n in (0, 1, 2, 4, 6, 8)],
                               [1.0, 2.0, 2.0, 1 + np.sqrt(0.5), 1.0, 1 - np.sqrt(0.5)], rtol=1e-6)
    np.testing.assert_allclose([cosine(10), cosine(15)], 0, atol=1e-7)
    np.testing.assert_allclose(make_schedule("cosine", 1.0, 0, 4)(0), 1.0)


def test_average_of_weights_is_float32_and_exact():
    average = {"w": jnp.array([1.0, -2.0], jnp.float32)}
    for value in (3.0, 5.0):
        average = ema_update(average, {"w": jnp.array([value, value], jnp.bfloat16)}, 0.9)
    assert average["w"].dtype == jnp.float32
    moved = 0.09 * 3 + 0.1 * 5
    np.testing.assert_allclose(average["w"], [0.81 * 1 + moved, 0.81 * -2 + moved], rtol=1e-6)


@pytest.mark.parametrize("changes, message", [
    ({"schedule": "linear"}, "'linear'; known schedules: constant, cosine"),
    ({"schedule": "cosine", "warmup_steps": 100}, "must end its warm-up"),
    ({"b2": 1.0}, "b2 is 1.0"),
    ({"learning_rate": -1e-4}, "learning_rate"),
])
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(settings(**changes), steps=100)
