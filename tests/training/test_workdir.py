import json
import os

import pytest
import toy_regression as toy

from eqvae_jax.training.workdir import differences, prepare


def test_another_config_is_refused_with_the_leaves_that_differ(uninterrupted):
    changes = {"checkpoint.every": 4, "optimizer.learning_rate": 0.1, "seed": 4, "training.steps": 9}
    other = toy.get_config(**changes)
    del other.optimizer.clip_norm
    other.optimizer.clip = 2.0
    with pytest.raises(ValueError) as raised:
        prepare(uninterrupted[0], other, started=True)
    assert str(raised.value).splitlines()[1:-1] == [
        "  optimizer.clip: was 'absent' -> now 2.0",
        "  optimizer.clip_norm: was 1.0 -> now 'absent'",
        "  optimizer.learning_rate: was 0.05 -> now 0.1",
        "  seed: was 3 -> now 4",
        "  training.steps: was 6 -> now 9",  # under a cosine schedule every step's learning rate depends on it
    ]


def test_a_run_of_an_older_version_goes_on_once_it_is_told_what_new_fields_are(tmp_path):
    older = toy.get_config()
    prepare(tmp_path, older, started=False)
    newer = toy.get_config()
    newer.unlock()
    newer.optimizer.novelty = 0.0
    with pytest.raises(ValueError, match="novelty: was 'absent' -> now 0.0\n.*newer version.*config.json"):
        prepare(tmp_path, newer, started=True)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values["optimizer"]["novelty"] = 0.0
    file.write_text(json.dumps(values))
    prepare(tmp_path, newer, started=True)


def test_what_no_result_depends_on_may_change(tmp_path):
    constant = {"optimizer.schedule": "constant"}
    prepare(tmp_path, toy.get_config(**constant), started=False)
    changes = constant | {"training.steps": 50, "training.log_every": 7, "checkpoint.keep": 5, "mesh.fsdp": 2}
    prepare(tmp_path, toy.get_config(**changes), started=True)
    assert json.loads((tmp_path / "config.json").read_text())["training"]["log_every"] == 7


def test_before_the_first_checkpoint_the_config_is_free(tmp_path):
    prepare(tmp_path, toy.get_config(seed=1), started=False)
    prepare(tmp_path, toy.get_config(seed=2), started=False)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 2
    assert os.listdir(tmp_path) == ["config.json"]


def test_differences_names_nested_leaves():
    was, now = {"a": {"b": [1, 2]}, "c": 1}, {"a": {"b": [1, 3]}, "c": 1}
    assert differences(was, now) == [("a.b", [1, 2], [1, 3])]


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(OSError, match="cannot write into the workdir .*file/run.*--workdir"):
        prepare(tmp_path / "file" / "run", toy.get_config(), started=False)
    with pytest.raises(ValueError, match="gcsfuse"):
        prepare("gs://bucket/run", toy.get_config(), started=False)


def test_a_config_json_cannot_hold(tmp_path):
    config = toy.get_config()
    config.training.dtype = complex(1, 2)
    with pytest.raises(TypeError, match="JSON"):
        prepare(tmp_path, config, started=False)
