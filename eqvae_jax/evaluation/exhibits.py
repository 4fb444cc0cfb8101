"""The figures of one comparison: the pictures behind its numbers, and which figures there are for what was measured."""

import pathlib

import numpy as np

from eqvae_jax.evaluation import charts, comparison, figures, reconstruction

SHOWN, TRANSFORMED = 3, 2  # images in the figures, and how many of them get a grid of transforms


def collect(models, batches, protocol, measures=comparison.MEASURES, count=SHOWN):
    """name -> arrays of reconstruction.pictures of the first `count` different images, at most a batch of them.

    models, protocol, measures: as comparison.compare had them, whose compiled programs serve again.
    """
    rows = {}
    for batch in batches:
        for image, index, real in zip(batch["image"], batch["index"], batch["mask"], strict=True):
            if real and len(rows) < min(count, protocol.batch_size):
                rows.setdefault(int(index), image)
        if len(rows) == min(count, protocol.batch_size):
            break
    images = list(rows.values())
    batch = {"image": np.stack([images[i % len(images)] for i in range(protocol.batch_size)])}
    tau = {"method": protocol.interpolation, "antialias": protocol.antialias}
    chosen, shown = comparison.check(models, protocol, measures), {}
    for name, (model, params, _) in models.items():
        functions = reconstruction.functions(model)
        pictures = reconstruction.pictures(*functions, params, batch, chosen.get(name, []), **tau)
        shown[name] = {
            key: {label: rows[: len(images)] for label, rows in value.items()}
            if isinstance(value, dict)
            else value[: len(images)]
            for key, value in pictures.items()
        }
    return shown


def drawings(document, shown):
    """Yields (file's name, kind, Figure) of a comparison, only what its numbers cover; kinds are report's headings.

    document: from comparison.compare. shown: from `collect`.
    """
    results = document["results"]
    keys = {key for column in results.values() for key in column}
    first = next(iter(shown.values()))

    def of_each(key):
        return {name: pictures[key] for name, pictures in shown.items()}

    def row(of_models, number):
        return {name: _row(by_label, number) for name, by_label in of_models.items()}

    if first["target"]:
        for number in range(min(TRANSFORMED, len(first["image"]))):
            target = _row(first["target"], number)
            grid = figures.tau_grid(target, row(of_each("moved"), number), row(of_each("first"), number))
            yield f"tau_{number + 1}", "tau", grid
    if document["latents"]:
        yield "latent_pca", "latent_pca", figures.latent_pca(first["image"], of_each("latent"))
        yield "spectrum", "spectrum", charts.spectra(document["latents"])
    if "psnr" in keys:
        grid = figures.reconstruction_grid(first["image"], of_each("reconstruction"))
        yield "reconstruction", "reconstruction", grid
    if first["target"]:
        yield "errors", "errors", charts.bars(results)
        yield "transforms", "transforms", charts.transform_bars(results)


def write(document, shown, output):
    """Writes each of `drawings` to the folder `output` as PNG and PDF; returns the paths of the PNGs."""
    return [figures.save(figure, pathlib.Path(output) / name)[0] for name, _, figure in drawings(document, shown)]


def _row(batches, number):
    """{label: (B, H, W, 3)} -> {label: (H, W, 3)}, row `number` of each."""
    return {label: batch[number] for label, batch in batches.items()}
