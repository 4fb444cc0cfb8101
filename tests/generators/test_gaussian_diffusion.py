import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvae_jax.generators import gaussian_diffusion as gd

FULL = gd.gaussian_diffusion()
WEIGHT = 0.4 * np.random.default_rng(9).normal(size=(4, 8))


def numpy_network(x, t):
    return np.tanh(x @ WEIGHT + t[:, None, None, None] / 700.0)


def network(x, t):
    return jnp.tanh(x @ WEIGHT.astype(np.float32) + t[:, None, None, None] / 700.0)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def test_tables_have_the_released_values():
    assert FULL.betas.dtype == FULL.posterior_log_variance.dtype == np.float64
    np.testing.assert_allclose(FULL.betas[[0, 999]], [1e-4, 0.02])
    np.testing.assert_allclose(FULL.alphas_bar[[0, 1, 499, 999]], [0.9999, 0.99978009, 0.0785872429, 4.0358298e-5],
                               rtol=1e-8)
    np.testing.assert_allclose(FULL.posterior_log_variance[:2], [-9.81672514] * 2, rtol=1e-9)
    np.testing.assert_allclose(np.log(FULL.betas[0]), -9.21034037, rtol=1e-9)
    # At step 0 the posterior is x_0 itself.
    np.testing.assert_allclose([FULL.posterior_mean_x0[0], FULL.posterior_mean_xt[0]], [1, 0], atol=1e-12)


def test_fewer_steps_are_the_released_ones():
    some = gd.respace(FULL, "250")
    strides = np.diff(some.timestep_map)
    np.testing.assert_array_equal(np.flatnonzero(strides == 5), [41, 124, 207])
    assert set(strides) == {4, 5} and len(some.timestep_map) == 250
    np.testing.assert_array_equal(some.timestep_map[[0, 41, 42, 125, 208, 249]], [0, 164, 169, 502, 835, 999])
    np.testing.assert_allclose(some.betas[249], 0.0775193, rtol=1e-6)
    np.testing.assert_allclose(some.posterior_log_variance[:2], [-9.36462816] * 2, rtol=1e-9)
    np.testing.assert_allclose(some.alphas_bar, FULL.alphas_bar[some.timestep_map], rtol=1e-12)

    grid = lambda spacing: list(gd.respace(FULL, spacing).timestep_map)
    assert grid("ddim250") == list(range(0, 1000, 4))
    assert grid("ddim50") == list(range(0, 1000, 20))
    assert grid("50")[:4] == [0, 20, 41, 61] and grid("50")[-2:] == [979, 999]
    assert grid("1") == [0] and grid("1000") == list(range(1000))
    # Twice fewer: the numbers are still those of the original process.
    assert list(gd.respace(some, "2").timestep_map) == [0, 999]


@pytest.mark.parametrize("spacing", ["0", "1001", "ddim300", "ddim", "", "-5", "10,20", "ddpm5"])
def test_impossible_spacings_are_refused(spacing):
    with pytest.raises(ValueError, match="spacing is"):
        gd.respace(FULL, spacing)
    with pytest.raises(ValueError, match="respace"):
        gd.gaussian_diffusion(20)


def loss_of(diffusion, network, x, t_index, noise):
    output = network(gd.noised(diffusion, x, t_index, noise), gd.network_time(diffusion, t_index))
    return gd.loss(diffusion, output, x, t_index, noise)


def test_loss_of_a_zero_network_is_the_known_one(rng):
    """facts: mse 1, the bound's term 0.0162 on average over all steps."""
    x, noise = normal(rng, 1000, 8, 8, 4), normal(rng, 1000, 8, 8, 4)
    zero = lambda x, t: jnp.zeros((*x.shape[:-1], 8))
    values = jax.jit(lambda t: loss_of(FULL, zero, x, t, noise))
    every = values(jnp.arange(1000))
    np.testing.assert_allclose([every["mse"].mean(), every["vb"].mean()], [1.0, 0.0162], atol=6e-3, rtol=0)
    np.testing.assert_allclose(every["vb"].mean(), 0.0162, rtol=0.02)
    np.testing.assert_allclose(every["loss"], every["mse"] + every["vb"], rtol=1e-6)
    for t, bits in {0: 1.98, 1: 0.636, 2: 0.379, 10: 0.108, 100: 0.0145, 500: 0.0079, 999: 0.0148}.items():
        np.testing.assert_allclose(values(jnp.full(1000, t))["vb"].mean(), bits, rtol=0.01)


def numpy_loss(x, t, noise):
    """Terms of one step, float64, from the definitions."""
    alphas, bar = 1 - FULL.betas[t], FULL.alphas_bar[t]
    previous = FULL.alphas_bar[t - 1] if t else 1.0
    x_t = np.sqrt(bar) * x + np.sqrt(1 - bar) * noise
    eps, logits = np.split(numpy_network(x_t, np.full(len(x), float(t))), 2, -1)
    x_0 = (x_t - np.sqrt(1 - bar) * eps) / np.sqrt(bar)
    beta = FULL.betas[t]
    mean = lambda x_0: (np.sqrt(previous) * beta * x_0 + np.sqrt(alphas) * (1 - previous) * x_t) / (1 - bar)
    known = lambda t: FULL.betas[t] * (1 - FULL.alphas_bar[t - 1]) / (1 - FULL.alphas_bar[t])
    log_small = np.log(known(max(t, 1)))
    log_variance = (logits + 1) / 2 * np.log(beta) + (1 - logits) / 2 * log_small
    if t:
        term = 0.5 * (log_variance - log_small - 1 + np.exp(log_small - log_variance)
                      + (mean(x) - mean(x_0)) ** 2 / np.exp(log_variance))
    else:
        cdf = lambda z: 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        std = np.exp(log_variance / 2)
        high, low = cdf((x - mean(x_0) + 1 / 255) / std), cdf((x - mean(x_0) - 1 / 255) / std)
        probability = np.where(x < -0.999, high, np.where(x > 0.999, 1 - low, high - low))
        term = -np.log(np.clip(probability, 1e-12, None))
    return ((eps - noise) ** 2).mean((1, 2, 3)), term.mean((1, 2, 3)) / np.log(2)


def test_loss_of_any_network_is_the_definitions(rng):
    x, noise = normal(rng, 3, 4, 4, 4), normal(rng, 3, 4, 4, 4)
    values = jax.jit(lambda t: loss_of(FULL, network, x, t, noise))
    for t in (0, 1, 2, 300, 999):
        mse, vb = numpy_loss(np.float64(x), t, np.float64(noise))
        ours = values(jnp.full(3, t))
        np.testing.assert_allclose(ours["mse"], mse, rtol=1e-5)
        np.testing.assert_allclose(ours["vb"], vb, rtol=1e-4)


def test_only_the_variance_learns_from_the_bound_and_only_the_noise_from_the_error(rng):
    x, noise, t = normal(rng, 3, 4, 4, 4), normal(rng, 3, 4, 4, 4), jnp.array([0, 5, 700])
    loss = lambda w: loss_of(FULL, lambda x, t: jnp.tanh(x @ w), x, t, noise)
    gradients = jax.jit(jax.jacrev(lambda w: jax.tree.map(jnp.sum, loss(w))))(np.float32(WEIGHT))
    vb, mse = gradients["vb"], gradients["mse"]
    assert np.all(vb[:, :4] == 0) and np.abs(vb[:, 4:]).max() > 1e-3
    assert np.all(mse[:, 4:] == 0) and np.abs(mse[:, :4]).max() > 1e-3


def test_loss_on_fewer_steps_tells_the_network_the_original_ones(rng):
    some, x, noise = gd.respace(FULL, "5"), normal(rng, 5, 2, 2, 1), normal(rng, 5, 2, 2, 1)
    told = lambda x, t: jnp.broadcast_to(t[:, None, None, None], (5, 2, 2, 2))
    mse = jax.jit(lambda t: loss_of(some, told, x, t, noise))(jnp.arange(5))["mse"]
    expected = ((np.array([0, 250, 500, 749, 999.0])[:, None, None, None] - noise) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(mse, expected, rtol=1e-5)


def numpy_steps(spacing, x, table, eta):
    """Ancestral steps (eta None) or DDIM's, float64, one step at a time from the last to step 0."""
    some = gd.respace(FULL, spacing)
    previous = np.append(1.0, some.alphas_bar[:-1])
    for i, t in enumerate(reversed(range(some.steps))):
        bar, before, beta = some.alphas_bar[t], previous[t], some.betas[t]
        eps, logits = np.split(numpy_network(x, np.full(len(x), float(some.timestep_map[t]))), 2, -1)
        x_0 = (x - np.sqrt(1 - bar) * eps) / np.sqrt(bar)
        if eta is None:
            mean = (np.sqrt(before) * beta * x_0 + np.sqrt(1 - beta) * (1 - before) * x) / (1 - bar)
            small = beta * (1 - before) / (1 - bar)
            sigma = np.exp(0.5 * ((logits + 1) / 2 * np.log(beta) + (1 - logits) / 2 * np.log(small))) if t else 0.0
        else:
            sigma = eta * np.sqrt((1 - before) / (1 - bar)) * np.sqrt(1 - bar / before)
            mean = np.sqrt(before) * x_0 + np.sqrt(1 - before - sigma**2) * eps
        x = mean + sigma * table[i] if t else mean
    return x


@pytest.mark.parametrize("eta", [None, 0.0, 0.6])
def test_sampling_takes_the_written_out_steps(rng, eta):
    x, table = normal(rng, 2, 4, 4, 4), normal(rng, 8, 2, 4, 4, 4)
    some, noise = gd.respace(FULL, "9"), lambda i: jnp.asarray(table)[i]
    if eta is None:
        ours = jax.jit(lambda x: gd.ddpm(some, network, x, noise))(x)
    else:
        ours = jax.jit(lambda x: gd.ddim(some, network, x, noise, eta))(x)
    theirs = numpy_steps("9", np.float64(x), np.float64(table), eta)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_exact_predictions_give_the_datas_distribution_in_few_steps(rng):
    """For Gaussian data each reverse step is Gaussian with known mean and variance, so nine steps lose nothing."""
    some, mean, std = gd.respace(FULL, "9"), 0.3, 0.5
    bar = np.append(some.alphas_bar, 0)
    left = std**2 * (1 - bar[:-1]) / (bar[:-1] * std**2 + 1 - bar[:-1])            # variance of x_0 given x_t
    variance = np.exp(some.posterior_log_variance) + some.posterior_mean_x0**2 * left
    share = (np.log(variance) - some.posterior_log_variance) / (np.log(some.betas) - some.posterior_log_variance)

    def exact(x, t):
        at = lambda table: jnp.asarray(table, jnp.float32)[jnp.searchsorted(some.timestep_map, t)][:, None, None, None]
        marginal = some.alphas_bar * std**2 + 1 - some.alphas_bar
        eps = at(np.sqrt(1 - some.alphas_bar) / marginal) * (x - at(np.sqrt(some.alphas_bar)) * mean)
        return jnp.concatenate([eps, jnp.broadcast_to(at(2 * share - 1), x.shape)], -1)

    noise = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(1), i), (512, 8, 8, 4))
    x = jax.jit(lambda x: gd.ddpm(some, exact, x, noise))(normal(rng, 512, 8, 8, 4))
    error = std / np.sqrt(x.size)                                                  # of the mean; / sqrt(2) of the std
    np.testing.assert_allclose([x.mean(), x.std()], [mean, std], atol=4 * error, rtol=0)


def test_noise_level_is_that_of_the_original_step_in_any_spacing():
    expected = np.sqrt((1 - FULL.alphas_bar) / FULL.alphas_bar)
    np.testing.assert_allclose(gd.noise_level(FULL)(jnp.array([0.0, 999.0])), expected[[0, 999]], rtol=1e-6)
    np.testing.assert_allclose(gd.noise_level(gd.respace(FULL, "50"))(jnp.float32(41)), expected[41], rtol=1e-6)


def test_drawn_steps_cover_all_and_belong_to_their_example():
    key = jax.random.key(0)
    steps = np.asarray(gd.draw_steps(FULL, key, jnp.arange(20000)))
    assert steps.min() == 0 and steps.max() == 999 and abs(steps.mean() - 499.5) < 10
    np.testing.assert_array_equal(gd.draw_steps(FULL, key, jnp.array([7, 3])), steps[[7, 3]])


def test_networks_of_other_shapes_are_refused(rng):
    x, noise = normal(rng, 2, 4, 4, 4), lambda i: jnp.zeros((2, 4, 4, 4))
    some = gd.respace(FULL, "3")
    only_noise = lambda x, t: network(x, t)[..., :4]
    with pytest.raises(ValueError, match=r"out_channels=8"):
        gd.ddpm(some, only_noise, x, noise)
    with pytest.raises(ValueError, match=r"out_channels=8"):
        loss_of(some, only_noise, x, jnp.array([0, 1]), x)
    np.testing.assert_allclose(gd.ddim(some, only_noise, x), gd.ddim(some, network, x), rtol=1e-6)
    with pytest.raises(ValueError, match="needs `noise`"):
        gd.ddim(some, network, x, eta=1.0)
