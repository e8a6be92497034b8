"""Labelled step deltas for LoRA-Probe, collected offline before training (Safe-FedLLM, "LoRA-Probe").

Every trajectory starts from the initial adapter, trains on one kind of rows from the operator's part, and each of its
steps is a sample. Trajectories cover every style the data has: a probe that has seen one style fails on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from assay import data
from assay.config import ConfigError, Experiment
from assay.contribution import Tensors
from assay.data import Example
from assay.federated.compute import Compute, Tick, TrainJob, no_tick
from assay.federated.local_sft import LocalSettings
from assay.federated.lora import Features
from assay.federated.population import Sources, seed_of
from assay.federated.probe import Probe, feature_deltas, fit
from assay.federated.rehearsal import operator_rows
from assay.metrics import auroc, tpr_at_fpr


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectSettings:
    """Trajectories of each class; a third as many again are held out to say how good the probe is."""

    benign: int = 12
    malicious: int = 12


@dataclass(frozen=True, slots=True)
class Labelled:
    """Samples of one collection: delta_ND, malicious_N, and the trajectory each came from (for honest splits)."""

    delta_ND: NDArray[np.float32]
    malicious_N: NDArray[np.bool_]
    trajectory_N: NDArray[np.int64]


def collect(
    compute: Compute,
    initial: Tensors,
    sources: Sources,
    experiment: Experiment,
    settings: LocalSettings,
    features: Features = "first_b",
    counts: CollectSettings | None = None,
    tick: Tick = no_tick,
) -> Labelled:
    """Train the trajectories and label every step."""
    counts = counts or CollectSettings()
    benign, refusals, malicious = operator_rows(sources)
    if min(len(benign), len(malicious)) < experiment.training.batch_size:
        raise ConfigError("probe: the operator's part of the data is smaller than one batch; name more data")
    some = int(experiment.clients.examples * experiment.data.refusal_share + 0.5)
    styles: list[str | None] = [*sorted({r.style for r in benign if r.style}), None]
    jobs, labels = [], []
    for i in range(counts.benign + counts.malicious):
        seed = seed_of("probe", i)
        bad = i >= counts.benign
        style = styles[i % len(styles)]
        pool = malicious if bad else [r for r in benign if style in (None, r.style)]
        share = 0 if bad else some
        rows: list[Example] = data.shuffled(pool, seed)[: experiment.clients.examples - share]
        rows += data.shuffled(refusals, seed)[:share]
        jobs.append(TrainJob(initial, tuple(rows), LocalSettings(**{**asdict(settings), "seed": seed})))
        labels.append(bad)
    results = compute.train(jobs, tick)
    deltas = [feature_deltas(r.steps, initial, features) for r in results]
    each = [len(d) for d in deltas]
    return Labelled(np.concatenate(deltas), np.repeat(labels, each), np.repeat(np.arange(len(labels)), each))


def fit_probe(labelled: Labelled, features: Features, base_sha256: str, threshold: float = 0.8) -> Probe:
    """Fit on three quarters of the trajectories, report on the rest, then fit on all of them."""
    held_N = labelled.trajectory_N % 4 == 3
    judge = fit(labelled.delta_ND[~held_N], labelled.malicious_N[~held_N], features)
    quality = evaluate_probe(judge, labelled.delta_ND[held_N], labelled.malicious_N[held_N], threshold)
    meta = {
        "samples": int(labelled.malicious_N.size),
        "malicious": int(labelled.malicious_N.sum()),
        "held_out": quality,
    }
    return fit(
        labelled.delta_ND, labelled.malicious_N, features, threshold=threshold, base_sha256=base_sha256, meta=meta
    )


def evaluate_probe(
    probe: Probe, delta_ND: NDArray[np.floating], malicious_N: Sequence[bool] | NDArray[np.bool_], threshold: float
) -> dict[str, float | None]:
    """AUROC, TPR at 1 % FPR, and TPR and FPR at the decision threshold."""
    score_N, bad_N = probe.scores(delta_ND), np.asarray(malicious_N, bool)
    return {
        "auroc": auroc(score_N.tolist(), bad_N.tolist()),
        "tpr_at_1pct_fpr": tpr_at_fpr(score_N.tolist(), bad_N.tolist()),
        "tpr": float((score_N[bad_N] >= threshold).mean()) if bad_N.any() else None,
        "fpr": float((score_N[~bad_N] >= threshold).mean()) if (~bad_N).any() else None,
    }
