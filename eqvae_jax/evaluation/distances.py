"""How far generated images are from reference images: FID, KID, Inception Score, precision and recall, of features.

All take features, (N, D), or logits, (N, K), of any network: which one, and how images were prepared for it, belongs to
the name of the number. Where a swap would go unseen, the two sets are named: `reference` and `generated`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from eqvae_jax.evaluation.gaussians import (
    ROWS,
    Gaussian,
    Statistics,
    checked,
    checked_pair,
    frechet_distance,
    load_statistics,
)

__all__ = [
    "Gaussian",
    "Statistics",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_statistics",
    "precision_recall",
]


class MeanStd(NamedTuple):
    """Over parts of the set: mean, and standard deviation with division by their number."""

    mean: float
    std: float


def kernel_distance(*, reference, generated, subsets=100, subset_size=1000, seed=2020):
    """KID: the unbiased squared MMD with the kernel (x . y / D + 1)^3 (Binkowski et al. 2018), MeanStd over subsets.

    Its expectation is 0 for two draws of one distribution, so small negative values are in order. Computed in float64.
    Subsets are drawn without replacement exactly as torch-fidelity draws them, whose defaults these are.

    Raises:
      ValueError: a wrong shape, a row that is not finite, or fewer rows than subset_size.
    """
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"KID needs at least 1 subset of at least 2 rows, got {subsets} of {subset_size}.")
    reference, generated = checked_pair(reference, generated, subset_size, f"KID with subset_size={subset_size}")
    m, draw = subset_size, np.random.RandomState(seed)

    def kernel(x, y):  # (m, D), (m, D) -> (m, m)
        return (x @ y.T / x.shape[1] + 1) ** 3

    distances = np.zeros(subsets)
    for i in range(subsets):
        y = generated[draw.choice(len(generated), m, replace=False)].astype(np.float64)
        x = reference[draw.choice(len(reference), m, replace=False)].astype(np.float64)
        within_x, within_y = kernel(x, x), kernel(y, y)
        within = within_x.sum() - np.trace(within_x) + within_y.sum() - np.trace(within_y)
        distances[i] = within / (m * (m - 1)) - 2 * kernel(x, y).mean()
    return MeanStd(float(distances.mean()), float(distances.std()))


# How the set is cut into parts whose scores are averaged: rows to a part or number of parts, and the seed of the order.
INCEPTION_SCORE_PROTOCOLS = {"adm": {"rows": 5000, "seed": None}, "torch-fidelity": {"parts": 10, "seed": 2020}}


def inception_score(logits, splits=None, protocol="adm"):
    """exp E[KL(p(y|x) || p(y))], p(y) the mean of a part, MeanStd over parts (Salimans et al. 2016), in float64.

    Args:
      logits: (N, K), without the classifier's bias in both protocols.
      splits: number of (nearly) equal parts; None leaves it to the protocol.
      protocol: "adm" takes the rows in the order given, 5000 to a part (10 parts of 50,000 images; the last may be
        shorter); "torch-fidelity" shuffles them with its own seed and takes 10 parts. In "adm", images sorted by class
        score too low, since a part then lacks most classes: shuffle before.

    Raises:
      ValueError: a wrong shape or protocol, a row that is not finite, or more splits than rows.
    """
    if protocol not in INCEPTION_SCORE_PROTOCOLS:
        raise ValueError(f"protocol must be one of {sorted(INCEPTION_SCORE_PROTOCOLS)}, got {protocol!r}.")
    rule = INCEPTION_SCORE_PROTOCOLS[protocol]
    splits = splits if splits is not None else rule.get("parts")
    logits = checked(logits, "logits", max(splits or 1, 1), f"the Inception Score in {splits or 'any'} splits")
    if splits is not None and splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}.")
    n, seed = len(logits), rule["seed"]
    order = np.arange(n) if seed is None else np.random.RandomState(seed).permutation(n)
    edges = [*range(0, n, rule["rows"]), n] if splits is None else [i * n // splits for i in range(splits + 1)]
    scores = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        log_p = log_softmax(logits[order[start:end]].astype(np.float64), axis=1)  # (n / splits, K)
        p = np.exp(log_p)
        # log p(y) of a class that nobody predicts is -inf, and its term is 0 times that.
        log_marginal = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))
        scores.append(np.exp(np.mean(np.sum(p * (log_p - log_marginal), axis=1))))
    return MeanStd(float(np.mean(scores)), float(np.std(scores)))


class PrecisionRecall(NamedTuple):
    """precision: share of generated rows in the manifold of the reference; recall: of reference rows in the other."""

    precision: float
    recall: float


def _to_half(x):
    """Rounds float32 to float16's grid, to inf beyond 65504. XLA may drop a cast there and back; never this."""
    return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)


def _squared_distances(u, v, half):
    """u (M, D), v (N, D) -> (M, N): |u|^2 - 2 u.v + |v|^2, all float32, or each operation rounded to float16."""
    rounded = _to_half if half else lambda x: x
    norm_u, norm_v = (rounded(jnp.sum(rounded(jnp.square(x)), axis=1)) for x in (u, v))
    products = rounded(jnp.einsum("md,nd->mn", u, v, precision=jax.lax.Precision.HIGHEST))
    distances = rounded(rounded(norm_u[:, None] - rounded(2 * products)) + norm_v)
    if not half:  # what is within the rounding of the sum is nought, so that copies are at distance 0
        rounding = 16 * jnp.finfo(jnp.float32).eps * (norm_u[:, None] + norm_v)
        distances = jnp.where(distances < rounding, 0.0, distances)
    return jnp.maximum(distances, 0.0)


@functools.partial(jax.jit, static_argnames="half")
def _merge_nearest(nearest, rows, columns, real, half):
    """The least squared distances of rows (M, D) so far, (M, k), and those to the first `real` of columns (N, D)."""
    distances = _squared_distances(rows, columns, half)  # (M, N)
    finite = jnp.all(jnp.isfinite(distances))
    distances = jnp.where(jnp.arange(len(columns)) < real, distances, jnp.inf)
    return -jax.lax.top_k(-jnp.concatenate([nearest, distances], 1), nearest.shape[1])[0], finite


@functools.partial(jax.jit, static_argnames="half")
def _within(reference, generated, radii_reference, radii_generated, half):
    """Which generated rows, (N,), lie in a reference row's ball, which reference rows, (M,), in a generated one's."""
    distances = _squared_distances(reference, generated, half)  # (M, N)
    covered = jnp.any(distances <= radii_reference[:, None], axis=0), jnp.any(distances <= radii_generated, axis=1)
    return *covered, jnp.all(jnp.isfinite(distances))


def _blocks(features, centre, half):
    """Blocks of at most ROWS rows, (start, number of real rows, (rows, D) float32), padded with 0 to one shape."""
    size = -(-len(features) // -(-len(features) // ROWS))  # as even as can be: padding is computed with, too
    for start in range(0, len(features), size):
        block = features[start : start + size] - np.asarray(centre, features.dtype)
        with np.errstate(over="ignore"):  # an overflow shows as inf, and is dealt with there
            block = block.astype(np.float16 if half else np.float32).astype(np.float32)
        yield start, len(block), np.pad(block, ((0, size - len(block)), (0, 0)))


def _radii(features, k, centre, half):
    """Squared distance of each row to its k-th nearest other row, (N,) float32; None if float16 overflowed."""
    radii, finite = [], True
    for _, real_rows, rows in _blocks(features, centre, half):
        rows = jnp.asarray(rows)
        nearest = jnp.full((len(rows), k + 1), jnp.inf)  # k + 1: the row itself is among them, at distance 0
        for _, real, columns in _blocks(features, centre, half):
            nearest, block_finite = _merge_nearest(nearest, rows, columns, real, half)
            finite &= bool(block_finite)
        radii.append(np.asarray(nearest)[:real_rows, k])
    return np.concatenate(radii) if finite else None


def _grid_centre(features):
    """(D,) close to the mean, on a grid so coarse that numbers which float32 holds exactly it holds after the shift."""
    mean = features.mean(0, dtype=np.float64)
    spread = np.sqrt(np.mean([np.square(row - mean).mean() for row in features[:: max(1, len(features) // 256)]]))
    grid = 2.0 ** np.ceil(np.log2(spread)) if spread > 0 else 1.0
    return grid * np.rint(mean / grid)


def _precision_recall(reference, generated, k, centre, half):
    radii_reference, radii_generated = (_radii(features, k, centre, half) for features in (reference, generated))
    if radii_reference is None or radii_generated is None:
        return None
    generated_in, reference_in = np.zeros(len(generated), bool), np.zeros(len(reference), bool)

    def padded_radii(radii, start, rows):  # no distance is below -1: padding covers nothing
        part = radii[start : start + len(rows)]
        return np.pad(part, (0, len(rows) - len(part)), constant_values=-1.0)

    for start_r, real_r, rows in _blocks(reference, centre, half):
        rows, radii_rows = jnp.asarray(rows), jnp.asarray(padded_radii(radii_reference, start_r, rows))
        for start_g, real_g, columns in _blocks(generated, centre, half):
            columns_in, rows_in, finite = _within(
                rows, columns, radii_rows, padded_radii(radii_generated, start_g, columns), half
            )
            if not finite:
                return None
            generated_in[start_g : start_g + real_g] |= np.asarray(columns_in)[:real_g]
            reference_in[start_r : start_r + real_r] |= np.asarray(rows_in)[:real_r]
    return PrecisionRecall(float(generated_in.mean()), float(reference_in.mean()))


PRECISION_RECALL_PROTOCOLS = ("float32", "adm")


def precision_recall(*, reference, generated, k=3, protocol="float32"):
    """Improved precision and recall (Kynkaanniemi et al. 2019), PrecisionRecall in [0, 1].

    A set's manifold is the union of balls around its rows, each reaching (ties included) to the k-th nearest other row.
    Works on the default device in blocks of ROWS x ROWS distances: memory does not grow with the sets.

    Args:
      protocol: "float32" takes squared distances in float32 about a common centre, so a large mean costs no digits.
        "adm" rounds features, norms, products and squared distances to float16, as ADM's evaluator does on a GPU (sums
        are float32); near 370, a common value for Inception's features, that is steps of 0.25, hence many more ties. If
        one of them overflows all are taken in float32, ADM's rule within its blocks of 10,000 x 10,000.

    Raises:
      ValueError: a wrong shape or protocol, a row that is not finite, or fewer than k + 1 rows in a set.
    """
    if protocol not in PRECISION_RECALL_PROTOCOLS:
        raise ValueError(f"protocol must be one of {PRECISION_RECALL_PROTOCOLS}, got {protocol!r}.")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    reference, generated = checked_pair(reference, generated, k + 1, f"precision and recall with k={k}")
    if protocol == "float32":
        return _precision_recall(reference, generated, k, _grid_centre(reference), half=False)
    return _precision_recall(reference, generated, k, 0.0, half=True) or _precision_recall(
        reference, generated, k, 0.0, half=False
    )
