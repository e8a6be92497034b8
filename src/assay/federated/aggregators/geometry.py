"""Numbers read off the present rows: sums, medians, Gram matrices, distances; how many attackers they look like.

Legend: as in common.py; M rows with an anchor beside them.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from assay.config import ConfigError
from assay.federated.aggregators.common import Block, Present, check_count
from assay.spool import row

# Weights are sums of floats: 0.1 + 0.2 must meet 0.3. Far below any weight that means something.
MASS_SLACK = 1e-12
# Scores this close (relative) are a tie: above float64 rounding over D = 1e9, below any real difference.
SCORE_SLACK = 1e-9
ESTIMATE = "estimate"
# A row whose distance to the median is this many robust deviations above the median distance counts as an attacker
# (Iglewicz and Hoaglin 1993), and never one within half of it: in many dimensions honest distances are so equal that
# their spread alone would call anybody an outlier.
ODD_DEVIATIONS, ODD_SHARE = 3.5, 0.5


def sort_columns(
    block_NB: NDArray[np.float32], weight_N: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Values sorted in each column, and the weight up to and including each: (N, B), or (N, 1) where all are equal."""
    if (weight_N == 1).all():  # relative to the largest: all equal
        block_NB.sort(axis=0)
        return block_NB, np.cumsum(weight_N)[:, None]
    order_NB = np.argsort(block_NB, axis=0, kind="stable")
    return np.take_along_axis(block_NB, order_NB, axis=0), np.cumsum(weight_N[order_NB], axis=0)


def weighted_sum(block_NB: NDArray[np.float32], weight_NB: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of weight times value in each column, float64, row after row: a matrix product would add in an order that
    depends on the width of the block."""
    total_B = np.zeros(block_NB.shape[1])
    for row_B, weight_B in zip(block_NB, weight_NB):
        total_B += row_B * weight_B
    return total_B


def combine(rows: Present, coefficient_N: NDArray[np.float64], of_median: float = 0.0) -> NDArray[np.float32]:
    """Sum of coefficient times row, plus `of_median` times the coordinate-wise median."""
    out_D = np.empty(rows.width, np.float32)
    for columns, block_NB in rows.blocks():
        total_B = weighted_sum(block_NB, coefficient_N[:, None])
        if of_median:
            total_B += of_median * column_median(block_NB, rows.weight_N)
        out_D[columns] = total_B
    return out_D


def weighted_mean(rows: Present) -> NDArray[np.float32]:
    out_D = np.empty(rows.width, np.float32)
    for columns, block_NB in rows.blocks():
        out_D[columns] = weighted_sum(block_NB, rows.weight_N[:, None]) / rows.mass
    return out_D


def column_median(block_NB: Block, weight_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where half of the weight lies on either side; the midpoint of the interval where a whole one does. Sorts the
    block in place where all weights are equal."""
    half, slack = weight_N.sum() / 2, weight_N.sum() * MASS_SLACK
    sorted_NB, cumulative_NB = sort_columns(block_NB, weight_N)
    low_B = np.argmax(cumulative_NB >= half - slack, axis=0, keepdims=True)
    high_B = np.argmax(cumulative_NB > half + slack, axis=0, keepdims=True)
    low_B, high_B = (np.take_along_axis(sorted_NB, index_B, axis=0)[0] for index_B in (low_B, high_B))
    return np.asarray((low_B.astype(np.float64) + high_B) / 2)  # float32 would overflow on two values of 3e38


def scalar_median(value_N: NDArray[np.float64], weight_N: NDArray[np.float64]) -> float:
    """Weighted median of one number a row."""
    sorted_N, cumulative_N = (
        value_N[np.argsort(value_N, kind="stable")],
        weight_N[np.argsort(value_N, kind="stable")].cumsum(),
    )
    half, slack = cumulative_N[-1] / 2, cumulative_N[-1] * MASS_SLACK
    low, high = np.argmax(cumulative_N >= half - slack), np.argmax(cumulative_N > half + slack)
    return float((sorted_N[low] + sorted_N[high]) / 2)


def nearest_share(distance_N: NDArray[np.float64], weight_N: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """The weight that counts when only the nearest `share` of all weight does: the row at the border in part."""
    order_N = np.argsort(distance_N, kind="stable")
    reached_N = weight_N[order_N].cumsum()
    limit, slack = share * reached_N[-1], reached_N[-1] * MASS_SLACK
    reached_N[np.abs(reached_N - limit) <= slack] = limit
    kept_N = np.empty(len(order_N))
    kept_N[order_N] = np.diff(np.minimum(reached_N, limit), prepend=0.0)
    return kept_N


def gram(rows: Present) -> NDArray[np.float64]:
    """Inner products about the origin, float64: for norms and angles, never for distances."""
    gram_NN = np.zeros((rows.n, rows.n))
    for _, block_NB in rows.blocks():
        wide_NB = block_NB.astype(np.float64)
        gram_NN += wide_NB @ wide_NB.T
    return gram_NN


def centred_gram(rows: Present, anchor: str = "") -> NDArray[np.float64]:
    """Inner products about a coordinate-wise middle, float64; an `anchor` (`zero` or `median`) is one more row.

    From it come distances: float32, or an origin far away, drowns them (clients 1e-3 apart: 69% off); a mean as
    centre could be dragged away by one row.
    """
    m = rows.n + bool(anchor)
    gram_MM = np.zeros((m, m))
    for _, block_NB in rows.blocks():
        centre_B = np.partition(block_NB, rows.n // 2, axis=0)[rows.n // 2].astype(np.float64)
        centred_MB = np.empty((m, len(centre_B)))
        np.subtract(block_NB, centre_B, out=centred_MB[: rows.n])
        if anchor:
            centred_MB[-1] = (column_median(block_NB, rows.weight_N) if anchor == "median" else 0.0) - centre_B
        gram_MM += centred_MB @ centred_MB.T
    return gram_MM


def square_distances(gram_MM: NDArray[np.float64]) -> NDArray[np.float64]:
    norm_M = np.diagonal(gram_MM)
    return np.maximum(norm_M[:, None] + norm_M[None, :] - 2 * gram_MM, 0)  # rounding can leave -1e-16


def check_attackers(rule: str, f: object) -> None:
    if f != ESTIMATE:
        try:
            check_count(rule, "f", f, 0)
        except ConfigError as error:
            raise ConfigError(f'{error}; f = "{ESTIMATE}" counts the far rows of each round') from None


def attackers(rows: Present, f: int | str) -> int:
    """`f` itself, or what `estimate` makes of the rows: how many lie far from the coordinate-wise median.

    Far: a distance above median + 3.5 x 1.4826 x MAD of all present distances, and above 1.5 x the median. It is a
    count of *loud* attackers. Who stays within the honest spread is not counted (so the estimate is no bound on
    attackers who know it), and colluders who sit on the median narrow the spread until honest strangers count: that
    costs honest rows, or, above a rule's bound, the round (a ToleranceError). With half of the weight or more they
    are the median, and the estimate is theirs. An operator who knows a bound should give it.
    """
    if not isinstance(f, str):
        return f
    square_N = np.zeros(rows.n)
    for _, block_NB in rows.blocks():
        wide_NB = block_NB.astype(np.float64)
        wide_NB -= column_median(block_NB, rows.weight_N)
        square_N += (wide_NB**2).sum(axis=1)
    distance_N = np.sqrt(square_N)
    middle = scalar_median(distance_N, rows.weight_N)
    spread = 1.4826 * scalar_median(np.abs(distance_N - middle), rows.weight_N)
    limit = middle + max(ODD_DEVIATIONS * spread, ODD_SHARE * middle)
    return int((distance_N > limit * (1 + SCORE_SLACK)).sum())


def content_seed(rows: Present, seed: int) -> np.random.Generator:
    """A generator of the operator's seed and of what all present rows hold in their first values: the same for the
    same round in any order, and nobody knows it before he has seen everybody else's update."""
    digest = hashlib.sha256(str(seed).encode())
    for index in rows.row_N:
        digest.update((row(rows.delta_ND, int(index), 0, 1024) + np.float32(0)).tobytes())
    return np.random.default_rng(int.from_bytes(digest.digest(), "big"))
