"""A table or figure of the paper by one command: trained, sampled and measured here, beside the paper's numbers.

    python -m eqvae_jax.reproduce --table=1 --scale=tiny --images=idx:DIR --workdir=RUNS --jobs=2
    python -m eqvae_jax.reproduce --table=12 --scale=photos --workdir=RUNS --seeds=1
    python -m eqvae_jax.reproduce --figure=3 --scale=small --images=idx:DIR --workdir=RUNS
    python -m eqvae_jax.reproduce --table=2 --scale=paper --workdir=PLAN

It is a plan of this project's other commands, which --dry-run prints. Each stage is kept by what decides its result:
tables share what they have in common, and the same command goes on where it was stopped. At the end there are
RUNS/table-1-tiny.md, .html and .json: the paper's number and ours, mean and standard error over seeds, and for each
claim whether it holds, does not hold, or is undecided at this scale.

tiny: Fashion-MNIST, for two CPU cores. small: the same images, for a GPU. photos: crops of a dozen photographs, of
autoencoders only, and without Fréchet distances. paper: the paper's own recipe, which is written down as a script of
commands with the configs they resolve to, and not run.
"""

import argparse
import functools
import sys
from pathlib import Path

from eqvae_jax.commands import as_called, program
from eqvae_jax.reproduction import ablations, document, estimates, figures, provenance, running, tables
from eqvae_jax.reproduction.bench import Bench
from eqvae_jax.reproduction.scales import SCALES, split
from eqvae_jax.reproduction.stages import in_order

TABLES = {"1": tables.table_1, "2": tables.table_2, "3": tables.table_3, "4": tables.table_4, "5": ablations.table_5,
          "7": ablations.table_7, "8": ablations.table_8, "12": tables.table_12, "beyond": ablations.beyond}
FIGURES = {"1": figures.figure_1, "2": figures.figure_2, "3": figures.figure_3, "4": figures.figure_4}


def main(arguments=None):
    """Runs the command line; returns the process's exit code, 2 for something the user can put right."""
    options = _parser().parse_args(arguments)
    try:
        failed = reproduce(options)
    except BrokenPipeError:  # of a dry run, into head
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (running.Interrupted, KeyboardInterrupt) as stop:
        print("stopped; the same command goes on.", file=sys.stderr)
        return stop.code if isinstance(stop, running.Interrupted) else 130
    if failed:
        names = ", ".join(stage.name for stage in failed)
        print(f"{len(failed)} commands failed: {names}. What they said is above, and in logs/; the same command tries "
              "them again.", file=sys.stderr)
    return int(bool(failed))


def reproduce(options):
    """Makes what the command line asks for: the plan, or the result and what it rests on; returns what failed of it."""
    if options.seeds is None:
        options.seeds = 1 if options.scale == "paper" else 3
    if options.seeds < 1 or options.jobs < 1:
        raise ValueError(f"--seeds={options.seeds} and --jobs={options.jobs} must be at least 1.")
    kind, number = ("table", options.table) if options.table else ("figure", options.figure)
    experiment = (TABLES if options.table else FIGURES)[number]()
    scale, root = SCALES[options.scale], Path(options.workdir).expanduser().resolve()
    if options.images and options.scale == "paper":
        raise ValueError("--images is of the smaller scales: the paper's images are variables of the script.")
    if options.images:
        scale = scale._replace(images=split(images(options.images)))
    # Pictures are of one seed.
    benches = [Bench(scale, seed) for seed in range(options.seeds if experiment.columns else 1)]
    try:
        wanted = [measure.stage for bench in benches for measure in experiment.measured(bench).values()]
        wanted += [stage for stage, _, _ in experiment.pictures(benches[0])]
    except ValueError as error:
        raise ValueError(f"--scale={options.scale} cannot make {kind} {number}: {error}") from error
    if not wanted:
        raise ValueError(f"--scale={options.scale} can measure nothing of {kind} {number}.")
    stages = in_order(wanted)
    if options.dry_run:
        print(f"# {experiment.title}, {options.scale}: {len(stages)} stages")
        for stage in stages:
            print(f"\n# {stage.name}\n{stage.as_text(root)}")
        return []
    name = f"{kind}-{number}-{options.scale}"
    if options.scale == "paper":
        from eqvae_jax.reproduction import recipe

        recipe.write(experiment, stages, root / name)
        return []
    check_images(scale)
    rates = estimates.rates(document.records(stages, root))
    announce(experiment, stages, root, rates, options)
    with running.alone(root) as lock:
        estimate = functools.partial(estimates.seconds, rates=rates)
        failed = running.run(wanted, root, options.jobs, estimate, lock=lock)
        seeds = [bench.seed for bench in benches]
        made = [stage for stage in stages if stage.finished(root)]
        how = provenance.how(options, scale, seeds, made, document.records(made, root))
        publish(experiment, benches, root, name, how)
    return failed


def announce(experiment, stages, root, rates, options):
    """Says, before anything starts, what will be done, and what it will take."""
    todo = [stage for stage in stages if not stage.finished(root)]
    times = [estimates.seconds(stage, rates) for stage in todo]
    print(f"{experiment.title}. {experiment.about}\n")
    for stage in todo:
        print(f"  {stage.name}")
    kinds = {stage.work[0] for stage in todo}
    known = ("as measured here" if kinds <= set(rates) else "of some kinds as measured here, of others a guess"
             if kinds & set(rates) else "a guess, until the first of each kind is done")
    print(
        f"\n{len(todo)} of {len(stages)} stages are to be done, {options.jobs} at a time: about "
        f"{running.as_time(sum(time or 0 for time in times) / options.jobs)} ({known}) and "
        f"{estimates.disk(todo) / 1e9:.1f} GB in {root}.",
        flush=True,
    )


def images(reference):
    """A reference without a split, its directory absolute: the same images are then the same stages, wherever from."""
    kind, _, place = reference.partition(":")
    if kind not in ("idx", "tfds", "photos"):
        raise ValueError(f"--images={reference} has no splits :train and :test; take idx:DIR, tfds:NAME or photos.")
    return f"idx:{Path(place).expanduser().resolve()}" if kind == "idx" else reference


def check_images(scale):
    """Raises ValueError, before the first stage, where the images are not there."""
    from eqvae_jax.data.sources import open_source

    for reference in dict.fromkeys(scale.images.values()):
        try:
            open_source(reference)
        except ValueError as error:
            advice = (
                " --images=idx:DIR names the folder of Fashion-MNIST's four files (train-images-idx3-ubyte.gz and so "
                "on, from github.com/zalandoresearch/fashion-mnist), of which :train and :test are used."
            ) if reference.startswith(("idx:", "tfds:")) else ""
            raise ValueError(f"{error}\nThe images come from {reference}.{advice}") from error


def publish(experiment, benches, root, name, how):
    """Writes the three files of a result, and prints the table."""
    from eqvae_jax.atomic import whole
    from eqvae_jax.evaluation.provenance import write_json

    found = document.document(experiment, document.collect(experiment, benches, root), how)
    pictures = document.pictures(experiment, benches[0], root)
    texts = {".md": document.as_markdown(experiment, found), ".html": document.as_html(experiment, found, pictures)}
    for suffix, text in texts.items():
        with whole(root / f"{name}{suffix}") as partial:
            partial.write_text(text, encoding="utf-8")
    write_json(root / f"{name}.json", found)
    print(f"\n{texts['.md']}\nwrote {root / name}.md, .html and .json")


def _parser():
    parser = argparse.ArgumentParser(
        prog=program("reproduce"),
        description=as_called(__doc__),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", choices=tuple(TABLES),
                      help="of the paper (7 has the control of Table 6 too), or the options of docs/beyond.md")
    what.add_argument("--figure", choices=tuple(FIGURES), help="of the paper")
    add = parser.add_argument
    add("--scale", choices=tuple(SCALES), default="tiny", help="how large (%(default)s); smoke shows that it runs")
    add("--workdir", required=True, metavar="DIR", help="of all results; give every table the same one")
    add(
        "--images",
        default="",
        metavar="REFERENCE",
        help="where :train and :test are, instead of the scale's own: idx:DIR or tfds:NAME (tfds:fashion_mnist)",
    )
    add("--seeds", type=int, metavar="N", help="how often all is done, with seeds 0 to N - 1 (3; of paper 1)")
    add("--jobs", type=int, default=1, metavar="N",
        help="stages at a time, which share the CPU's cores: as many as it has is quickest; 1 on a GPU (%(default)s)")
    add("--dry-run", action="store_true", help="print the commands, in order, and do nothing")
    return parser


def run():
    """The command line's entry."""
    sys.exit(main())


if __name__ == "__main__":
    run()
