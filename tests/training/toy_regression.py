"""A task whose steps take microseconds: linear regression with noise drawn per example. Run as a script, it
is the process that tests kill, signal, or give eight devices.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from eqvae_jax import distributed
from eqvae_jax.training import sharding
from eqvae_jax.training.loop import Data, Task, train
from eqvae_jax.training.optimizer import ema_update, guarded, make_optimizer
from eqvae_jax.training.state import TrainState

INPUTS, OUTPUTS, BATCH = 8, 12, 8
TIMINGS = {"steps_per_second", "images_per_second", "compile_seconds", "checkpoint_seconds", "evaluation_seconds",
           "input_wait", "goodput"}


def get_config(**changes):
    """changes: {"section.field": value}."""
    config = ml_collections.ConfigDict({
        "seed": 3,
        "training": {"steps": 6, "log_every": 1, "eval_every": 0, "preview_every": 0, "max_skipped": 3,
                     "warm_up": False},
        "checkpoint": {"every": 2, "keep": 2, "keep_best": 0, "best_metric": "", "best_mode": "min"},
        "optimizer": {"learning_rate": 0.05, "schedule": "cosine", "warmup_steps": 2, "b1": 0.9, "b2": 0.99,
                      "eps": 1e-8, "weight_decay": 0.01, "clip_norm": 1.0},
        "mesh": {"data": -1, "fsdp": 1, "min_shard_size": 16, "rules": ()},
    })
    config.update_from_flattened_dict(changes)
    return config


def batch_at(step):
    """The batch of one step; `x` of example i in the stream depends on i only."""
    index = np.arange(step * BATCH, (step + 1) * BATCH, dtype=np.int32)
    x = np.stack([np.random.default_rng([7, i]).standard_normal(INPUTS) for i in index]).astype(np.float32)
    slope = np.linspace(-1, 1, INPUTS * OUTPUTS, dtype=np.float32).reshape(INPUTS, OUTPUTS)
    return {"x": x, "y": x @ slope + 0.5, "index": index}


def rows_here(batch):
    """This process's rows of a global batch."""
    rows = BATCH // jax.process_count()
    return {name: values[jax.process_index() * rows:][:rows] for name, values in batch.items()}


def batches(start):
    while True:
        yield rows_here(batch_at(start))
        start += 1


def evaluation():
    """Two batches, of which the last has three padded rows."""
    for step, real in ((1000, BATCH), (1001, BATCH - 3)):
        yield rows_here(batch_at(step) | {"mask": np.arange(BATCH) < real})


def make_task(config, mesh):
    optimizer, schedule = make_optimizer(config.optimizer, config.training.steps)

    def init(key):
        params = {"model": {"w": jax.random.normal(key, (INPUTS, OUTPUTS)), "b": jnp.zeros(OUTPUTS)}}
        opt_state = {"model": optimizer.init(params["model"])}
        return TrainState.create(params=params, opt_state=opt_state, ema=params)

    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.state_shardings(mesh, shapes, config.mesh)

    def predict(params, x):
        return x @ params["w"] + params["b"]

    def update(state, batch, step):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (OUTPUTS,)))(batch["index"])
        params = state.params["model"]

        def loss_of(params):
            return jnp.mean((predict(params, batch["x"]) - batch["y"] - 0.1 * noise) ** 2)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state["model"], params)
        params = {"model": optax.apply_updates(params, updates)}
        new = state.replace(step=state.step + 1, params=params, opt_state={"model": opt_state},
                            ema=ema_update(state.ema, params, 0.9))
        metrics = {"loss": loss, "gradient_norm": norm, "learning_rate": schedule(step)}
        return guarded(jnp.isfinite(norm), new, state), metrics

    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))

    @jax.jit
    def eval_step(state, batch):
        error = predict(state.ema["model"], batch["x"]) - batch["y"]
        return {"error": jnp.mean(error ** 2, axis=-1), "first_input": batch["x"][:, 0]}

    def preview(state, batch):
        return {"inputs": jnp.broadcast_to(batch["x"][:2, :, None, None], (2, INPUTS, 4, 3))}

    def train_step(state, batch, step):
        return update(state, batch, np.int32(step))

    return Task(init, train_step, eval_step, preview, shardings)


def run(workdir, *arguments, **options):
    """The state at the end of `end`."""
    return end(workdir, *arguments, **options)[0]


def end(workdir, config=None, stream=batches, devices=None, task=None):
    config = config or get_config()
    mesh = sharding.make_mesh(config.mesh, devices)
    return train(task or make_task(config, mesh), Data(stream, evaluation), config, workdir, mesh)


def metrics_of(workdir):
    """The lines of a run's metrics, without its timings."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def killed_while_saving(workdir):
    """Batches that end this process with kill -9 as soon as the second checkpoint (step 6) is being
    written.
    """
    def watch():
        while not list((Path(workdir) / "checkpoints").glob("6.*")):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    def stream(start):
        for step, batch in enumerate(batches(start), start):
            if step == 5:
                while not (Path(workdir) / "checkpoints" / "4").exists():
                    time.sleep(0.01)
                threading.Thread(target=watch, daemon=True).start()
            yield batch

    return stream


def signalled(workdir):
    """Batches that wait, before the fifth, until this process has received SIGTERM; a file says that they do."""
    def stream(start):
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        signal.set_wakeup_fd(writes)
        for step, batch in enumerate(batches(start), start):
            if step == 4:
                pathlib.Path(workdir, "waiting").touch()
                os.read(reads, 1)
            yield batch

    return stream


def together(workdir, steps="6", wait_at="-1", who="0", then="", data="same"):
    """A run of several processes, each step of which is saved.

    then: what process `who` does before step `wait_at`: raise an error, or wait to be killed; or, "stop",
    what all do: slow steps from there on, so that a signal comes in time.
    """
    def stream(start):
        for step, batch in enumerate(batches(start), start):
            if step == int(wait_at) and then == "stop":
                pathlib.Path(workdir, f"at_{wait_at}").touch()
            if step >= int(wait_at) and then == "stop":
                time.sleep(0.1)
            if step == int(wait_at) and jax.process_index() == int(who):
                if then == "raise":
                    raise OSError(5, "the disk is on fire")
                while then == "wait":
                    pathlib.Path(workdir, f"at_{wait_at}").touch()
                    time.sleep(0.05)
            yield batch

    def work():
        distributed.start(stops=False)
        config = get_config(**{"training.steps": int(steps), "checkpoint.every": 1, "training.eval_every": 3,
                               "optimizer.schedule": "constant", "mesh.fsdp": 2})
        mesh = sharding.make_mesh(config.mesh)
        seen = Data(stream, evaluation, lambda: {"data": data})
        state, _ = train(make_task(config, mesh), seen, config, workdir, mesh)
        print("returned at step", int(state.step))

    sys.exit(distributed.run(work))


def main(mode, workdir, *options):
    every_4 = get_config(**{"checkpoint.every": 4})
    if mode == "killed":
        run(workdir, every_4, killed_while_saving(workdir))
    elif mode == "signalled":
        state = run(workdir, every_4, signalled(workdir))
        print("returned at step", int(state.step))
    elif mode == "together":
        together(workdir, **dict(option.split("=") for option in options))
    elif mode == "eight_devices":
        # One run on 2 x 4 devices, one that starts on 1 device, goes on over 8, and ends on 1.
        sharded = get_config(**{"mesh.fsdp": 4})
        state = run(f"{workdir}/eight", sharded)
        kernel = state.params["model"]["w"]
        moved = f"{workdir}/moved"
        constant = {"optimizer.schedule": "constant"}
        run(moved, get_config(**constant, **{"training.steps": 2}), devices=jax.devices()[:1])
        run(moved, get_config(**constant, **{"training.steps": 4, "mesh.fsdp": 4}))
        run(moved, get_config(**constant), devices=jax.devices()[:1])
        print(json.dumps({"devices": len(kernel.sharding.device_set), "spec": list(kernel.sharding.spec),
                          "shard": kernel.addressable_shards[0].data.shape,
                          "mu": list(state.opt_state["model"][1].mu["w"].sharding.spec),
                          "step": list(state.step.sharding.spec)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
