"""Rules that look for one centre of all rows: geometric median, centred clipping. Legend: as in common.py.

Both move within the span of the rows, so that one Gram matrix (M rows and an anchor) holds every distance they ask
for and the deltas are read twice, however many iterations there are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from assay.federated.aggregators.common import Aggregator, Present, Ruled, check_choice, check_count, check_number
from assay.federated.aggregators.geometry import (
    SCORE_SLACK,
    centred_gram,
    combine,
    nearest_share,
    scalar_median,
    square_distances,
)


def geometric_median(smoothing: float = 1e-6, tolerance: float = 1e-7, iterations: int = 1000) -> Aggregator:
    """Point of the smallest weighted sum of distances to all rows, by Weiszfeld's iteration smoothed as in Pillutla
    et al. 2022 (RFA, algorithm 2). Bears attackers who hold less than half of the weight; no f.

    Lengths are in units of the weighted median distance from the start, the mean of the half of the weight that is
    nearest to the medoid: `smoothing` (RFA's nu: 1e-6 absolute; byzfl 0.1) is the distance below which a row pulls no
    harder, `tolerance` ends it when a step is shorter, `iterations` in any case (RFA and byzfl stop at 3: with far
    rows that is half way). Integer weights are repeated rows. Among rows on one line, where a whole interval is
    optimal, a point of it.

    >>> geometric_median()(np.array([[0, 0], [2, 0], [1, 1], [1, -1], [1e6, 0]], np.float32), [1, 1, 1, 1, 1]).round(3)
    array([1.577, 0.   ], dtype=float32)
    """
    check_number("geometric_median", "smoothing", smoothing, 0.0, strict=True)
    check_number("geometric_median", "tolerance", tolerance, 0.0, strict=True)
    check_count("geometric_median", "iterations", iterations, 1)

    def rule(rows: Present) -> NDArray[np.float32]:
        gram_NN = centred_gram(rows)
        distance_NN = np.sqrt(square_distances(gram_NN))
        total_N = distance_NN @ rows.weight_N
        medoid = int(np.argmax(total_N <= total_N.min() * (1 + SCORE_SLACK)))
        at_N = nearest_share(distance_NN[medoid], rows.weight_N, 0.5)
        at_N /= at_N.sum()
        away_N = _distances(gram_NN, at_N)
        unit = scalar_median(away_N, rows.weight_N)
        for _ in range(iterations):
            # smoothed to the last: rows at the very centre have distance 0, and where half of all are there, unit 0
            pull_N = rows.weight_N / np.maximum(np.maximum(away_N, smoothing * unit), 1e-150)
            next_N = pull_N / pull_N.sum()
            moved = next_N - at_N
            at_N = next_N
            if np.sqrt(max(moved @ gram_NN @ moved, 0.0)) <= tolerance * unit:
                break
            away_N = _distances(gram_NN, at_N)
        return combine(rows, at_N)

    return Ruled(rule)


def centred_clipping(tau: float | None = None, start: str = "median", iterations: int = 3) -> Aggregator:
    """Centred clipping (Karimireddy et al. 2021, section 4): v += mean of (row - v), each clipped to norm `tau`.

    `start`: `median`, the coordinate-wise weighted median, or `zero`, the round's start as in byzfl (the paper's is
    the last aggregate: with deltas of a round, about zero). `tau` None: the weighted median distance to the start, so
    that it follows the scale of the updates (paper and byzfl: a number, 10 to 100, for gradients of known size).
    `iterations`: 1 in the paper from a good start. Bears attackers of less than half of the weight at the price of
    their share times tau. Integer weights are repeated rows.

    >>> centred_clipping()(np.array([[1], [2], [3], [1e6]], np.float32), [1, 1, 1, 1])
    array([2.5], dtype=float32)
    """
    if tau is not None:
        check_number("centred_clipping", "tau", tau, 0.0, strict=True)
    check_choice("centred_clipping", "start", start, ("median", "zero"))
    check_count("centred_clipping", "iterations", iterations, 1)

    def rule(rows: Present) -> NDArray[np.float32]:
        gram_MM = centred_gram(rows, anchor=start)
        at_M = np.zeros(rows.n + 1)
        at_M[-1] = 1.0
        limit = tau
        for _ in range(iterations):
            away_N = _distances(gram_MM, at_M)[: rows.n]
            limit = scalar_median(away_N, rows.weight_N) if limit is None else limit
            clip_N = np.divide(limit, away_N, out=np.ones(rows.n), where=away_N > limit)
            step_N = rows.weight_N / rows.mass * clip_N
            at_M *= 1 - step_N.sum()
            at_M[: rows.n] += step_N
        return combine(rows, at_M[: rows.n], of_median=float(at_M[-1]) if start == "median" else 0.0)

    return Ruled(rule)


def _distances(gram_MM: NDArray[np.float64], at_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """From every row to the point with these affine coordinates."""
    towards_M = gram_MM @ at_M
    return np.sqrt(np.maximum(np.diagonal(gram_MM) - 2 * towards_M + at_M @ towards_M, 0.0))
