import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # parity and ldm_reference, under any import mode of pytest
sys.path.insert(0, str(Path(__file__).parents[1] / "features"))  # dinov2_files


@pytest.fixture(scope="session")
def ldm_reference(torch):
    """The module ldm_reference, which needs torch."""
    return importlib.import_module("ldm_reference")


@pytest.fixture
def save_run():
    """Function that writes a workdir as training does: (directory, preset) and what its state holds beside."""
    import ml_collections

    from eqvae_jax.autoencoders.presets import describe
    from eqvae_jax.training.checkpoint import Checkpoints
    from eqvae_jax.training.state import TrainState
    from eqvae_jax.weights import load_autoencoder

    def save(directory, preset, ema=None, discriminator=None, statistics=None, **section):
        model, params, spec = load_autoencoder(f"init:{preset}", seed=1)
        params = {"autoencoder": params} | ({"discriminator": discriminator} if discriminator else {})
        config = ml_collections.ConfigDict({
            "seed": 1, "checkpoint": dict(keep=1, keep_best=0, best_metric="", best_mode="min"),
            "autoencoder": describe(model) | {"scale": spec.scale, "shift": spec.shift} | section,
        })
        state = TrainState.create(params, {}, ema and {"autoencoder": ema},
                                  {"discriminator": statistics} if statistics else {})
        with Checkpoints(directory, config) as checkpoints:
            checkpoints.save(7, state)

    return save


@pytest.fixture
def torch_dit(torch):
    """The module torch_dit of tests/generators, which needs torch."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "generators"))
    return importlib.import_module("torch_dit")


@pytest.fixture
def public_dit(torch_dit):
    """A DiT of torch with nothing left at zero; six channels come of three."""
    from small_generators import SMALL

    return torch_dit.randomise(torch_dit.DiT(**SMALL, out_channels=6))


@pytest.fixture
def torch_maskgit(torch):
    """The module torch_maskgit of tests/generators, which needs torch."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "generators"))
    return importlib.import_module("torch_maskgit")
