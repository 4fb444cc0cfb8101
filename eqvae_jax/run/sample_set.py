"""A set of samples while it is made: on disk, so that it goes on where it was stopped, and agreed on by all hosts."""

import json
import pathlib

import jax
import numpy as np

from eqvae_jax import distributed
from eqvae_jax.atomic import whole


def partial_path(output):
    output = pathlib.Path(output).expanduser()
    return output.with_name(f"{output.name}.unfinished")


def begin(output, size, settings):
    """(the set's Unfinished on the first host and None on others, the number of its next image).

    Raises ValueError as Unfinished does.
    """
    unfinished, start = None, 0
    if jax.process_index() == 0:
        unfinished = Unfinished(partial_path(output), size, settings)
        start = unfinished.count // settings["batch"] * settings["batch"]
    return unfinished, distributed.gather("where the set goes on", start)[0]


class Unfinished:
    """The images of a set that is being made, raw and in order, and beside them, in JSON, how they are made."""

    def __init__(self, path, size, settings):
        """Raises ValueError, naming what differs, where a file of another set is at `path`."""
        self.path, self.size = path, size
        self._settings, self._bytes = json.dumps(settings, sort_keys=True), 3 * size[0] * size[1]
        self._beside = path.with_suffix(".json")
        if self._beside.exists():
            then, now = json.loads(self._beside.read_text()), json.loads(self._settings)
            different = [key for key in now if then.get(key) != now[key]]
            if different:
                raise ValueError(f"{path} holds the beginning of another set, with other {', '.join(different)}: give "
                                 f"its command to finish it, or delete it and {self._beside.name}.")
        else:
            with whole(self._beside) as partial:
                partial.write_text(self._settings + "\n")
            path.unlink(missing_ok=True)

    @property
    def count(self):
        """How many whole images are there."""
        return self.path.stat().st_size // self._bytes if self.path.exists() else 0

    def __enter__(self):
        self._file = open(self.path, "r+b" if self.path.exists() else "w+b")
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, first, images):
        """Puts images (N,H,W,3) at number `first` and on; what was behind is cut off."""
        self._file.seek(first * self._bytes)
        self._file.write(images.tobytes())
        self._file.truncate()
        self._file.flush()

    def batches(self, rows=500):
        """Yields the images, uint8 (<= rows, H, W, 3)."""
        everything = np.memmap(self.path, np.uint8, "r").reshape(-1, *self.size, 3)
        for first in range(0, len(everything), rows):
            yield everything[first : first + rows]

    def remove(self):
        self._beside.unlink()
        self.path.unlink()
