"""Checkpoints: the state and its config, saved as one, in the background. The only user of Orbax."""

import contextlib
import math
import operator
import threading
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from eqvae_jax import distributed
from eqvae_jax.training import checksums
from eqvae_jax.training.workdir import local_path, resolved

# How the operating system says it, found inside messages of Orbax and TensorStore that have no errno.
DISK_FULL = ("No space left on device", "Disk quota exceeded", "File too large")


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message names the directory and the last good checkpoint."""


def saved_steps(workdir):
    """Returns the steps with a complete checkpoint in a workdir, ascending: [] where there is none.

    Orbax writes under another name and renames when all is there, so a plain number is complete.
    """
    directory = local_path(workdir) / "checkpoints"
    return sorted(int(path.name) for path in directory.glob("*") if path.is_dir() and path.name.isdecimal())


class _Manager(ocp.CheckpointManager):
    """Orbax's, which does not ask by itself whether the processes are about to be stopped: StopRequest does."""

    def reached_preemption(self, step):
        return False


class Checkpoints:
    """The checkpoints of one run, under workdir/checkpoints/STEP.

    Each holds `state` and `config`; the position in the training data is the step itself. Kept are the newest
    `keep`, and with a `best_metric` also the `keep_best` best by it (`best_mode` "min" or "max").
    """

    def __init__(self, workdir, config):
        """config: the whole config; its `checkpoint` section says what is kept."""
        settings = config.checkpoint
        if settings.keep < 1:
            raise ValueError(f"config.checkpoint.keep is {settings.keep}; at least the newest must be kept")
        if settings.best_mode not in ("min", "max"):
            raise ValueError(f"config.checkpoint.best_mode is {settings.best_mode!r}; it must be 'min' or "
                             "'max'")
        self._config = resolved(config)
        self._workdir = local_path(workdir)
        self.directory = self._workdir / "checkpoints"
        self._metric = settings.best_metric
        policy, best = managers.LatestN(n=settings.keep), {}
        if self._metric:
            value = operator.itemgetter(self._metric)
            policy = managers.AnyPreservationPolicy([policy, managers.BestN(
                get_metric_fn=value, reverse=settings.best_mode == "min", n=settings.keep_best,
                keep_checkpoints_without_metrics=False)])
            best = {"best_fn": value, "best_mode": settings.best_mode}  # without it Orbax writes no metrics
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True, preservation_policy=policy, **best)
        self._manager = _Manager(self.directory, options=options, item_names=("state", "config"))
        self._saving = None  # the step of the newest save begun; errors of the background come later
        self._added_up, self._adder = None, None  # the newest step whose files' sums are taken, and by which thread

    @property
    def last_good(self):
        """The newest step that is completely on disk, or None."""
        steps = saved_steps(self._workdir)
        return steps[-1] if steps else None

    def describe_last_good(self):
        """`last_good` in words, for messages."""
        return "none yet" if self.last_good is None else f"step {self.last_good}"

    def save(self, step, state, metrics=None):
        """Starts saving `state` as `step` and returns once it is safe to change or donate it.

        metrics: evaluation means of this very step, or None. Raises SaveError, also for an earlier save that
        failed in the background.
        """
        metrics = metrics or {}
        ranked = {self._metric: float(metrics[self._metric])} if self._metric in metrics else None
        if ranked and not math.isfinite(ranked[self._metric]):
            ranked = None  # NaN would make the ranking meaningless
        self.wait()
        self._saving = step
        if jax.process_index() == 0:
            checksums.forget(self.directory / str(step))  # of one that was set aside
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(self._config))
        with self._failures_explained():
            saved = self._manager.save(step, args=items, metrics=ranked)
        if not saved:  # all that Orbax says of an existing or older step
            raise ValueError(f"cannot save step {step}: step {self._manager.latest_step()} is already there")

    def wait(self):
        """Returns when everything is on disk; raises SaveError where it could not be written."""
        with self._failures_explained():
            self._manager.wait_until_finished()
        self._add_up()

    def check(self):
        """Raises SaveError if a save in the background has failed by now."""
        with self._failures_explained():
            self._manager.check_for_errors()
        self._add_up()

    def _add_up(self):
        """Once the newest save is complete, remembers what its files are, beside training."""
        checkpoint = self.directory / str(self._saving)
        if jax.process_index() == 0 and self._saving not in (None, self._added_up) and checkpoint.is_dir():
            self._added_up = self._saving
            self._adder = threading.Thread(target=_record, args=(checkpoint,), name="checksums")
            self._adder.start()

    def restore(self, shapes):
        """Returns (state, step) of the newest checkpoint that is whole and can be read, or None where there is none.

        shapes: TrainState of ShapeDtypeStruct with the shardings wanted now; the run that saved may have had
        another mesh. An unreadable newer one is named in a warning and moved to workdir/broken_checkpoints,
        because Orbax would refuse to save its step again. Raises RuntimeError, moving nothing, if none of
        several can be read.
        """
        failures = {}
        for step in reversed(saved_steps(self._workdir)):
            if problem := self._problem(step):
                failures[step] = problem
                continue
            state = failure = None
            try:
                items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
                state = self._manager.restore(step, args=items).state
            except Exception as error:  # Orbax raises many types for missing and damaged files
                failure = f"{type(error).__name__}: {_first_line(error)}"
            if failure := _any(distributed.gather(f"checkpoint {step} is restored", failure)):
                failures[step] = failure
                continue
            self._set_aside(failures, step)
            return state, step
        if failures:
            reasons = "\n".join(f"  {self.directory / str(step)}: {why}" for step, why in failures.items())
            raise RuntimeError(f"no checkpoint of this run can be restored:\n{reasons}\n"
                               "if the code changed since, go back to the version that wrote them; to start "
                               "afresh, name another --workdir")
        return None

    def _problem(self, step):
        """What the first process finds wrong with a checkpoint's files, for all to know."""
        found = checksums.problem(self.directory / str(step)) if jax.process_index() == 0 else None
        return _any(distributed.gather(f"checkpoint {step} is looked at", found))

    def _set_aside(self, failures, restored):
        for step, reason in failures.items():
            broken = self.directory / str(step)
            target = self._workdir / "broken_checkpoints" / str(step)
            if jax.process_index() == 0:
                warnings.warn(f"the checkpoint {broken} cannot be restored ({reason}); going on from step "
                              f"{restored}, and keeping the broken one in {target.parent}", stacklevel=3)
                target.parent.mkdir(exist_ok=True)
                while target.exists():
                    target = target.with_name(target.name + "_again")
                broken.rename(target)
        if failures:
            distributed.meet("broken checkpoints are set aside")
            self._manager.reload()

    def __enter__(self):
        return self

    def __exit__(self, _, error, __):
        """Waits for saves under way; one that fails is raised, unless another error is on its way already."""
        failure = error
        try:
            self.wait()
        except SaveError as failed:
            failure = failure or failed
        with contextlib.suppress(Exception) if failure else contextlib.nullcontext():
            self._manager.close()  # which says once more that the save failed
        if self._adder:
            self._adder.join()
        if failure is not error:
            raise failure

    @contextlib.contextmanager
    def _failures_explained(self):
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many types for one full disk
            full = next((text for text in DISK_FULL if text in str(error)), None)
            reason = full or f"{type(error).__name__}: {_first_line(error)}"
            raise SaveError(
                f"cannot save the checkpoint of step {self._saving} into {self.directory}: {reason}\n"
                f"the last good checkpoint is {self.describe_last_good()}; free some space, then give the "
                "same command again to go on from there") from error


def _record(checkpoint):
    try:
        checksums.record(checkpoint)
    except OSError as error:  # it is a checkpoint without them, unless it is gone by now
        if checkpoint.is_dir():
            warnings.warn(f"the checksums of {checkpoint} cannot be kept ({error.strerror or error})", stacklevel=2)


def _any(values):
    return next(filter(None, values), None)


def _first_line(error):
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


class NotHeld(ValueError):
    """A checkpoint without what was asked for; one that is damaged raises another error."""


def load_averaged(workdir):
    """`load_params` of the average of the weights, or of the weights of a run that keeps none; and which it is."""
    for which in ("ema", "params"):
        try:
            return *load_params(workdir, which)[:2], which
        except NotHeld:
            continue
    raise NotHeld(f"the newest checkpoint of {workdir} holds no parameters")


def load_params(workdir, which="ema", step=None):
    """Returns (parameters as a tree of numpy arrays, config as a dict, step) of a finished or running run.

    which: "ema", "params" or "buffers"; step: None is the newest complete one. Reads only that part of the
    state and needs neither a mesh nor the code that wrote it. Raises FileNotFoundError where there is no such
    checkpoint, NotHeld where it holds no average of the weights, or no buffers.
    """
    if which not in ("ema", "params", "buffers"):
        raise ValueError(f"which is {which!r}; it must be 'buffers', 'ema' or 'params'")
    steps = saved_steps(workdir)
    if not steps or step not in (None, *steps):
        found = f"it holds steps {steps}" if steps else "it holds none"
        wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        raise FileNotFoundError(f"{local_path(workdir)} was asked for {wanted}; {found}")
    step = steps[-1] if step is None else step
    directory = local_path(workdir) / "checkpoints" / str(step)
    reader = ocp.PyTreeCheckpointHandler()
    saved = reader.metadata(directory / "state").tree
    if not jax.tree.leaves(saved[which]):
        held = {"ema": "average of the weights (ema); ask for 'params'"}.get(which, which)
        raise NotHeld(f"the checkpoint {directory} holds no {held}")
    item = {which: saved[which]}
    numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    tree = reader.restore(directory / "state", args=ocp.args.PyTreeRestore(
        item=item, restore_args=numpy, partial_restore=True))
    config = ocp.JsonCheckpointHandler().restore(directory / "config")
    return tree[which], config, step
