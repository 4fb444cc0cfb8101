"""Processes by their config: perfect predictors lead every sampler to the data, and an image depends on its own key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvae_jax.generators import gaussian_diffusion
from eqvae_jax.generators.draws import example_keys
from eqvae_jax.generators.process import SAMPLERS, Sampling, check_sampling, make_process

SHAPE, NULL = (3, 3, 4), 2
TARGETS = np.random.default_rng(1).normal(size=(NULL + 1, *SHAPE)).astype(np.float32)  # the data of each label
PROCESSES = {"diffusion": dict(kind="diffusion"), "interpolant": dict(kind="interpolant")}
CASES = [(kind, sampler) for kind in PROCESSES for sampler in SAMPLERS[kind]]
CODES = 7
TOKENS = np.random.default_rng(2).integers(0, CODES, (NULL + 1, 3, 3))                 # the tokens of each label


def perfect(kind):
    """What an ideal network says where all data of a label is one point: the noise, or the velocity, towards it."""
    bar = np.asarray(gaussian_diffusion.gaussian_diffusion().alphas_bar, np.float32)

    def network(x, t, labels):
        data = jnp.asarray(TARGETS)[labels]
        t = t[:, None, None, None]
        if kind == "interpolant":
            return (x - data) / jnp.maximum(t, 1e-6)
        alpha_bar = jnp.asarray(bar)[t.astype(int)]
        eps = (x - jnp.sqrt(alpha_bar) * data) / jnp.sqrt(1 - alpha_bar)
        return jnp.concatenate([eps, -jnp.ones_like(eps)], -1)                # the posterior's own variance

    return network


def sampled(kind, labels, numbers, **settings):
    process, keys = make_process(**PROCESSES[kind]), example_keys(jax.random.key(0), np.asarray(numbers))
    settings = Sampling(**dict(evaluations=9) | settings)
    run = jax.jit(lambda labels, keys: process.sample(perfect(kind), labels, NULL, keys, SHAPE, settings))
    return np.asarray(run(jnp.asarray(labels), keys))


def options(sampler):
    if sampler == "dopri5":
        return dict(sampler=sampler, evaluations=None)
    return dict(sampler=sampler, last_step="euler")  # which undoes what noise of the SDE is left


@pytest.mark.parametrize("kind, sampler", CASES)
def test_a_perfect_predictor_leads_to_the_data_of_its_label(kind, sampler):
    if sampler == "dopri5":
        pytest.importorskip("diffrax")
    found = sampled(kind, [0, 1, 1], [5, 6, 7], **options(sampler))
    # Dopri5 stops at its tolerance; DDPM's variance at the step before the last is not quite gone.
    np.testing.assert_allclose(found, TARGETS[[0, 1, 1]], atol=0.02 if sampler in ("dopri5", "ddpm") else 1e-3)


def tell(ids, t, labels):
    """What an ideal network says of tokens where all images of a label are one: that code, and no other."""
    return 50.0 * jax.nn.one_hot(jnp.asarray(TOKENS)[labels].reshape(len(ids), -1), CODES + 1)


@pytest.mark.parametrize("sampler", SAMPLERS["masking"])
def test_a_perfect_predictor_leads_to_the_tokens_of_its_label(sampler):
    process, keys = make_process("masking", codes=CODES), example_keys(jax.random.key(0), np.arange(3))
    settings = Sampling(sampler, evaluations=4, guidance=2.0)
    check_sampling(process, settings)
    found = process.sample(tell, jnp.array([0, 1, 1]), NULL, keys, (3, 3), settings)
    np.testing.assert_array_equal(found, TOKENS[[0, 1, 1]])


def test_tokens_of_an_example_are_masked_and_made_by_its_own_key():
    process, ids = make_process("masking", codes=CODES), jnp.asarray(TOKENS)

    def corrupted(rows):
        seen = process.corrupt(ids[jnp.asarray(rows)], jax.random.key(1), jnp.asarray(rows))
        assert np.all((seen.x_t == CODES) | (seen.x_t == ids[jnp.asarray(rows)]))
        return np.asarray(seen.x_t)

    np.testing.assert_array_equal(corrupted([2, 0]), corrupted([0, 1, 2])[[2, 0]])
    assert (corrupted([0, 1, 2]) == CODES).any()

    def made(numbers):
        keys = example_keys(jax.random.key(3), np.asarray(numbers))
        uncertain = lambda ids, t, labels: jnp.sin(jnp.arange(9 * 8.0)).reshape(9, 8) + 0.1 * ids[:, :, None]
        return np.asarray(process.sample(uncertain, jnp.zeros(len(numbers), int), NULL, keys, (3, 3),
                                         Sampling(evaluations=3)))

    np.testing.assert_array_equal(made([3, 1]), made([0, 1, 2, 3])[[3, 1]])
    assert (made([0])[0] != made([1])[0]).any()


@pytest.mark.parametrize("kind", PROCESSES)
def test_guidance_moves_the_channels_it_is_told_to(kind):
    expected = TARGETS[[0, 1]].copy()
    guided = TARGETS[NULL] + 2.5 * (expected - TARGETS[NULL])
    expected[..., :3] = guided[..., :3]
    sampler = {"diffusion": "ddim", "interpolant": "euler"}[kind]
    three = sampled(kind, [0, 1], [0, 1], sampler=sampler, guidance=2.5)
    every = sampled(kind, [0, 1], [0, 1], sampler=sampler, guidance=2.5, guidance_channels=0)
    np.testing.assert_allclose(three, expected, atol=2e-3)
    np.testing.assert_allclose(every, guided, atol=2e-3)


def test_guidance_outside_its_interval_is_none():
    everywhere = sampled("interpolant", [0], [0], sampler="euler", guidance=2.5, guidance_times=(0.0, 1.0))
    nowhere = sampled("interpolant", [0], [0], sampler="euler", guidance=2.5, guidance_times=(1.5, 2.0))
    quiet = sampled("interpolant", [0], [0], sampler="euler", guidance=2.5, guidance_noise=(1e6, 2e6))
    np.testing.assert_allclose(nowhere, TARGETS[[0]], atol=1e-3)
    np.testing.assert_allclose(quiet, TARGETS[[0]], atol=1e-3)
    assert np.abs(everywhere - TARGETS[[0]]).max() > 0.5


def curious(x, t, labels):
    """A network that leads nowhere, so that the noise stays visible in the sample."""
    return 0.3 * x + labels[:, None, None, None]


@pytest.mark.parametrize("sampler", ["sde", "sde-heun", "heun"])
def test_a_sample_depends_on_its_own_key_alone(sampler):
    process = make_process()

    def run(numbers):
        keys, labels = example_keys(jax.random.key(3), np.asarray(numbers)), jnp.asarray(numbers) % 2
        return np.asarray(process.sample(curious, labels, NULL, keys, SHAPE, Sampling(sampler, evaluations=7)))

    whole, part = run([0, 1, 2, 3, 4]), run([3, 1])
    np.testing.assert_allclose(part, whole[[3, 1]], rtol=1e-5)
    assert np.abs(whole[0] - whole[2]).max() > 0.1                             # the same label, other noise


@pytest.mark.parametrize("kind", PROCESSES)
def test_the_loss_of_an_example_depends_on_its_index_alone(kind):
    process, x = make_process(**PROCESSES[kind]), jnp.asarray(TARGETS)

    def losses(rows):
        seen = process.corrupt(x[jnp.asarray(rows)], jax.random.key(1), jnp.asarray(rows))
        said = jnp.concatenate([seen.x_t] * (2 if kind == "diffusion" else 1), -1)
        return np.asarray(process.loss(said, seen)["loss"])

    np.testing.assert_allclose(losses([2, 0]), losses([0, 1, 2])[[2, 0]], rtol=1e-5)
    assert len(set(losses([0, 1, 2]).tolist())) == 3


def test_noise_and_time_are_not_the_same_draw():
    """A network that knows only the noise would otherwise know the time; over many examples they do not correlate."""
    process, count = make_process(), 4000
    x, index = jnp.zeros((count, 1, 1, 1)), jnp.arange(count)
    x_t, t, _ = process.corrupt(x, jax.random.key(0), index)
    noise = x_t[:, 0, 0, 0] / t
    assert abs(np.corrcoef(t, noise)[0, 1]) < 0.06 and abs(float(noise.std()) - 1) < 0.05


@pytest.mark.parametrize("section, message", [
    (dict(kind="flow"), "process.kind is 'flow'"),
    (dict(kind="diffusion", path="linear"), "path is for an interpolant"),
    (dict(kind="masking", codes=4, sample_eps=0.1), "sample_eps is for an interpolant"),
    (dict(kind="masking", codes=4, times="lognormal"), "times is for an interpolant"),
    (dict(times="gamma"), "process.times"), (dict(path="cosine"), "must be one of"),
])
def test_a_process_that_cannot_be_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        make_process(**section)


@pytest.mark.parametrize("kind, settings, message", [
    ("diffusion", dict(sampler="heun"), "has ddpm, ddim"), ("interpolant", dict(sampler="ddpm"), "has sde"),
    ("interpolant", dict(guidance_channels=-1), "at least 0"),
    ("interpolant", dict(guidance_times=(0, 1), guidance_noise=(0, 1)), "give one of them"),
    ("interpolant", dict(guidance_times=(0.5,)), "two numbers"),
    ("diffusion", dict(guidance_times=(0, 1)), "use guidance_noise"),
    ("masking", dict(guidance_times=(0, 1)), "guidance grows"), ("masking", dict(guidance=0.5), "at least 1"),
    ("masking", dict(evaluations=1, guidance=3.0), "one step has none"),
])
def test_settings_of_another_process_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(make_process(**PROCESSES.get(kind, dict(kind=kind, codes=CODES))), Sampling(**settings))
