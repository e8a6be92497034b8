"""summary.json: a finished run in one file, from its metrics rows, its ledger and the simulation's truth."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from assay import run_dir
from assay.config import Experiment
from assay.federated.defence import level_name, names
from assay.federated.evaluate import metric_names
from assay.federated.preparation import Prepared
from assay.metrics import auroc, tpr_at_fpr


def summarise(
    experiment: Experiment,
    directory: Path,
    rows: Sequence[Mapping[str, Any]],
    malicious: Mapping[str, bool],
    prepared: Prepared,
    command: str,
    kinds: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything the report and a bench need; `metrics` is flat, with the names of DESIGN.md.

    `malicious` is the simulation's truth; of who is not in it nothing is known, as of anybody outside a simulation.
    `kinds` says what sort of rows each honest client has, where they are not all iid.
    """
    kinds = kinds or {}
    rounds = list(_round_entries(directory))
    last = rows[-1]
    seconds: dict[str, float] = {}
    for row in rows:
        for stage, value in row["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + value
    seconds["total"] = sum(seconds.values())
    return {
        "name": experiment.name,
        "wing": "federated",
        "faithful": experiment.defence.faithful,
        "assay": run_dir.versions()["assay"],
        "commit": run_dir.commit(),
        "versions": run_dir.versions(),
        "machine": run_dir.machine(),
        "seed": experiment.seed,
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "name": prepared.name,
            "sha256": prepared.base_sha256,
            "dtype": prepared.dtype,
            "aligned": experiment.model.align,
            "alignment": prepared.alignment,
        },
        "setting": _setting(experiment),
        "participants": _roles(rows, malicious),
        **({"kinds": dict(kinds)} if kinds else {}),
        "seconds": seconds,
        "metrics": {
            **{name: last[name] for name in metric_names(experiment)},
            **weight_metrics(rows, malicious),
            **weight_by_kind(rows, kinds),
        },
        "detection": detection(rounds, malicious),
        "honest_weight_min": _honest_minimum(rows, malicious),
        "outcomes": dict(Counter(row["outcome"] for row in rows[1:])),
        "reasons": reasons(rounds, malicious),
        "answers": [{"prompt": p, "answer": a} for p, a in last["answers"]],
    }


def _roles(rows: Sequence[Mapping[str, Any]], malicious: Mapping[str, bool]) -> dict[str, str]:
    """Who is what, and everybody seen of whom that is not known."""
    seen = sorted({name for row in rows for name in row["weights"]} - set(malicious))
    known = {name: "malicious" if bad else "honest" for name, bad in malicious.items()}
    return known | dict.fromkeys(seen, "unknown")


def weight_metrics(rows: Sequence[Mapping[str, Any]], malicious: Mapping[str, bool]) -> dict[str, float | None]:
    """Detection by the final weight of every client in every round, and mean weights of both kinds."""
    pairs = [(w, malicious[name]) for row in rows for name, w in row["weights"].items() if name in malicious]
    suspicion, truth = [1 - w for w, _ in pairs], [bad for _, bad in pairs]
    honest = [w for w, bad in pairs if not bad]
    dishonest = [w for w, bad in pairs if bad]
    return {
        "auroc": auroc(suspicion, truth),
        "tpr_at_1pct_fpr": tpr_at_fpr(suspicion, truth),
        "honest_weight_mean": float(np.mean(honest)) if honest else None,
        "malicious_weight_mean": float(np.mean(dishonest)) if dishonest else None,
    }


def weight_by_kind(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> dict[str, float]:
    """Mean weight of the honest clients of each kind there is: honest_weight_iid, _skewed, _strangers."""
    names = {"iid": "honest_weight_iid", "skewed": "honest_weight_skewed", "stranger": "honest_weight_strangers"}
    kept: dict[str, list[float]] = {}
    for row in rows:
        for name, weight in row["weights"].items():
            if name in kinds:
                kept.setdefault(names[kinds[name]], []).append(weight)
    return {name: float(np.mean(kept[name])) for name in names.values() if name in kept}


def detection(rounds: Sequence[Mapping[str, Any]], malicious: Mapping[str, bool]) -> dict[str, dict[str, float | None]]:
    """AUROC and TPR at 1 % FPR of each screen's own continuous score, over all rounds."""
    scores: dict[str, list[tuple[float, bool]]] = {}
    for body in rounds:
        for verdict in body["verdicts"]:
            if verdict["score"] is not None and verdict["participant"] in malicious:
                scores.setdefault(verdict["screen"], []).append((verdict["score"], malicious[verdict["participant"]]))
    out = {}
    for screen, pairs in scores.items():
        values, truth = [s for s, _ in pairs], [bad for _, bad in pairs]
        out[screen] = {"auroc": auroc(values, truth), "tpr_at_1pct_fpr": tpr_at_fpr(values, truth)}
    return out


def reasons(rounds: Sequence[Mapping[str, Any]], malicious: Mapping[str, bool]) -> list[dict[str, Any]]:
    """Why contributions lost weight: screen, reason, how many of each kind, one sentence as an example."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for body in rounds:
        for entry in body["contributions"]:
            if entry["weight"] == 1:
                continue
            key = (entry["screen"], entry["reason"])
            row = found.setdefault(
                key, {"screen": key[0], "reason": key[1], "honest": 0, "malicious": 0, "sentence": entry["sentence"]}
            )
            bad = malicious.get(entry["participant"])
            role = "unknown" if bad is None else "malicious" if bad else "honest"
            row[role] = row.get(role, 0) + 1
    return sorted(found.values(), key=lambda r: -(r["honest"] + r["malicious"] + r.get("unknown", 0)))


def _honest_minimum(rows: Sequence[Mapping[str, Any]], malicious: Mapping[str, bool]) -> float | None:
    """The lowest mean weight any single honest client got over its rounds."""
    by_client: dict[str, list[float]] = {}
    for row in rows:
        for name, weight in row["weights"].items():
            if malicious.get(name) is False:
                by_client.setdefault(name, []).append(weight)
    return min((float(np.mean(w)) for w in by_client.values()), default=None)


def _setting(experiment: Experiment) -> dict[str, Any]:
    clients, training = experiment.clients, experiment.training
    return {
        "clients": clients.total,
        "malicious": clients.malicious_count,
        "sampled": clients.per_round,
        "partition": clients.partition if clients.partition == "iid" else f"dirichlet({clients.alpha:g})",
        "size_spread": clients.size_spread,
        "strangers": clients.stranger_count,
        "rounds": training.rounds,
        "steps": training.steps,
        "learning_rate": training.lr,
        "optimizer": training.optimizer,
        "prox_mu": training.prox_mu,
        "scaffold": training.scaffold,
        "level": level_name(experiment),
        "faithful": experiment.defence.faithful,
        **({} if experiment.defence.screens is None else {"screens": list(names(experiment))}),
        "aggregator": experiment.aggregation.name,
        "server": experiment.server.opt,
        "attack": experiment.attack.name,
        "mix": experiment.attack.mix,
        **({"attack_params": dict(experiment.attack.params)} if experiment.attack.params else {}),
        "data": f"{', '.join(experiment.data.benign)} / {', '.join(experiment.data.refusals)} / {experiment.data.malicious}",
    }


def _round_entries(directory: Path) -> Iterator[Mapping[str, Any]]:
    with (directory / run_dir.LEDGER).open() as lines:
        for line in lines:
            entry = json.loads(line)
            if entry["kind"] == "round":
                yield entry["body"]
