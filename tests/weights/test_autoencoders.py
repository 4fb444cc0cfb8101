"""Autoencoders in and out: parity with diffusers through its own files, round trips, and what is refused."""

import dataclasses
import json
import re
import types

import flax
import jax
import numpy as np
import pytest
import safetensors.numpy

from eqvae_jax import weights
from eqvae_jax.autoencoders.blocks import ResnetBlock
from eqvae_jax.autoencoders.kl import PRESETS, AutoencoderKL
from eqvae_jax.weights import WeightsError, load_autoencoder, save_autoencoder, tables

SMALL = dict(
    block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=2, latent_channels=4, norm_num_groups=16, scaling_factor=0.3, shift_factor=0.05,
)
ATTENTION = dict(                           # attention on a level as in the f16 models, no quant convolutions as in SD3
    block_out_channels=(16, 16, 32), down_block_types=("DownEncoderBlock2D",) * 2 + ("AttnDownEncoderBlock2D",),
    up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=8,
    norm_num_groups=8, use_quant_conv=False, use_post_quant_conv=False,
)


def reference(torch, diffusers, config):
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**config).eval()
    with torch.no_grad():
        for p in model.parameters():                # away from the ones and zeros of fresh normalisations
            p.add_(0.05 * torch.randn(p.shape))
    return model


@pytest.fixture(scope="module")
def small(torch, diffusers, tmp_path_factory):
    """A random diffusers model and the folder it saved."""
    model, folder = reference(torch, diffusers, SMALL), tmp_path_factory.mktemp("small")
    model.save_pretrained(folder)
    return model, folder


def outputs(torch, model, x):
    """Mean and log-variance of the posterior and the decoded mean, NHWC, from diffusers."""
    nhwc = lambda t: t.permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        posterior = model.encode(torch.tensor(x).permute(0, 3, 1, 2)).latent_dist
        return nhwc(posterior.mean), nhwc(posterior.logvar), nhwc(model.decode(posterior.mean).sample)


def our_outputs(model, params, x):
    def both(params, x):
        posterior = model.apply({"params": params}, x, method=model.encode)
        return posterior.mean, posterior.logvar, model.apply({"params": params}, posterior.mode(), method=model.decode)

    return jax.jit(both)(params, x)


def gaps(ours, theirs):
    """Largest difference of each output, relative to the output's scale."""
    assert [o.shape for o in ours] == [t.shape for t in theirs]
    return [np.abs(np.asarray(o) - t).max() / np.abs(t).max() for o, t in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("size", [(64, 64), (72, 104)])
def test_encoder_and_decoder_match_diffusers(torch, small, rng, size):
    theirs, folder = small
    model, params, spec = load_autoencoder(f"diffusers:{folder}")
    assert (spec.kind, spec.scale, spec.shift) == ("kl", 0.3, 0.05) and spec.reference == f"diffusers:{folder}"
    x = rng.uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    assert max(gaps(our_outputs(model, params, x), outputs(torch, theirs, x))) < 2e-4


def test_level_attention_and_no_quant_convolutions_match_diffusers(torch, diffusers, rng, tmp_path):
    theirs = reference(torch, diffusers, ATTENTION)
    theirs.save_pretrained(tmp_path)
    model, params, spec = load_autoencoder(f"diffusers:{tmp_path}")
    assert model.attention_levels == (2,) and not model.quant and spec.shift == 0.0
    x = rng.uniform(-1, 1, (1, 40, 56, 3)).astype(np.float32)
    assert max(gaps(our_outputs(model, params, x), outputs(torch, theirs, x))) < 2e-4


def same(a, b):
    a, b = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_what_we_write_diffusers_loads_with_the_same_output(torch, diffusers, small, rng, tmp_path):
    theirs, folder = small
    loaded = load_autoencoder(f"diffusers:{folder}")
    save_autoencoder(f"diffusers:{tmp_path / 'out'}", *loaded)
    back, report = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = rng.uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32)
    assert max(gaps(outputs(torch, back, x), outputs(torch, theirs, x))) == 0          # byte-equal weights
    for name, value in SMALL.items():
        assert back.config[name] == (list(value) if isinstance(value, tuple) else value)
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["config.json", "diffusion_pytorch_model.safetensors"]

    model, params, spec = load_autoencoder(f"diffusers:{tmp_path / 'out'}")
    assert model == loaded[0] and spec.hash == loaded[2].hash
    same(params, loaded[1])


def test_old_attention_names_bin_files_and_shards(torch, small, tmp_path):
    theirs, folder = small
    expected = load_autoencoder(f"diffusers:{folder}")[1]
    config = (folder / "config.json").read_text()
    state = theirs.state_dict()

    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(config)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    rename = lambda name: re.sub(r"to_(q|k|v|out\.0)", lambda m: names[m[0]], name)
    torch.save({rename(name): value for name, value in state.items()}, old / "diffusion_pytorch_model.bin")
    same(load_autoencoder(f"diffusers:{old}")[1], expected)

    shards = tmp_path / "shards"
    theirs.save_pretrained(shards, max_shard_size="200KB")
    assert (shards / "diffusion_pytorch_model.safetensors.index.json").exists()
    same(load_autoencoder(f"diffusers:{shards}")[1], expected)
    index = {"weight_map": {"encoder.conv_in.weight": "../old/diffusion_pytorch_model.bin"}}
    (shards / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="does not name files of this folder"):
        load_autoencoder(f"diffusers:{shards}")


def test_half_precision_files_become_float32(torch, small, tmp_path):
    theirs, folder = small
    expected = load_autoencoder(f"diffusers:{folder}")[1]
    half = reference(torch, types.SimpleNamespace(AutoencoderKL=type(theirs)), SMALL).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    params = load_autoencoder(f"diffusers:{tmp_path}")[1]
    for ours, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, wanted, rtol=2**-8)
    assert not np.array_equal(jax.tree.leaves(params)[0], jax.tree.leaves(expected)[0])


# ---- latent-diffusion's files

def ldm_model():
    """Groups are always 32 there. Attention on the last level, as kl-f16."""
    return AutoencoderKL(channels=32, multipliers=(1, 2), blocks_per_level=1, latent_channels=4, attention_levels=(1,))


LDM_KEYS = {                                # written by hand from the reference's module names
    "encoder.conv_in.weight": (32, 3, 3, 3), "encoder.down.0.block.0.norm1.weight": (32,),
    "encoder.down.1.block.0.nin_shortcut.weight": (64, 32, 1, 1), "encoder.down.0.downsample.conv.bias": (32,),
    "encoder.down.1.attn.0.q.weight": (64, 64, 1, 1), "encoder.down.1.attn.0.norm.bias": (64,),
    "encoder.mid.block_1.conv2.weight": (64, 64, 3, 3), "encoder.mid.attn_1.proj_out.weight": (64, 64, 1, 1),
    "encoder.norm_out.weight": (64,), "encoder.conv_out.bias": (8,),
    "decoder.up.1.block.1.conv1.weight": (64, 64, 3, 3),
    "decoder.up.1.upsample.conv.weight": (64, 64, 3, 3), "decoder.up.0.block.0.nin_shortcut.bias": (32,),
    "decoder.up.1.attn.1.v.bias": (64,), "decoder.conv_out.weight": (3, 32, 3, 3),
    "quant_conv.weight": (8, 8, 1, 1), "post_quant_conv.bias": (4,),
}


def test_ldm_files_go_out_and_come_back_in_every_wrapping(torch, tmp_path):
    model = ldm_model()
    shapes = tables.parameter_shapes(model)
    params = weights.autoencoders.random_parameters(shapes, seed=3)
    spec = weights.AutoencoderSpec("kl", 1.0, 0.0, "test", "")
    save_autoencoder(f"ldm:{tmp_path / 'x.safetensors'}", model, params, spec)
    tensors = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert {name: tensors[name].shape for name in LDM_KEYS} == LDM_KEYS
    assert len(tensors) == len(jax.tree.leaves(params))

    state = {name: torch.tensor(value) for name, value in tensors.items()}
    rest = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.randn(4, 3, 4, 4)}
    lightning = {"state_dict": {**state, **rest}, "epoch": 3, "callbacks": {dataclasses.Field: {"best": 1}}}
    torch.save(lightning, tmp_path / "lightning.ckpt")
    torch.save(lightning, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    whole = {**{f"first_stage_model.{name}": value for name, value in state.items()}, "model.x": torch.randn(2)}
    torch.save({"state_dict": whole}, tmp_path / "sd.ckpt")
    for name in ("x.safetensors", "lightning.ckpt", "legacy.ckpt", "sd.ckpt"):
        ours, back, spec = load_autoencoder(f"ldm:{tmp_path / name}")
        assert ours == model and spec.scale == 0.18215, name
        same(back, params)

    del tensors["encoder.mid.attn_1.q.bias"]
    tensors["decoder.conv_out.weight"] = tensors["decoder.conv_out.weight"][:, :5]
    tensors["decoder.extra.weight"] = np.ones(3, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError) as error:
        load_autoencoder(f"ldm:{tmp_path / 'bad.safetensors'}")
    message = str(error.value)
    assert "missing (1): encoder.mid.attn_1.q.bias" in message and "not expected (1): decoder.extra.weight" in message
    assert "of another shape (1): decoder.conv_out.weight: (3, 5, 3, 3) instead of (3, 32, 3, 3)" in message


def test_ldm_and_diffusers_tables_agree_with_diffusers_own_conversion(torch, diffusers, small, tmp_path):
    """diffusers reads our LDM file with its own converter, and finds the weights of the folder it came from."""
    theirs, folder = small
    loaded = load_autoencoder(f"diffusers:{folder}")
    save_autoencoder(f"ldm:{tmp_path / 'x.safetensors'}", *loaded)
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    state = {name: torch.tensor(v) for name, v in safetensors.numpy.load_file(tmp_path / "x.safetensors").items()}
    converted = convert_ldm_vae_checkpoint(state, theirs.config)
    expected = theirs.state_dict()
    assert converted.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(converted[name].reshape(value.shape), value, err_msg=name)


# ---- presets, hashes

def test_the_presets_have_the_parameters_of_the_paper():
    shapes = tables.parameter_shapes(AutoencoderKL(**PRESETS["sd"]))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 83_653_863


def test_init_begins_with_idle_residual_branches_and_a_narrow_posterior(rng):
    model, params, _ = load_autoencoder("init:smoke")
    x, block = rng.normal(size=(1, 4, 4, 8)).astype(np.float32), params["encoder"]["down_0_block_0"]
    idle = ResnetBlock(8, 4).apply({"params": block}, x)
    np.testing.assert_allclose(idle, x + block["conv2"]["bias"], atol=1e-6)
    posterior = model.apply({"params": params}, rng.uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32), method="encode")
    assert np.abs(np.asarray(posterior.logvar) + 5).max() < 3


def test_random_parameters_are_distributed_as_the_models_own_initialisation():
    _, params, spec = load_autoencoder("init:smoke", seed=5)
    again, other = load_autoencoder("init:smoke", seed=5), load_autoencoder("init:smoke", seed=6)
    same(params, again[1])
    assert spec.hash == again[2].hash != other[2].hash and re.fullmatch("[0-9a-f]{16}", spec.hash)

    block, x = ResnetBlock(32, groups=4), np.zeros((1, 8, 8, 24), np.float32)
    drawn = weights.autoencoders.random_parameters(jax.eval_shape(block.init, jax.random.key(0), x)["params"], seed=5)
    ours, own = (flax.traverse_util.flatten_dict(tree) for tree in (drawn, block.init(jax.random.key(0), x)["params"]))
    assert ours.keys() == own.keys()
    for path, value in own.items():
        assert ours[path].shape == value.shape and ours[path].dtype == value.dtype
        if "norm" in path[0]:
            np.testing.assert_array_equal(ours[path], value)
        else:
            tolerance = 0.02 if value.size > 500 else 0.3
            np.testing.assert_allclose(np.abs(ours[path]).max(), np.abs(value).max(), rtol=tolerance, err_msg=path)
            np.testing.assert_allclose(ours[path].std(), value.std(), rtol=2 * tolerance, err_msg=path)
            assert abs(ours[path].mean()) < 5 * tolerance * np.abs(value).max()


def test_the_hash_sees_every_value_name_and_shape():
    digest = weights.autoencoders.parameter_hash
    a = {"x": {"kernel": np.arange(6, dtype=np.float32)}, "y": np.ones(2, np.float32)}
    assert digest(a) == digest({"y": a["y"], "x": {"kernel": a["x"]["kernel"].astype(np.float64)}})
    changed = [{**a, "y": np.array([1, 1 + 1e-6], np.float32)}, {"z": a["x"], "y": a["y"]},
               {**a, "x": {"kernel": a["x"]["kernel"].reshape(2, 3)}}]
    assert len({digest(tree) for tree in [a, *changed]}) == 4


def test_a_workdir_gives_its_average_or_else_its_parameters(monkeypatch):
    from eqvae_jax.training import checkpoint

    model, params, _ = load_autoencoder("init:smoke", seed=1)
    section = {"channels": 8, "multipliers": [1, 2], "blocks_per_level": 1, "latent_channels": 4, "groups": 4,
               "attention_levels": [], "quant": True, "scale": 0.5, "shift": 0.25}
    saved = {"params": {"autoencoder": params, "discriminator": {}}}

    def load_params(workdir, which):                # the contract of training.checkpoint
        if which not in saved:
            raise ValueError("holds no average of the weights")
        return saved[which], config, 7

    config = {"autoencoder": section, "seed": 1}
    monkeypatch.setattr(checkpoint, "load_params", load_params)
    ours, back, spec = load_autoencoder("workdir:run")
    assert ours == model and (spec.scale, spec.shift) == (0.5, 0.25)
    same(back, params)
    saved["ema"] = {"autoencoder": load_autoencoder("init:smoke", seed=2)[1]}
    same(load_autoencoder("workdir:run")[1], saved["ema"]["autoencoder"])
    config = {"autoencoder": {**section, "latent_channels": 3}}
    assert "encoder/conv_out/bias: (8,) instead of (6,)" in refused("workdir:run")
    config = {"generator": {}}
    assert "its run trained no autoencoder" in refused("workdir:run")


# ---- what is refused

def refused(reference):
    with pytest.raises(WeightsError) as error:
        load_autoencoder(reference)
    return str(error.value)


def test_folders_that_do_not_fit_are_explained(torch, small, tmp_path):
    _, folder = small
    config = json.loads((folder / "config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "diffusion_pytorch_model.safetensors")

    def message(config=config, tensors=tensors):
        (tmp_path / "config.json").write_text(json.dumps(config))
        safetensors.numpy.save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
        return refused(f"diffusers:{tmp_path}")

    assert "has no config.json" in refused(f"diffusers:{tmp_path}")
    assert "describes a VQModel" in message({**config, "_class_name": "VQModel"})
    assert "mid_block_add_attention is False" in message({**config, "mid_block_add_attention": False})
    assert "latents_mean is [0.1]" in message({**config, "latents_mean": [0.1]})
    assert "use_post_quant_conv is False" in message({**config, "use_post_quant_conv": False})
    assert "no multiples of the first" in message({**config, "block_out_channels": [32, 48]})
    assert "'UpBlock' is neither" in message({**config, "up_block_types": ["UpBlock"] * 2})
    assert "do not mirror" in message({**config, "down_block_types": ["DownEncoderBlock2D"]})
    assert "KeyError: 'norm_num_groups'" in message({k: v for k, v in config.items() if k != "norm_num_groups"})

    bad = {k: v for k, v in tensors.items() if k != "encoder.conv_out.bias"} | {"extra": np.ones(1, np.float32)}
    bad["quant_conv.bias"] = np.ones(3, np.float32)
    text = message(tensors=bad)
    assert "missing (1): encoder.conv_out.bias" in text and "not expected (1): extra" in text
    assert "of another shape (1): quant_conv.bias: (3,) instead of (8,)" in text
    assert "encoder.down_blocks.0.resnets.2.conv1.bias" in message({**config, "layers_per_block": 3})

    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 100)
    assert "not a readable safetensors file" in refused(f"diffusers:{tmp_path}")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert "holds neither" in refused(f"diffusers:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    assert "not readable JSON" in refused(f"diffusers:{tmp_path}")
    pipeline = tmp_path / "pipeline"
    (pipeline / "vae").mkdir(parents=True)
    (pipeline / "vae" / "config.json").write_text("{}")
    assert f"its autoencoder is diffusers:{pipeline / 'vae'}" in refused(f"diffusers:{pipeline}")


def test_other_references_that_fail_are_explained(torch, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def offline(name, allow_patterns):
        asked.append((name, allow_patterns))
        raise ConnectionError("cannot reach the Hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = refused("diffusers:org/model/vae")
    assert len(message.splitlines()) == 2 and "cannot reach the Hub" in message and "diffusers:DIR" in message
    assert asked[0][0] == "org/model" and "vae/diffusion_pytorch_model.safetensors" in asked[0][1]
    assert "no such directory" in refused(f"diffusers:{tmp_path / 'nothing' / 'here'}")
    assert "did you mean 'smoke'? There are sd, quickstart, smoke." in refused("init:smok")
    assert "no such file" in refused(f"ldm:{tmp_path / 'x.ckpt'}")
    torch.save({"quantize.embedding.weight": torch.randn(4, 2), "encoder.x": torch.randn(2)}, tmp_path / "vq.ckpt")
    assert "a VQ model" in refused(f"ldm:{tmp_path / 'vq.ckpt'}")
    torch.save({"state_dict": {"fc.weight": torch.randn(4, 2)}}, tmp_path / "other.ckpt")
    assert "not an autoencoder of latent-diffusion" in refused(f"ldm:{tmp_path / 'other.ckpt'}")
    torch.save([torch.randn(2)], tmp_path / "list.ckpt")
    assert "holds no named tensors" in refused(f"ldm:{tmp_path / 'list.ckpt'}")
    assert "workdir:" in refused(f"workdir:{tmp_path / 'run'}")


def test_saving_checks_before_it_writes(tmp_path):
    model, params, spec = load_autoencoder("init:smoke")
    short = {**params, "quant_conv": {"kernel": params["quant_conv"]["kernel"], "extra": np.ones(1)}}
    with pytest.raises(WeightsError, match=r"missing \(1\): quant_conv/bias\n.*not expected \(1\): quant_conv/extra"):
        save_autoencoder(f"diffusers:{tmp_path / 'out'}", model, short, spec)
    assert not (tmp_path / "out").exists()
    with pytest.raises(WeightsError, match="written as diffusers:DIR or ldm:FILE.safetensors"):
        save_autoencoder(f"ldm:{tmp_path / 'out.ckpt'}", model, params, spec)
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="could not be written"):
        save_autoencoder(f"diffusers:{tmp_path / 'file'}", model, params, spec)
