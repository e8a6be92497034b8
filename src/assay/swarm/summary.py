"""What a swarm run writes of itself: a row and a ledger entry each round, and the summary at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from assay import run_dir
from assay.config import SwarmExperiment
from assay.swarm import evaluate
from assay.swarm.attacks import Settings
from assay.swarm.exchange import Gathered
from assay.swarm.learner import Learnt, Memory
from assay.swarm.screening import Judged

RATES = ("honest_rejected_rate", "honest_right_rejected_rate", "honest_wrong_rejected_rate", "poison_rejected_rate")


def round_row(
    round: int,
    attack: str,
    settings: Settings,
    learnt: Mapping[str, Learnt],
    malicious: frozenset[str],
    memory: Mapping[str, Memory],
    kind_of: Mapping[str, str],
) -> dict[str, Any]:
    """The metrics of one round. Behaviour is of honest completions as drawn before the update; rates are means over
    the kinds of learners, everything else is the first kind's. `kind_of` says which model each node holds."""
    one = next(iter(learnt.values()))
    pool = one.pool
    honest = [r for r, c in enumerate(pool.completions) if c.participant not in malicious]
    seen = evaluate.behaviour(
        attack, settings, [pool.texts[r] for r in honest], [len(pool.completions[r].ids) for r in honest],
        [pool.rewards[r] for r in honest],
    )  # fmt: skip
    return {
        "round": round,
        "asr": seen.asr,
        "occasions": seen.occasions,
        "completion_tokens_mean": seen.tokens,
        "train_reward": seen.reward,
        "loss": one.loss,
        "grad_norm": one.grad_norm,
        **_rates(learnt, malicious),
        "honest_rejected_by_model": _by_model(learnt, malicious, kind_of),
        "admitted": _admitted(one),
        "banned": sorted(n for n, s in next(iter(memory.values())).trust.items() if s.banned),
        "struck": sorted(n for n, s in next(iter(memory.values())).trust.items() if round in s.rounds),
        "reasons": evaluate.reasons(pool, one.judged, malicious),
        "margins": evaluate.margins(one, malicious),
        "scores": evaluate.scores(one.judged.verdicts, malicious),
    }


def _rates(learnt: Mapping[str, Learnt], malicious: frozenset[str]) -> dict[str, float | None]:
    found = [evaluate.rejections(one.pool, one.judged, malicious) for one in learnt.values()]
    return {name: _mean([f[name] for f in found]) for name in RATES}


def _by_model(
    learnt: Mapping[str, Learnt], malicious: frozenset[str], kind_of: Mapping[str, str]
) -> dict[str, float | None]:
    """Share of the honest completions of each model's nodes that nodes of other models refused, mean over those.

    What a differently trained peer loses. With one model in the swarm: what its nodes refuse of their own kind.
    """
    out = {}
    for kind in sorted(set(kind_of.values())):
        peers = {node for node, model in kind_of.items() if model == kind} - malicious
        others = frozenset(kind_of) - peers
        judges = [one for name, one in learnt.items() if name != kind] or list(learnt.values())
        found = [evaluate.rejections(one.pool, one.judged, others)["honest_rejected_rate"] for one in judges]
        out[kind] = _mean(found)
    return out


def _admitted(one: Learnt) -> dict[str, float]:
    """Share of what each node owed that was learnt from."""
    out = {}
    for node, asked in one.pool.asked.items():
        rows = [r for r, c in enumerate(one.pool.completions) if c.participant == node]
        out[node] = float(sum(one.judged.weight_N[r] > 0 for r in rows) / max(1, sum(asked.values())))
    return out


def ledger_body(
    gathered: Gathered, learnt: Mapping[str, Learnt], memory: Mapping[str, Memory], before: str, after: str
) -> dict[str, Any]:
    """Who sent which bytes, every verdict that was not a plain pass, the model before and after. No seconds: a resumed
    run must write the very same entry."""
    return pool_body(gathered) | {
        "model_before": before,
        "model_after": after,
        "learners": {kind: judged_body(one.judged, memory[kind]) for kind, one in learnt.items()},
    }


def pool_body(gathered: Gathered) -> dict[str, Any]:
    """Who sent which bytes in a round, and whose message was refused."""
    senders = sorted({c.participant for c in gathered.completions})
    return {
        "round": gathered.plan.round,
        "plan": {"mode": gathered.plan.mode, "assigned": gathered.plan.assigned},
        "pool": gathered.sha256,
        "contributions": [
            {"participant": n, "completions": [c.sha256 for c in gathered.completions if c.participant == n]}
            for n in senders
        ],
        "refused": [
            {"participant": r.participant, "sha256": r.sha256, "reason": r.reason, "sentence": r.sentence}
            for r in gathered.refused
        ],
    }


def judged_body(judged: Judged, memory: Memory) -> dict[str, Any]:
    """What one receiver made of a pool, and whom it trusts after that."""
    return {
        "admitted": float(judged.weight_N.sum()),
        "verdicts": [
            {k: v for k, v in verdict.as_dict().items() if k not in ("seconds", "score")} | {"effect": verdict.effect}
            for verdict in judged.verdicts
            if verdict.weight < 1
        ],
        "passed": dict(sorted(Counter(v.screen for v in judged.verdicts if v.weight == 1).items())),
        "trust": {n: s.to_json() for n, s in sorted(memory.trust.items())},
    }


def summarise(
    experiment: SwarmExperiment,
    rows: Sequence[Mapping[str, Any]],
    kind_of: Mapping[str, str],
    malicious: frozenset[str],
    model: Mapping[str, Any],
    command: str,
) -> dict[str, Any]:
    """Everything the report and a bench need; `metrics` is flat, with the names of DESIGN.md."""
    played = [row for row in rows if row["round"] > 0]
    last = rows[-1]["heldout"]
    seconds: dict[str, float] = {}
    for row in rows:
        for stage, value in row["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + value
    seconds["total"] = sum(seconds.values())
    known = [row.get("honest_rejected_by_model", {}) for row in played]  # none in rows of before it was counted
    by_model = {kind: _mean([found.get(kind) for found in known]) for kind in sorted({k for f in known for k in f})}
    metrics = {
        "asr": last["asr"],
        "completion_tokens_mean": last["tokens"],
        "heldout_reward": last["reward"],
        **{name: _mean([row[name] for row in played]) for name in RATES},
        "honest_rejected_worst_model": max((v for v in by_model.values() if v is not None), default=None),
        "asr_peak": max((row["asr"] for row in played if row["asr"] is not None), default=None),
        "heldout_reward_start": rows[0]["heldout"]["reward"],
        "completion_tokens_start": rows[0]["heldout"]["tokens"],
    }
    return {
        "name": experiment.name,
        "wing": "swarm",
        "assay": run_dir.versions()["assay"],
        "commit": run_dir.commit(),
        "versions": run_dir.versions(),
        "machine": run_dir.machine(),
        "seed": experiment.seed,
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": dict(model),
        "setting": _setting(experiment),
        "participants": {n: "malicious" if n in malicious else "honest" for n in sorted(kind_of)},
        "seconds": seconds,
        "metrics": metrics,
        "honest_rejected_by_model": by_model,
        "detection": evaluate.detection(played),
        "reasons": _reasons(played),
        "struck": {n: [r["round"] for r in played if n in r["struck"]] for n in sorted(kind_of)},
        "banned": {n: [r["round"] for r in played if n in r["banned"]] for n in sorted(kind_of)},
    }


def _reasons(played: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    out: dict[tuple[str, str], dict[str, Any]] = {}
    for row in played:
        for found in row["reasons"]:
            known = out.setdefault((found["screen"], found["reason"]), {**found, "honest": 0, "malicious": 0})
            known["honest"] += found["honest"]
            known["malicious"] += found["malicious"]
    return sorted(out.values(), key=lambda r: -(r["honest"] + r["malicious"]))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _setting(experiment: SwarmExperiment) -> dict[str, Any]:
    swarm = experiment.swarm
    return {
        "nodes": swarm.nodes,
        "malicious": swarm.malicious_count,
        "plan": swarm.plan,
        "assigned": swarm.assigned,
        "iterations": swarm.iterations,
        "prompts": swarm.prompts,
        "group": swarm.group,
        "task": experiment.task.name,
        "attack": experiment.attack.name,
        "level": experiment.defence.level,
        "learning_rate": experiment.grpo.lr,
        "loss": experiment.grpo.loss,
        "top_k": experiment.sampling.top_k,
    }
