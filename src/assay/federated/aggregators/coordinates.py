"""Rules that look at each coordinate by itself. Legend: as in common.py."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from assay.federated.aggregators.common import Aggregator, Present, Ruled, check_tolerance
from assay.federated.aggregators.geometry import (
    MASS_SLACK,
    attackers,
    check_attackers,
    column_median,
    sort_columns,
    weighted_sum,
)


def median() -> Aggregator:
    """Coordinate-wise median (Yin et al. 2018), weighted: the values at which half the weight lies on either side.

    Where a whole interval does (equal weights: N even) its midpoint, as `np.median`; integer weights are repeated
    rows. Bears attackers who hold less than half of the weight present.

    >>> median()(np.array([[1], [2], [9]], np.float32), [1, 1, 2])
    array([5.5], dtype=float32)
    """

    def rule(rows: Present) -> NDArray[np.float32]:
        out_D = np.empty(rows.width, np.float32)
        for columns, block_NB in rows.blocks():
            out_D[columns] = column_median(block_NB, rows.weight_N)
        return out_D

    return Ruled(rule)


def trimmed_mean(f: int | str) -> Aggregator:
    """Coordinate-wise trimmed mean (Yin et al. 2018): of n present, drops the f lowest and f highest values each.

    Weighted: drops the share f/n of the weight from each end, the row at the border in part; equal weights give the
    classical rule, integer weights the same as repeated rows with f in proportion. So it bears attackers who together
    hold at most f/n of the weight: f of average weight, fewer of more. Needs n >= 2f + 1 present.

    >>> trimmed_mean(f=1)(np.array([[1], [2], [4], [1e6]], np.float32), [1, 1, 1, 1])
    array([3.], dtype=float32)
    """
    check_attackers("trimmed_mean", f)

    def rule(rows: Present) -> NDArray[np.float32]:
        borne = attackers(rows, f)
        check_tolerance("trimmed_mean", "2f+1", borne, 2 * borne + 1, rows.n)
        out_D = np.empty(rows.width, np.float32)
        mass, slack = rows.mass, rows.mass * MASS_SLACK
        low = borne * mass / rows.n
        high = mass - low
        for columns, block_NB in rows.blocks(share=2):
            sorted_NB, cumulative_NB = sort_columns(block_NB, rows.weight_N)
            for border in (low, high):  # 1e-16 of a trimmed row at 1e30 would be everything
                cumulative_NB[np.abs(cumulative_NB - border) <= slack] = border
            kept_NB = np.diff(np.clip(cumulative_NB, low, high), axis=0, prepend=low)
            out_D[columns] = weighted_sum(sorted_NB, kept_NB) / (high - low)
        return out_D

    return Ruled(rule)
