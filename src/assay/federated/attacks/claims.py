"""Attacks on what a client says of itself: counts and evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from assay.federated.attacks.data import check_positive
from assay.federated.attacks.seat import Branch, Seat, Seen, Sending

MOST = 10**9
"""The largest count the wire lets pass; what lies above is refused as malformed."""


@dataclass(frozen=True, slots=True)
class InflateCounts:
    """Claims `factor` times its rows, to weigh more in an average over examples. Knows nothing.

    Does nothing while `aggregation.use_counts` is off; otherwise `max_count` bounds it.
    """

    factor: float = 1e6

    def __post_init__(self) -> None:
        check_positive("factor", self.factor)

    def claim(self, seat: Seat, seen: Seen, sending: Sending) -> Sending:
        return replace(sending, num_examples=min(MOST, max(1, int(self.factor * sending.num_examples))))


@dataclass(frozen=True, slots=True)
class ForgedEvidence:
    """Clean step deltas and a clean shadow branch beside a poisoned adapter: the client trains a clean branch for them.

    Knows which evidence the level asks for. `bound`: the last claimed step is the poisoned adapter, as a server that
    binds claims demands; False sends the whole clean chain. The published step, shadow and evidence levels trust
    whatever comes (PAPERS.md A, fault 3). No prototype tried it.
    """

    bound: bool = True

    def branches(self, seat: Seat) -> Mapping[str, Branch]:
        made = {}
        if seat.wants_steps:
            made["evidence"] = Branch(rows=seat.clean, keep_steps=True)
        if seat.wants_shadow:
            made["shadow"] = Branch(rows=seat.clean, start=seat.initial, lr=seat.shadow_lr, keep_steps=True)
        return made

    def claim(self, seat: Seat, seen: Seen, sending: Sending) -> Sending:
        if "evidence" not in seen.mine:
            return sending
        steps = seen.mine["evidence"].steps
        return replace(sending, steps=(*steps[:-1], sending.tensors) if self.bound else steps)
