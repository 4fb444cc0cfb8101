"""Batches of cropped images for training (infinite, shuffled) and evaluation (one pass, in order).

Every random number of training example p, counted from the start of the run, comes from (seed, p), so a run
continued at any step, on any number of processes and with any number of workers, sees the same examples.
"""

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

import grain
import jax
import numpy as np
from absl import flags, logging

from eqvae_jax.data.cropping import center_crop, random_crop, side_for_random_crop
from eqvae_jax.data.decoding import BrokenExample
from eqvae_jax.data.order import INDEX_RANGE, Positions, Shuffled, rows_of_process
from eqvae_jax.data.sources import Source

_NEIGHBOURS = 1000           # how many records are tried in place of a broken one
_BEFORE_JUDGING = 100        # examples seen before a fraction of broken ones means anything
_PREFETCH_BYTES = 2**29      # host memory for finished examples that wait
_TASK_PIXELS = 256**2        # what a thread makes at a time: one image of 256 pixels, or several smaller ones


class TooManyBroken(RuntimeError):
    """More of the images cannot be read than `broken_limit` allows."""


def train_batches(source: Source, *, image_size: int, batch_size: int, seed: int, crop: str = "random",
                  flip: bool = False, min_crop: float = 0.5, max_crop: float = 1.0, start_step: int = 0,
                  workers: int = 0, broken_limit: float = 0.01,
                  on_broken: Callable[[str, str], None] | None = None) -> Iterator[dict]:
    """Endless shuffled batches: this process's rows of the global batches start_step, start_step + 1, ...

    Batch n holds the examples n*batch_size ... of one stream, in which every epoch is another permutation,
    a function of (seed, epoch); process k of P has the k-th of P equal slices.

    A record that cannot be read is replaced by the next readable one in the source's order, reported once
    by name (log and on_broken) and counted, per process.

    Args:
      source: from data.sources.open_source.
      image_size: side of the result.
      batch_size: of all processes together.
      seed: not negative.
      crop: "random", the released code's random square of min_crop..max_crop of the short side, or
        "center", ADM's centre crop.
      flip: whether half of the images are mirrored left to right. The released code mirrors none.
      workers: processes that read and decode; 0 uses threads of this one. Scripts that ask for workers need
        the `if __name__ == "__main__":` guard of Python's multiprocessing.
      broken_limit: the largest tolerated fraction of broken examples.
      on_broken: called with (name, reason), once for each broken record, in this process.
    Returns:
      An iterator (close() ends its workers) of dicts of numpy arrays: image uint8 (B,S,S,3), label int32
      (B,), index int32 (B,), the example's position in the stream modulo 2**31.
    Raises:
      ValueError: at once, for arguments that cannot work.
      TooManyBroken: while iterating, when broken_limit is exceeded after at least 100 examples, or when
        no readable record is found.
    """
    rows = _check(source, image_size, batch_size, min_crop, max_crop, broken_limit)
    if crop not in ("random", "center"):
        raise ValueError(f"crop={crop!r} is neither 'random' nor 'center'")
    if seed < 0 or start_step < 0 or workers < 0:
        raise ValueError(f"seed={seed}, start_step={start_step} and workers={workers} must not be negative")

    def drawn(position):
        return np.random.default_rng((seed, position))

    def enough(position):
        return side_for_random_crop(image_size, drawn(position), min_crop, max_crop)

    def cut(image, position):
        rng = drawn(position)
        if crop == "random":
            return random_crop(image, image_size, rng, min_crop, max_crop, flip)
        image = center_crop(image, image_size)
        return image[:, ::-1] if flip and rng.random() < 0.5 else image

    positions = Positions.of_process(batch_size, start_step)
    load = _Load(source, Shuffled(len(source), seed), cut, enough if crop == "random" else None)
    if workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain hands absl flags to its workers; notebooks never parse them
    tally = _Tally(source, broken_limit, on_broken)

    def iterate():
        for batch in _read(load, positions, rows, image_size, workers):
            tally.add(batch["broken"], batch["image"] is None)
            yield {key: batch[key] for key in ("image", "label", "index")}

    return iterate()


def evaluation_batches(source: Source, *, image_size: int, batch_size: int, limit: int | None = None,
                       crops: int = 1, min_crop: float = 0.5, max_crop: float = 1.0, broken_limit: float = 0.01,
                       on_broken: Callable[[str, str], None] | None = None,
                       whole: bool = False) -> "EvaluationBatches":
    """One pass over the source in order, the same each time: this process's rows of the global batches.

    Args:
      source, image_size, batch_size, min_crop, max_crop, broken_limit, on_broken: as for train_batches.
      limit: how many records, spread evenly over the source (a folder is sorted by class); None for all.
      crops: 1 takes ADM's centre crop of each record. More take that many random crops of min_crop..max_crop
        of the short side, the same on every call: for sources of few, large images such as `photos:test`.
      whole: every process gets all rows.
    Returns:
      An iterable with len(), of batches like train_batches', where index is the record's number, plus mask
      bool (B,): False for the padding of the last batch and where a record was broken and stands
      replaced, so that both are left out of means.
    Raises:
      ValueError, TooManyBroken: as train_batches.
    """
    rows = _check(source, image_size, batch_size, min_crop, max_crop, broken_limit, whole)
    if crops < 1 or (limit is not None and limit < 1):
        raise ValueError(f"crops={crops} and limit={limit} must be at least 1")
    n = len(source) if limit is None else min(limit, len(source))
    records = np.repeat(np.arange(n) * len(source) // n, crops)

    def cut(image, position):
        if crops == 1:
            return center_crop(image, image_size)
        return random_crop(image, image_size, np.random.default_rng(position), min_crop, max_crop)

    return EvaluationBatches(source, records, cut, image_size, batch_size, rows, broken_limit, on_broken)


class EvaluationBatches:
    """What evaluation_batches returns."""

    def __init__(self, source, records, cut, image_size, batch_size, rows, broken_limit, on_broken):
        self._source, self._records, self._cut, self._size = source, records, cut, image_size
        self._batch_size, self._rows, self._broken_limit, self._on_broken = batch_size, rows, broken_limit, on_broken

    def __len__(self):
        return math.ceil(len(self._records) / self._batch_size)

    def __iter__(self):
        total = len(self._records)
        positions = np.arange(len(self) * self._batch_size).reshape(len(self), -1, self._rows)
        mine = jax.process_index() if self._rows < self._batch_size else 0
        positions = positions[:, mine].ravel()                                    # this process's rows

        # Past the end the last example is repeated, so that every process has as many rows in every batch.
        padded = np.minimum(positions, total - 1)
        load = _Load(self._source, self._records, self._cut)
        tally = _Tally(self._source, self._broken_limit, self._on_broken)
        for step, batch in enumerate(_read(load, padded, self._rows, self._size, workers=0)):
            mask = positions[step * self._rows : (step + 1) * self._rows] < total
            broken = batch["broken"]
            tally.add(broken[: mask.sum()], batch["image"] is None)  # the padding is last
            mask &= np.array([not reasons for reasons in broken])
            yield {"image": batch["image"], "label": batch["label"], "index": batch["record"], "mask": mask}


class _Load:
    """Stream position -> example. What was broken on the way travels with it, also between processes.

    enough: position -> the short side that its crop can do with, for sources that decode smaller images faster.
    """

    def __init__(self, source, order, cut, enough=None):
        self.source, self._order, self._cut = source, order, cut
        self._enough = enough if hasattr(source, "at_least") else None

    def __call__(self, position):
        position, broken = int(position), []
        source = self.source.at_least(self._enough(position)) if self._enough else self.source
        wanted = int(self._order[position])
        found = {"image": None, "label": 0, "broken": broken,
                 "record": wanted, "index": position % INDEX_RANGE}
        for neighbour in range(min(len(source), _NEIGHBOURS)):
            try:
                example = source[(wanted + neighbour) % len(source)]
            except BrokenExample as error:
                broken.append((error.name, error.reason))
                continue
            return found | {"image": self._cut(example["image"], position), "label": example["label"]}
        return found  # without an image: the consumer stops the run, where an exception keeps its type


class _Tally:
    """Counts and reports broken examples, and stops the run when there are too many."""

    def __init__(self, source, limit, on_broken):
        self._source, self._limit, self._on_broken = source, limit, on_broken
        self._seen = self._broken = 0
        self._reasons = {}  # name -> reason

    def add(self, examples: list, hopeless: bool = False):
        """examples: for each, the list of (name, reason) of what was broken on the way to it."""
        self._seen += len(examples)
        self._broken += sum(bool(broken) for broken in examples)
        for name, reason in (pair for broken in examples for pair in broken):
            if name not in self._reasons:
                self._reasons[name] = reason
                logging.warning("Broken image replaced by the next one: %s: %s", name, reason)
                if self._on_broken is not None:
                    self._on_broken(name, reason)
        too_many = self._seen >= _BEFORE_JUDGING and self._broken > self._limit * self._seen
        if hopeless or too_many:
            first = "".join(f"\n  {name}: {reason}" for name, reason in list(self._reasons.items())[:5])
            what = ("no readable image was found" if hopeless else f"{self._broken} of {self._seen} examples "
                    f"are broken, and broken_limit={self._limit:g} is exceeded")
            raise TooManyBroken(f"{self._source!r}: {what}. The first:{first}\n"
                                "Repair or remove them, or raise broken_limit if they may be left out.")


def _check(source, image_size, batch_size, min_crop, max_crop, broken_limit, whole=False) -> int:
    """How many rows of each global batch are this process's, or all of them."""
    if len(source) == 0:
        raise ValueError(f"{source!r} holds no example")
    if image_size < 1 or batch_size < 1:
        raise ValueError(f"image_size={image_size} and batch_size={batch_size} must be at least 1")
    if not 0 < min_crop <= max_crop <= 1:
        raise ValueError(f"min_crop={min_crop}, max_crop={max_crop}: 0 < min_crop <= max_crop <= 1 must hold")
    if not 0 <= broken_limit <= 1:
        raise ValueError(f"broken_limit={broken_limit} is not a fraction between 0 and 1")
    return batch_size if whole else rows_of_process(batch_size)


def _read(load: _Load, positions: Sequence[int], rows: int, image_size: int, workers: int) -> Iterator[dict]:
    """Reads examples in order, ahead of the consumer, and stacks them."""
    # Handing work to a thread costs half a millisecond, more than a small image itself: they are read by the dozen.
    dozen = next(n for n in range(rows, 0, -1) if rows % n == 0 and (n == 1 or n * image_size**2 <= _TASK_PIXELS))
    dozen = rows if workers else dozen

    def some(i):
        return [load(positions[i * dozen + k]) for k in range(dozen)]

    examples = grain.MapDataset.range(len(positions) // dozen).map(some)
    if workers:
        # Whole batches cross between processes, in shared memory: worker i makes batches i, i + workers, ...
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        batches = examples.map(_stack).to_iter_dataset(grain.ReadOptions(1, 1))
        batches = batches.mp_prefetch(options, worker_init_fn=_begin_worker)
    else:
        # Threads share the work of one batch, so the first is there early.
        threads = min(16, 2 * (os.cpu_count() or 1))
        if dozen > 1 and not hasattr(load.source, "at_least"):
            threads = 1  # nothing to decode: only short calls, and threads that take turns at them are 3 times slower
        ahead = min(4 * rows, _PREFETCH_BYTES // (3 * image_size**2)) // dozen
        read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
        batches = examples.to_iter_dataset(read).batch(rows // dozen, batch_fn=lambda lists: _stack(sum(lists, [])))
    iterator = iter(batches)
    try:
        yield from iterator
    finally:
        iterator.close()


def _begin_worker(worker: int, workers: int):
    """Lets a worker end when its parent does, and not before."""
    # Ctrl-C and schedulers signal all processes of a job; the parent then still needs batches up to its save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)  # the parent was killed and could not say so

    threading.Thread(target=follow, daemon=True).start()


def _stack(examples) -> dict:
    """Examples -> a batch; no image at all where one example has none."""
    whole = all(e["image"] is not None for e in examples)
    return {
        "image": np.stack([e["image"] for e in examples]) if whole else None,     # (B,S,S,3)
        "label": np.array([e["label"] for e in examples], np.int32),
        "index": np.array([e["index"] for e in examples], np.int32),
        "record": np.array([e["record"] for e in examples], np.int32),
        "broken": [e["broken"] for e in examples],
    }
