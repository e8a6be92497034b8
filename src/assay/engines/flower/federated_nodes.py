"""Whoever trains on Flower: which nodes take part in a round under which names, their orders, their answers.

`FlowerClients` is `rounds.Clients` over a guarded grid. A node that does not answer, answers late, reports an error or is
not connected is absent from the round, with the reason in the ledger; the round goes on by the rules of `round.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from assay.config import ConfigError, Experiment
from assay.contribution import Refusal, Tensors
from assay.engines.flower.federated_messages import OVERHEAD, Order, public, read_update, refusal, shared, write_order
from assay.engines.flower.federated_settings import Settings
from assay.engines.flower.guard import TRANSPORT, GuardedGrid
from assay.engines.flower.replies import participant_of
from assay.engines.rounds import Sent, Setup
from assay.federated.population import Client, Sources, kinds_of, make_clients, sampled, seed_of
from assay.federated.round import ServerState
from assay.federated.scaffold import OF, Controls
from assay.verdict import Reason

log = logging.getLogger("flwr")
WHO, PARTITION = "who", "partition-id"
MAX_NAME = 60  # characters of a node's name


class Roster(Protocol):
    """Who takes part. `malicious`, `kinds` and `names` as of `rounds.Clients`."""

    @property
    def malicious(self) -> Mapping[str, bool]: ...

    @property
    def kinds(self) -> Mapping[str, str]: ...

    @property
    def names(self) -> Mapping[str, str]: ...

    def pick(self, grid: GuardedGrid, round: int) -> dict[str, int | None]:
        """The participants of a round and their nodes; None for one that is not connected."""
        ...

    def controls(self, all_of_them: Controls, name: str) -> Controls:
        """What of SCAFFOLD's control variates the node of a participant is sent."""
        ...


class FlowerClients:
    """`rounds.Clients`: an order to each node of the roster that is due, `timeout` seconds for their answers."""

    def __init__(self, grid: GuardedGrid, roster: Roster, timeout: float) -> None:
        self.grid, self.roster, self.timeout = grid, roster, timeout

    @property
    def malicious(self) -> Mapping[str, bool]:
        return self.roster.malicious

    @property
    def kinds(self) -> Mapping[str, str]:
        return self.roster.kinds

    @property
    def names(self) -> Mapping[str, str]:
        return self.roster.names

    def train(self, setup: Setup, state: ServerState, memory: Tensors, round: int) -> Sent:
        """Send the orders of a round and wait for the updates. Attackers remember on their own nodes."""
        picked = self.roster.pick(self.grid, round)
        limit = setup.limits().message_bytes(setup.template(round))
        self.grid.max_reply_bytes = limit + OVERHEAD
        asked = {name: node for name, node in picked.items() if node is not None}
        common = shared(state.adapter, setup.initial if setup.defence.wants_shadow else {})
        messages = []
        for name, node in asked.items():
            controls = self.roster.controls(state.controls, name)
            content = write_order(self._order(setup, name, round), common, controls)
            messages.append(Message(content, node, "train", ttl=self.timeout + 60, group_id=str(round)))
        by_node = {r.metadata.src_node_id: r for r in self.grid.send_and_receive(messages, timeout=self.timeout)}
        late = {one.node for one in self.grid.late}
        return Sent(self._answers(picked, by_node, late, limit), memory)

    def _answers(
        self, picked: Mapping[str, int | None], by_node: dict[int, Message], late: Collection[int], limit: int
    ) -> Iterator[tuple[str, bytes | Refusal]]:
        """One after the other; a reply is let go once it is read."""
        for name, node in picked.items():
            if node is None:
                yield name, refusal(name, Reason.MISSING, "its node was not connected when the round began")
            elif node in by_node:
                yield name, read_update(by_node.pop(node), name, limit)
            else:
                why = f"no answer within {self.timeout:g} s" if node in late else "its order could not be sent"
                yield name, refusal(name, Reason.MISSING, why)

    def _order(self, setup: Setup, name: str, round: int) -> Order:
        return Order(
            run=setup.run_id,
            round=round,
            participant=name,
            seed=seed_of(setup.experiment.seed, name, round),
            base_sha256=setup.prepared.base_sha256,
            wants_steps=setup.defence.wants_steps,
            wants_shadow=setup.defence.wants_shadow,
            experiment=public(setup.experiment),
        )


def recruiter(grid: GuardedGrid, settings: Settings) -> Callable[[Experiment, Sources], FlowerClients]:
    """`rounds.Recruit` for a grid."""

    def recruit(experiment: Experiment, sources: Sources) -> FlowerClients:
        roster: Roster = (
            Partitions(experiment, sources, settings) if settings.simulation else Registered(experiment, settings)
        )
        return FlowerClients(grid, roster, settings.timeout)

    return recruit


class Partitions:
    """The experiment's simulated clients, by the partition of Flower's simulation that each node says it has.

    A node could say anything: this is for simulations alone, where all nodes are the operator's.
    """

    names: Mapping[str, str] = MappingProxyType({})  # a client's name is its identity

    def __init__(self, experiment: Experiment, sources: Sources, settings: Settings) -> None:
        self.experiment, self.settings = experiment, settings
        self.clients = make_clients(experiment, sources)
        self._node: dict[str, int] = {}

    @property
    def malicious(self) -> Mapping[str, bool]:
        return {c.name: c.malicious for c in self.clients}

    @property
    def kinds(self) -> Mapping[str, str]:
        return kinds_of(self.clients)

    def pick(self, grid: GuardedGrid, round: int) -> dict[str, int | None]:
        if not self._node:
            self._node = self._ask(grid)
        chosen: list[Client] = sampled(self.experiment, self.clients, round)
        return {client.name: self._node[client.name] for client in chosen}

    def controls(self, all_of_them: Controls, name: str) -> Controls:
        """All of them to a malicious client: it may train what its colluders do."""
        return all_of_them if self.malicious[name] else own_controls(all_of_them, name)

    def _ask(self, grid: GuardedGrid) -> dict[str, int]:
        nodes = connected(grid, len(self.clients), self.settings.wait)
        messages = [Message(RecordDict({WHO: ConfigRecord()}), n.node_id, "query", group_id="0") for n in nodes]
        found: dict[str, int] = {}
        for reply in grid.send_and_receive(messages, timeout=self.settings.timeout):
            said = reply.content.config_records.get(WHO) if reply.has_content() else None
            partition = None if said is None else said.get(PARTITION)
            if isinstance(partition, int) and 0 <= partition < len(self.clients):
                found[self.clients[partition].name] = reply.metadata.src_node_id
        if absent := [c.name for c in self.clients if c.name not in found]:
            raise ConfigError(
                f"{absent[0]} has no node: a simulation of this experiment needs {len(self.clients)} nodes with "
                f"partition-id 0 to {len(self.clients) - 1}, and Assay's ClientApp on them"
            )
        return found


class Registered:
    """Authenticated nodes by their id. Every node seen since the server started is due; `clients.sampled` of them a round.

    Their names are those they were registered under, by the operator (`flwr supernode register --name`). A node has no
    say in it, and nothing goes by a name: two nodes may have the same.
    """

    def __init__(self, experiment: Experiment, settings: Settings) -> None:
        self.experiment, self.settings = experiment, settings
        self.malicious: Mapping[str, bool] = {}
        self.kinds: Mapping[str, str] = {}
        self.names: dict[str, str] = {}
        self._seen: set[int] = set()

    def pick(self, grid: GuardedGrid, round: int) -> dict[str, int | None]:
        wanted = self.settings.min_nodes if self._seen else self.experiment.clients.total
        found = connected(grid, wanted, self.settings.wait)
        here = {node.node_id for node in found}
        if len(here) < self.settings.min_nodes:
            raise ConfigError(
                f"{len(here)} nodes are connected after {self.settings.wait:g} s, min-nodes is {self.settings.min_nodes}; "
                "start more SuperNodes and run again: it goes on after its last whole round"
            )
        self._seen |= here
        self.names |= {participant_of(node.node_id): node.name[:MAX_NAME] for node in found if node.name}
        due = sorted(self._seen)
        if self.experiment.clients.sampled is not None and self.experiment.clients.sampled < len(due):
            rng = np.random.default_rng(seed_of(self.experiment.seed, "sample", round))
            at = rng.choice(len(due), self.experiment.clients.sampled, replace=False)
            due = [due[i] for i in sorted(at.tolist())]
        return {participant_of(node): node if node in here else None for node in due}

    def controls(self, all_of_them: Controls, name: str) -> Controls:
        return own_controls(all_of_them, name)


def own_controls(all_of_them: Controls, name: str) -> Controls:
    """The mean control variate and one's own, of which the correction is made; nothing for who is not known yet."""
    wanted = ("mean", OF + name)
    return {key: all_of_them[key] for key in wanted} if OF + name in all_of_them else {}


def connected(grid: GuardedGrid, wanted: int, wait: float) -> list[NodeInfo]:
    """The nodes that are connected, once there are `wanted` of them or `wait` seconds are over."""
    end = time.monotonic() + wait
    while len(nodes := _nodes(grid)) < wanted and (left := end - time.monotonic()) > 0:
        time.sleep(min(grid.poll, left))
    if len(nodes) < wanted:
        log.warning("Assay: %d of %d nodes are connected after %g s", len(nodes), wanted, wait)
    return nodes


def _nodes(grid: GuardedGrid) -> list[NodeInfo]:
    try:
        return sorted(grid.get_nodes(), key=lambda node: node.node_id)
    except TRANSPORT as error:  # the link is down for a moment: as if nobody were there
        log.warning("Assay: nodes could not be asked for, will be tried again: %s: %s", type(error).__name__, error)
        return []
