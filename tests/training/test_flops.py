"""FLOPs counted in a jaxpr, against counts by hand and published ones."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from eqvae_jax.autoencoders.presets import PRESETS
from eqvae_jax.generators import dit, networks
from eqvae_jax.training.flops import FlopCount, count

A, B = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.float32)
PRODUCT = 2 * 4 * 8 * 16


def flops(function, *args):
    return count(jax.make_jaxpr(function)(*args))


def test_products_count_twice_their_multiply_accumulates_and_as_often_as_they_run():
    assert flops(lambda a, b: jnp.sin(a @ b) + 1, A, B) == PRODUCT
    assert flops(lambda a, b: jnp.einsum("ik,kj->ij", a, b), A, B) == PRODUCT
    assert flops(lambda a, b: lax.scan(lambda c, _: (c, jax.jit(jnp.matmul)(c, b)), a, length=5), A, B) == 5 * PRODUCT
    assert flops(lambda a, b: lax.cond(a.sum() > 0, lambda: a @ b, lambda: 2 * (a @ b) @ b.T @ b), A, B) == 3 * PRODUCT
    assert flops(lambda a, b: (a @ b, (a @ b).sum())[1] * 0 + a.sum(), A, B) == PRODUCT
    assert flops(lambda a, b: a.sum() + 0 * len(a @ b), A, B) == 0                      # nobody reads the product


def test_a_gradient_costs_two_products_and_remat_one_more():
    loss = lambda a, b: jnp.sum(jnp.tanh(a @ b))
    assert flops(jax.value_and_grad(loss, argnums=(0, 1)), A, B) == 3 * PRODUCT
    assert flops(jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1)), A, B) == 4 * PRODUCT


@pytest.mark.parametrize("stride, dilation, groups", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_convolutions(stride, dilation, groups):
    shapes = (2, 8, 8, 4), (3, 3, 4 // groups, 6)
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    convolve = lambda x, k: lax.conv_general_dilated(
        x, k, (stride, stride), ((1, 1), (1, 1)), lhs_dilation=(dilation, dilation), feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"))
    side = 8 // stride if dilation == 1 else 15
    assert flops(convolve, x, kernel) == 2 * (2 * side**2 * 6) * (9 * 4 // groups) // dilation**2


def test_a_counting_run_adds_up_programs_and_returns_shapes():
    run = FlopCount()
    c = run(jax.jit(jnp.matmul), A, B)
    assert c.shape == (4, 16) and run(jax.jit(lambda c: c @ c.T), c).shape == (4, 4)
    assert run.total == PRODUCT + 2 * 4 * 16 * 4


def test_dit_xl_2_takes_712_gflop_an_image_of_training():
    model = dit.preset("XL/2", scan=True)
    assert networks.training_flops(model) == pytest.approx(712e9, rel=0.02)
    # A third of it is a forward pass, counted without the formula: the paper says 118.6 GMAC.
    variables, inputs = jax.eval_shape(model.init, jax.random.key(0), *networks.example_inputs(model)), (
        networks.example_inputs(model))
    forward = flops(lambda variables, *inputs: model.apply(variables, *inputs).prediction, variables, *inputs)
    assert forward == pytest.approx(2 * 118.6e9, rel=0.01)
    assert 3 * forward == pytest.approx(networks.training_flops(model), rel=0.01)


# XLA counts 269 and 615 GFLOP in the reference's graph. Ours folds each doubling into the convolution after it, which
# then takes 16 of 36 products: three of them, on 512, 512 and 256 channels.
FOLDED = (1 - 16 / 36) * sum(2 * 9 * width**2 * side**2 for width, side in ((512, 64), (512, 128), (256, 256))) / 1e9


@pytest.mark.parametrize("method, shape, gigaflops", [
    ("encode", (1, 256, 256, 3), 269), ("decode", (1, 32, 32, 4), 615 - FOLDED)])
def test_the_full_size_autoencoder_takes_what_xla_counts(method, shape, gigaflops):
    model = PRESETS["sd"].model
    x = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    run = lambda variables, x: model.apply(variables, x, method=method)
    assert flops(run, variables, jax.ShapeDtypeStruct(shape, jnp.float32)) == pytest.approx(gigaflops * 1e9, rel=0.05)
