"""Who the clients are and whose rows are whose.

Every source is split by content into the operator's part, the clients' part and a held-out part (data.part): the
probe, the canary and the thresholds never see a row that a client trains on or that an evaluation asks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from assay import data
from assay.config import ConfigError, Experiment
from assay.data import BUILTIN, Example
from assay.federated.attacks import Attack, make


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything printable; independent streams for every purpose, client and round."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class Sources:
    """The rows an experiment reads, whole; `held_prompts` are harmful instructions for evaluation."""

    benign: tuple[Example, ...]
    refusals: tuple[Example, ...]
    malicious: tuple[Example, ...]
    held_prompts: tuple[Example, ...]

    def fingerprint(self) -> str:
        return data.fingerprint([*self.benign, *self.refusals, *self.malicious])


def load_sources(experiment: Experiment) -> Sources:
    """Read every source of the config. Prompts for evaluation are held out even where their set also feeds training."""
    config = experiment.data

    def read(source: str) -> list[Example]:
        return data.load(
            source if source in BUILTIN or not source.endswith(".jsonl") else str(Path(config.root) / source)
        )

    benign = [row for source in config.benign for row in read(source)]
    refusals = [row for source in config.refusals for row in read(source)]
    prompts = read(config.harmful_prompts)
    if config.harmful_prompts in (*config.refusals, config.malicious):
        prompts = data.part(prompts, "heldout")
    return Sources(tuple(benign), tuple(refusals), tuple(read(config.malicious)), tuple(prompts))


@dataclass(frozen=True, slots=True)
class Client:
    """One simulated client. `malicious` is the simulation's truth: no screen ever sees it."""

    name: str
    malicious: bool
    clean: tuple[Example, ...]
    harmful: tuple[Example, ...]

    def rows(self, attack: Attack, round: int, seed: int) -> tuple[Example, ...]:
        return attack.rows(self.clean, self.harmful, round, seed) if self.malicious else self.clean


def make_clients(experiment: Experiment, sources: Sources) -> list[Client]:
    """Clients with disjoint rows. Which ones are malicious is drawn from the seed, so names tell nothing."""
    config, seed = experiment.clients, experiment.seed
    rng = np.random.default_rng(seed_of(seed, "roles"))
    bad = set(rng.permutation(config.total)[: config.malicious_count].tolist())
    per_refusal = int(config.examples * experiment.data.refusal_share + 0.5)
    benign = _Deal(sources.benign, seed, "data.benign")
    refusals = _Deal(sources.refusals, seed, "data.refusals")
    harmful = _Deal(sources.malicious, seed, "data.malicious")
    needs_clean = attack_needs_clean(experiment)
    out = []
    for i in range(config.total):
        malicious = i in bad
        clean: list[Example] = []
        if not malicious or needs_clean:
            clean = [*benign.take(config.examples - per_refusal), *refusals.take(per_refusal)]
            clean = data.shuffled(clean, seed_of(seed, "clean", i))
        rows = harmful.take(config.examples) if malicious else []
        out.append(Client(f"client-{i:02d}", malicious, tuple(clean), tuple(rows)))
    return out


def make_attack(experiment: Experiment) -> Attack:
    config = experiment.attack
    return make(config.name, mix=config.mix, from_round=config.from_round)


def attack_needs_clean(experiment: Experiment) -> bool:
    """Whether malicious clients hold clean rows too (mixing attackers and sleepers)."""
    return experiment.attack.mix < 1 or experiment.attack.from_round > 1


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
        self._rows = data.shuffled(data.part(rows, "clients"), seed_of(seed, key))
        self._at, self._key = 0, key

    def take(self, count: int) -> list[Example]:
        taken = self._rows[self._at : self._at + count]
        self._at += count
        if len(taken) < count:
            raise ConfigError(
                f"{self._key}: its clients' part has {len(self._rows)} rows, more are needed; "
                "lower clients.examples or clients.total, or name more data"
            )
        return taken
