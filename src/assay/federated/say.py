"""How a screen of this wing says a verdict on an update."""

from __future__ import annotations

import math

from assay.contribution import LoraUpdate
from assay.verdict import AnyReason, Reason, Verdict


def say(
    update: LoraUpdate, screen: str, weight: float, reason: AnyReason, sentence: str = "", score: float = math.nan,
    **evidence: float,
) -> Verdict:  # fmt: skip
    """A verdict tied to the update's bytes; at weight 1 reason and sentence go, the evidence stays."""
    fine = weight == 1.0
    return Verdict(
        participant=update.participant,
        contribution=update.sha256,
        screen=screen,
        weight=weight,
        reason=Reason.OK if fine else reason,
        sentence="" if fine else sentence,
        score=float(score),
        evidence={k: float(v) for k, v in evidence.items()},
    )
