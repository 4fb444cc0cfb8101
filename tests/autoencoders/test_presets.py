"""The paper's five graphs by their parameter counts, and presets as the plain values that a run keeps of them."""

import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvae_jax.autoencoders.presets import PRESETS, describe, from_description, names_of


def shapes_of(model, side=64):
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


# name -> parameters of encoder, decoder, quant_conv, post_quant_conv and codebook, their sum, and how many tensors.
# Measured on the references' modules (latent-diffusion, taming-transformers, diffusers for SD3).
PUBLISHED = {
    "sd": (34_163_592, 49_490_179, 72, 20, 0, 83_653_863, 106 + 138 + 4),
    "sd16": (28_265_760, 41_343_875, 1_056, 272, 0, 69_610_963, 144 + 194 + 4),
    "sdxl": (34_163_592, 49_490_179, 72, 20, 0, 83_653_863, 248),
    "sd3": (34_274_208, 49_545_475, 0, 0, 0, 83_819_683, 244),
    "vqgan": (29_298_176, 42_449_795, 65_792, 65_792, 262_144, 72_141_699, 144 + 194 + 4 + 1),
}
PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv", "codebook")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_autoencoders_have_their_published_parameter_counts(name):
    *parts, total, tensors = PUBLISHED[name]
    params = shapes_of(PRESETS[name].model)
    assert [count(params.get(part, {})) for part in PARTS] == parts
    assert count(params) == total and set(params) <= set(PARTS)
    assert len(jax.tree.leaves(params)) == tensors


@pytest.mark.parametrize("name, latent", [("sd", (8, 8, 4)), ("sd16", (4, 4, 16)), ("sd3", (8, 8, 16)),
                                          ("vqgan", (4, 4, 256))])
def test_the_papers_autoencoders_have_their_published_latents(name, latent):
    model, params = PRESETS[name].model, shapes_of(PRESETS[name].model)
    apply = lambda p, x: model.apply({"params": p}, x, method="encode").mode()
    z = jax.eval_shape(apply, params, jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32))
    assert z.shape == (2, *latent) and model.downsampling == 64 // latent[0]


def test_only_sixteen_fold_graphs_attend_outside_the_middle_and_only_where_they_are_smallest():
    for name, levels in {"sd": [], "sdxl": [], "sd3": [], "sd16": [4], "vqgan": [4]}.items():
        params = shapes_of(PRESETS[name].model)
        paths = {"/".join(path[:2]) for path in flax.traverse_util.flatten_dict(params)}
        found = sorted(path for path in paths if "attention" in path and "mid" not in path)
        expected = [f"decoder/up_{n}_attention_{j}" for n in levels for j in range(3)]
        assert found == expected + [f"encoder/down_{n}_attention_{j}" for n in levels for j in range(2)], name


@pytest.mark.parametrize("name", PRESETS)
def test_a_description_survives_json_and_gives_the_model_back(name):
    model = PRESETS[name].model
    values = json.loads(json.dumps(describe(model)))
    assert from_description(values) == model and values["kind"] == model.kind
    assert from_description(values | {"scale": 2.0, "shift": 0.0}) == model  # what a run's config keeps beside it


def test_names_of_finds_equal_graphs_whatever_they_are_computed_in():
    assert names_of(PRESETS["sdxl"].model.clone(dtype=jnp.bfloat16, remat=True)) == ["sd", "sdxl"]
    assert names_of(PRESETS["vqgan"].model) == ["vqgan"]
    assert names_of(PRESETS["vqgan"].model.clone(codebook_size=1000)) == []


def test_descriptions_before_kinds_are_kl_and_unknown_kinds_are_refused():
    values = describe(PRESETS["sd16-smoke"].model)
    kind = values.pop("kind")
    assert kind == "kl" and from_description(values) == PRESETS["sd16-smoke"].model
    with pytest.raises(ValueError, match="'fsq'.*kl, vq"):
        from_description({"kind": "fsq"})


def test_scale_and_shift_are_the_published_ones():
    published = {"sd": (0.18215, 0), "sdxl": (0.13025, 0), "sd3": (1.5305, 0.0609)}
    assert {name: PRESETS[name][1:] for name in published} == published


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in PUBLISHED])
def test_small_presets_give_back_the_image_size_that_went_in(name):
    model = PRESETS[name].model
    x = jax.ShapeDtypeStruct((1, 4 * model.downsampling, 6 * model.downsampling, 3), jnp.float32)
    y = jax.eval_shape(lambda key, x: model.init_with_output(key, x)[0], jax.random.key(0), x)
    assert y.shape == x.shape and count(shapes_of(model)) < 6_000_000
