"""The paper's figures: pictures of the same kind, of our own runs."""

from eqvae_jax.reproduction.bench import Measure
from eqvae_jax.reproduction.claims import Claim
from eqvae_jax.reproduction.experiment import Column, Experiment, grid

_NONE = dict(columns=(), rows=(), paper={}, measured=lambda bench: {})


ARMS = ("control", "eq")  # `before` is no run of its own, where weights are published


def figure_1():
    def pictures(bench):
        autoencoders = bench.autoencoders_report("sdvae", ARMS)
        generators = bench.generators_report("dit", ARMS)
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
        report = bench.autoencoders_report("sdvae", ARMS)
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
    rows = {"SD-VAE": "sdvae", "SDXL-VAE": "sdxlvae"}

    def measured(bench):
        found = {}
        for label, kind in rows.items():
            if kind in bench.scale.kinds:
                for row, arm in ((label, bench.scale.baseline), (f"{label} + EQ", "eq")):
                    stage = bench.equivariance(kind, arm, features=True)
                    for column, key in zip(columns, keys, strict=True):
                        found[row, column.name] = Measure(stage, key)
        return found

    paper = grid(columns, {
        "SD-VAE": (52, 83, 107, 78), "SD-VAE + EQ": (2, 7, 31, 12),
        "SDXL-VAE": (64, 117, 130, 192), "SDXL-VAE + EQ": (3, 10, 34, 12),
    })  # fmt: skip
    return Experiment(
        "Figure 3: rFID of decoded transformed latents",
        "rFID between D(τE(x)) and τx, for three scales and the mean of the turns. The paper's numbers are read off "
        "its bars, rounded down.",
        columns,
        tuple(dict.fromkeys(row for row, _ in paper)),
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
            for arm in ARMS
        ]

    return Experiment(
        "Figure 4: samples while training",
        "Samples of DiT on latents of SD-VAE, without EQ (control) and "
        "with it, at the same steps and from the same noise.",
        **_NONE,
        pictures=pictures,
    )
