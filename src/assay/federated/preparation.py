"""What a run needs before round 1: the (aligned) base, and for its level a probe or a rehearsal. All of it cached."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from assay import models
from assay.config import ConfigError, Experiment
from assay.contribution import Tensors
from assay.federated import scaffold, server_opt
from assay.federated.canary import Measure
from assay.federated.collect import CollectSettings, collect, fit_probe
from assay.federated.compute import Compute
from assay.federated.defence import Material, names
from assay.federated.evaluate import loss_settings
from assay.federated.local_sft import LocalSettings
from assay.federated.population import Sources, load_sources, make_attack
from assay.federated.probe import Probe
from assay.federated.rehearsal import canary_rows, rehearse, rounds_of
from assay.federated.rehearsed import Rehearsal
from assay.federated.warmup import Aligned, aligned, places, rows_for, settings_of
from assay.progress import Tracker

RECIPE = 5  # raise when collect, rehearsal or features change: part of every cache key


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The base every client trains on."""

    name: str
    path: Path
    base_sha256: str
    dtype: str
    alignment: str


def prepare(experiment: Experiment, tracker: Tracker) -> Prepared:
    """Resolve, fetch and, where asked, align the base model."""
    make_attack(experiment)  # minutes of warm-up are no place to find out that its name is misspelt
    config = experiment.model
    server_opt.of(experiment.server)  # a wrong knob is said now, not after minutes of preparation
    dtype = models.resolve_dtype(config.dtype)
    if not config.align:
        path = models.resolve(config.name, tracker.say)
        return Prepared(
            name=config.name, path=path, base_sha256=models.weights_sha256(path), dtype=dtype, alignment="none"
        )  # fmt: skip
    made = align(experiment, tracker)
    return Prepared(
        name=config.name,
        path=made.path,
        base_sha256=models.weights_sha256(made.path),
        dtype=dtype,
        alignment=f"{made.origin} warm-up {made.key[:16]}",
    )


def align(experiment: Experiment, tracker: Tracker) -> Aligned:
    """The aligned base for the experiment's model and data."""
    sources = load_sources(experiment)
    settings = settings_of(experiment)
    rows = rows_for(sources.of_operator("benign"), sources.of_operator("refusals"), settings)
    return aligned(experiment.model.name, rows, experiment.model.template, settings, tracker)


def at_hand(experiment: Experiment) -> bool:
    """Whether `prepare` finds its base on this machine, with nothing to fetch and nothing to train."""
    name = experiment.model.name
    if not (models.is_cached(name) or Path(name).is_dir()):
        return False
    if not experiment.model.align:
        return True
    sources, settings = load_sources(experiment), settings_of(experiment)
    rows = rows_for(sources.of_operator("benign"), sources.of_operator("refusals"), settings)
    _, target, shipped = places(name, models.resolve(name), rows, experiment.model.template, settings)
    return target.exists() or shipped.exists()


def client_settings(experiment: Experiment, round: int) -> LocalSettings:
    """A client's training in `round` (1-based): the rate is constant within a round, cosine over rounds if asked."""
    training = experiment.training
    return LocalSettings(
        steps=training.steps,
        batch_size=training.batch_size,
        max_length=training.max_length,
        lr=lr_of_round(experiment, round),
        clip=training.clip,
        optimizer=training.optimizer,
        prox_mu=training.prox_mu,
        template=experiment.model.template,
        keep_steps=False,
    )


def controls_rule(experiment: Experiment, round: int) -> scaffold.Rule | None:
    """How SCAFFOLD's server reads submissions of `round`; None where it is off."""
    return scaffold.Rule.of(client_settings(experiment, round)) if experiment.training.scaffold else None


def lr_of_round(experiment: Experiment, round: int) -> float:
    """Learning rate of a round: `lr`, or cosine from `lr` (round 1) to `lr_final` (last round; never 0)."""
    training = experiment.training
    if training.schedule == "constant" or training.rounds == 1:
        return training.lr
    final = training.lr_final or training.lr / 50
    phase = (round - 1) / (training.rounds - 1)
    return float(final + (training.lr - final) * 0.5 * (1 + np.cos(np.pi * phase)))


def material(
    experiment: Experiment, prepared: Prepared, compute: Compute, sources: Sources, initial: Tensors, tracker: Tracker
) -> Material:
    """What levels ask for, made (or read from the cache) when they ask."""
    measure = Measure(compute, *canary_rows(experiment, sources), loss_settings(experiment))
    return Material(
        probe=lambda: get_probe(experiment, prepared, compute, sources, initial, tracker),
        rehearsal=lambda: (
            get_rehearsal(experiment, prepared, compute, sources, initial, measure, tracker),
            measure,
        ),
        lr_of_round=lambda round: lr_of_round(experiment, round),
    )


def get_probe(
    experiment: Experiment, prepared: Prepared, compute: Compute, sources: Sources, initial: Tensors, tracker: Tracker
) -> Probe:
    """The probe the config names, the cached one, or a fresh one, in this order."""
    if experiment.defence.probe is not None:
        probe = Probe.load(experiment.defence.probe)
        if probe.base_sha256 and probe.base_sha256 != prepared.base_sha256:
            raise ConfigError(
                f"{experiment.defence.probe}: fitted on another base model; fit one with `assay probe fit`"
            )
        return probe
    key = probe_key(experiment, prepared, sources)
    cached = models.cache_dir() / "probes" / f"{key[:16]}.safetensors"
    if cached.exists():
        return Probe.load(cached)
    probe = make_probe(experiment, prepared, compute, sources, initial, tracker)
    cached.parent.mkdir(parents=True, exist_ok=True)
    probe.save(cached)
    return probe


def make_probe(
    experiment: Experiment,
    prepared: Prepared,
    compute: Compute,
    sources: Sources,
    initial: Tensors,
    tracker: Tracker,
    counts: CollectSettings | None = None,
) -> Probe:
    """Collect trajectories and fit the paper's probe (lora_B of the first layer)."""
    counts = counts or CollectSettings()
    settings = client_settings(experiment, 1)
    tracker.say(f"fitting a probe: {counts.benign + counts.malicious} trajectories (once)")
    tracker.add(float(settings.steps * (counts.benign + counts.malicious)))
    settings = LocalSettings(**{**_fields(settings), "keep_steps": True})
    tick = lambda n: tracker.tick(n * settings.steps)  # noqa: E731
    labelled = collect(compute, initial, sources, experiment, settings, "first_b", counts, tick)
    return fit_probe(labelled, "first_b", prepared.base_sha256)


def get_rehearsal(
    experiment: Experiment,
    prepared: Prepared,
    compute: Compute,
    sources: Sources,
    initial: Tensors,
    measure: Measure,
    tracker: Tracker,
) -> Rehearsal:
    """The rehearsal for this model, data, training and canary: cached, or played now."""
    key = rehearsal_key(experiment, prepared, sources)
    path = models.cache_dir() / "rehearsals" / f"{key[:16]}.safetensors"
    if path.exists():
        found = Rehearsal.load(path)
        lacks = {"balance": found.spread is None, "probe_a": found.probe_a is None}
        lacks["canary"] = found.canary.refusal_usual is None and experiment.defence.params.get("canary") is not None
        lacks["crowd"] = found.canary.crowd_step is None
        if not any(lacks.get(name) for name in names(experiment)):  # else a file of before the screen: play again
            return found
    config = experiment.defence.rehearsal
    again = 8 if experiment.training.prox_mu and experiment.training.optimizer == "adamw" else 0
    rounds = rounds_of(experiment)
    jobs = rounds * (config.malicious + 8 + again)
    steps = experiment.training.steps
    tracker.say(f"rehearsing: {rounds} honest rounds on the server's own data (once)")
    tracker.add(float(steps * jobs))
    settings = [client_settings(experiment, r) for r in range(1, rounds + 1)]
    made = rehearse(
        compute,
        initial,
        sources,
        experiment,
        measure,
        settings,
        prepared.base_sha256,
        lambda n: tracker.tick(n * steps),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return made


def probe_key(experiment: Experiment, prepared: Prepared, sources: Sources) -> str:
    """What a probe depends on; not the run's seed and not the number format, which move its samples by rounding only."""
    return _key("probe", experiment, prepared, sources, {"examples": experiment.clients.examples})


def rehearsal_key(experiment: Experiment, prepared: Prepared, sources: Sources) -> str:
    config = experiment.defence
    rehearsed = {
        "canary": config.canary.model_dump(exclude={"floor", "anchor_floor", "safe_floor", "safe_anchor_floor"}),
        "rehearsal": config.rehearsal.model_dump(),
        "server": experiment.server.model_dump(),  # the rehearsed adapter moves as the run's will
        "neighbours": config.neighbours,
        "seed": experiment.seed,
        "dtype": prepared.dtype,
        "rehearsed": rounds_of(experiment),  # follows from the run's length where the config does not say it
        "rounds": experiment.training.rounds if experiment.training.schedule == "cosine" else None,
    }
    return _key("rehearsal", experiment, prepared, sources, rehearsed)


def _key(kind: str, experiment: Experiment, prepared: Prepared, sources: Sources, more: dict[str, Any]) -> str:
    training = experiment.training.model_dump(exclude={"rounds", "shadow_lr"})
    what = {
        "kind": kind,
        "recipe": RECIPE,
        "base": prepared.base_sha256,
        "lora": experiment.lora.model_dump(),
        "training": training,
        "template": experiment.model.template,
        "data": sources.fingerprint(),
        "refusal_share": experiment.data.refusal_share,
        **more,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _fields(settings: LocalSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}
