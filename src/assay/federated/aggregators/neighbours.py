"""Rules that choose rows by how near their neighbours are. Legend: as in common.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from assay.federated.aggregators.common import (
    Aggregator,
    Present,
    Ruled,
    ToleranceError,
    check_choice,
    check_count,
    check_tolerance,
)
from assay.federated.aggregators.geometry import (
    MASS_SLACK,
    SCORE_SLACK,
    attackers,
    centred_gram,
    check_attackers,
    column_median,
    square_distances,
    weighted_mean,
    weighted_sum,
)

PAPER, BYZFL, SAFE_FEDLLM = "paper", "byzfl", "safe-fedllm"


def krum(f: int | str, m: int = 1, variant: str = PAPER) -> Aggregator:
    """Krum (Blanchard et al. 2017, section 4): the present row nearest to its n-f-2 nearest others.

    Score of a row: the sum of its squared distances to its nearest other rows. f = 0 asks to bear nobody and takes
    any n. Nobody agrees on the neighbours, so the variant has a name:
    `paper`: the n-f-2 nearest; needs n >= 2f + 3. `m` > 1 is Multi-Krum: the weighted mean of the m best, m <= n-f-2
    (resilience is proven up to there: Damaskinos et al. 2019, AggregaThor).
    `byzfl` (0.0.11): the n-f-1 nearest; n >= 2f + 1 is all it asks; m <= n-f.
    `safe-fedllm` (the published code): plain instead of squared distances to the n-f-1 nearest, and the weighted mean
    of the winner and these n-f-1, so of n-f rows; n >= 2f + 1; no m.

    Weights: the smallest score / weight wins, weights relative to the largest. So a row trusted by half must be twice
    as central to be chosen, equal weights are Krum, and a weight falling to 0 ends where the row is never chosen.
    As a *neighbour* every present row counts whole: the bound counts heads, and a neighbour's closeness is evidence
    only together with the others'. Ties go to the row that comes first by content, compared number by number.

    >>> krum(f=0)(np.array([[1], [2], [4], [1e6]], np.float32), [1, 1, 1, 1])
    array([2.], dtype=float32)
    """
    check_attackers("krum", f)
    check_count("krum", "m", m, 1)
    check_choice("krum", "variant", variant, (PAPER, BYZFL, SAFE_FEDLLM))
    if variant == SAFE_FEDLLM:
        check_choice("krum", "m of safe-fedllm", str(m), ("1",))

    def rule(rows: Present) -> NDArray[np.float32]:
        borne = attackers(rows, f)
        distance_NN = _others(rows, borne, variant)
        if variant == SAFE_FEDLLM:
            return weighted_mean(rows.only(_around_the_winner(distance_NN, rows, borne, rows.n - borne)))
        return weighted_mean(rows.only(_best(distance_NN, rows, borne, variant, m)))

    return Ruled(rule)


def multi_krum(f: int | str, m: int | None = None, variant: str = PAPER) -> Aggregator:
    """Multi-Krum (Blanchard et al. 2017, section 4): the weighted mean of the m rows with the best Krum scores.

    `m` None: as many as the variant allows, n-f-2 of `paper`, n-f of the others. Weights and ties as in `krum`.
    `safe-fedllm`: the published code has no rule of this name, and its Krum is a mean of several rows already: the
    winner and the rows nearest to the *winner*, not those with the best scores of their own. Here with m rows in
    all, so that at m None it is that Krum.

    >>> multi_krum(f=1, variant="byzfl")(np.array([[1], [2], [3], [1e6]], np.float32), [1, 1, 1, 1])
    array([2.], dtype=float32)
    """
    check_attackers("multi_krum", f)
    check_choice("multi_krum", "variant", variant, (PAPER, BYZFL, SAFE_FEDLLM))
    if m is not None:
        check_count("multi_krum", "m", m, 1)

    def rule(rows: Present) -> NDArray[np.float32]:
        borne = attackers(rows, f)
        distance_NN = _others(rows, borne, variant, "multi_krum")
        count = max(1, rows.n - borne - (2 if variant == PAPER else 0)) if m is None else m
        if variant == SAFE_FEDLLM:
            return weighted_mean(rows.only(_around_the_winner(distance_NN, rows, borne, count)))
        return weighted_mean(rows.only(_best(distance_NN, rows, borne, variant, count)))

    return Ruled(rule)


def bulyan(f: int | str) -> Aggregator:
    """Bulyan (El Mhamdi et al. 2018, section 4): Krum chooses n-2f rows, one after the other, each among those left;
    of these, in each coordinate, the mean of the n-4f values nearest to their median. Needs n >= 4f + 3.

    Weights: in the choice as in `krum`; in the coordinates the median is weighted and the nearest share
    (n-4f)/(n-2f) of the chosen weight counts, the row at the border in part.

    >>> bulyan(f=1)(np.array([[1], [2], [3], [4], [5], [6], [1e6]], np.float32), np.ones(7))
    array([3.], dtype=float32)
    """
    check_attackers("bulyan", f)

    def rule(rows: Present) -> NDArray[np.float32]:
        borne = attackers(rows, f)
        if borne > 0:
            check_tolerance("bulyan", "4f+3", borne, 4 * borne + 3, rows.n)
        distance_NN = _off_diagonal(rows)
        left: list[int] = list(range(rows.n))
        chosen: list[int] = []
        while len(chosen) < rows.n - 2 * borne:
            score_M = _scores(distance_NN[np.ix_(left, left)], max(1, len(left) - borne - 2))
            chosen.append(left.pop(_first_of_ties(score_M / _weights(rows)[left])))
        return _nearest_to_median(rows.only(chosen), (rows.n - 4 * borne) / (rows.n - 2 * borne))

    return Ruled(rule)


def _nearest_to_median(rows: Present, share: float) -> NDArray[np.float32]:
    out_D = np.empty(rows.width, np.float32)
    limit, slack = share * rows.mass, rows.mass * MASS_SLACK
    for columns, block_NB in rows.blocks(share=2):
        away_NB = np.abs(block_NB - column_median(block_NB.copy(), rows.weight_N))
        order_NB = np.argsort(away_NB, axis=0, kind="stable")
        reached_NB = np.cumsum(rows.weight_N[order_NB], axis=0)
        reached_NB[np.abs(reached_NB - limit) <= slack] = limit
        kept_NB = np.diff(np.minimum(reached_NB, limit), axis=0, prepend=0.0)
        out_D[columns] = weighted_sum(np.take_along_axis(block_NB, order_NB, axis=0), kept_NB) / limit
    return out_D


def _others(rows: Present, f: int, variant: str, rule: str = "krum") -> NDArray[np.float64]:
    """Squared distances to everybody else, once the bound of the variant is met."""
    if f > 0:
        bound, needed = ("2f+3", 2 * f + 3) if variant == PAPER else ("2f+1", 2 * f + 1)
        check_tolerance(rule, bound, f, needed, rows.n)
    return _off_diagonal(rows)


def _off_diagonal(rows: Present) -> NDArray[np.float64]:
    distance_NN = square_distances(centred_gram(rows))
    np.fill_diagonal(distance_NN, np.inf)  # nobody is his own neighbour
    return distance_NN


def _around_the_winner(square_NN: NDArray[np.float64], rows: Present, f: int, m: int) -> Sequence[int]:
    """The row with the least sum of plain distances to its n-f-1 nearest, and the m-1 rows nearest to it."""
    _check_mean(rows, f, SAFE_FEDLLM, m)
    distance_NN = np.sqrt(square_NN)
    [winner] = _best(distance_NN, rows, f, SAFE_FEDLLM, 1)
    return [winner, *np.argsort(distance_NN[winner], kind="stable")[: m - 1]]


def _check_mean(rows: Present, f: int, variant: str, m: int) -> None:
    most = max(1, rows.n - f - 2) if variant == PAPER else rows.n - f
    if m > most:
        bound, more = ("n-f-2", m + f + 2) if variant == PAPER else ("n-f", m + f)
        raise ToleranceError(
            f"krum averages at most {bound} of n participants: f={f}, m={m} needs {more}, {rows.n} present"
        )


def _best(distance_NN: NDArray[np.float64], rows: Present, f: int, variant: str, m: int) -> Sequence[int]:
    _check_mean(rows, f, variant, m)
    neighbours = max(1, rows.n - f - (2 if variant == PAPER else 1))
    score_N = _scores(distance_NN, neighbours) / _weights(rows)
    chosen: list[int] = []
    for _ in range(m):
        chosen.append(_first_of_ties(score_N))
        score_N[chosen[-1]] = np.inf
    return chosen


def _scores(distance_MM: NDArray[np.float64], neighbours: int) -> NDArray[np.float64]:
    m = len(distance_MM)
    return np.asarray(np.sort(distance_MM, axis=1)[:, : min(neighbours, m - 1)].sum(axis=1))


def _weights(rows: Present) -> NDArray[np.float64]:
    return np.maximum(rows.weight_N, 1e-100)  # float32 distances cannot overflow even so


def _first_of_ties(score_N: NDArray[np.float64]) -> int:
    return int(np.argmax(score_N <= score_N.min() * (1 + SCORE_SLACK)))  # first by content among ties
