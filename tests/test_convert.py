"""The convert command, from the command line to the files."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from eqvae_jax import convert, weights
from eqvae_jax.autoencoders.kl import AutoencoderKL
from eqvae_jax.autoencoders.vq import AutoencoderVQ
from eqvae_jax.data.images import evaluation_batches
from eqvae_jax.data.sources import open_source
from eqvae_jax.evaluation import latents, reconstruction
from eqvae_jax.weights import initial, tables


@pytest.fixture
def run(capsys):
    """Runs the command; returns its exit code, output and errors."""

    def run(*arguments):
        try:
            code = convert.main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse's own way out
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def ok(run):
    """Runs the command, which must succeed and say nothing on stderr but progress; returns its output."""

    def ok(*arguments):
        code, out, err = run(*arguments)
        assert code == 0 and "error" not in err, err
        return out

    return ok


COMMON = dict(channels=32, multipliers=(1, 2), blocks_per_level=1)  # and 32 groups: LDM's files know no others
MODELS = {
    "kl": AutoencoderKL(**COMMON),
    "attention": AutoencoderKL(**COMMON, attention_levels=(1,), latent_channels=16),
    "sd3": AutoencoderKL(**COMMON, quant=False),
    "vq": AutoencoderVQ(**COMMON, attention_levels=(1,), codebook_size=24),
}


@pytest.fixture
def source(tmp_path):
    """Writes random weights of one of MODELS into a folder, with a scale and a shift; returns its reference."""

    def source(name):
        model = MODELS[name]
        params = initial.random_parameters(tables.parameter_shapes(model), 0)
        spec = weights.AutoencoderSpec(model.kind, 0.7, 0.1 if name == "sd3" else 0.0, "", "")
        weights.save_autoencoder(f"diffusers:{tmp_path / name}", model, params, spec)
        return f"diffusers:{tmp_path / name}"

    return source


@pytest.fixture
def images(tmp_path, rng):
    """A reference to five smooth pictures, and what --latent-stats should find in them at 16 x 16."""
    (tmp_path / "images").mkdir()
    for i in range(5):
        field = np.cumsum(np.cumsum(rng.normal(size=(20, 24, 3)), 0), 1)
        pixels = np.uint8(255 * (field - field.min()) / np.ptp(field))
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return f"folder:{tmp_path / 'images'}"


def expected_statistics(reference, images):
    """Mean and std over everything, by NumPy on all latents at once."""
    model, params, _ = weights.load_autoencoder(reference)
    (batch,) = evaluation_batches(open_source(images), image_size=16, batch_size=5)
    encode, _ = reconstruction.functions(model)
    posterior = encode(params, np.float32(batch["image"]) / 127.5 - 1)
    mean, std = np.asarray(posterior.mean, np.float64), np.asarray(posterior.std, np.float64)
    return mean.mean(), np.sqrt(mean.var() + np.square(std).mean())


def hash_in(out):
    return re.search(r"^hash +([0-9a-f]{16})$", out, re.MULTILINE)[1]


# ---- what it says

def test_without_a_target_it_says_what_is_there_and_writes_nothing(ok, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = ok("--from=init:vqgan-smoke")
    assert "vq, discrete latents from a codebook" in out and "preset vqgan-smoke; widths 8 16, blocks a level: 1" in out
    assert "16 codes of length 4" in out and "1/2 of the image's sides" in out and "left out    nothing" in out
    _, _, spec = weights.load_autoencoder("init:vqgan-smoke")
    assert hash_in(out) == spec.hash
    assert re.search(r"^codebook +1 +64 +float32 +0\.0$", out, re.MULTILINE)
    rows = [line.split()[0] for line in out[out.index("part ") :].splitlines() if line]
    assert rows[:7] == ["part", "encoder", "decoder", "quant_conv", "post_quant_conv", "codebook", "total"]
    assert not list(tmp_path.iterdir())


def test_the_parameter_table_of_the_papers_sd_vae(ok):
    out = ok("--from=init:sd")
    assert "preset sd and sdxl" in out and re.search(r"^scale +0\.18215$", out, re.MULTILINE)
    for row in (
        "encoder +106 +34,163,592 +float32 +130.3", "decoder +138 +49,490,179 +float32 +188.8",
        "quant_conv +2 +72 +float32 +0.0", "post_quant_conv +2 +20 +float32 +0.0",
        "total +248 +83,653,863 +float32 +319.1",
    ):  # fmt: skip
        assert re.search(f"^{row}$", out, re.MULTILINE), row


def test_verbose_lists_every_tensor(ok):
    _, params, _ = weights.load_autoencoder("init:smoke")
    kernel = params["encoder"]["conv_in"]["kernel"]
    line = f"encoder/conv_in/kernel +3 x 3 x 3 x 8 +{kernel.mean():.3g} +{kernel.std():.3g}"
    assert re.search(f"^{line}$", ok("--from=init:smoke", "--verbose"), re.MULTILINE)
    assert "encoder/conv_in/kernel" not in ok("--from=init:smoke")


def test_what_a_file_holds_beside_the_autoencoder_is_named(ok, tmp_path, source):
    ok(f"--from={source('kl')}", f"--to=ldm:{tmp_path / 'plain.safetensors'}")
    tensors = safetensors.numpy.load_file(tmp_path / "plain.safetensors")
    loss = {f"loss.discriminator.main.{i}.bias": np.zeros(3, np.float32) for i in range(9)}
    safetensors.numpy.save_file(tensors | loss, tmp_path / "all.safetensors")
    out = ok(f"--from=ldm:{tmp_path / 'all.safetensors'}")
    assert re.search(r"^left out +.*loss.* \(9\):\n +loss\.discriminator.* and 6 more$", out, re.MULTILINE)
    assert re.search(r"^scale +0\.18215 \(assumed: ldm: files keep none\)$", out, re.MULTILINE)
    out = ok(f"--from=ldm:{tmp_path / 'all.safetensors'}", "--verbose")
    assert all(name in out for name in loss)


# ---- there and back

@pytest.mark.parametrize(
    "name, targets",
    [
        ("kl", ["ldm:b.safetensors", "ldm:c.ckpt", "diffusers:D"]),
        ("attention", ["ldm:a.ckpt", "diffusers:B"]),
        ("sd3", ["diffusers:A", "ldm:b.safetensors", "diffusers:C"]),
        ("vq", ["taming:a.ckpt", "taming:b.safetensors", "ldm:c.ckpt", "diffusers:D"]),
    ],
)
def test_weights_survive_a_chain_of_formats(ok, tmp_path, source, name, targets):
    now = source(name)
    model, _, spec = weights.load_autoencoder(now)
    for target in targets:
        kind, file = target.split(":")
        out = ok(f"--from={now}", f"--to={kind}:{tmp_path / file}")
        assert hash_in(out) == spec.hash and f"wrote       {kind}:{tmp_path / file}" in out
        assert f"read back with the same hash, graph{', scale, shift' if kind == 'diffusers' else ''} (" in out
        assert ("keep no scale" in out) == (kind != "diffusers")
        now = f"{kind}:{tmp_path / file}"
    back, _, found = weights.load_autoencoder(now)
    assert found.hash == spec.hash and back == model == MODELS[name]


@pytest.mark.parametrize("preset", ["smoke", "sd16-smoke", "sd3-smoke", "vqgan-smoke"])
def test_presets_go_into_folders_with_their_scale_and_shift(ok, tmp_path, preset):
    ok(f"--from=init:{preset}", f"--to=diffusers:{tmp_path / 'out'}")
    model, _, spec = weights.load_autoencoder(f"init:{preset}")
    back, _, found = weights.load_autoencoder(f"diffusers:{tmp_path / 'out'}")
    assert back == model and (found.hash, found.scale, found.shift) == (spec.hash, spec.scale, spec.shift)


def test_scale_and_shift_given_by_hand_are_written(ok, tmp_path):
    out = ok("--from=init:smoke", f"--to=diffusers:{tmp_path / 'out'}", "--scale=0.13025", "--shift=-0.5")
    assert "scale       1 -> 0.13025" in out and "shift       0 -> -0.5" in out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["scaling_factor"] == 0.13025 and config["shift_factor"] == -0.5


def test_a_format_that_keeps_no_scale_says_so_and_what_to_tell_its_users(ok, tmp_path, source):
    out = ok(f"--from={source('kl')}", f"--to=ldm:{tmp_path / 'x.safetensors'}", "--scale=0.3")
    assert "keep no scale and no shift" in out and "must be told scale 0.3, shift 0" in out
    assert "eqvae_jax itself will assume 0.18215 and 0" in out


def test_overwrite_writes_over_an_existing_target(ok, tmp_path):
    target = f"--to=diffusers:{tmp_path / 'out'}"
    ok("--from=init:smoke", target)
    out = ok("--from=init:smoke", "--seed=1", target, "--overwrite")
    assert weights.load_autoencoder(f"diffusers:{tmp_path / 'out'}")[2].hash == hash_in(out)
    assert hash_in(out) != weights.load_autoencoder("init:smoke")[2].hash


# ---- statistics of latents

STATISTICS = ("--image_size=16", "--batch_size=2")  # the last batch is padded


@pytest.mark.parametrize("preset, shifted", [("smoke", False), ("sd3-smoke", True)])
def test_measured_scale_and_shift_are_those_of_the_latents_and_reach_diffusers(
    ok, tmp_path, images, torch, diffusers, preset, shifted
):
    out = ok(f"--from=init:{preset}", f"--to=diffusers:{tmp_path / 'out'}", f"--latent-stats={images}", *STATISTICS)
    mean, std = expected_statistics(f"init:{preset}", images)
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out")
    assert model.config.scaling_factor == pytest.approx(1 / std, rel=1e-5)
    assert (model.config.shift_factor or 0.0) == pytest.approx(mean if shifted else 0.0, rel=1e-4)
    assert f"latents of 5 images of 16 x 16 pixels from {images}" in out
    assert re.search(rf"^all +{mean:.4f} +{std:.4f}$", out, re.MULTILINE)
    assert re.search(rf"^scale +\S+ -> {1 / std:.5g}", out, re.MULTILINE)
    assert "verified" in out


def test_statistics_without_a_target_are_printed_only(ok, images):
    out = ok("--from=init:vqgan-smoke", f"--latent-stats={images}", "--limit=2", *STATISTICS)
    assert "latents of 2 images" in out and re.search(r"^3 +-?\d", out, re.MULTILINE) and "wrote" not in out


def test_crops_and_their_sizes_reach_the_statistics(ok, images):
    def spread(*arguments):
        out = ok("--from=init:smoke", f"--latent-stats={images}", "--crops=2", *STATISTICS, *arguments)
        assert "latents of 10 images" in out
        return re.search(r"^all .*$", out, re.MULTILINE)[0]

    assert len({spread(), spread("--min_crop=0.9"), spread("--max_crop=0.8")}) == 3


def test_many_channels_are_cut_short_and_say_so():
    statistics = latents.LatentStatistics(1, np.arange(40.0), np.ones(40), 19.5, 11.6)
    protocol = type("Protocol", (), {"image_size": 16, "images": "photos"})
    lines = convert.statistics_table(statistics, protocol, {})
    assert lines[-1] == "(8 more channels: --verbose)" and not any(line.startswith("39") for line in lines)
    assert any(line.startswith("39") for line in convert.statistics_table(statistics, protocol, {}, verbose=True))
