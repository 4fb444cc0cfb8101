"""What the command refuses, most of it before anything is written."""

import pytest

from eqvae_jax import encode, weights
from eqvae_jax.training import sharding


def refused(capsys, output, **changes):
    options = {"images": "photos:test", "autoencoder": "init:smoke", "output": output, "image_size": 16,
               "batch_size": 2} | changes
    assert encode.main([f"--{name}={value}" for name, value in options.items()]) == 2
    return capsys.readouterr().err


def test_latents_that_are_not_finite_and_negative_labels_are_refused(tmp_path, capsys, monkeypatch):
    class Unlabelled:
        def __init__(self, source):
            self.name, self._source = source.name, source

        def __len__(self):
            return len(self._source)

        def __getitem__(self, i):
            return self._source[i] | {"label": -1}

    load = weights.load_autoencoder

    def enormous(reference):
        model, params, spec = load(reference)
        kernel = params["quant_conv"]["kernel"]
        params["quant_conv"] |= {"kernel": kernel * 1e6}
        return model, params, spec

    monkeypatch.setattr(weights, "load_autoencoder", enormous)
    error = refused(capsys, tmp_path / "a", dtype="float16")
    assert "photo chelsea: its latent is not finite in float16" in error
    assert not list(tmp_path.glob("a/*.array_record*"))
    monkeypatch.undo()
    opened = encode.open_source
    monkeypatch.setattr(encode, "open_source", lambda reference: Unlabelled(opened(reference)))
    assert "photo chelsea has label -1: classes are counted from 0" in refused(capsys, tmp_path / "b")


@pytest.mark.parametrize("change, says", [
    ({"autoencoder": "init:vqgan-smoke", "dtype": "float16"}, "init:vqgan-smoke are codes, stored as uint16"),
    ({"image_size": 15}, "downsamples by 2 and --image_size=15 is no multiple of it: take 14 or 16"),
    ({"image_size": 1}, "take 2."),
    ({"batch_size": 0}, "--batch_size=0 must be at least 1"), ({"limit": 0}, "--limit=0 must be at least 1"),
    ({"broken_limit": 2}, "--broken_limit=2 is not a fraction"), ({"images": "nonsense"}, "not a reference to images"),
    ({"autoencoder": "init:smok"}, "did you mean 'smoke'"),
])
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, capsys, change, says):
    assert says in refused(capsys, tmp_path / "cache", **change)
    assert not (tmp_path / "cache").exists()


def test_a_batch_must_divide_over_the_devices(tmp_path, capsys, monkeypatch):
    class Mesh:
        size = 4

    monkeypatch.setattr(sharding, "make_mesh", lambda *_: Mesh)
    error = refused(capsys, tmp_path / "cache", batch_size=6)
    assert "--batch_size=6 does not divide over the 4 devices of this host" in error
