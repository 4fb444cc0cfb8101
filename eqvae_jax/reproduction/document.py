"""The result of an experiment: the paper's numbers beside ours, and what they say of its claims."""

import json
import math
import re

from eqvae_jax.reproduction.claims import HOLDS, estimate, judge
from eqvae_jax.reproduction.stages import in_order

MISSING, NO_NUMBER = "–", "no number"
READING = """Ours: the mean over seeds ± its standard error. A claim is judged by the differences of its two numbers
seed by seed: it holds, or does not, where Student's 95 % interval of their mean leaves out 0, and is undecided
otherwise. Of many claims judged so, one in twenty would be by chance. Numbers of this scale compare with each other,
never with the paper's."""


def collect(experiment, benches, root):
    """{seed: {(row, column): value}} of what the stages of evaluation wrote; None of what failed or was not finite."""
    numbers = {}
    for bench in benches:
        measures = experiment.measured(bench)
        numbers[bench.seed] = {cell: _value(measure, root) for cell, measure in measures.items()}
    return numbers


def _value(measure, root):
    path = measure.stage.folder(root) / "metrics.json"
    if not path.exists():
        return None
    results = json.loads(path.read_text())["results"]["model"]
    plain = {re.sub(r"\(.*?\)", "", key): value for key, value in results.items()}
    if measure.key not in plain:
        raise ValueError(f"{measure.stage.name}: metrics.json has no {measure.key}, only {', '.join(sorted(plain))}.")
    return plain[measure.key]


def document(experiment, numbers, how):
    """What the files say, as one dict of plain values. how: {name: text} of the command, the scale, the machine ..."""
    everywhere = [cell for cell in next(iter(numbers.values()), {}) if all(cell in row for row in numbers.values())]
    judged = [judge(claim, numbers) for claim in experiment.claims if {claim.less, claim.more} <= set(everywhere)]
    rows = []
    for row in experiment.rows:
        for column in experiment.columns:
            cell = (row, column.name)
            values = {seed: measured[cell] for seed, measured in numbers.items() if cell in measured}
            if not values and cell not in experiment.paper:
                continue
            whole = all(value is not None and math.isfinite(value) for value in values.values())
            found = estimate(values.values()) if whole else None
            rows.append({
                "row": row, "column": column.name, "paper": experiment.paper.get(cell), "seeds": values,
                "mean": found and found.mean, "standard_error": found and found.error,
            })  # fmt: skip
    claims = [
        {
            "claim": verdict.claim.text, "decision": verdict.decision, "smaller": verdict.claim.less,
            "larger": verdict.claim.more, "difference": verdict.difference and verdict.difference._asdict(),
            "interval": [verdict.low, verdict.high], "seeds_without": verdict.missing,
        }  # fmt: skip
        for verdict in judged
    ]
    return {"title": experiment.title, "about": experiment.about, "how": how, "numbers": rows, "claims": claims}


def table(experiment, found):
    """(head, rows) as text: for each column the paper's number, where it has any there, and ours."""
    cells = {(entry["row"], entry["column"]): entry for entry in found["numbers"]}
    printed = {column for _, column in experiment.paper}
    names = [""]
    for column in experiment.columns:
        arrow = {"lower": " ↓", "higher": " ↑"}.get(column.better, "")
        names += [f"{column.name}{arrow}, paper"] if column.name in printed else []
        names += ["ours" if column.name in printed else f"{column.name}{arrow}"]
    lines = []
    for row in experiment.rows:
        line = [row]
        for column in experiment.columns:
            entry = cells.get((row, column.name))
            line += [_paper(entry)] if column.name in printed else []
            line += [_ours(entry, column.digits)]
        lines.append(line)
    return names, lines


def _paper(entry):
    return MISSING if entry is None or entry["paper"] is None else f"{entry['paper']:g}"


def _ours(entry, digits):
    if entry is None or not entry["seeds"]:
        return MISSING
    if entry["mean"] is None:
        return NO_NUMBER
    error = entry["standard_error"]
    return f"{entry['mean']:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def sentences(found):
    """Of each claim: its text, what became of it, and by what, for people."""
    lines = []
    for claim in found["claims"]:
        difference, (low, high) = claim["difference"], claim["interval"]
        parts = [f"difference {difference['mean']:+.3g}"] if difference else []
        parts += [f"interval {low:+.3g} to {high:+.3g}"] if low is not None else []
        parts += [f"{difference['count']} seed{'s' if difference['count'] > 1 else ''}"] if difference else []
        parts += [f"{claim['seeds_without']} without a number"] if claim["seeds_without"] else []
        lines.append((claim["claim"], claim["decision"], ", ".join(parts)))
    return lines


def as_markdown(experiment, found):
    """The result as Markdown: for a terminal, a pull request, the documentation."""
    lines = [f"# {found['title']}", "", found["about"], ""]
    if found["numbers"]:
        head, rows = table(experiment, found)
        lines += _markdown(head, rows) + ["", " ".join(READING.split()), ""]
    if found["claims"]:
        bold = lambda decision: f"**{decision}**" if decision == HOLDS else decision
        rows = [(text, bold(decision), by) for text, decision, by in sentences(found)]
        lines += [*_markdown(["claim", "here", "by"], rows), ""]
    lines += [f"- {name}: {text}" for name, text in found["how"].items()]
    return "\n".join(lines) + "\n"


def _markdown(head, rows):
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def as_html(experiment, found, pictures=()):
    """The result as a page that needs nothing else. pictures: page.Picture."""
    from eqvae_jax.evaluation import page

    parts = [page.paragraph(found["about"])]
    if found["numbers"]:
        parts += [page.heading("Numbers"), page.table(*table(experiment, found)), page.paragraph(READING)]
    if found["claims"]:
        parts += [page.heading("Claims"), page.table(["claim", "here", "by"], sentences(found))]
    parts += [page.picture(picture) for picture in pictures]
    parts += [page.heading("How the numbers were made"), page.table(["", ""], list(found["how"].items()))]
    parts += [page.details("Every number, of each seed", found["numbers"])] if found["numbers"] else []
    return page.frame(found["title"], parts)


def pictures(experiment, bench, root):
    """The Pictures of an experiment, of one seed."""
    from eqvae_jax.evaluation import page

    found = []
    for stage, pattern, caption in experiment.pictures(bench):
        paths = sorted(stage.result(root).glob(pattern))
        if not paths and stage.finished(root):
            raise ValueError(f"{stage.name} left no {pattern} in {stage.result(root)}.")
        for path in paths:
            text = caption.format(name=path.stem.replace("_", " "))
            found.append(page.Picture("", path.read_bytes(), text, text))
    return found


def records(stages, root):
    """What is known of how the stages of a result were made, oldest first. Raises ValueError of a damaged one."""
    found = []
    for stage in in_order(stages):
        path = stage.record(root)
        try:
            found += [json.loads(path.read_text())] if path.exists() else []
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and {stage.folder(root)}.") from error
    return sorted(found, key=lambda record: record["finished"])
