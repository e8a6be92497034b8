"""What all aggregators stand on: the present rows in an order that depends on their content only, read in blocks.

Legend: N participants (those of weight above 0 are *present*), D values of a flattened adapter, B values of a block.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cmp_to_key
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from assay.config import ConfigError
from assay.spool import Deltas, Matrix, panel_width, row, take

# Values of one block over all participants. 2^18 float32 are 1 MiB, their float64 copy and sort order 2 MiB each:
# this stays in the cache of one core, and with 1,000 participants still reads 1 KiB of each row at a time. Twice or
# half of it changes seconds a little and never a result.
BLOCK_VALUES = 2**18
Block = NDArray[np.float32]
T = TypeVar("T")


class Aggregator(Protocol):
    """`delta_ND` float32 (client's adapter minus the round's start; a matrix, or `spool.Deltas` of adapters that lie on
    a disk), `weight_N` not negative -> float32 `delta_D`."""

    def __call__(self, delta_ND: Matrix, weight_N: ArrayLike, /) -> NDArray[np.float32]: ...


class ToleranceError(ValueError):
    """More attackers to bear than the rule can among the participants present; the message names the bound."""


@dataclass(frozen=True, slots=True)
class Present:
    """The rows of weight above 0, in an order that depends on their content only, weights relative to the largest.

    `mix_MN` is a pre-step's: the M rows a rule then sees are mixtures of the N present ones, made block by block, so
    that mixing costs no second matrix.
    """

    delta_ND: Matrix
    row_N: NDArray[np.intp]
    weight_N: NDArray[np.float64]
    mix_MN: NDArray[np.float64] | None = None

    @property
    def n(self) -> int:
        return len(self.weight_N)

    @property
    def width(self) -> int:
        return int(self.delta_ND.shape[1])

    @property
    def mass(self) -> float:
        return float(self.weight_N.sum())

    def blocks(self, start: int = 0, stop: int | None = None, share: int = 1) -> Iterator[tuple[slice, Block]]:
        """Column slices of [start, stop) and copies of the present rows there; `share` times smaller on request."""
        stop = self.width if stop is None else stop
        step = max(1, BLOCK_VALUES // (max(self.n, len(self.row_N)) * share))
        wide = panel_width(self.delta_ND, len(self.row_N), step)
        for left in range(start, stop, wide):
            panel_NP = take(self.delta_ND, self.row_N, slice(left, min(left + wide, stop)))
            for at in range(left, min(left + wide, stop), step):
                columns = slice(at, min(at + step, stop))
                here = slice(at - left, columns.stop - left)
                yield columns, self._made(panel_NP if wide == step else panel_NP[:, here].copy())
            del panel_NP  # or the next panel is read beside this one

    def read(self, columns: NDArray[np.intp]) -> Block:
        """A copy of the present rows at single columns. ValueError for NaN or infinity."""
        return self._made(take(self.delta_ND, self.row_N, columns))

    def _made(self, block_NB: Block) -> Block:
        if not np.isfinite(block_NB).all():
            raise ValueError("delta_ND has NaN or infinity in a row of weight above 0; the wire must refuse it")
        return block_NB if self.mix_MN is None else (self.mix_MN @ block_NB).astype(np.float32)

    def only(self, index_M: Sequence[int] | NDArray[np.intp]) -> Present:
        """Some of the rows, weights relative to the largest of them."""
        index_M = np.asarray(index_M, np.intp)
        weight_M = self.weight_N[index_M] / self.weight_N[index_M].max()
        if self.mix_MN is None:
            return Present(self.delta_ND, self.row_N[index_M], weight_M)
        return Present(self.delta_ND, self.row_N, weight_M, self.mix_MN[index_M])

    def mixed(self, mix_MN: NDArray[np.float64], weight_M: NDArray[np.float64]) -> Present:
        """Rows that are mixtures (each row of `mix_MN` sums to 1) of these."""
        mix_MN = mix_MN if self.mix_MN is None else mix_MN @ self.mix_MN
        return Present(self.delta_ND, self.row_N, weight_M / weight_M.max(), mix_MN)


Rule = Callable[[Present], NDArray[np.float32]]
Memory = Mapping[str, NDArray[np.float32]]
MemoryRule = Callable[[Present, Sequence[str], Memory], tuple[NDArray[np.float32], Memory]]


@dataclass(frozen=True, slots=True)
class Ruled:
    """An aggregator made of a rule on present rows; what is common to all of them is done here."""

    rule: Rule

    def __call__(self, delta_ND: Matrix, weight_N: ArrayLike, /) -> NDArray[np.float32]:
        checked_N = checked(delta_ND, weight_N)
        row_N = _by_content(delta_ND, checked_N, np.flatnonzero(checked_N))
        if not row_N.size:
            return np.zeros(delta_ND.shape[1], np.float32)
        return _plain(self.rule(Present(delta_ND, row_N, checked_N[row_N] / checked_N[row_N].max())))


@dataclass(frozen=True, slots=True)
class Remembering:
    """An aggregator that remembers participants: `init() -> memory`, then `aggregate(delta_ND, weight_N, names,
    memory) -> (delta_D, memory)`. Memory is named float32 arrays, kept in the checkpoint beside the server
    optimiser's; it is never written to, a new one is returned. Called as a plain aggregator it is a first round."""

    rule: MemoryRule

    def init(self) -> Memory:
        return {}

    def aggregate(
        self, delta_ND: Matrix, weight_N: ArrayLike, names: Sequence[str], memory: Memory
    ) -> tuple[NDArray[np.float32], Memory]:
        """`names`: who sent each row, all different. Those of weight 0 are neither seen nor remembered."""
        checked_N = checked(delta_ND, weight_N)
        if len(set(names)) != len(checked_N):
            raise ValueError(f"{len(set(names))} different names do not fit {len(checked_N)} rows")
        row_N = _by_content(delta_ND, checked_N, np.flatnonzero(checked_N), names)
        if not row_N.size:
            return np.zeros(delta_ND.shape[1], np.float32), memory
        rows = Present(delta_ND, row_N, checked_N[row_N] / checked_N[row_N].max())
        out_D, memory = self.rule(rows, [names[row] for row in row_N], memory)
        return _plain(out_D), memory

    def __call__(self, delta_ND: Matrix, weight_N: ArrayLike, /) -> NDArray[np.float32]:
        checked_N = checked(delta_ND, weight_N)
        return self.aggregate(delta_ND, checked_N, [str(row) for row in range(len(checked_N))], self.init())[0]


def step(
    aggregate: Aggregator, delta_ND: Matrix, weight_N: ArrayLike, names: Sequence[str], memory: Memory
) -> tuple[NDArray[np.float32], Memory]:
    """One round of any aggregator: a stateless one leaves `memory` as it is."""
    if isinstance(aggregate, Remembering):
        return aggregate.aggregate(delta_ND, weight_N, names, memory)
    return aggregate(delta_ND, weight_N), memory


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


def _plain(out_D: NDArray[np.float32]) -> NDArray[np.float32]:
    out_D += np.float32(0)  # -0.0 becomes 0.0: the two compare equal, so the order by content cannot tell them
    return out_D


def checked(delta_ND: Matrix, weight_N: ArrayLike) -> NDArray[np.float64]:
    if not isinstance(delta_ND, np.ndarray | Deltas) or delta_ND.ndim != 2 or delta_ND.dtype != np.float32:
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
    delta_ND: Matrix, weight_N: NDArray[np.float64], row_N: NDArray[np.intp], names: Sequence[str] = ()
) -> NDArray[np.intp]:
    """Rows sorted as tuples of numbers would be, then by weight and name: float sums are then the same in whatever order they
    came, without hashing every row. Two rows nearly always differ within their first values, so this reads little."""

    def compare(a: np.intp, b: np.intp) -> int:
        for at in range(0, delta_ND.shape[1], 4096):
            a_B, b_B = (row(delta_ND, int(one), at, at + 4096) for one in (a, b))
            differs_B = a_B != b_B
            if differs_B.any():
                first = int(np.argmax(differs_B))
                return -1 if a_B[first] < b_B[first] else 1
        if weight_N[a] != weight_N[b]:
            return -1 if weight_N[a] < weight_N[b] else 1
        return -1 if names and names[int(a)] < names[int(b)] else int(bool(names))

    return np.array(sorted(row_N, key=cmp_to_key(compare)), dtype=np.intp)


def check_count(rule: str, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{rule}: {name} must be a whole number of at least {least}, got {value!r}")


def check_number(rule: str, name: str, value: object, least: float, strict: bool = False) -> None:
    """`strict`: above `least`, not at it."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < least or (strict and value == least):  # type: ignore[operator]
        raise ConfigError(
            f"{rule}: {name} must be a number {'above' if strict else 'of at least'} {least:g}, got {value!r}"
        )


def check_choice(rule: str, name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{rule}: {name} must be one of {', '.join(known)}; got {value!r}")


def check_tolerance(rule: str, bound: str, f: int, needed: int, present: int) -> None:
    if present < needed:
        raise ToleranceError(
            f"{rule} bears f attackers only among at least {bound} present participants: "
            f"f={f} needs {needed}, {present} present"
        )
