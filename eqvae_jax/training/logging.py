"""Metrics on disk (metrics.jsonl, TensorBoard), preview images, and what the terminal shows."""

import json
import math
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tqdm
from PIL import Image

from eqvae_jax import distributed
from eqvae_jax.atomic import whole


class Writer:
    """Writes metrics and previews of one run under `workdir`; on other processes than the first it does
    nothing.

    metrics.jsonl gets one object per line, {"step", "split", ...}; numbers that are not finite become null,
    because JSON has no NaN. tensorboard/ gets event files, previews/ PNGs. Every call leaves its data with
    the operating system before it returns, and raises OSError where that fails (a full disk).
    """

    def __init__(self, workdir, step=0):
        """step: where this run goes on from; lines and events after it, left by a killed run, are dropped."""
        self._active = jax.process_index() == 0
        if not self._active:
            return
        # Here, for the one process that needs it: where torch is installed, this imports it, in seconds.
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._summary, self._event_type = summary, Event
        self._workdir = Path(workdir)
        path = self._workdir / "metrics.jsonl"
        _truncate(path, step)
        # Unbuffered, so that no half line waits in memory for a later flush to fail on.
        self._lines = open(path, "ab", buffering=0)
        # The synchronous record writer: SummaryWriter's thread dies on a full disk and flush() then waits for
        # ever.
        events = self._workdir / "tensorboard"
        events.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{os.uname().nodename}.{os.getpid()}.{step}"
        self._events = RecordWriter(str(events / name))
        self._event(file_version="brain.Event:2")
        # Tells TensorBoard to forget everything an earlier, killed run wrote from this step on.
        self._event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._events.flush()

    def scalars(self, step, values, split="train"):
        """Writes {name: number} of one step; in TensorBoard as split/name."""
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        line = {"step": int(step), "split": split}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        while data:  # a nearly full disk takes part of a line without an error; the rest then raises
            data = data[self._lines.write(data):]
        for name, value in values.items():
            self._event(step=int(step), summary=self._summary.scalar(f"{split}/{name}", value))
        self._events.flush()

    def images(self, step, images):
        """Writes {name: (B, H, W, 3) in [-1, 1]}, each as one grid, to previews/NAME_STEP.png and
        TensorBoard.
        """
        if not self._active:
            return
        directory = self._workdir / "previews"
        directory.mkdir(exist_ok=True)
        for name, batch in images.items():
            tiles = grid(batch)
            path = directory / f"{name}_{step:08d}.png"
            with whole(path) as partial:
                Image.fromarray(tiles).save(partial, format="PNG")
            self._event(step=int(step), summary=self._summary.image(f"preview/{name}", tiles, dataformats="HWC"))
        self._events.flush()

    def has_evaluation(self, step):
        """Whether the means of an evaluation after `step` are written; the same on all processes, which all ask."""
        found = False
        if self._active:
            lines = (self._workdir / "metrics.jsonl").read_bytes().splitlines()
            found = any(b'"eval"' in line and json.loads(line)["step"] == step for line in lines)
        return distributed.gather("an evaluation is written", found)[0]

    def has_images(self, step):
        """The same of previews."""
        found = self._active and any((self._workdir / "previews").glob(f"*_{step:08d}.png"))
        return distributed.gather("a preview is written", found)[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._active:
            self._lines.close()
            self._events.close()

    def _event(self, **fields):
        self._events.write(self._event_type(wall_time=time.time(), **fields).SerializeToString())


def _truncate(path, step):
    """Rewrites a metrics file without the lines after `step` and without a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                kept.append(line)
        except ValueError:  # cut off in mid-line when the run was killed
            continue
    with whole(path) as partial:
        partial.write_bytes(b"".join(kept))


def grid(images):
    """Returns (B, H, W, 3) images in [-1, 1] as one uint8 picture: near-square, row by row, 2 white pixels
    between.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"a preview must be (B, H, W, 3), not {images.shape}")
    count, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    pixels = np.rint((np.clip(np.nan_to_num(images), -1, 1) + 1) * 127.5).astype(np.uint8)
    picture = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, 3), 255, np.uint8)
    for i, tile in enumerate(pixels):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        picture[top:top + height, left:left + width] = tile
    return picture


class Progress:
    """A bar with steps/s, ETA and the last metrics on a terminal; one line per report anywhere else."""

    def __init__(self, start, steps):
        self._steps = steps
        self._speaks = jax.process_index() == 0
        self._bar = None
        if self._speaks and sys.stderr.isatty():
            self._bar = tqdm.tqdm(initial=start, total=steps, unit="step", dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()

    def advance(self):
        if self._bar is not None:
            self._bar.update()

    def report(self, step, values, split="train"):
        """values: {name: number}; "steps_per_second" among them also gives the time left."""
        rate = values.get("steps_per_second")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items()
                          if name != "steps_per_second" and (value > 1e-3 or not name.endswith("_seconds")))
        if self._bar is not None and split == "train":
            self._bar.set_postfix_str(shown)
        elif rate:
            left = tqdm.tqdm.format_interval((self._steps - step) / rate)
            self.say(f"step {step}/{self._steps}  {rate:.3g} steps/s  {left} left  {shown}")
        else:
            self.say(f"step {step}/{self._steps}  {split}  {shown}")

    def say(self, message):
        """Prints a line, above the bar if there is one. May be called from any thread."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        elif self._speaks:
            print(message, file=sys.stderr, flush=True)
