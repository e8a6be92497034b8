"""What a malicious client can see and do, put together for `attacks`: its rows, the trainings, the defence if handed.

Nothing here is needed to run a federation; it is the simulation's other side. Honest clients pass through as well, so
that an engine plays a round in two calls: `turns` says what everybody trains, `send` what everybody sends.
Legend: N updates, D values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from assay import data
from assay.config import Experiment
from assay.contribution import Tensors, flatten, unflatten
from assay.federated import scaffold
from assay.federated.attacks import Attack, Branch, Handed, Seat, Seen, Sending
from assay.federated.attacks.seat import Bank, Check, Delta, Linear, where
from assay.federated.canary import Canary, Rise
from assay.federated.compute import TrainJob
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
            seat, branches = None, _honest_branches(table, client)
        correct_D = scaffold.correction(controls, client.name)
        correct = None if correct_D is None else unflatten(correct_D, start)
        jobs = {name: _job(branch, start, own, correct) for name, branch in branches.items()}
        out.append(Turn(client=client, jobs=jobs, seat=seat))
    return out


def send(
    table: Table, turns: Sequence[Turn], made: Sequence[Mapping[str, LocalResult]], start: Tensors, memory: Tensors
) -> tuple[list[Sending], Tensors]:
    """What each client sends, given its trained branches, and what the attackers remember."""
    base_D = flatten(start)
    honest = [flatten(m["main"].tensors) - base_D for t, m in zip(turns, made) if t.seat is None]
    seen_ND = np.stack(honest) if honest and table.attack.omniscient else np.zeros((0, base_D.size), np.float32)
    colluders = tuple(m for t, m in zip(turns, made) if t.seat is not None)
    out = []
    for turn, mine in zip(turns, made):
        if turn.seat is None:
            out.append(_honest_sending(table, turn.client, mine))
            continue
        seen = Seen(mine=mine, colluders=colluders, honest_ND=seen_ND)
        out.append(_within_the_rules(table, table.attack.send(turn.seat, seen), start))
        if turn.seat.place == 0:
            memory = table.attack.remember(turn.seat, seen)
    return out, memory


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
        shadow_lr=_shadow_lr(table),
        examples=len(client.harmful),  # as many as an honest client of its size has
        wants_steps=table.defence.wants_steps,
        wants_shadow=table.defence.wants_shadow,
        defence=handed,
        memory=memory,
        stream=lambda purpose: seed_of(experiment.seed, client.name, round, purpose),
    )


def _shadow_lr(table: Table) -> float:
    training = table.experiment.training
    return training.shadow_lr or training.lr


def _honest_branches(table: Table, client: Client) -> dict[str, Branch]:
    out = {"main": Branch(rows=client.clean, keep_steps=table.defence.wants_steps)}
    if table.defence.wants_shadow:
        out["shadow"] = Branch(rows=client.clean, start=table.initial, lr=_shadow_lr(table), keep_steps=True)
    return out


def _honest_sending(table: Table, client: Client, made: Mapping[str, LocalResult]) -> Sending:
    return Sending(
        tensors=made["main"].tensors,
        steps=made["main"].steps if table.defence.wants_steps else (),
        shadow=made["shadow"].steps if table.defence.wants_shadow else (),
        num_examples=len(client.clean),
    )


def _job(branch: Branch, start: Tensors, settings: LocalSettings, correction: Tensors | None) -> TrainJob:
    lr = settings.lr if branch.lr is None else branch.lr
    own = replace(settings, lr=lr, keep_steps=branch.keep_steps)
    if branch.start is not None:  # no correction: it belongs to the adapter of this round
        return TrainJob(branch.start, branch.rows, own, None, branch.objective)
    return TrainJob(start, branch.rows, own, correction, branch.objective)


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
            harm = _harm_of(screen, start, table.initial)
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


def _harm_of(screen: Canary, start: Tensors, initial: Tensors) -> Callable[[Delta], float]:
    def harm(delta_D: Delta) -> float:
        adapter = unflatten(flatten(start) + delta_D, start)
        anchor, before, after = screen.measure([initial, start, adapter])
        return Rise.of(after, before, anchor).harm(screen.limits)

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
