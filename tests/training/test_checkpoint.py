import shutil

import jax
import numpy as np
import pytest
import toy_regression as toy

from eqvae_jax.training import checksums
from eqvae_jax.training.checkpoint import load_params, saved_steps


@pytest.fixture
def finished(uninterrupted, tmp_path):
    """A workdir of our own with checkpoints 4 and 6, and the final state."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], workdir)
    return workdir, uninterrupted[1]


@pytest.fixture
def config():
    return toy.get_config(**{"checkpoint.every": 4})


def damage(step, how):
    files = [path for path in (step / "state").rglob("*") if path.is_file()]
    if how == "truncated":
        for path in files:
            path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    elif how == "overwritten":
        data = [path for path in files if path.parent.name == "d"]
        for path in data:
            content = bytearray(path.read_bytes())
            content[len(content) // 3:] = bytes(len(content) - len(content) // 3)
            path.write_bytes(content)
    elif how == "one_bit":
        data = max((path for path in files if path.parent.name == "d"), key=lambda path: path.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "emptied":
        max(files, key=lambda path: path.stat().st_size).write_bytes(b"")
    elif how == "config":
        (step / "config" / "metadata").unlink()
    else:
        shutil.rmtree(step / "state")


DAMAGE = {"truncated": "bytes instead of", "overwritten": "not what was written", "missing": "state/.* is missing",
          "one_bit": "not what was written", "emptied": "has 0 bytes instead of",
          "config": "config/metadata is missing"}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(finished, config, how, capsys):
    workdir, state = finished
    newest = workdir / "checkpoints" / "6"
    damage(newest, how)
    with pytest.warns(UserWarning, match=f"{newest} cannot be restored .*{DAMAGE[how]}.*going on from step 4"):
        again = toy.run(workdir, config)
    assert "going on from step 4" in capsys.readouterr().err
    np.testing.assert_array_equal(again.params["model"]["w"], state.params["model"]["w"])
    assert saved_steps(workdir) == [4, 6]  # step 6 could be saved again
    assert (workdir / "broken_checkpoints" / "6").is_dir()
    np.testing.assert_array_equal(load_params(workdir, "params")[0]["model"]["w"], state.params["model"]["w"])


@pytest.mark.parametrize("how", ["truncated", "overwritten", "missing"])
def test_so_it_is_where_no_checksums_were_kept(finished, config, how):
    workdir, state = finished
    shutil.rmtree(workdir / "checksums")
    damage(workdir / "checkpoints" / "6", how)
    with pytest.warns(UserWarning, match="6 cannot be restored.*going on from step 4"):
        again = toy.run(workdir, config)
    np.testing.assert_array_equal(again.params["model"]["w"], state.params["model"]["w"])


def test_checksums_are_kept_of_the_checkpoints_that_are_kept(finished):
    workdir, _ = finished
    assert {path.stem for path in (workdir / "checksums").iterdir()} >= {"4", "6"}
    assert checksums.problem(workdir / "checkpoints" / "6") is None


def test_when_none_can_be_restored_nothing_is_touched(finished, config):
    workdir, _ = finished
    for step in (4, 6):
        damage(workdir / "checkpoints" / str(step), "truncated")
    with pytest.raises(RuntimeError, match="(?s)no checkpoint of this run can be restored:.*/6: .*/4: "):
        toy.run(workdir, config)
    assert saved_steps(workdir) == [4, 6]


def test_load_params_needs_no_mesh_and_returns_numpy(finished):
    workdir, state = finished
    for which, expected in (("ema", state.ema), ("params", state.params)):
        tree, config, step = load_params(workdir, which)
        assert step == 6 and config["optimizer"]["b2"] == 0.99
        assert jax.tree.structure(tree) == jax.tree.structure(expected)
        for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
            assert isinstance(ours, np.ndarray)
            np.testing.assert_array_equal(ours, theirs)
    earlier, _, step = load_params(workdir, "params", step=4)
    assert step == 4 and np.abs(earlier["model"]["w"] - tree["model"]["w"]).max() > 0.01


def test_load_params_says_what_is_missing(finished, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint of step 5; it holds steps \[4, 6\]"):
        load_params(finished[0], step=5)
    with pytest.raises(FileNotFoundError, match="it holds none"):
        load_params(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="'ema' or 'params'"):
        load_params(finished[0], "best")
