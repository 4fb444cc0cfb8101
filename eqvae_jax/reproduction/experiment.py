"""What a table of the paper is: its rows and columns, its numbers, the stages that find ours, the claims they test."""

from collections.abc import Callable
from typing import NamedTuple

from eqvae_jax.reproduction.bench import Bench, Measure
from eqvae_jax.reproduction.claims import Claim


class Column(NamedTuple):
    """A column: its name, decimals, and which end of it is better, "lower", "higher" or ""."""

    name: str
    digits: int = 2
    better: str = "lower"


class Experiment(NamedTuple):
    """A table of the paper.

    rows: names, in order. paper: {(row, column): number}. measured: from a Bench, of one seed, {(row, column):
    Measure}. claims: of the paper, about these numbers. about: what is compared. pictures: from a Bench,
    [(stage, name of a PNG that it leaves, caption)].
    """

    title: str
    about: str
    columns: tuple[Column, ...]
    rows: tuple[str, ...]
    paper: dict
    measured: Callable[[Bench], dict]
    claims: tuple[Claim, ...] = ()
    pictures: Callable[[Bench], list] = lambda bench: []


GFID, RFID, R, S = Column("gFID"), Column("rFID"), Column("R(θ)", 3), Column("S(s)", 3)
INCEPTION_SCORE, DIMENSION = Column("IS", 1, "higher"), Column("ID", 1)
PSNR, LPIPS, SSIM = Column("PSNR", 2, "higher"), Column("LPIPS", 3), Column("SSIM", 3, "higher")
# Kinds of autoencoders -> the paper's name, and the generator on their latents.
AUTOENCODERS = {
    "sdvae": ("SD-VAE", "dit"),
    "sdxlvae": ("SDXL-VAE", "dit"),
    "sd3vae": ("SD3-VAE", "dit"),
    "sdvae16": ("SD-VAE-16", "dit"),
    "vqgan": ("VQ-GAN", "maskgit"),
}


def grid(columns, rows):
    """{(row, column): number} of a table as it is printed: row -> numbers, None where there is none."""
    return {
        (row, column.name): number
        for row, numbers in rows.items()
        for column, number in zip(columns, numbers, strict=True)
        if number is not None
    }


def lower(text, column, row, than):
    return Claim(text, (row, column), (than, column))


def gfid(bench, name, arm, kind="sdvae", **how):
    return Measure(bench.generation(name, arm, kind, **how), "fid")


# Column -> (bench, arm, kind, generator) -> what measures it.
MEASURES = {
    GFID: lambda bench, arm, kind, generator: gfid(bench, generator, arm, kind),
    RFID: lambda bench, arm, kind, generator: Measure(bench.reconstruction(kind, arm), "rfid"),
    PSNR: lambda bench, arm, kind, generator: Measure(bench.reconstruction(kind, arm), "psnr"),
    LPIPS: lambda bench, arm, kind, generator: Measure(bench.reconstruction(kind, arm), "lpips"),
    SSIM: lambda bench, arm, kind, generator: Measure(bench.reconstruction(kind, arm), "ssim"),
    R: lambda bench, arm, kind, generator: Measure(bench.equivariance(kind, arm), "R"),
    S: lambda bench, arm, kind, generator: Measure(bench.equivariance(kind, arm), "S"),
    DIMENSION: lambda bench, arm, kind, generator: Measure(bench.dimension(kind, arm), "intrinsic_dimension"),
}


def of_arms(bench, rows, columns, kind="sdvae", generator="dit"):
    """{(row, column): Measure} of fine-tuned autoencoders; rows: name -> arm, None for the scale's baseline.

    Without the columns that the scale cannot measure: those of absent generators, networks and weights.
    """
    scale = bench.scale
    can = {GFID: scale.distances and scale.generators, RFID: scale.distances, LPIPS: scale.start,
           DIMENSION: scale.crops == 1}  # neighbours are what TwoNN looks at, and crops of one image overlap
    return {
        (row, column.name): MEASURES[column](bench, arm or scale.baseline, kind, generator)
        for row, arm in rows.items()
        for column in columns
        if can.get(column, True)
    }
