"""The paper's tables of autoencoders and generators: its numbers (arXiv 2502.09509v3), our stages, its claims.

Every table has a row for each of the paper's; a scale that has no such autoencoder leaves its cells empty. Rows called
SD-VAE and VQ-GAN without an arm are the scale's baseline: what EQ is compared with.
"""

from eqvae_jax.reproduction.bench import Measure
from eqvae_jax.reproduction.claims import Claim
from eqvae_jax.reproduction.experiment import (
    AUTOENCODERS,
    GFID,
    INCEPTION_SCORE,
    RFID,
    Column,
    Experiment,
    R,
    S,
    gfid,
    grid,
    kinds,
    lower,
    moved,
    rfid,
)


def table_1():
    columns = (RFID, GFID, R, S)

    def measured(bench):
        found = {}
        for kind in kinds(bench):
            label, generator = AUTOENCODERS[kind]
            for row, arm in ((label, bench.scale.baseline), (f"{label} + EQ", "eq")):
                found |= {(row, RFID.name): rfid(bench, arm, kind), (row, GFID.name): gfid(bench, generator, arm, kind)}
                found |= {(row, name): measure for name, measure in moved(bench, arm, kind).items()}
        return found

    paper = grid(
        columns,
        {
            "SD-VAE": (0.90, 43.8, 0.93, 0.80),
            "SD-VAE + EQ": (0.82, 34.1, 0.49, 0.15),
            "SDXL-VAE": (0.67, 46.0, 1.25, 0.97),
            "SDXL-VAE + EQ": (0.65, 35.9, 0.65, 0.35),
            "SD3-VAE": (0.20, 58.9, 0.51, 0.16),
            "SD3-VAE + EQ": (0.19, 54.0, 0.37, 0.11),
            "SD-VAE-16": (0.87, 64.1, 0.95, 0.85),
            "SD-VAE-16 + EQ": (0.82, 49.7, 0.39, 0.17),
            "VQ-GAN": (7.94, 6.8, 1.35, 1.22),
            "VQ-GAN + EQ": (7.54, 5.9, 0.64, 0.55),
        },
    )
    claims = []
    for label in ("SD-VAE", "VQ-GAN"):
        eq, generator = f"{label} + EQ", "MaskGIT" if label == "VQ-GAN" else "DiT"
        claims += [
            lower(f"EQ lowers the gFID of {generator} on {label}", "gFID", eq, label),
            lower(f"EQ does not cost {label} reconstruction: its rFID falls too", "rFID", eq, label),
            lower(f"EQ makes {label} more equivariant under turns", R.name, eq, label),
            lower(f"EQ makes {label} more equivariant under scales", S.name, eq, label),
        ]
    return Experiment(
        "Table 1: autoencoders",
        "Autoencoders with EQ and without, and a generator on each: DiT on continuous latents, MaskGIT on codes.",
        columns,
        tuple(dict.fromkeys(row for row, _ in paper)),
        paper,
        measured,
        tuple(claims),
    )


def table_2():
    columns = (GFID,)
    rows = {"DiT": "dit", "SiT": "sit", "REPA": "repa"}

    def measured(bench):
        return {
            (row + suffix, GFID.name): gfid(bench, name, arm)
            for row, name in rows.items()
            for suffix, arm in (("", bench.scale.baseline), (" + EQ", "eq"))
        }

    paper = grid(
        columns,
        {"DiT": (43.5,), "DiT + EQ": (34.1,), "SiT": (33.0,), "SiT + EQ": (31.2,), "REPA": (7.9,), "REPA + EQ": (7.5,)},
    )
    return Experiment(
        "Table 2: generators",
        "Generators on the latents of SD-VAE with EQ and without, for as many steps, without "
        "guidance. The paper's numbers are of DiT-B/2, SiT-B/2 and REPA with SiT-XL/2 at 400,000 steps.",
        columns,
        tuple(row for row, _ in paper),
        paper,
        measured,
        tuple(lower(f"EQ lowers the gFID of {row}", "gFID", f"{row} + EQ", row) for row in rows),
    )


def table_3():
    columns = (GFID, INCEPTION_SCORE)
    rows = {
        "MaskGIT, 300 epochs": (None, 1.0),
        "MaskGIT + EQ, 130 epochs": ("eq", 130 / 300),
        "MaskGIT + EQ, 300 epochs": ("eq", 1.0),
    }

    def measured(bench):
        found = {}
        for row, (arm, share) in rows.items():
            stage = bench.generation("maskgit", arm or bench.scale.baseline, "vqgan", share=share)
            found |= {
                (row, GFID.name): Measure(stage, "fid"),
                (row, INCEPTION_SCORE.name): Measure(stage, "inception_score"),
            }
        return found

    names = tuple(rows)
    paper = grid(columns, dict(zip(names, ((6.80, 214.0), (6.80, 188.1), (5.91, 228.8)), strict=True)))
    return Experiment(
        "Table 3: MaskGIT",
        'MaskGIT, with guidance, on the codes of VQ-GAN with EQ and without; "130 epochs" are '
        "130/300 of the steps. The paper's first row is the reproduction of Besnier & Chen.",
        columns,
        names,
        paper,
        measured,
        (
            lower("with EQ MaskGIT is better after as many epochs", "gFID", names[2], names[0]),
            lower("with EQ MaskGIT is as good or better after 130/300 of the epochs", "gFID", names[1], names[0]),
            Claim("with EQ the Inception Score after as many epochs is higher", (names[0], "IS"), (names[2], "IS")),
        ),
    )


def table_4():
    columns = (
        Column("FID"),
        Column("sFID"),
        INCEPTION_SCORE,
        Column("precision", 3, "higher"),
        Column("recall", 3, "higher"),
    )
    keys = ("fid", "sfid", "inception_score", "precision", "recall")
    rows = {
        "DiT": ("dit", None, 1.0),
        "DiT + EQ, 300 of 1400 epochs": ("dit", "eq", 300 / 1400),
        "REPA": ("repa", None, 1.0),
        "REPA + EQ, 200 of 800 epochs": ("repa", "eq", 200 / 800),
    }

    def measured(bench):
        found = {}
        for row, (name, arm, share) in rows.items():
            stage = bench.generation(name, arm or bench.scale.baseline, share=share, guided=True)
            found |= {
                (row, column.name): Measure(stage, key)
                for column, key in zip(columns, keys, strict=True)
                if key != "sfid" or not bench.scale.classifier
            }
        return found

    names = tuple(rows)
    paper = grid(
        columns,
        dict(
            zip(
                names,
                (
                    (2.47, 5.18, 276.1, 0.82, 0.57),
                    (2.37, 4.78, 277.3, 0.82, 0.57),
                    (1.42, 4.70, 305.7, 0.80, 0.65),
                    (1.70, 5.13, 283.0, 0.79, 0.62),
                ),
                strict=True,
            )
        ),
    )
    return Experiment(
        "Table 4: with guidance",
        "Guided generators on the latents of SD-VAE, those with EQ trained for a fraction of "
        "the steps; REPA is guided in an interval of time.",
        columns,
        names,
        paper,
        measured,
        (
            lower("guided, DiT with EQ is as good or better after 300/1400 of the epochs", "FID", names[1], names[0]),
            Claim(
                "guided, REPA with EQ is not quite as good after 200/800 of the epochs",
                (names[2], "FID"),
                (names[3], "FID"),
            ),
        ),
    )


def table_12():
    lpips = Column("LPIPS", 3)
    columns = (RFID, Column("PSNR", 2, "higher"), lpips, Column("SSIM", 3, "higher"))

    def measured(bench):
        found = {}
        for kind in (kind for kind in kinds(bench) if kind in ("sdvae", "vqgan")):
            label = AUTOENCODERS[kind][0]
            for row, arm in ((label, bench.scale.baseline), (f"{label} + EQ", "eq")):
                stage = bench.reconstruction(kind, arm)
                found |= {
                    (row, column.name): Measure(stage, column.name.lower())
                    for column in columns
                    if column != lpips or not bench.scale.classifier
                }
        return found

    paper = grid(
        columns,
        {
            "SD-VAE": (0.90, 25.82, 0.146, 0.71),
            "SD-VAE + EQ": (0.82, 25.95, 0.141, 0.72),
            "VQ-GAN": (7.94, 19.41, 0.540, 0.54),
            "VQ-GAN + EQ": (7.54, 19.61, 0.510, 0.56),
        },
    )
    claims = [
        claim
        for label in ("SD-VAE", "VQ-GAN")
        for claim in (
            lower(f"EQ lowers the rFID of {label}", "rFID", f"{label} + EQ", label),
            Claim(f"EQ raises the PSNR of {label}", (label, "PSNR"), (f"{label} + EQ", "PSNR")),
            Claim(f"EQ raises the SSIM of {label}", (label, "SSIM"), (f"{label} + EQ", "SSIM")),
        )
    ]
    return Experiment(
        "Table 12: reconstruction",
        "Reconstruction of held-out images with EQ and without.",
        columns,
        tuple(dict.fromkeys(row for row, _ in paper)),
        paper,
        measured,
        tuple(claims),
    )
