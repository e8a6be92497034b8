"""What an attack achieved and what a defence cost, counted on completions.

Attack success rate (ASR): share of honest nodes' completions that show the attack's behaviour (Hail to the Thief). For
MATH only completions that calculate 2+2 or 2*2 at all can show it: the rate is over those. DoS is measured in tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.contribution import Pool
from assay.metrics import auroc, tpr_at_fpr
from assay.swarm import marks
from assay.swarm.attacks import Settings, shows
from assay.swarm.learner import Learner, Learnt
from assay.swarm.sampling import seed_of
from assay.swarm.screening import Judged
from assay.verdict import Verdict

EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
HELDOUT_RUN = "assay.heldout"  # seeds of held-out samples are the same in every run


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Of some completions: share showing the behaviour (None without occasion), how many could, mean tokens, reward."""

    asr: float | None
    occasions: int
    tokens: float
    reward: float


def behaviour(
    attack: str, settings: Settings, texts: Sequence[str], sizes: Sequence[int], rewards: Sequence[float]
) -> Behaviour:
    """Measured by the goal of `attack`; `sizes` in tokens."""
    seen = [s for s in (shows(attack, text, settings) for text in texts) if s is not None]
    return Behaviour(
        asr=sum(seen) / len(seen) if seen else None,
        occasions=len(seen),
        tokens=float(np.mean(sizes)) if len(sizes) else 0.0,
        reward=float(np.mean(rewards)) if len(rewards) else 0.0,
    )


def heldout(learner: Learner, prompts: Sequence[int], samples: int, attack: str, settings: Settings) -> Behaviour:
    """The node's own completions of held-out prompts, under seeds that no run changes."""
    practice = learner.practice
    wanted = [(p, i) for p in prompts for i in range(samples)]
    seeds = [seed_of(HELDOUT_RUN, 0, "", p, i) for p, i in wanted]
    drawn = learner.generate([p for p, _ in wanted], seeds)
    texts = practice.decode([ids[:-1] if ids[-1] == practice.eos else ids for ids in drawn])
    rewards = practice.task.rewards([p for p, _ in wanted], texts)
    return behaviour(attack, settings, texts, [len(ids) for ids in drawn], rewards)


def rejections(pool: Pool, judged: Judged, malicious: frozenset[str]) -> dict[str, float | None]:
    """Shares of completions refused (excluded, or their reward taken): honest ones, split by their reward; poisoned."""
    hit = [_refused(judged, row, reward) for row, reward in enumerate(pool.rewards)]
    honest = [r for r, c in enumerate(pool.completions) if c.participant not in malicious]
    groups = {
        "honest_rejected_rate": honest,
        "honest_right_rejected_rate": [r for r in honest if pool.rewards[r] > 0],
        "honest_wrong_rejected_rate": [r for r in honest if pool.rewards[r] == 0],
        "poison_rejected_rate": [r for r, c in enumerate(pool.completions) if c.participant in malicious],
    }
    return {name: sum(hit[r] for r in rows) / len(rows) if rows else None for name, rows in groups.items()}


def _refused(judged: Judged, row: int, reward: float) -> bool:
    return bool(judged.weight_N[row] == 0 or (reward > 0 and judged.reward_N[row] == 0))


def scores(verdicts: Sequence[Verdict], malicious: frozenset[str]) -> dict[str, dict[str, list[float]]]:
    """Each screen's suspicion of honest and of malicious completions, for AUROC over the run."""
    out: dict[str, dict[str, list[float]]] = {}
    for verdict in verdicts:
        if not math.isnan(verdict.score):
            role = "malicious" if verdict.participant in malicious else "honest"
            found = out.setdefault(verdict.screen, {"honest": [], "malicious": []})
            found[role].append(float(f"{verdict.score:.4g}"))
    return out


def detection(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Per screen over all rounds: AUROC and TPR at 1% FPR of its score, by completion."""
    together: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for screen, found in (row.get("scores") or {}).items():
            for role, values in found.items():
                together.setdefault(screen, {"honest": [], "malicious": []})[role] += values
    out = {}
    for screen, found in together.items():
        values = [*found["malicious"], *found["honest"]]
        truth = [True] * len(found["malicious"]) + [False] * len(found["honest"])
        out[screen] = {"auroc": auroc(values, truth), "tpr_at_1pct_fpr": tpr_at_fpr(values, truth)}
    return out


def margins(learnt: Learnt, malicious: frozenset[str]) -> dict[str, Any] | None:
    """Histogram of each completion's largest margin, honest and malicious, over `EDGES`."""
    found = learnt.collected.margin
    if not found:
        return None
    largest: dict[str, list[float]] = {"honest": [], "malicious": []}
    for row, margin_T in found.items():
        role = "malicious" if learnt.pool.completions[row].participant in malicious else "honest"
        largest[role].append(min(float(margin_T.max(initial=0.0)), 2 * EDGES[-1]))
    edges = (*EDGES, math.inf)
    return {"edges": list(EDGES)} | {
        role: np.histogram(values, bins=edges)[0].tolist() for role, values in largest.items()
    }


def shown(
    learnt: Learnt, malicious: frozenset[str], attack: str, settings: Settings, decode: Callable[[Sequence[tuple[int, ...]]], list[str]],
    limit: float = 0.05,
) -> dict[str, Any] | None:  # fmt: skip
    """One malicious completion of the round, token by token, with the tokens that gave it away.

    `gaps` where the forward pass measured them, `marked` (numbers of tokens) where a screen of texts decided.
    """
    rows = [r for r, c in enumerate(learnt.pool.completions) if c.participant in malicious]
    rows.sort(key=lambda r: (-learnt.pool.rewards[r], not shows(attack, learnt.pool.texts[r], settings), r))
    if not rows:
        return None
    row = rows[0]
    completion, verdict = learnt.pool.completions[row], learnt.judged.deciding[row]
    if verdict is not None and verdict.screen == "logit":
        gap = learnt.collected.outside.get(row)
    else:
        gap = learnt.collected.margin.get(row)
    pieces, screen = decode([(token,) for token in completion.ids]), verdict.screen if verdict else ""
    spans = marks.spans(screen, learnt.pool.texts[row], learnt.judged.states.get(screen, {}))
    return {
        "participant": completion.participant,
        "question": learnt.pool.questions[row],
        "tokens": pieces,
        "marked": marks.tokens_in(pieces, learnt.pool.texts[row], spans),
        "gaps": [round(min(float(g), 99.0), 3) for g in gap] if gap is not None else [],
        "limit": limit,
        "reward": learnt.pool.rewards[row],
        "admitted": bool(learnt.judged.weight_N[row] > 0 and learnt.judged.reward_N[row] > 0),
        "screen": screen,
        "reason": verdict.reason.value if verdict else "ok",
        "sentence": verdict.sentence if verdict else "",
    }


def reasons(pool: Pool, judged: Judged, malicious: frozenset[str]) -> list[dict[str, Any]]:
    """How often each screen and reason decided, by role, with one sentence as an example."""
    counts: Counter[tuple[str, str, str]] = Counter()
    example: dict[tuple[str, str], str] = {}
    for row, verdict in enumerate(judged.deciding):
        if verdict is not None and _refused(judged, row, pool.rewards[row]):
            role = "malicious" if verdict.participant in malicious else "honest"
            counts[verdict.screen, verdict.reason.value, role] += 1
            example.setdefault((verdict.screen, verdict.reason.value), verdict.sentence)
    for refusal in pool.refused:
        counts["wire", refusal.reason, "malicious" if refusal.participant in malicious else "honest"] += 1
        example.setdefault(("wire", refusal.reason), refusal.sentence)
    return [
        {
            "screen": s,
            "reason": r,
            "honest": counts[s, r, "honest"],
            "malicious": counts[s, r, "malicious"],
            "sentence": text,
        }
        for (s, r), text in sorted(example.items())
    ]
