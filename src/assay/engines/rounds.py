"""A federated run from its first round to its summary, whoever trains its clients.

Engines differ in one thing: how a round's bytes come about (`Clients`). All that follows is here and the same for all
of them: reading the bytes, screens, aggregate, server optimiser, gate, ledger, metrics, last steps, summary. A run is
resumable at any point, also after SIGKILL (journal.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from assay import checkpoint, run_dir, track, wire
from assay.config import Experiment
from assay.contribution import LoraUpdate, Refusal, Tensors, tensors_sha256
from assay.engines import journal, standing
from assay.engines.setup import ANSWER_UNITS, Clients, Recruit, Sent, Setup, train_units, units
from assay.federated import aggregators, defence, server_opt, store
from assay.federated.compute import Compute
from assay.federated.evaluate import Scores, evaluate, make_panel, metric_names
from assay.federated.finish import finish
from assay.federated.lora import write_peft
from assay.federated.population import load_sources, make_attack
from assay.federated.preparation import Prepared, controls_rule, material
from assay.federated.round import Outcome, ServerState, run_round
from assay.federated.summary import summarise, weight_metrics
from assay.progress import Silent, Tracker

__all__ = ["Clients", "Recruit", "Sent", "Setup", "run", "train_units", "units"]


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
    track.check(experiment.track)
    with journal.locked(directory):
        run_id = standing.claim(directory, experiment, prepared, given, engine)
        finished = run_dir.read_summary(directory)
        if finished is not None:
            with track.following(experiment, directory):  # one that was switched on later
                return finished
        started = time.perf_counter()
        setup = _set_up(experiment, prepared, compute, recruit, run_id, tracker)
        prepare_seconds = time.perf_counter() - started
        state, memory, rows = standing.resume_or_start(setup, directory, prepare_seconds)
        with track.following(experiment, directory) as written:
            while state.round < experiment.training.rounds:
                state, memory, row = _play(setup, state, memory, directory)
                rows.append(row)
                written()
            return _finish(setup, state, directory, rows, command)


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
    standing.save(directory, state, sent.memory, body, row)
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
