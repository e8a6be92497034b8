"""Everything on one machine: clients in worker processes, the server in this one.

A run is resumable at any point, also after SIGKILL (journal.py). Clients' messages go through the wire like a stranger's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from assay import checkpoint, run_dir, wire
from assay.config import Experiment
from assay.contribution import LoraUpdate, Refusal, Template, Tensors, tensors_sha256
from assay.engines import journal
from assay.engines.pool import Pool
from assay.federated import aggregators, defence, seats, server_opt, store
from assay.federated.attacks import Sending
from assay.federated.compute import Compute
from assay.federated.defence import Defence
from assay.federated.evaluate import Panel, Scores, evaluate, make_panel, metric_names
from assay.federated.finish import finish
from assay.federated.lora import write_peft
from assay.federated.population import Client, Sources, kinds_of, load_sources, make_attack, make_clients, sampled
from assay.federated.preparation import Prepared, client_settings, controls_rule, material, prepare
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
    clients: tuple[Client, ...]
    panel: Panel
    defence: Defence
    aggregate: aggregators.Aggregator
    run_id: str
    initial: Tensors
    table: seats.Table
    tracker: Tracker


def run(
    experiment: Experiment,
    directory: Path,
    prepared: Prepared,
    compute: Compute,
    *,
    given: str = "",
    command: str = "",
    tracker: Tracker | None = None,
) -> dict[str, Any]:
    """Run or resume `experiment` in `directory`; returns the summary. A finished run is returned as it is."""
    tracker = tracker or Silent()
    run_dir.commit()
    make_attack(experiment)  # a misspelt attack must not claim the directory
    with journal.locked(directory):
        run_id = _claim(directory, experiment, prepared, given)
        finished = run_dir.read_summary(directory)
        if finished is not None:
            return finished
        started = time.perf_counter()
        setup = _set_up(experiment, prepared, compute, run_id, tracker)
        prepare_seconds = time.perf_counter() - started
        state, memory, rows = _resume_or_start(setup, directory, prepare_seconds)
        while state.round < experiment.training.rounds:
            state, memory, row = _play(setup, state, memory, directory)
            rows.append(row)
        return _finish(setup, state, directory, rows, command)


def run_experiment(experiment: Experiment, directory: str | Path, tracker: Tracker | None = None) -> dict[str, Any]:
    """Prepare the base, start the workers, run or resume, return the summary: everything in one call."""
    tracker = tracker or Silent()
    prepared = prepare(experiment, tracker)
    with Pool(str(prepared.path), prepared.dtype, experiment.lora, experiment.workers) as pool:
        return run(experiment, Path(directory), prepared, pool, tracker=tracker)


def units(experiment: Experiment) -> float:
    """Rough seconds of one core a run takes, for progress bars."""
    training, evaluation = experiment.training, experiment.evaluate
    rounds, clients = training.rounds, experiment.clients.per_round
    each = _train_units(experiment) + (0.7 if defence.reads_model(experiment) else 0)
    evaluations = 2 + (rounds - 1) // evaluation.every
    return rounds * clients * each + evaluations * _evaluate_units(experiment)


def _train_units(experiment: Experiment) -> float:
    training = experiment.training
    branches = 2 if defence.wants_shadow(experiment) else 1
    return TRAIN_UNITS * training.steps * branches * training.batch_size * training.max_length / (8 * 48)


def _evaluate_units(experiment: Experiment) -> float:
    config = experiment.evaluate
    return ANSWER_UNITS * (config.harmful_prompts + config.benign_prompts) / 20


def _claim(directory: Path, experiment: Experiment, prepared: Prepared, given: str) -> str:
    # how many workers and where the data folder lies changes no number
    dumped = experiment.model_dump(mode="json", exclude={"workers": True, "data": {"root"}})
    model = {"sha256": prepared.base_sha256, "dtype": prepared.dtype, "alignment": prepared.alignment}
    identity = {"experiment": dumped, "model": prepared.base_sha256, "dtype": prepared.dtype}
    return journal.claim(directory, identity, {"experiment": dumped, "model": model}, given)


def _set_up(experiment: Experiment, prepared: Prepared, compute: Compute, run_id: str, tracker: Tracker) -> Setup:
    sources = load_sources(experiment)
    clients = tuple(make_clients(experiment, sources))
    panel = make_panel(experiment, sources)
    initial = compute.initial()
    aggregate = aggregators.from_config(experiment.aggregation, initial)  # a mistake in it must not wait for round 1
    store.check_room(experiment, initial)
    stuff = material(experiment, prepared, compute, sources, initial, tracker)
    guard = defence.make(experiment, stuff)
    return Setup(
        experiment=experiment,
        prepared=prepared,
        compute=compute,
        sources=sources,
        clients=clients,
        panel=panel,
        defence=guard,
        aggregate=aggregate,
        run_id=run_id,
        initial=initial,
        table=seats.make_table(experiment, sources, clients, initial, guard),
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
        scores = evaluate(setup.compute, state.adapter, setup.panel, experiment, _ticker(setup, ANSWER_UNITS))
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
    updates, refused, memory = _collect(setup, state, memory, index)
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
        scores = evaluate(setup.compute, state.adapter, setup.panel, experiment, _ticker(setup, ANSWER_UNITS))
        seconds["evaluate"] = time.perf_counter() - at
    row = _row(outcome, scores, seconds, {c.name: c.malicious for c in setup.clients})
    body = outcome.ledger_body()
    _save(directory, state, memory, body, row)
    return state, memory, row


def _collect(
    setup: Setup, state: ServerState, memory: Tensors, index: int
) -> tuple[list[LoraUpdate], list[Refusal], Tensors]:
    """Let the sampled clients train, and read their messages as strangers'."""
    experiment = setup.experiment
    chosen = sampled(experiment, setup.clients, index)
    settings = client_settings(experiment, index)
    turns = seats.turns(setup.table, chosen, index, state.adapter, settings, memory, state.controls)
    jobs = [job for turn in turns for job in turn.jobs.values()]
    results = iter(setup.compute.train(jobs, _ticker(setup, _train_units(experiment) * len(turns) / len(jobs))))
    made = [{name: next(results) for name in turn.jobs} for turn in turns]
    sent, memory = seats.send(setup.table, turns, made, state.adapter, memory)
    template = Template(
        shapes={name: tuple(value.shape) for name, value in state.adapter.items()},
        base_sha256=setup.prepared.base_sha256,
        round=index,
    )
    updates, refused = [], []
    limits = setup.defence.limits(experiment.training.steps)
    for client, sending in zip(chosen, sent):
        message = _message(setup, client, index, sending)
        read = wire.decode_update(message, template=template, run=setup.run_id, participant=client.name, limits=limits)
        if isinstance(read, LoraUpdate):
            updates.append(read)
        else:
            refused.append(read)
    return updates, refused, memory


def _message(setup: Setup, client: Client, index: int, sending: Sending) -> bytes:
    """The client's side: what it sends."""
    update = LoraUpdate(
        participant=client.name,
        round=index,
        base_sha256=setup.prepared.base_sha256,
        tensors=sending.tensors,
        sha256=tensors_sha256(sending.tensors),
        num_examples=sending.num_examples,
        steps=sending.steps,
        shadow=sending.shadow,
    )
    return wire.encode_update(update, run=setup.run_id)


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
    truth = {c.name: c.malicious for c in setup.clients}
    kinds = kinds_of(setup.clients)
    summary = summarise(experiment, directory, list(rows), truth, setup.prepared, command, kinds)
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


def _ticker(setup: Setup, units_each: float) -> Any:
    return lambda count: setup.tracker.tick(units_each * count)


def _branch(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
