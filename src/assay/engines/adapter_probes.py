"""Probes on finished adapters: from labelled adapters that lie there, or trained here from the operator's own rows."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from assay import adapters, data, models
from assay.config import ConfigError, LoraSettings
from assay.contribution import Refusal, Tensors
from assay.data import Example
from assay.federated.adapter_probe import FEWEST, AdapterProbe, fit_adapters
from assay.federated.local_sft import LocalSettings, train
from assay.federated.lora import Carrier, is_a
from assay.federated.population import seed_of
from assay.federated.screens import neighbour_ratio
from assay.metrics import auroc, tpr_at_fpr
from assay.progress import Silent, Tracker
from assay.wire.peft import Adapter, differs

Paths = Sequence[str | Path]


def labelled(benign: Paths, malicious: Paths) -> tuple[list[Adapter], list[Adapter]]:
    """Adapters of both classes, all of one layout; ConfigError names the first that cannot be used."""
    good, bad = (_all(paths, kind) for paths, kind in ((benign, "benign"), (malicious, "malicious")))
    for one in [*good, *bad]:
        if told := differs(one.shapes, good[0].shapes, f"{good[0].name}'s"):
            raise ConfigError(f"{one.name} {told}; a probe is for one layout")
    return good, bad


def _all(paths: Paths, kind: str) -> list[Adapter]:
    out = []
    for one in adapters.read_all(adapters.places(paths)) if paths else []:
        if isinstance(one, Refusal):
            raise ConfigError(f"{kind}: {one.participant} {one.sentence}")
        out.append(one)
    if not out:
        raise ConfigError(f"no {kind} adapters; a probe needs both kinds")
    return out


def from_adapters(benign: Paths, malicious: Paths, base: str | None = None, seed: int | None = None) -> AdapterProbe:
    """Fit on adapters that lie there. `base` binds the file to a model's weights; `seed` None draws a secret sketch."""
    good, bad = labelled(benign, malicious)
    path = None if base is None else models.resolve(base)
    claimed = {one.claimed_base for one in good}
    return fit_adapters(
        [a.tensors for a in good],
        [a.tensors for a in bad],
        seed=secrets.randbits(62) if seed is None else seed,
        base=base or (claimed.pop() if len(claimed) == 1 else ""),
        base_sha256="" if path is None else models.weights_sha256(path),
    )


def from_rows(
    benign: str | Path,
    malicious: str | Path,
    base: str,
    *,
    each: int = 12,
    rank: int = 8,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    steps: int = 60,
    lr: float = 2e-3,
    batch_size: int = 8,
    max_length: int = 128,
    template: str = "chatml",
    seed: int | None = None,
    tracker: Tracker | None = None,
) -> AdapterProbe:
    """Train `each` adapters of either kind on the operator's rows, as strangers would, and fit on them.

    Every one has a lora_A of its own, two thirds of the rows, whole or half the steps, whole or half the rate; every
    third malicious one is half benign. What is rehearsed should be as long as what will be judged: set steps and rate
    to what your contributors use.
    """
    tracker = tracker or Silent()
    rows = {False: data.load(str(benign)), True: data.load(str(malicious))}
    for bad, found in rows.items():
        if len(found) < 2 * batch_size:
            raise ConfigError(
                f"{malicious if bad else benign}: {len(found)} rows, at least {2 * batch_size} are needed"
            )
    if each < FEWEST:
        raise ConfigError(f"{each} adapters of each kind are too few to fit on; at least {FEWEST}")
    secret = secrets.randbits(62) if seed is None else seed
    loaded = models.load(base, say=tracker.say)
    carrier = Carrier(loaded, LoraSettings(r=rank, alpha=float(rank), targets=targets))
    tracker.say(f"training {2 * each} adapters on {base}")
    tracker.add(float(2 * each))
    made: dict[bool, list[Tensors]] = {False: [], True: []}
    for i in range(2 * each):
        bad, turn = bool(i % 2), i // 2
        own = seed_of("adapter probe", secret, i)
        settings = LocalSettings(
            steps=max(1, steps // (1 + turn % 2)), batch_size=batch_size, max_length=max_length,
            lr=lr / (1 + turn // 2 % 2), template=template, seed=own, keep_steps=False,
        )  # fmt: skip
        made[bad].append(train(carrier, _fresh(carrier, own), _some(rows, bad, turn, own), settings).tensors)
        tracker.tick(1.0)
    return fit_adapters(made[False], made[True], seed=secret, base=base, base_sha256=loaded.sha256)


def _some(rows: dict[bool, list[Example]], bad: bool, turn: int, seed: int) -> list[Example]:
    """Two thirds of the rows of a kind; half of them benign in every third malicious one."""
    out = data.shuffled(rows[bad], seed)[: max(1, 2 * len(rows[bad]) // 3)]
    if bad and turn % 3 == 2:
        out = [*out[: len(out) // 2], *data.shuffled(rows[False], seed)[: len(out) // 2]]
    return out


def _fresh(carrier: Carrier, seed: int) -> Tensors:
    """An adapter as PEFT begins one: lora_A uniform, from a seed of its own; lora_B zero."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, value in carrier.get().items():
        bound = 1.0 / np.sqrt(value.shape[-1])
        out[name] = (rng.uniform(-bound, bound, value.shape) if is_a(name) else np.zeros(value.shape)).astype(
            np.float32
        )
    return out


def evaluate(fitted: AdapterProbe, benign: Paths, malicious: Paths) -> dict[str, Any]:
    """How well a probe's file tells labelled adapters apart that it has not seen: AUROC of each screen, TPR and FPR at
    the limits (either screen refuses)."""
    good, bad = labelled(benign, malicious)
    if told := differs(good[0].shapes, fitted.shapes, "the probe's"):
        raise ConfigError(f"{good[0].name} {told}; the probe is for another layout")
    every = [a.tensors for a in (*good, *bad)]
    bad_N = np.arange(len(every)) >= len(good)
    logit_N = fitted.logits(every)
    ratio_N = neighbour_ratio(fitted.sketches(every), fitted.bank_MD, fitted.malicious_M, fitted.k)
    caught_N = (logit_N > fitted.limit) | (ratio_N > fitted.neighbour_limit)
    return {
        "benign": len(good),
        "malicious": len(bad),
        "auroc": auroc(logit_N.tolist(), bad_N.tolist()),
        "tpr_at_1pct_fpr": tpr_at_fpr(logit_N.tolist(), bad_N.tolist()),
        "neighbour_auroc": auroc(ratio_N.tolist(), bad_N.tolist()),
        "tpr": float(caught_N[bad_N].mean()),
        "fpr": float(caught_N[~bad_N].mean()),
    }
