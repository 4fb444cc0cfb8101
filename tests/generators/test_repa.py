"""REPA: what its projector reads, its loss and gradient, its sizes, and that it learns what it is told to look like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_task import SPACE, batch_of, config_of

from eqvae_jax.generators.dit import SIZES, DiT
from eqvae_jax.generators.process import make_process
from eqvae_jax.generators.repa import REPA, Alignment, alignment_loss
from eqvae_jax.generators.task import generator_task
from eqvae_jax.training.sharding import make_mesh, put

SMALL = dict(input_size=4, in_channels=3, out_channels=3, patch_size=2, width=16, depth=3, heads=2, classes=5,
             alignment_depth=2, projector_size=24, feature_size=7)


@pytest.mark.parametrize("size, feature_size, parameters", [
    ("B", 768, 137_845_008), ("L", 768, 465_955_600), ("XL", 768, 683_242_512), ("XL", 1024, 683_767_056),
])
def test_parameters_are_as_many_as_published(size, feature_size, parameters):
    depth, width, heads = SIZES[size]
    model = REPA(depth=depth, width=width, heads=heads, out_channels=4, feature_size=feature_size, alignment_depth=4,
                 scan=True)
    x, one = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, one.astype(float), one)
    positions = 256 * width                                   # frozen, and counted there
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) + positions == parameters


@pytest.mark.parametrize("scan", [False, True])
def test_the_projector_reads_the_block_it_is_told_to(rng, scan):
    model = REPA(**SMALL, scan=scan)
    x, t, labels = rng.normal(size=(2, 4, 4, 3)).astype("f"), np.array([0.2, 0.7], "f"), np.array([0, 5])
    params = model.init(jax.random.key(0), x, t, labels)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32), params)
    output = model.apply({"params": params}, x, t, labels)
    h = np.asarray(output.hidden[1])                          # after the second block
    for layer in ("projector_in", "projector_hidden", "projector_out"):
        h = h @ np.asarray(params[layer]["kernel"]) + np.asarray(params[layer]["bias"])
        h = h / (1 + np.exp(-h)) if layer != "projector_out" else h
    np.testing.assert_allclose(output.projected, h, rtol=1e-4, atol=1e-5)
    plain = {name: leaf for name, leaf in params.items() if not name.startswith("projector")}
    fields = {name: value for name, value in SMALL.items() if name in DiT.__dataclass_fields__}
    alone = DiT(**fields, scan=scan).apply({"params": plain}, x, t, labels)
    np.testing.assert_array_equal(output.prediction, alone.prediction)


def test_a_depth_that_the_model_does_not_have_is_refused():
    for depth in (0, 4):
        with pytest.raises(ValueError, match=f"alignment_depth is {depth}; this model has blocks 1 to 3"):
            REPA(**SMALL | {"alignment_depth": depth}).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1),
                                                            jnp.zeros(1, jnp.int32))


def test_loss_and_gradient_are_repas(torch, rng):
    """Mean over tokens of minus the cosine, which torch writes with F.normalize."""
    projected, features = (rng.normal(size=(3, 4, 7)).astype("f") for _ in range(2))
    projected[0, 1] = 0                                       # a token that says nothing
    theirs = torch.tensor(projected, requires_grad=True)
    unit = torch.nn.functional.normalize
    distance = -(unit(theirs, dim=-1) * unit(torch.tensor(features), dim=-1)).sum(-1).mean(-1)
    distance.sum().backward()
    ours, gradient = jax.jit(lambda p: (alignment_loss(p, features),
                                        jax.grad(lambda p: alignment_loss(p, features).sum())(p)))(projected)
    np.testing.assert_allclose(ours, distance.detach().numpy(), rtol=1e-5)
    alive = np.abs(projected).sum(-1) > 0
    np.testing.assert_allclose(np.asarray(gradient)[alive], theirs.grad.numpy()[alive], rtol=1e-4, atol=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(alignment_loss(features, 3 * features), -np.ones(3), rtol=1e-6)
    with pytest.raises(ValueError, match=r"\(3, 4, 7\).*\(3, 4, 6\)"):
        alignment_loss(projected, features[..., :6])


def looking(mesh, **batch):
    """A batch of one image, again and again, with a colour of its own in every quarter."""
    colors = np.random.default_rng(0).integers(0, 256, (1, 2, 2, 3), np.uint8)
    image = np.tile(colors.repeat(2, 1).repeat(2, 2), (8, 1, 1, 1))                     # (8, 4, 4, 3)
    return batch_of(mesh, **batch) | put(mesh, {"image": image})


def quarters(params, images):
    """An encoder that sees the four quarters, in the generator's order, through `params`."""
    means = images.astype(jnp.float32).reshape(-1, 2, 2, 2, 2, 3).mean((2, 4)) / 127.5 - 1
    return means.reshape(-1, 4, 3) @ params


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_aligns_tokens_with_what_the_encoder_sees(rng, accumulate):
    config = config_of(**{"training.accumulate": accumulate})
    mesh = make_mesh(config.mesh)
    weight = jnp.asarray(rng.normal(size=(3, 7)), jnp.float32)
    alignment = Alignment(weight, quarters, 0.5)
    task = generator_task(config, REPA(**SMALL), make_process(), SPACE, mesh, alignment=alignment)
    state, batch = task.init(jax.random.key(0)), looking(mesh, std=1.0)
    before = task.eval_step(state, batch)
    np.testing.assert_allclose(before["loss"], before["denoising"] + 0.5 * before["alignment"], rtol=1e-6)
    for step in range(60):
        state, metrics = task.train_step(state, batch, step)
    assert float(metrics["alignment"]) < -0.8 < float(before["alignment"].mean())
    assert float(metrics["loss"]) == pytest.approx(float(metrics["denoising"] + 0.5 * metrics["alignment"]), rel=1e-5)


def test_the_drift_of_repas_sampler_is_the_one_of_its_paper(rng):
    """(2 - t) v + x, with w = 2 t on the linear path; and SiT's own SDE, form sigma, is the same process."""
    from eqvae_jax.generators.interpolant import Interpolant
    from eqvae_jax.generators.samplers import sde

    x, noise = rng.normal(size=(1, 2, 2, 1)).astype("f"), rng.normal(size=(9, 1, 2, 2, 1)).astype("f")
    network = lambda x, t: jnp.sin(3 * x) + t[:, None, None, None]
    times, expected = np.append(np.linspace(1, 0.04, 9), 0), np.float64(x)
    for i, (t, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
        v = np.asarray(network(jnp.asarray(expected, jnp.float32), jnp.float32([t])), np.float64)
        drift, step = (2 - t) * v + expected, t - after
        expected = expected - drift * step + (i < 8) * np.sqrt(2 * t * step) * noise[i]
    for form in ("linear", "sigma"):
        found = sde(Interpolant(), network, x, lambda i: jnp.asarray(noise)[i], evaluations=9, form=form)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
