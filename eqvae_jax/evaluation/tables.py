"""The comparison table: which numbers, in which order and direction, and as text; page.py has it in HTML."""

import re
from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table: a key of the results, how it is called and read."""

    key: str
    label: str
    better: str  # "higher", "lower", or "" where there is neither
    digits: int
    change: str  # "difference" (in the row's unit), "percent" of the baseline, or "" for what has no better
    mean: bool = False  # a mean over the lines above it


_PIXELS = "Pixel error of D(tau E(x)) against tau x"
_FLOOR = "Floor: pixel error of D(E(tau x)) against tau x (tau first)"
_EXCESS = "Above the floor: pixel error of D(tau E(x)) less that of D(E(tau x))"


def groups(results):
    """[(heading, [Row])] of the keys that any column of `results` (name -> {key: value}) holds."""
    keys = list(dict.fromkeys(key for column in results.values() for key in column))

    def lower(key, label, mean=True):
        return Row(key, label, "lower", 4, "percent", mean)

    def each(prefix, family):
        """A line for each transform that was measured; R has degrees, S has scales."""
        unit = {"R": "{} degrees", "S": "scale {}"}[family]
        labels = [key.split("/")[1] for key in keys if key.startswith(f"{family}/")]
        return [lower(f"{prefix}/{label}", unit.format(label), mean=False) for label in labels]

    def plain(key, label, digits):
        return Row(key, label, "", digits, "")

    def distance(key, label, mean=True):
        return Row(key, label, "lower", 2, "percent", mean)

    # "rfid", "rfid(fashion-cnn)": without the transforms and the means over them
    rfids = list(dict.fromkeys(re.sub("_[RS]$", "", key.split("/")[0]) for key in keys if key.startswith("rfid")))
    table = {
        "Reconstruction D(E(x))": [
            *(distance(name, rfid_label(name), mean=False) for name in rfids),
            Row("psnr", "PSNR, dB", "higher", 2, "difference"),
            Row("ssim", "SSIM", "higher", 4, "difference"),
            lower("lpips", "LPIPS", mean=False),
            lower("l1", "mean |difference|, of [-1, 1]", mean=False),
        ],
        "Codebook": [
            Row("codebook_usage", "share of the codes in use", "higher", 4, "difference"),
            Row("codebook_perplexity", "perplexity of the codes", "higher", 1, "difference"),
        ],
        "Equivariance error of the latent": [
            *each("R", "R"), lower("R", "R, mean of the turns"),
            *each("S", "S"), lower("S", "S, mean of the scales"),
            lower("R_sample", "R of posterior samples"),
            lower("S_sample", "S of posterior samples"),
        ],
        **{
            f"{rfid_label(name)} of D(tau E(x)) against tau x": [
                *(row._replace(digits=2) for row in each(name, "R")), distance(f"{name}_R", "mean of the turns"),
                *(row._replace(digits=2) for row in each(name, "S")), distance(f"{name}_S", "mean of the scales"),
            ]
            for name in rfids
        },
        "Generated images against the reference": _of_generation(keys),
        f"{_PIXELS}, mean |difference| of [-1, 1]": [
            *each("pixel_l1", "R"), lower("pixel_l1/R", "mean of the turns"),
            *each("pixel_l1", "S"), lower("pixel_l1/S", "mean of the scales"),
        ],
        f"{_PIXELS}, PSNR in dB": [
            Row("pixel_psnr/R", "mean of the turns", "higher", 2, "difference", mean=True),
            Row("pixel_psnr/S", "mean of the scales", "higher", 2, "difference", mean=True),
        ],
        f"{_FLOOR}, mean |difference|": [
            lower("floor_l1/R", "mean of the turns"),
            lower("floor_l1/S", "mean of the scales"),
        ],
        f"{_EXCESS}, mean |difference|": [  # around zero, where a percentage would say nothing
            Row("excess_l1/R", "mean of the turns", "lower", 4, "difference", mean=True),
            Row("excess_l1/S", "mean of the scales", "lower", 4, "difference", mean=True),
        ],
        "Simplicity of the latents": [
            Row("intrinsic_dimension", "intrinsic dimension (TwoNN)", "lower", 1, "percent"),
            plain("intrinsic_points", "points it rests on", 0),
            plain("intrinsic_duplicates", "duplicates left out", 0),
            lower("spectrum_above_0.25", "energy above 1/4 of Nyquist", mean=False),
            lower("spectrum_above_0.5", "energy above 1/2 of Nyquist", mean=False),
        ],
        "Size of the latents (posterior samples)": [
            plain("latent_mean", "mean", 3),
            plain("latent_std", "standard deviation", 3),
            plain("latent_scaled_std", "the same after the model's scale", 3),
            plain("latent_channel_std_min", "of the least varied channel", 3),
            plain("latent_channel_std_max", "of the most varied channel", 3),
        ],
    }
    present = [(heading, [row for row in rows if row.key in keys]) for heading, rows in table.items()]
    return [(heading, rows) for heading, rows in present if rows]


def _of_generation(keys):
    """Rows of what evaluation.generation measures: other features than Inception's follow the name in brackets."""
    known = {
        "fid": ("FID", "lower", 3, "percent"),
        "sfid": ("sFID", "lower", 3, "percent"),
        "kid": ("KID", "lower", 5, "percent"),
        "inception_score": ("IS", "higher", 2, "difference"),
        "precision": ("precision", "higher", 4, "difference"),
        "recall": ("recall", "higher", 4, "difference"),
    }
    named = {key: key.partition("(")[::2] for key in keys}
    return [
        Row(key, f"{name}({rest}" if rest else name, better, digits + bool(rest), change)
        for metric, (name, better, digits, change) in known.items()
        for key, (stem, rest) in named.items()
        if stem == metric
    ]


def rfid_label(key):
    """"rfid(fashion-cnn)" as it is printed: rFID(fashion-cnn)."""
    return key.replace("rfid", "rFID", 1)


def baseline(names):
    """The column that changes are relative to: "control" where there is one, else the first."""
    names = list(names)
    return "control" if "control" in names else names[0]


def best(row, results):
    """Names of the columns with the best value as printed; none where all agree or only one has a value."""
    if not row.better:
        return set()
    values = {name: column.get(row.key) for name, column in results.items()}
    values = {name: round(value, row.digits) for name, value in values.items() if value is not None}
    if len(set(values.values())) < 2:
        return set()
    target = (max if row.better == "higher" else min)(values.values())
    return {name for name, value in values.items() if value == target}


def cell(row, value):
    """A value as text; "n/a" for one that is missing or was not finite."""
    return "n/a" if value is None else f"{value:z.{row.digits}f}"


def change(row, results, name, reference):
    """What `name` changes from `reference`: "+0.12" in the row's unit, or "-63%"; "" where nothing can be said."""
    value, old = results[name].get(row.key), results[reference].get(row.key)
    if not row.change or name == reference or value is None or old is None or (row.change == "percent" and old == 0):
        return ""
    if row.change == "difference":
        return f"{value - old:+z.{row.digits}f}"
    return f"{round(100 * (value / old - 1)):+d}%"


def format_table(metrics):
    """The table as aligned ASCII text, from the dict that `report.compare` and `evaluate` return and write.

    The best value of a line carries a star. Changes, in brackets, are relative to the baseline's column.
    """
    results, reference = metrics["results"], metrics["baseline"]
    header, lines = ["", "better"], []
    for name in results:
        header += [f"{name} "] if name == reference else [f"{name} ", ""]
    for heading, rows in groups(results):
        lines += [[], [heading]]
        for row in rows:
            winners, line = best(row, results), [f"  {row.label}", row.better]
            for name, column in results.items():
                line.append(cell(row, column.get(row.key)) + ("*" if name in winners else " "))
                if name != reference:
                    difference = change(row, results, name, reference)
                    line.append(f"({difference})" if difference else "")
            lines.append(line)
    widths = [max(len(line[i]) for line in [header, *lines] if len(line) > 1) for i in range(len(header))]
    texts = []
    for line in [header, *lines]:
        if len(line) > 1:
            padded = [text.ljust(width) for text, width in zip(line[:2], widths[:2], strict=True)]
            padded += [text.rjust(width) for text, width in zip(line[2:], widths[2:], strict=True)]
            line = ["  ".join(padded)]
        texts.append("".join(line).rstrip())
    images = metrics["images"]
    side = images["image_size"]
    note = f"{images['count']} images of {side} x {side} pixels from {images['reference']}"
    note = metrics.get("note", note)
    if len(results) > 1:
        note = f"* best of the line; in brackets: change from {reference}; {note}"
    return "\n".join([*texts, "", note, *(f"note: {warning}" for warning in metrics.get("warnings", []))])


def verdict(metrics):
    """One sentence: the last column against the baseline, in the factors that matter; "" without two columns."""
    results, reference = metrics["results"], metrics["baseline"]
    name = list(results)[-1]
    if name == reference or len(results) < 2:
        return ""
    facts = []
    labels = {"R": "R", "S": "S", "pixel_l1/R": "pixel error under turns", "pixel_l1/S": "pixel error under scales"}
    for key, label in labels.items():
        new, old = results[name].get(key), results[reference].get(key)
        if new and old:
            factor = f"{old / new:.2f}x lower" if new <= old else f"{new / old:.2f}x higher"
            facts.append(f"{label} {factor}")
    new, old = results[name].get("psnr"), results[reference].get("psnr")
    if new is not None and old is not None:
        facts.append(f"PSNR {abs(new - old):.2f} dB {'higher' if new > old else 'lower'}")
    return f"{name} against {reference}: {', '.join(facts)}." if facts else ""
