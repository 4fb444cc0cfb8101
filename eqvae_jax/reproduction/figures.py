"""The paper's figures: pictures of the same kind, of our own runs."""

from eqvae_jax.reproduction.bench import Measure
from eqvae_jax.reproduction.claims import Claim
from eqvae_jax.reproduction.experiment import Column, Experiment, grid

_NONE = dict(columns=(), rows=(), paper={}, measured=lambda bench: {})


def _arms(bench):
    """What EQ is compared with: the control, since `before` is no run of its own."""
    return ("control", "eq")


def figure_1():
    def pictures(bench):
        autoencoders = bench.autoencoders_report("sdvae", _arms(bench))
        generators = bench.generators_report("dit", _arms(bench))
        return [
            (autoencoders, "latent_pca.png", "The first three principal components of each latent as colours."),
            (generators, "convergence_0.png", "The Fréchet distance of a few samples while DiT learns."),
        ]

    return Experiment(
        "Figure 1: smoother latents, faster training",
        "Left in the paper: latents of SD-VAE without EQ and with it. Right: how fast a generator learns on each.",
        **_NONE,
        pictures=pictures,
    )


def figure_2():
    def pictures(bench):
        report = bench.autoencoders_report("sdvae", _arms(bench))
        text = "Images after τ, and decodes of their latents, and of the transformed latents of the upright images."
        return [(report, f"tau_{number}.png", text) for number in (1, 2)]

    return Experiment(
        "Figure 2: moving the latent instead of the image",
        "Does the decode of a transformed latent look like the transformed image?",
        **_NONE,
        pictures=pictures,
    )


def figure_3():
    columns = tuple(Column(name, 1) for name in ("s = 0.75", "s = 0.50", "s = 0.25", "turns"))
    keys = ("rfid/0.75", "rfid/0.5", "rfid/0.25", "rfid_R")
    rows = {"SD-VAE": None, "SD-VAE + EQ": "eq"}

    def measured(bench):
        found = {}
        for row, arm in rows.items():
            stage = bench.equivariance("sdvae", arm or bench.scale.baseline, features=True)
            found |= {(row, column.name): Measure(stage, key) for column, key in zip(columns, keys, strict=True)}
        return found

    paper = grid(columns, {"SD-VAE": (52, 83, 107, 78), "SD-VAE + EQ": (2, 7, 31, 12)})
    return Experiment(
        "Figure 3: rFID of decoded transformed latents",
        "rFID between D(τE(x)) and τx, for three scales and the mean of the turns. "
        "The paper's numbers are read off its bars, rounded down.",
        columns,
        tuple(rows),
        paper,
        measured,
        tuple(
            Claim(f"EQ lowers it: {column.name}", ("SD-VAE + EQ", column.name), ("SD-VAE", column.name))
            for column in columns
        ),
    )


def figure_4():
    def pictures(bench):
        return [
            (bench.generator("dit", arm, "sdvae", watched=True), "previews/*.png", f"{arm}: {{name}}")
            for arm in _arms(bench)
        ]

    return Experiment(
        "Figure 4: samples while training",
        "Samples of DiT on latents of SD-VAE, without EQ (control) and "
        "with it, at the same steps and from the same noise.",
        **_NONE,
        pictures=pictures,
    )
