"""Where an update's length lies: the share of its squared norm that is in lora_A, over all and module by module.

Probe and neighbours read lora_B, the canary the product: poison in lora_A alone, or an adapter in other factors
(attacks `only_a`, `gauge`), passes all three. It shows in this share, which the optimiser sets: AdamW moves every
coordinate about equally far, so honest clients of any style have nearly the same one.
Legend: N updates, R rehearsed rounds, M modules, S = M + 1 shares: one a module, then that of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assay.contribution import Round, Tensors
from assay.federated.lora import is_a
from assay.federated.say import say
from assay.verdict import Reason, State, Verdict

WHOLE = "the whole"
FLOOR = 0.15
"""Least reach. On `tiny` honest clients lie within 0.11 of the middle, what a rehearsal of eight shows of them is at most
0.09, and both attacks lie 0.5 away. At the floor lora_A moves at most 1.14 x as far as among the honest."""


def modules(adapter: Tensors) -> list[str]:
    """Names of lora_A whose lora_B is there too, sorted: the modules."""
    return sorted(n for n in adapter if is_a(n) and n.replace("lora_A", "lora_B") in adapter)


def shares(adapter: Tensors, start: Tensors) -> NDArray[np.float64]:
    """share_S: |dA|^2 / (|dA|^2 + |dB|^2) of each module, then of all together; one half where nothing moved.

    >>> start = {"x.lora_A.weight": np.zeros((1, 2)), "x.lora_B.weight": np.zeros((2, 1))}
    >>> shares({"x.lora_A.weight": np.ones((1, 2)), "x.lora_B.weight": np.full((2, 1), 3.0)}, start)
    array([0.1, 0.1])
    """
    square_M2 = np.array([[_moved(adapter, start, n), _moved(adapter, start, n.replace("lora_A", "lora_B"))]
                          for n in modules(start)]).reshape(-1, 2)  # fmt: skip
    square_S2 = np.vstack([square_M2, square_M2.sum(axis=0)])
    whole_S = square_S2.sum(axis=1)
    share_S: NDArray[np.float64] = np.divide(
        square_S2[:, 0], whole_S, out=np.full(len(whole_S), 0.5), where=whole_S > 0
    )
    return share_S


def _moved(adapter: Tensors, start: Tensors, name: str) -> float:
    return float((np.subtract(adapter[name], start[name], dtype=np.float64) ** 2).sum())


@dataclass(frozen=True, slots=True)
class Spread:
    """Rehearsed shares: the middle of each round, and how far from it an honest client may lie.

    In round 1 lora_A cannot move before lora_B has, so the middle goes by the round (later ones: the last rehearsed);
    the reach is one over all rounds, for the few clients of one show little of how far they may lie.
    """

    middle_RS: NDArray[np.float32]
    reach_S: NDArray[np.float32]

    @classmethod
    def of(cls, share_RNS: NDArray[np.float64], margin: float) -> Spread:
        """Reach: (1 + margin) x the largest distance of an honest share from its round's median (max + margin x (max -
        median), on either side)."""
        middle_R1S = np.median(share_RNS, axis=1, keepdims=True)
        reach_S = (1 + margin) * np.abs(share_RNS - middle_R1S).max(axis=(0, 1))
        return cls(middle_R1S[:, 0].astype(np.float32), reach_S.astype(np.float32))

    def excess(self, share_S: NDArray[np.float64], round: int, floor: float = FLOOR) -> NDArray[np.float64]:
        """Distance of each share from the middle in reaches (none below `floor`): above 1 is outside."""
        middle_S = self.middle_RS[min(round, len(self.middle_RS)) - 1]
        return np.asarray(np.abs(share_S - middle_S) / np.maximum(self.reach_S, floor), np.float64)


@dataclass(frozen=True, slots=True)
class Balance:
    """Screen: weight 0 for an update whose share in lora_A, overall or in a module, is outside the rehearsed range.

    Bounds, with the norm, how far one client moves lora_A in a round; says nothing of where to: an attacker who keeps to
    honest shares passes. Where clients train with sgd the level's floor is 1, which refuses nobody: there gradients'
    sizes set the share, and rehearsed ones say little of live ones. On `tiny`, half malicious, `only_a` left the honest
    .47 of their weight without this screen and .97 with it, `only_a+match_norms` .74 (with `probe_a` as well: .90).
    """

    spread: Spread
    floor: float = FLOOR
    name: str = "balance"

    def __post_init__(self) -> None:
        if not self.floor > 0:
            raise ValueError(f"floor must be above 0, got {self.floor}")

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        names = [*modules(round.start), WHOLE]
        out = []
        for update in round.updates:
            share_S = shares(update.tensors, round.start)
            excess_S = self.spread.excess(share_S, round.index, self.floor)
            worst = int(np.argmax(excess_S))
            excess, where = float(excess_S[worst]), names[worst].split(".lora_A")[0]
            sentence = (
                f"{share_S[worst]:.0%} of its squared length in {where} is lora_A's, {excess:.2f} x as far from the "
                "usual as honest rehearsal clients explain"
            )
            out.append(say(update, self.name, float(excess <= 1), Reason.BALANCE, sentence, excess,
                           share=share_S[-1], worst=share_S[worst], excess=excess, excess_limit=1))  # fmt: skip
        return out, state
