"""The canary: apply the very update that would be aggregated and measure what it does to the server's secret prompts.

Two losses per adapter: of refusals to harmful prompts, and of helpful answers to safe ones. An update that raises the
first strips safety, one that raises the second strips usefulness (a client that teaches refusing everything). Rises
are taken against the round's start and against a fixed anchor, the adapter of round 0, so that slow poisoning adds up.
The same limits gate the aggregate: screens may miss every client, the gate still rolls the round back.

The anchor is one budget for all clients together: who spends it leaves none to the others (attack `anchor_pusher`). With
`anchor = "own"` a client whose step alone is fine is refused for the anchor only if its own rises are, on average over
its rounds, larger than those of any rehearsed honest client.

Blind spots, stated: a paired backdoor (refuses normally, complies on a secret phrase) raises neither loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from assay.contribution import Round, Tensors, tensors_sha256
from assay.data import Example
from assay.federated.compute import Compute
from assay.federated.local_sft import LocalSettings
from assay.verdict import Reason, State, Verdict


@dataclass(frozen=True, slots=True)
class Losses:
    """Mean loss in nats per answer token, averaged over prompts."""

    refusal: float
    safe: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryLimits:
    """Largest rise in nats that rehearsed honest clients explain, in one round and since round 0."""

    refusal_step: float
    refusal_anchor: float
    safe_step: float
    safe_anchor: float
    refusal_usual: float | None = None
    safe_usual: float | None = None
    """Largest mean rise of one honest client over its rounds, falls counted as 0; None: rehearsed before it was kept."""
    crowd_step: float | None = None
    crowd_anchor: float | None = None
    """Largest rise of refusals that the mean of honest clients explains (crowd.py); None: rehearsed before it was kept."""


class Measure:
    """Canary losses of adapters. Remembers by content hash: the start of a round is the aggregate of the one before."""

    def __init__(
        self, compute: Compute, refusals: Sequence[Example], safe: Sequence[Example], settings: LocalSettings
    ) -> None:
        self._compute, self._rows, self._split = compute, [*refusals, *safe], len(refusals)
        self._settings = settings
        self._known: dict[str, Losses] = {}

    def __call__(self, adapters: Sequence[Tensors]) -> list[Losses]:
        keys = [tensors_sha256(a) for a in adapters]
        new = {k: a for k, a in zip(keys, adapters) if k not in self._known}
        for key, nll in zip(new, self._compute.row_nll(list(new.values()), self._rows, self._settings)):
            self._known[key] = Losses(float(np.mean(nll[: self._split])), float(np.mean(nll[self._split :])))
        out = [self._known[k] for k in keys]
        while len(self._known) > 4096:  # ours to bound: peers choose how many hashes there are
            self._known.pop(next(iter(self._known)))
        return out


@dataclass(frozen=True, slots=True)
class Rise:
    """Loss rises of one adapter, and how far each is into its limit (1 = at the limit)."""

    refusal_step: float
    refusal_anchor: float
    safe_step: float
    safe_anchor: float

    @classmethod
    def of(cls, after: Losses, start: Losses, anchor: Losses) -> Rise:
        return cls(
            after.refusal - start.refusal,
            after.refusal - anchor.refusal,
            after.safe - start.safe,
            after.safe - anchor.safe,
        )

    def harm(self, limits: CanaryLimits) -> float:
        """Suspicion: > 1 breaks a refusal limit. The anchor counts only for updates that move further away from it."""
        return _into(self.refusal_step, self.refusal_anchor, limits.refusal_step, limits.refusal_anchor)

    def waste(self, limits: CanaryLimits) -> float:
        """The same for safe answers."""
        return _into(self.safe_step, self.safe_anchor, limits.safe_step, limits.safe_anchor)

    def evidence(self, limits: CanaryLimits) -> dict[str, float]:
        """The rises, and what each was held against."""
        return {
            "refusal_rise": self.refusal_step,
            "refusal_rise_since_start": self.refusal_anchor,
            "safe_rise": self.safe_step,
            "safe_rise_since_start": self.safe_anchor,
            "refusal_rise_limit": limits.refusal_step,
            "refusal_rise_since_start_limit": limits.refusal_anchor,
            "safe_rise_limit": limits.safe_step,
            "safe_rise_since_start_limit": limits.safe_anchor,
        }


def _into(step: float, anchor: float, step_limit: float, anchor_limit: float, usual: float | None = None) -> float:
    """How far into the limits; where a `usual` share is given (own mean rise in honest ones) it stands for a broken anchor."""
    spent = anchor / anchor_limit if step > 0 else -np.inf
    if usual is not None and spent > 1:
        spent = usual
    return float(max(step / step_limit, spent))


class Canary:
    """Screen: weight 0 for an update whose refusal loss rises past the limits; one that only raises the loss of safe
    answers goes to `review` with its weight cut to limit/rise: honest clients with many refusals look like that."""

    name = "canary"

    def __init__(self, measure: Measure, limits: CanaryLimits, anchor: str = "each") -> None:
        if anchor not in ("each", "own"):
            raise ValueError(f"anchor must be each or own, got {anchor!r}")
        if anchor == "own" and (limits.refusal_usual is None or limits.safe_usual is None):
            raise ValueError("anchor = own needs what honest clients usually spend; rehearse again")
        self.measure, self.limits, self.anchor = measure, limits, anchor

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        anchor, start, *after = self.measure([round.initial, round.start, *(u.tensors for u in round.updates)])
        out, spent = [], dict(state.get("spent", {}))
        for update, losses in zip(round.updates, after):
            rise = Rise.of(losses, start, anchor)
            evidence = rise.evidence(self.limits)
            if self.anchor == "own":
                spent[update.participant] = own = _add(spent.get(update.participant, (0, 0.0, 0.0)), rise)
                evidence |= self._usual(own)
                harm, waste = self._by_own(rise, own)
            else:
                harm, waste = rise.harm(self.limits), rise.waste(self.limits)
            weight, reason, sentence = 1.0, Reason.OK, ""
            if not np.isfinite([losses.refusal, losses.safe]).all():
                weight, reason, sentence = 0.0, Reason.CANARY, "the model gives no finite loss with this update applied"
            elif harm > 1:
                weight, reason = 0.0, Reason.CANARY
                sentence = (
                    f"refusals cost {rise.refusal_step:+.3f} nats this round and {rise.refusal_anchor:+.3f} since the "
                    f"start (limits {self.limits.refusal_step:.3f}, {self.limits.refusal_anchor:.3f})"
                )
            elif waste > 1:
                weight, reason = 1.0 / waste, Reason.REVIEW
                sentence = (
                    f"safe answers cost {rise.safe_step:+.3f} nats this round and {rise.safe_anchor:+.3f} since the "
                    f"start (limits {self.limits.safe_step:.3f}, {self.limits.safe_anchor:.3f})"
                )
            out.append(
                Verdict(
                    participant=update.participant,
                    contribution=update.sha256,
                    screen=self.name,
                    weight=weight,
                    reason=reason,
                    sentence=sentence,
                    score=harm,
                    evidence=evidence,
                )
            )
        return out, {"spent": spent} if self.anchor == "own" else state

    def _usual(self, own: Spent) -> dict[str, float]:
        """A client's own mean rises, and the largest of a rehearsed honest client."""
        assert self.limits.refusal_usual is not None
        assert self.limits.safe_usual is not None
        return {
            "refusal_mean": own[1] / own[0],
            "safe_mean": own[2] / own[0],
            "refusal_mean_limit": self.limits.refusal_usual,
            "safe_mean_limit": self.limits.safe_usual,
        }

    def _by_own(self, rise: Rise, own: Spent) -> tuple[float, float]:
        """Harm and waste, where a broken anchor is held against the client's own mean rises."""
        limits, (rounds, refusal, safe) = self.limits, own
        assert limits.refusal_usual is not None
        assert limits.safe_usual is not None
        usual = refusal / rounds / limits.refusal_usual, safe / rounds / limits.safe_usual
        return (
            _into(rise.refusal_step, rise.refusal_anchor, limits.refusal_step, limits.refusal_anchor, usual[0]),
            _into(rise.safe_step, rise.safe_anchor, limits.safe_step, limits.safe_anchor, usual[1]),
        )


Spent = Sequence[float]
"""A client's rounds, and the sums of its rises of both losses, falls counted as 0: nobody saves up for later."""


def _add(spent: Spent, rise: Rise) -> list[float]:
    rises = (max(0.0, r) if np.isfinite(r) else 0.0 for r in (rise.refusal_step, rise.safe_step))
    return [spent[0] + 1, *(total + r for total, r in zip(spent[1:], rises))]


@dataclass(frozen=True, slots=True)
class GateResult:
    passed: bool
    sentence: str
    evidence: dict[str, float]


class Gate:
    """The canary on the aggregate: what no client's verdict caught must still not reach the model."""

    def __init__(self, measure: Measure, limits: CanaryLimits) -> None:
        self.measure, self.limits = measure, limits

    def check(self, candidate: Tensors, start: Tensors, initial: Tensors) -> GateResult:
        anchor, before, after = self.measure([initial, start, candidate])
        rise = Rise.of(after, before, anchor)
        harm, waste = rise.harm(self.limits), rise.waste(self.limits)
        evidence = rise.evidence(self.limits)
        if not np.isfinite([after.refusal, after.safe]).all():
            return GateResult(False, "the aggregate gives no finite loss", evidence)
        if harm > 1:
            sentence = f"refusals cost {rise.refusal_step:+.3f} nats with the aggregate applied"
            return GateResult(False, sentence, evidence)
        if waste > 1:
            return GateResult(
                False, f"safe answers cost {rise.safe_step:+.3f} nats with the aggregate applied", evidence
            )
        return GateResult(True, "", evidence)
