"""Safe-FedLLM's levels as screens: step, client and shadow with their holes closed, and Assay's form of evidence.

What a client claims of itself (steps, shadow) is bound first (claims.py): missing is `claim_missing`, anything that
does not fit `claim_inconsistent`, both weight 0. The published behaviour, holes and all, is in published.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from assay.contribution import LoraUpdate, Round
from assay.federated import levels
from assay.federated.claims import Ordered, chain_problem, last_step_matches
from assay.federated.probe import Probe
from assay.federated.say import say
from assay.trust import Audited, Beta, RunningMean
from assay.verdict import Reason, State, Verdict

OrderedOf = Callable[[int], Ordered]
"""What was ordered of a branch in a round (1-based)."""


def step_claim_problem(update: LoraUpdate, round: Round, ordered: Ordered) -> tuple[Reason, str] | None:
    """Why the claimed chain of local steps cannot be believed; None if nothing speaks against it."""
    if not update.steps:
        return Reason.CLAIM_MISSING, "no step updates came with the adapter"
    if not last_step_matches(update):
        return Reason.CLAIM_INCONSISTENT, "the last claimed step is not the submitted adapter"
    why = chain_problem(update.steps, round.start, ordered)
    return (Reason.CLAIM_INCONSISTENT, why) if why else None


def shadow_claim_problem(update: LoraUpdate, round: Round, ordered: Ordered) -> tuple[Reason, str] | None:
    """The same for the shadow branch, which starts at the initial adapter; nothing ties its end to the submission."""
    if not update.shadow:
        return Reason.CLAIM_MISSING, "no shadow steps came with the adapter"
    why = chain_problem(update.shadow, round.initial, ordered)
    return (Reason.CLAIM_INCONSISTENT, f"shadow: {why}") if why else None


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")


@dataclass(frozen=True, slots=True)
class StepLevel:
    """Safe-FedLLM Step-Level: every local step is scored; Beta trust is the weight.

    Steps are the client's claims, bound where they can be: the last must equal the submission, the chain must be what
    `ordered` training can do. `score_rounds`: after that round the last weight is kept (paper: 20; None = always score).
    """

    probe: Probe
    ordered: OrderedOf
    threshold: float = 0.8
    score_rounds: int | None = None
    name: str = "step"

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        new, out = dict(state), []
        for update in round.updates:
            trust = Beta.from_json(state[update.participant]) if update.participant in state else Beta()
            problem = step_claim_problem(update, round, self.ordered(round.index))
            if problem:
                out.append(say(update, self.name, 0.0, *problem))
                continue
            if self.score_rounds is not None and round.index > self.score_rounds:
                weight, score = trust.weight, np.nan
                bad = -1
            else:
                score_K = self.probe.score_adapters(update.steps, round.start)
                bad, score = int((score_K >= self.threshold).sum()), float(score_K.max())
                trust, weight = levels.step_level(trust, bad, len(update.steps), round.batch_size)
                new[update.participant] = trust.to_json()
            sentence = f"{bad} of {len(update.steps)} steps judged malicious; trust {weight:.2f}"
            out.append(say(update, self.name, weight, Reason.LOW_TRUST, sentence, score,
                           malicious_steps=bad, score_below=self.threshold))  # fmt: skip
        return out, new


@dataclass(frozen=True, slots=True)
class ClientLevel:
    """Safe-FedLLM Client-Level: the submitted update is scored; the weight is a running mean of 1 - t."""

    probe: Probe
    threshold: float = 0.8
    score_rounds: int | None = None
    name: str = "client"

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        new, out = dict(state), []
        for update in round.updates:  # one by one, as in screens.ProbeFilter
            score = float(self.probe.score_adapters([update.tensors], round.start)[0])
            trust = RunningMean.from_json(state[update.participant]) if update.participant in state else RunningMean()
            weight = trust.value
            if self.score_rounds is None or round.index <= self.score_rounds:
                trust, weight = levels.client_level(trust, score, self.threshold)
                new[update.participant] = trust.to_json()
            sentence = f"probe score {score:.2f}; trust {weight:.2f}"
            out.append(say(update, self.name, weight, Reason.LOW_TRUST, sentence, score, score_below=self.threshold))
        return out, new


@dataclass(frozen=True, slots=True)
class ShadowLevel:
    """Safe-FedLLM Shadow-Level: a branch that restarts from the initial adapter each round is scored; w = (1-r)^7.

    Nothing binds a shadow branch to the submission: a client can send a clean one beside a poisoned adapter.
    """

    probe: Probe
    ordered: OrderedOf
    threshold: float = 0.8
    name: str = "shadow"

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        out = []
        for update in round.updates:
            ordered = self.ordered(round.index)
            problem = shadow_claim_problem(update, round, ordered)
            if problem:
                out.append(say(update, self.name, 0.0, *problem))
                continue
            score_K = self.probe.score_adapters(update.shadow, round.initial)
            bad = int((score_K >= self.threshold).sum())
            weight = levels.shadow_level(bad, ordered.steps)
            sentence = f"{bad} of {ordered.steps} shadow steps judged malicious"
            out.append(say(update, self.name, weight, Reason.LOW_TRUST, sentence, float(score_K.max()),
                           score_below=self.threshold))  # fmt: skip
        return out, state


@dataclass(frozen=True, slots=True)
class EvidenceLevel:
    """Assay's Evidence-Level: shadow scores and the submission's own score, random audits, no permanent verdict.

    Evidence is sent and bound in every round, so that nobody learns from being asked that he is audited. The share of
    malicious shadow steps gives (1-r)^7; a submission that the probe judges malicious is bad whatever its shadow says
    (the one part of the evidence that cannot be forged). `agree` clean audits make a client trusted, after which only
    `audit` of its rounds are looked at, drawn from `secret` (paper, published code: 3 and every 5th round, which a
    client can count). A bad audit gives 0 at once and bars the client until `readmit` clean rounds in a row. So with
    `audit` = 0.5 a sleeper gets 1 bad round in before it is caught on average, and pays `readmit` rounds for it; 1
    catches it in its first. Rounds with bad or missing claims are bad audits.
    """

    probe: Probe
    ordered: OrderedOf
    secret: str
    audit: float = 0.5
    agree: int = 3
    readmit: int = 3
    threshold: float = 0.8
    name: str = "evidence"

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)
        if not (0 < self.audit <= 1 and self.agree >= 1 and self.readmit >= 1):
            raise ValueError(
                f"audit must be in (0, 1], agree and readmit at least 1, got {self.audit}, {self.agree}, {self.readmit}"
            )

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        new, out = dict(state), []
        for update in round.updates:
            trust = Audited.from_json(state[update.participant]) if update.participant in state else Audited()
            verdict, trust = self._judge(update, round, trust)
            new[update.participant] = trust.to_json()
            out.append(verdict)
        return out, new

    def _judge(self, update: LoraUpdate, round: Round, trust: Audited) -> tuple[Verdict, Audited]:
        ordered = self.ordered(round.index)
        problem = shadow_claim_problem(update, round, ordered)
        if problem:
            trust, weight = levels.evidence_level(trust, 0.0, False, audited=True)
            return say(update, self.name, weight, *problem), trust
        rules = {"agree": self.agree, "readmit": self.readmit}
        if trust.trusted(self.agree) and not levels.audited(self.secret, update.participant, round.index, self.audit):
            trust, weight = levels.evidence_level(trust, 0.0, True, audited=False, **rules)
            sentence = f"not audited this round; trust {weight:.2f}"
            return say(update, self.name, weight, Reason.LOW_TRUST, sentence, audited=0), trust
        shadow_K = self.probe.score_adapters(update.shadow, round.initial)
        own = float(self.probe.score_adapters([update.tensors], round.start)[0])
        bad = int((shadow_K >= self.threshold).sum())
        shadow_weight = levels.shadow_level(bad, ordered.steps)
        clean = own < self.threshold and float(shadow_K[-1]) < self.threshold
        trust, weight = levels.evidence_level(trust, shadow_weight, clean, audited=True, **rules)
        told = f"{bad} of {ordered.steps} shadow steps judged malicious, submission scored {own:.2f}"
        sentence = f"{told}; barred, {trust.clean} of {self.readmit} clean rounds" if trust.barred else told
        score = max(own, float(shadow_K.max()))
        made = say(update, self.name, weight, Reason.LOW_TRUST, sentence, score,
                   audited=1, malicious_steps=bad, score_below=self.threshold)  # fmt: skip
        return made, trust
