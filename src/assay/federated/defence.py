"""A level by name -> the screens, the gate and the rules of a run; or the screens of one's own choice.

`submitted` (default) reads everything off the update that will be aggregated. `step`, `client`, `shadow` and `evidence`
are Safe-FedLLM's and lean on what the client says of itself; `spectral` needs no labelled data and is weak; `none`
records every round and trusts everyone. `defence.screens` names screens in any combination, `gate` among them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from assay.config import ConfigError, Experiment
from assay.federated import published, screens
from assay.federated.balance import FLOOR
from assay.federated.canary import Canary, Gate, Measure
from assay.federated.claims import Ordered
from assay.federated.crowd import Crowd
from assay.federated.probe import Probe
from assay.federated.rehearsed import Rehearsal
from assay.federated.spectral import FEWEST
from assay.verdict import Screen
from assay.wire import Limits

GATE = "gate"
LEVELS: Mapping[str, tuple[str, ...]] = {
    "none": ("structure",),
    "submitted": ("structure", "norm", "probe", "neighbours", "balance", "canary", "duplicate", GATE),
    "step": ("structure", "step"),
    "client": ("structure", "client"),
    "shadow": ("structure", "shadow"),
    "evidence": ("structure", "evidence"),
    "spectral": ("structure", "norm", "spectral", "duplicate"),
}
PAPERS = ("step", "client", "shadow", "evidence")
"""The paper's screens: only with these does a low mean weight skip the round."""


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
    faithful: bool = False

    def limits(self, steps: int) -> Limits:
        """What a client's message may hold: a claim for each ordered step where the level reads any, else none at all.

        Unasked claims are 32 more adapters to parse and to hold, and the default bound of 16 would refuse an honest
        client who was ordered more steps.
        """
        return Limits(max_steps=steps if self.wants_steps or self.wants_shadow else 0)

    def summary(self) -> str:
        names = ", ".join(s.name + (" (monitor)" if s.name in self.monitor else "") for s in self.screens)
        mark = "AS PUBLISHED, holes included, for comparison only; " if self.faithful else ""
        return f"{mark}{self.level}: {names}{', gate on the aggregate' if self.gate else ''}"


@dataclass(frozen=True, slots=True)
class Material:
    """What a level may ask for: made only when it does."""

    probe: Callable[[], Probe]
    rehearsal: Callable[[], tuple[Rehearsal, Measure]]
    lr_of_round: Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Parts:
    """What one screen is built from: `fixed` is the run's own material, `knobs` are defaults that params may change."""

    fixed: Mapping[str, Any]
    knobs: Mapping[str, Any]


Builder = Callable[[Experiment, Material, Mapping[str, Any]], Parts]


def names(experiment: Experiment) -> tuple[str, ...]:
    """The screens of an experiment by name, `gate` included where the aggregate is gated."""
    config = experiment.defence
    return LEVELS[config.level] if config.screens is None else config.screens


def level_name(experiment: Experiment) -> str:
    """The level, or `custom` where the screens were chosen one by one."""
    return experiment.defence.level if experiment.defence.screens is None else "custom"


def reads_model(experiment: Experiment) -> bool:
    """Whether every client's update is measured on the model."""
    return bool({"canary", "crowd"} & set(names(experiment)))


def wants_shadow(experiment: Experiment) -> bool:
    """Whether clients train a shadow branch as well."""
    return bool({"shadow", "evidence"} & set(names(experiment)))


def make(experiment: Experiment, material: Material) -> Defence:
    """The defence the experiment names; ConfigError where names, parameters or `defence.monitor` do not fit."""
    config = experiment.defence
    wanted = names(experiment)
    if config.faithful:
        return _faithful(experiment, material)
    _check_names(experiment, wanted)
    made = tuple(_build(name, experiment, material) for name in wanted if name != GATE)
    gate = None
    if GATE in wanted:
        rehearsal, measure = material.rehearsal()
        gate = Gate(measure, rehearsal.canary_limits(config.canary))
    return Defence(
        level=level_name(experiment),
        screens=made,
        gate=gate,
        # no floor beside the gate: a malicious majority at weight 0 must not be able to stop the training
        min_mean_weight=config.min_mean_weight if gate is None and set(PAPERS) & set(wanted) else 0.0,
        monitor=frozenset(config.monitor),
        wants_steps="step" in wanted,
        wants_shadow=wants_shadow(experiment),
    )


def _faithful(experiment: Experiment, material: Material) -> Defence:
    config = experiment.defence
    level = published.check(experiment)
    screen = published.Published(level, material.probe(), experiment.training.steps)
    _check_monitor(config.monitor, ("structure", screen.name), level)
    ignored = frozenset() if published.weights_act(experiment) else frozenset({screen.name})
    return Defence(
        level=level,
        screens=(screens.make("structure", freeze_a=experiment.lora.freeze_a), screen),
        min_mean_weight=config.min_mean_weight,
        monitor=frozenset(config.monitor) | ignored,
        wants_steps=level in ("step", "client"),
        wants_shadow=level in ("shadow", "evidence"),
        faithful=True,
    )


def _check_names(experiment: Experiment, wanted: tuple[str, ...]) -> None:
    config, level = experiment.defence, level_name(experiment)
    twice = [name for name in wanted if wanted.count(name) > 1]
    if twice:
        raise ConfigError(f"defence.screens: {twice[0]} is named twice; a weight would count twice")
    stray = sorted(set(config.params) - set(wanted))
    if stray:
        raise ConfigError(f"defence.params.{stray[0]}: level {level} has no such screen; it has {', '.join(wanted)}")
    for key in config.params.get(GATE, {}):
        raise ConfigError(f"defence.params.{GATE}: no parameter {key!r}; known: none; its limits are defence.canary's")
    _check_monitor(config.monitor, tuple(n for n in wanted if n != GATE), level)
    if "spectral" in wanted and experiment.clients.per_round < FEWEST:
        raise ConfigError(
            f"screen spectral compares at least {FEWEST} clients a round; {experiment.clients.per_round} are sampled"
        )


def _check_monitor(monitor: tuple[str, ...], present: tuple[str, ...], level: str) -> None:
    for name in monitor:
        if name not in present:
            raise ConfigError(f"defence.monitor: level {level} has no screen {name!r}; it has {', '.join(present)}")


def _build(name: str, experiment: Experiment, material: Material) -> Screen:
    given = dict(experiment.defence.params.get(name, {}))
    if name not in FACTORIES:
        if not screens.known(name):
            raise ConfigError(
                f"unknown screen {name!r}; known: {', '.join([*screens.names(), 'canary', 'crowd', GATE])}"
            )
        return screens.make(name, **given)  # a plugin's: it knows its own parameters
    parts = BUILDERS[name](experiment, material, given) if name in BUILDERS else Parts({}, {})
    factory = FACTORIES[name]
    accepted = inspect.signature(factory).parameters
    defaults = {k: p.default for k, p in accepted.items() if p.default is not inspect.Parameter.empty and k != "name"}
    knobs = {k: v for k, v in {**defaults, **parts.knobs}.items() if k not in parts.fixed}
    for key, value in given.items():
        if key not in knobs:
            raise ConfigError(
                f"defence.params.{name}: no parameter {key!r}; known: {', '.join(sorted(knobs)) or 'none'}"
            )
        _check_type(f"defence.params.{name}.{key}", value, knobs[key])
    chosen = {k: v for k, v in {**knobs, **given}.items() if k in accepted}
    try:
        made: Screen = factory(**parts.fixed, **chosen)
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"defence.params.{name}: {error}") from None
    return made


def _check_type(where: str, value: Any, like: Any) -> None:
    """A parameter has the kind of its default; None (score_rounds) stands for a whole number."""
    if isinstance(like, str):
        fits = isinstance(value, str)
    else:
        fits = not isinstance(value, bool) and isinstance(
            value, int if like is None or isinstance(like, int) else int | float
        )
        fits = fits and math.isfinite(value)
    if not fits:
        kind = "text" if isinstance(like, str) else "a finite number" if isinstance(like, float) else "a whole number"
        raise ConfigError(f"{where}: must be {kind}, got {value!r}")


# --- what each screen is built from -------------------------------------------------------------------------------


def _structure(experiment: Experiment, material: Material, given: Mapping[str, Any]) -> Parts:
    return Parts({"freeze_a": experiment.lora.freeze_a}, {})


def _norm(experiment: Experiment, material: Material, given: Mapping[str, Any]) -> Parts:
    """`reference = "round"`: against the median of the round, for operators who cannot rehearse (level `spectral`)."""
    config = experiment.defence
    usual = "round" if config.screens is None and config.level == "spectral" else "rehearsal"
    reference = given.get("reference", usual)
    if reference not in ("rehearsal", "round"):
        raise ConfigError(f"defence.params.norm.reference: must be rehearsal or round, got {reference!r}")
    knobs = {"clip": config.norm_clip, "refuse": config.norm_refuse, "reference": usual}
    if reference == "round":
        return Parts({"limit_of_round": None}, knobs)
    rehearsal, _ = material.rehearsal()
    return Parts({"limit_of_round": lambda r: rehearsal.norm_limit(r, material.lr_of_round(r))}, knobs)


def _probe(experiment: Experiment, material: Material, given: Mapping[str, Any]) -> Parts:
    rehearsal, _ = material.rehearsal()
    return Parts({"probe": rehearsal.probe}, {"limit": rehearsal.probe_limit})


def _neighbours(experiment: Experiment, material: Material, given: Mapping[str, Any]) -> Parts:
    rehearsal, _ = material.rehearsal()
    fixed = {"bank_MD": rehearsal.bank_MD, "malicious_M": rehearsal.malicious_M}
    return Parts(fixed, {"limit": rehearsal.neighbour_limit, "k": experiment.defence.neighbours})


def _probe_a(experiment: Experiment, material: Material, given: Mapping[str, Any]) -> Parts:
    rehearsal, _ = material.rehearsal()
    if rehearsal.probe_a is None:
        raise ConfigError("screen probe_a: the rehearsal at hand was not asked for it; rehearse again")
    return Parts({"probe": rehearsal.probe_a}, {"limit": rehearsal.probe_a_limit})


def _balance(experiment: Experiment, material: Material, given: Mapping[str, Any]) -> Parts:
    rehearsal, _ = material.rehearsal()
    if rehearsal.spread is None:
        raise ConfigError("screen balance: the rehearsal at hand is older than this screen; rehearse again")
    # AdamW moves every coordinate about equally far, whatever the rows; of sgd the gradients' sizes decide, and the
    # warm-up has learnt the server's rows by heart: what is rehearsed says nothing of a live client's share
    return Parts({"spread": rehearsal.spread}, {"floor": 1.0 if experiment.training.optimizer == "sgd" else FLOOR})


def _canary(experiment: Experiment, material: Material, given: Mapping[str, Any]) -> Parts:
    rehearsal, measure = material.rehearsal()
    return Parts({"measure": measure, "limits": rehearsal.canary_limits(experiment.defence.canary)}, {})


def _step(experiment: Experiment, material: Material, given: Mapping[str, Any]) -> Parts:
    fixed = {"probe": material.probe(), "ordered": _ordered(experiment, material.lr_of_round)}
    return Parts(fixed, _scored(experiment))


def _client(experiment: Experiment, material: Material, given: Mapping[str, Any]) -> Parts:
    return Parts({"probe": material.probe()}, _scored(experiment))


def _shadow(experiment: Experiment, material: Material, given: Mapping[str, Any]) -> Parts:
    fixed = {"probe": material.probe(), "ordered": _shadow_ordered(experiment)}
    return Parts(fixed, {"threshold": experiment.defence.threshold})


def _evidence(experiment: Experiment, material: Material, given: Mapping[str, Any]) -> Parts:
    config = experiment.defence.evidence
    secret = f"run/{experiment.seed}" if config.seed is None else f"secret/{config.seed}"
    fixed = {"probe": material.probe(), "ordered": _shadow_ordered(experiment), "secret": f"assay.audit/{secret}"}
    knobs = {"audit": config.audit, "agree": config.agree, "readmit": config.readmit}
    return Parts(fixed, {**knobs, "threshold": experiment.defence.threshold})


def _scored(experiment: Experiment) -> dict[str, Any]:
    return {"threshold": experiment.defence.threshold, "score_rounds": experiment.defence.score_rounds}


def _ordered(experiment: Experiment, lr_of_round: Callable[[int], float]) -> Callable[[int], Ordered]:
    config, steps = experiment.defence.claims, experiment.training.steps
    # sgd bounds no coordinate and, without momentum, turns as its batches do
    bound = config.optimizer == "adamw" and experiment.training.optimizer == "adamw"
    turn = config.turn if bound else -1.0
    return lambda round: Ordered(
        steps=steps, lr=lr_of_round(round) if bound else None, slack=config.slack, first_step=config.first_step,
        turn=turn,
    )  # fmt: skip


def _shadow_ordered(experiment: Experiment) -> Callable[[int], Ordered]:
    lr = experiment.training.shadow_lr or experiment.training.lr
    return _ordered(experiment, lambda round: lr)


FACTORIES: Mapping[str, Callable[..., Any]] = {**screens.SCREENS, "canary": Canary, "crowd": Crowd}
BUILDERS: Mapping[str, Builder] = {
    "structure": _structure,
    "norm": _norm,
    "probe": _probe,
    "neighbours": _neighbours,
    "balance": _balance,
    "probe_a": _probe_a,
    "canary": _canary,
    "crowd": _canary,
    "step": _step,
    "client": _client,
    "shadow": _shadow,
    "evidence": _evidence,
}
