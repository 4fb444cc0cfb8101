"""Makes the files beside these tests importable, and the world in which commands are run."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory that holds what the commands of the pages name, and remembers what was run in it."""
    from doors import World  # imports JAX: not for the tests of links

    return World(tmp_path_factory.mktemp("world"))
