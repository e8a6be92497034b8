"""Rules that choose rows by how near their neighbours are. Legend: as in common.py."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from assay.federated.aggregators.common import (
    SCORE_SLACK,
    Aggregator,
    Present,
    ToleranceError,
    aggregator,
    check_count,
    check_tolerance,
    square_distances,
    weighted_mean,
)


def krum(f: int, m: int = 1) -> Aggregator:
    """Krum (Blanchard et al. 2017, section 4): the present row nearest to its n-f-2 nearest others.

    Score of a row: the sum of its squared distances to its n-f-2 nearest other rows (the paper's neighbour rule, not
    byzfl's n-f-1). Needs n >= 2f + 3; f = 0 asks to bear nobody and takes any n, with at least one neighbour.
    `m` > 1 is Multi-Krum: the weighted mean of the m best, m <= n-f-2 (resilience is proven up to there: Damaskinos
    et al. 2019, AggregaThor).

    Weights: the smallest score / weight wins, weights relative to the largest. So a row trusted by half must be twice
    as central to be chosen, equal weights are Krum, and a weight falling to 0 ends where the row is never chosen.
    As a *neighbour* every present row counts whole: the bound counts heads, and a neighbour's closeness is evidence
    only together with the others'. Ties go to the row that comes first by content, compared number by number.

    Distances are float64, from Gram matrices of blocks centred on their coordinate-wise median: float32, or an origin
    far away, drowns them (clients 1e-3 apart: 69% off, LAB.md); a mean as centre could be dragged away by one row.

    >>> krum(f=0)(np.array([[1], [2], [4], [1e6]], np.float32), [1, 1, 1, 1])
    array([2.], dtype=float32)
    """
    check_count("krum", "f", f, 0)
    check_count("krum", "m", m, 1)

    def rule(rows: Present) -> NDArray[np.float32]:
        if f > 0:
            check_tolerance("krum", "2f+3", f, 2 * f + 3, rows.n)
        neighbours = max(1, rows.n - f - 2)
        if m > neighbours:
            raise ToleranceError(
                f"krum averages at most n-f-2 of n participants: f={f}, m={m} needs {m + f + 2}, {rows.n} present"
            )
        distance_NN = square_distances(rows)
        np.fill_diagonal(distance_NN, np.inf)  # nobody is his own neighbour
        score_N = np.sort(distance_NN, axis=1)[:, :neighbours].sum(axis=1) if rows.n > 1 else np.zeros(1)
        score_N = score_N / np.maximum(rows.weight_N, 1e-100)  # float32 distances cannot overflow even so
        chosen = []
        for _ in range(m):
            best = int(np.argmax(score_N <= score_N.min() * (1 + SCORE_SLACK)))  # first by content among ties
            chosen.append(best)
            score_N[best] = np.inf
        return weighted_mean(
            Present(rows.delta_ND, rows.row_N[chosen], rows.weight_N[chosen] / rows.weight_N[chosen].max())
        )

    return aggregator(rule)
