import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # dinov2_files, under any import mode of pytest


@pytest.fixture(scope="session")
def torch_dinov2(torch):
    """The module torch_dinov2, which needs torch."""
    return importlib.import_module("torch_dinov2")
