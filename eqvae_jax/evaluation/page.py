"""One self-contained HTML page: text, tables and PNGs in, a string out. No script, nothing fetched."""

import base64
import html
import json
import re
from typing import NamedTuple

from eqvae_jax.evaluation import tables
from eqvae_jax.training.workdir import differences

_STYLE = """
:root {
  color-scheme: light dark;
  --text: #1c1e21; --soft: #5c6370; --line: #d9dce1; --page: #fff; --tint: #f4f6f8; --best: #0a6b4f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e6e8eb; --soft: #a0a7b4; --line: #3a3f47; --page: #17191c; --tint: #22262b; --best: #6fd6b2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
}
main { max-width: 58rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { max-width: 44rem; overflow-wrap: anywhere; }
.verdict {
  background: var(--tint); border-left: .25rem solid var(--best); padding: .6rem 1rem; font-weight: 600;
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem .28rem 0; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--line); }
tbody td, tbody th { border-bottom: 1px solid var(--line); font-weight: normal; }
tbody th.group { font-weight: 600; padding-top: 1.1rem; }
tr.mean th { font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
b { color: var(--best); }
small, figcaption, .soft { color: var(--soft); }
figure { margin: 1.2rem 0; }
figure img {
  display: block; width: 100%; max-width: 48rem; height: auto;
  background: #fff; border-radius: .4rem; padding: .4rem;
}
figcaption { max-width: 44rem; font-size: .92rem; margin-top: .5rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre {
  overflow-x: auto; background: var(--tint); padding: .8rem; border-radius: .4rem;
  font-size: .8rem; line-height: 1.4;
}
td.text { overflow-wrap: anywhere; min-width: 8rem; }
@media (max-width: 40rem) {
  main { padding: 1.2rem .8rem 3rem; }
  body { font-size: 15px; }
  table { font-size: .84rem; }
}
@media print {
  :root { --text: #000; --soft: #444; --line: #bbb; --page: #fff; --tint: #f4f4f4; --best: #000; }
  main { max-width: none; padding: 0; }
  figure, tr, .verdict { break-inside: avoid; }
  figure img { width: auto; max-width: 100%; max-height: 20cm; padding: 0; }
  h2 { break-after: avoid; }
  .scroll, pre { overflow: visible; } pre { white-space: pre-wrap; }
}
"""

# Forbids whatever the page does not carry itself, should a run's name or config try to bring it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


# Fields of the protocol that the line about the images says already.
_IN_IMAGES = ("images", "image_size", "crops", "min_crop", "max_crop")


class Picture(NamedTuple):
    """A PNG (bytes): its heading ("" continues the section), what it shows in words, what to look for."""

    heading: str
    png: bytes
    description: str
    caption: str


def escape(text):
    """Any value as text that is safe in an element and in a quoted attribute."""
    return html.escape(str(text), quote=True)


def render(title, paragraphs, document, pictures, configs, differing):
    """The page as a string.

    Args:
      title, paragraphs: plain text. document: from comparison.compare. pictures: list of Picture.
      configs: name -> resolved config (a nested dict) of each run. differing: rows (leaf, value of each run).
    """
    verdict = tables.verdict(document)
    parts = [paragraph(text) for text in paragraphs]
    parts += [f'<p class="verdict">{escape(verdict)}</p>\n'] if verdict else []
    parts += [heading("Numbers"), _numbers(document)]
    parts += [picture(one) for one in pictures]
    parts += [*configurations(configs, differing), heading("How the numbers were made"), _provenance(document)]
    return frame(title, parts)


def frame(title, parts):
    """A whole page from the HTML of its parts."""
    return "".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n",
        f"<h1>{escape(title)}</h1>\n", *parts, "</main>\n</body>\n</html>\n",
    ])


def heading(text):
    return f"<h2>{escape(text)}</h2>\n"


def paragraph(text):
    return f"<p>{escape(' '.join(text.split()))}</p>\n"


def configurations(configs, differing=None):
    """The parts that say how runs were made: configs is name -> nested dict; differing is found where not given."""
    differing = differing_rows(configs) if differing is None else differing
    parts = [heading("How the runs were made")]
    if differing:
        parts += [
            "<p>These settings differ between the runs; all others are the same.</p>\n",
            table(["setting", *configs], differing),
        ]
    return [*parts, *(details(f"Configuration of {name}", config) for name, config in configs.items())]


def differing_rows(configs):
    """Rows (leaf, its value in each run) of the leaves in which any config differs from the first."""
    first, *others = configs.values()
    leaves = sorted({leaf for other in others for leaf, _, _ in differences(first, other)})
    rows = []
    for leaf in leaves:
        values = []
        for config in configs.values():
            value = config
            for part in leaf.split("."):
                value = value.get(part, "absent") if isinstance(value, dict) else "absent"
            values.append(value if isinstance(value, str) else json.dumps(value))
        rows.append((leaf, *values))
    return rows


def _greek(text):
    """The table's ASCII labels as the page writes them: "tau E(x)" is τE(x)."""
    return re.sub(r"tau (?=E|x)", "τ", escape(text)).replace("tau", "τ")


def _numbers(document):
    """The comparison table; the best value of a line is bold, changes are relative to the baseline."""
    results, reference = document["results"], document["baseline"]
    head = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in results)
    body = []
    for heading, rows in tables.groups(results):
        width = len(results) + 2
        body.append(f'<tr><th class="group" scope="rowgroup" colspan="{width}">{_greek(heading)}</th></tr>\n')
        for row in rows:
            winners, cells = tables.best(row, results), []
            for name, column in results.items():
                text = escape(tables.cell(row, column.get(row.key)))
                text = f"<b>{text}</b>" if name in winners else text
                if change := tables.change(row, results, name, reference):
                    text += f"<br><small>{escape(change.replace('-', '−'))}</small>"
                cells.append(f'<td class="number">{text}</td>')
            kind = ' class="mean"' if row.mean else ""
            label = f'<th scope="row">{_greek(row.label)}</th><td class="soft">{row.better}</td>'
            body.append(f"<tr{kind}>{label}{''.join(cells)}</tr>\n")
    note = f"{_images(document)}."
    if len(results) > 1:
        note = f"Bold: best of the line. Small: change from {reference}. {note}"
    notes = "".join(f'<p class="soft">{escape(text)}</p>\n' for text in [note, *document.get("warnings", [])])
    return (
        f'<div class="scroll"><table><thead><tr><th></th><th scope="col">better</th>{head}</tr></thead>\n'
        f'<tbody>\n{"".join(body)}</tbody></table></div>\n{notes}'
    )


def _images(document):
    images = document["images"]
    side = images["image_size"]
    return f"{images['count']} images of {side} × {side} pixels from {images['reference']}, {images['crop']}"


def picture(picture):
    """A Picture with its heading and caption."""
    data = base64.b64encode(picture.png).decode("ascii")
    above = heading(picture.heading) if picture.heading else ""
    return (
        f'{above}<figure><img alt="{escape(picture.description)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>\n"
    )


def _provenance(document):
    rows = []
    for name, model in document["autoencoders"].items():
        codes = f" with {model['codebook_size']:,} codes" if "codebook_size" in model else ""
        text = f"{model['reference']}, kind {model['kind']}{codes}, {model['parameters']:,} parameters, "
        text += f"weights {model['hash']}"
        rows.append([name, text])
    rows.append(["images", _images(document)])
    if document["images"]["broken"]:
        rows.append(["left out as broken", ", ".join(document["images"]["broken"])])
    for key, value in document["protocol"].items():
        if isinstance(value, (str, int, float)) and key not in _IN_IMAGES:
            rows.append([key.replace("_", " "), value])
    if features := document["protocol"].get("rfid"):
        rows.append(["features of rFID", "{name}, weights {hash}, input {protocol}".format(**features)])
    rows += [[key, value] for key, value in document["software"].items()]
    rows.append(["command", " ".join(document["command"])])
    return table(["", ""], rows) + details("Every number, as in metrics.json", document["results"])


def table(head, rows):
    """A table of text: head, names of the columns; rows, of which the first cell is a heading."""
    columns = "".join(f'<th scope="col">{escape(text)}</th>' for text in head) if any(head) else ""
    top = f"<thead><tr>{columns}</tr></thead>\n" if columns else ""
    lines = []
    for first, *rest in rows:
        cells = "".join(f'<td class="text">{escape(text)}</td>' for text in rest)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>\n')
    return f'<div class="scroll"><table>{top}<tbody>\n{"".join(lines)}</tbody></table></div>\n'


def details(summary, tree):
    """A part that opens on a click: a nested dict as JSON."""
    text = json.dumps(tree, indent=2, ensure_ascii=False)
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>\n"
