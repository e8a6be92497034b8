"""Screen `crowd`: what the admitted updates do together, held to what honest clients do together.

The canary's limits are for single updates, and single honest updates scatter: attackers who stay just under them
(`anchor_pusher`, `blend`) spend in every round what an honest client needs once. The mean of honest updates scatters much
less, so its own rehearsed limits are tight. Where the mean of what the screens before this one admitted breaks them,
updates are left out, the costliest first, until it does not; never one that alone keeps to the limits of the crowd.
Costs one measurement of the canary a round, and log2 N more where the limits are broken. Stands behind `canary`.
Legend: N admitted updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from assay.contribution import LoraUpdate, Round, Tensors
from assay.federated.canary import CanaryLimits, Measure, Rise
from assay.federated.say import say
from assay.verdict import Reason, State, Verdict


class Crowd:
    """See the module. ValueError for limits that were rehearsed before the crowd's were kept."""

    name = "crowd"
    among_admitted = True

    def __init__(self, measure: Measure, limits: CanaryLimits) -> None:
        if limits.crowd_step is None or limits.crowd_anchor is None:
            raise ValueError("the rehearsal at hand did not keep what honest clients cost together; rehearse again")
        self.measure = measure
        self.step, self.anchor = limits.crowd_step, limits.crowd_anchor

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        if not round.updates:
            return [], state
        anchor, start, *after = self.measure([round.initial, round.start, *(u.tensors for u in round.updates)])
        harm_N = [self.harm(Rise.of(losses, start, anchor)) for losses in after]
        # by the hash where two cost the same: neither a name nor who came first may decide
        order = sorted(range(len(harm_N)), key=lambda i: (-harm_N[i], round.updates[i].sha256))
        offenders = [i for i in order if not harm_N[i] <= 1]

        def together(left_out: int) -> Rise:
            kept = [u for i, u in enumerate(round.updates) if i not in offenders[:left_out]]
            [losses] = self.measure([mean(kept) if kept else round.start])
            return Rise.of(losses, start, anchor)

        found = together(0)
        count = 0 if self.harm(found) <= 1 else self._fewest(len(offenders), lambda k: self.harm(together(k)) <= 1)
        sentence = (
            f"together the round's updates cost refusals {found.refusal_step:+.3f} nats, {found.refusal_anchor:+.3f} since "
            f"the start (limits {self.step:.3f}, {self.anchor:.3f}); this is one of the {count} that cost most"
        )
        evidence = {
            "crowd_rise": found.refusal_step, "crowd_rise_limit": self.step,
            "crowd_rise_since_start": found.refusal_anchor, "crowd_rise_since_start_limit": self.anchor,
        }  # fmt: skip
        out = []
        for i, update in enumerate(round.updates):
            weight = float(i not in offenders[:count])
            out.append(say(update, self.name, weight, Reason.CANARY, sentence, harm_N[i], **evidence))
        return out, state

    def harm(self, rise: Rise) -> float:
        """How far into the crowd's limits; the anchor counts only for what moves further away from it. A loss that is not
        finite is past every limit."""
        if not np.isfinite([rise.refusal_step, rise.refusal_anchor]).all():
            return float("inf")
        spent = rise.refusal_anchor / self.anchor if rise.refusal_step > 0 else -np.inf
        return float(max(rise.refusal_step / self.step, spent))

    @staticmethod
    def _fewest(most: int, holds: Callable[[int], bool]) -> int:
        """The fewest of the costliest to leave out, by bisection; all of them where even that does not do."""
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        return high


def mean(updates: Sequence[LoraUpdate]) -> dict[str, NDArray[np.float32]]:
    """The plain mean of adapters, one tensor at a time."""
    first: Tensors = updates[0].tensors
    out = {}
    for name in first:
        total = np.zeros(np.shape(first[name]))
        for update in updates:
            total += update.tensors[name]
        out[name] = (total / len(updates)).astype(np.float32)
    return out
