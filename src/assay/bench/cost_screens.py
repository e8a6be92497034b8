"""What the default level costs in a federated round, against the round's own local training.

The demo's round with honest clients only: all of them train, then every screen and the gate look, on the same threads.
The canary knows the round's start already, as in every round but the first: what it measures is each client's update
and the aggregate. Clients' seconds are added up, for one machine plays them all; where each trains on its own, the
server's seconds stand beside N machines that do other things meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from assay import models
from assay.bench.cost_settings import Settings
from assay.bench.turns import Say, Side, Stopwatch, Turn, ratio, take
from assay.config import Experiment
from assay.contribution import LoraUpdate, Round, Tensors, flatten, tensors_sha256, unflatten
from assay.federated import defence
from assay.federated.canary import Canary, Measure
from assay.federated.compute import Serial, TrainJob
from assay.federated.defence import GATE, Defence
from assay.federated.lora import Carrier
from assay.federated.population import load_sources, make_clients, seed_of
from assay.federated.preparation import Prepared, client_settings, material, prepare
from assay.progress import Silent
from assay.verdict import screen_round

FILTERS = ("structure", "norm", "probe", "neighbours")


def experiment_of(settings: Settings) -> Experiment:
    """The demo's, with honest clients only."""
    return Experiment().changed(
        seed=settings.seed, model__name=settings.model, model__dtype=settings.dtype, clients__total=settings.clients,
        clients__malicious=0.0, training__rounds=1,
    )  # fmt: skip


def screening(settings: Settings, say: Say) -> dict[str, Any]:
    """A row a stage; shares of the demo's local training, and of the paper's number of steps and rows."""
    experiment = experiment_of(settings)
    prepared = prepare(experiment, Silent())
    compute = Serial(Carrier(models.load(str(prepared.path), prepared.dtype), experiment.lora))
    initial, clients = compute.initial(), make_clients(experiment, load_sources(experiment))
    local = client_settings(experiment, 1)
    jobs = [TrainJob(initial, c.clean, replace(local, seed=seed_of(settings.seed, c.name))) for c in clients]
    longer = replace(local, steps=settings.paper_steps, batch_size=settings.paper_batch)
    long_job = replace(jobs[0], settings=longer)
    made = [result.tensors for result in compute.train(jobs)]
    stages: dict[str, Side] = {name: Side() for name in (*defence.names(experiment),)}
    sides = take(
        {
            "training": lambda: compute.train(jobs),
            "training, the paper's steps": lambda: compute.train([long_job]),
            "screens": lambda: _screen(experiment, prepared, compute, initial, made, stages),
        },
        settings.repeats, say,
    )  # fmt: skip
    for stage in stages.values():
        del stage.turns[0]  # the turn that is not measured
    training, longer_one = sides["training"], sides["training, the paper's steps"]
    filters, canary = _sum(stages, FILTERS), _sum(stages, ("canary", GATE))
    whole = f"{local.steps} steps of {local.batch_size} rows"
    paper = f"{longer.steps} steps of {longer.batch_size} rows"
    share = 1 / len(clients)  # of that training one client's was measured
    return {
        "model": experiment.model.name,
        "dtype": prepared.dtype,
        "clients": len(clients),
        "canary_rows": experiment.defence.canary.refusals + experiment.defence.canary.safe,
        "rows": [
            training.row(f"training, {len(clients)} clients, {whole}"),
            longer_one.row(f"training, 1 client, {paper}"),
            *(side.row(name) for name, side in stages.items()),
        ],
        "ratios": [
            ratio(f"{', '.join(FILTERS)} / training ({whole})", filters, training, 0.01),
            ratio(f"canary and gate / training ({whole})", canary, training, 0.05),
            ratio(f"the whole level / training ({whole})", _sum(stages, tuple(stages)), training),
            ratio(f"{', '.join(FILTERS)} / training ({paper})", filters, longer_one, 0.01, part=share),
            ratio(f"canary and gate / training ({paper})", canary, longer_one, 0.05, part=share),
        ],
    }


def _screen(
    experiment: Experiment, prepared: Prepared, compute: Serial, initial: Tensors, made: Sequence[Tensors],
    stages: dict[str, Side],
) -> Turn:  # fmt: skip
    """All screens and the gate on a round of these updates; each one's seconds go to its stage."""
    # made anew: a Measure remembers, and the next turn must not find what this one measured
    judge = fresh_defence(experiment, prepared, compute, initial)
    _measure_of(judge)([initial])
    updates = tuple(
        LoraUpdate(participant=f"client-{i:02d}", round=1, base_sha256="", tensors=t, sha256=tensors_sha256(t))
        for i, t in enumerate(made)
    )
    round = Round(index=1, start=initial, initial=initial, updates=updates, batch_size=1)
    whole = Stopwatch()
    whole.start()
    screened = screen_round(round, judge.screens)
    weight_N = np.array([screened.weight[u.participant] for u in updates])
    mean_D = flatten(initial) + np.average(round.deltas(), axis=0, weights=weight_N if weight_N.any() else None)
    whole.stop()
    for screen in judge.screens:
        seconds = sum(v.seconds for v in screened.verdicts if v.screen == screen.name)
        stages[screen.name].turns.append(Turn(seconds, 0))
    watch = Stopwatch()
    watch.start()
    assert judge.gate is not None
    judge.gate.check(unflatten(mean_D, initial), initial, initial)
    watch.stop()
    stages[GATE].turns.append(watch.turn)
    return Turn(whole.turn.seconds + watch.turn.seconds, max(whole.turn.memory_bytes, watch.turn.memory_bytes))


def fresh_defence(experiment: Experiment, prepared: Prepared, compute: Serial, initial: Tensors) -> Defence:
    """The experiment's level, its rehearsal from the cache where it is there, its canary without any memory."""
    stuff = material(experiment, prepared, compute, load_sources(experiment), initial, Silent())
    return defence.make(experiment, stuff)


def _measure_of(judge: Defence) -> Measure:
    return next(screen.measure for screen in judge.screens if isinstance(screen, Canary))


def _sum(stages: dict[str, Side], names: Sequence[str]) -> Side:
    """Several stages as one, turn by turn."""
    turns = zip(*(stages[name].turns for name in names))
    return Side([Turn(sum(t.seconds for t in each), 0) for each in turns])
