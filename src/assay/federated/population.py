"""Who the clients are and whose rows are whose.

Every source is split by content into the operator's part, the clients' part and a held-out part (data.part): the
probe, the canary and the thresholds never see a row that a client trains on or that an evaluation asks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from assay import data
from assay.config import ConfigError, Experiment
from assay.data import BUILTIN, HUB, Example
from assay.federated import partition
from assay.federated.attacks import Attack, make

Kind = Literal["iid", "skewed", "stranger"]


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything printable; independent streams for every purpose, client and round."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class Sources:
    """The rows an experiment reads, whole; `held_prompts` are harmful instructions for evaluation.

    `origin` names the source of each benign row. `strangers` are the rows of each of `data.strangers`, empty where no
    client is one: they are no part of the fingerprint, because nothing that is cached has seen them. `operator` holds
    the rows of `data.operator`, by kind, where given.
    """

    benign: tuple[Example, ...]
    refusals: tuple[Example, ...]
    malicious: tuple[Example, ...]
    held_prompts: tuple[Example, ...]
    origin: tuple[str, ...] = ()
    strangers: tuple[tuple[Example, ...], ...] = ()
    operator: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)

    def fingerprint(self) -> str:
        own = [row for name in sorted(self.operator) for row in self.operator[name]]
        return data.fingerprint([*self.benign, *self.refusals, *self.malicious, *own])

    def of_operator(self, kind: Literal["benign", "refusals", "malicious"]) -> list[Example]:
        """The operator's part of its own rows of a kind, or of the clients' where it has none. The same request is in the
        same part of every set, so none is also a client's or held out."""
        return data.part(self.operator.get(kind, getattr(self, kind)), "operator")


def load_sources(experiment: Experiment) -> Sources:
    """Read every source of the config. Prompts for evaluation are held out even where their set also feeds training."""
    config = experiment.data

    def read(source: str) -> list[Example]:
        if source in BUILTIN or source in HUB:
            file = Path(config.root) / config.files[source] if source in config.files else None
            return data.load(source, limit=config.hub_rows if source in HUB else None, file=file)
        return data.load(str(Path(config.root) / source) if source.endswith(".jsonl") else source)

    benign = [(source, row) for source in config.benign for row in read(source)]
    refusals = [row for source in config.refusals for row in read(source)]
    prompts = read(config.harmful_prompts)
    own = config.operator
    if config.harmful_prompts in (*config.refusals, config.malicious, *(own.refusals or ()), own.malicious):
        prompts = data.part(prompts, "heldout")
    return Sources(
        tuple(row for _, row in benign),
        tuple(refusals),
        tuple(read(config.malicious)),
        tuple(prompts),
        origin=tuple(source for source, _ in benign),
        strangers=tuple(tuple(read(s)) for s in config.strangers if experiment.clients.stranger_count),
        operator={
            kind: tuple(row for s in ((named,) if isinstance(named, str) else named) for row in read(s))
            for kind, named in config.operator
            if named is not None
        },
    )


@dataclass(frozen=True, slots=True)
class Client:
    """One simulated client. `malicious` and `kind` are the simulation's truth: no screen ever sees them."""

    name: str
    malicious: bool
    clean: tuple[Example, ...]
    harmful: tuple[Example, ...]
    kind: Kind = "iid"


def make_clients(experiment: Experiment, sources: Sources) -> list[Client]:
    """Clients with disjoint rows. Which ones are malicious is drawn from the seed, so names tell nothing."""
    config, seed = experiment.clients, experiment.seed
    rng = np.random.default_rng(seed_of(seed, "roles"))
    bad = set(rng.permutation(config.total)[: config.malicious_count].tolist())
    honest = [i for i in range(config.total) if i not in bad]
    odd = partition.strangers(honest, config.stranger_count, seed_of(seed, "strangers"))
    size_N = partition.sizes(
        config.total, config.examples, config.size_spread, experiment.training.batch_size, seed_of(seed, "sizes")
    )
    refusal_N = [int(size * experiment.data.refusal_share + 0.5) for size in size_N]
    # malicious clients are dealt clean rows whether their attack reads them or not, and last: an honest client then has
    # the same rows under every attack, and runs can be compared
    mixed = [i for i in (*honest, *sorted(bad)) if i not in odd]
    benign = _benign(experiment, sources, {i: size_N[i] - refusal_N[i] for i in mixed})
    refusals = _Deal(sources.refusals, seed, "data.refusals")
    harmful = _Deal(sources.malicious, seed, "data.malicious")
    unseen = [_Deal(rows, seed, f"data.strangers.{s}") for rows, s in zip(sources.strangers, experiment.data.strangers)]
    out = {}
    for i in (*honest, *sorted(bad)):
        if i in odd:  # refusals are rows the server knows: a stranger has none
            clean = unseen[odd.index(i) % len(unseen)].take(size_N[i])
        else:
            clean = data.shuffled([*benign[i], *refusals.take(refusal_N[i])], seed_of(seed, "clean", i))
        rows = harmful.take(size_N[i]) if i in bad else []
        kind: Kind = "stranger" if i in odd else "skewed" if config.partition == "dirichlet" else "iid"
        out[i] = Client(f"client-{i:02d}", i in bad, tuple(clean), tuple(rows), kind)
    return [out[i] for i in range(config.total)]


def _benign(experiment: Experiment, sources: Sources, wanted: Mapping[int, int]) -> dict[int, list[Example]]:
    """Benign rows of each client by number: dealt in turn, or by its own mixture of topics."""
    config, seed = experiment.clients, experiment.seed
    deal = _Deal(sources.benign, seed, "data.benign")
    if config.partition == "iid":
        return {i: deal.take(count) for i, count in wanted.items()}
    topic = dict(zip(sources.benign, partition.topics(sources.benign, sources.origin)))
    topic_R = [topic[row] for row in deal.rows]
    chosen = partition.dirichlet(topic_R, list(wanted.values()), config.alpha, seed_of(seed, "dirichlet"))
    return {i: [deal.rows[r] for r in own] for i, own in zip(wanted, chosen)}


def kinds_of(clients: Sequence[Client]) -> dict[str, str]:
    """Kind of each honest client; {} where all are iid, as nothing is to be told apart then."""
    kinds = {c.name: str(c.kind) for c in clients if not c.malicious}
    return kinds if set(kinds.values()) - {"iid"} else {}


def make_attack(experiment: Experiment) -> Attack:
    """The attack the experiment names; ConfigError for an unknown name or parameter."""
    config = experiment.attack
    return make(config.name, config.params, mix=config.mix, from_round=config.from_round)


def sampled(experiment: Experiment, clients: Sequence[Client], round: int) -> list[Client]:
    """The clients of a round: all of them, or a draw without replacement from the run's seed."""
    count = experiment.clients.per_round
    if count == len(clients):
        return list(clients)
    rng = np.random.default_rng(seed_of(experiment.seed, "sample", round))
    return [clients[i] for i in sorted(rng.choice(len(clients), count, replace=False).tolist())]


class _Deal:
    """Deals the clients' part of a source, each row once."""

    def __init__(self, rows: Sequence[Example], seed: int, key: str) -> None:
        self.rows = data.shuffled(data.part(rows, "clients"), seed_of(seed, key))
        self._at, self._key = 0, key

    def take(self, count: int) -> list[Example]:
        taken = self.rows[self._at : self._at + count]
        self._at += count
        if len(taken) < count:
            raise ConfigError(
                f"{self._key}: its clients' part has {len(self.rows)} rows, more are needed; "
                "lower clients.examples or clients.total, or name more data"
            )
        return taken
