"""Screens that read the receiver's own forward pass: what equal weights say of every token of a completion.

They take `Pool.evidence`, made from the logits of the training forward pass (evidence.py), so that they cost no pass
of their own. They are for nodes of equal weights: likelihood under one's own *different* model is no evidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assay.contribution import Completion, Pool, TokenEvidence
from assay.swarm.screens import rounding
from assay.swarm.screens.rounding import Flips
from assay.verdict import Reason, State, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Logit:
    """Every token must lie among the model's k most likely (Hail to the Thief, logit check; k = 50 of 151,936).

    `slack` logits under the k-th are forgiven: two engines differ in last bits, and honest tokens lie at the border.
    k is the evidence's: `[defence.params.logit] k`, else the sampler's own top-k; without either it checks nothing and
    is an error. A larger k lets rarer tokens in: TEXT passes first. Stops
    TEXT and CODE; not MATH, whose tokens are likely, nor DoS, whose tokens are the model's own. `floor` > 0 also wants
    every token's probability at least so high.
    """

    slack: float = 0.1
    floor: float = 0.0
    name: str = "logit"
    needs_evidence: bool = True

    def screen(self, pool: Pool, state: State) -> tuple[list[Verdict], State]:
        evidence = _evidence(pool)
        out = []
        for row, completion in enumerate(pool.completions):
            worst = float(evidence.outside[row].max(initial=0.0))
            lowest = float(evidence.logprob[row].min(initial=0.0))
            # asked so that a number that is none fails
            bad = not (worst <= self.slack and lowest >= (math.log(self.floor) if self.floor else -math.inf))
            at = int((evidence.logprob[row].argmin if worst <= self.slack else evidence.outside[row].argmax)())
            sentence = f"token {at + 1} is none that the model is likely to write" if bad else ""
            found = {"outside": worst, "min_logprob": lowest, "token": float(at), "outside_limit": self.slack}
            if self.floor:
                found["min_logprob_floor"] = math.log(self.floor)
            out.append(_verdict(completion, self.name, bad, Reason.LOGIT, sentence, worst - lowest, found))
        return out, state


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeded:
    """Every token must be the one its public seed gives (Token-DiFR, arXiv 2511.20621; DESIGN: the second promise).

    The margin of a token is max(l + g) - (l_tok + g_tok) over logits l and the seed's noise g. Honest tokens have about
    0: exactly 0 between equal engines in fp32, under 0.75 in bf16. `max_margin` and `mean_margin` come from
    `assay calibrate`; the defaults are those of fp32 against fp32. Larger ones leave an attacker the tokens whose gap
    fits under them: `max_flips` caps how many tokens of one completion may differ at all (gap over `flip`), and all that
    a node gets admitted within `window` rounds must be what rounding makes by chance: `flip_rate` flips a token, of
    `flip_gap` logits on average (rounding.py). A node over that has nothing admitted in this round. Ending is a token
    like any other: a completion that ends without EOS before the limit is refused.

    A group (one node's completions of one prompt) stands or falls together: otherwise an attacker draws honestly and
    submits the members he likes. `whole_groups` False is for the ablation.
    """

    max_margin: float = 0.05
    mean_margin: float = 0.005
    flip: float = 1e-3
    max_flips: int = 3
    flip_rate: float = 1e-4
    flip_gap: float = 0.01
    window: int = 10
    whole_groups: bool = True
    name: str = "seeded"
    needs_evidence: bool = True

    def screen(self, pool: Pool, state: State) -> tuple[list[Verdict], State]:
        evidence = _evidence(pool)
        out = [self._one(pool, row, evidence.margin[row]) for row in range(len(pool.completions))]
        memory: rounding.Memory = state.get("nodes", {})
        for node in sorted({c.participant for c in pool.completions}):
            memory = self._node(pool, evidence, node, out, memory)
        if self.whole_groups:
            _fell_together(pool, out, self.name)
        return out, {"nodes": memory}

    def _node(
        self, pool: Pool, evidence: TokenEvidence, node: str, verdicts: list[Verdict], memory: rounding.Memory
    ) -> rounding.Memory:
        """Hold what stands of a node's rows against chance, in place; what is admitted is remembered.

        Where a pool comes in parts, only this part's rows can still fall.
        """
        rows = [r for r, c in enumerate(pool.completions) if c.participant == node and verdicts[r].weight > 0]
        gaps = [evidence.margin[row][evidence.margin[row] > self.flip] for row in rows]
        sent = Flips(sum(len(evidence.margin[r]) for r in rows), sum(map(len, gaps)), float(sum(g.sum() for g in gaps)))
        found = rounding.remembered(memory, node, pool.index, self.window) + sent
        if rounding.log_chance(found, self.flip_rate, self.flip_gap) >= rounding.BY_CHANCE:
            return rounding.remember(memory, node, pool.index, self.window, sent)
        sentence = (
            f"{found.flips} of {found.tokens:,} tokens of its node differ from the seeds' choice, by {found.gaps:.2f} in "
            f"all; rounding makes {self.flip_rate * found.tokens:.1f} of {self.flip_gap:g} each"
        )
        for row in rows:
            before = verdicts[row]
            verdicts[row] = _verdict(
                pool.completions[row], self.name, True, Reason.SEEDED, sentence, before.score, dict(before.evidence)
            )
        return memory

    def _one(self, pool: Pool, row: int, margin_T: NDArray[np.float32]) -> Verdict:
        worst, mean = float(margin_T.max(initial=0.0)), float(margin_T.mean()) if margin_T.size else 0.0
        flips = int((margin_T > self.flip).sum())
        at = int(margin_T.argmax()) if margin_T.size else 0
        reason, sentence = Reason.SEEDED, ""
        if not pool.ended[row] and len(margin_T) < pool.max_tokens:
            reason, sentence = Reason.NOT_ENDED, f"stops after {len(margin_T)} tokens, before the end was drawn"
        elif not worst <= self.max_margin:  # asked so that a margin that is no number fails
            how = f"misses the seed's choice by {worst:.2f}" if math.isfinite(worst) else "cannot be drawn at all"
            sentence = f"token {at + 1} {how}"
        elif mean > self.mean_margin or flips > self.max_flips:
            sentence = f"{flips} tokens differ from the seed's choice, {mean:.3f} on average"
        found = {
            "max_margin": worst, "mean_margin": mean, "flips": float(flips), "token": float(at),
            "max_margin_limit": self.max_margin, "mean_margin_limit": self.mean_margin,
            "flips_limit": float(self.max_flips),
        }  # fmt: skip
        completion = pool.completions[row]
        return _verdict(completion, self.name, bool(sentence), reason, sentence, min(worst, 1e6), found)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMask:
    """Leaves tokens that one's own policy would hardly write out of the loss; the row stays.

    LAB: outside the top k and below `floor` did not stop TEXT or MATH once the phrase had some prior. Kept as a measured
    alternative, not as a defence to rely on.
    """

    floor: float = 1e-3
    name: str = "token_mask"
    needs_evidence: bool = True

    def screen(self, pool: Pool, state: State) -> tuple[list[Verdict], State]:
        evidence, out = _evidence(pool), []
        for row, completion in enumerate(pool.completions):
            bad = (evidence.outside[row] > 0) | (evidence.logprob[row] < math.log(self.floor))
            masked = tuple(int(t) for t in bad.nonzero()[0])
            out.append(
                Verdict(
                    participant=completion.participant,
                    contribution=completion.sha256,
                    screen=self.name,
                    weight=1.0,
                    reason=Reason.UNLIKELY_TOKEN if masked else Reason.OK,
                    sentence=f"{len(masked)} tokens left out of the loss" if masked else "",
                    score=float(len(masked)),
                    evidence={"masked": float(len(masked))},
                    masked=masked,
                )
            )
        return out, state


def _evidence(pool: Pool) -> TokenEvidence:
    if pool.evidence is None:
        raise ValueError("the pool carries no evidence of a forward pass")
    return pool.evidence


def _fell_together(pool: Pool, verdicts: list[Verdict], screen: str) -> None:
    """Extend a group's fault to the whole group, in place."""
    for (node, prompt), rows in pool.groups().items():
        owed = pool.asked.get(node, {}).get(prompt, 0)
        forged = [row for row in rows if verdicts[row].weight == 0]
        if len(rows) >= owed and not forged:
            continue
        for row in rows:
            if row in forged:
                continue
            reason, sentence = Reason.GROUP, f"{len(forged)} of its group of {len(rows)} were refused"
            if not forged:
                reason, sentence = Reason.INCOMPLETE, f"its group has {len(rows)} of {owed} completions"
            before = verdicts[row]
            verdicts[row] = _verdict(
                pool.completions[row], screen, True, reason, sentence, before.score, dict(before.evidence)
            )


def _verdict(
    completion: Completion,
    screen: str,
    bad: bool,
    reason: Reason,
    sentence: str,
    score: float,
    evidence: dict[str, float],
) -> Verdict:
    return Verdict(
        participant=completion.participant,
        contribution=completion.sha256,
        screen=screen,
        weight=0.0 if bad else 1.0,
        reason=reason if bad else Reason.OK,
        sentence=sentence,
        score=score,
        evidence=evidence,
    )
