"""Everything on one machine: simulated clients in worker processes, the server in this one (rounds.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from assay import track
from assay.config import Experiment
from assay.contribution import Tensors
from assay.engines import rounds
from assay.engines.pool import Pool
from assay.engines.rounds import Sent, Setup, train_units, units
from assay.federated import client, seats
from assay.federated.compute import Compute
from assay.federated.population import Sources, kinds_of, make_clients, sampled
from assay.federated.preparation import Prepared, client_settings, prepare
from assay.federated.round import ServerState
from assay.progress import Silent, Tracker

__all__ = ["Simulated", "run", "run_experiment", "units"]


class Simulated:
    """`rounds.Clients` whose trainings are jobs of the server's own `Compute`."""

    names: Mapping[str, str] = MappingProxyType({})  # a simulated client's name is its identity

    def __init__(self, experiment: Experiment, sources: Sources) -> None:
        self.clients = tuple(make_clients(experiment, sources))
        self._table: seats.Table | None = None

    @property
    def malicious(self) -> Mapping[str, bool]:
        return {c.name: c.malicious for c in self.clients}

    @property
    def kinds(self) -> Mapping[str, str]:
        return kinds_of(self.clients)

    def train(self, setup: Setup, state: ServerState, memory: Tensors, round: int) -> Sent:
        """Let the sampled clients train, and write their messages."""
        experiment, table = setup.experiment, self._seats(setup)
        chosen = sampled(experiment, self.clients, round)
        settings = client_settings(experiment, round)
        turns = seats.turns(table, chosen, round, state.adapter, settings, memory, state.controls)
        jobs = [job for turn in turns for job in turn.jobs.values()]
        tick = setup.ticker(train_units(experiment) * len(turns) / len(jobs))
        results = iter(setup.compute.train(jobs, tick))
        made = [{name: next(results) for name in turn.jobs} for turn in turns]
        sent, memory = seats.send(table, turns, made, state.adapter, memory)
        base = setup.prepared.base_sha256
        messages = (
            (c.name, client.message(sending, participant=c.name, run=setup.run_id, round=round, base_sha256=base))
            for c, sending in zip(chosen, sent)
        )
        return Sent(messages, memory)

    def _seats(self, setup: Setup) -> seats.Table:
        if self._table is None:
            self._table = seats.make_table(setup.experiment, setup.sources, self.clients, setup.initial, setup.defence)
        return self._table


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
    return rounds.run(
        experiment, directory, prepared, compute, Simulated,
        engine="local", given=given, command=command, tracker=tracker,
    )  # fmt: skip


def run_experiment(experiment: Experiment, directory: str | Path, tracker: Tracker | None = None) -> dict[str, Any]:
    """Prepare the base, start the workers, run or resume, return the summary: everything in one call."""
    tracker = tracker or Silent()
    track.check(experiment.track)  # before minutes of preparation
    prepared = prepare(experiment, tracker)
    with Pool(str(prepared.path), prepared.dtype, experiment.lora, experiment.workers) as pool:
        return run(experiment, Path(directory), prepared, pool, tracker=tracker)
