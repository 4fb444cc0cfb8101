"""Curves and bars: of metrics.jsonl, of the table's numbers, of spectra; style, colours, `save` are figures.py's."""

import json
import math
import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from eqvae_jax.evaluation.figures import COLUMN, WIDTH, colors, plain, styled
from eqvae_jax.evaluation.tables import rfid_label

_CODEBOOK = ("codebook_usage", "codebook_perplexity")  # higher is better, in training as in evaluation
_HIGHER = ("psnr", "ssim")  # of the evaluation's metrics; the others are errors
_LOSSES = ("nll", "l1", "lpips")  # of the training metrics; the others have no better or worse
_BOOKKEEPING = ("step", "split", "branch_", "skipped", "learning_rate", "input_wait", "goodput", "mfu")


def read_rows(workdir):
    """The lines of WORKDIR/metrics.jsonl as dicts; [] without the file. Lines cut short by a kill are left out."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def curve_keys(runs, limit=9):
    """The (split, key) pairs worth a panel: evaluation first, gradient norms last, nothing that never changes.

    runs: dict name -> rows of `read_rows`.
    """
    values = {}
    for rows in runs.values():
        for row in rows:
            for key, value in row.items():
                if not key.startswith(_BOOKKEEPING) and "second" not in key and _number(value):
                    values.setdefault((row.get("split", "train"), key), []).append(value)
    chosen = [pair for pair, seen in values.items() if len(seen) > 1 and min(seen) != max(seen)]
    # Stable: what is left equal keeps the order of the file.
    rank = lambda pair: (pair[0] != "eval", "gradient" in pair[1], pair[1] not in _LOSSES)
    return sorted(chosen, key=rank)[:limit]


@styled
def curves(runs, keys=None):
    """One panel per (split, key): its value against the step, a line per run.

    runs: dict name -> rows of `read_rows`; keys: pairs as `curve_keys` returns, which chooses without them.
    Training values are drawn pale, with their running average (over a tenth of the curve) on top.
    """
    keys = curve_keys(runs) if keys is None else keys
    columns = min(3, max(1, len(keys)))
    lines = max(1, math.ceil(len(keys) / columns))
    figure = Figure(figsize=(WIDTH, 1.75 * lines + 0.3), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    color = colors(runs)
    for axis, (split, key) in zip(axes, keys, strict=False):
        for name, rows in runs.items():
            rows = [row for row in rows if row.get("split", "train") == split]
            points = [(row["step"], row[key]) for row in rows if _number(row.get(key))]
            if not points:
                continue
            steps, values = np.array(points, np.float64).T
            if split == "train":
                axis.plot(steps, values, color=color[name], linewidth=0.6, alpha=0.3)
                values = _running_average(values, max(1, len(values) // 10))
            line = {"color": color[name], "linewidth": 1.3, "label": plain(name)}
            marker = "o" if split == "eval" and len(steps) < 30 else None
            axis.plot(steps, values, marker=marker, markersize=2.5, **line)
        axis.set_title(_title(split, key), loc="left")
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axis.set_xlabel("step")
    for axis in axes[len(keys) :]:
        axis.set_visible(False)
    _legend(figure, axes, len(runs))
    return figure


@styled
def bars(results):
    """Bars of R, S and the pixel errors, one per model, lower is better; the value stands on each bar.

    A line across a bar of a pixel error is its floor, the error of D(E(tau x)).

    results: dict name -> flat metrics of `reconstruction.equivariance_errors`.
    """
    panels = [
        ("R", "Latent error under turns, R", "{}°"),
        ("S", "Latent error under scales, S", "× {}"),
        ("pixel_l1/R", r"Pixel error of $D(\tau E(x))$ under turns", "{}°"),
        ("pixel_l1/S", r"Pixel error of $D(\tau E(x))$ under scales", "× {}"),
    ]
    panels = [panel for panel in panels if any(panel[0] in column for column in results.values())]
    figure = Figure(figsize=(WIDTH, 1.9 * math.ceil(len(panels) / 2) + 0.3), layout="constrained")
    axes = figure.subplots(math.ceil(len(panels) / 2), min(2, len(panels)), squeeze=False).reshape(-1)
    color = colors(results)
    width = 0.8 / len(results)
    for axis, (mean, title, form) in zip(axes, panels, strict=False):
        family, prefix = mean[-1], mean.split("/")[0]
        keys = dict.fromkeys(key for column in results.values() for key in column)
        labels = [key.split("/")[1] for key in keys if key.startswith(f"{family}/")]
        groups = [(f"{prefix}/{label}", form.format(label)) for label in labels] + [(mean, "mean")]
        for i, (name, column) in enumerate(results.items()):
            values = [column.get(key) for key, _ in groups]
            places = np.arange(len(groups)) + (i - (len(results) - 1) / 2) * width
            heights = [value or 0.0 for value in values]
            drawn = axis.bar(places, heights, 0.92 * width, color=color[name], label=plain(name))
            size = 5.2 if len(results) < 4 else 4.5
            if prefix == "pixel_l1":
                floors = np.array([column.get(key.replace("pixel_", "floor_")) for key, _ in groups], np.float64)
                at = np.isfinite(floors)
                left, right = places[at] - 0.46 * width, places[at] + 0.46 * width
                axis.hlines(floors[at], left, right, color="0.15", linewidth=0.8)
            axis.bar_label(drawn, [_short(value) for value in values], fontsize=size, padding=1.5)
        axis.set_xticks(range(len(groups)), [text for _, text in groups])
        axis.tick_params(axis="x", length=0)
        axis.margins(y=0.14)
        axis.set_title(f"{title}\nlower is better", loc="left")
        axis.set_ylabel("squared ratio" if prefix in ("R", "S") else "mean |difference| of [-1, 1]")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    _legend(figure, axes, len(results))
    return figure


@styled
def transform_bars(results, width=COLUMN):
    """The paper's Figure 3: rFID of D(tau E(x)) against tau x for each scale and the mean of the turns.

    Without rFID the pixel errors stand in its place, and the axis says so. The value stands on each bar.

    results: dict name -> flat metrics of `reconstruction.equivariance_errors`.
    """
    keys = dict.fromkeys(key for column in results.values() for key in column)
    distance = next((key.split("/")[0] for key in keys if key.startswith("rfid") and "/" in key), None)
    prefix, mean = (distance, f"{distance}_R") if distance else ("pixel_l1", "pixel_l1/R")
    scales = sorted((key.split("/")[1] for key in keys if key.startswith("S/")), key=float, reverse=True)
    groups = [(f"{prefix}/{label}", f"scale\n{label}") for label in scales]
    groups += [(mean, "mean of\nthe turns")] if mean in keys else []
    figure = Figure(figsize=(width, 0.72 * COLUMN), layout="constrained")
    axis, color, each = figure.subplots(), colors(results), 0.84 / len(results)
    for i, (name, column) in enumerate(results.items()):
        values = [column.get(key) for key, _ in groups]
        places = np.arange(len(groups)) + (i - (len(results) - 1) / 2) * each
        heights = [value or 0.0 for value in values]
        drawn = axis.bar(places, heights, 0.92 * each, color=color[name], label=plain(name))
        axis.bar_label(drawn, [_short(value) for value in values], fontsize=6 if len(results) < 3 else 5, padding=1.5)
    axis.set_xticks(range(len(groups)), [text for _, text in groups])
    axis.tick_params(axis="x", length=0)
    axis.margins(y=0.12)
    axis.set_ylabel(plain(rfid_label(distance)) if distance else "mean |difference| of [-1, 1]")
    axis.set_title(r"$D(\tau E(x))$ against $\tau x$, lower is better", loc="left")
    _legend(figure, [axis], len(results))
    return figure


@styled
def spectra(details, width=COLUMN):
    """Energy of the latents over spatial frequency, a line per model; a steeper fall is a smoother latent.

    The energy is relative to its mean over all frequencies but zero, so that scales do not matter: white noise is 1.

    details: dict name -> {"spectrum": {"frequency", "energy", "coefficients"}}, as latents.latent_measures.
    """
    figure = Figure(figsize=(width, 0.72 * COLUMN), layout="constrained")
    axis, color = figure.subplots(), colors(details)
    for name, each in details.items():
        frequency, energy, coefficients = (np.array(each["spectrum"][key][1:], np.float64)
                                           for key in ("frequency", "energy", "coefficients"))
        varying = np.sum(energy * coefficients)
        if varying > 0:
            relative = energy * coefficients.sum() / varying
            axis.plot(frequency, relative, color=color[name], linewidth=1.3, label=plain(name))
    axis.axvline(1, color="0.6", linewidth=0.6, linestyle=":")
    axis.set_yscale("log")
    axis.set_xlabel("spatial frequency, in units of Nyquist's")
    axis.set_ylabel("energy, relative to white noise")
    axis.set_title("Spectrum of the latents", loc="left")
    _legend(figure, [axis], len(details))
    return figure


def points(rows, key, split="eval"):
    """[(step, value)] of a metric from the rows of `read_rows`, in order of steps."""
    rows = [row for row in rows if row.get("split", "train") == split and _number(row.get(key))]
    return sorted((row["step"], row[key]) for row in rows)


def steps_to_reach(series, value):
    """The first step at which [(step, value)], joined by straight lines, is as low as `value`; None if it never is."""
    for (before, high), (after, low) in zip([series[0], *series], series, strict=False):
        if low <= value:
            return before + (after - before) * ((high - value) / (high - low) if high > low else 0)
    return None


@styled
def convergence(runs, label, baseline=None, width=COLUMN):
    """A metric that should fall with training, a line per run, and how much sooner it reaches the baseline's end.

    The paper's Figures 1 (right) and 5. Values are drawn on a logarithmic axis.

    runs: dict name -> [(step, value)], as `points`. label: of the vertical axis, such as "gFID". baseline: the name
    whose last value is the mark; None marks nothing.
    """
    figure = Figure(figsize=(width, 0.8 * COLUMN), layout="constrained")
    axis, color = figure.subplots(), colors(runs)
    mark = runs[baseline][-1] if baseline else None
    for name, series in runs.items():
        text, reached = plain(name), steps_to_reach(series, mark[1]) if mark and name != baseline else None
        if reached:
            text += f" ({mark[0] / reached:.1f}× faster)"
            axis.plot([reached], [mark[1]], "o", markersize=4, color=color[name], markerfacecolor="white", zorder=3)
        steps, values = zip(*series, strict=True)
        axis.plot(steps, values, color=color[name], linewidth=1.3, marker="o", markersize=2.5, label=text)
    if mark:
        axis.axhline(mark[1], color="0.4", linewidth=0.7, linestyle="--")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axis.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}K" if step >= 1000 else f"{step:g}")
    axis.set_xlabel("training step")
    axis.set_ylabel(f"{plain(label)}\nlower is better")
    figure.legend(loc="outside upper left")  # below one another: names are long, and inside they would hide curves
    return figure


def _title(split, key):
    """Two lines: what is drawn, and which way is better where there is one."""
    name = plain(key.replace("_", " ")) + (", dB" if "psnr" in key else "")
    if key in _CODEBOOK:
        direction = "higher is better"
    elif split == "eval":
        direction = "higher is better" if key.split("/")[0].removeprefix("pixel_") in _HIGHER else "lower is better"
    else:
        direction = "lower is better" if key in _LOSSES else ""
    return f"{name} ({split})\n{direction}"


def _legend(figure, axes, count):
    """One legend for all panels, above them."""
    handles = {}
    for axis in axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if count > 1 and handles:
        figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=min(count, 5))


def _short(value):
    """Few characters, so that the labels of neighbouring bars do not touch: 107, 12.0, 1.25, .30, .067, 0."""
    if value is None:
        return "n/a"
    if value >= 9.995:
        return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
    text = f"{value:.2f}" if value >= 0.0995 else f"{value:.3f}".rstrip("0").rstrip(".")
    return text.removeprefix("0") or "0"


def _number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _running_average(values, width):
    """Mean over the last `width` values, fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
