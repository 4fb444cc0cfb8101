import importlib
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # torch_dit.py


@pytest.fixture(scope="session")
def torch_dit(torch):
    """The module torch_dit, which needs torch."""
    return importlib.import_module("torch_dit")


@pytest.fixture(scope="session")
def torch_maskgit(torch):
    """The module torch_maskgit, which needs torch."""
    return importlib.import_module("torch_maskgit")
