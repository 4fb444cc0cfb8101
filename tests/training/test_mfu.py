"""MFU: a model's FLOPs are counted beside the first step, and whatever happens there ends with the run."""

import json
import threading
import time

import numpy as np
import pytest
import toy_regression as toy

from eqvae_jax import hardware
from eqvae_jax.training import sharding
from eqvae_jax.training.compilation import CompileLedger
from eqvae_jax.training.metrics import Interval


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setattr(hardware, "peak_flops", lambda device: 1e6)
    config = toy.get_config()
    return toy.make_task(config, sharding.make_mesh(config.mesh))


def test_flops_are_counted_while_the_first_step_is_under_way(tmp_path, task):
    under_way, counted = threading.Event(), []

    def train_step(state, batch, step):
        under_way.set()
        return task.train_step(state, batch, step)

    def model_flops():
        counted.append(under_way.wait(20))
        time.sleep(0.5)                        # the first log line waits for it
        return 250.0

    begun = threading.active_count()
    toy.run(tmp_path, task=task._replace(train_step=train_step, model_flops=model_flops))
    assert counted == [True] and threading.active_count() == begun
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row["mfu"] == pytest.approx(row["images_per_second"] * 250 / 1e6)


def test_waiting_for_the_count_is_time_of_no_step():
    with CompileLedger() as ledger:
        interval = Interval(ledger, lambda: time.sleep(1.0) or 1e-3)
        for _ in range(2):
            interval.add({"loss": np.float32(2.0)}, rows=8)
            means = interval.means()
            assert means["steps_per_second"] > 2 and means["mfu"] == pytest.approx(1e-3 * means["images_per_second"])


def test_a_run_that_fails_leaves_no_count_behind(tmp_path, task):
    begun, ended = threading.Event(), threading.Event()

    def model_flops():
        begun.set()
        time.sleep(0.5)
        ended.set()
        return 250.0

    def stream(start):
        assert begun.wait(20)
        raise OSError(5, "the disk is on fire")
        yield

    with pytest.raises(OSError, match="on fire"):
        toy.run(tmp_path, stream=stream, task=task._replace(model_flops=model_flops))
    assert ended.is_set() and not [t for t in threading.enumerate() if t.name.startswith("beside")]


def test_a_count_that_fails_is_no_silent_one(tmp_path, task):
    def model_flops():
        raise FloatingPointError("no such product")

    with pytest.raises(FloatingPointError, match="no such product"):
        toy.run(tmp_path, task=task._replace(model_flops=model_flops))
