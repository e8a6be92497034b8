"""Aggregators: one call, `aggregate(delta_ND, weight_N) -> delta_D`, made by name with `make`.

Legend: N participants (those of weight above 0 are *present*), D values of a flattened adapter, B values of a block.

What holds for each of them (tests/test_aggregators.py): the order of rows does not matter, bit for bit; weight 0 is
exactly absence, such a row is not even read; only the proportions of weights matter; nobody present gives zeros
(nothing changes); D is read in blocks, so that memory beyond the input is bounded whatever N and D.
What holds but for the EXCEPTIONS below: moving or scaling all rows moves or scales the result; integer weights are
repeated rows; one participant alone gets his delta back (with f = 0); the result lies between the smallest and the
largest present value of each coordinate; the borders of blocks do not show in a single bit.

An aggregator that remembers participants (`Remembering`) is called by `step`, which hands its memory in and out;
pre-steps (`nnm`, `bucketing`) come before any rule by `chain`; `from_config` makes what an experiment asks for.

Errors, all of them the operator's: ValueError for wrong shapes, negative or non-finite weights, non-finite deltas
(the wire refuses those); `ToleranceError` when a rule is to bear more attackers than the participants present allow;
`ConfigError` for unknown names and parameters. `f`, the number of attackers to bear, is the operator's parameter, or
"estimate" (geometry.attackers says what that can see and what an attacker can do to it).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from assay.config import AggregationConfig, ConfigError
from assay.contribution import Tensors
from assay.federated.aggregators.averages import mean, norm_clipped_mean
from assay.federated.aggregators.centres import centred_clipping, geometric_median
from assay.federated.aggregators.common import Aggregator, Memory, Remembering, ToleranceError, build, checked, step
from assay.federated.aggregators.coordinates import median, trimmed_mean
from assay.federated.aggregators.flame import flame
from assay.federated.aggregators.foolsgold import foolsgold
from assay.federated.aggregators.lasa import lasa
from assay.federated.aggregators.neighbours import bulyan, krum, multi_krum
from assay.federated.aggregators.pre_steps import PRE_STEPS, PreStep, bucketing, chain, nnm
from assay.federated.aggregators.residual import residual
from assay.federated.aggregators.spectral import dnc
from assay.spool import Deltas, Matrix

__all__ = [
    "AGGREGATORS", "EXCEPTIONS", "PRE_STEPS", "Aggregator", "Memory", "PreStep", "Remembering", "ToleranceError",
    "bucketing", "build", "bulyan", "centred_clipping", "chain", "dnc", "flame", "foolsgold", "from_config",
    "geometric_median", "krum", "lasa", "make", "mean", "median", "multi_krum", "nnm", "norm_clipped_mean", "residual",
    "step", "trimmed_mean",
]  # fmt: skip

AGGREGATORS: Mapping[str, Callable[..., Aggregator]] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "bulyan": bulyan,
    "norm_clipped_mean": norm_clipped_mean,
    "geometric_median": geometric_median,
    "centred_clipping": centred_clipping,
    "foolsgold": foolsgold,
    "residual": residual,
    "dnc": dnc,
    "flame": flame,
    "lasa": lasa,
}

HEADS = "it counts heads: its bound is on participants, and closeness is evidence only together with the others'"
SPAN = "sums over D of float64 decide weights that a float32 result may show in its last bit"
ORIGIN = "sizes and directions are those of the update, so the origin (no change) is part of the rule"
SHRINKS = "clipped rows shrink towards 0: a value lies between 0 and the present ones"
# What does not hold, for which rule (or pre-step), and why. The tests look for a counter-example to each, but for
# `blocks`, which they hold to a rounding of float32.
EXCEPTIONS: Mapping[str, Mapping[str, str]] = {
    "krum": {"repeats": HEADS},
    "multi_krum": {"repeats": HEADS},
    "bulyan": {"repeats": HEADS},
    "norm_clipped_mean": {
        "moves": ORIGIN,
        "scales": "a bound given as a number does not scale with the rows",
        "alone": "one row alone is clipped to a given bound as well",
        "range": SHRINKS,
        "blocks": SPAN,
    },
    "geometric_median": {"blocks": SPAN},
    "centred_clipping": {
        "moves": "from the start `zero` the origin is part of the rule",
        "scales": "a tau given as a number does not scale with the rows",
        "alone": "one row alone is clipped to a given tau as well",
        "range": "from the start `zero` a value lies between 0 and the present ones",
        "blocks": SPAN,
    },
    "foolsgold": {
        "moves": ORIGIN,
        "repeats": "a repeated row is a Sybil",
        "range": "where everybody is a copy of somebody nobody is left: zeros",
        "blocks": SPAN,
    },
    "residual": {
        "repeats": "the line goes over ranks, and ranks have no halves",
        "range": "values far off are replaced by the robust line, which may run beyond the present ones",
        "blocks": SPAN,
    },
    "dnc": {"repeats": "the number of rows dropped counts heads"},
    "flame": {
        "moves": ORIGIN,
        "repeats": "the majority's cluster counts heads",
        "range": SHRINKS,
        "blocks": SPAN,
    },
    "lasa": {
        "moves": ORIGIN,
        "range": "small values are set to 0 and rows are clipped: a value lies between 0 and the present ones",
        "alone": "one row alone loses its small values as well",
        "blocks": SPAN,
    },
    "nnm": {"blocks": "mixed values are float32 sums of a matrix product, whose order follows the block"},
    "bucketing": {
        "moves": "the shuffle follows from what the rows hold, so that nobody can choose his bucket",
        "scales": "the shuffle follows from what the rows hold, so that nobody can choose his bucket",
        "repeats": "a row stands in one bucket, two rows may stand in two",
        "blocks": "mixed values are float32 sums of a matrix product, whose order follows the block",
    },
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


def from_config(config: AggregationConfig, adapter: Tensors) -> Aggregator:
    """What an experiment asks for: pre-steps and aggregator; a rule that goes by `layers` gets the adapter's tensors,
    as they stand in a flattened delta, unless the operator names his own."""
    params: dict[str, Any] = dict(config.params)
    if config.name in AGGREGATORS and "layers" in inspect.signature(AGGREGATORS[config.name]).parameters:
        params.setdefault("layers", tuple(adapter[name].size for name in sorted(adapter)))
    made = make(config.name, **params)
    for name in config.pre_params:
        if name not in config.pre:
            known = ", ".join(config.pre) or "none"
            raise ConfigError(f"aggregation.pre_params: {name!r} is not one of the pre-steps; known: {known}")
    if not config.pre:
        return made
    return chain(*(build(name, PRE_STEPS[name], config.pre_params.get(name, {})) for name in config.pre), made)


def _guarded(name: str, function: Callable[..., Any], params: Mapping[str, Any]) -> Aggregator:
    def aggregate(delta_ND: Matrix, weight_N: ArrayLike, /) -> NDArray[np.float32]:
        checked_N = checked(delta_ND, weight_N)
        present_N = checked_N > 0
        if not present_N.any():
            return np.zeros(delta_ND.shape[1], np.float32)
        if isinstance(delta_ND, Deltas):  # a foreign rule knows matrices only: its memory is the round's
            delta_ND, checked_N = delta_ND.matrix(np.flatnonzero(present_N)), checked_N[present_N]
        elif not present_N.all():
            delta_ND, checked_N = delta_ND[present_N], checked_N[present_N]
        out_D = np.asarray(function(delta_ND, checked_N, **params))
        if out_D.shape != delta_ND.shape[1:] or not np.isfinite(out_D).all():
            raise ValueError(f"aggregator {name} must return {delta_ND.shape[1]} finite values; got {out_D.shape}")
        return out_D.astype(np.float32)

    return aggregate
