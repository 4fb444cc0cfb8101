"""Encoder and decoder as the two kinds of autoencoder use them: sizes, precision, remat, what a latent is made of."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvae_jax.autoencoders.presets import PRESETS

SMOKE = ("smoke", "sd16-smoke", "sd3-smoke", "vqgan-smoke")


def drawn(model, seed=0):
    """Random parameters of a model, drawn without compiling its init."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    return jax.tree.map(lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), shapes)


@pytest.fixture(scope="module", params=SMOKE)
def case(request):
    model = PRESETS[request.param].model
    return model, drawn(model)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(model, params, array, method="__call__"):
    return model.apply({"params": params}, array, method=method)


@pytest.mark.parametrize("size, latent", [((8, 12), (4, 6)), ((9, 7), (4, 3))])
def test_latent_sides_are_floors_and_decoding_doubles_them(case, rng, size, latent):
    model, params = case
    x = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    z = jax.eval_shape(lambda p, x: apply(model, p, x, "encode").mode(), params, x)
    y = jax.eval_shape(lambda p, z: apply(model, p, z, "decode"), params, z)
    assert z.shape == (2, *latent, model.latent_channels) and y.shape == (2, 2 * latent[0], 2 * latent[1], 3)


def test_calling_is_decoding_the_mode(case, rng):
    model, params = case
    x = rng.uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    z = apply(model, params, x, "encode").mode()
    y = apply(model, params, z, "decode")
    np.testing.assert_allclose(apply(model, params, x), y, atol=1e-5)


@pytest.mark.parametrize("name", ["sd16-smoke", "vqgan-smoke"])
def test_losses_on_latent_image_and_codes_reach_every_parameter(name, rng):
    model = PRESETS[name].model
    x = rng.uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)

    def reach(params):
        latent = model.apply({"params": params}, x, method="encode")
        image, _, quantized = model.apply({"params": params}, latent.mode(), method="decode_with_features")
        seen = [*jax.tree.leaves(latent), image] + ([] if quantized is None else [quantized.codes])
        return sum(jnp.sum(jnp.sin(3 * part)) for part in seen)

    grads = flax.traverse_util.flatten_dict(jax.grad(reach)(drawn(model)), sep="/")
    # A shift of all keys alike changes no softmax: their bias is the one parameter without an effect.
    dead = [name for name, g in grads.items() if not np.abs(g).max() > 1e-6 and not name.endswith("key/bias")]
    assert not dead


def test_remat_changes_neither_values_nor_gradients(rng):
    model = PRESETS["sd16-smoke"].model.clone(multipliers=(1,), attention_levels=(0,))
    params, x = drawn(model), rng.uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    loss = lambda model: jax.value_and_grad(lambda p: jnp.mean(model.apply({"params": p}, x) ** 2))(params)
    (value, grads), (again, regrads) = loss(model), loss(model.clone(remat=True))
    np.testing.assert_allclose(again, value, rtol=1e-5)
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale), regrads, grads)


def test_bfloat16_keeps_parameters_latents_and_images_float32(case, rng):
    model, params = case
    narrow = model.clone(dtype=jnp.bfloat16)
    x = rng.uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    z, exact = (apply(m, params, x, "encode").mode() for m in (narrow, model))
    assert {leaf.dtype for leaf in jax.tree.leaves(drawn(narrow))} == {np.dtype(np.float32)}
    assert z.dtype == apply(narrow, params, z, "decode").dtype == jnp.float32
    error = np.sqrt(np.mean((z - exact) ** 2) / np.mean(exact**2))
    assert 1e-5 < error < 0.1  # computed in bfloat16 indeed, and not far off


def test_the_last_convolution_reads_the_features_that_are_handed_out(case, rng):
    model, params = case
    z = rng.normal(size=(1, 3, 5, model.latent_channels)).astype(np.float32)
    image, features, quantized = apply(model, params, z, "decode_with_features")
    last = params["decoder"]["conv_out"]
    expected = jax.lax.conv_general_dilated(features, last["kernel"], (1, 1), "SAME",
                                            dimension_numbers=("NHWC", "HWIO", "NHWC")) + last["bias"]
    np.testing.assert_allclose(image, expected, atol=1e-5)
    assert features.shape == (1, 6, 10, model.channels) and (quantized is None) == (model.kind == "kl")


def test_without_quant_convolutions_the_encoder_gives_the_moments(rng):
    model = PRESETS["sd3-smoke"].model
    params = drawn(model)
    assert set(params) == {"encoder", "decoder"}
    x = rng.uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    moments = model.apply({"params": params}, x, method=lambda m, x: m.encoder(x))
    posterior = apply(model, params, x, "encode")
    np.testing.assert_allclose(posterior.mean, moments[..., :4], atol=1e-6)
    np.testing.assert_allclose(posterior.logvar, np.clip(moments[..., 4:], -30, 20), atol=1e-6)
