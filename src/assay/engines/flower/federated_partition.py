"""A simulated client at its Flower node: the rows, the seed and the attack seat that the `local` engine gives it.

An honest one trains its rows as any node does. A malicious one plays its seat: it knows what its attack may know, and
trains for itself what it would see of its colluders or, if omniscient, of the honest clients, when the attack looks at
it. So a round's messages are those of `local`, at the price of these further trainings. What attackers remember lies in
`attack/` of the run directory, where their leader writes it: nodes of a simulation are on one machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from assay import checkpoint
from assay.config import ConfigError, Experiment
from assay.contribution import Tensors
from assay.engines.flower.federated_messages import Received
from assay.engines.flower.federated_settings import Settings
from assay.federated import defence, seats
from assay.federated.attacks import Sending
from assay.federated.compute import Compute
from assay.federated.local_sft import LocalResult
from assay.federated.population import Client, Sources, load_sources, make_clients, sampled
from assay.federated.preparation import client_settings, material, prepare
from assay.progress import Silent

MEMORY = "attack"
NAME = re.compile(r"(\d{6,})\.safetensors")


@dataclass(frozen=True, slots=True)
class World:
    """The simulation as every node of it can work it out."""

    experiment: Experiment
    sources: Sources
    clients: tuple[Client, ...]


@lru_cache(maxsize=1)
def world_of(dumped: str) -> World:
    """Of an experiment as JSON."""
    experiment = Experiment.model_validate_json(dumped)
    sources = load_sources(experiment)
    return World(experiment, sources, tuple(make_clients(experiment, sources)))


def client_of(settings: Settings, partition: int) -> Client:
    """The simulated client of a partition."""
    clients = world_of(settings.experiment.model_dump_json()).clients
    if not 0 <= partition < len(clients):
        raise ConfigError(f"partition-id is {partition}, the experiment has {len(clients)} clients")
    return clients[partition]


def attack(settings: Settings, me: Client, received: Received, compute: Compute) -> Sending:
    """What a malicious client sends in answer to its order."""
    world, order = world_of(settings.experiment.model_dump_json()), received.order
    experiment, start = world.experiment, received.adapter
    initial = compute.initial()
    table = _table(settings.experiment.model_dump_json(), compute, initial)
    chosen = sampled(experiment, world.clients, order.round)
    folder = settings.out / MEMORY
    memory = read_memory(folder, order.round)
    asked = client_settings(experiment, order.round)
    turns = seats.turns(table, chosen, order.round, start, asked, memory, received.controls)
    made, at = Trained(turns, compute), chosen.index(me)
    seen_ND = seats.honest_deltas(table, turns, made, start)
    sending = seats.sending_of(table, turns, made, start, at, seen_ND)
    seat = turns[at].seat
    if seat is not None and seat.place == 0:
        write_memory(folder, order.round, seats.remembered(table, turns, made, at, seen_ND))
    return sending


_tables: dict[str, seats.Table] = {}


def _table(dumped: str, compute: Compute, initial: Tensors) -> seats.Table:
    """What the attackers of a run have in common; the defence comes out of the cache that the server filled."""
    if dumped not in _tables:
        world = world_of(dumped)
        stuff = material(
            world.experiment, prepare(world.experiment, Silent()), compute, world.sources, initial, Silent()
        )
        guard = defence.make(world.experiment, stuff)
        _tables.clear()
        _tables[dumped] = seats.make_table(world.experiment, world.sources, world.clients, initial, guard)
    return _tables[dumped]


class Trained(Sequence[Mapping[str, LocalResult]]):
    """The trained branches of each turn, trained when they are first asked for."""

    def __init__(self, turns: Sequence[seats.Turn], compute: Compute) -> None:
        self.turns, self.compute = turns, compute
        self._made: dict[int, Mapping[str, LocalResult]] = {}

    def __len__(self) -> int:
        return len(self.turns)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if at not in self._made:
            jobs = self.turns[at].jobs
            self._made[at] = dict(zip(jobs, self.compute.train(list(jobs.values()))))
        return self._made[at]


def write_memory(folder: Path, round: int, memory: Tensors) -> None:
    """Keep what attackers know after `round`; the last three rounds stay, for a server that goes back one."""
    arrays = {name: np.asarray(value, np.float32, order="C") for name, value in sorted(memory.items())}
    checkpoint.write_atomic(folder / f"{round:06d}.safetensors", bytes(save_safetensors(arrays)))
    for old in _rounds(folder):
        if old < round - 2:
            (folder / f"{old:06d}.safetensors").unlink(missing_ok=True)


def read_memory(folder: Path, round: int) -> Tensors:
    """What they knew when `round` began, also where a later file was left by a server that was killed."""
    known = [found for found in _rounds(folder) if found < round]
    return load_safetensors((folder / f"{max(known):06d}.safetensors").read_bytes()) if known else {}


def _rounds(folder: Path) -> list[int]:
    found = [NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in found if match)
