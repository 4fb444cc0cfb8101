"""Batches of a cache of latents, for training and for evaluation: read ahead, or from memory."""

import math
from collections.abc import Iterator

import grain
import jax
import numpy as np

from eqvae_jax.data import latent_records
from eqvae_jax.data.latents import Latents, as_batch
from eqvae_jax.data.order import INDEX_RANGE, Positions, Shuffled, rows_of_process

MEMORY_BUDGET = 2**31        # bytes of a cache that is kept in memory
_AHEAD = 4                   # batches read at a time; a batch's records are read by threads of their own
_CHUNK = 256                 # records read at a time into memory
_PREFETCH_BYTES = 2**29      # host memory for finished batches that wait


def train_batches(latents: Latents, *, batch_size: int, seed: int, start_step: int = 0, mirror: bool = True,
                  images: bool = False, in_memory: bool | str = "auto",
                  memory_budget: int = MEMORY_BUDGET) -> Iterator[dict]:
    """Endless shuffled batches: this process's rows of the global batches start_step, start_step + 1, ...

    As data.images.train_batches: batch n holds the examples n*batch_size ... of one stream, in which every epoch is
    another permutation, a function of (seed, epoch).

    Args:
      latents: from open_latents.
      batch_size: of all processes together.
      seed: not negative.
      mirror: whether half of the latents, chosen by (seed, position), are those of the mirror images.
      images: whether batches have "image" too, uint8 (B,H,W,3), mirrored where the latent is.
      in_memory: whether the cache is read into memory first; "auto" where it has at most memory_budget bytes. The
        batches are the same.
    Returns:
      An iterator (close() ends its threads) of dicts of numpy arrays: mean, std float32 (B,h,w,C), unscaled, or tokens
      int32 (B,h,w); label int32 (B,); index int32 (B,), the example's position in the stream modulo 2**31.
    Raises:
      ValueError: at once, for arguments that cannot work, or, while reading, for a damaged record.
    """
    _check(latents, batch_size, images)
    if seed < 0 or start_step < 0:
        raise ValueError(f"seed={seed} and start_step={start_step} must not be negative")
    order, positions = Shuffled(len(latents), seed), Positions.of_process(batch_size, start_step)
    store = _store(latents, in_memory, memory_budget, images)

    def batch(step):
        where = positions.batch(int(step))
        mirrored = order.coins(where) if mirror else np.zeros(len(where), bool)
        found = store.take(order.records(where), mirrored, images)
        return found | {"index": (where % INDEX_RANGE).astype(np.int32)}

    return _read(grain.MapDataset.range(2**48).map(batch), latents, batch_size, images)


def evaluation_batches(latents: Latents, batch_size: int, limit: int | None = None,
                       images: bool = False) -> "EvaluationBatches":
    """One pass over the cache in order, the same each time: this process's rows of the global batches.

    Args:
      batch_size: of all processes together.
      limit: how many latents, spread evenly over the cache; None for all.
      images: as of train_batches.
    Returns:
      An iterable with len(), of batches like train_batches', without mirror images, where index is the latent's
      number in the cache, plus mask bool (B,): False for the padding of the last batch.
    Raises:
      ValueError: at once, for arguments that cannot work, or, while reading, for a damaged record.
    """
    _check(latents, batch_size, images)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    return EvaluationBatches(latents, batch_size, min(limit or len(latents), len(latents)), images)


class EvaluationBatches:
    """What evaluation_batches returns."""

    def __init__(self, latents, batch_size, count, images):
        self._latents, self._batch_size, self._count, self._images = latents, batch_size, count, images

    def __len__(self):
        return math.ceil(self._count / self._batch_size)

    def __iter__(self):
        positions = Positions.of_process(self._batch_size)

        def batch(step):
            where = positions.batch(int(step))
            # Past the end the last latent is repeated, so that every process has as many rows in every batch.
            rows = np.minimum(where, self._count - 1) * len(self._latents) // self._count
            latents = self._latents.take(rows, np.zeros(len(rows), bool), self._images)
            return latents | {"index": rows.astype(np.int32), "mask": where < self._count}

        return _read(grain.MapDataset.range(len(self)).map(batch), self._latents, self._batch_size, self._images)


class _Resident:
    """A cache in memory."""

    def __init__(self, latents: Latents, images: bool):
        self._of_batch = np.int32 if latents.is_tokens else np.float32
        shape = latent_records.stored_shape(latents.shape, latents.dtype)
        self._latents = np.empty((len(latents), *shape), latents.dtype)  # (N,2,2,h,w,C) or (N,2,h,w)
        self._labels = np.empty(len(latents), np.int32)
        self._images = np.empty((len(latents), *latents.image_shape), np.uint8) if images else None

        for first in range(0, len(latents), _CHUNK):
            rows = range(first, min(first + _CHUNK, len(latents)))
            for i, record in zip(rows, latents.read_many(rows), strict=True):
                self._labels[i], self._latents[i] = record.label, record.latent
                if images:
                    self._images[i] = record.pixels()

    def take(self, rows, mirrored, images=False):
        latent = self._latents[rows, mirrored.astype(np.int8)].astype(self._of_batch)
        return as_batch(latent, self._labels[rows], self._images[rows] if images else None, mirrored)


def _store(latents, in_memory, budget, images):
    if in_memory not in (True, False, "auto"):
        raise ValueError(f"in_memory={in_memory!r} is none of True, False and 'auto'")
    fits = latents.nbytes + images * latents.image_bytes <= budget
    return _Resident(latents, images) if in_memory is True or (in_memory == "auto" and fits) else latents


def _check(latents, batch_size, images):
    if not len(latents):
        raise ValueError(f"{latents!r} holds no latent")
    if images and not latents.image_shape:
        raise ValueError(f"{latents!r} holds no images, which are to be looked at beside the latents: encode again "
                         "with --keep_images")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    rows_of_process(batch_size)


def _read(batches: grain.MapDataset, latents: Latents, batch_size: int, images: bool) -> Iterator[dict]:
    """Reads batches in order, ahead of the consumer."""
    one = 8 * math.prod(latents.shape) + images * math.prod(latents.image_shape or ())
    size = one * batch_size // jax.process_count()
    ahead = int(np.clip(_PREFETCH_BYTES // size, 2, _AHEAD))
    iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)))
    try:
        yield from iterator
    finally:
        iterator.close()
