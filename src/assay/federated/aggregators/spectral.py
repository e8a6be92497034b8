"""DnC: rows that lie far out along the strongest common direction. Legend: as in common.py."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from assay.federated.aggregators.common import Aggregator, Present, Ruled, check_count, check_number, check_tolerance
from assay.federated.aggregators.geometry import SCORE_SLACK, attackers, check_attackers, weighted_mean


def dnc(f: int | str, subset: int = 10_000, iterations: int = 1, removed: float = 1.0, seed: int = 0) -> Aggregator:
    """Divide and conquer (Shejwalkar and Houmansadr 2021, algorithm 2): in random `subset`s of coordinates, drop the
    `removed` x f rows with the largest squared projection on the top singular vector; mean of who is never dropped.

    Paper: subsets of 10,000, removed 1, 1 iteration (its figures). The coordinates follow from `seed`: who knows it
    puts his poison elsewhere, so give one and keep it secret where that matters. Needs n >= 2f + 1, and one row more
    than iterations x removed x f, or nobody might be left. Attackers unequally far out can drag the centre to the
    nearest of them, who then looks closer to it than the honest and stays: against those who know that, take the median
    or Bulyan. In the centre and the covariance a row has its weight; the number dropped counts heads. Ties go to the
    row that comes later by content.

    >>> dnc(f=1)(np.array([[1, 1], [2, 1], [1, 2], [1e6, -1e6]], np.float32), [1, 2, 1, 1])
    array([1.5 , 1.25], dtype=float32)
    """
    check_attackers("dnc", f)
    check_count("dnc", "subset", subset, 1)
    check_count("dnc", "iterations", iterations, 1)
    check_number("dnc", "removed", removed, 0.0, strict=True)
    check_count("dnc", "seed", seed, 0)

    def rule(rows: Present) -> NDArray[np.float32]:
        borne = attackers(rows, f)
        drop = math.ceil(removed * borne)
        if borne > 0:
            check_tolerance("dnc", "2f+1", borne, 2 * borne + 1, rows.n)
            check_tolerance("dnc", "iterations*removed*f+1", borne, iterations * drop + 1, rows.n)
        rng, good = np.random.default_rng(seed), np.ones(rows.n, bool)
        for _ in range(iterations):
            columns = np.sort(rng.choice(rows.width, min(subset, rows.width), replace=False))
            good[_farthest(_projections(rows, columns), drop)] = False
        return weighted_mean(rows.only(np.flatnonzero(good)))

    return Ruled(rule)


def _projections(rows: Present, columns: NDArray[np.intp]) -> NDArray[np.float64]:
    """Squared projection of each centred row on the top singular vector, from the Gram matrix of the subset."""
    wide_NB = rows.read(columns).astype(np.float64)
    wide_NB -= rows.weight_N @ wide_NB / rows.mass
    root_N = np.sqrt(rows.weight_N)
    gram_NN = wide_NB @ wide_NB.T
    value_N, vector_NN = np.linalg.eigh(gram_NN * root_N[:, None] * root_N)
    # all directions as strong as the strongest: which one of them comes first is a matter of rounding
    top_N = value_N >= value_N[-1] * (1 - SCORE_SLACK)
    if value_N[-1] <= 0:
        return np.zeros(rows.n)
    along_NM = gram_NN @ (root_N[:, None] * vector_NN[:, top_N])
    return np.asarray((along_NM**2 / value_N[top_N]).sum(axis=1))


def _farthest(score_N: NDArray[np.float64], count: int) -> list[int]:
    left_N, out = score_N.copy(), []
    for _ in range(count):
        ties = np.flatnonzero(left_N >= left_N.max() * (1 - SCORE_SLACK))
        out.append(int(ties[-1]))
        left_N[ties[-1]] = -1.0
    return out
