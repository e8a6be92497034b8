"""An aggregator, an attack and a screen of one's own. Legend: N updates, D values of a flattened adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assay.contribution import Round
from assay.federated.attacks.seat import Seat, Seen
from assay.verdict import OwnReason, Reason, State, Verdict

Matrix = NDArray[np.float32]
AGAINST = OwnReason("assay-example-plugin:against")  # package:name; never one of Assay's own


def majority(share: float = 0.5) -> Callable[[Matrix, Matrix], Matrix]:
    """The weighted mean, but 0 in each coordinate whose sign no more than `share` of the weight agrees on.

    An entry point is a factory: Assay calls it with `aggregation.params` and wraps what it returns, so that rows of weight 0
    never get here and a result that is not D finite numbers is an error.
    """

    def aggregate(delta_ND: Matrix, weight_N: Matrix) -> Matrix:
        share_N = np.asarray(weight_N, np.float64) / np.sum(weight_N)
        positive_D, negative_D = share_N @ (delta_ND > 0), share_N @ (delta_ND < 0)
        agreed_D = np.maximum(positive_D, negative_D) > share
        return np.where(agreed_D, share_N @ delta_ND, 0.0).astype(np.float32)

    return aggregate


@dataclass(frozen=True, slots=True)
class LateFlip:
    """Honest before `after` rounds have passed, then the negative of its honest update. Knows nothing."""

    after: int = 1

    honest_rows = True  # trained on clean rows

    def active(self, round: int) -> bool:
        return round > self.after

    def change(self, seat: Seat, delta_D: Matrix, seen: Seen) -> Matrix:
        return -delta_D


@dataclass(frozen=True, slots=True)
class Against:
    """Refuses an update that points against the sum of the others. Weak: a majority decides who is against whom."""

    limit: float = 0.0
    name: str = "against"

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        delta_ND = round.deltas()
        others_ND = delta_ND.sum(axis=0) - delta_ND
        verdicts = []
        for update, own_D, others_D in zip(round.updates, delta_ND, others_ND, strict=True):
            length = float(np.linalg.norm(own_D) * np.linalg.norm(others_D))
            cosine = float(own_D @ others_D) / length if length > 0 else 0.0
            against = cosine < self.limit
            verdicts.append(
                Verdict(
                    participant=update.participant,
                    contribution=update.sha256,
                    screen=self.name,
                    weight=0.0 if against else 1.0,
                    reason=AGAINST if against else Reason.OK,
                    sentence=f"cosine with the sum of the others is {cosine:.2f}" if against else "",
                    score=-cosine,
                    evidence={"cosine": cosine, "cosine_floor": self.limit},  # the report says "cosine at least"
                )
            )
        return verdicts, state
