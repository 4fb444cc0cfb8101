"""The transforms of an evaluation: which tau, of which true size, and means over those of one family."""

from typing import NamedTuple

import numpy as np

PAPER_TURNS, PAPER_SCALES = (1, 2, 3), (0.25, 0.5, 0.75)  # appendix C.3: R(theta) and S(s)


class Transform(NamedTuple):
    """One tau of an evaluation.

    family: "R" (quarter turns) or "S" (scales); label: degrees clockwise, or the scale that was asked for.
    size, image_size: (height, width) of the scaled latent and image, before turning; None for a turn.
    scale: the scale that the rounded latent size amounts to (height only; 1 for a turn).
    """

    family: str
    label: str
    size: tuple[int, int] | None = None
    image_size: tuple[int, int] | None = None
    turns: int = 0
    scale: float = 1.0


def choose(latent, factor, turns=PAPER_TURNS, scales=PAPER_SCALES):
    """The taus of R and S for a latent of (h, w), in an autoencoder that downsamples by `factor`.

    A latent side times a scale is rounded to whole latent pixels; `Transform.scale` says which scale that is.

    Raises:
      ValueError: a turn is not 1, 2 or 3, or a scale leaves no pixel or changes nothing at this latent size.
    """
    chosen = []
    for turn in turns:
        if turn not in (1, 2, 3):
            raise ValueError(f"A turn is 1, 2 or 3 quarters clockwise, not {turn}.")
        chosen.append(Transform("R", str(90 * turn), turns=turn))
    for scale in scales:
        size = tuple(int(side * scale + 0.5) for side in latent)
        if min(size) < 1 or size == tuple(latent):
            raise ValueError(
                f"Scale {scale:g} of a {latent[0]} x {latent[1]} latent is {size[0]} x {size[1]}: "
                f"use larger images (a latent of 4 x 4, {4 * factor} x {4 * factor} pixels, is the least for "
                f"0.25, 0.5 and 0.75) or other scales."
            )
        image_size = (size[0] * factor, size[1] * factor)
        chosen.append(Transform("S", f"{scale:g}", size, image_size, scale=size[0] / latent[0]))
    return chosen


def family_means(values, chosen):
    """Means over each family's transforms, and the excess of the pixel errors over their floor.

    R from R/90, R/180, R/270; pixel_l1/R from pixel_l1/90 ...; rfid_R from rfid/90 ...
    """
    distances = {name.split("/")[0] for name in values if name.startswith("rfid")}
    result = {}
    for family in dict.fromkeys(transform.family for transform in chosen):
        labels = [transform.label for transform in chosen if transform.family == family]
        names = {family: family, f"{family}_sample": f"{family}_sample"}
        names |= {pixel: f"{pixel}/{family}" for pixel in ("pixel_l1", "pixel_psnr", "floor_l1", "floor_psnr")}
        names |= {distance: f"{distance}_{family}" for distance in distances}
        for prefix, name in names.items():
            if f"{prefix}/{labels[0]}" in values:
                result[name] = float(np.mean([values[f"{prefix}/{label}"] for label in labels]))
        result[f"excess_l1/{family}"] = result[f"pixel_l1/{family}"] - result[f"floor_l1/{family}"]
    return result
