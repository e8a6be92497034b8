"""Attackers who act together, or hide behind an honest client."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assay.federated.attacks.data import check_positive, check_share
from assay.federated.attacks.seat import Delta, Seat, Seen, delta_of
from assay.federated.attacks.updates import gaussian


def near_copy(delta_D: NDArray[np.floating], noise: float, rng: np.random.Generator) -> Delta:
    """The update plus noise `noise` times as long; the cosine to the original is about 1 / sqrt(1 + noise^2)."""
    return np.asarray(delta_D + gaussian(delta_D, noise, rng), np.float32)


@dataclass(frozen=True, slots=True)
class Sybil:
    """One attacker under many names: all send near copies of the leader's update, each with noise of its own.

    Knows that exact copies are counted once. Two noisy copies have cosine 1 / (1 + noise^2): .05 gives .9975, below the
    .9995 at which `duplicate` speaks. `leader` False: noise on each one's own update instead, for attacks whose colluders
    would all send the same (`alie+sybil`); with True it stands first in a chain.
    """

    noise: float = 0.05
    leader: bool = True

    def __post_init__(self) -> None:
        check_positive("noise", self.noise)

    def change(self, seat: Seat, delta_D: Delta, seen: Seen) -> Delta:
        base_D = delta_of(seat, seen.colluders[0]["main"]) if self.leader else delta_D
        return base_D if seat.place == 0 else near_copy(base_D, self.noise, seat.rng("sybil"))


@dataclass(frozen=True, slots=True)
class CopyBenign:
    """Copies an honest update of the round and blends the poison in: (1 - poison) x copy + poison x own.

    Knows the honest updates (each colluder copies another one while there are enough). Sends its own where nobody is
    honest.
    """

    poison: float = 0.5

    omniscient = True

    def __post_init__(self) -> None:
        check_share("poison", self.poison)

    def change(self, seat: Seat, delta_D: Delta, seen: Seen) -> Delta:
        if not len(seen.honest_ND):
            return delta_D
        copied_D = seen.honest_ND[(seat.round + seat.place) % len(seen.honest_ND)]
        return np.asarray((1 - self.poison) * copied_D + self.poison * delta_D, np.float32)
