"""What all aggregators stand on: the present rows in an order that depends on their content only, read in blocks.

Legend: N participants (those of weight above 0 are *present*), D values of a flattened adapter, B values of a block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cmp_to_key
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


def aggregator(rule: Rule) -> Aggregator:
    def aggregate(delta_ND: NDArray[np.float32], weight_N: ArrayLike, /) -> NDArray[np.float32]:
        checked_N = checked(delta_ND, weight_N)
        row_N = np.flatnonzero(checked_N)
        if not row_N.size:
            return np.zeros(delta_ND.shape[1], np.float32)
        row_N = _by_content(delta_ND, checked_N, row_N)
        present_N = checked_N[row_N]
        out_D = rule(Present(delta_ND, row_N, present_N / present_N.max()))
        out_D += np.float32(0)  # -0.0 becomes 0.0: the two compare equal, so the order by content cannot tell them
        return out_D

    return aggregate


def checked(delta_ND: NDArray[np.float32], weight_N: ArrayLike) -> NDArray[np.float64]:
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


def square_distances(rows: Present) -> NDArray[np.float64]:
    gram_NN = np.zeros((rows.n, rows.n))
    for _, block_NB in rows.blocks():
        centre_B = np.partition(block_NB, rows.n // 2, axis=0)[rows.n // 2]
        centred_NB = block_NB.astype(np.float64) - centre_B
        gram_NN += centred_NB @ centred_NB.T
    norm_N = np.diagonal(gram_NN)
    return np.maximum(norm_N[:, None] + norm_N[None, :] - 2 * gram_NN, 0)  # rounding can leave -1e-16


def check_count(rule: str, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{rule}: {name} must be a whole number of at least {least}, got {value!r}")


def check_tolerance(rule: str, bound: str, f: int, needed: int, present: int) -> None:
    if present < needed:
        raise ToleranceError(
            f"{rule} bears f attackers only among at least {bound} present participants: "
            f"f={f} needs {needed}, {present} present"
        )


def weighted_mean(rows: Present) -> NDArray[np.float32]:
    out_D = np.empty(rows.delta_ND.shape[1], np.float32)
    for columns, block_NB in rows.blocks():
        out_D[columns] = weighted_sum(block_NB, rows.weight_N[:, None]) / rows.mass
    return out_D
