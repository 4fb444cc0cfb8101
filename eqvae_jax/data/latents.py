"""A cache of latents, written by python -m eqvae_jax.encode: reading it, and batches for training and evaluation.

What a cache holds is unscaled; LatentSpace is the one place where an autoencoder's scale and shift are applied.
"""

import concurrent.futures
import math
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import grain
import jax
import numpy as np

from eqvae_jax.data import latent_cache, latent_records
from eqvae_jax.data.order import INDEX_RANGE, Positions, Shuffled, rows_of_process

MEMORY_BUDGET = 2**31        # bytes of a cache that is kept in memory
_AHEAD = 4                   # batches read at a time; a batch's records are read by threads of their own
_CHUNK = 256                 # records read at a time into memory
_PREFETCH_BYTES = 2**29      # host memory for finished batches that wait
_REPAIR = "delete it and give the command of python -m eqvae_jax.encode again, which writes what is missing"


class LatentSpace(NamedTuple):
    """What latents mean: diffusion models see (z - shift) * scale of the autoencoder with this hash.

    reference: where its weights came from, for messages and for decoding.
    """

    scale: float
    shift: float
    hash: str
    reference: str

    @classmethod
    def of(cls, spec):
        """That of an autoencoder: spec has these four as attributes, as weights.AutoencoderSpec."""
        return cls(float(spec.scale), float(spec.shift), spec.hash, spec.reference)

    def to_model(self, z):
        """The autoencoder's latents (..., C) as diffusion models see them."""
        return (z - self.shift) * self.scale

    def to_autoencoder(self, z):
        """The inverse of `to_model`."""
        return z / self.scale + self.shift

    def require(self, other: "LatentSpace"):
        """Raises ValueError, which names both, unless `other` is of the same weights, scale and shift."""
        if self.hash != other.hash:
            raise ValueError(f"these latents are of {self.reference} (hash {self.hash}), and {other.reference} is "
                             f"another autoencoder (hash {other.hash}): name the one with the first hash.")
        if (self.scale, self.shift) != (other.scale, other.shift):
            raise ValueError(f"the latents of {self.reference} are scaled by {self.scale:g} after - {self.shift:g}, "
                             f"those of {other.reference} by {other.scale:g} after - {other.shift:g}: both must agree.")


class Latents:
    """An open cache; `manifest` is the dict of manifest.json, `shape` (h, w, C), `space` its LatentSpace."""

    def __init__(self, directory: pathlib.Path, manifest: dict):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.directory, self.manifest = directory, manifest
        self.shape = tuple(manifest["shape"])
        self.space = LatentSpace(*(manifest["autoencoder"][name] for name in LatentSpace._fields))
        counts = [entry["count"] for entry in manifest["shards"]]
        self._ends = np.cumsum(counts)
        self._records = ArrayRecordDataSource([
            _Whole(str(directory / entry["file"]), 0, n, n)
            for entry, n in zip(manifest["shards"], counts, strict=True)])

    def __len__(self):
        return self.manifest["count"]

    @property
    def nbytes(self) -> int:
        """Bytes of all moments as they are stored."""
        return len(self) * 4 * math.prod(self.shape) * np.dtype(latent_records.DTYPES[self.manifest["dtype"]]).itemsize

    def __getitem__(self, i: int) -> dict:
        """{"mean", "std", "mirror_mean", "mirror_std"}: float32 (h,w,C); "label"; "index", the image's in the source.

        Raises:
          ValueError: the record is damaged, which names its shard.
        """
        index, label, moments = self.read(i)
        (mean, std), (mirror_mean, mirror_std) = moments.astype(np.float32)
        return {"mean": mean, "std": std, "mirror_mean": mirror_mean, "mirror_std": mirror_std, "label": label,
                "index": index}

    def read(self, i: int) -> tuple[int, int, np.ndarray]:
        """(index, label, moments (2,2,h,w,C) as stored) of one latent, its checksum compared; errors as of [i]."""
        i = int(i)
        if not 0 <= i < len(self):
            raise IndexError(f"latent {i} of {len(self)} in {self.directory}")
        try:
            return latent_records.unpack(self._records[i], self.shape, self.manifest["dtype"])
        except Exception as error:  # the native reader has one exception type for everything
            shard = int(np.searchsorted(self._ends, i, side="right"))
            path = self.directory / self.manifest["shards"][shard]["file"]
            raise ValueError(f"{path}: latent {i} cannot be read ({error}): {_REPAIR}") from error

    def read_many(self, rows) -> list[tuple[int, int, np.ndarray]]:
        """What `read` gives, of many latents at once: two to four times faster each."""
        rows = [int(row) for row in rows]
        try:
            found = self._records.__getitems__(rows)
            return [latent_records.unpack(record, self.shape, self.manifest["dtype"]) for record in found]
        except Exception:  # one by one, the error says which
            return [self.read(row) for row in rows]

    def take(self, rows: np.ndarray, mirrored: np.ndarray) -> dict:
        """{"mean", "std": float32 (B,h,w,C), "label": int32 (B,)} of latents; mirrored: bool (B,), which of the two."""
        mean, std = (np.empty((len(rows), *self.shape), np.float32) for _ in range(2))
        label = np.empty(len(rows), np.int32)
        for b, (_, label[b], moments) in enumerate(self.read_many(rows)):
            mean[b], std[b] = moments[int(mirrored[b])]
        return {"mean": mean, "std": std, "label": label}

    def __repr__(self):
        return f"latents:{self.directory} ({len(self)} latents)"


def open_latents(reference: str | os.PathLike, verify: bool = False) -> Latents:
    """Opens a cache: DIR or latents:DIR.

    Every record's checksum is compared when it is read. verify: compares those of whole shards now, at the speed of
    reading all of them.

    Raises:
      ValueError: there is no complete cache of this version, or a shard is missing, truncated or damaged; names it.
    """
    directory = pathlib.Path(str(reference).removeprefix("latents:")).expanduser()
    manifest = latent_cache.read_json(directory / latent_cache.MANIFEST)
    if manifest is None:
        begun = (directory / latent_cache.PLAN).exists()
        raise ValueError(f"{directory} {'is an unfinished cache' if begun else 'holds no cache of latents'}: it has no "
                         f"{latent_cache.MANIFEST}, which python -m eqvae_jax.encode writes last"
                         f"{'; give its command again' if begun else ''}")
    found = manifest.get("format"), manifest.get("version")
    if found != (latent_cache.FORMAT, latent_cache.VERSION):
        raise ValueError(f"{directory / latent_cache.MANIFEST} is of format {found[0]!r}, version {found[1]!r}; this "
                         f"program reads {latent_cache.FORMAT!r}, version {latent_cache.VERSION}: encode again")
    for entry in manifest["shards"]:
        path = directory / entry["file"]
        if not path.is_file():
            raise ValueError(f"{path} is missing; give the command of python -m eqvae_jax.encode again")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise ValueError(f"{path} has {size} bytes instead of {entry['bytes']}: {_REPAIR}")
    if verify:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            sums = pool.map(latent_cache.sha256, [directory / entry["file"] for entry in manifest["shards"]])
            for entry, found in zip(manifest["shards"], sums, strict=True):
                if found != entry["sha256"]:
                    raise ValueError(f"{directory / entry['file']} is damaged, its SHA-256 is {found} instead of "
                                     f"{entry['sha256']}: {_REPAIR}")
    return Latents(directory, manifest)


def train_batches(latents: Latents, *, batch_size: int, seed: int, start_step: int = 0, mirror: bool = True,
                  in_memory: bool | str = "auto", memory_budget: int = MEMORY_BUDGET) -> Iterator[dict]:
    """Endless shuffled batches: this process's rows of the global batches start_step, start_step + 1, ...

    As data.images.train_batches: batch n holds the examples n*batch_size ... of one stream, in which every epoch is
    another permutation, a function of (seed, epoch).

    Args:
      latents: from open_latents.
      batch_size: of all processes together.
      seed: not negative.
      mirror: whether half of the latents, chosen by (seed, position), are those of the mirror images.
      in_memory: whether the cache is read into memory first; "auto" where it has at most memory_budget bytes. The
        batches are the same.
    Returns:
      An iterator (close() ends its threads) of dicts of numpy arrays: mean, std float32 (B,h,w,C), unscaled; label
      int32 (B,); index int32 (B,), the example's position in the stream modulo 2**31.
    Raises:
      ValueError: at once, for arguments that cannot work, or, while reading, for a damaged record.
    """
    _check(latents, batch_size)
    if seed < 0 or start_step < 0:
        raise ValueError(f"seed={seed} and start_step={start_step} must not be negative")
    order, positions = Shuffled(len(latents), seed), Positions.of_process(batch_size, start_step)
    store = _store(latents, in_memory, memory_budget)

    def batch(step):
        where = positions.batch(int(step))
        mirrored = order.coins(where) if mirror else np.zeros(len(where), bool)
        return store.take(order.records(where), mirrored) | {"index": (where % INDEX_RANGE).astype(np.int32)}

    return _read(grain.MapDataset.range(2**48).map(batch), store, batch_size)


def evaluation_batches(latents: Latents, batch_size: int, limit: int | None = None) -> "EvaluationBatches":
    """One pass over the cache in order, the same each time: this process's rows of the global batches.

    Args:
      batch_size: of all processes together.
      limit: how many latents, spread evenly over the cache; None for all.
    Returns:
      An iterable with len(), of batches like train_batches', without mirror images, where index is the latent's
      number in the cache, plus mask bool (B,): False for the padding of the last batch.
    Raises:
      ValueError: at once, for arguments that cannot work, or, while reading, for a damaged record.
    """
    _check(latents, batch_size)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    return EvaluationBatches(latents, batch_size, min(limit or len(latents), len(latents)))


class EvaluationBatches:
    """What evaluation_batches returns."""

    def __init__(self, latents, batch_size, count):
        self._latents, self._batch_size, self._count = latents, batch_size, count

    def __len__(self):
        return math.ceil(self._count / self._batch_size)

    def __iter__(self):
        positions = Positions.of_process(self._batch_size)

        def batch(step):
            where = positions.batch(int(step))
            # Past the end the last latent is repeated, so that every process has as many rows in every batch.
            rows = np.minimum(where, self._count - 1) * len(self._latents) // self._count
            latents = self._latents.take(rows, np.zeros(len(rows), bool))
            return latents | {"index": rows.astype(np.int32), "mask": where < self._count}

        return _read(grain.MapDataset.range(len(self)).map(batch), self._latents, self._batch_size)


class _Whole(NamedTuple):
    """A shard of which all records are read: spares Array Record opening each file to count them."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class _Resident:
    """A cache in memory."""

    def __init__(self, latents: Latents):
        self.shape = latents.shape
        self._moments = np.empty((len(latents), 2, 2, *latents.shape),                           # (N,2,2,h,w,C)
                                 latent_records.DTYPES[latents.manifest["dtype"]])
        self._labels = np.empty(len(latents), np.int32)

        for first in range(0, len(latents), _CHUNK):
            rows = range(first, min(first + _CHUNK, len(latents)))
            for i, (_, label, moments) in zip(rows, latents.read_many(rows), strict=True):
                self._labels[i], self._moments[i] = label, moments

    def take(self, rows, mirrored):
        chosen = self._moments[rows, mirrored.astype(np.int8)].astype(np.float32)                # (B,2,h,w,C)
        return {"mean": chosen[:, 0], "std": chosen[:, 1], "label": self._labels[rows]}


def _store(latents, in_memory, budget):
    if in_memory not in (True, False, "auto"):
        raise ValueError(f"in_memory={in_memory!r} is none of True, False and 'auto'")
    fits = latents.nbytes <= budget
    return _Resident(latents) if in_memory is True or (in_memory == "auto" and fits) else latents


def _check(latents, batch_size):
    if not len(latents):
        raise ValueError(f"{latents!r} holds no latent")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    rows_of_process(batch_size)


def _read(batches: grain.MapDataset, store, batch_size: int) -> Iterator[dict]:
    """Reads batches in order, ahead of the consumer."""
    size = 8 * math.prod(store.shape) * batch_size // jax.process_count()
    ahead = int(np.clip(_PREFETCH_BYTES // size, 2, _AHEAD))
    iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)))
    try:
        yield from iterator
    finally:
        iterator.close()
