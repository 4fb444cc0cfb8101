"""References to the Hugging Face Hub: what is asked for, and what is said where it cannot be reached."""

import os
import subprocess
import sys

import pytest
from parity import refused

from eqvae_jax.weights import load_autoencoder, save_autoencoder

CHILD = """
from eqvae_jax import weights
try:
    weights.load_autoencoder("diffusers:nobody/nothing")
except weights.WeightsError as error:
    print(error)
"""


@pytest.fixture
def hub(monkeypatch):
    """Function that makes snapshot_download answer(number of the call); returns the list of calls, (name, patterns)."""
    import huggingface_hub

    calls = []

    def answer_with(answer):
        def snapshot_download(name, *, allow_patterns):
            calls.append((name, list(allow_patterns)))
            return answer(len(calls))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return answer_with


@pytest.mark.parametrize("preset, subfolder", [("smoke", ""), ("vqgan-smoke", "/vae")])
def test_a_download_asks_for_the_folder_and_nothing_else(hub, tmp_path, preset, subfolder):
    model, params, spec = load_autoencoder(f"init:{preset}", seed=1)
    save_autoencoder(f"diffusers:{tmp_path}{subfolder}", model, params, spec)
    calls = hub(lambda n: str(tmp_path))
    loaded = load_autoencoder(f"diffusers:org/model{subfolder}")
    assert loaded[0] == model and loaded[2].hash == spec.hash
    assert loaded[2].reference == f"diffusers:org/model{subfolder}"
    prefix = subfolder[1:] + "/" if subfolder else ""
    assert calls == [("org/model", [
        f"{prefix}config.json", f"{prefix}diffusion_pytorch_model.safetensors",
        f"{prefix}diffusion_pytorch_model.safetensors.index.json", f"{prefix}diffusion_pytorch_model-*.safetensors"])]


def test_an_old_upload_gives_its_pickle_only_where_there_is_nothing_else(torch, hub, tmp_path):
    model, params, spec = load_autoencoder("init:smoke", seed=1)
    save_autoencoder(f"diffusers:{tmp_path}", model, params, spec)
    safe = tmp_path / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file

    def answer(n):
        if n == 2:                                           # the second time, the pickle was asked for too
            torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
        return tmp_path

    state = load_file(safe)
    safe.unlink()
    calls = hub(answer)
    assert load_autoencoder("diffusers:org/old")[2].hash == spec.hash
    assert ["diffusion_pytorch_model.bin" in patterns for _, patterns in calls] == [False, True]


def test_a_failed_download_is_two_lines(hub, tmp_path):
    def fail(n):
        raise ConnectionError("cannot reach the Hub\nmore lines\nand more")

    hub(fail)
    message = refused("diffusers:org/model")
    assert len(message.splitlines()) == 2 and "cannot reach the Hub" in message and "diffusers:DIR" in message
    assert "more lines" not in message


def test_names_that_are_no_models_are_not_asked_for(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whose neighbours are no models either
    calls = hub(lambda n: tmp_path)
    for name in ("../x", "org/..", "org/model/vae/deeper", "/absolute/path", "a", "org/model/../..", "~/x"):
        assert "no such directory" in refused(f"diffusers:{name}")
    assert calls == []
    assert "has no config.json" in refused("diffusers:org/empty")


def test_offline_mode_is_honoured(tmp_path):
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": path}
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, env=environment, timeout=120)
    assert child.returncode == 0, child.stderr
    first, second = child.stdout.strip().splitlines()
    assert "nobody/nothing: no such directory, and it could not be had from the Hugging Face Hub" in first
    assert "traffic has been disabled" in first and second.endswith("name their folder: diffusers:DIR")
