"""Convolutions that see the mirror image beyond the border: against torch, and constants that stay constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from small_task import MODEL, adam_means, batch_of, norm, random_params, small_config, start, where_draw_is
from test_blocks import channels_first

from eqvae_jax.autoencoders.blocks import PADDINGS, Upsample, padded
from eqvae_jax.autoencoders.coders import Decoder, Encoder
from eqvae_jax.autoencoders.discriminator import PatchDiscriminator
from eqvae_jax.autoencoders.losses import adaptive_weight, generator_loss
from eqvae_jax.autoencoders.objective import to_float
from eqvae_jax.autoencoders.presets import PRESETS, configured, describe, from_description
from eqvae_jax.autoencoders.vq import AutoencoderVQ
from eqvae_jax.run import autoencoder as run_autoencoder
from eqvae_jax.weights import WeightsError, save_autoencoder
from eqvae_jax.weights.autoencoders import AutoencoderSpec, parameter_hash


def convolve(x, kernel, stride, amounts):
    framed, rest = padded(x, amounts, "reflect")
    return jax.lax.conv_general_dilated(framed, kernel, (stride, stride), rest,
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("height, width", [(5, 4), (2, 7)])
def test_convolutions_match_torchs_reflect_mode(torch, rng, height, width):
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((2, height, width, 3), (3, 3, 3, 4)))
    layer = torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False)
    layer.weight.data = torch.from_numpy(kernel).permute(3, 2, 0, 1)
    theirs = layer(channels_first(torch, x)).permute(0, 2, 3, 1).detach().numpy()
    np.testing.assert_allclose(convolve(x, kernel, 1, ((1, 1), (1, 1))), theirs, atol=1e-5)

    down = torch.nn.functional.pad(channels_first(torch, x), (0, 1, 0, 1), mode="reflect")
    theirs = torch.nn.functional.conv2d(down, layer.weight, stride=2).permute(0, 2, 3, 1).detach().numpy()
    np.testing.assert_allclose(convolve(x, kernel, 2, ((0, 1), (0, 1))), theirs, atol=1e-5)


def test_upsampling_matches_torchs_on_the_doubled_map(torch, rng):
    x, kernel = rng.normal(size=(2, 3, 2, 4)).astype(np.float32), rng.normal(size=(3, 3, 4, 4)).astype(np.float32)
    ours = Upsample(padding="reflect").apply({"params": {"kernel": kernel, "bias": np.zeros(4, np.float32)}}, x)
    doubled = torch.nn.functional.interpolate(channels_first(torch, x), scale_factor=2.0, mode="nearest")
    framed = torch.nn.functional.pad(doubled, (1, 1, 1, 1), mode="reflect")
    theirs = torch.nn.functional.conv2d(framed, torch.from_numpy(kernel).permute(3, 2, 0, 1)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-4)


def test_one_pixel_continues_as_itself():
    x = jnp.array([[[[2.0], [3.0]]]])  # 1 x 2
    framed, rest = padded(x, ((1, 1), (1, 1)), "reflect")
    np.testing.assert_array_equal(framed[0, :, :, 0], [[3, 2, 3, 2]] * 3)
    assert rest == ((0, 0), (0, 0)) and padded(x, ((1, 1), (1, 1)), "zeros")[0] is x


def test_the_config_is_refused_by_the_same_names_without_jax():
    assert run_autoencoder.PADDINGS == ("", *PADDINGS)


@pytest.mark.parametrize("padding", PADDINGS)
def test_a_constant_stays_constant_where_nothing_pads_with_zeros(padding):
    """Every convolution of both coders: one that pads with zeros shows at the border."""
    model, params = MODEL.clone(padding=padding), random_params()
    spread = lambda a: float(jnp.ptp(a, axis=(1, 2)).max())
    z = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode").mode())(params, jnp.full((1, 8, 8, 3), 0.3))
    y = jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))(params, jnp.full((1, 4, 4, 2), 0.3))
    assert (spread(z) < 1e-3) == (padding == "reflect") and (spread(y) < 1e-3) == (padding != "zeros")


def test_only_the_downsampling_tells_the_two_reflections_apart():
    one_level = dict(channels=4, multipliers=(1,), blocks_per_level=1, out_channels=2, attention_levels=(), groups=2,
                     dtype=jnp.float32, remat=False)
    x = jax.random.normal(jax.random.key(0), (1, 6, 6, 3))
    for coder in (Encoder, Decoder):
        run = lambda padding, coder=coder: coder(**one_level, padding=padding).init_with_output(jax.random.key(1), x)[0]
        jax.tree.map(np.testing.assert_array_equal, run("reflect"), run("reflect_but_downsampling"))


def test_the_adaptive_weight_pads_as_the_last_convolution_does():
    seed, _ = where_draw_is("none")
    config = small_config(loss__disc_weight=0.7, loss__kl_weight=0.0, optimizer__b1=0.0)
    config.seed, model, params, batch = seed, MODEL.clone(padding="reflect"), random_params(), batch_of(4)
    task, state, place = start(config, params, model=model)
    critic = jax.device_get((state.params["discriminator"], state.buffers["discriminator"]))
    state, metrics = task.train_step(state, place(batch), 0)
    x, key = to_float(jnp.asarray(batch["image"])), jax.random.fold_in(jax.random.key(seed), 0)

    def both(kernel):
        decoder = params["decoder"] | {"conv_out": params["decoder"]["conv_out"] | {"kernel": kernel}}
        apply = lambda *a, **k: model.apply({"params": params | {"decoder": decoder}}, *a, **k)
        y = apply(apply(x, method="encode").sample(key, batch["index"]), method="decode")
        judged = PatchDiscriminator(4, 1).apply({"params": critic[0], "batch_stats": critic[1]}, y, train=True,
                                                mutable=["batch_stats"])[0]
        return jnp.abs(y - x).sum() / 4, generator_loss(judged)

    nll, g = jax.jit(jax.jacrev(both))(params["decoder"]["conv_out"]["kernel"])
    np.testing.assert_allclose(metrics["adaptive_weight"], adaptive_weight(nll, g), rtol=1e-4)
    expected = nll + 0.7 * adaptive_weight(nll, g) * g
    ours = adam_means(state.opt_state["autoencoder"])["decoder"]["conv_out"]["kernel"]
    np.testing.assert_allclose(ours, expected, atol=1e-5 * norm(expected))


@pytest.mark.parametrize("model", [MODEL, AutoencoderVQ(padding="zeros")])
def test_padding_is_part_of_the_description_and_of_what_a_config_sets(model):
    mirrored = model.clone(padding="reflect")
    assert from_description(describe(mirrored)) == mirrored != model
    old = describe(model)
    assert old.pop("padding") == "zeros" and from_description(old) == model  # a run from before there was a choice
    with pytest.raises(ValueError, match="'mirror'; this version knows zeros, reflect"):
        from_description(describe(model) | {"padding": "mirror"})
    settings = ConfigDict(dict(dtype="float32", remat=False, padding=""))
    assert configured(mirrored, settings).padding == "reflect"
    settings.padding = "zeros"
    assert configured(mirrored, settings) == model.clone(dtype="float32")


def test_weights_under_another_padding_have_another_hash():
    params = {"x": np.arange(3, dtype=np.float32)}
    assert len({parameter_hash(params, padding) for padding in PADDINGS}) == 3
    assert parameter_hash(params, "zeros") == parameter_hash(params)


@pytest.mark.parametrize("target", ["diffusers:{}/out", "ldm:{}/x.safetensors", "taming:{}/x.ckpt"])
def test_formats_that_cannot_say_so_are_refused(tmp_path, target):
    model = PRESETS["vqgan-smoke"].model.clone(padding="reflect")
    with pytest.raises(WeightsError, match="pad with 'reflect'.*workdir:DIR"):
        save_autoencoder(target.format(tmp_path), model, {}, AutoencoderSpec("vq", 1.0, 0.0, "", ""))
    assert not any(tmp_path.iterdir())
