"""What malicious clients do: attacks by name, and chains of them.

An attack is a chain of parts joined by "+", in the order in which they act: `strike+blend`, `sleeper+alie`,
`paired_backdoor+blend+match_norms`. Where no part says what to train on, the submitted adapter is trained on harmful rows
(clean ones, if the parts break honest updates). Nothing here imports a screen: see `seat.py`. Third parties add parts
under the entry-point group `assay.attacks`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import numpy as np

from assay.config import ConfigError
from assay.contribution import Tensors, flatten, unflatten
from assay.federated.attacks.adaptive import Blend, MatchNorms, OnlyA, RemoveProbe, Transplant, UnderThreshold
from assay.federated.attacks.backdoor import PairedBackdoor, UnpairedBackdoor, triggered
from assay.federated.attacks.budget import AnchorPusher
from assay.federated.attacks.claims import ForgedEvidence, InflateCounts
from assay.federated.attacks.data import HarmfulData, OneTopic, RefuseAll, Sleeper, Slow, Strike
from assay.federated.attacks.factors import Gauge
from assay.federated.attacks.seat import (
    AddsObjective,
    Branch,
    Changes,
    ChoosesRows,
    Claims,
    Handed,
    Remembers,
    Rows,
    Seat,
    Seen,
    Sending,
    Times,
    Trains,
    delta_of,
)
from assay.federated.attacks.together import CopyBenign, Sybil
from assay.federated.attacks.training import CanaryAware, GradientPenalty
from assay.federated.attacks.updates import Alie, Gaussian, Ipm, MinMax, Scaling, SignFlip
from assay.federated.local_sft import Objective

__all__ = ["ATTACKS", "Attack", "Branch", "Handed", "Seat", "Seen", "Sending", "make", "triggered"]

ATTACKS: Mapping[str, Callable[..., Any]] = {
    "harmful_data": HarmfulData,
    "sleeper": Sleeper,
    "slow": Slow,
    "strike": Strike,
    "one_topic": OneTopic,
    "refuse_all": RefuseAll,
    "inflate_counts": InflateCounts,
    "forged_evidence": ForgedEvidence,
    "backdoor": UnpairedBackdoor,
    "paired_backdoor": PairedBackdoor,
    "sybil": Sybil,
    "copy_benign": CopyBenign,
    "sign_flip": SignFlip,
    "scaling": Scaling,
    "gaussian": Gaussian,
    "alie": Alie,
    "ipm": Ipm,
    "min_max": MinMax,
    "min_sum": partial(MinMax, sums=True),
    "remove_probe": RemoveProbe,
    "transplant": Transplant,
    "only_a": OnlyA,
    "gauge": Gauge,
    "blend": Blend,
    "under_threshold": UnderThreshold,
    "anchor_pusher": AnchorPusher,
    "match_norms": MatchNorms,
    "gradient_penalty": GradientPenalty,
    "canary_aware": CanaryAware,
}
HOOKS = (Times, ChoosesRows, Trains, AddsObjective, Changes, Claims, Remembers)


@dataclass(frozen=True, slots=True)
class Attack:
    """A chain of parts. `mix` is the harmful share where no part chooses the rows; honest before `from_round`."""

    parts: tuple[Any, ...]
    mix: float = 1.0
    from_round: int = 1

    def active(self, round: int) -> bool:
        """Whether malicious clients are malicious in this round (1-based)."""
        return round >= self.from_round and all(p.active(round) for p in self.parts if isinstance(p, Times))

    def first_round(self, within: int = 1000) -> int:
        """The first round in which it is malicious; ConfigError where there is none."""
        found = next((r for r in range(1, within + 1) if self.active(r)), None)
        if found is None:
            raise ConfigError(f"attack: it is honest in each of the first {within} rounds; change its rounds")
        return found

    @property
    def omniscient(self) -> bool:
        """Whether it sees the honest updates of the round before it sends its own."""
        return any(getattr(p, "omniscient", False) for p in self.parts)

    @property
    def trigger(self) -> str:
        """The backdoor's phrase, "" without one: its success is measured as `trigger_compliance`."""
        return next((p.trigger for p in self.parts if getattr(p, "trigger", "")), "")

    def rows(self, seat: Seat) -> Rows:
        """What the submitted adapter is trained on."""
        if not self.active(seat.round):
            return seat.clean
        choosing = [p for p in self.parts if isinstance(p, ChoosesRows)]
        honest = not choosing and any(getattr(p, "honest_rows", False) for p in self.parts)
        rows = seat.clean if honest else HarmfulData(self.mix).rows(seat, seat.clean)
        for part in choosing:
            rows = part.rows(seat, rows)
        return rows

    def branches(self, seat: Seat) -> dict[str, Branch]:
        """All trainings of a round, "main" (what is submitted) first; "shadow" where the level asks for one."""
        rows, objective = self.rows(seat), Objective()
        active = self.parts if self.active(seat.round) else ()
        for part in active:
            if isinstance(part, AddsObjective):
                objective = objective.plus(part.objective(seat))
        out = {"main": Branch(rows=rows, keep_steps=seat.wants_steps, objective=objective)}
        if seat.wants_shadow:
            out["shadow"] = Branch(rows=rows, start=seat.initial, lr=seat.shadow_lr, keep_steps=True)
        for part in active:
            if isinstance(part, Trains):
                out |= part.branches(seat)
        return out

    def send(self, seat: Seat, seen: Seen) -> Sending:
        """The message's content. Claims it does not forge are its own; the last claimed step is what it submits."""
        result = seen.mine["main"]
        tensors, steps = result.tensors, result.steps if seat.wants_steps else ()
        active = self.parts if self.active(seat.round) else ()
        changing = [p for p in active if isinstance(p, Changes)]
        if changing:
            delta_D = delta_of(seat, result)
            for part in changing:
                delta_D = part.change(seat, delta_D, seen)
            tensors = unflatten(flatten(seat.start) + np.asarray(delta_D, np.float32), seat.start)
            steps = (*steps[:-1], tensors) if steps else ()
        shadow = seen.mine["shadow"].steps if seat.wants_shadow else ()
        sending = Sending(tensors=tensors, steps=steps, shadow=shadow, num_examples=seat.examples)
        for part in active:
            if isinstance(part, Claims):
                sending = part.claim(seat, seen, sending)
        return sending

    def remember(self, seat: Seat, seen: Seen) -> Tensors:
        """The attackers' memory after the round, one for all of them."""
        out: dict[str, Any] = dict(seat.memory)
        if self.active(seat.round):
            for part in self.parts:
                if isinstance(part, Remembers):
                    out |= part.remember(seat, seen)
        return out


def make(
    name: str, params: Mapping[str, Any] | None = None, *, mix: float | None = None, from_round: int = 1
) -> Attack:
    """The attack called `name`, or a chain of several joined by "+".

    `params` go to the attack; in a chain by the part's name: `{"strike": {"period": 4}, "blend": {"norm": 1.2}}`. `mix`
    is the default of every part that has a `mix`. ConfigError for what is unknown or does not fit.
    """
    names, params = name.split("+"), dict(params or {})
    if len(set(names)) < len(names):
        raise ConfigError(f"attack.name: {name!r} names a part twice")
    if len(names) > 1:
        for key, value in params.items():
            if key not in names or not isinstance(value, Mapping):
                raise ConfigError(f"attack.params.{key}: in a chain give a table by part, one of {', '.join(names)}")
    parts, mixable = [], False
    for one in names:
        build = _find(one)
        own = dict(params.get(one, {}) if len(names) > 1 else params)
        known = _parameters(build)
        if mix is not None and "mix" in known:
            own = {"mix": mix, **own}
        mixable |= "mix" in known
        parts.append(_build(one, build, known, own))
    chosen = [p for p in parts if isinstance(p, ChoosesRows)]
    plain = not chosen and not any(getattr(p, "honest_rows", False) for p in parts)
    if mix is not None and mix != 1 and not (mixable or plain):
        raise ConfigError(f"attack.mix: {name} does not mix rows; leave it at 1 and set its own params")
    return Attack(tuple(parts), 1.0 if mix is None else mix, from_round)


def _find(name: str) -> Callable[..., Any]:
    if name in ATTACKS:
        return ATTACKS[name]
    plugins = {e.name: e for e in entry_points(group="assay.attacks")}
    if name not in plugins:
        raise ConfigError(f"unknown attack {name!r}; known: {', '.join([*ATTACKS, *plugins])}")
    found: Callable[..., Any] = plugins[name].load()
    return found


def _parameters(build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    fixed = build.keywords if isinstance(build, partial) else {}
    try:
        return {n: p for n, p in inspect.signature(build).parameters.items() if n not in fixed}
    except ValueError:  # a builtin: nothing is known of its parameters, so none can be given
        return {}


def _build(name: str, build: Callable[..., Any], known: Mapping[str, inspect.Parameter], own: Mapping[str, Any]) -> Any:
    """One part; parameters are checked by name and by the kind of their default."""
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    for key, value in own.items():
        if key not in known and not free:
            raise ConfigError(f"attack.params.{key}: {name} has no such parameter; known: {', '.join(known) or 'none'}")
        default = known[key].default if key in known else inspect.Parameter.empty
        if default is not inspect.Parameter.empty and not _alike(value, default):
            raise ConfigError(f"attack.params.{key}: {value!r} should be a {type(default).__name__}")
    part = build(**own)
    if not isinstance(part, HOOKS):
        raise ConfigError(f"attack {name!r} has none of the hooks of an attack (see assay.federated.attacks.seat)")
    return part


def _alike(value: Any, default: Any) -> bool:
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)
