"""Where images come from: one reference string names a random-access source of examples."""

import copy
import glob
import hashlib
import os
import re
from pathlib import Path
from typing import Protocol

import numpy as np

from eqvae_jax.data import records
from eqvae_jax.data.decoding import EXTENSIONS, BrokenExample, decode
from eqvae_jax.data.idx import IdxSource
from eqvae_jax.data.photos import PhotoSource

__all__ = ["BrokenExample", "Source", "open_source"]

FORMS = """the forms are
  photos[:train|:test|:all]        photographs that ship inside scikit-image, scikit-learn and matplotlib
  folder:DIR                       image files under a folder, in its subfolders too
  arrayrecord:GLOB                 shards written by python -m eqvae_jax.data.preparation
  tfds:NAME[/CONFIG][:SPLIT]       a prepared TensorFlow dataset in ArrayRecord format
  idx:DIR[:train|:test]            MNIST-format files"""


class Source(Protocol):
    """A random-access collection of images: picklable (it travels to worker processes), stable `repr`.

    A source of image files also has `file(i) -> bytes`, the file as it is, and `at_least(side) -> Source`: the same
    examples, decoded more cheaply, with short sides that may be reduced to no less than `side` pixels. One that knows
    what its labels are called has `class_names`, a list of them in order, or None.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict:
        """{"image": uint8 (H,W,3) of any size, "label": int}; raises BrokenExample."""

    def name(self, i: int) -> str:
        """The file name or key of example i, for messages."""


def open_source(reference: str) -> Source:
    """Opens the images that a reference names; nothing is decoded yet.

    Raises:
      ValueError: the reference is not of a known form, or names nothing readable, with what to do.
    """
    kind, _, rest = str(reference).partition(":")
    if kind == "photos":
        return PhotoSource(rest or "train")
    openers = {"folder": FolderSource, "arrayrecord": ArrayRecordSource, "tfds": TfdsSource,
               "idx": IdxSource.parse}
    if kind not in openers:
        raise ValueError(f"{reference!r} is not a reference to images; {FORMS}")
    if not rest:
        raise ValueError(f"{reference!r} names nothing after {kind + ':'!r}; {FORMS}")
    return openers[kind](rest)


def fingerprint(source: Source) -> str:
    """ "12 examples, 0f3a52c1": how many there are, and a hash of what they are called, or of their shards' sizes."""
    names = source.shards if hasattr(source, "shards") else (source.name(i) for i in range(len(source)))
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape"))
    return f"{len(source):,} examples, {digest.hexdigest()[:8]}"


class FolderSource:
    """Image files under a folder, recursively, in the order of their relative paths.

    The label is the index of the first-level subfolder, among those that hold images, in sorted order; it is
    0 for all where any image lies directly in the folder. Hidden files and folders are skipped.
    """

    def __init__(self, directory: str):
        self._root = os.path.expanduser(directory)
        self._min_side = None
        if not os.path.isdir(self._root):
            what = "is a file, not a folder" if os.path.exists(self._root) else "does not exist"
            raise ValueError(f"folder:{directory}: {what}")
        self._files = sorted(_image_files(self._root))
        if not self._files:
            raise ValueError(f"folder:{directory}: holds no image file at any depth ({' '.join(EXTENSIONS)})")
        tops = [file.partition("/")[0] if "/" in file else None for file in self._files]
        classes = {} if None in tops else {top: k for k, top in enumerate(sorted(set(tops)))}
        self.class_names = list(classes) or None
        self._labels = np.array([classes.get(top, 0) for top in tops], np.int32)

    def __len__(self):
        return len(self._files)

    def __getitem__(self, i):
        path = os.path.join(self._root, self._files[i])
        return {"image": decode(path, self.name(i), self._min_side), "label": int(self._labels[i])}

    def file(self, i):
        return Path(self._root, self._files[i]).read_bytes()

    def name(self, i):
        return self._files[i]

    def at_least(self, side):
        return _with_min_side(self, side)

    def __repr__(self):
        return f"folder:{self._root} ({len(self)} images)"


class ArrayRecordSource:
    """Records of ArrayRecord shards, in the sorted order of the shards (format: data/records.py)."""

    def __init__(self, pattern: str):
        from array_record.python import array_record_data_source

        self._pattern, self._min_side = os.path.expanduser(pattern), None
        paths = sorted(glob.glob(self._pattern, recursive=True))
        if not paths:
            raise ValueError(f"arrayrecord:{pattern}: no such file; python -m eqvae_jax.data.preparation "
                             "--images=folder:DIR --output=DIR writes shards")
        for path in paths:
            if os.path.isdir(path):
                raise ValueError(f"arrayrecord:{pattern}: {path} is a folder; name the shards in it, "
                                 f"arrayrecord:{path}/*.array_record")
            records.count(path)  # here, because the data source's own error names no file
        self.shards = [f"{os.path.basename(path)} of {os.path.getsize(path)} bytes" for path in paths]
        self._records = array_record_data_source.ArrayRecordDataSource(paths)
        if not len(self._records):
            raise ValueError(f"arrayrecord:{pattern}: {len(paths)} shards without a single record")

    def __len__(self):
        return len(self._records)

    def __getitem__(self, i):
        try:
            example = records.unpack(self._records[i])
        except Exception as error:  # the native reader has one exception type for everything
            raise BrokenExample(self.name(i), f"unreadable record ({error})") from error
        name = f"{self.name(i)} ({example['name']})" if example["name"] else self.name(i)
        return {"image": decode(example["image"], name, self._min_side), "label": example["label"]}

    def file(self, i):
        return records.unpack(self._records[i])["image"]

    def name(self, i):
        return f"record {i} of {self._pattern}"

    def at_least(self, side):
        return _with_min_side(self, side)

    def __repr__(self):
        return f"arrayrecord:{self._pattern} ({len(self)} images)"


class TfdsSource:
    """A prepared dataset of tensorflow_datasets, read through `tfds.data_source`, without TensorFlow.

    NAME[/CONFIG][:VERSION][:SPLIT], the split "train" unless given, with tfds' slices (train[:10%]). The
    dataset needs a feature `image`; `label` is read where there is one, else it is 0. The folder of datasets
    is tfds' own: TFDS_DATA_DIR, or ~/tensorflow_datasets.
    """

    def __init__(self, rest: str):
        match = re.fullmatch(r"([^:\[\]]+)(?::(\d+\.\d+\.\d+))?(?::(.+))?", rest)
        if not match:
            raise ValueError(f"tfds:{rest} is not of the form tfds:NAME[/CONFIG][:VERSION][:SPLIT]")
        name, version, split = match.groups()
        dataset, split = f"{name}:{version}" if version else name, split or "train"
        self._key, self._min_side = f"{dataset}:{split}", None
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ValueError(f"tfds:{rest}: {error}; pip install tensorflow-datasets") from error
        try:
            # tfds itself reads the variable once, on import.
            builder = tfds.builder(dataset, data_dir=os.environ.get("TFDS_DATA_DIR"))
            if not builder.is_prepared():
                raise ValueError(f"there is no {builder.data_path}")
            features = builder.info.features
            # Undecoded, so that every source shares one decoder and its checks.
            decoders = {"image": tfds.decode.SkipDecoding()} if "image" in features else None
            self._records = builder.as_data_source(split=split, decoders=decoders)
        except Exception as error:  # tfds raises a dozen types here, and prose of its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"tfds:{rest} cannot be read: {reason}\n"
                "It must be prepared once, on any machine with TensorFlow:\n"
                "  pip install tensorflow tensorflow-datasets\n"
                f"  tfds build {name} --file_format=array_record\n"
                "in the folder that TFDS_DATA_DIR names "
                f"(now {os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')})") from error
        if "image" not in features:
            raise ValueError(f"tfds:{rest} has no feature 'image', only {sorted(features)}")
        self._labelled = "label" in features
        self.class_names = list(getattr(features["label"], "names", ())) or None if self._labelled else None
        if not len(self._records):
            raise ValueError(f"tfds:{rest} holds no example")

    def __len__(self):
        return len(self._records)

    def __getitem__(self, i):
        try:
            example = self._records[i]
        except Exception as error:
            raise BrokenExample(self.name(i), f"unreadable record ({error})") from error
        image = decode(example["image"], self.name(i), self._min_side)
        return {"image": image, "label": int(example["label"]) if self._labelled else 0}

    def file(self, i):
        return self._records[i]["image"]

    def name(self, i):
        return f"record {i} of tfds:{self._key}"

    def at_least(self, side):
        return _with_min_side(self, side)

    def __repr__(self):
        return f"tfds:{self._key} ({len(self)} images)"


def _with_min_side(source, side: int):
    source = copy.copy(source)
    source._min_side = side
    return source


def _image_files(root: str):
    """Yields the relative paths, with forward slashes, of the image files under root."""
    seen = set()  # links are followed (dataset folders are often made of them), but never in a circle
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield Path(folder, name).relative_to(root).as_posix()
