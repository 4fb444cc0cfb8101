"""What checkpoints hold of their loss: the discriminator against torch's, LPIPS, the log-variance."""

import jax
import numpy as np
import pytest
import safetensors.torch
from parity import assert_same, to_nchw, to_nhwc

from eqvae_jax.autoencoders.discriminator import PatchDiscriminator
from eqvae_jax.features.lpips import STAGES, parameter_shapes
from eqvae_jax.weights import WeightsError, load_loss

INDICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))      # VGG16's convolutions, by slice of LPIPS


def trained(torch, ldm_reference, width, layers):
    """A discriminator whose running statistics are not those of a fresh one."""
    torch.manual_seed(1)
    model = ldm_reference.perturbed(ldm_reference.discriminator(width, layers))
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model.main(torch.randn(2, 3, 48, 48))
    return model.eval()


def loss_state(module, prefix="loss.discriminator."):
    return {f"{prefix}{name}": value for name, value in module.state_dict().items()}


def lpips_state(torch):
    state, features = {f"scaling_layer.{name}": torch.randn(1, 3, 1, 1) for name in ("shift", "scale")}, 3
    for i, widths in enumerate(STAGES):
        for index, width in zip(INDICES[i], widths, strict=True):
            state[f"net.slice{i + 1}.{index}.weight"] = torch.randn(width, features, 3, 3)
            state[f"net.slice{i + 1}.{index}.bias"] = torch.randn(width)
            features = width
        state[f"lin{i}.model.1.weight"] = torch.rand(1, features, 1, 1)
    return {f"loss.perceptual_loss.{name}": value for name, value in state.items()}


@pytest.mark.parametrize("width, layers, prefix", [(16, 3, ""), (8, 2, "first_stage_model.")])
def test_the_discriminator_scores_as_torchs(torch, ldm_reference, rng, tmp_path, width, layers, prefix):
    theirs = trained(torch, ldm_reference, width, layers)
    autoencoder = {f"{prefix}decoder.conv_in.weight": torch.randn(8, 4, 3, 3)}
    state = {**autoencoder, f"{prefix}loss.logvar": torch.tensor(0.25),
             **loss_state(theirs, f"{prefix}loss.discriminator.")}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    critic, lpips, logvar = load_loss(f"ldm:{tmp_path / 'x.ckpt'}")
    assert (critic.width, critic.layers, lpips, logvar) == (width, layers, None, 0.25)
    assert sorted(critic.params)[:2] == ["conv_0", "conv_1"] and len(critic.batch_stats) == layers

    x = rng.uniform(-1, 1, (2, 48, 56, 3)).astype(np.float32)
    model = PatchDiscriminator(critic.width, critic.layers)
    variables = {"params": critic.params, "batch_stats": critic.batch_stats}
    for train in (False, True):
        with torch.no_grad():
            expected = to_nhwc(theirs.train(train).main(to_nchw(torch, x)))
        ours, _ = model.apply(variables, x, train=train, mutable=["batch_stats"])
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())


def test_lpips_comes_from_the_checkpoint(torch, tmp_path):
    state = {"decoder.conv_in.weight": torch.randn(8, 4, 3, 3), **lpips_state(torch)}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    critic, lpips, logvar = load_loss(f"taming:{tmp_path / 'x.safetensors'}")
    assert critic is None and logvar is None
    assert jax.tree.map(np.shape, lpips) == jax.tree.map(np.shape, parameter_shapes())
    np.testing.assert_array_equal(lpips["lin3"], state["loss.perceptual_loss.lin3.model.1.weight"].reshape(-1))
    np.testing.assert_array_equal(lpips["vgg"]["conv3_2"]["kernel"],
                                  state["loss.perceptual_loss.net.slice3.12.weight"].permute(2, 3, 1, 0))

    del state["loss.perceptual_loss.net.slice3.12.weight"]
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"x.safetensors, LPIPS: .*\n  missing \(1\): vgg/conv3_2/kernel"):
        load_loss(f"ldm:{tmp_path / 'x.safetensors'}")


def test_networks_of_another_form_are_refused(torch, ldm_reference, tmp_path):
    state = loss_state(trained(torch, ldm_reference, 8, 3))

    def message(state):
        torch.save({"decoder.x": torch.zeros(2), **state}, tmp_path / "x.ckpt")
        with pytest.raises(WeightsError) as error:
            load_loss(f"ldm:{tmp_path / 'x.ckpt'}")
        return str(error.value)

    without = {name: value for name, value in state.items() if "running" not in name}
    assert "not a PatchGAN with batch normalisation" in message(without)                   # of ActNorm, say
    assert "missing (1): 11.weight" in message({k: v for k, v in state.items() if not k.endswith("main.11.weight")})
    assert "not expected (1): 12.weight" in message({**state, "loss.discriminator.main.12.weight": torch.ones(1)})
    assert "of another shape (1): 2.weight: (3,) instead of (16, 8, 4, 4)" in message(
        {**state, "loss.discriminator.main.2.weight": torch.ones(3)})
    far = {"loss.discriminator.main.999999999.running_mean": torch.ones(2)}
    assert "not a PatchGAN" in message({**state, **far})
    assert "loss.logvar has 3 values" in message({"loss.logvar": torch.ones(3)})


def test_files_without_a_loss_give_nothing(torch, tmp_path):
    torch.save({"decoder.conv_in.weight": torch.randn(2)}, tmp_path / "x.ckpt")
    assert load_loss(f"ldm:{tmp_path / 'x.ckpt'}") == (None, None, None)
    assert load_loss("init:smoke") == load_loss(f"diffusers:{tmp_path}") == (None, None, None)
    with pytest.raises(WeightsError, match="no such file"):
        load_loss(f"ldm:{tmp_path / 'y.ckpt'}")


def test_a_run_of_ours_gives_its_discriminator(save_run, tmp_path):
    model = PatchDiscriminator(width=8, layers=2)
    variables = model.init(jax.random.key(3), np.zeros((1, 24, 24, 3), np.float32))
    statistics = jax.tree.map(lambda s: s + 0.5, variables["batch_stats"])
    save_run(tmp_path / "gan", "smoke", discriminator=variables["params"], statistics=statistics)
    critic, lpips, logvar = load_loss(f"workdir:{tmp_path / 'gan'}")
    assert (critic.width, critic.layers, lpips, logvar) == (8, 2, None, None)
    assert_same(critic.params, variables["params"])
    assert_same(critic.batch_stats, statistics)
    save_run(tmp_path / "plain", "smoke")
    assert load_loss(f"workdir:{tmp_path / 'plain'}") == (None, None, None)
    with pytest.raises(WeightsError, match="workdir:.*asked for a checkpoint"):
        load_loss(f"workdir:{tmp_path / 'none'}")
