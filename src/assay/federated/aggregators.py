"""Aggregators: one call, `aggregate(delta_ND, weight_N) -> delta_D`, made by name with `make`.

Legend: N participants (those of weight above 0 are *present*), D values of a flattened adapter, B values of a block.

What holds for each of them (tests/test_aggregators.py): the order of rows does not matter, bit for bit; weight 0 is
exactly absence, such a row is not even read; nobody present gives zeros (nothing changes); one participant alone gets
his delta back (with f = 0); the result lies between the smallest and the largest present value of each coordinate; D
is read in blocks, so that memory beyond the input is bounded whatever N and D.

Errors, all of them the operator's: ValueError for wrong shapes, negative or non-finite weights, non-finite deltas
(the wire refuses those); `ToleranceError` when a rule is to bear more attackers than the participants present allow;
`ConfigError` for unknown names and parameters. `f`, the number of attackers to bear, is the operator's parameter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cmp_to_key
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from assay.config import ConfigError

# Values of one block over all participants. 2^18 float32 are 1 MiB, their float64 copy and sort order 2 MiB each:
# this stays in the cache of one core, and with 1,000 participants still reads 1 KiB of each row at a time. Twice or
# half of it changes seconds a little and never a result.
BLOCK_VALUES = 2**18
# Weights are sums of floats: 0.1 + 0.2 must meet 0.3. Far below any weight that means something.
MASS_SLACK = 1e-12
# Scores this close (relative) are a tie: above float64 rounding over D = 1e9, below any real difference.
SCORE_SLACK = 1e-9

T = TypeVar("T")


class Aggregator(Protocol):
    """`delta_ND` float32 (client's adapter minus the round's start), `weight_N` not negative -> float32 `delta_D`."""

    def __call__(self, delta_ND: NDArray[np.float32], weight_N: ArrayLike, /) -> NDArray[np.float32]: ...


class ToleranceError(ValueError):
    """More attackers to bear than the rule can among the participants present; the message names the bound."""


@dataclass(frozen=True, slots=True)
class Present:
    """The rows of weight above 0, in an order that depends on their content only, weights relative to the largest."""

    delta_ND: NDArray[np.float32]
    row_N: NDArray[np.intp]
    weight_N: NDArray[np.float64]

    @property
    def n(self) -> int:
        return len(self.row_N)

    @property
    def mass(self) -> float:
        return float(self.weight_N.sum())

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Column slices and copies of the present rows there."""
        width = max(1, BLOCK_VALUES // self.n)
        for at in range(0, self.delta_ND.shape[1], width):
            columns = slice(at, at + width)
            block_NB = self.delta_ND[self.row_N, columns]
            if not np.isfinite(block_NB).all():
                raise ValueError("delta_ND has NaN or infinity in a row of weight above 0; the wire must refuse it")
            yield columns, block_NB


Rule = Callable[[Present], NDArray[np.float32]]


def mean() -> Aggregator:
    """FedAvg (McMahan et al. 2017): the weighted mean. Bears no attacker: one row moves it anywhere.

    >>> mean()(np.array([[1], [3]], np.float32), [1, 3])
    array([2.5], dtype=float32)
    """
    return _aggregator(_mean)


def _mean(rows: Present) -> NDArray[np.float32]:
    out_D = np.empty(rows.delta_ND.shape[1], np.float32)
    for columns, block_NB in rows.blocks():
        out_D[columns] = _weighted_sum(block_NB, rows.weight_N[:, None]) / rows.mass
    return out_D


def median() -> Aggregator:
    """Coordinate-wise median (Yin et al. 2018), weighted: the values at which half the weight lies on either side.

    Where a whole interval does (equal weights: N even) its midpoint, as `np.median`; integer weights are repeated
    rows. Bears attackers who hold less than half of the weight present.

    >>> median()(np.array([[1], [2], [9]], np.float32), [1, 1, 2])
    array([5.5], dtype=float32)
    """

    def rule(rows: Present) -> NDArray[np.float32]:
        out_D = np.empty(rows.delta_ND.shape[1], np.float32)
        half, slack = rows.mass / 2, rows.mass * MASS_SLACK
        for columns, block_NB in rows.blocks():
            sorted_NB, cumulative_NB = _sorted(block_NB, rows.weight_N)
            low_B = np.argmax(cumulative_NB >= half - slack, axis=0, keepdims=True)
            high_B = np.argmax(cumulative_NB > half + slack, axis=0, keepdims=True)
            low_B, high_B = (np.take_along_axis(sorted_NB, index_B, axis=0)[0] for index_B in (low_B, high_B))
            out_D[columns] = (low_B.astype(np.float64) + high_B) / 2  # float32 would overflow on two values of 3e38
        return out_D

    return _aggregator(rule)


def trimmed_mean(f: int) -> Aggregator:
    """Coordinate-wise trimmed mean (Yin et al. 2018): of n present, drops the f lowest and f highest values each.

    Weighted: drops the share f/n of the weight from each end, the row at the border in part; equal weights give the
    classical rule, integer weights the same as repeated rows with f in proportion. So it bears attackers who together
    hold at most f/n of the weight: f of average weight, fewer of more. Needs n >= 2f + 1 present.

    >>> trimmed_mean(f=1)(np.array([[1], [2], [4], [1e6]], np.float32), [1, 1, 1, 1])
    array([3.], dtype=float32)
    """
    _check_count("trimmed_mean", "f", f, 0)

    def rule(rows: Present) -> NDArray[np.float32]:
        _check_tolerance("trimmed_mean", "2f+1", f, 2 * f + 1, rows.n)
        out_D = np.empty(rows.delta_ND.shape[1], np.float32)
        mass, slack = rows.mass, rows.mass * MASS_SLACK
        low = f * mass / rows.n
        high = mass - low
        for columns, block_NB in rows.blocks():
            sorted_NB, cumulative_NB = _sorted(block_NB, rows.weight_N)
            for border in (low, high):  # 1e-16 of a trimmed row at 1e30 would be everything
                cumulative_NB[np.abs(cumulative_NB - border) <= slack] = border
            kept_NB = np.diff(np.clip(cumulative_NB, low, high), axis=0, prepend=low)
            out_D[columns] = _weighted_sum(sorted_NB, kept_NB) / (high - low)
        return out_D

    return _aggregator(rule)


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
    _check_count("krum", "f", f, 0)
    _check_count("krum", "m", m, 1)

    def rule(rows: Present) -> NDArray[np.float32]:
        if f > 0:
            _check_tolerance("krum", "2f+3", f, 2 * f + 3, rows.n)
        neighbours = max(1, rows.n - f - 2)
        if m > neighbours:
            raise ToleranceError(
                f"krum averages at most n-f-2 of n participants: f={f}, m={m} needs {m + f + 2}, {rows.n} present"
            )
        distance_NN = _square_distances(rows)
        np.fill_diagonal(distance_NN, np.inf)  # nobody is his own neighbour
        score_N = np.sort(distance_NN, axis=1)[:, :neighbours].sum(axis=1) if rows.n > 1 else np.zeros(1)
        score_N = score_N / np.maximum(rows.weight_N, 1e-100)  # float32 distances cannot overflow even so
        chosen = []
        for _ in range(m):
            best = int(np.argmax(score_N <= score_N.min() * (1 + SCORE_SLACK)))  # first by content among ties
            chosen.append(best)
            score_N[best] = np.inf
        return _mean(Present(rows.delta_ND, rows.row_N[chosen], rows.weight_N[chosen] / rows.weight_N[chosen].max()))

    return _aggregator(rule)


AGGREGATORS: Mapping[str, Callable[..., Aggregator]] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
}


def make(name: str | Aggregator, **params: Any) -> Aggregator:
    """An aggregator by name, or any function `(delta_ND, weight_N) -> delta_D` with `params` bound to it.

    Third parties add names under the entry-point group `assay.aggregators`; an entry point is a factory, called with
    the params. Foreign functions are wrapped: they see present rows only, so that weight 0 is absence for them too,
    and what they return must be D finite numbers. (Order-freeness stays their own duty.)

    >>> make("trimmed_mean", f=1)(np.zeros((3, 2), np.float32), [1, 1, 1])
    array([0., 0.], dtype=float32)
    """
    if callable(name):
        label = getattr(name, "__name__", type(name).__name__)
        return _guarded(label, name, params)
    if name in AGGREGATORS:
        return build(name, AGGREGATORS[name], params)
    plugins = {entry.name: entry for entry in entry_points(group="assay.aggregators")}
    if name not in plugins:
        raise ConfigError(f"unknown aggregator {name!r}; known: {', '.join([*AGGREGATORS, *plugins])}")
    return _guarded(name, build(name, plugins[name].load(), params), {})


def build(name: str, factory: Callable[..., T], params: Mapping[str, Any]) -> T:
    """Call a factory with checked keyword parameters; unknown or missing ones are a ConfigError listing the known."""
    known = inspect.signature(factory).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        for key in params:
            if key not in known:
                raise ConfigError(f"{name} has no parameter {key!r}; known: {', '.join(known) or 'none'}")
    for key, parameter in known.items():
        variadic = parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        if parameter.default is inspect.Parameter.empty and not variadic and key not in params:
            raise ConfigError(f"{name} needs parameter {key!r}; known: {', '.join(known)}")
    return factory(**params)


def _aggregator(rule: Rule) -> Aggregator:
    def aggregate(delta_ND: NDArray[np.float32], weight_N: ArrayLike, /) -> NDArray[np.float32]:
        checked_N = _checked(delta_ND, weight_N)
        row_N = np.flatnonzero(checked_N)
        if not row_N.size:
            return np.zeros(delta_ND.shape[1], np.float32)
        row_N = _by_content(delta_ND, checked_N, row_N)
        present_N = checked_N[row_N]
        out_D = rule(Present(delta_ND, row_N, present_N / present_N.max()))
        out_D += np.float32(0)  # -0.0 becomes 0.0: the two compare equal, so the order by content cannot tell them
        return out_D

    return aggregate


def _guarded(name: str, function: Callable[..., Any], params: Mapping[str, Any]) -> Aggregator:
    def aggregate(delta_ND: NDArray[np.float32], weight_N: ArrayLike, /) -> NDArray[np.float32]:
        checked_N = _checked(delta_ND, weight_N)
        present_N = checked_N > 0
        if not present_N.any():
            return np.zeros(delta_ND.shape[1], np.float32)
        if not present_N.all():
            delta_ND, checked_N = delta_ND[present_N], checked_N[present_N]
        out_D = np.asarray(function(delta_ND, checked_N, **params))
        if out_D.shape != delta_ND.shape[1:] or not np.isfinite(out_D).all():
            raise ValueError(f"aggregator {name} must return {delta_ND.shape[1]} finite values; got {out_D.shape}")
        return out_D.astype(np.float32)

    return aggregate


def _checked(delta_ND: NDArray[np.float32], weight_N: ArrayLike) -> NDArray[np.float64]:
    if not isinstance(delta_ND, np.ndarray) or delta_ND.ndim != 2 or delta_ND.dtype != np.float32:
        got = f"{getattr(delta_ND, 'dtype', type(delta_ND).__name__)} of shape {np.shape(delta_ND)}"
        raise ValueError(f"delta_ND must be a float32 matrix, one row a participant; got {got}")
    checked_N = np.asarray(weight_N, np.float64)
    if checked_N.shape != delta_ND.shape[:1]:
        raise ValueError(f"weight_N of shape {checked_N.shape} does not fit {delta_ND.shape[0]} rows")
    wrong = np.flatnonzero(~(np.isfinite(checked_N) & (checked_N >= 0)))
    if wrong.size:
        raise ValueError(f"weight {checked_N[wrong[0]]} of row {wrong[0]} is not a finite number of at least 0")
    return checked_N


def _by_content(
    delta_ND: NDArray[np.float32], weight_N: NDArray[np.float64], row_N: NDArray[np.intp]
) -> NDArray[np.intp]:
    """Rows sorted as tuples of numbers would be, then by weight: float sums are then the same in whatever order they
    came, without hashing every row. Two rows nearly always differ within their first values, so this reads little."""

    def compare(a: np.intp, b: np.intp) -> int:
        for at in range(0, delta_ND.shape[1], 4096):
            a_B, b_B = delta_ND[a, at : at + 4096], delta_ND[b, at : at + 4096]
            differs_B = a_B != b_B
            if differs_B.any():
                first = int(np.argmax(differs_B))
                return -1 if a_B[first] < b_B[first] else 1
        return int(np.sign(weight_N[a] - weight_N[b]))

    return np.array(sorted(row_N, key=cmp_to_key(compare)), dtype=np.intp)


def _sorted(
    block_NB: NDArray[np.float32], weight_N: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Values sorted in each column, and the weight up to and including each: (N, B), or (N, 1) where all are equal."""
    if (weight_N == 1).all():  # relative to the largest: all equal
        block_NB.sort(axis=0)
        return block_NB, np.cumsum(weight_N)[:, None]
    order_NB = np.argsort(block_NB, axis=0, kind="stable")
    return np.take_along_axis(block_NB, order_NB, axis=0), np.cumsum(weight_N[order_NB], axis=0)


def _weighted_sum(block_NB: NDArray[np.float32], weight_NB: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of weight times value in each column, float64, row after row: a matrix product would add in an order that
    depends on the width of the block."""
    total_B = np.zeros(block_NB.shape[1])
    for row_B, weight_B in zip(block_NB, weight_NB):
        total_B += row_B * weight_B
    return total_B


def _square_distances(rows: Present) -> NDArray[np.float64]:
    gram_NN = np.zeros((rows.n, rows.n))
    for _, block_NB in rows.blocks():
        centre_B = np.partition(block_NB, rows.n // 2, axis=0)[rows.n // 2]
        centred_NB = block_NB.astype(np.float64) - centre_B
        gram_NN += centred_NB @ centred_NB.T
    norm_N = np.diagonal(gram_NN)
    return np.maximum(norm_N[:, None] + norm_N[None, :] - 2 * gram_NN, 0)  # rounding can leave -1e-16


def _check_count(rule: str, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{rule}: {name} must be a whole number of at least {least}, got {value!r}")


def _check_tolerance(rule: str, bound: str, f: int, needed: int, present: int) -> None:
    if present < needed:
        raise ToleranceError(
            f"{rule} bears f attackers only among at least {bound} present participants: "
            f"f={f} needs {needed}, {present} present"
        )
