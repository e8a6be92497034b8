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

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from assay.config import ConfigError
from assay.federated.aggregators.averages import mean
from assay.federated.aggregators.common import Aggregator, ToleranceError, build, checked
from assay.federated.aggregators.coordinates import median, trimmed_mean
from assay.federated.aggregators.neighbours import krum

__all__ = ["AGGREGATORS", "Aggregator", "ToleranceError", "build", "krum", "make", "mean", "median", "trimmed_mean"]

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


def _guarded(name: str, function: Callable[..., Any], params: Mapping[str, Any]) -> Aggregator:
    def aggregate(delta_ND: NDArray[np.float32], weight_N: ArrayLike, /) -> NDArray[np.float32]:
        checked_N = checked(delta_ND, weight_N)
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
