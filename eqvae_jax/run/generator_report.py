"""Compares training runs of generators: the Fréchet distances and losses that they logged, and their last samples."""

import pathlib
import sys

from eqvae_jax.atomic import whole
from eqvae_jax.evaluation import charts, figures, page, provenance, tables
from eqvae_jax.training.checkpoint import saved_steps

ABOUT = """What generators logged while they trained. A Fréchet distance here is of few samples of the averaged weights:
it says how fast a run learns beside the others, and is no FID to publish."""
CONVERGENCE = """The distance against the training step, a line per run; the dashed line is where {baseline} ended, and
circles say when the others were as far. A lower line learns faster."""
CURVES = """Held-out metrics first, then training metrics: pale as logged, strong as a running average. Losses compare
only between runs on the same latents."""
SAMPLES = "Samples of {name} at its last preview, step {step}: of fixed seeds, each class in turn."


def compare(runs, configs, output):
    """Writes metrics.json, figures as PNG and PDF, and report.html; returns what metrics.json holds.

    runs: dict name -> workdir; the baseline is "control", or the first. configs: name -> its config.
    Raises ValueError where a run has logged nothing.
    """
    output = pathlib.Path(output)
    histories = {name: charts.read_rows(workdir) for name, workdir in runs.items()}
    if silent := [name for name, rows in histories.items() if not rows]:
        raise ValueError(f"{', '.join(silent)}: nothing is logged yet.")
    baseline, pictures = tables.baseline(runs), []
    results = {name: last_values(rows) for name, rows in histories.items()}
    output.mkdir(parents=True, exist_ok=True)

    def add(name, heading, figure, text):
        png, _ = figures.save(figure, output / name)
        pictures.append(page.Picture(heading, png.read_bytes(), heading, " ".join(text.split())))

    distances = [key for key in dict.fromkeys(key for values in results.values() for key in values) if "FID" in key]
    for number, key in enumerate(distances):
        series = {name: charts.points(rows, key) for name, rows in histories.items()}
        series = {name: points for name, points in series.items() if points}
        mark = baseline if baseline in series and len(series) > 1 else None
        add(f"convergence_{number}", f"How fast {key} falls", charts.convergence(series, key, mark),
            CONVERGENCE.format(baseline=baseline))
        for name, points in series.items():
            if mark and name != mark:
                reached = charts.steps_to_reach(points, series[mark][-1][1])
                results[name][f"steps until {key} is {mark}'s last"] = reached
    if charts.curve_keys(histories):
        add("curves", "Training", charts.curves(histories), CURVES)
    for name, workdir in runs.items():
        previews = sorted(pathlib.Path(workdir, "previews").glob("*.png"))
        if previews:
            step = int(previews[-1].stem.rpartition("_")[2])
            pictures.append(page.Picture(f"Samples of {name}", previews[-1].read_bytes(), f"Samples of {name}",
                                         SAMPLES.format(name=name, step=step)))

    document = {"results": results, "baseline": baseline, "software": provenance.software(), "command": sys.argv,
                "runs": {name: {"workdir": str(workdir), "step": max(saved_steps(workdir), default=None),
                                "config": configs[name]} for name, workdir in runs.items()}}
    provenance.write_json(output / "metrics.json", document)
    title = "How fast do generators learn? " + ", ".join(runs)
    parts = [page.paragraph(ABOUT), page.heading("Numbers"), page.table(["last logged", *runs], rows_of(results)),
             *(page.picture(one) for one in pictures), *page.configurations(configs), page.heading("Software"),
             page.table(["", ""], [[key, str(value)] for key, value in document["software"].items()])]
    with whole(output / "report.html") as partial:
        partial.write_text(page.frame(title, parts), encoding="utf-8")
    return document


def last_values(rows):
    """{"step", "training loss", "loss", ...}: the newest number of the training loss and of all that was evaluated."""
    found = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        evaluated = row.get("split") == "eval"
        for key, value in row.items():
            if isinstance(value, float) and (evaluated or key == "loss"):
                found[key if evaluated else f"training {key}"] = value
        found["step"] = row["step"]
    return found


def rows_of(results):
    """Rows (metric, its value in each run) for a table."""
    keys = dict.fromkeys(key for values in results.values() for key in values)
    text = lambda value: "never" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return [[key, *(text(values[key]) if key in values else "" for values in results.values())] for key in keys]


def as_text(results):
    """The same table as aligned text."""
    from eqvae_jax.run.conversion import aligned

    return "\n".join(aligned([["last logged", *results], *rows_of(results)]))
