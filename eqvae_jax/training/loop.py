"""The one training loop: restore, step, log, evaluate, preview, save, stop."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax

from eqvae_jax import distributed, hardware
from eqvae_jax.training.checkpoint import Checkpoints, saved_steps
from eqvae_jax.training.compilation import CompileLedger, WarmUp
from eqvae_jax.training.logging import Progress, Writer
from eqvae_jax.training.metrics import Interval, evaluate, to_host
from eqvae_jax.training.sharding import put
from eqvae_jax.training.state import TrainState
from eqvae_jax.training.stopping import StopRequest, check_health
from eqvae_jax.training.workdir import FULL, prepare


class Task(NamedTuple):
    """What a trainer is. The loop reads the counters of the state; the rest is the task's own business."""

    # rng -> TrainState, traced by jit; large arrays enter through jax.tree_util.Partial(init, arrays)
    init: Callable
    # (state, batch, step, run=programs.call) -> (state, {name: scalar}); donates state, advances state.step by one
    train_step: Callable
    # (state, batch) -> {name: (B,) per-example values}; traceable
    eval_step: Callable
    # (state, batch) -> {name: (B, H, W, 3) in [-1, 1]}
    preview: Callable
    # from sharding.state_shardings
    shardings: TrainState
    # (state shapes, batch shapes) -> iterator of (name, thunk that compiles one program), first needed first
    warm_up: Callable | None = None
    # {name: state -> float}: what is measured of a state as a whole and not of one example, at every evaluation
    measures: dict | None = None
    # () -> programs.Variant of each kind of step, where steps differ in shape: what plans are made of
    variants: Callable | None = None
    # () -> FLOPs of one example in training, without what is recomputed to save memory: what MFU is made of
    model_flops: Callable | None = None


class Data(NamedTuple):
    """Where batches come from: dicts of numpy arrays, this host's rows of each global batch."""

    # start step -> endless iterator; batch n depends on nothing but the seed and n
    train: Callable[[int], Iterator]
    # () -> batches that also carry "mask" (B,), False on padding
    evaluation: Callable[[], Iterable]
    # () -> {name: value} of what all processes must see alike, or a batch of one would not be that of another
    identity: Callable[[], dict] = dict


def train(task, data, config, workdir, mesh):
    """Trains to `config.training.steps`, going on from the newest checkpoint; returns the TrainState and an exit code.

    A line of metrics.jsonl is the mean over the steps since the line before it, or since a resume. After
    SIGTERM or SIGINT the step under way is finished and saved, and the state so far is returned, with a code that is
    not 0 (`StopRequest.code`): even after the last step an evaluation may be missing.

    Raises ValueError for a config that makes no sense or belongs to another run, Diverged after
    `config.training.max_skipped` skipped updates in a row, SaveError or OSError where the disk is full.
    """
    settings = config.training
    _validate(config)
    workdir = prepare(workdir, config, started=bool(saved_steps(workdir)))
    if not distributed.alone():
        seen = distributed.shared(workdir)
        distributed.agree(f"the run in {workdir}", lambda: {"the workdir": seen} | _facts(workdir, data))
    with contextlib.ExitStack() as run:
        checkpoints = run.enter_context(Checkpoints(workdir, config))
        run.enter_context(_disk_errors_explained(checkpoints))
        shapes, example = _shapes(task, config), _example(data, config)
        _check_best_metric(task, config, shapes, example)
        state, start = checkpoints.restore(shapes) or (None, 0)

        progress = run.enter_context(Progress(start, settings.steps))
        writer = run.enter_context(Writer(workdir, start))
        ledger = run.enter_context(CompileLedger())
        stop = run.enter_context(StopRequest(progress.say))
        warm_up = run.enter_context(WarmUp(progress.say))
        # On leaving, the pool waits for its thread.
        beside = run.enter_context(ThreadPoolExecutor(1, thread_name_prefix="beside the first step"))

        def observe(state, done):
            """Evaluates and draws what is due after `done` steps and not there yet; the means, if it evaluated."""
            means, last = None, done == settings.steps
            if _due(settings.eval_every, done, last) and not writer.has_evaluation(done):
                means = _evaluated(task, state, data, mesh, stop)
                if means:
                    writer.scalars(done, means, split="eval")
                    progress.report(done, means, split="eval")
            if _due(settings.preview_every, done, last) and not writer.has_images(done):
                images = task.preview(state, put(mesh, example))
                writer.images(done, {name: to_host(array) for name, array in images.items()})
            return means

        if state is None:
            state = _init(task, config)
        else:
            progress.say(f"going on from step {start} of {workdir}")
            observe(state, start)  # where it was saved and then stopped
        # Of an autoencoder's steps this traces several: beside the first compile it costs no time.
        utilisation = beside.submit(_utilisation, task, mesh, progress.say)
        batches, interval = data.train(start), Interval(ledger, utilisation.result)
        for step in range(start, settings.steps):
            with interval.spending("input"):
                batch = put(mesh, _next(batches, step))
            if step == start and task.warm_up and settings.warm_up:
                warm_up.start(task.warm_up(shapes, jax.tree.map(_shape, batch)))
            state, metrics = task.train_step(state, batch, step)
            interval.add(metrics, rows=len(jax.tree.leaves(batch)[0]))
            progress.advance()

            done = step + 1
            stopping, last = stop.requested(), done == settings.steps
            if _due(settings.log_every, done, last):
                means = interval.means()
                means["skipped"] = check_health(state, done, settings.max_skipped, checkpoints)
                writer.scalars(done, means)
                progress.report(done, means)
                checkpoints.check()
            due, ranking = _due(config.checkpoint.every, done, last), config.checkpoint.best_metric
            early = (due or last or stopping) and not ranking
            if early:  # before what may fail, which should cost none of the steps so far
                with interval.spending("checkpoint"):
                    _save(checkpoints, state, done, settings)
            try:
                with interval.spending("evaluation"):
                    evaluated = None if stopping else observe(state, done)
            except Exception:
                if not early and jax.process_count() == 1:  # other hosts would not join in
                    _save(checkpoints, state, done, settings)
                raise
            stopping = stopping or stop.pending()  # a signal may have come while evaluating
            # With a ranking every evaluated state is saved, or the best might never be on disk.
            if not early and (due or last or stopping or (evaluated and ranking)):
                with interval.spending("checkpoint"):
                    _save(checkpoints, state, done, settings, evaluated)
            if stopping:
                break
        checkpoints.wait()
        progress.say(_farewell(stop, checkpoints, settings.steps) + f"; {ledger}")
    return state, stop.code()


def _utilisation(task, mesh, say):
    """What one example a second is of the devices' peak, for MFU; None where that or the model's FLOPs are unknown."""
    peak = hardware.peak_flops(mesh.devices.flat[0])
    if not peak or not task.model_flops:
        return None
    flops = task.model_flops()
    say(f"mfu is of {flops / 1e9:,.0f} GFLOP an example, the model's own without recomputation, and of {mesh.size} x "
        f"{peak / 1e12:,.0f} TFLOP/s in bfloat16")
    return flops / (peak * mesh.size)


def _facts(workdir, data):
    kinds = Counter(device.device_kind for device in jax.local_devices())
    return {"checkpoints in it": saved_steps(workdir), "devices of a process": dict(kinds)} | data.identity()


def _save(checkpoints, state, step, settings, evaluated=None):
    check_health(state, step, settings.max_skipped, checkpoints)
    checkpoints.save(step, state, evaluated)


def _shapes(task, config):
    """The state as ShapeDtypeStructs with the shardings it will have; nothing is computed."""
    shapes = jax.eval_shape(task.init, jax.random.key(config.seed))
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        shapes, task.shardings)


def _init(task, config):
    # Pretrained arrays bound to a Partial become arguments; closed over, they would be constants inside the
    # program, compiled and cached with it. A Partial around a Partial would hide them again.
    init = task.init if isinstance(task.init, jax.tree_util.Partial) else jax.tree_util.Partial(task.init)
    compiled = jax.jit(lambda init, key: init(key), out_shardings=task.shardings)
    return compiled(init, jax.random.key(config.seed))


def _example(data, config):
    """The evaluation batch that every preview shows, or None where nobody needs it."""
    if config.training.preview_every or config.checkpoint.best_metric:
        return next(iter(data.evaluation()))
    return None


def _evaluated(task, state, data, mesh, stop):
    """{name: number} of one evaluation, or None where a signal interrupted it."""
    result = evaluate(task.eval_step, state, data.evaluation(), mesh, stop.pending)
    for name, measure in (task.measures or {}).items():
        if result is None or stop.pending():
            return None
        result[name] = float(measure(state))
    return result


def _due(every, done, last):
    """Tells whether what happens every so many steps (0 = never) happens now; at the last step it does."""
    return bool(every) and (last or done % every == 0)


def _shape(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _next(batches, step):
    try:
        return next(batches)
    except StopIteration:
        message = f"the training data ended before step {step + 1}; Data.train must be endless"
        raise ValueError(message) from None


def _validate(config):
    settings = config.training
    least = {"steps": 1, "max_skipped": 1, "log_every": 0, "eval_every": 0, "preview_every": 0}
    for field, low in least.items():
        if settings[field] < low:
            raise ValueError(f"config.training.{field} is {settings[field]}; it must be at least {low}")
    if config.checkpoint.every < 0:
        raise ValueError(f"config.checkpoint.every is {config.checkpoint.every}; it must be at least 0")
    if config.checkpoint.best_metric and not settings.eval_every:
        raise ValueError(f"config.checkpoint.best_metric is {config.checkpoint.best_metric!r}, but with "
                         "config.training.eval_every = 0 nothing is ever evaluated")


def _check_best_metric(task, config, shapes, example):
    """Raises ValueError now rather than at the first evaluation, hours from here."""
    wanted = config.checkpoint.best_metric
    known = {*jax.eval_shape(task.eval_step, shapes, example), *(task.measures or {})} if wanted else ()
    if wanted and wanted not in known:
        raise ValueError(f"config.checkpoint.best_metric is {wanted!r}; evaluation gives: "
                         + ", ".join(sorted(known)))


def _farewell(stop, checkpoints, steps):
    step = checkpoints.last_good
    if stop.reason:
        return (f"stopped by {stop.reason}: step {step} of {steps} is saved in {checkpoints.directory}; give "
                "the same command again to go on")
    return f"step {step} of {steps} is saved in {checkpoints.directory}"


@contextlib.contextmanager
def _disk_errors_explained(checkpoints):
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno, f"cannot write into {checkpoints.directory.parent} ({error.strerror}); the last "
            f"good checkpoint is {checkpoints.describe_last_good()}; free some space, then give the same "
            "command again to go on from there") from error
