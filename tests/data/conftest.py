import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # memory_source, under any import mode of pytest


@pytest.fixture
def folder(tmp_path):
    """A cache of ten latents."""
    import latent_folder

    latent_folder.write(tmp_path / "cache")
    return tmp_path / "cache"
