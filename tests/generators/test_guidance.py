import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sit_transcription import repa_ode, repa_sde

from eqvae_jax.generators import gaussian_diffusion as gd
from eqvae_jax.generators.guidance import guided, noise_levels
from eqvae_jax.generators.interpolant import Interpolant
from eqvae_jax.generators.samplers import ode, sde

NULL = 10
LABELS = jnp.array([3, 7, 3])
TABLE = np.random.default_rng(8).normal(size=(NULL + 1, 4)).astype(np.float32)


@jax.jit
def network_of_labels(x, t, labels):
    """Twice as many channels as it takes; each depends on its example's x, t and label."""
    shown = jnp.asarray(TABLE)[labels][:, None, None, :] * (1 + t[:, None, None, None])
    return jnp.concatenate([jnp.tanh(x + shown), x * shown], -1)


def latents(rng):
    return rng.normal(size=(3, 2, 2, 4)).astype(np.float32)


def batch_sizes(make, t):
    """How many examples a guided network asks for at t, without compiling for each."""
    sizes = []

    def spy(x, t, labels):
        jax.debug.callback(lambda labels: sizes.append(len(labels)), labels)
        return x

    jax.block_until_ready(jax.jit(make(spy))(jnp.zeros((3, 2, 2, 4)), jnp.full(3, t)))
    jax.effects_barrier()
    return sizes


@pytest.mark.parametrize("channels", [1, 3, 4, None])
def test_only_the_asked_channels_are_guided_and_the_rest_is_conditional(rng, channels):
    x, t = latents(rng), jnp.array([0.1, 0.5, 0.9])
    cond, uncond = network_of_labels(x, t, LABELS), network_of_labels(x, t, jnp.full(3, NULL))
    ours = guided(network_of_labels, LABELS, NULL, 2.5, channels=channels)(x, t)
    count = channels or 4
    np.testing.assert_allclose(ours[..., :count], (uncond + 2.5 * (cond - uncond))[..., :count], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[..., count:], cond[..., count:], rtol=1e-6)
    assert np.abs((cond - uncond)[..., count:]).max() > 0.1


def test_scale_one_is_the_conditional_network_without_doubling(rng):
    x, t = latents(rng), jnp.full(3, 0.5)
    ours = guided(network_of_labels, LABELS, NULL, 1.0)(x, t)
    np.testing.assert_array_equal(ours, network_of_labels(x, t, LABELS))
    assert batch_sizes(lambda spy: guided(spy, LABELS, NULL, 1), 0.5) == [3]
    assert batch_sizes(lambda spy: guided(spy, LABELS, NULL, 1.5), 0.5) == [6]
    traced = jax.jit(lambda scale: guided(network_of_labels, LABELS, NULL, scale)(x, t))
    np.testing.assert_allclose(traced(1.0), ours, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(guided(network_of_labels, LABELS, NULL, 0.0)(x, t)[..., :4],
                               network_of_labels(x, t, jnp.full(3, NULL))[..., :4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t, guides", [(0.19, False), (0.2, True), (0.5, True), (0.7, True), (0.71, False)])
def test_an_interval_of_times_holds_both_its_ends_and_outside_one_batch_runs(rng, t, guides):
    asked = lambda network: guided(network, LABELS, NULL, 2.0, interval=(0.2, 0.7))
    assert batch_sizes(asked, t) == [6 if guides else 3]
    x, times = latents(rng), jnp.full(3, t)
    expected = guided(network_of_labels, LABELS, NULL, 2.0 if guides else 1.0)(x, times)
    np.testing.assert_allclose(asked(network_of_labels)(x, times), expected, rtol=1e-5, atol=1e-6)


def test_an_interval_of_noise_levels_is_the_papers():
    """EDM's 32 steps: (0.19, 1.61] is indices 17 .. 22 and (0.8, 5] is 13 .. 19, as the released code has them."""
    ramp = np.arange(32) / 31
    sigma = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigma[[17, 22, 23, 13, 19]], [1.6086, 0.2830, 0.1886, 4.999, 0.8446], rtol=5e-4)
    inside = lambda low, high: list(np.flatnonzero(noise_levels(low, high, lambda t: t)(sigma)))
    assert inside(0.19, 1.61) == list(range(17, 23))
    assert inside(0.8, 5.0) == list(range(13, 20))
    assert inside(sigma[22], sigma[17]) == list(range(17, 22))  # the upper end is in, the lower is not
    with pytest.raises(ValueError, match=r"\(low, high\]"):
        noise_levels(2.0, 1.0, lambda t: t)


def test_noise_levels_are_those_of_the_process():
    linear = noise_levels(0.19, 1.61, Interpolant().noise_level)
    assert [bool(linear(jnp.float32(t))) for t in (0.15, 0.17, 0.61, 0.63)] == [False, True, True, False]
    assert not linear(jnp.float32(1.0))
    full = gd.gaussian_diffusion()
    sigma = np.sqrt((1 - full.alphas_bar) / full.alphas_bar)
    some = gd.respace(full, "50")
    active = noise_levels(0.19, 1.61, gd.noise_level(some))
    for step in some.timestep_map:
        assert bool(active(jnp.float32(step))) == (0.19 < sigma[step] <= 1.61)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.7), (0.25, 0.7)])
def test_samplers_guide_as_repa_does(rng, interval):
    """Seven steps from 6/7 > 0.7 to 5/7 > 0.7 to 4/7: Heun's second evaluation must keep its step's decision."""
    x, table = latents(rng), rng.normal(size=(7, 3, 2, 2, 4)).astype(np.float32)
    first = lambda x, t, labels: network_of_labels(x, t, labels)[..., :4]
    plain = lambda labels: lambda x, t: np.float64(first(np.float32(x), np.float32(t), labels))
    cond, uncond = plain(LABELS), plain(jnp.full(3, NULL))
    network = guided(first, LABELS, NULL, 1.8, interval=interval)
    for method, evaluations in (("euler", 7), ("heun", 13)):
        ours = jax.jit(lambda x, m=method, n=evaluations: ode(Interpolant(), network, x, method=m, evaluations=n))(x)
        theirs = repa_ode(cond, uncond, 1.8, interval, np.float64(x), 7, method == "heun")
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    noise = lambda i: jnp.asarray(table)[i]
    ours = jax.jit(lambda x: sde(Interpolant(), network, x, noise, evaluations=8, form="linear"))(x)
    theirs = repa_sde(cond, uncond, 1.8, interval, np.float64(x), np.float64(table), 8)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_dit_is_guided_in_three_channels_with_the_conditional_variance(rng):
    """As released: the state is doubled, both halves are the first before each call, and the first is kept."""
    some, x = gd.respace(gd.gaussian_diffusion(), "4"), latents(rng)
    table = rng.normal(size=(3, 3, 2, 2, 4)).astype(np.float32)

    def released(x, t):
        both = network_of_labels(jnp.concatenate([x[:3], x[:3]]), t, jnp.concatenate([LABELS, jnp.full(3, NULL)]))
        cond, uncond = both[:3, ..., :3], both[3:, ..., :3]
        half = uncond + 4.0 * (cond - uncond)
        return jnp.concatenate([jnp.concatenate([half, half]), both[..., 3:]], -1)

    doubled = lambda a: jnp.concatenate([a, a])
    theirs = gd.ddpm(some, released, doubled(x), lambda i: doubled(jnp.asarray(table)[i]))[:3]
    network = guided(network_of_labels, LABELS, NULL, 4.0, channels=3)
    np.testing.assert_allclose(gd.ddpm(some, network, x, lambda i: jnp.asarray(table)[i]), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields, complaint", [
    (dict(channels=0), "channels is 0"), (dict(channels=5), "channels is 5"),
    (dict(interval=(0.7, 0.0)), "interval is")])
def test_impossible_guidance_is_refused(rng, fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        guided(network_of_labels, LABELS, NULL, 2.0, **fields)(latents(rng), jnp.ones(3))
