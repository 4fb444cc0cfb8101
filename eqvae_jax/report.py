"""Compares training runs: metrics.json, PNG and PDF figures, and one report.html.

Autoencoders are measured on held-out images; of generators it shows what they logged, and how much sooner one is as far
as another.

    python -m eqvae_jax.report --runs control=RUNS/sit-control EQ=RUNS/sit-eq --output=REPORT
    python -m eqvae_jax.report --runs control=RUNS/control EQ=RUNS/eq --images=photos:test --output=REPORT
    python -m eqvae_jax.report --workdir=RUNS/eq --images=folder:VAL --limit=500 --output=REPORT

report.html holds its pictures and needs nothing else: it can be mailed, printed and read on a phone.
"""

import argparse
import json
import pathlib
import sys

from eqvae_jax import commands
from eqvae_jax.atomic import whole
from eqvae_jax.evaluation import choices
from eqvae_jax.evaluation.tables import format_table, verdict

# JAX and all that imports it is imported where it is first needed: --help and a mistyped flag do not wait for it.

_ABOUT = (
    """An autoencoder E, D turns an image into a small latent and back. EQ-VAE (arXiv 2502.09509) fine-tunes it so
    that scaling or turning the latent scales or turns the decoded image: D(τE(x)) should be τx. This page
    measures how far that holds on images given for evaluation, and what it costs in plain reconstruction.""",
    """R and S say how far τE(x) is from E(τx), as a squared ratio per image: 0 is perfect, and 1 means that the two
    differ by as much as the latent itself. The pixel errors say how far the decoded picture is from τx.""",
)

# figure -> its heading, what it shows (read out where pictures are not seen), what to look for
_TEXTS = {
    "tau": (
        "Moving the latent instead of the image",
        """A grid with one row per transform: the transformed photograph on the left, beside it, for each model, the
        decode of its latent and the decode of the transformed latent of the photograph before it was transformed.""",
        """Left: the image after τ. D(E(τx)) is its plain reconstruction. D(τE(x)) never saw it: the latent of the
        upright, full-size image was turned or scaled, and decoded. The closer the two the more equivariant; look for
        broken edges, false texture and shifted colours. The error is the mean absolute difference from τx on a range
        from -1 to 1; the smallest of a row's D(τE(x)) is bold.""",
    ),
    "latent_pca": (
        "What the latents look like",
        """A grid with one row per image: the image on the left, beside it each model's latent as colours.""",
        """The first three principal components of each latent, computed for that latent alone: compare structure,
        not hues. Speckle is detail that a generator would have to model; smooth areas with clear outlines are
        what equivariance should bring.""",
    ),
    "spectrum": (
        "How fine the latents are",
        "A line chart of the energy of the latents over spatial frequency, one line per model.",
        """The mean squared cosine coefficients of the latents, relative to their mean over all frequencies but zero;
        white noise would be 1 everywhere. A line that falls further to the right belongs to smoother latents. 1 on the
        horizontal axis is a change of sign from each latent pixel to the next.""",
    ),
    "reconstruction": (
        "Plain reconstruction",
        """A grid with one row per image: the image on the left, beside it each model's reconstruction.""",
        """D(E(x)) without any transform: what fine-tuning must not spoil. PSNR in dB, higher is better; the best of
        a row is bold.""",
    ),
    "errors": (
        "The errors side by side",
        """Bar charts of R, S and the pixel errors, for each transform and their mean, one bar per model.""",
        """Lower is better everywhere. Above: the transformed latent against the latent of the transformed image.
        Below: the picture decoded from the transformed latent against the transformed image; the line across a bar
        is its floor, the error that is left when the image is transformed first.""",
    ),
    "transforms": (
        "Decodes of transformed latents",
        "Bar charts of the distance of D(τE(x)) from τx for each scale and the mean of the turns, one bar per model.",
        """The paper's Figure 3. It is rFID where features to measure it with were given, and otherwise the pixel error
        of above.""",
    ),
    "curves": (
        "Training",
        """Line charts of the logged metrics against the training step, one line per run.""",
        """Held-out metrics first, then training metrics: pale as logged, strong as a running average. The training
        losses of an EQ run are those of transformed images, so they are not comparable with a plain run's.""",
    ),
}


def compare(
    runs, *, images, output, image_size=None, batch_size=8, limit=None, crops=1, min_crop=0.5, max_crop=1.0,
    lpips=None, extractor=None, shown=None, progress=True,
):
    """Measures the autoencoders of several runs on the same images; writes metrics.json, figures, report.html.

    Args:
      runs: dict name -> workdir, in the table's order; changes are relative to "control", or to the first.
      images: a reference to images, best ones that were not trained on. output: a directory, made if need be.
      image_size: side in pixels; None takes the last run's data.image_size.
      batch_size, limit, crops, min_crop, max_crop: as data.images.evaluation_batches.
      lpips: parameters of features.lpips, to measure LPIPS too.
      extractor: evaluation.feature_sets.Extractor, to measure rFID too, plain and under each transform.
      shown: how many images the figures show, at most `batch_size`; None: exhibits.SHOWN.

    Returns:
      the dict of comparison.compare with "runs" (name -> workdir, step, config) added: what metrics.json holds,
      and what `format_table` and `verdict` take.

    Raises:
      ValueError: no run, no such workdir or image, or sizes that do not fit; before anything is compiled.
    """
    if not runs:
        raise ValueError("There is no run to report on.")
    import jax

    from eqvae_jax import weights
    from eqvae_jax.evaluation import charts, comparison, exhibits
    from eqvae_jax.training.checkpoint import saved_steps

    histories = {name: charts.read_rows(workdir) for name, workdir in runs.items()}
    configs = {name: _config(workdir) for name, workdir in runs.items()}
    side = image_size or list(configs.values())[-1].get("data", {}).get("image_size")
    if not side:
        raise ValueError(f"{list(runs.values())[-1]}/config.json does not say data.image_size: give image_size.")
    protocol = comparison.Protocol(
        images=images, image_size=side, batch_size=batch_size, limit=limit, crops=crops, min_crop=min_crop,
        max_crop=max_crop,
    )
    batches, broken = comparison.open_batches(protocol)
    models = {name: weights.load_autoencoder(f"workdir:{workdir}") for name, workdir in runs.items()}
    pathlib.Path(output).mkdir(parents=True, exist_ok=True)  # now, not after all that measuring
    document = comparison.compare(
        models, protocol, lpips=lpips, extractor=extractor, batches=batches, broken=broken, progress=progress
    )
    document["runs"] = {}
    for name, workdir in runs.items():
        step = max(saved_steps(workdir), default=None)
        document["runs"][name] = {"workdir": str(workdir), "step": step, "config": configs[name]}
    shown = exhibits.collect(models, batches, protocol, count=shown or exhibits.SHOWN)
    if jax.process_index() == 0:
        write(document, shown, histories, output)
    return document


def write(document, shown, histories, output):
    """Writes what there is to see: metrics.json, figures as PNG and PDF, report.html; returns the page's path.

    document: as `compare` returns it. shown: from exhibits.collect. histories: name -> rows of
    charts.read_rows.
    """
    from eqvae_jax.evaluation import charts, exhibits, figures, page, provenance

    output = pathlib.Path(output)
    provenance.write_json(output / "metrics.json", document)
    pictures = []

    def add(name, kind, figure):
        png, _ = figures.save(figure, output / name)
        heading, description, caption = (" ".join(text.split()) for text in _TEXTS[kind])
        if pictures and pictures[-1].description == description:
            heading, caption = "", "The same for another image."
        pictures.append(page.Picture(heading, png.read_bytes(), description, caption))

    for drawing in exhibits.drawings(document, shown):
        add(*drawing)
    if charts.curve_keys(histories):
        add("curves", "curves", charts.curves(histories))

    configs = {name: run["config"] for name, run in document["runs"].items()}
    title = "How equivariant is the latent space? " + ", ".join(document["results"])
    paragraphs = [" ".join(text.split()) for text in _ABOUT]
    text = page.render(title, paragraphs, document, pictures, configs, page.differing_rows(configs))
    path = output / "report.html"
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _config(workdir):
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise ValueError(f"{workdir} is not the workdir of a run: it has no config.json.")
    return json.loads(path.read_text(encoding="utf-8"))


def of_generators(runs):
    """Whether these are runs of generators; raises ValueError where only some are."""
    tasks = {name: _config(workdir).get("task") for name, workdir in runs.items()}
    generators = [name for name, task in tasks.items() if task == "generator"]
    if generators and len(generators) < len(tasks):
        raise ValueError(f"{', '.join(generators)}: of generators, and the other runs are not; compare like with like.")
    return bool(generators)


def main(arguments=None):
    """Runs the command line; returns the process's exit code, 2 for something the user can put right."""
    options = _parser().parse_args(arguments)
    from eqvae_jax import weights
    from eqvae_jax.backend import use_compilation_cache
    from eqvae_jax.data.images import TooManyBroken
    from eqvae_jax.evaluation import comparison, feature_sets
    from eqvae_jax.run import generator_report

    use_compilation_cache()
    try:
        runs = comparison.named(options.runs) if options.runs else {
            pathlib.Path(options.workdir).resolve().name: options.workdir}
        if of_generators(runs):
            configs = {name: _config(workdir) for name, workdir in runs.items()}
            document = generator_report.compare(runs, configs, options.output)
            print(generator_report.as_text(document["results"]))
            print(f"wrote {pathlib.Path(options.output) / 'report.html'}")
            return 0
        document = compare(
            runs,
            images=options.images,
            output=options.output,
            image_size=options.image_size,
            batch_size=options.batch_size,
            limit=options.limit,
            crops=options.crops,
            min_crop=options.min_crop,
            max_crop=options.max_crop,
            lpips=weights.load_lpips(options.lpips) if options.lpips else None,
            extractor=feature_sets.open_extractor(options.features, options.inception, options.protocol)
            if options.features
            else None,
        )
    except (ValueError, OSError, TooManyBroken) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(format_table(document))
    print(verdict(document))
    print(f"wrote {pathlib.Path(options.output) / 'report.html'}")
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog=commands.program("report"), description=commands.as_called(__doc__), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--runs", nargs="+", metavar="[NAME=]WORKDIR",
                       help="runs to compare with 'control' or the first")
    which.add_argument("--workdir", metavar="DIR", help="one run")
    parser.add_argument("--output", required=True, metavar="DIR", help="where report.html and the rest goes")
    parser.add_argument("--images", default="photos:test", metavar="REFERENCE",
                        help="photos[:train|:test|:all], folder:DIR, arrayrecord:GLOB, tfds:NAME[:SPLIT] or "
                        "idx:DIR[:test], best ones that were not trained on (%(default)s)")
    parser.add_argument("--image_size", type=int, metavar="N", help="side in pixels (the last run's data.image_size)")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="this many images, spread evenly over the set (all)")
    parser.add_argument("--crops", type=int, default=1, metavar="N", help="1: centre crop; more: random, but fixed (1)")
    parser.add_argument("--min_crop", type=float, default=0.5, metavar="SHARE",
                        help="of the short side, the smallest random crop; one crop ignores it (%(default)s)")
    parser.add_argument("--max_crop", type=float, default=1.0, metavar="SHARE",
                        help="the largest, likewise (%(default)s)")
    parser.add_argument("--lpips", metavar="REFERENCE",
                        help="LPIPS weights, to measure LPIPS too: a directory, a file or download")
    parser.add_argument("--features", metavar="NETWORK", help="to measure rFID too, plain and under each transform, in "
                        "the features of: inception, or workdir:DIR of a run of configs/fashion_classifier.py")
    parser.add_argument("--inception", default="", metavar="FILE|download", help="weights of --features=inception")
    parser.add_argument("--protocol", choices=choices.PROTOCOLS, default="adm",
                        help="how images reach Inception (%(default)s)")
    return parser


def run():
    """The command line's entry."""
    sys.exit(main())


if __name__ == "__main__":
    run()
