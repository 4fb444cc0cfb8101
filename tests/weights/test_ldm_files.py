"""Checkpoints of latent-diffusion and taming: parity with their modules in torch, every wrapping, what is left out."""

import argparse
import collections

import numpy as np
import pytest
import safetensors.numpy
import torch_wrappings
from parity import assert_same, gaps, our_outputs, refused, to_nchw, to_nhwc

from eqvae_jax.autoencoders.kl import AutoencoderKL
from eqvae_jax.autoencoders.vq import AutoencoderVQ
from eqvae_jax.weights import (
    AutoencoderSpec,
    WeightsError,
    load_autoencoder,
    open_autoencoder,
    save_autoencoder,
    tables,
)
from eqvae_jax.weights.initial import random_parameters

SPEC = AutoencoderSpec("kl", 1.0, 0.0, "test", "")
KL16 = dict(widths=(32, 64), blocks=1, attention=(1,), channels=16)     # attention on the last level, as all f = 16
VQ16 = dict(widths=(32, 32, 64), blocks=2, attention=(2,), channels=8, codes=24)
SD3 = dict(widths=(32, 64), blocks=1, channels=16, quant=False)


def random_model(torch, ldm_reference, fields):
    torch.manual_seed(0)
    return ldm_reference.perturbed(ldm_reference.Autoencoder(**fields))


def their_outputs(torch, model, x):
    return [to_nhwc(t) for t in model.outputs(to_nchw(torch, x))]


@pytest.mark.parametrize("kind, fields, expected", [
    ("ldm", KL16, AutoencoderKL(32, (1, 2), 1, 16, attention_levels=(1,))),
    ("ldm", SD3, AutoencoderKL(32, (1, 2), 1, 16, quant=False)),
    ("taming", VQ16, AutoencoderVQ(32, (1, 1, 2), 2, 8, attention_levels=(2,), codebook_size=24)),
], ids=["kl-f16", "sd3", "vqgan"])
def test_a_lightning_checkpoint_computes_what_the_reference_computes(
        torch, ldm_reference, rng, tmp_path, kind, fields, expected):
    theirs = random_model(torch, ldm_reference, fields)
    torch.save(torch_wrappings.lightning(torch, theirs.state_dict()), tmp_path / "x.ckpt")
    model, params, spec = load_autoencoder(f"{kind}:{tmp_path / 'x.ckpt'}")
    assert model == expected and spec.kind == model.kind
    assert (spec.scale, spec.shift) == ((1.5305, 0.0609) if fields is SD3 else (1.0, 0.0))
    for size in ((64, 64), (72, 104)):
        x = rng.uniform(-1, 1, (1, *size, 3)).astype(np.float32)
        ours = our_outputs(model, params, x)
        assert max(gaps(ours, their_outputs(torch, theirs, x))) < 2e-4
    if model.kind == "vq":
        assert len(np.unique(model.apply({"params": params}, ours[0], method=model.quantize).indices)) > 3
        assert load_autoencoder(f"ldm:{tmp_path / 'x.ckpt'}")[2].hash == spec.hash        # latent-diffusion's VQ files


def test_what_is_left_out_is_said_with_the_reason(torch, ldm_reference, tmp_path):
    state = random_model(torch, ldm_reference, KL16).state_dict()
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.randn(4, 3, 4, 4)}
    average = {"model_ema.decay": torch.tensor(0.999), "model_ema.encoderconv_inweight": torch.randn(32, 3, 3, 3)}
    torch.save(torch_wrappings.lightning(torch, {**state, **loss, **average, "colorize": torch.randn(3, 1, 1, 1)}),
               tmp_path / "lightning.ckpt")
    model, params, spec, left_out = open_autoencoder(f"ldm:{tmp_path / 'lightning.ckpt'}")
    assert {reason.split(":")[0].split(",")[0]: names for reason, names in left_out.items()} == {
        "networks of the training loss": list(loss),
        "a running average of the weights": list(average),
        "of no part that this package knows": ["colorize"],
        "the state of the training": ["epoch", "global_step", "pytorch-lightning_version", "callbacks",
                                      "optimizer_states", "lr_schedulers", "hyper_parameters"],
    }

    rest = {"model.diffusion_model.out.0.weight": torch.randn(2), "cond_stage_model.encoder.x": torch.randn(2),
            "betas": torch.randn(3), "model_ema.diffusion_modeloutweight": torch.randn(2)}
    whole = {f"first_stage_model.{name}": value for name, value in {**state, **loss}.items()}
    torch.save({"state_dict": {**rest, **whole}}, tmp_path / "sd.ckpt")
    opened = open_autoencoder(f"ldm:{tmp_path / 'sd.ckpt'}")
    assert_same(opened.params, params)
    assert [set(names) for names in opened.left_out.values()] == [
        set(rest) - {"model_ema.diffusion_modeloutweight"}, {"model_ema.diffusion_modeloutweight"},
        {f"first_stage_model.{name}" for name in loss}]
    assert "the rest of a diffusion model" in list(opened.left_out)[0]


@pytest.mark.parametrize("wrap", list(torch_wrappings.WRAPPINGS))
def test_every_wrapping_gives_the_same_parameters(torch, ldm_reference, tmp_path, wrap):
    state = random_model(torch, ldm_reference, dict(widths=(32, 64), blocks=1)).state_dict()
    path = torch_wrappings.WRAPPINGS[wrap](torch, state, tmp_path)
    model, params, spec, _ = open_autoencoder(f"ldm:{path}")
    assert model == AutoencoderKL(32, (1, 2), 1, 4) and (spec.scale, spec.shift) == (0.18215, 0.0)
    assert_same(tables.write_parameters(params, tables.parameter_shapes(model), tables.ldm_key, True),
                {name: value.numpy() for name, value in state.items()})


@pytest.mark.parametrize("file", ["ldm:x.safetensors", "ldm:x.ckpt", "taming:x.safetensors", "taming:x.ckpt"])
def test_the_reference_loads_what_we_write(torch, ldm_reference, rng, tmp_path, file):
    fields = VQ16 if file.startswith("taming") else KL16
    theirs = random_model(torch, ldm_reference, fields)
    model = AutoencoderVQ(32, (1, 1, 2), 2, 8, attention_levels=(2,), codebook_size=24) if fields is VQ16 else \
        AutoencoderKL(32, (1, 2), 1, 16, attention_levels=(1,))
    params = random_parameters(tables.parameter_shapes(model), seed=3)
    reference = file.replace(":", f":{tmp_path}/deeper/")
    save_autoencoder(reference, model, params, SPEC)
    path = reference.partition(":")[2]
    if path.endswith(".ckpt"):
        state = torch.load(path, weights_only=True, mmap=True)["state_dict"]
        assert isinstance(state, collections.OrderedDict)
    else:
        state = {name: torch.tensor(value) for name, value in safetensors.numpy.load_file(path).items()}
    theirs.load_state_dict(state, strict=True)
    x = rng.uniform(-1, 1, (1, 32, 48, 3)).astype(np.float32)
    assert max(gaps(our_outputs(model, params, x), their_outputs(torch, theirs, x))) < 2e-4
    back = load_autoencoder(reference)
    assert back[0] == model
    assert_same(back[1], params)


def test_diffusers_own_conversion_agrees_with_our_tables(torch, diffusers, tmp_path):
    """diffusers reads our LDM file with its own converter, and finds the weights of the folder we write."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model = AutoencoderKL(32, (1, 2), 2, 4)
    params = random_parameters(tables.parameter_shapes(model), seed=3)
    save_autoencoder(f"ldm:{tmp_path / 'x.safetensors'}", model, params, SPEC)
    save_autoencoder(f"diffusers:{tmp_path}", model, params, SPEC)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    state = {name: torch.tensor(v) for name, v in safetensors.numpy.load_file(tmp_path / "x.safetensors").items()}
    converted, expected = convert_ldm_vae_checkpoint(state, theirs.config), theirs.state_dict()
    assert converted.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(converted[name].reshape(value.shape), value, err_msg=name)


def test_files_that_do_not_fit_are_explained(torch, ldm_reference, tmp_path):
    path = tmp_path / "x.ckpt"

    def message(state, kind="ldm"):
        torch.save({"state_dict": state}, path)
        return refused(f"{kind}:{path}")

    state = random_model(torch, ldm_reference, KL16).state_dict()
    bad = {name: value for name, value in state.items() if name != "encoder.mid.attn_1.q.bias"}
    bad |= {"decoder.conv_out.weight": state["decoder.conv_out.weight"][:, :5], "decoder.extra.weight": torch.ones(3)}
    text = message(bad)
    assert "missing (1): encoder.mid.attn_1.q.bias" in text and "not expected (1): decoder.extra.weight" in text
    assert "of another shape (1): decoder.conv_out.weight: (3, 5, 3, 3) instead of (3, 32, 3, 3)" in text
    assert f"a KL autoencoder (it has no codebook), of latent-diffusion: ldm:{path}" in message(state, "taming")

    state = random_model(torch, ldm_reference, VQ16).state_dict()
    assert "not expected (1): quantize.used" in message({**state, "quantize.used": torch.arange(3)})
    gumbel = {name.replace("quantize.embedding", "quantize.embed"): value for name, value in state.items()}
    assert "another kind than VQ-GAN's" in message(gumbel)
    unequal = {**state, "quant_conv.weight": torch.randn(4, 8, 1, 1)}
    assert "quant_conv maps 8 channels to 4; only autoencoders whose z_channels equal" in message(unequal)
    narrow = random_model(torch, ldm_reference, KL16).state_dict()
    narrow = {name: value if "quant_conv" in name else value[:24] for name, value in narrow.items()}
    assert "24 channels do not divide into 32 groups" in message(narrow)
    assert "not an autoencoder of latent-diffusion or taming" in message({"fc.weight": torch.randn(4, 2)})
    assert "not an autoencoder" in message({"encoder.down.0.block.0.conv1.weight": torch.zeros(0, 3, 3, 3),
                                            "decoder.conv_in.weight": torch.zeros(())})
    torch.save([torch.randn(2)], path)
    assert "holds no named tensors" in refused(f"ldm:{path}")
    assert "no such file" in refused(f"ldm:{tmp_path / 'none.ckpt'}")


def test_saving_checks_before_it_writes(tmp_path):
    model, params, spec = load_autoencoder("init:smoke")
    with pytest.raises(WeightsError, match="there it is always 32; this model has 4. Write diffusers:DIR"):
        save_autoencoder(f"ldm:{tmp_path / 'out.ckpt'}", model, params, spec)
    with pytest.raises(WeightsError, match=r"hold VQ models; this one is for ldm:.*out.ckpt"):
        save_autoencoder(f"taming:{tmp_path / 'out.ckpt'}", model, params, spec)
    for reference in (f"ldm:{tmp_path / 'out.bin'}", "init:smoke", "workdir:x"):
        with pytest.raises(WeightsError, match="written as diffusers:DIR, ldm:FILE.safetensors, ldm:FILE.ckpt or"):
            save_autoencoder(reference, model, params, spec)
    short = {**params, "quant_conv": {"kernel": params["quant_conv"]["kernel"], "extra": np.ones(1)}}
    with pytest.raises(WeightsError, match=r"missing \(1\): quant_conv/bias\n.*not expected \(1\): quant_conv/extra"):
        save_autoencoder(f"diffusers:{tmp_path / 'out'}", model, short, spec)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="could not be written"):
        save_autoencoder(f"diffusers:{tmp_path / 'file'}", model, params, spec)
    large = AutoencoderKL(32, (1, 2), 1, 4)
    params = random_parameters(tables.parameter_shapes(large), seed=0)
    for suffix in ("ckpt", "safetensors"):
        with pytest.raises(WeightsError, match="could not be written"):
            save_autoencoder(f"ldm:{tmp_path / 'file' / f'x.{suffix}'}", large, params, spec)


def test_namespaces_and_classes_of_lightning_are_inert(torch, ldm_reference, tmp_path):
    state = random_model(torch, ldm_reference, dict(widths=(32, 64), blocks=1)).state_dict()
    settings = argparse.Namespace(lr=1e-4, callbacks=[collections.Counter()])
    torch.save({"hyper_parameters": settings, "state_dict": state, "hooks": {ValueError: print}}, tmp_path / "x.ckpt")
    assert open_autoencoder(f"ldm:{tmp_path / 'x.ckpt'}").left_out.popitem()[1] == ["hyper_parameters", "hooks"]
