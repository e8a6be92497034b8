"""Pre-steps: mix the rows before a rule sees them. They compose with any aggregator by `chain`.

Legend: as in common.py; M rows after mixing. A pre-step returns weights of mixing, not rows: blocks are mixed as they
are read, so that a chain needs no second matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from assay.config import ConfigError
from assay.federated.aggregators.common import Aggregator, Present, Remembering, Ruled, check_count, check_tolerance
from assay.federated.aggregators.geometry import (
    attackers,
    centred_gram,
    check_attackers,
    content_seed,
    nearest_share,
    square_distances,
)

PreStep = Callable[[Present], Present]


def nnm(f: int | str) -> PreStep:
    """Nearest-neighbour mixing (Allouah et al. 2023, algorithm 2): each row becomes the mean of the n-f rows nearest
    to it, itself among them. Needs n >= 2f + 1.

    Weighted: the mean of the nearest share (n-f)/n of the weight, the row at the border in part; a row keeps its own
    weight. Integer weights are repeated rows with f in proportion.
    """
    check_attackers("nnm", f)

    def mix(rows: Present) -> Present:
        borne = attackers(rows, f)
        check_tolerance("nnm", "2f+1", borne, 2 * borne + 1, rows.n)
        distance_NN = square_distances(centred_gram(rows))
        np.fill_diagonal(distance_NN, -1.0)  # a copy of him must not come before himself
        share = (rows.n - borne) / rows.n
        mix_NN = np.stack([nearest_share(distance_N, rows.weight_N, share) for distance_N in distance_NN])
        return rows.mixed(mix_NN / mix_NN.sum(axis=1, keepdims=True), rows.weight_N)

    return mix


def bucketing(s: int = 2, seed: int = 0) -> PreStep:
    """Bucketing (Karimireddy et al. 2022, algorithm 1): shuffled rows in buckets of `s` (paper: 2), a mean each.

    A bucket has the weight of its rows together, so that an incomplete last one counts for less. One attacker spoils
    a whole bucket: the rule behind it must bear f of n/s. The shuffle follows from `seed` and all updates of the
    round, so that nobody can choose his neighbours before he has seen the others' updates.
    """
    check_count("bucketing", "s", s, 1)
    check_count("bucketing", "seed", seed, 0)

    def mix(rows: Present) -> Present:
        order_N = content_seed(rows, seed).permutation(rows.n)
        mix_MN = np.zeros((-(-rows.n // s), rows.n))
        mix_MN[np.arange(rows.n) // s, order_N] = rows.weight_N[order_N]
        weight_M = mix_MN.sum(axis=1)
        return rows.mixed(mix_MN / weight_M[:, None], weight_M)

    return mix


PRE_STEPS: Mapping[str, Callable[..., PreStep]] = {"nnm": nnm, "bucketing": bucketing}


def chain(*steps: PreStep | Aggregator) -> Aggregator:
    """Pre-steps, in their order, before an aggregator, which comes last.

    ConfigError where the aggregator remembers participants (a mixed row is nobody's) or is a foreign function (it
    would need the mixed matrix: call it on one of your own).

    >>> from assay.federated.aggregators import median
    >>> chain(nnm(f=1), median())(np.array([[1], [2], [3], [1e6]], np.float32), [1, 1, 1, 1])
    array([2.], dtype=float32)
    """
    *before, last = steps
    if isinstance(last, Remembering):
        raise ConfigError(
            "a pre-step cannot come before an aggregator that remembers participants: mixed rows are nobody's"
        )
    if not isinstance(last, Ruled):
        raise ConfigError("pre-steps come before one of Assay's own aggregators, which must be the last of the chain")
    rule = last.rule

    def mixed(rows: Present) -> NDArray[np.float32]:
        for step in before:
            rows = step(rows)  # type: ignore[arg-type, assignment, call-arg]
        return rule(rows)

    return Ruled(mixed)
