"""What the convert command refuses, and what it says of files that were damaged on their way."""

import json
import os
import re

import pytest

from eqvae_jax import convert, weights


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--to=diffusers:out"], "--from"),
        (["--from=nothing:x"], "there is no kind 'nothing'"),
        (["--from=init:smokey"], "did you mean 'smoke'"),
        (["--from=init:smoke", "--to=workdir:out"], "there is no kind 'workdir'"),
        (["--from=init:smoke", "--to=out"], "does not say what it is"),
        (["--from=init:smoke", "--to=ldm:out.bin"], r"ends in \.safetensors or \.ckpt"),
        (["--from=init:smoke", "--to=diffusers:full"], "--overwrite"),
        (["--from=init:smoke", "--to=ldm:full/file.ckpt"], "exists: --overwrite"),
        (["--from=init:smoke", "--to=ldm:folder.ckpt", "--overwrite"], "is a directory"),
        (["--from=init:smoke", "--to=diffusers:full/file.ckpt", "--overwrite"], "is a file"),
        (["--from=init:smoke", "--to=diffusers:full/file.ckpt/deeper"], "no directory"),
        (["--from=ldm:full/file.ckpt", "--to=taming:full/file.ckpt", "--overwrite"], "is where ldm:full/file.ckpt"),
        (["--from=diffusers:full", "--to=diffusers:./full/", "--overwrite"], "is where diffusers:full"),
        (["--from=diffusers:full", "--to=ldm:full/file.ckpt", "--overwrite"], "is where diffusers:full"),
        (["--from=ldm:missing.ckpt", "--to=diffusers:out"], "missing.ckpt"),
        (["--from=init:smoke", "--to=taming:out.ckpt"], "a kl model, and taming-transformers has VQ models only"),
        (["--from=init:smoke", "--to=ldm:out.ckpt"], "has 4 groups a normalisation"),
        (["--from=init:smoke", "--to=diffusers:shards", "--overwrite"], "shards"),
        (["--from=init:smoke", "--to=diffusers:out", "--scale=0"], "not positive"),
        (["--from=init:smoke", "--to=diffusers:out", "--shift=nan"], "not a finite number"),
        (["--from=init:smoke", "--to=diffusers:out", "--limit=3"], "only with --latent-stats"),
        (["--from=init:smoke", "--overwrite"], "only with --to"),
        (["--from=init:smoke", "--to=diffusers:out", "--latent-stats=photos", "--scale=1"], "either it or --scale"),
        (["--from=init:smoke", "--to=diffusers:out", "--latent-stats=folder:missing"], "missing"),
        (["--from=init:smoke", "--to=diffusers:out", "--latent-stats=photos", "--image_size=15"], "take 14 or 16"),
    ],
)
def test_what_cannot_work_is_one_message_and_leaves_nothing_behind(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file.ckpt").write_text("here first")
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(*arguments)
    assert code == 2 and re.search(message, err) and "Traceback" not in err
    assert err.count("error: ") == 1
    assert (tmp_path / "full" / "file.ckpt").read_text() == "here first"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_without_permission_is_refused_before_anything_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "open_autoencoder", lambda *_, **__: pytest.fail("it was read"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # chmod does not stop root
    code, _, err = run("--from=init:smoke", f"--to=diffusers:{tmp_path / 'deep' / 'out'}")
    assert code == 2 and f"{tmp_path} is no directory that this user may write to" in err


# ---- what went wrong between writing and reading

def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def other_scale(path):
    config = path.with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))


@pytest.mark.parametrize(
    "damage, message",
    [(flip_a_bit, "hash is"), (truncate, "cannot be read back"), (other_scale, "scale is 0.5 instead of 1")],
)
def test_a_file_damaged_on_its_way_is_not_called_verified(run, tmp_path, monkeypatch, damage, message):
    save = weights.save_autoencoder

    def damaged(*arguments):
        save(*arguments)
        damage(tmp_path / "out" / "diffusion_pytorch_model.safetensors")

    monkeypatch.setattr(weights, "save_autoencoder", damaged)
    code, out, err = run("--from=init:smoke", f"--to=diffusers:{tmp_path / 'out'}")
    assert code == 2 and message in err and "Do not use it" in err and "verified" not in out
