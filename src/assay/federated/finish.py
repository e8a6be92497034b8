"""Optional last steps after the final round, in the order of `finish.steps`, each measured before and after.

None of them replaces a screen: they act on what was learned, whoever taught it, and cost some of it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from assay import data, models
from assay.config import Experiment
from assay.contribution import Tensors, tensors_sha256
from assay.data import Example
from assay.federated import mitigations
from assay.federated.compute import Compute, TrainJob
from assay.federated.evaluate import Panel, Scores, evaluate
from assay.federated.population import Sources, seed_of
from assay.federated.preparation import Prepared, client_settings
from assay.federated.rehearsal import canary_rows, operator_rows
from assay.progress import Tracker

Step = Callable[[Tensors], tuple[Tensors, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Finished:
    """The adapter that ships and what each step did: metrics before and after, hashes, details."""

    adapter: Tensors
    records: tuple[dict[str, Any], ...] = ()
    scores: Scores | None = None

    def ledger(self) -> list[dict[str, Any]]:
        """What the closing ledger entry says of it."""
        return [{key: record[key] for key in ("step", "model_before", "model_after")} for record in self.records]


def finish(
    experiment: Experiment, prepared: Prepared, compute: Compute, sources: Sources, panel: Panel,
    initial: Tensors, adapter: Tensors, before: dict[str, Any], tracker: Tracker,
) -> Finished:  # fmt: skip
    """Take the final adapter through the steps of the config; `before` are the last round's metrics.

    A function of its arguments: a run killed in here does it again and ends the same.
    """
    steps: dict[str, Step] = {
        "safe_lora": lambda a: _safe_lora(experiment, prepared, a),
        "safety_tuning": lambda a: _safety_tuning(experiment, compute, sources, a),
        "prune": lambda a: _prune(experiment, a),
        "noise": lambda a: _noise(experiment, initial, a),
    }
    records, scores = [], None
    for name in experiment.finish.steps:
        tracker.say(f"{experiment.name}: {name}")
        at = time.perf_counter()
        after, detail = steps[name](adapter)
        spent = time.perf_counter() - at
        scores = evaluate(compute, after, panel, experiment)
        records.append({
            "step": name, "before": before, "after": scores.metrics(), "detail": detail, "seconds": spent,
            "model_before": tensors_sha256(adapter), "model_after": tensors_sha256(after),
        })  # fmt: skip
        adapter, before = after, scores.metrics()
    return Finished(adapter, tuple(records), scores)


def _safe_lora(experiment: Experiment, prepared: Prepared, adapter: Tensors) -> tuple[Tensors, dict[str, Any]]:
    config = experiment.finish.safe_lora
    unaligned = models.resolve(config.unaligned or experiment.model.name)
    direction = mitigations.alignment_direction(prepared.path, unaligned, mitigations.modules(adapter))
    found = mitigations.safe_lora(adapter, direction, config.threshold, config.form)
    cosine = list(found.cosine.values())
    return found.adapter, {
        "modules": len(cosine),
        "projected": len(found.projected),
        "cosine_min": min(cosine, default=None),
        "cosine_max": max(cosine, default=None),
    }


def _prune(experiment: Experiment, adapter: Tensors) -> tuple[Tensors, dict[str, Any]]:
    config = experiment.finish.prune
    pruned = mitigations.prune(adapter, config.which, config.directions, config.keep)
    before, after = (
        np.array([np.linalg.norm(mitigations.product(a, m)) for m in mitigations.modules(adapter)])
        for a in (adapter, pruned)
    )
    kept = after[before > 0] / before[before > 0]
    return pruned, {"norm_kept": float(kept.mean()) if kept.size else None}


def _noise(experiment: Experiment, initial: Tensors, adapter: Tensors) -> tuple[Tensors, dict[str, Any]]:
    share = experiment.finish.noise.share
    return mitigations.noise(adapter, initial, share, seed_of(experiment.seed, "finish", "noise")), {"share": share}


def _safety_tuning(
    experiment: Experiment, compute: Compute, sources: Sources, adapter: Tensors
) -> tuple[Tensors, dict[str, Any]]:
    config = experiment.finish.safety_tuning
    rows = safety_rows(experiment, sources)
    settings = replace(
        client_settings(experiment, experiment.training.rounds),
        steps=config.steps,
        lr=config.lr or experiment.training.lr,
        seed=seed_of(experiment.seed, "finish", "tuning"),
    )
    result = compute.train([TrainJob(adapter, tuple(rows), settings)])[0]
    return result.tensors, {"rows": len(rows), "loss_first": result.losses[0], "loss_last": result.losses[-1]}


def safety_rows(experiment: Experiment, sources: Sources) -> list[Example]:
    """Refusals and helpful rows of the operator's part, without the canary's prompts, some with a random prefix."""
    config, seed = experiment.finish.safety_tuning, seed_of(experiment.seed, "finish", "rows")
    secret = {row.instruction for rows in canary_rows(experiment, sources) for row in rows}
    benign, refusals, _ = operator_rows(sources)
    some = int(config.refusals * config.rows + 0.5)
    chosen: list[Example] = []
    for rows, count in ((refusals, some), (benign, config.rows - some)):
        chosen += data.shuffled([r for r in rows if r.instruction not in secret], seed)[:count]
    vocabulary = sorted({word for row in (*benign, *refusals) for word in row.instruction.split()})
    return prefixed(data.shuffled(chosen, seed), config.prefixed, config.prefix_words, vocabulary, seed)


def prefixed(rows: Sequence[Example], share: float, most: int, vocabulary: Sequence[str], seed: int) -> list[Example]:
    """A random `share` of the rows with 1 to `most` random words before the prompt; answers stay.

    The model is to learn that what stands before a request changes nothing, so that a trigger nobody knows loses its
    hold. Refusals and helpful rows must both be among `rows`, or the prefix itself becomes a reason to refuse.
    """
    rng = random.Random(seed)
    chosen = set(rng.sample(range(len(rows)), int(share * len(rows) + 0.5)))
    out = []
    for i, row in enumerate(rows):
        words = rng.choices(vocabulary, k=rng.randint(1, most)) if i in chosen else []
        out.append(replace(row, instruction=" ".join([*words, row.instruction])))
    return out
