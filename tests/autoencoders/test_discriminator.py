"""PatchGAN against a transcription of taming-transformers' NLayerDiscriminator in torch."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvae_jax.autoencoders import losses
from eqvae_jax.autoencoders.discriminator import PatchDiscriminator

WIDTH = 8
NORMS = {"conv_1": 2, "norm_1": 3, "conv_2": 5, "norm_2": 6, "conv_3": 8, "norm_3": 9, "conv_0": 0, "conv_out": 11}


@pytest.fixture(scope="module")
def pair(torch):
    """The same random discriminator in torch and here."""
    nn, w = torch.nn, WIDTH
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, w, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(w, 2 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * w), nn.LeakyReLU(0.2),
        nn.Conv2d(2 * w, 4 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * w), nn.LeakyReLU(0.2),
        nn.Conv2d(4 * w, 8 * w, 4, 1, 1, bias=False), nn.BatchNorm2d(8 * w), nn.LeakyReLU(0.2),
        nn.Conv2d(8 * w, 1, 4, 1, 1),
    )
    with torch.no_grad():
        for p in net.parameters():                  # away from the initial values, where mistakes could hide
            p.add_(0.1 * torch.randn(p.shape))
        for buffer in net.buffers():
            if buffer.ndim:
                buffer.add_(0.3 * torch.rand(buffer.shape))
    return net, PatchDiscriminator(width=WIDTH), to_flax(net.state_dict())


def to_flax(state):
    params, stats = {}, {}
    for name, i in NORMS.items():
        get = lambda leaf, i=i: state[f"{i}.{leaf}"].detach().numpy().copy()
        if name.startswith("norm"):
            params[name] = {"scale": get("weight"), "bias": get("bias")}
            stats[name] = {"mean": get("running_mean"), "var": get("running_var")}
        else:
            params[name] = {"kernel": get("weight").transpose(2, 3, 1, 0)}
            if f"{i}.bias" in state:
                params[name]["bias"] = get("bias")
    return {"params": params, "batch_stats": stats}


def gap(ours, theirs):
    """Largest difference, relative to the largest value of a leaf: gradients of all sizes are held to one standard."""
    ours, theirs = flax.traverse_util.flatten_dict(ours), flax.traverse_util.flatten_dict(theirs)
    assert ours.keys() == theirs.keys()
    return max(np.abs(ours[k] - theirs[k]).max() / max(np.abs(theirs[k]).max(), 1e-3) for k in ours)


@pytest.mark.parametrize("size", [(64, 64), (72, 104)])
def test_logits_gradients_and_running_statistics_match_torch(torch, rng, pair, size):
    net, model, variables = pair
    before = {k: v.clone() for k, v in net.state_dict().items()}
    real, fake = rng.uniform(-1, 1, (2, 2, *size, 3)).astype(np.float32)

    net.train().zero_grad()
    t_real = torch.tensor(real).permute(0, 3, 1, 2)
    t_fake = torch.tensor(fake).permute(0, 3, 1, 2).requires_grad_()
    t_logits = net(t_real), net(t_fake)
    t_g = -t_logits[1].mean()
    (t_g_grad,) = torch.autograd.grad(t_g, t_fake, retain_graph=True)
    t_d = 0.5 * (torch.relu(1 - t_logits[0]).mean() + torch.relu(1 + t_logits[1]).mean())
    t_d.backward()
    t_grads = to_flax({**net.state_dict(), **{k: p.grad for k, p in net.named_parameters()}})["params"]
    after = to_flax(net.state_dict())["batch_stats"]
    net.load_state_dict(before)

    @jax.jit
    def step(params, stats, real, fake):
        def logits_of(params, stats, image):
            out, new = model.apply({"params": params, "batch_stats": stats}, image, True, mutable=["batch_stats"])
            return out, new["batch_stats"]

        def d_loss(params):
            logits_real, stats_real = logits_of(params, stats, real)
            logits_fake, stats_fake = logits_of(params, stats_real, fake)
            return losses.hinge_discriminator_loss(logits_real, logits_fake), (logits_real, logits_fake, stats_fake)

        g_grad = jax.grad(lambda y: losses.generator_loss(logits_of(params, stats, y)[0]))(fake)
        return jax.value_and_grad(d_loss, has_aux=True)(params), g_grad

    ((d, (logits_real, logits_fake, stats)), grads), g_grad = step(
        variables["params"], variables["batch_stats"], real, fake)

    for ours, theirs in zip((logits_real, logits_fake), t_logits, strict=True):
        theirs = theirs.detach().permute(0, 2, 3, 1).numpy()
        assert ours.shape == theirs.shape == (2, size[0] // 8 - 2, size[1] // 8 - 2, 1)
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    assert abs(d - t_d.item()) < 1e-5
    assert gap(grads, t_grads) < 1e-4
    t_g_grad = t_g_grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(g_grad, t_g_grad, atol=1e-4 * np.abs(t_g_grad).max())
    assert gap(stats, after) < 1e-5                 # two updates, the unbiased variance


def test_in_groups_each_device_normalises_its_own_images(torch, rng, pair):
    """As of torch's processes, which share nothing in a batch normalisation; what is remembered is their mean."""
    net, model, variables = pair
    image = rng.normal(size=(6, 40, 40, 3)).astype(np.float32)
    image[3:] += 1                                                # the parts differ
    logits, moved = model.clone(groups=2).apply(variables, image, train=True, mutable=["batch_stats"])
    parts = [model.apply(variables, part, train=True, mutable=["batch_stats"]) for part in (image[:3], image[3:])]
    np.testing.assert_allclose(logits, np.concatenate([part for part, _ in parts]), atol=2e-5)
    assert np.abs(logits - model.apply(variables, image, train=True, mutable=["batch_stats"])[0]).max() > 0.1
    jax.tree.map(lambda ours, a, b: np.testing.assert_allclose(ours, (a + b) / 2, rtol=1e-5, atol=1e-6),
                 moved, parts[0][1], parts[1][1])


def test_evaluation_uses_the_running_statistics(torch, rng, pair):
    net, model, variables = pair
    image = rng.uniform(-1, 1, (1, 64, 72, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = net.eval()(torch.tensor(image).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    ours = jax.jit(model.apply, static_argnums=2)(variables, image, False)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_full_size_and_initialisation():
    shapes = jax.eval_shape(PatchDiscriminator().init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == 2_765_633

    params = jax.jit(PatchDiscriminator(width=32).init)(jax.random.key(1), jnp.zeros((1, 64, 64, 3)))["params"]
    assert abs(params["conv_2"]["kernel"].std() - 0.02) < 0.001 and abs(params["conv_2"]["kernel"].mean()) < 0.001
    assert abs(params["norm_3"]["scale"].mean() - 1) < 0.005 and 0.015 < params["norm_3"]["scale"].std() < 0.025
    bound = 1 / np.sqrt(4 * 4 * 3)
    assert 0.8 * bound < np.abs(params["conv_0"]["bias"]).max() <= bound


def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32():
    model = PatchDiscriminator(width=8, dtype=jnp.bfloat16)
    image = jnp.zeros((1, 64, 64, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    logits, _ = jax.eval_shape(lambda v: model.apply(v, image, True, mutable=["batch_stats"]), variables)
    assert {x.dtype for x in jax.tree.leaves((variables, logits))} == {jnp.dtype("float32")}


def test_too_small_an_image_is_explained():
    with pytest.raises(ValueError, match="at least 24 pixels a side and got 16 x 64"):
        jax.eval_shape(PatchDiscriminator().init, jax.random.key(0), jnp.zeros((1, 16, 64, 3)))
