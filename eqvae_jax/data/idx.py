"""MNIST-format (IDX) files, plain or gzipped: MNIST, Fashion-MNIST, KMNIST, QMNIST in their usual names."""

import gzip
import os
import struct

import numpy as np

from eqvae_jax.data.decoding import rgb8

_STEMS = {"train": "train", "test": "t10k"}
_MAX_BYTES = 2**34  # a damaged header can announce anything


class IdxSource:
    """The images and labels of one split, held in memory as they are in the files."""

    def __init__(self, directory: str, split: str = "train"):
        self._directory, self._split = os.path.expanduser(directory), split
        if split not in _STEMS:
            raise ValueError(f"idx:{directory}:{split}: the splits are {' and '.join(_STEMS)}")
        if not os.path.isdir(self._directory):
            raise ValueError(f"idx:{directory}: there is no such folder")
        self._load()

    @classmethod
    def parse(cls, rest: str) -> "IdxSource":
        """DIR[:train|:test]; train unless given."""
        directory, _, split = rest.rpartition(":")
        if not directory or os.path.isdir(os.path.expanduser(rest)):  # the colon is part of the folder's name
            return cls(rest)
        return cls(directory, split)

    def _load(self):
        self._images = _read(self._find("images", 3), dimensions=3)
        self._labels = _read(self._find("labels", 1), dimensions=1)
        if len(self._images) != len(self._labels):
            raise ValueError(f"{self!r}: {len(self._images)} images but {len(self._labels)} labels; "
                             "the two files are not of one data set")
        if self._images.size == 0:
            raise ValueError(f"{self!r}: the files hold no image")

    def _find(self, what: str, dimensions: int) -> str:
        stem = _STEMS[self._split]
        names = [f"{stem}-{what}{dot}idx{dimensions}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
        for name in names:
            if os.path.isfile(path := os.path.join(self._directory, name)):
                return path
        raise ValueError(f"{self._directory} lacks {names[0]} or {names[1]}")

    def __len__(self):
        return len(self._images)

    def __getitem__(self, i):
        return {"image": rgb8(self._images[i], self.name(i)), "label": int(self._labels[i])}

    def name(self, i):
        return f"image {i} of {self._directory} ({self._split})"

    def __repr__(self):
        return f"idx:{self._directory}:{self._split}"

    def __getstate__(self):  # a worker process reads the files again rather than receiving them in a pipe
        return {"_directory": self._directory, "_split": self._split}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._load()


def _read(path: str, dimensions: int) -> np.ndarray:
    """One IDX file: uint8 array with that many dimensions (http://yann.lecun.com/exdb/mnist)."""
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions:
                raise ValueError(f"{path}: {len(header)} bytes are too few for a header")
            magic, *shape = struct.unpack(f">{1 + dimensions}I", header)
            if magic != 0x800 + dimensions:
                raise ValueError(f"{path}: starts with {magic:#010x}, not {0x800 + dimensions:#010x} "
                                 f"(unsigned bytes in {dimensions} dimensions)")
            size = int(np.prod([int(n) for n in shape], dtype=object))
            if size > _MAX_BYTES:
                raise ValueError(f"{path}: its header announces {size} bytes; it is damaged")
            if opener is open and os.path.getsize(path) != len(header) + size:
                raise ValueError(f"{path}: {os.path.getsize(path)} bytes, but its header announces "
                                 f"{len(header) + size}; it is truncated or damaged")
            data = file.read(size + 1)
    except (OSError, EOFError) as error:  # gzip.BadGzipFile is an OSError
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(data) != size:
        raise ValueError(f"{path}: its header announces {size} bytes of data, but there are "
                         f"{'more' if len(data) > size else len(data)}; it is truncated or damaged")
    return np.frombuffer(data, np.uint8).reshape(shape)
