import json
import resource
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from eqvae_jax.training.logging import Progress, Writer, grid


def events_of(workdir):
    """All events of a run, read from the record format: length, its checksum, data, its checksum."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12:12 + length]))
            data = data[16 + length:]
    return events


def test_lines_are_json_and_events_hold_the_same(tmp_path):
    with Writer(tmp_path) as writer:
        writer.scalars(5, {"loss": np.float32(0.25), "ratio": np.nan, "largest": np.inf})
        lines = (tmp_path / "metrics.jsonl").read_text()  # on disk before close
        writer.scalars(5, {"psnr": 20}, split="eval")
    assert json.loads(lines, parse_constant=pytest.fail) == {
        "step": 5, "split": "train", "loss": 0.25, "ratio": None, "largest": None}
    values = [value for event in events_of(tmp_path) for value in event.summary.value]
    scalars = {value.tag: value.simple_value for value in values}
    assert scalars["train/loss"] == 0.25 and scalars["eval/psnr"] == 20 and np.isnan(scalars["train/ratio"])


def test_resume_drops_later_lines_and_half_lines(tmp_path):
    with Writer(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.scalars(step, {"loss": step / 7})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "split": "tr')
    with Writer(tmp_path, step=2) as writer:
        writer.scalars(3, {"loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1 / 7), (2, 2 / 7), (3, 0.5)]
    restarts = [event.step for event in events_of(tmp_path) if event.HasField("session_log")]
    assert restarts == [1, 3]  # TensorBoard forgets what is at or after this step


def test_previews_are_a_grid_of_the_right_pixels(tmp_path):
    images = np.stack([np.full((3, 5, 3), value, np.float32) for value in (-1, 0, 1, 0.5, 7)])
    images[1, 0, 0] = np.nan
    with Writer(tmp_path) as writer:
        writer.images(12, {"reconstruction": images})
    picture = np.asarray(Image.open(tmp_path / "previews" / "reconstruction_00000012.png"))
    assert picture.shape == (3 + 2 + 3, 5 + 2 + 5 + 2 + 5, 3)
    assert [picture[1, x, 0] for x in (2, 9, 16)] == [0, 128, 255]
    assert [picture[6, x, 0] for x in (2, 9, 16)] == [191, 255, 255]
    assert (picture[:, 5:7] == 255).all() and picture[0, 7, 0] == 128
    tags = [value.tag for event in events_of(tmp_path) for value in event.summary.value]
    assert tags == ["preview/reconstruction"]
    with pytest.raises(ValueError, match=r"\(B, H, W, 3\)"):
        grid(images[..., :1])


def test_a_file_system_that_takes_no_more_is_an_error_at_once(tmp_path):
    with Writer(tmp_path) as writer:
        size = (tmp_path / "metrics.jsonl").stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                writer.scalars(1, {"loss": 0.5, "gradient_norm": 1.5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_without_a_terminal_progress_is_one_line_per_report(capsys):
    with Progress(start=0, steps=100) as progress:
        progress.advance()
        progress.report(40, {"loss": 0.123456, "steps_per_second": 2.0, "images_per_second": 64.0})
        progress.report(40, {"psnr": 21.5}, split="eval")
    assert capsys.readouterr().err.splitlines() == [
        "step 40/100  2 steps/s  00:30 left  loss 0.1235  images_per_second 64",
        "step 40/100  eval  psnr 21.5",
    ]
