"""How a weight takes hold of a strategy that knows nothing of weights. Read in the sources of Flower 1.41 and 1.42.

`counts`: the aggregate is a function of the mean weighted by num-examples (FedAvg, FedProx, FedAvgM, FedAdagrad,
FedAdam, FedYogi), so a reply's weight is multiplied into its num-examples. Exact.
`own`: the strategy ignores num-examples or uses it only after choosing (FedMedian, FedTrimmedAvg, Krum, MultiKrum). As
long as all replies present weigh the same the strategy itself runs, whose rule is then right; in a round where they do
not, Assay's weighted rule of the same name stands in, whose weight 0 is absence and whose equal weights are the
strategy's rule. Where that rule cannot bear `f` attackers among so few, the round is drawn.
`draw`: nothing is known of the strategy (a foreign one, a subclass that aggregates itself), or no weighted rule is like
it (q-FedAvg, Flower's variant of Bulyan, the differential privacy wrappers, whose noise is calibrated on equal shares).
A reply of weight w takes part with probability w, drawn by the server from a secret seed. That holds for *any*
strategy, because it never sees anything but genuine replies that all count the same: weight 0 is exactly absence, equal
weights are exactly the strategy, and over the rounds a client takes part in the share w of them. Shrinking the update
to w times its length would promise less: a strategy that normalises, signs or ranks updates undoes it.

In all three only the proportions of weights matter, as in Assay's aggregators: they are divided by the largest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedXgbBagging,
    FedXgbCyclic,
    FedYogi,
    MultiKrum,
    QFedAvg,
    Strategy,
)

from assay.config import ConfigError
from assay.federated import aggregators
from assay.federated.aggregators import Aggregator

How = Literal["counts", "own", "draw"]
HELPERS = ("_check_and_log_replies", "_compute_deltat_and_mt")
"""What the stock strategies aggregate with besides `aggregate_train`; who replaces one of these is a foreign strategy."""
DP = (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
NORM_BIT = "norm_bit"
"""The metric by which Flower's adaptive clipping learns whether a client clipped."""


@dataclass(frozen=True, slots=True)
class Acting:
    """`own` makes Assay's rule for the number of replies present; `needs` are metrics the strategy acts upon."""

    how: How
    why: str
    own: Callable[[int], Aggregator] | None = None
    needs: Mapping[str, tuple[float, float] | None] = field(default_factory=dict)
    """Each with the range that a claim of it may have; None: only the operator can know it."""


def acting_of(strategy: Strategy) -> Acting:
    """How weights take hold of this strategy. ConfigError for those that cannot be screened at all."""
    if isinstance(strategy, FedXgbBagging | FedXgbCyclic):
        raise ConfigError(
            f"{type(strategy).__name__} collects trees, whose size is each client's own; Assay screens arrays of the "
            "shape that was sent"
        )
    if type(strategy).start is not Strategy.start:
        raise ConfigError(
            f"{type(strategy).__name__} has a start() of its own, which need not call aggregate_train; Assay could not "
            "promise that it aggregates what was screened"
        )
    name = type(strategy).__name__
    for stock in (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi):
        if _aggregates_as(strategy, stock):
            return Acting("counts", f"{name} averages by num-examples")
    if _aggregates_as(strategy, FedMedian):
        return Acting("own", f"{name} ignores num-examples", lambda n: aggregators.make("median"))
    if isinstance(strategy, FedTrimmedAvg) and _aggregates_as(strategy, FedTrimmedAvg):
        cut = strategy.beta
        return Acting("own", f"{name} ignores num-examples", lambda n: aggregators.make("trimmed_mean", f=int(cut * n)))
    if isinstance(strategy, MultiKrum) and _aggregates_as(strategy, MultiKrum):
        f, m = strategy.num_malicious_nodes, strategy.num_nodes_to_select
        return Acting("own", f"{name} chooses by distance", lambda n: aggregators.make("krum", f=f, m=m))
    if _aggregates_as(strategy, Bulyan):
        return Acting(
            "draw", f"{name} chooses all rows at once, not one after the other as Bulyan's paper and Assay do"
        )
    if isinstance(strategy, QFedAvg):
        return Acting("draw", f"{name} weighs by the loss a client claims", needs={strategy.train_loss_key: None})
    if isinstance(strategy, DP):
        acting_of(strategy.strategy)  # what cannot be screened cannot be screened inside either
        adaptive = isinstance(strategy, DifferentialPrivacyClientSideAdaptiveClipping)
        needs = {NORM_BIT: (0.0, 1.0)} if adaptive else {}
        return Acting("draw", f"{name} calibrates its noise on equal shares", needs=needs)
    return Acting("draw", f"nothing is known of how {name} aggregates")


def _aggregates_as(strategy: Strategy, stock: type[Strategy]) -> bool:
    """Whether `strategy` aggregates by the very functions of `stock`."""
    return all(
        name not in vars(strategy) and getattr(type(strategy), name, None) is getattr(stock, name, None)
        for name in ("aggregate_train", *HELPERS)
    )


def relative(weight: Mapping[int, float]) -> dict[int, float]:
    """Weights above 0, divided by the largest."""
    most = max(weight.values(), default=0.0)
    return {node: w / most for node, w in weight.items() if w > 0}


def drawn(weight: Mapping[int, float], seed: int, round: int) -> dict[int, bool]:
    """Who takes part: each node with the probability of its relative weight, by a hash of secret, round and node.

    >>> drawn({1: 1.0, 2: 0.5, 3: 0.0}, seed=7, round=1)
    {1: True, 2: False}
    >>> sum(drawn({1: 1.0, 2: 0.25}, seed=7, round=r)[2] for r in range(1000))
    223
    """
    return {node: _uniform(seed, round, node) < w for node, w in relative(weight).items()}


def _uniform(*key: int) -> float:
    digest = hashlib.sha256(f"assay.flower.draw/{key}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def describe(acting: Acting) -> str:
    """One line for `summary()`."""
    said: dict[How, str] = {
        "counts": "weights act as num-examples",
        "own": "weights act by Assay's rule of the same name in rounds where they differ, else the strategy runs itself",
        "draw": "weights act by drawing: a reply of weight w takes part with probability w",
    }
    return f"{said[acting.how]} ({acting.why})"


def inner_attribute(strategy: Any, name: str, default: str) -> str:
    """An attribute of the strategy or, where it wraps another one, of that."""
    seen = 0
    while strategy is not None and seen < 8:
        value = getattr(strategy, name, None)
        if isinstance(value, str):
            return value
        strategy, seen = getattr(strategy, "strategy", None), seen + 1
    return default
