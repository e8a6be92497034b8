"""What a malicious client can see and do, put together for `attacks`: its rows, the trainings, the defence if handed.

Nothing here is needed to run a federation; it is the simulation's other side. Honest clients pass through as well, so
that an engine plays a round in two calls: `turns` says what everybody trains, `send` what everybody sends. Where each
client is a process of its own, it calls `turns` and `sending_of` for itself, with a `made` that trains a turn only when
the attack looks at it.
Legend: N updates, D values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from assay import data
from assay.config import Experiment
from assay.contribution import Tensors, flatten, unflatten
from assay.federated import client as honest
from assay.federated import scaffold
from assay.federated.attacks import Attack, Handed, Seat, Seen, Sending
from assay.federated.attacks.seat import Bank, Check, Delta, Linear, where
from assay.federated.canary import Canary, Measure, Rise
from assay.federated.compute import TrainJob
from assay.federated.crowd import Crowd
from assay.federated.defence import Defence
from assay.federated.local_sft import LocalResult, LocalSettings
from assay.federated.lora import feature_names, is_a
from assay.federated.population import Client, Sources, make_attack, seed_of
from assay.federated.probe import Probe
from assay.federated.rehearsal import canary_rows
from assay.federated.screens import Neighbours, Norm, ProbeFilter, neighbour_ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """All that stays the same for the attackers of a run."""

    experiment: Experiment
    attack: Attack
    clients: tuple[Client, ...]
    guesses: tuple[data.Example, ...]
    prompts: tuple[data.Example, ...]
    initial: Tensors
    defence: Defence


def make_table(
    experiment: Experiment, sources: Sources, clients: Sequence[Client], initial: Tensors, defence: Defence
) -> Table:
    refusals = data.shuffled(data.part(sources.refusals, "clients"), seed_of(experiment.seed, "guesses"))
    has_canary = any(s.name == "canary" for s in defence.screens)
    return Table(
        experiment=experiment,
        attack=make_attack(experiment),
        clients=tuple(clients),
        guesses=tuple(refusals),
        prompts=tuple(canary_rows(experiment, sources)[0]) if has_canary else (),
        initial=initial,
        defence=defence,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One client's part of a round: its trainings by name, "main" first; a malicious one has a seat."""

    client: Client
    jobs: Mapping[str, TrainJob]
    seat: Seat | None


def turns(
    table: Table,
    chosen: Sequence[Client],
    round: int,
    start: Tensors,
    settings: LocalSettings,
    memory: Tensors,
    controls: scaffold.Controls,
) -> list[Turn]:
    """What the round's clients train. `settings` are those the server asks of everybody; `controls` are SCAFFOLD's."""
    places = {c.name: i for i, c in enumerate(c for c in chosen if c.malicious)}
    handed = handed_over(table, round, start) if places else Handed()
    out = []
    for client in chosen:
        own = replace(settings, seed=seed_of(table.experiment.seed, client.name, round))
        if client.malicious:
            seat = seat_of(table, client, places[client.name], len(chosen), round, start, own, handed, memory)
            branches = table.attack.branches(seat)
        else:
            seat, branches = None, honest.branches(client.clean, duty_of(table))
        correct_D = scaffold.correction(controls, client.name)
        correct = None if correct_D is None else unflatten(correct_D, start)
        jobs = {name: honest.job(branch, start, own, correct) for name, branch in branches.items()}
        out.append(Turn(client=client, jobs=jobs, seat=seat))
    return out


Made = Sequence[Mapping[str, LocalResult]]
"""What each turn's trainings gave, by turn and branch; may be made when it is asked for."""


def send(
    table: Table, turns: Sequence[Turn], made: Made, start: Tensors, memory: Tensors
) -> tuple[list[Sending], Tensors]:
    """What each client sends, given its trained branches, and what the attackers remember."""
    seen_ND = honest_deltas(table, turns, made, start)
    out = [sending_of(table, turns, made, start, at, seen_ND) for at in range(len(turns))]
    for at, turn in enumerate(turns):
        if turn.seat is not None and turn.seat.place == 0:
            memory = remembered(table, turns, made, at, seen_ND)
    return out, memory


def sending_of(
    table: Table, turns: Sequence[Turn], made: Made, start: Tensors, at: int, seen_ND: Delta
) -> Sending:  # fmt: skip
    """What the client of turn `at` sends; `seen_ND` as of `honest_deltas`."""
    turn = turns[at]
    if turn.seat is None:
        return honest.sending(made[at], len(turn.client.clean), duty_of(table))
    sending = table.attack.send(turn.seat, _seen(turns, made, at, seen_ND))
    return _within_the_rules(table, sending, start)


def remembered(table: Table, turns: Sequence[Turn], made: Made, at: int, seen_ND: Delta) -> Tensors:
    """The attackers' memory after the round, which their leader (place 0, turn `at`) keeps for all of them."""
    seat = turns[at].seat
    assert seat is not None
    return table.attack.remember(seat, _seen(turns, made, at, seen_ND))


def honest_deltas(table: Table, turns: Sequence[Turn], made: Made, start: Tensors) -> Delta:
    """delta_ND of the honest updates where the attack is omniscient, else no rows."""
    base_D = flatten(start)
    honest_at = [at for at, turn in enumerate(turns) if turn.seat is None] if table.attack.omniscient else []
    rows = [flatten(made[at]["main"].tensors) - base_D for at in honest_at]
    return np.stack(rows) if rows else np.zeros((0, base_D.size), np.float32)


def _seen(turns: Sequence[Turn], made: Made, at: int, seen_ND: Delta) -> Seen:
    return Seen(mine=made[at], colluders=_Colluders(turns, made), honest_ND=seen_ND)


class _Colluders(Sequence[Mapping[str, LocalResult]]):
    """Branches of the malicious turns, by place; asked for one by one."""

    def __init__(self, turns: Sequence[Turn], made: Made) -> None:
        self.at, self.made = [at for at, turn in enumerate(turns) if turn.seat is not None], made

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, place: Any) -> Any:
        return [self.made[at] for at in self.at[place]] if isinstance(place, slice) else self.made[self.at[place]]


def _within_the_rules(table: Table, sending: Sending, start: Tensors) -> Sending:
    """Where lora_A is frozen an attacker leaves it alone: whoever moves it is refused at once."""
    if not table.experiment.lora.freeze_a:
        return sending
    return replace(sending, tensors={n: start[n] if is_a(n) else value for n, value in sending.tensors.items()})


def seat_of(
    table: Table, client: Client, place: int, clients: int, round: int, start: Tensors, settings: LocalSettings,
    handed: Handed, memory: Tensors,
) -> Seat:  # fmt: skip
    experiment = table.experiment
    return Seat(
        name=client.name,
        place=place,
        round=round,
        clients=clients,
        clean=client.clean,
        harmful=client.harmful,
        pool=tuple(row for c in table.clients for row in c.harmful),
        guesses=table.guesses,
        start=start,
        initial=table.initial,
        settings=settings,
        shadow_lr=duty_of(table).shadow_lr,
        examples=len(client.harmful),  # as many as an honest client of its size has
        wants_steps=table.defence.wants_steps,
        wants_shadow=table.defence.wants_shadow,
        defence=handed,
        memory=memory,
        stream=lambda purpose: seed_of(experiment.seed, client.name, round, purpose),
    )


def duty_of(table: Table) -> honest.Duty:
    """What the server asks of everybody."""
    training = table.experiment.training
    return honest.Duty(
        wants_steps=table.defence.wants_steps,
        wants_shadow=table.defence.wants_shadow,
        shadow_lr=training.shadow_lr or training.lr,
        initial=table.initial,
    )


# --- the defence as an insider would give it away ------------------------------------------------------------------


def handed_over(table: Table, round: int, start: Tensors) -> Handed:
    """Probe, bank, limits and prompts of the defence in force, for attackers who ask."""
    probe, bank, checks, harm = None, None, [], None
    for screen in table.defence.screens:
        if isinstance(screen, Norm) and screen.limit_of_round is not None:
            checks.append(Check("norm", _length, screen.limit_of_round(round) * screen.clip))
        elif isinstance(screen, Neighbours):
            names = feature_names(list(start), "all_b")
            bank = Bank(
                names=names, bank_MD=screen.bank_MD, malicious_M=screen.malicious_M, neighbours=screen.k,
                limit=screen.limit,
            )  # fmt: skip
            checks.append(Check("neighbours", _ratio_of(screen, start, names), screen.limit))
        elif isinstance(screen, Canary):
            harm = _harm_of(screen.measure, partial(Rise.harm, limits=screen.limits), start, table.initial)
        elif isinstance(screen, Crowd):  # who keeps to its limits is never left out
            harm = _harm_of(screen.measure, screen.harm, start, table.initial)
        elif isinstance(screen, ProbeFilter):
            read = _linear(screen.probe, screen.limit, start)
            checks.append(Check(screen.name, _logit_of(read, start), read.limit))
            probe = read if screen.name == "probe" else probe
        else:  # the paper's levels judge p(malicious) >= threshold
            held, threshold = getattr(screen, "probe", None), getattr(screen, "threshold", None)
            if isinstance(held, Probe) and threshold is not None:
                probe = _linear(held, float(np.log(threshold / max(1e-9, 1 - threshold))), start)
    if probe is not None and all(check.name != "probe" for check in checks):
        checks.append(Check("probe", _logit_of(probe, start), probe.limit))
    return Handed(probe=probe, bank=bank, checks=tuple(checks), prompts=table.prompts, harm=harm)


def _linear(probe: Probe, limit: float, start: Tensors) -> Linear:
    names = feature_names(list(start), probe.features)
    return Linear(names=names, weight_D=probe.weight_D, bias=probe.bias, limit=limit)


def _harm_of(
    measure: Measure, judge: Callable[[Rise], float], start: Tensors, initial: Tensors
) -> Callable[[Delta], float]:
    def harm(delta_D: Delta) -> float:
        adapter = unflatten(flatten(start) + delta_D, start)
        anchor, before, after = measure([initial, start, adapter])
        return judge(Rise.of(after, before, anchor))

    return harm


def _length(delta_D: Delta) -> float:
    return float(np.linalg.norm(delta_D.astype(np.float64)))


def _logit_of(probe: Linear, start: Tensors) -> Callable[[Delta], float]:
    at = where(start, probe.names)
    judge = Probe(weight_D=probe.weight_D, bias=probe.bias, features="all_b")  # the features are already chosen
    return lambda delta_D: float(judge.logits(delta_D[None, at])[0])


def _ratio_of(screen: Neighbours, start: Tensors, names: tuple[str, ...]) -> Callable[[Delta], float]:
    at = where(start, names)
    return lambda delta_D: float(neighbour_ratio(delta_D[None, at], screen.bank_MD, screen.malicious_M, screen.k)[0])
