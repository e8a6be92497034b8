"""Adapters and their weights -> one delta on the round's start: rows cut to length, the aggregator, its quorum.

A round and its later excision both go through `merge`, so that a replay is the run.
Legend: N participants, D values of a flattened adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from assay import spool
from assay.config import AggregationConfig
from assay.contribution import Tensors, differences, flatten
from assay.federated import aggregators
from assay.federated.aggregators import Aggregator, Memory, ToleranceError, step
from assay.federated.aggregators.product import Truncation, average_products
from assay.spool import Matrix


@dataclass(frozen=True, slots=True)
class Merged:
    """What the aggregator made of a round. `used` is the rule that did it; where that bears fewer attackers than was asked
    for, `note` says so."""

    delta_D: NDArray[np.float32]
    memory: Memory
    used: Aggregator
    truncation: Truncation | None = None
    note: str = ""


def merge(
    updates: Sequence[Tensors],
    names: Sequence[str],
    start: Tensors,
    weight_N: NDArray[np.float64],
    aggregate: Aggregator,
    aggregation: AggregationConfig,
    memory: Memory,
    longest_N: ArrayLike | None = None,
) -> Merged:
    """Adapters as one delta on `start`, factor-wise by the aggregator, or exactly as products.

    `names` are whose updates they are, for aggregators that remember. A row longer than its `longest_N` (L2) is cut
    to it first. Raises the aggregator's ToleranceError, unless `aggregation.quorum` lets `f` shrink and a smaller one
    can be borne.
    """
    if aggregation.average == "product":
        if longest_N is not None:
            updates = [_shortened(u, start, most) for u, most in zip(updates, np.asarray(longest_N), strict=True)]
        adapter, truncation = average_products(updates, weight_N)
        return Merged(flatten(adapter) - flatten(start), memory, aggregate, truncation)
    delta_ND = rows(updates, start, longest_N)
    try:
        return Merged(*step(aggregate, delta_ND, weight_N, names, memory), aggregate)
    except ToleranceError as error:
        if aggregation.quorum == "skip":
            raise
        for f, smaller in _bearing_fewer(aggregation, len(updates)):
            try:
                rule = aggregators.from_config(smaller, start)
                made = step(rule, delta_ND, weight_N, names, memory)
            except ToleranceError:
                continue
            return Merged(*made, rule, note=f"f shrunk to {f}: {error}")
        raise


def rows(updates: Sequence[Tensors], start: Tensors, longest_N: ArrayLike | None = None) -> Matrix:
    """delta_ND, no row longer than its limit: in memory, or what reads it in panels where the updates are on a disk."""
    stored = spool.deltas(updates, start)
    if stored is not None:
        return stored if longest_N is None else stored.times(_parts(stored, longest_N))
    delta_ND = differences(updates, start)
    if longest_N is not None:
        shorten(delta_ND, longest_N)
    return delta_ND


def shorten(delta_ND: NDArray[np.float32], longest_N: ArrayLike) -> None:
    """Rows longer than their limit are cut to it, in place.

    >>> delta_ND = np.array([[3, 4], [3, 4]], np.float32)
    >>> shorten(delta_ND, [np.inf, 2.5])
    >>> delta_ND
    array([[3. , 4. ],
           [1.5, 2. ]], dtype=float32)
    """
    for row_D, part in zip(delta_ND, _parts(delta_ND, longest_N), strict=True):
        if part != 1:
            row_D *= part


def _parts(delta_ND: Matrix, longest_N: ArrayLike) -> NDArray[np.float32]:
    """What is left of each row."""
    part_N = []
    for row_D, most in zip(delta_ND, np.asarray(longest_N, np.float64), strict=True):
        norm = _length(row_D) if np.isfinite(most) else 0.0
        part_N.append(most / norm if norm > most else 1.0)
    return np.array(part_N, np.float32)


def _shortened(adapter: Tensors, start: Tensors, longest: float) -> Tensors:
    if not np.isfinite(longest):
        return adapter
    norm = np.sqrt(sum(_length(adapter[n] - start[n]) ** 2 for n in start))
    part = np.float32(longest / norm if norm > longest else 1.0)
    return {n: start[n] + part * (adapter[n] - start[n]) for n in start}


def _length(x: NDArray[np.float32]) -> float:
    flat = x.ravel()
    return float(np.sqrt(np.einsum("d,d->", flat, flat, dtype=np.float64)))


def _bearing_fewer(aggregation: AggregationConfig, present: int) -> Iterator[tuple[int, AggregationConfig]]:
    """The same rules told to bear fewer attackers, the most first; `estimate` counts as all who are present."""
    tables = [aggregation.params, *aggregation.pre_params.values()]
    asked = [present if isinstance(t["f"], str) else int(t["f"]) for t in tables if "f" in t]
    for f in range(min(max(asked, default=0), present) - 1, -1, -1):
        params = _at_most(aggregation.params, f)
        pre_params = {name: _at_most(table, f) for name, table in aggregation.pre_params.items()}
        yield f, aggregation.model_copy(update={"params": params, "pre_params": pre_params})


def _at_most(params: Mapping[str, Any], f: int) -> dict[str, Any]:
    return {k: (f if isinstance(v, str) else min(v, f)) if k == "f" else v for k, v in params.items()}


def claimed_weight(weight: float, num_examples: int, aggregation: AggregationConfig) -> float:
    """One contribution's weight in the aggregate."""
    return weight * min(num_examples, aggregation.max_count) if aggregation.use_counts else weight
