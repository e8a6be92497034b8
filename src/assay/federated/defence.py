"""A level by name -> the screens, the gate and the rules of a run.

`submitted` (default) reads everything off the update that will be aggregated. `step`, `client` and `shadow` are
Safe-FedLLM's and lean on what the client says of itself; `none` records every round and trusts everyone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from assay.config import ConfigError, Experiment
from assay.federated.canary import Canary, Gate, Measure
from assay.federated.probe import Probe
from assay.federated.rehearsal import Rehearsal
from assay.federated.screens import (
    ClientLevel,
    Duplicate,
    Neighbours,
    Norm,
    ProbeFilter,
    ShadowLevel,
    StepLevel,
    Structure,
)
from assay.verdict import Screen


@dataclass(frozen=True, slots=True, kw_only=True)
class Defence:
    """What a round needs to judge its contributions; `wants_*` is what clients are asked to send along."""

    level: str
    screens: tuple[Screen, ...]
    gate: Gate | None = None
    min_mean_weight: float = 0.0
    monitor: frozenset[str] = frozenset()
    wants_steps: bool = False
    wants_shadow: bool = False

    def summary(self) -> str:
        names = ", ".join(s.name + (" (monitor)" if s.name in self.monitor else "") for s in self.screens)
        return f"{self.level}: {names}{', gate on the aggregate' if self.gate else ''}"


@dataclass(frozen=True, slots=True)
class Material:
    """What a level may ask for: made only when it does."""

    probe: Callable[[], Probe]
    rehearsal: Callable[[], tuple[Rehearsal, Measure]]
    lr_of_round: Callable[[int], float]


def none(experiment: Experiment, material: Material) -> Defence:
    return Defence(level="none", screens=(Structure(),))


def submitted(experiment: Experiment, material: Material) -> Defence:
    """Structure, norm, duplicates, cheap filters, the canary on every client and the gate on the aggregate."""
    config = experiment.defence
    rehearsal, measure = material.rehearsal()
    limits = rehearsal.canary_limits(config.canary)
    screens: tuple[Screen, ...] = (
        Structure(),
        Norm(lambda r: rehearsal.norm_limit(r, material.lr_of_round(r)), config.norm_clip, config.norm_refuse),
        Duplicate(),
        ProbeFilter(rehearsal.probe, rehearsal.probe_limit),
        Neighbours(rehearsal.bank_MD, rehearsal.malicious_M, rehearsal.neighbour_limit, config.neighbours),
        Canary(measure, limits),
    )
    # no floor on the mean weight: a malicious majority at weight 0 must not be able to stop the training
    return Defence(level="submitted", screens=screens, gate=Gate(measure, limits))


def step(experiment: Experiment, material: Material) -> Defence:
    config = experiment.defence
    screen = StepLevel(material.probe(), experiment.training.steps, config.threshold, config.score_rounds)
    floor = config.min_mean_weight
    return Defence(level="step", screens=(Structure(), screen), min_mean_weight=floor, wants_steps=True)


def client(experiment: Experiment, material: Material) -> Defence:
    config = experiment.defence
    screen = ClientLevel(material.probe(), config.threshold, config.score_rounds)
    return Defence(level="client", screens=(Structure(), screen), min_mean_weight=config.min_mean_weight)


def shadow(experiment: Experiment, material: Material) -> Defence:
    config = experiment.defence
    screen = ShadowLevel(material.probe(), experiment.training.steps, config.threshold)
    floor = config.min_mean_weight
    return Defence(level="shadow", screens=(Structure(), screen), min_mean_weight=floor, wants_shadow=True)


LEVELS: Mapping[str, Callable[[Experiment, Material], Defence]] = {
    "none": none,
    "submitted": submitted,
    "step": step,
    "client": client,
    "shadow": shadow,
}


def make(experiment: Experiment, material: Material) -> Defence:
    """The defence the experiment names, with `defence.monitor` checked against its screens."""
    made = LEVELS[experiment.defence.level](experiment, material)
    names = [s.name for s in made.screens]
    for name in experiment.defence.monitor:
        if name not in names:
            raise ConfigError(f"defence.monitor: level {made.level} has no screen {name!r}; it has {', '.join(names)}")
    return Defence(
        level=made.level,
        screens=made.screens,
        gate=made.gate,
        min_mean_weight=made.min_mean_weight,
        monitor=frozenset(experiment.defence.monitor),
        wants_steps=made.wants_steps,
        wants_shadow=made.wants_shadow,
    )
