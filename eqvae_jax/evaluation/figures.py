"""Pictures for a paper or a report: latents, transformed decodes, reconstructions. Arrays in, Figure out.

A Figure is made without pyplot, so nothing global changes and no display is needed. Curves and bars are in
charts.py; both use the style below.
"""

import functools
import pathlib
import textwrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eqvae_jax.atomic import whole

WIDTH, COLUMN, HEIGHT = 6.75, 3.25, 9.0  # inches: a two-column conference page (ICML's), and one of its columns
_STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "pdf.fonttype": 42,  # TrueType: text stays text in the PDF
}
# Okabe and Ito's palette, which the colour-blind can tell apart, with grey for black and without yellow.
_PALETTE = ("#8C8C8C", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def styled(function):
    """Decorator: draws with this module's style and leaves matplotlib's settings as they were."""

    @functools.wraps(function)
    def draw(*arguments, **options):
        with matplotlib.rc_context(_STYLE):
            return function(*arguments, **options)

    return draw


def colors(names):
    """dict name -> colour; the first of three or more is grey, as the starting point of a comparison."""
    names = list(names)
    palette = _PALETTE if len(names) > 2 else _PALETTE[1:]
    return {name: palette[i % len(palette)] for i, name in enumerate(names)}


def plain(text):
    """`text` as matplotlib will print it: a dollar sign would start mathematics."""
    return str(text).replace("$", r"\$")


def save(figure, path):
    """Writes PATH.png (200 dots per inch) and PATH.pdf, each whole; `path` has no suffix. Returns both paths."""
    path = pathlib.Path(path)
    png, pdf = (path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "pdf"))
    with matplotlib.rc_context(_STYLE):
        with whole(png) as partial:
            figure.savefig(partial, format="png", dpi=200)
        figure.set_layout_engine("none")  # places are found by now; finding them again takes most of the time
        with whole(pdf) as partial:  # without a date: the same bytes from the same arrays
            figure.savefig(partial, format="pdf", dpi=200, metadata={"CreationDate": None})
    return [png, pdf]


def pca_rgb(latent, image=None):
    """The first three principal components of one latent (h, w, C) as a picture, (h, w, 3) in [0, 1].

    Components are of this latent alone: blue is the first, green the second, red the third, with one common
    minimum and maximum, as the released code's vis_latent.py. A component's sign is arbitrary; with `image`
    (H, W, 3) each is turned to agree with the image's brightness, so that pictures of several models can be
    compared. Colours still mean different channels in different models. Fewer than three channels leave red,
    then green, at their mean. A latent that is not finite is all grey.
    """
    height, width, channels = latent.shape
    if not np.isfinite(latent).all():
        return np.full((height, width, 3), 0.5)
    rows = np.asarray(latent, np.float64).reshape(-1, channels)
    rows = rows - rows.mean(0)
    _, vectors = np.linalg.eigh(rows.T @ rows)
    components = rows @ vectors[:, -3:]  # ascending: third, second, first
    if image is not None:
        components = components * _signs(components, np.asarray(image, np.float64), height, width)
    missing = 3 - components.shape[1]
    components = np.concatenate([np.zeros((len(rows), missing)), components], axis=1)
    low, high = components.min(), components.max()
    return ((components - low) / max(high - low, 1e-12)).reshape(height, width, 3)


def _signs(components, image, height, width):
    """+1 or -1 for each column: the sign of its covariance with the image's brightness at (h, w)."""
    rows = np.arange(image.shape[0]) * height // image.shape[0]
    columns = np.arange(image.shape[1]) * width // image.shape[1]
    brightness = np.zeros((height, width))
    np.add.at(brightness, (rows[:, None], columns[None, :]), image.mean(-1))
    brightness /= np.outer(np.bincount(rows, minlength=height), np.bincount(columns, minlength=width))
    return np.where((brightness - brightness.mean()).reshape(-1) @ components < 0, -1.0, 1.0)


@styled
def latent_pca(images, latents, width=WIDTH):
    """One row per image: the image, then each model's latent by `pca_rgb`; the left of the paper's Figure 1.

    images: (N, H, W, 3) in [-1, 1]; latents: dict name -> (N, h, w, C). width: of the figure, at most, in inches.
    """
    figure, axes, cell = _grid(len(images), 1 + len(latents), width, margin=0.1)
    for row, image in enumerate(images):
        _show(axes[row, 0], _unit(image))
        for column, latent in enumerate(latents.values(), start=1):
            # Bilinear enlargement is what the released code does; blocks would hide the structure.
            _show(axes[row, column], pca_rgb(latent[row], image), interpolation="bilinear")
    sizes = {name: "{1} × {2} × {3}".format(*latent.shape) for name, latent in latents.items()}
    _titles(axes[0], ["image", *(f"{_wrapped(name, cell)}\n{sizes[name]}" for name in latents)], cell)
    return figure


@styled
def tau_grid(targets, moved, first=None, width=WIDTH):
    """One row per transform: tau x, then each model's D(tau E(x)); with `first`, D(E(tau x)) stands beside it.

    The paper's Figures 2 and 6. targets: dict label -> (H, W, 3) in [-1, 1], labels as `transforms.Transform.label`;
    moved, first: dict name -> dict label -> (H, W, 3). Below each decode is its pixel error, the mean |difference| of
    [-1, 1] from tau x; the smallest of a row's D(tau E(x)) is bold. width: of the figure, at most, in inches.
    """
    each = 2 if first else 1
    figure, axes, cell = _grid(len(targets), 1 + each * len(moved), width, caption=0.16)
    for row, (label, target) in enumerate(targets.items()):
        _show(axes[row, 0], _unit(target))
        kind = f"scale {label}" if float(label) < 10 else f"{label}°"
        text = f"{kind}\n{target.shape[0]} × {target.shape[1]}"
        axes[row, 0].set_ylabel(text, rotation=0, ha="right", va="center", labelpad=4, fontsize=_text_size(cell))
        images = {name: by_label[label] for name, by_label in moved.items()}
        errors = {name: float(np.abs(image - target).mean()) for name, image in images.items()}
        for column, (name, image) in enumerate(images.items()):
            if first:
                encoded = first[name][label]
                _show(axes[row, 1 + 2 * column], _unit(encoded))
                _below(axes[row, 1 + 2 * column], _error(float(np.abs(encoded - target).mean()), cell), {}, name, cell)
            _show(axes[row, (1 + column) * each], _unit(image))
            _below(axes[row, (1 + column) * each], _error(errors[name], cell), errors, name, cell)
    orders = [r"$D(E(\tau x))$", r"$D(\tau E(x))$"] if first else [r"$D(\tau E(x))$"]
    decodes = [f"{_wrapped(name, cell)}\n{order}" for name in moved for order in orders]
    _titles(axes[0], [r"$\tau x$", *decodes], cell)
    return figure


@styled
def reconstruction_grid(images, reconstructions, width=WIDTH):
    """One row per image: the image, then each model's D(E(x)) with its PSNR below.

    images: (N, H, W, 3) in [-1, 1]; reconstructions: dict name -> (N, H, W, 3). width: of the figure, at most, in
    inches.
    """
    figure, axes, cell = _grid(len(images), 1 + len(reconstructions), width, caption=0.16, margin=0.1)
    for row, image in enumerate(images):
        _show(axes[row, 0], _unit(image))
        errors = {name: float(np.square(batch[row] - image).mean()) for name, batch in reconstructions.items()}
        for column, (name, batch) in enumerate(reconstructions.items(), start=1):
            _show(axes[row, column], _unit(batch[row]))
            psnr = 10 * np.log10(4 / errors[name]) if errors[name] else np.inf
            _below(axes[row, column], f"{psnr:.1f} dB", errors, name, cell)
    _titles(axes[0], ["image", *(_wrapped(name, cell) for name in reconstructions)], cell)
    return figure


@styled
def sample_grid(images, columns=None, width=WIDTH):
    """Samples side by side, row after row, narrow white lines between them.

    images: (N, H, W, 3), uint8 or float in [-1, 1]. columns: how many in a row; None makes the whole about square.
    width: of the figure in inches; a grid of more rows than columns is narrowed until it fits a page.

    Raises:
      ValueError: there is no image, or the array has another shape or type.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise ValueError(f"Samples must be (N, H, W, 3) with at least one image, got shape {images.shape}.")
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise ValueError(f"Samples must be uint8, or float in [-1, 1], not {images.dtype}.")
    count, height, side, _ = images.shape
    columns = min(count, columns or int(np.ceil(np.sqrt(count))))
    rows, gap = -(-count // columns), max(1, side // 32)
    mosaic = np.ones((rows * (height + gap) - gap, columns * (side + gap) - gap, 3), np.float32)
    for place, image in enumerate(images):
        top, left = place // columns * (height + gap), place % columns * (side + gap)
        unit = image / np.float32(255) if image.dtype == np.uint8 else _unit(image)
        mosaic[top : top + height, left : left + side] = unit
    width = min(width, HEIGHT * mosaic.shape[1] / mosaic.shape[0])
    figure = Figure(figsize=(width, width * mosaic.shape[0] / mosaic.shape[1]))
    _show(figure.add_axes((0, 0, 1, 1)), mosaic)
    return figure


def _grid(rows, columns, width, caption=0.06, margin=0.7):
    """(figure, axes, cell): square cells, at most 1.5 inches and as large as width and page allow.

    caption: inches between rows; margin: for what is written on the left.
    """
    cell = min(1.5, (width - margin) / columns - 0.05, (HEIGHT - 0.35) / rows - caption)
    size = (margin + columns * (cell + 0.05), 0.35 + rows * (cell + caption))
    figure = Figure(figsize=size, layout="compressed")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    return figure, figure.subplots(rows, columns, squeeze=False), cell


def _show(axis, image, interpolation="auto"):
    axis.imshow(np.clip(np.nan_to_num(image, nan=0.5), 0, 1), interpolation=interpolation)  # what is broken is grey
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _titles(axes, titles, cell):
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, pad=3, fontsize=_text_size(cell))


def _text_size(cell):
    """Points that let D(E(tau x)) fit above a cell of so many inches."""
    return 8 if cell >= 0.7 else 6


def _wrapped(name, cell):
    """A name as matplotlib prints it, in lines that fit above a cell."""
    return plain("\n".join(textwrap.wrap(str(name), max(6, int(cell * 72 / (0.6 * _text_size(cell)))))))


def _error(value, cell):
    return f"error {value:.3f}" if cell >= 0.7 else f"{value:.3f}"


def _below(axis, text, errors, name, cell):
    """Prints `text` below, in bold where `name` has the smallest of several errors."""
    bold = len(errors) > 1 and errors[name] == min(errors.values())
    axis.set_xlabel(text, fontsize=min(7, _text_size(cell)), labelpad=1.5, fontweight="bold" if bold else "normal")


def _unit(image):
    """[-1, 1] -> [0, 1]."""
    return (np.asarray(image, np.float32) + 1) / 2
