"""Caches of latents and finished runs, small ones, that the tests of training generators share."""

import sys
from pathlib import Path

import pytest

from eqvae_jax import encode, main

sys.path.insert(0, str(Path(__file__).parent))  # generator_configs, under any import mode of pytest
from generator_configs import get_config, long  # noqa: E402


@pytest.fixture(scope="session")
def caches(tmp_path_factory):
    """Caches of photographs: at 8 pixels, of two autoencoders, and at 16."""
    root = tmp_path_factory.mktemp("caches")
    kinds = (("one", "init:smoke", 8), ("other", "init:sd3-smoke", 8), ("large", "init:smoke", 16))
    for name, autoencoder, side in kinds:
        arguments = [f"--autoencoder={autoencoder}", "--images=photos", f"--image_size={side}", "--batch_size=3"]
        assert encode.main([*arguments, f"--output={root / name}"]) == 0
    return root


@pytest.fixture(scope="session")
def finished(caches, tmp_path_factory):
    """Six steps without a break, with everything that has state."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert main.train(long(caches, 6), workdir) == 0
    return workdir


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """A classifier of two steps, which looks at images of 8 x 8 as 2 x 2 places."""
    config = get_config("fashion_classifier")
    config.data.image_size = 8
    workdir = tmp_path_factory.mktemp("classifier") / "cnn"
    assert main.train(config, workdir) == 0
    return workdir


@pytest.fixture(scope="session")
def with_images(tmp_path_factory):
    output = tmp_path_factory.mktemp("with_images") / "latents"
    assert encode.main(["--autoencoder=init:smoke", "--images=photos", "--image_size=8", "--batch_size=3",
                        "--keep_images", f"--output={output}"]) == 0
    return output


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    output = tmp_path_factory.mktemp("tokens") / "latents"
    assert encode.main(["--autoencoder=init:vqgan-smoke", "--images=photos", "--image_size=8", "--batch_size=3",
                        f"--output={output}"]) == 0
    return output
