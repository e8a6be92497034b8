"""What becomes of every row: the pool screened with the trainer's own model, in the order Assay's own learner has it.

Legend: N rows of the pool, B rows of the trainer's batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from assay.config import ConfigError
from assay.contribution import Pool, TokenEvidence
from assay.engines.trl.batch import Ids, Terms
from assay.swarm import screening
from assay.swarm.defence import BOUNDARY
from assay.swarm.evidence import Collected, Wanted, collect
from assay.swarm.grpo import token_logprobs
from assay.swarm.learner import Memory
from assay.swarm.rollout import score
from assay.swarm.sampling import seed_of
from assay.swarm.screening import Judged, TrustRules
from assay.swarm.screens.arithmetic import Arithmetic
from assay.swarm.screens.schema import Schema
from assay.trust import Strikes
from assay.verdict import AnyScreen

Screens = Sequence[AnyScreen[Pool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The receiver's screens: those that read texts and ids, those that read `evidence` of its own forward pass.

    `k`: of the logit check. `boundary`: logits forgiven at the edge of the top k (`assay calibrate`).
    """

    reading: tuple[AnyScreen[Pool], ...]
    model_screens: tuple[AnyScreen[Pool], ...]
    monitor: frozenset[str]
    trust: TrustRules
    k: int | None
    boundary: float = BOUNDARY

    @property
    def names(self) -> list[str]:
        return [screen.name for screen in (*self.model_screens, *self.reading)]

    @property
    def read_rewards(self) -> bool:
        """Whether a screen may ask for rewards, which TRL works out only after it has the rows."""
        return any(not isinstance(screen, Schema | Arithmetic) for screen in self.reading)


def rules_of(screens: Screens, monitor: frozenset[str], trust: TrustRules, k: int | None, boundary: float) -> Rules:
    """Sort the screens; ConfigError for a name that comes twice, a stray monitor, a schema (Assay adds its own)."""
    names = [screen.name for screen in screens]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"screens: {twice[0]} is named twice")
    if "schema" in names:
        raise ConfigError("screens: leave schema out, it is always there")
    if stray := sorted(monitor - set(names)):
        raise ConfigError(f"monitor: no screen {stray[0]!r}; there are {', '.join(names) or 'none'}")
    model_screens = tuple(s for s in screens if getattr(s, "needs_evidence", False))
    reading = tuple(s for s in screens if s not in model_screens)
    return Rules(reading=reading, model_screens=model_screens, monitor=monitor, trust=trust, k=k, boundary=boundary)


def wanted_of(rules: Rules, terms: Terms) -> Wanted:
    """What the screens ask of the logits; ConfigError where the logit check would check nothing."""
    k = terms.sampler.top_k if rules.k is None else rules.k
    names = {screen.name for screen in rules.model_screens}
    if "logit" in names and not 0 < k < terms.vocabulary:
        raise ConfigError(
            f"the logit check needs a k between 1 and {terms.vocabulary - 1}, and top_k = {k} cuts nothing off: "
            "ScreenedRollouts(..., k=50)"
        )
    return Wanted(sampler=terms.sampler, k=k, seeded="seeded" in names, boundary=rules.boundary)


@torch.no_grad()
def look(
    model: Any, pool: Pool, prompts: Mapping[int, Ids], run: str, rows: Sequence[int], wanted: Wanted, micro_rows: int
) -> TokenEvidence:
    """Teacher-force rows of the pool, prompt by prompt, and keep a few numbers per token. The model is in eval mode."""
    collected = Collected()
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(pool.completions[row].prompt, []).append(row)
    for prompt, group in groups.items():
        chosen = [pool.completions[row] for row in group]
        seeds = [seed_of(run, c.round, c.participant, c.prompt, c.index) for c in chosen]
        given = [prompts[prompt]] * len(group)
        for scored in score(model, given, [c.ids for c in chosen], micro_rows=micro_rows):
            logprob_NT = token_logprobs(scored.logits_NTV, scored.token_NT, wanted.sampler.temperature)
            here = tuple(group[at] for at in scored.rows)
            collect(collected, replace(scored, rows=here), [seeds[at] for at in scored.rows], logprob_NT, wanted)
    return collected.evidence(rows)


def judge(
    pool: Pool,
    rules: Rules,
    memory: Memory,
    terms: Terms,
    evidence: Callable[[Sequence[int]], TokenEvidence],
    rewards: Callable[[Sequence[int]], Sequence[float]],
) -> tuple[Judged, Memory]:
    """All verdicts on a pool, and what the node remembers after it. In the result `reward_N` is 1, or 0 for no_reward.

    Schema first; then the screens that need logits, on every row there is, a banned node's too (its audit); then those
    of texts, on rows that stand: they compare participants and remember rounds, and what is refused must move none of
    their statistics. What one's own seed gives is no copy: where the seeded check decides, copycat only watches.
    """
    schema = Schema(vocabulary=terms.vocabulary, eos=terms.eos)
    judged = screening.judge_pool(pool, [schema], memory.screens)
    judged.reward_N[:] = [1.0 if known is None else known.effect != "no_reward" for known in judged.deciding]
    for row, completion in enumerate(pool.completions):
        if memory.trust.get(completion.participant, Strikes()).banned:
            screening.apply(judged, row, screening.banned(completion))
    if rules.model_screens:
        rows = [r for r, c in enumerate(pool.completions) if schema_passed(judged, r)]
        screening.judge_rows(judged, pool, rows, rules.model_screens, rules.monitor, evidence(rows))
    standing = [row for row, weight in enumerate(judged.weight_N) if weight > 0]
    values = dict(zip(standing, rewards(standing)))
    pool = replace(pool, rewards=tuple(values.get(row, 0.0) for row in range(len(pool.completions))))
    seeded = {screen.name for screen in rules.model_screens} & {"seeded"} - rules.monitor
    watching = rules.monitor | ({"copycat"} if seeded else frozenset())
    screening.judge_rows(judged, pool, standing, rules.reading, watching)
    trust = screening.update_trust(memory.trust, pool, judged.verdicts, rules.trust)
    return judged, Memory(trust=trust, screens=judged.states)


def schema_passed(judged: Judged, row: int) -> bool:
    """Whether the schema, whose verdicts come first, lets anybody read a row."""
    verdict = judged.verdicts[row]
    return verdict.weight > 0 or verdict.effect == "no_reward"
