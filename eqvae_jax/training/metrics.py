"""From device scalars and per-example values to the numbers that are logged."""

import contextlib
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from eqvae_jax.training.sharding import put

# Steps the host may run ahead of the device. Each holds its batch in device memory; two keep the device busy.
STEPS_AHEAD = 2


class Interval:
    """Metrics and time between two log lines. Metrics stay on the device until `means` fetches them all at
    once.
    """

    def __init__(self, ledger, utilisation=lambda: None):
        """ledger: a CompileLedger, for the seconds spent compiling. utilisation: () -> that of one example a second,
        for MFU, or None; `means` asks for it after taking the time, so that waiting for it counts in no rate.
        """
        self._ledger, self._utilisation = ledger, utilisation
        self._restart()

    def _restart(self):
        self._metrics, self._rows, self._spent = [], 0, dict.fromkeys(("input", "checkpoint", "evaluation"), 0.0)
        self._begun, self._compiled = time.monotonic(), self._ledger.seconds

    def add(self, metrics, rows):
        """Takes one step's {name: device scalar} and its global batch size; waits for a step further back."""
        self._metrics.append(metrics)
        self._rows += rows
        if len(self._metrics) > STEPS_AHEAD:
            jax.block_until_ready(self._metrics[-1 - STEPS_AHEAD])

    @contextlib.contextmanager
    def spending(self, what):
        """Around waiting for "input", and around a "checkpoint" or an "evaluation", which do not count in the rates."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._spent[what] += time.monotonic() - begun

    def means(self):
        """Returns {name: mean} with steps_per_second, images_per_second and where time went, and begins anew.

        compile_, checkpoint_ and evaluation_seconds; input_wait, the share of training time in which the device may
        have stood still because no batch was there; goodput, the share of all time that was neither of these waits
        (compiling counts in, as programs are also compiled beside training); and mfu, where the peak is known.
        The mean is over the steps that reported the name with a finite number (a skipped update may have
        none, and should not hide the others); NaN where there is no such step.
        """
        fetched = jax.device_get(self._metrics)
        whole, spent = time.monotonic() - self._begun, self._spent
        seconds = whole - spent["checkpoint"] - spent["evaluation"]
        means = {}
        for name in dict.fromkeys(name for metrics in fetched for name in metrics):
            column = np.array([metrics[name] for metrics in fetched if name in metrics], np.float64)
            finite = column[np.isfinite(column)]
            means[name] = float(finite.mean()) if finite.size else float("nan")
        means |= {"steps_per_second": len(fetched) / seconds, "images_per_second": self._rows / seconds,
                  "compile_seconds": self._ledger.seconds - self._compiled,
                  "checkpoint_seconds": spent["checkpoint"], "evaluation_seconds": spent["evaluation"],
                  "input_wait": spent["input"] / seconds, "goodput": (seconds - spent["input"]) / whole}
        utilisation = self._utilisation()
        if utilisation:
            means["mfu"] = means["images_per_second"] * utilisation
        self._restart()
        return means


def evaluate(eval_step, state, batches, mesh, interrupted=lambda: False):
    """Returns {name: mean over all real examples} of an eval_step, or None if interrupted between two
    batches.

    batches: dicts of numpy arrays with a "mask" (B,), False on padding. Per-example values are kept to the
    end and divided once, in float64, so the mean depends neither on the batch size nor on the padding. Raises
    ValueError where eval_step returns anything but one value per example, or where there is no example at
    all.
    """
    values, masks = [], []
    for host_batch in batches:
        if interrupted():
            return None
        batch = put(mesh, host_batch)
        values.append(jax.tree.map(to_host, eval_step(state, batch)))
        masks.append(to_host(batch["mask"]))
    if not any(mask.any() for mask in masks):
        raise ValueError("there is no example to evaluate on; name another evaluation set")
    mask = np.concatenate(masks)
    means = {}
    for name in values[0]:
        column = np.concatenate([np.atleast_1d(np.asarray(value[name], np.float64)) for value in values])
        if column.shape != mask.shape:
            raise ValueError(f"eval_step must return one value per example; {name!r} came as {column.shape} "
                             f"for {mask.shape} examples")
        means[name] = float(column[mask].mean())
    return means


def fetch(tree):
    """`to_host` of all arrays of a tree, at once where they are all here."""
    return jax.device_get(tree) if jax.process_count() == 1 else jax.tree.map(to_host, tree)


def to_host(array):
    """Returns a numpy array of the whole of `array`, also where parts of it live on other hosts, which all ask."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
