"""The result of an experiment: the paper's numbers beside ours, and what they say of its claims."""

import json
import math
import re
from pathlib import Path

from eqvae_jax.reproduction.claims import HOLDS, estimate, judge
from eqvae_jax.reproduction.stages import in_order

MISSING = "–"
READING = """Ours: the mean over seeds ± its standard error. A claim is judged by the differences of its two numbers
seed by seed: it holds, or does not, where Student's 95 % interval of their mean leaves out 0, and is undecided
otherwise. Numbers of this scale compare with each other, never with the paper's."""


def collect(experiment, benches, root):
    """{seed: {(row, column): value}} of what the stages of evaluation wrote; None where a value was not finite."""
    numbers = {}
    for bench in benches:
        measures = experiment.measured(bench)
        numbers[bench.seed] = {cell: _value(measure, root) for cell, measure in measures.items()}
    return numbers


def _value(measure, root):
    results = json.loads((measure.stage.folder(root) / "metrics.json").read_text())["results"]["model"]
    plain = {re.sub(r"\(.*?\)", "", key): value for key, value in results.items()}
    if measure.key not in plain:
        raise ValueError(f"{measure.stage.name}: metrics.json has no {measure.key}, only {', '.join(sorted(plain))}.")
    return plain[measure.key]


def document(experiment, numbers, how):
    """What the files say, as one dict of plain values. how: {name: text} of the command, the scale, the machine ..."""
    verdicts = [
        judge(claim, numbers)
        for claim in experiment.claims
        if all(cell in row for row in numbers.values() for cell in (claim.less, claim.more))
    ]
    rows = []
    for row in experiment.rows:
        for column in experiment.columns:
            values = {
                seed: row_numbers[row, column.name]
                for seed, row_numbers in numbers.items()
                if (row, column.name) in row_numbers
            }
            paper = experiment.paper.get((row, column.name))
            if values or paper is not None:
                known = [value for value in values.values() if value is not None]
                found = estimate(known) if len(known) == len(values) else None
                rows.append(
                    {
                        "row": row,
                        "column": column.name,
                        "paper": paper,
                        "seeds": values,
                        "mean": found and found.mean,
                        "standard_error": found and found.error,
                    }
                )
    return {
        "title": experiment.title,
        "about": experiment.about,
        "how": how,
        "numbers": rows,
        "claims": [
            {
                "claim": v.claim.text,
                "decision": v.decision,
                "smaller": v.claim.less,
                "larger": v.claim.more,
                "difference": v.difference and v.difference._asdict(),
                "interval": [v.low, v.high],
            }
            for v in verdicts
        ],
    }


def head(experiment):
    return ["", *(f"{column.name}{_arrow(column)}" for column in experiment.columns)]


def _arrow(column):
    return {"lower": " ↓", "higher": " ↑"}.get(column.better, "")


def body(experiment, found):
    """The table's rows as text: the paper's number, and ours."""
    cells = {(entry["row"], entry["column"]): entry for entry in found["numbers"]}
    digits = {column.name: column.digits for column in experiment.columns}
    lines = []
    for row in experiment.rows:
        line = [row]
        for column in experiment.columns:
            entry = cells.get((row, column.name))
            line.append(MISSING if entry is None else f"{_paper(entry['paper'])} | {_ours(entry, digits[column.name])}")
        lines.append(line)
    return lines


def _paper(value):
    return MISSING if value is None else f"{value:g}"


def _ours(entry, digits):
    if not entry["seeds"]:
        return MISSING
    if entry["mean"] is None or not math.isfinite(entry["mean"]):
        return "not finite"
    error = entry["standard_error"]
    return f"{entry['mean']:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def sentences(found):
    """A line for each claim, for people."""
    lines = []
    for claim in found["claims"]:
        difference, (low, high) = claim["difference"], claim["interval"]
        if difference is None:
            detail = "no number"
        elif low is None:
            detail = f"difference {difference['mean']:+.3g}, of one seed"
        else:
            detail = (
                f"difference {difference['mean']:+.3g}, interval {low:+.3g} to {high:+.3g}, {difference['count']} seeds"
            )
        lines.append((claim["claim"], claim["decision"], detail))
    return lines


def as_markdown(experiment, found):
    """The result as Markdown: for a terminal, a pull request, the documentation."""
    lines = [f"# {found['title']}", "", found["about"], ""]
    if found["numbers"]:
        names = [""]
        for column in experiment.columns:
            names += [f"{column.name}{_arrow(column)}, paper", "ours"]
        lines += [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
        for first, *rest in body(experiment, found):
            cells = [part for cell in rest for part in (cell.split(" | ") if " | " in cell else [cell, MISSING])]
            lines.append(f"| {first} | {' | '.join(cells)} |")
        lines += ["", " ".join(READING.split()), ""]
    if found["claims"]:
        lines += ["| the paper's claim | here | by |", "|---|---|---|"]
        for text, decision, detail in sentences(found):
            lines.append(f"| {text} | {'**' + decision + '**' if decision == HOLDS else decision} | {detail} |")
        lines.append("")
    lines += [f"- {name}: {text}" for name, text in found["how"].items()]
    return "\n".join(lines) + "\n"


def as_html(experiment, found, pictures=()):
    """The result as a page that needs nothing else. pictures: page.Picture."""
    from eqvae_jax.evaluation import page

    parts = [page.paragraph(found["about"])]
    if found["numbers"]:
        parts += [
            page.heading("Numbers"),
            page.paragraph("In each cell: the paper's | ours."),
            page.table(head(experiment), body(experiment, found)),
            page.paragraph(READING),
        ]
    if found["claims"]:
        parts += [page.heading("Claims"), page.table(["the paper's claim", "here", "by"], sentences(found))]
    parts += [page.picture(picture) for picture in pictures]
    parts += [page.heading("How the numbers were made"), page.table(["", ""], list(found["how"].items()))]
    return page.frame(found["title"], parts)


def pictures(experiment, bench, root):
    """The Pictures of an experiment, of one seed."""
    from eqvae_jax.evaluation import page

    found = []
    for stage, pattern, caption in experiment.pictures(bench):
        paths = sorted(stage.result(root).glob(pattern))
        if not paths:
            raise ValueError(f"{stage.name} left no {pattern} in {stage.result(root)}.")
        for path in paths:
            text = caption.format(name=path.stem.replace("_", " "))
            found.append(page.Picture("", path.read_bytes(), text, text))
    return found


def commits(stages, root):
    """The commits that the stages of a result were made at, oldest first."""
    records = [json.loads(stage.record(root).read_text()) for stage in in_order(stages) if stage.record(root).exists()]
    return list(dict.fromkeys(str(record["commit"]) for record in sorted(records, key=lambda one: one["finished"])))


def spent(stages, root):
    """Seconds that the stages of a result took, one after another."""
    return sum(
        json.loads(Path(stage.record(root)).read_text())["seconds"]
        for stage in in_order(stages)
        if stage.record(root).exists()
    )
