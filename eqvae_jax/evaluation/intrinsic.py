"""How many dimensions a cloud of points (latents, say) locally has: the TwoNN estimate of the paper's Table 5."""

import hashlib
from typing import NamedTuple

import numpy as np
from sklearn.neighbors import NearestNeighbors


class IntrinsicDimension(NamedTuple):
    """dimension: the estimate; n: different points it rests on, to be told with it; duplicates: points left out."""

    dimension: float
    n: int
    duplicates: int


def _distinct(points):
    """The rows of points (N, D), each once, in their order."""
    seen, keep = set(), []
    for row, point in enumerate(points):
        digest = hashlib.blake2b(point.tobytes(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            keep.append(row)
    return points[keep] if len(keep) < len(points) else points


def two_nn(points, fraction=0.9):
    """IntrinsicDimension by the distances of each point to its two nearest others (Facco et al. 2017).

    On a manifold of d dimensions, where the density is even as far as a point's second neighbour, r2 / r1 has the
    distribution function F(m) = 1 - m^-d. So -log(1 - F) over log m is a line through 0 of slope d; least squares fit
    it to all but the largest ratios: DADApy's `compute_id_2NN` with its defaults. The estimate depends on n, the more
    the higher d is (no feasible n fills 60 dimensions densely): compare equal n only.

    Args:
      points: (N, ...), each flattened. Euclidean distances in float64; searched in blocks, without an N x N matrix.
      fraction: share of the points, those with the smallest ratios, that the line is fitted to.

    Raises:
      ValueError: a point is not finite, too few different points are left to fit, or all neighbours are equally far.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, both excluded, got {fraction}; DADApy's default is 0.9.")
    points = np.asarray(points)
    if points.ndim < 2 or not points.size:
        raise ValueError(f"points must be (N, D), one row per point; got shape {points.shape}.")
    points = points.reshape(len(points), -1)
    finite = np.isfinite(points).all(1)
    if not finite.all():
        raise ValueError(f"{np.sum(~finite)} of {len(points)} points are not finite, the first is {np.argmin(finite)}.")
    # + 0 turns -0.0 into 0.0: points that are equal have equal bytes. float16 and integers become float32 or float64.
    distinct = _distinct(points.astype(np.result_type(points.dtype, np.float32)) + 0)
    n = len(distinct)
    used = int(n * fraction)
    if n < 3 or used < 2:
        raise ValueError(f"TwoNN has {n} different points of {len(points)}, too few for a line; give hundreds or more.")
    centred = distinct - distinct.mean(0, dtype=np.float64)  # a large mean would cost the distances digits
    distances, _ = NearestNeighbors(n_neighbors=2).fit(centred).kneighbors()  # (n, 2), the point itself not counted
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratios = np.sort(np.log(distances[:, 1] / distances[:, 0]))[:used]
    if not 0 < log_ratios[-1] < np.inf:
        raise ValueError(
            "Nearly all points are as far from their second neighbour as from their first (a lattice?), or too close "
            "to the first to tell apart: no dimension can be read off."
        )
    minus_log_survival = -np.log1p(-np.arange(1, used + 1) / n)
    dimension = np.sum(log_ratios * minus_log_survival) / np.sum(np.square(log_ratios))
    return IntrinsicDimension(float(dimension), n, len(points) - n)
