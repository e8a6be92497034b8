"""A federated run from its first round to its summary, whoever trains its clients.

Engines differ in one thing: how a round's bytes come about (`Clients`). All that follows is here and the same for all
of them: reading the bytes, screens, aggregate, server optimiser, gate, ledger, metrics, last steps, summary. A run is
resumable at any point, also after SIGKILL (journal.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from assay import checkpoint, run_dir, wire
from assay.config import ConfigError, Experiment
from assay.contribution import LoraUpdate, Refusal, Template, Tensors, tensors_sha256
from assay.engines import journal
from assay.federated import aggregators, defence, server_opt, store
from assay.federated.compute import Compute
from assay.federated.defence import Defence
from assay.federated.evaluate import Panel, Scores, evaluate, make_panel, metric_names
from assay.federated.finish import finish
from assay.federated.lora import write_peft
from assay.federated.population import Sources, load_sources, make_attack
from assay.federated.preparation import Prepared, controls_rule, material
from assay.federated.round import Outcome, ServerState, run_round
from assay.federated.summary import summarise, weight_metrics
from assay.progress import Silent, Tracker

TRAIN_UNITS, ANSWER_UNITS = 1.0, 4.0  # seconds of one core: a step of 8 rows; 20 answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """All that does not change during a run."""

    experiment: Experiment
    prepared: Prepared
    compute: Compute
    sources: Sources
    clients: Clients
    panel: Panel
    defence: Defence
    aggregate: aggregators.Aggregator
    run_id: str
    initial: Tensors
    tracker: Tracker

    def template(self, round: int) -> Template:
        """What an update of `round` must look like."""
        shapes = {name: tuple(value.shape) for name, value in self.initial.items()}
        return Template(shapes=shapes, base_sha256=self.prepared.base_sha256, round=round)

    def limits(self) -> wire.Limits:
        """What a message may cost."""
        return self.defence.limits(self.experiment.training.steps)

    def ticker(self, units_each: float) -> Callable[[int], None]:
        """Progress for jobs of `units_each`."""
        return lambda count: self.tracker.tick(units_each * count)


@dataclass(frozen=True, slots=True)
class Sent:
    """A round's messages, each with its participant as the transport authenticated it: bytes, or why there are none.

    `messages` is read once, one after the other: whoever makes them need not hold all of them at a time. `memory` is what
    simulated attackers keep for the next round, where the server's checkpoint keeps it for them.
    """

    messages: Iterable[tuple[str, bytes | Refusal]]
    memory: Tensors


class Clients(Protocol):
    """Whoever trains. `malicious` and `kinds` are a simulation's truth, for the summary; {} where nobody knows. `names`
    are what the operator calls participants whose identity is no word to read; nothing but the page goes by them."""

    @property
    def malicious(self) -> Mapping[str, bool]: ...

    @property
    def kinds(self) -> Mapping[str, str]: ...

    @property
    def names(self) -> Mapping[str, str]: ...

    def train(self, setup: Setup, state: ServerState, memory: Tensors, round: int) -> Sent:
        """Let the participants of `round` train from `state`; one entry for each that was asked. Peers never raise."""
        ...


Recruit = Callable[[Experiment, Sources], Clients]
"""Raises ConfigError for what the operator got wrong, before anything is rehearsed."""


def run(
    experiment: Experiment,
    directory: Path,
    prepared: Prepared,
    compute: Compute,
    recruit: Recruit,
    *,
    engine: str,
    given: str = "",
    command: str = "",
    tracker: Tracker | None = None,
) -> dict[str, Any]:
    """Run or resume `experiment` in `directory`; returns the summary. A finished run is returned as it is."""
    tracker = tracker or Silent()
    run_dir.commit()
    make_attack(experiment)  # a misspelt attack must not claim the directory
    with journal.locked(directory):
        run_id = _claim(directory, experiment, prepared, given, engine)
        finished = run_dir.read_summary(directory)
        if finished is not None:
            return finished
        started = time.perf_counter()
        setup = _set_up(experiment, prepared, compute, recruit, run_id, tracker)
        prepare_seconds = time.perf_counter() - started
        state, memory, rows = _resume_or_start(setup, directory, prepare_seconds)
        while state.round < experiment.training.rounds:
            state, memory, row = _play(setup, state, memory, directory)
            rows.append(row)
        return _finish(setup, state, directory, rows, command)


def units(experiment: Experiment) -> float:
    """Rough seconds of one core a run takes, for progress bars."""
    training, evaluation = experiment.training, experiment.evaluate
    rounds, clients = training.rounds, experiment.clients.per_round
    each = train_units(experiment) + (0.7 if defence.reads_model(experiment) else 0)
    evaluations = 2 + (rounds - 1) // evaluation.every
    return rounds * clients * each + evaluations * _evaluate_units(experiment)


def train_units(experiment: Experiment) -> float:
    """The same for one client's part of a round."""
    training = experiment.training
    branches = 2 if defence.wants_shadow(experiment) else 1
    return TRAIN_UNITS * training.steps * branches * training.batch_size * training.max_length / (8 * 48)


def _evaluate_units(experiment: Experiment) -> float:
    config = experiment.evaluate
    return ANSWER_UNITS * (config.harmful_prompts + config.benign_prompts) / 20


def _claim(directory: Path, experiment: Experiment, prepared: Prepared, given: str, engine: str) -> str:
    # how many workers and where the data folder lies changes no number
    dumped = experiment.model_dump(mode="json", exclude={"workers": True, "data": {"root"}})
    model = {"sha256": prepared.base_sha256, "dtype": prepared.dtype, "alignment": prepared.alignment}
    identity = {"experiment": dumped, "model": prepared.base_sha256, "dtype": prepared.dtype}
    # no part of the identity: the same experiment is the same run on every engine, as long as it stays on one
    named = {} if engine == "local" else {"engine": engine}
    run_id = journal.claim(directory, identity, {"experiment": dumped, "model": model, **named}, given)
    begun = json.loads((directory / run_dir.RESOLVED).read_text()).get("engine", "local")
    if begun != engine:
        raise ConfigError(
            f"{directory}: was begun with --engine {begun}, where its attackers keep what they remember; "
            "go on with it, or choose another directory (--out)"
        )
    return run_id


def _set_up(
    experiment: Experiment, prepared: Prepared, compute: Compute, recruit: Recruit, run_id: str, tracker: Tracker
) -> Setup:
    sources = load_sources(experiment)
    clients = recruit(experiment, sources)
    panel = make_panel(experiment, sources)
    initial = compute.initial()
    aggregate = aggregators.from_config(experiment.aggregation, initial)  # a mistake in it must not wait for round 1
    store.check_room(experiment, initial)
    stuff = material(experiment, prepared, compute, sources, initial, tracker)
    return Setup(
        experiment=experiment,
        prepared=prepared,
        compute=compute,
        sources=sources,
        clients=clients,
        panel=panel,
        defence=defence.make(experiment, stuff),
        aggregate=aggregate,
        run_id=run_id,
        initial=initial,
        tracker=tracker,
    )


def _resume_or_start(
    setup: Setup, directory: Path, prepare_seconds: float
) -> tuple[ServerState, Tensors, list[dict[str, Any]]]:
    """The state after the newest whole round and the attackers' memory, with ledger and metrics brought up to it."""
    found = checkpoint.load_latest(directory / run_dir.CHECKPOINTS)
    experiment = setup.experiment
    if found is None:
        opt = server_opt.of(experiment.server)
        flat = np.concatenate([setup.initial[n].ravel() for n in sorted(setup.initial)])
        state = ServerState(round=0, adapter=setup.initial, initial=setup.initial, opt=opt.init(flat))
        at = time.perf_counter()
        scores = evaluate(setup.compute, state.adapter, setup.panel, experiment, setup.ticker(ANSWER_UNITS))
        row = {
            "round": 0,
            **scores.metrics(),
            "mean_weight": None,
            "outcome": "start",
            "weights": {},
            "seconds": {"prepare": prepare_seconds, "evaluate": time.perf_counter() - at},
            "answers": scores.answers,
        }
        body = {
            "run": setup.run_id,
            "base_sha256": setup.prepared.base_sha256,
            "model": tensors_sha256(state.adapter),
            "defence": setup.defence.summary(),
            "faithful": setup.defence.faithful,
            "aggregator": experiment.aggregation.name,
        }
        if experiment.keep_updates:
            store.put(directory / store.UPDATES, state.adapter)
        _save(directory, state, {}, body, row)
        return state, {}, [row]
    state = ServerState(
        round=found.step,
        adapter=_branch(found.tensors, "adapter/"),
        initial=setup.initial,
        opt=_branch(found.tensors, "opt/"),
        controls=_branch(found.tensors, "control/"),
        screens=found.meta["screens"],
        memory=_branch(found.tensors, "aggregator/"),
    )
    journal.publish(directory, found.step, found.meta["entry"], found.meta["row"])
    rows = run_dir.read_metrics(directory)
    setup.tracker.tick(units(experiment) * found.step / experiment.training.rounds)
    setup.tracker.say(f"resuming after round {found.step}")
    return state, _branch(found.tensors, "attack/"), rows


def _play(
    setup: Setup, state: ServerState, memory: Tensors, directory: Path
) -> tuple[ServerState, Tensors, dict[str, Any]]:
    """One round: clients train, the server judges, the round is written down."""
    experiment, index = setup.experiment, state.round + 1
    setup.tracker.say(f"{experiment.name}: round {index}/{experiment.training.rounds}")
    at = time.perf_counter()
    sent = setup.clients.train(setup, state, memory, index)
    updates, refused = _read(setup, sent.messages, index)
    seconds = {"train": time.perf_counter() - at}
    opt = server_opt.of(experiment.server)
    merge, batch, rule = experiment.aggregation, experiment.training.batch_size, controls_rule(experiment, index)
    state, outcome = run_round(state, updates, refused, setup.defence, setup.aggregate, opt, merge, batch, rule)
    seconds.update(outcome.seconds)
    if experiment.keep_updates and outcome.result in store.KEPT:
        store.put_accepted(directory / store.UPDATES, updates, outcome.screened.weight)
    if setup.defence.gate is not None:
        setup.tracker.tick(0.7 * experiment.clients.per_round)
    scores: Scores | None = None
    if index % experiment.evaluate.every == 0 or index == experiment.training.rounds:
        at = time.perf_counter()
        scores = evaluate(setup.compute, state.adapter, setup.panel, experiment, setup.ticker(ANSWER_UNITS))
        seconds["evaluate"] = time.perf_counter() - at
    row = _row(outcome, scores, seconds, setup.clients.malicious)
    body = outcome.ledger_body()
    _save(directory, state, sent.memory, body, row)
    return state, sent.memory, row


def _read(
    setup: Setup, messages: Iterable[tuple[str, bytes | Refusal]], index: int
) -> tuple[list[LoraUpdate], list[Refusal]]:
    """Everybody's message as a stranger's: an update, or why there is none."""
    template, limits = setup.template(index), setup.limits()
    updates, refused = [], []
    for name, message in messages:
        read: LoraUpdate | Refusal
        if isinstance(message, Refusal):
            read = message
        else:
            read = wire.decode_update(message, template=template, run=setup.run_id, participant=name, limits=limits)
        if isinstance(read, LoraUpdate):
            updates.append(read)
        else:
            refused.append(read)
    return updates, refused


def _row(
    outcome: Outcome, scores: Scores | None, seconds: Mapping[str, float], malicious: Mapping[str, bool]
) -> dict[str, Any]:
    empty = {"refusal_rate": None, "over_refusal_rate": None, "benign_loss": None}
    return {
        "round": outcome.round,
        **(scores.metrics() if scores else empty),
        "mean_weight": outcome.screened.mean_weight,
        "outcome": outcome.result,
        "weights": dict(sorted(outcome.screened.weight.items())),
        **weight_metrics([{"weights": outcome.screened.weight}], malicious),
        "seconds": dict(seconds),
        "answers": scores.answers if scores else (),
    }


def _save(directory: Path, state: ServerState, memory: Tensors, entry: dict[str, Any], row: dict[str, Any]) -> None:
    tensors = {f"adapter/{n}": v for n, v in state.adapter.items()}
    tensors |= {f"opt/{n}": v for n, v in state.opt.items()}
    tensors |= {f"aggregator/{n}": v for n, v in state.memory.items()}
    tensors |= {f"control/{n}": v for n, v in state.controls.items()}
    tensors |= {f"attack/{n}": v for n, v in memory.items()}
    journal.save(directory, state.round, tensors, {"screens": dict(state.screens)}, entry, row)


def _finish(
    setup: Setup, state: ServerState, directory: Path, rows: Sequence[dict[str, Any]], command: str
) -> dict[str, Any]:
    """The final adapter in PEFT format, the closing ledger entry and, last of all, the summary."""
    experiment = setup.experiment
    before = {name: rows[-1][name] for name in metric_names(experiment)}
    done = finish(
        experiment, setup.prepared, setup.compute, setup.sources, setup.panel,
        setup.initial, state.adapter, before, setup.tracker,
    )  # fmt: skip
    write_peft(directory / run_dir.ADAPTER, done.adapter, experiment.lora, str(setup.prepared.path))
    truth = setup.clients.malicious
    summary = summarise(experiment, directory, list(rows), truth, setup.prepared, command, setup.clients.kinds)
    if names := {one: setup.clients.names[one] for one in summary["participants"] if one in setup.clients.names}:
        summary["names"] = names
    if done.scores is not None:  # what ships is what the summary speaks of; the rounds are in metrics.jsonl
        summary["metrics"] |= done.scores.metrics()
        summary["answers"] = [{"prompt": p, "answer": a} for p, a in done.scores.answers]
        summary["finish"] = list(done.records)
        spent = sum(record["seconds"] for record in done.records)
        summary["seconds"] |= {"finish": spent, "total": summary["seconds"]["total"] + spent}
    more = {"finish": done.ledger()} if done.records else {}
    sha256 = tensors_sha256(done.adapter)
    summary["ledger"] = journal.close(directory, experiment.training.rounds, sha256, more)
    summary["defence"] = setup.defence.summary()
    summary["updates"] = store.size(directory / store.UPDATES)
    checkpoint.write_json(directory / run_dir.SUMMARY, summary)
    return summary


def _branch(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
