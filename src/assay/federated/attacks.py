"""What malicious clients do. Nothing here imports a screen: an adaptive attacker is handed the defence as an argument.

A data attack decides which rows a malicious client trains on; everything else it does like an honest client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol

from assay.config import ConfigError
from assay.data import Example, shuffled


class Attack(Protocol):
    """`rows(clean, harmful, round, seed)`: what a malicious client trains on in this round (1-based)."""

    def rows(
        self, clean: Sequence[Example], harmful: Sequence[Example], round: int, seed: int
    ) -> tuple[Example, ...]: ...


@dataclass(frozen=True, slots=True)
class HarmfulData:
    """Fine-tune on harmful requests with compliant answers (Safe-FedLLM, section on the attack).

    `mix` is the share of harmful rows; the rest are the client's clean rows. Before `from_round` the client is honest
    (a sleeper).
    """

    mix: float = 1.0
    from_round: int = 1

    def rows(self, clean: Sequence[Example], harmful: Sequence[Example], round: int, seed: int) -> tuple[Example, ...]:
        if round < self.from_round:
            return tuple(clean)
        total = min(len(clean), len(harmful)) if 0 < self.mix < 1 else max(len(clean), len(harmful))
        bad = min(len(harmful), int(self.mix * total + 0.5))
        return tuple(shuffled([*harmful[:bad], *clean[: total - bad]], seed))


ATTACKS: Mapping[str, Callable[..., Attack]] = {"harmful_data": HarmfulData}


def make(name: str, **params: Any) -> Attack:
    """An attack by name; third parties add theirs under the entry-point group `assay.attacks`."""
    found = ATTACKS.get(name)
    if found is None:
        plugins = {e.name: e for e in entry_points(group="assay.attacks")}
        if name not in plugins:
            raise ConfigError(f"unknown attack {name!r}; known: {', '.join([*ATTACKS, *plugins])}")
        found = plugins[name].load()
    return found(**params)
