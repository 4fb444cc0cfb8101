"""Folders of diffusers: parity with its models through files it saved, round trips, and every form of such a folder."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from parity import assert_same, diffusers_outputs, gaps, our_outputs, refused

from eqvae_jax.weights import WeightsError, load_autoencoder, save_autoencoder

PLAIN = ("DownEncoderBlock2D",), ("UpDecoderBlock2D",)
ATTENTION = ("AttnDownEncoderBlock2D",), ("AttnUpDecoderBlock2D",)


def config(widths, attention_levels=0, **values):
    """A config in which the last `attention_levels` levels attend."""
    plain = len(widths) - attention_levels
    return dict(block_out_channels=widths, down_block_types=PLAIN[0] * plain + ATTENTION[0] * attention_levels,
                up_block_types=ATTENTION[1] * attention_levels + PLAIN[1] * plain, **values)


# class -> the model's config, at the widths of a test
KINDS = {
    "sd": ("AutoencoderKL", config((32, 64), layers_per_block=2, latent_channels=4, norm_num_groups=16,
                                   scaling_factor=0.18215)),
    "sdxl": ("AutoencoderKL", config((16, 32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
                                     scaling_factor=0.13025, sample_size=1024, force_upcast=True)),
    "sd3": ("AutoencoderKL", config((16, 32), layers_per_block=1, latent_channels=16, norm_num_groups=8,
                                    scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                                    use_post_quant_conv=False, sample_size=1024)),
    "sd16": ("AutoencoderKL", config((16, 16, 32), 1, layers_per_block=1, latent_channels=8, norm_num_groups=8)),
    "vqgan": ("VQModel", config((16, 16, 32), 1, layers_per_block=1, latent_channels=8, norm_num_groups=8,
                                num_vq_embeddings=32, vq_embed_dim=8)),
    "ldm_vq": ("VQModel", config((16, 32), layers_per_block=1, latent_channels=3, norm_num_groups=8,
                                 num_vq_embeddings=64)),
}


@pytest.fixture(scope="module")
def saved(torch, diffusers, ldm_reference, tmp_path_factory):
    """Function of a kind: (a random model of diffusers, the folder it saved)."""
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            name, values = KINDS[kind]
            model = ldm_reference.perturbed(getattr(diffusers, name)(**values))
            made[kind] = model, tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind][1])
        return made[kind]

    return make


@pytest.mark.parametrize("kind, size", [("sd", (64, 64)), *((kind, (72, 104)) for kind in KINDS)])
def test_encoder_and_decoder_match_diffusers(torch, saved, rng, kind, size):
    theirs, folder = saved(kind)
    model, params, spec = load_autoencoder(f"diffusers:{folder}")
    values = KINDS[kind][1]
    assert spec.kind == model.kind == ("vq" if KINDS[kind][0] == "VQModel" else "kl")
    assert (spec.scale, spec.shift) == (values.get("scaling_factor", 0.18215), values.get("shift_factor", 0.0))
    x = rng.uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    ours = our_outputs(model, params, x)
    assert max(gaps(ours, diffusers_outputs(torch, theirs, x))) < 2e-4
    if model.kind == "vq":                                   # a codebook of which one code is used would show nothing
        quantized = model.apply({"params": params}, ours[0], method=model.quantize)
        assert len(np.unique(quantized.indices)) > 3


def test_sizes_that_are_no_multiples_of_f_match_diffusers(torch, saved, rng):
    theirs, folder = saved("sdxl")                           # f = 4: the encoder floors at every level
    model, params, _ = load_autoencoder(f"diffusers:{folder}")
    x = rng.uniform(-1, 1, (1, 37, 46, 3)).astype(np.float32)
    ours = our_outputs(model, params, x)
    assert ours[0].shape == (1, 9, 11, 4)
    assert max(gaps(ours, diffusers_outputs(torch, theirs, x))) < 2e-4


@pytest.mark.parametrize("kind", ["sd3", "vqgan"])
def test_from_diffusers_and_back_is_byte_equal(saved, tmp_path, kind):
    _, folder = saved(kind)
    loaded = load_autoencoder(f"diffusers:{folder}")
    save_autoencoder(f"diffusers:{tmp_path / 'out'}", *loaded)
    name = "diffusion_pytorch_model.safetensors"
    before, after = (safetensors.numpy.load_file(where / name) for where in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key in before:
        assert (before[key].dtype, before[key].shape, before[key].tobytes()) == (
            after[key].dtype, after[key].shape, after[key].tobytes()), key
    before, after = (json.loads((where / "config.json").read_text()) for where in (folder, tmp_path / "out"))
    for key in before.keys() - {"_diffusers_version", "sample_size", "vq_embed_dim", "force_upcast"}:
        assert after[key] == before[key], key
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", name]
    again = load_autoencoder(f"diffusers:{tmp_path / 'out'}")
    assert again[0] == loaded[0] and again[2].hash == loaded[2].hash


CHILD = """
import sys
import numpy as np
import conftest
import torch
conftest.declare_nms(torch)                                  # torchvision beside a CPU build of torch
import diffusers
from parity import diffusers_outputs

for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    model, report = getattr(diffusers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    np.savez(f"{folder}/out.npz", *diffusers_outputs(torch, model.eval(), np.load(f"{folder}/x.npy")))
"""


def test_what_we_write_diffusers_loads_in_a_fresh_process(diffusers, rng, tmp_path):
    written, arguments = {}, []
    for preset, name in (("sd16-smoke", "AutoencoderKL"), ("sd3-smoke", "AutoencoderKL"), ("vqgan-smoke", "VQModel")):
        model, params, spec = load_autoencoder(f"init:{preset}", seed=1)
        params = jax.tree.map(lambda p: p + rng.normal(0, 0.1, p.shape).astype(np.float32), params)
        save_autoencoder(f"diffusers:{tmp_path / preset}", model, params, spec)
        written[preset] = model, params, rng.uniform(-1, 1, (2, 40, 24, 3)).astype(np.float32)
        np.save(tmp_path / preset / "x.npy", written[preset][2])
        arguments += [tmp_path / preset, name]
    here = pathlib.Path(__file__).parent
    path = os.pathsep.join(map(str, (here.parents[1], here.parent, here)))
    child = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=300,
                           env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})
    assert child.returncode == 0, child.stderr
    for preset, ours in written.items():
        with np.load(tmp_path / preset / "out.npz") as file:
            assert max(gaps(our_outputs(*ours), list(file.values()))) < 2e-4, preset


def test_old_attention_names_bin_files_and_shards(torch, saved, tmp_path):
    theirs, folder = saved("sd")
    expected = load_autoencoder(f"diffusers:{folder}")[1]
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((folder / "config.json").read_text())
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    rename = lambda name: re.sub(r"to_(q|k|v|out\.0)", lambda m: names[m[0]], name)
    torch.save({rename(name): value for name, value in theirs.state_dict().items()},
               old / "diffusion_pytorch_model.bin")
    assert_same(load_autoencoder(f"diffusers:{old}")[1], expected)

    shards = tmp_path / "shards"
    theirs.save_pretrained(shards, max_shard_size="200KB")
    index = shards / "diffusion_pytorch_model.safetensors.index.json"
    assert index.exists()
    loaded = load_autoencoder(f"diffusers:{shards}")
    assert_same(loaded[1], expected)
    with pytest.raises(WeightsError, match="whose shards diffusers would load instead"):
        save_autoencoder(f"diffusers:{shards}", *loaded)
    for hostile in ({"encoder.conv_in.weight": "../old/diffusion_pytorch_model.bin"}, {"a": ".."}, {"a": 3}, [], {}):
        index.write_text(json.dumps({"weight_map": hostile}))
        assert "does not name files of this folder" in refused(f"diffusers:{shards}")


def test_half_precision_files_become_float32(torch, diffusers, saved, tmp_path):
    theirs, folder = saved("sd")
    expected = load_autoencoder(f"diffusers:{folder}")[1]
    diffusers.AutoencoderKL.from_pretrained(folder).to(torch.bfloat16).save_pretrained(tmp_path)
    params = load_autoencoder(f"diffusers:{tmp_path}")[1]
    for ours, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, wanted, rtol=2**-8)
    assert not np.array_equal(jax.tree.leaves(params)[0], jax.tree.leaves(expected)[0])


def test_a_shift_that_diffusers_vq_model_cannot_hold_is_refused(tmp_path):
    model, params, spec = load_autoencoder("init:vqgan-smoke")
    with pytest.raises(WeightsError, match="no place for a shift .* this one's is 0.5"):
        save_autoencoder(f"diffusers:{tmp_path / 'out'}", model, params, type(spec)("vq", 1.0, 0.5, "", ""))
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_fit_are_explained(saved, tmp_path):
    name = "diffusion_pytorch_model.safetensors"
    read = lambda kind: json.loads((saved(kind)[1] / "config.json").read_text())
    kl, vq = read("sd"), read("vqgan")
    tensors = safetensors.numpy.load_file(saved("sd")[1] / name)

    def message(config, tensors=tensors, **change):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        safetensors.numpy.save_file(tensors, tmp_path / name)
        return refused(f"diffusers:{tmp_path}")

    assert "has no config.json" in refused(f"diffusers:{tmp_path}")
    assert "describes a UNet2DModel; AutoencoderKL and VQModel are read" in message(kl, _class_name="UNet2DModel")
    assert "mid_block_add_attention is False" in message(kl, mid_block_add_attention=False)
    assert "latents_mean is [0.1]" in message(kl, latents_mean=[0.1])
    assert "use_post_quant_conv is False and use_quant_conv is True" in message(kl, use_post_quant_conv=False)
    assert "no multiples of the first" in message(kl, block_out_channels=[32, 48])
    assert "64 channels do not divide into 24 groups" in message(kl, block_out_channels=[64, 64], norm_num_groups=24)
    assert "'UpBlock' is neither" in message(kl, up_block_types=["UpBlock"] * 2)
    assert "do not mirror" in message(kl, down_block_types=["DownEncoderBlock2D"])
    assert "KeyError: 'norm_num_groups'" in message({k: v for k, v in kl.items() if k != "norm_num_groups"})
    assert "norm_type is 'spatial'" in message(vq, norm_type="spatial")
    assert "vq_embed_dim is 4 and latent_channels 8" in message(vq, vq_embed_dim=4)
    assert "KeyError: 'num_vq_embeddings'" in message({k: v for k, v in vq.items() if k != "num_vq_embeddings"})
    codes = safetensors.numpy.load_file(saved("vqgan")[1] / name)
    assert "quantize.embedding.weight: (32, 8) instead of (31, 8)" in message(vq, codes, num_vq_embeddings=31)

    bad = {k: v for k, v in tensors.items() if k != "encoder.conv_out.bias"} | {"extra": np.ones(1, np.float32)}
    bad["quant_conv.bias"] = np.ones(3, np.float32)
    text = message(kl, bad)
    assert "missing (1): encoder.conv_out.bias" in text and "not expected (1): extra" in text
    assert "of another shape (1): quant_conv.bias: (3,) instead of (8,)" in text
    assert "encoder.down_blocks.0.resnets.2.conv1.bias" in message(kl, layers_per_block=3)

    (tmp_path / name).unlink()
    assert "holds neither" in refused(f"diffusers:{tmp_path}")
    for text in ("{", "[]", "[" * 100_000, "\x00"):
        (tmp_path / "config.json").write_text(text)
        assert "JSON" in refused(f"diffusers:{tmp_path}")
    pipeline = tmp_path / "pipeline"
    (pipeline / "vae").mkdir(parents=True)
    (pipeline / "vae" / "config.json").write_text("{}")
    assert f"its autoencoder is diffusers:{pipeline / 'vae'}" in refused(f"diffusers:{pipeline}")
