"""The quantiser against torch and float64: assignments, straight-through values and gradients, precision, turns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvae_jax import equivariance
from eqvae_jax.autoencoders.presets import PRESETS
from eqvae_jax.autoencoders.vq import AutoencoderVQ, nearest_codes

MODEL = PRESETS["vqgan-smoke"].model  # 16 codes of 4 values


@pytest.fixture(scope="module")
def params():
    """Random parameters, drawn without compiling the model's init."""
    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    return params | {"codebook": rng.normal(size=(16, 4)).astype(np.float32)}


@functools.partial(jax.jit, static_argnums=2)
def apply(params, array, method):
    return MODEL.apply({"params": params}, array, method=method)


def quantize(codebook, z, model=MODEL):
    return model.apply({"params": {"codebook": codebook}}, z, method="quantize")


def taming(torch, codebook, z):
    """VectorQuantizer2's arithmetic for z (B,C,h,w): indices (B,h,w), z_q (B,C,h,w), and its legacy loss."""
    rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    squared = (rows**2).sum(1, keepdim=True) + (codebook**2).sum(1) - 2 * rows @ codebook.T
    indices = squared.argmin(1)
    codes = codebook[indices].reshape(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
    loss = ((codes.detach() - z) ** 2).mean() + 0.25 * ((codes - z.detach()) ** 2).mean()
    return indices.reshape(z.shape[0], *z.shape[2:]), z + (codes - z).detach(), loss


def test_assignments_values_and_gradients_are_tamings(torch, rng):
    codebook = rng.normal(size=(16, 4)).astype(np.float32)
    z, weights = (rng.normal(size=(2, 5, 3, 4)).astype(np.float32) for _ in range(2))

    def objective(codebook, z):
        latent, codes, indices = quantize(codebook, z)
        stop = jax.lax.stop_gradient
        loss = jnp.mean((stop(codes) - z) ** 2) + 0.25 * jnp.mean((codes - stop(z)) ** 2)
        return jnp.sum(weights * latent) + loss, (latent, indices)

    (value, (latent, indices)), (dcodebook, dz) = jax.value_and_grad(objective, (0, 1), has_aux=True)(codebook, z)

    first = lambda array: torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
    tc, tz = torch.from_numpy(codebook).requires_grad_(), first(z).requires_grad_()
    tindices, tlatent, tloss = taming(torch, tc, tz)
    total = (first(weights) * tlatent).sum() + tloss
    total.backward()
    np.testing.assert_array_equal(indices, tindices.numpy())
    assert indices.dtype == jnp.int32 and len(np.unique(indices)) > 5
    np.testing.assert_allclose(value, total.item(), rtol=1e-5)
    np.testing.assert_allclose(latent, tlatent.detach().permute(0, 2, 3, 1).numpy(), atol=1e-6)
    np.testing.assert_allclose(dz, tz.grad.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    np.testing.assert_allclose(dcodebook, tc.grad.numpy(), atol=1e-6)
    assert np.abs(dcodebook).max() > 1e-3


def test_the_straight_through_latent_gives_its_gradient_to_z_alone_and_the_codes_to_the_codebook_alone(rng):
    codebook = rng.normal(size=(16, 4)).astype(np.float32)
    z, weights = (rng.normal(size=(3, 2, 2, 4)).astype(np.float32) for _ in range(2))
    pull = lambda field: jax.grad(lambda c, z: jnp.sum(weights * getattr(quantize(c, z), field)), (0, 1))(codebook, z)
    dcodebook, dz = pull("latent")
    np.testing.assert_array_equal(dz, weights)
    np.testing.assert_array_equal(dcodebook, np.zeros_like(codebook))
    dcodebook, dz = pull("codes")
    expected = np.zeros_like(codebook)
    np.add.at(expected, np.asarray(quantize(codebook, z).indices), weights)
    np.testing.assert_allclose(dcodebook, expected, atol=1e-6)
    np.testing.assert_array_equal(dz, np.zeros_like(z))


def test_of_equally_near_codes_the_first_is_taken(torch):
    codebook = np.array([[4, 4], [1, 0], [-1, 0], [1, 0], [0, 1]], np.float32)
    z = np.array([[1, 0], [0, 0], [0.5, 0.5], [-3, 0], [2.5, 2]], np.float32).reshape(1, 5, 1, 2)
    expected = [1, 1, 1, 2, 0]  # twice the same code; the centre of three; the middle of two; a plain one; two again
    assert nearest_codes(z, codebook).ravel().tolist() == expected
    indices, *_ = taming(torch, torch.from_numpy(codebook), torch.from_numpy(z).permute(0, 3, 1, 2))
    assert indices.ravel().tolist() == expected


def test_assignments_at_the_papers_size_are_those_of_float64(rng):
    codebook = rng.normal(size=(1024, 256)).astype(np.float32)
    z = rng.normal(size=(1, 16, 16, 256)).astype(np.float32)
    rows, codes = z.reshape(-1, 256).astype(np.float64), codebook.astype(np.float64)
    exact = np.argmin((codes**2).sum(1) - 2 * rows @ codes.T, 1)
    np.testing.assert_array_equal(np.ravel(nearest_codes(z, codebook)), exact)


def test_distances_are_float32_even_where_the_model_computes_in_bfloat16():
    # Features of 1 are exact in bfloat16; these codes are not, and become one and the same there.
    codebook = np.array([[1.003], [1.001], [0.5]], np.float32)
    model = MODEL.clone(dtype=jnp.bfloat16, latent_channels=1, codebook_size=3)
    z = jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    narrow = jnp.asarray(codebook, jnp.bfloat16)
    assert int(jnp.argmin(jnp.sum((z.reshape(1, 1) - narrow) ** 2, -1))) == 0  # what bfloat16 would say
    result = quantize(codebook, z, model)
    assert result.indices.item() == 1 and result.codes.dtype == jnp.float32
    np.testing.assert_array_equal(result.codes.ravel(), codebook[1])


def test_distances_ask_for_full_precision_where_the_machine_would_take_less():
    with jax.default_matmul_precision("bfloat16"):
        lowered = jax.jit(nearest_codes).lower(jnp.ones((2, 3)), jnp.ones((4, 3))).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in lowered


def test_decoding_indices_is_decoding_the_features_they_came_from(params, rng):
    z = rng.normal(size=(2, 4, 3, 4)).astype(np.float32)
    indices = quantize(params["codebook"], z).indices
    decoded, again = apply(params, z, "decode"), apply(params, indices, "decode_indices")
    assert decoded.shape == (2, 8, 6, 3) and np.ptp(decoded) > 0.1
    np.testing.assert_allclose(again, decoded, atol=1e-5)
    image, features, quantized = apply(params, z, "decode_with_features")
    np.testing.assert_array_equal(quantized.indices, indices)
    np.testing.assert_allclose(image, decoded, atol=1e-5)
    assert features.shape == (2, 8, 6, MODEL.channels)


def test_features_are_continuous_and_decoding_is_what_quantises(params, rng):
    x = rng.uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    features = apply(params, x, "encode")
    z, codes = features.mode(), params["codebook"]
    assert z.shape == (2, 4, 4, 4) and z.dtype == jnp.float32
    assert np.abs(z[..., None, :] - codes).max(-1).min() > 1e-3  # no feature is a code
    np.testing.assert_array_equal(features.sample(jax.random.key(0), jnp.arange(2)), z)
    of_features, of_codes = (apply(params, z, "decode") for z in (z, quantize(codes, z).codes))
    np.testing.assert_allclose(of_features, of_codes, atol=1e-5)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quantising_and_turning_can_be_swapped(rng, turns):
    codebook, z = rng.normal(size=(16, 4)).astype(np.float32), rng.normal(size=(2, 4, 4, 4)).astype(np.float32)
    turn = lambda array: equivariance.quarter_turns(array, turns)
    first, last = quantize(codebook, turn(z)), quantize(codebook, z)
    np.testing.assert_array_equal(first.indices, turn(last.indices[..., None])[..., 0])
    np.testing.assert_array_equal(first.codes, turn(last.codes))
    assert (first.indices != last.indices).any()


def test_scaling_features_is_not_scaling_codes(rng):
    """Why tau acts before quantisation: an average of codes is no code, and what is decoded must be one."""
    codebook, z = rng.normal(size=(16, 4)).astype(np.float32), rng.normal(size=(2, 4, 4, 4)).astype(np.float32)
    shrink = lambda array: equivariance.resize(array, (2, 2))
    before, after = quantize(codebook, shrink(z)).codes, shrink(quantize(codebook, z).codes)
    distances = lambda a: np.abs(np.asarray(a)[..., None, :] - codebook).max(-1).min(-1)
    assert (distances(before) == 0).all() and (distances(after) > 1e-3).all()


def test_codes_begin_uniform_within_one_over_their_number():
    model = AutoencoderVQ(latent_channels=4, codebook_size=512)
    codebook = model.init(jax.random.key(3), jnp.zeros((1, 2, 2, 4)), method="quantize")["params"]["codebook"]
    assert codebook.shape == (512, 4) and codebook.dtype == jnp.float32
    assert 0.99 / 512 < np.abs(codebook).max() <= 1 / 512
    np.testing.assert_allclose(np.std(codebook), 1 / 512 / np.sqrt(3), rtol=0.05)
