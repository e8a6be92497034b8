"""Weighted averages: of the rows as they are, and clipped to a norm. Legend: as in common.py."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from assay.federated.aggregators.common import Aggregator, Present, Ruled, check_number
from assay.federated.aggregators.geometry import combine, gram, scalar_median, weighted_mean


def mean() -> Aggregator:
    """FedAvg (McMahan et al. 2017): the weighted mean. Bears no attacker: one row moves it anywhere.

    >>> mean()(np.array([[1], [3]], np.float32), [1, 3])
    array([2.5], dtype=float32)
    """
    return Ruled(weighted_mean)


def norm_clipped_mean(bound: float | None = None) -> Aggregator:
    """Mean of rows whose L2 norm is first brought down to `bound` (Sun et al. 2019, section 3.3).

    None: the weighted median norm of those present, so that more than half of the weight sets it. It limits how far
    one row moves the result (w/W x bound), not where to: a majority, or patience over rounds, still gets through.

    >>> norm_clipped_mean(bound=1.0)(np.array([[0.5], [100]], np.float32), [1, 1])
    array([0.75], dtype=float32)
    """
    if bound is not None:
        check_number("norm_clipped_mean", "bound", bound, 0.0, strict=True)

    def rule(rows: Present) -> NDArray[np.float32]:
        norm_N = np.sqrt(np.diagonal(gram(rows)))
        return combine(rows, rows.weight_N / rows.mass * clip_factors(norm_N, rows.weight_N, bound))

    return Ruled(rule)


def clip_factors(
    norm_N: NDArray[np.float64], weight_N: NDArray[np.float64], bound: float | None
) -> NDArray[np.float64]:
    """What brings each norm down to the bound (None: their weighted median); 1 for those below it."""
    limit = scalar_median(norm_N, weight_N) if bound is None else bound
    return np.minimum(1.0, np.divide(limit, norm_N, out=np.ones_like(norm_N), where=norm_N > limit))
