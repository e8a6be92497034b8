"""What a receiver makes of all verdicts on a pool: which rows it learns from, with which reward, on which tokens.

Weights multiply; the first zero names the reason. A zero excludes the row or takes its reward (`Verdict.effect`);
exclusion is the stronger. Trust across rounds turns forged contributions into strikes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from assay.contribution import Completion, Pool, TokenEvidence
from assay.trust import Strikes
from assay.verdict import AnyScreen, Mode, Reason, State, Verdict, run_screen

# faults that no honest node of equal weights commits by chance; what counts for a strike
FORGED = frozenset({Reason.SEEDED, Reason.NOT_ENDED, Reason.INCOMPLETE, Reason.LOGIT, Reason.WRONG_PROMPT,
                    Reason.WRONG_ROUND, Reason.DUPLICATE, Reason.OUT_OF_RANGE, Reason.TOO_LARGE, Reason.MALFORMED})  # fmt: skip

# What a slow line, weights that have come apart or a lying relay do to an honest node: as if nothing had come.
LATE = frozenset({Reason.MISSING.value, Reason.WRONG_ROUND.value, Reason.WRONG_BASE.value, Reason.WRONG_POOL.value})
HONEST_REFUSED = 1e-3
"""Share of honest completions that may be refused by mistake: what `assay calibrate` sets thresholds for."""


@dataclass(slots=True)
class Judged:
    """Outcome for the rows of a pool. `weight_N` 0 = absent; `reward_N` after no_reward; `masked` token positions."""

    weight_N: NDArray[np.float64]
    reward_N: NDArray[np.float64]
    masked: list[frozenset[int]]
    deciding: list[Verdict | None]
    verdicts: list[Verdict]
    states: dict[str, State]

    @classmethod
    def unjudged(cls, pool: Pool, states: Mapping[str, State]) -> Judged:
        count = len(pool.completions)
        return cls(np.ones(count), np.array(pool.rewards, float), [frozenset()] * count, [None] * count, [], {**states})


def judge_pool(
    pool: Pool,
    screens: Sequence[AnyScreen[Pool]],
    states: Mapping[str, State],
    monitor: frozenset[str] = frozenset(),
    before: Judged | None = None,
) -> Judged:
    """Run `screens` over the pool; `before` holds what earlier screens said of the same rows."""
    judged = before or Judged.unjudged(pool, states)
    for screen in screens:
        found, judged.states[screen.name] = run_screen(
            screen, pool, pool.completions, judged.states.get(screen.name, {})
        )
        mode: Mode = "monitor" if screen.name in monitor else "enforce"
        for row, verdict in enumerate(found):
            apply(judged, row, replace(verdict, mode=mode))
    return judged


def judge_rows(
    judged: Judged,
    pool: Pool,
    rows: Sequence[int],
    screens: Sequence[AnyScreen[Pool]],
    monitor: frozenset[str] = frozenset(),
    evidence: TokenEvidence | None = None,
) -> None:
    """Let screens that see only these rows of the pool judge them; their memory is handed on in `judged.states`."""
    part = replace(
        pool,
        completions=tuple(pool.completions[r] for r in rows),
        questions=tuple(pool.questions[r] for r in rows),
        texts=tuple(pool.texts[r] for r in rows),
        rewards=tuple(pool.rewards[r] for r in rows),
        ended=tuple(pool.ended[r] for r in rows),
        readable=tuple(pool.readable[r] for r in rows),
        evidence=evidence,
    )
    seen = judge_pool(part, screens, judged.states, monitor)
    judged.states |= seen.states
    for at, verdict in enumerate(seen.verdicts):  # screen by screen, each in the order of the rows
        apply(judged, rows[at % len(rows)], verdict)


def apply(judged: Judged, row: int, verdict: Verdict) -> None:
    """Let one verdict act on its row."""
    judged.verdicts.append(verdict)
    if verdict.mode == "monitor":
        return
    judged.masked[row] |= frozenset(verdict.masked)
    known = judged.deciding[row]
    if verdict.weight == 0 and verdict.effect == "no_reward":
        judged.reward_N[row] = 0.0
        if known is None:
            judged.deciding[row] = verdict
        return
    # exclusion outranks a lost reward; among graded weights the lowest names the reason
    if verdict.weight < 1 and judged.weight_N[row] > 0 and (
        known is None or known.effect == "no_reward" or verdict.weight < known.weight
    ):  # fmt: skip
        judged.deciding[row] = verdict
    judged.weight_N[row] *= verdict.weight


def banned(completion: Completion) -> Verdict:
    """The verdict on a banned node's completion: it is looked at, not learnt from."""
    return Verdict(
        participant=completion.participant,
        contribution=completion.sha256,
        screen="trust",
        weight=0.0,
        reason=Reason.BANNED,
        sentence="its node was struck out; this round counts as an audit",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustRules:
    """When forged contributions cost a node its place; see trust.Strikes."""

    ban_after: int
    window: int
    share: float
    readmit_after: int


def forged_share(pool: Pool, verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of each node's owed completions that were forged, or held back by a node that sent others.

    Whoever sends some groups and not others chooses what is learnt from. A node that sends nothing at all is silent,
    which is no crime, and so is one whose message came late, from other weights, or not provably from it; else one refused at
    the wire counts as 1.
    """
    forged = {
        (v.participant, v.contribution)
        for v in verdicts
        if v.weight == 0 and v.mode == "enforce" and v.reason in FORGED
    }
    bad = Counter(node for node, _ in forged)
    sent = Counter(c.participant for c in pool.completions)
    out = {}
    for node in sent:
        owed = sum(pool.asked.get(node, {}).values())
        out[node] = min(1.0, (bad[node] + max(0, owed - sent[node])) / max(1, owed))
    return out | {r.participant: 1.0 for r in pool.refused if r.proven and r.reason not in LATE}


def lost_groups(pool: Pool, verdicts: Sequence[Verdict]) -> dict[str, tuple[int, int]]:
    """Groups in which a node forged some member, and groups it owed, by node."""
    place = {(c.participant, c.sha256): (c.participant, c.prompt) for c in pool.completions}
    lost = {
        place[v.participant, v.contribution]
        for v in verdicts
        if v.weight == 0 and v.mode == "enforce" and v.reason in FORGED
    }
    per_node = Counter(node for node, _ in lost)
    return {node: (per_node[node], len(asked)) for node, asked in pool.asked.items()}


def honest_loss(pool: Pool) -> float:
    """Chance that an honest group is lost: any of its completions refused by mistake."""
    most = max((count for asked in pool.asked.values() for count in asked.values()), default=1)
    return float(1 - (1 - HONEST_REFUSED) ** most)


def update_trust(
    trust: Mapping[str, Strikes], pool: Pool, verdicts: Sequence[Verdict], rules: TrustRules
) -> dict[str, Strikes]:
    """Trust after this round, keyed by node. Nodes that sent nothing keep what they had."""
    out, lost, chance = dict(trust), lost_groups(pool, verdicts), honest_loss(pool)
    for node, share in forged_share(pool, verdicts).items():
        out[node] = out.get(node, Strikes()).update(
            pool.index, forged=share > rules.share, ban_after=rules.ban_after, window=rules.window,
            readmit_after=rules.readmit_after, groups=lost.get(node, (0, 0)), chance=chance,
        )  # fmt: skip
    return out
