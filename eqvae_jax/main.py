"""Trains any config of this project.

    python -m eqvae_jax.main --config=configs/eq_sdvae.py:quickstart --workdir=RUNS/quickstart
    python -m eqvae_jax.main --config=configs/eq_sdvae.py --workdir=RUNS/eq \\
        --config.init=diffusers:stabilityai/sd-vae-ft-ema --config.data.train=folder:PHOTOS \\
        --config.loss.lpips_weights=download

Any value of the config is a flag: --config.optimizer.learning_rate=1e-4. The same command again goes on from the
newest checkpoint in the workdir. On several hosts it is the same command on each, with a workdir that they share; TPU
slices and Slurm's tasks find each other, others are told with --coordinator, --processes and --process.
"""

import importlib
import sys
import textwrap
import time
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from eqvae_jax import commands, distributed, recipes

# JAX and all that imports it is imported where it is first needed: a config that cannot work is refused in a
# second, and --help does not wait for a GPU.

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "What to train: FILE.py, or the name of a config that comes with the "
                                "package, each with :VARIANT or without.", lock_config=True)
flags.DEFINE_string("workdir", None, "Directory for checkpoints, metrics.jsonl, event files and reports.")

flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several that work together.")
flags.DEFINE_integer("processes", None, "How many there are.")
flags.DEFINE_integer("process", None, "Which of them this is, 0 to processes - 1.")



class RecipeParser(flags.ArgumentParser):
    """What --config says -> the locked config."""

    def parse(self, reference):
        return recipes.load(reference).lock()

    def flag_type(self):
        return "config"


FLAGS["config"].parser = RecipeParser()  # ml_collections' own takes paths only

HELP = {"-h", "-help", "--help", "-?", "-helpshort", "--helpshort"}
TASKS = {"autoencoder": "eqvae_jax.run.autoencoder", "classifier": "eqvae_jax.run.classifier",
         "generator": "eqvae_jax.run.generator"}


def task_of(config):
    """The module of `eqvae_jax.run` that trains a config."""
    if config.task not in TASKS:
        raise ValueError(f"task is {config.task!r}; it must be one of {', '.join(TASKS)}.")
    return importlib.import_module(TASKS[config.task])


def preflight(config):
    """Resolves and checks what can be checked without JAX; raises ValueError that says what to set."""
    if config.training.steps < 1:
        raise ValueError(f"training.steps is {config.training.steps}; it must be at least 1.")
    if config.seed < 0:
        raise ValueError(f"seed is {config.seed}; it must not be negative.")
    task_of(config).preflight(config)


def train(config, workdir):
    """Trains one config in `workdir`, going on where a former one stopped; returns 0 or an interruption's exit code."""
    preflight(config)
    return task_of(config).train(config, workdir)


def stages_of(config, workdir):
    """The stages of a config as (name, config, workdir), in order; a config without stages is its own only one."""
    if not config.stages:
        return [("", config, workdir)]
    result = []
    for name, overrides in config.stages.items():
        stage = ConfigDict(config.to_dict() | {"stages": {}})
        stage.update(overrides)
        stage.init = stage.init.replace("{workdir}", str(workdir))
        result.append((name, stage.lock(), workdir / name))
    return result


def train_stages(config, workdir):
    """Trains config.stages one after another, each in workdir/NAME, and compares them in a table and a report."""
    from eqvae_jax import report
    from eqvae_jax.training.stopping import ended_by_sigterm

    begun, stages = time.monotonic(), stages_of(config, workdir)
    for number, (name, stage, directory) in enumerate(stages, start=1):
        print(f"\n== {name} ({number} of {len(stages)})")
        if code := train(stage, directory):
            return code
    runs = {name: directory for name, _, directory in stages}
    data = config.data
    with ended_by_sigterm("all stages are trained, and the same command does only the comparison"):
        print("\n== comparison on held-out images", flush=True)
        document = report.compare(runs, images=data.evaluation, output=workdir, image_size=data.image_size,
                                  batch_size=data.evaluation_batch_size, limit=data.evaluation_limit or None,
                                  crops=data.evaluation_crops, min_crop=data.min_crop, max_crop=data.max_crop)
    print(report.format_table(document))
    print(report.verdict(document))
    print(f"{time.monotonic() - begun:.0f} s in all. Pictures, curves and numbers: {Path(workdir) / 'report.html'}")
    return 0


def trained(config, workdir):
    """Trains a config or all its stages; returns the exit code.

    Of several processes, a preempted one has done what it was asked to, and is not to be taken for a failed one.
    """
    code = (train_stages if config.stages else train)(config, workdir)
    return code if distributed.alone() else 0


def facts(config, workdir):
    """What all processes of a run must have been given alike."""
    from eqvae_jax.training.workdir import leaves, resolved

    values = {f"config.{name}": value for name, value in leaves(resolved(config)).items()}
    return distributed.software() | {"--workdir": str(workdir)} | values


def main(argv):
    if len(argv) > 1:
        return f"unexpected arguments: {' '.join(argv[1:])}; every option is a --flag=value, and --help lists them."
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax, fontTools and others say a line at every turn
    try:
        distributed.start(FLAGS.coordinator, FLAGS.processes, FLAGS.process, stops=False)
        # resolve(): a relative path would name another place when the same command is given elsewhere.
        if "://" in FLAGS.workdir:
            raise ValueError(f"the workdir {FLAGS.workdir} is an address; mount the bucket as a directory "
                             "(gcsfuse) and name that.")
        config, workdir = FLAGS.config, Path(FLAGS.workdir).expanduser().resolve()
        for _, stage, _ in stages_of(config, workdir):
            preflight(stage)
        distributed.agree("the command", lambda: facts(config, workdir))
        from eqvae_jax.backend import use_compilation_cache

        use_compilation_cache()
        return trained(config, workdir)
    except (ValueError, OSError, RuntimeError) as error:
        if FLAGS.verbosity > 0:
            raise
        return f"\n{type(error).__name__}: {error}\n(--verbosity=1 shows the traceback)"


def help_text(name, about, required, optional):
    """What --help prints of the command `name`: its docstring, its flags, and the configs there are."""
    lines = [f"usage: {commands.program(name)} {' '.join(f'--{flag}=...' for flag in required)} [--FLAG=VALUE ...] "
             "[--config.FIELD=VALUE ...]", "", commands.as_called(about), "flags:"]
    for flag in (*required, *optional):
        default = FLAGS[flag].default
        text = FLAGS[flag].help + (f" ({default})" if default not in (None, "") else "")
        lines += [f"  --{flag}", *textwrap.wrap(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)]
    lines += ["  --verbosity", f"{'':8}1: the traceback of an error, and what the libraries log"]
    return "\n".join([*lines, "", f"configs: {', '.join(recipes.names())}", f"(in {recipes.directory()}; --helpfull "
                                  "lists the flags of the libraries too)"])


def parse_flags(argv, name="train", about=__doc__, required=("config", "workdir"),
                optional=("coordinator", "processes", "process")):
    """Parses the command line; a config field that does not exist is an error that names the nearest one."""
    if HELP & set(argv[1:]):
        print(help_text(name, about, required, optional))
        sys.exit(0)
    try:
        return app.parse_flags_with_usage(argv)
    except (KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        message = error
        while isinstance(message, BaseException) and message.args:  # a KeyError inside an AttributeError, quoted twice
            message = message.args[0]
        sys.exit(f"{message}\n(in a --config flag; the config file lists every field)")


def run():
    """The command line's entry: errors a user can act on are one message, not a traceback."""
    flags.mark_flags_as_required(["config", "workdir"])
    sys.exit(distributed.run(lambda: app.run(main, flags_parser=parse_flags)))


if __name__ == "__main__":
    run()
