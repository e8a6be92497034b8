"""What a malicious client sees and can do in one round, and what an attack is made of.

An attack is a chain of parts. Each part is one frozen value and has one or more of the hooks below; an object from
anywhere else with such a method will do (entry point `assay.attacks`). None of them imports a screen: what an adaptive
attacker knows of the defence is handed to him with the seat, as arrays and callables.
Legend: N updates, M bank rows, D values of the flattened adapter (sorted names).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from assay.contribution import Tensors, flatten
from assay.data import Example
from assay.federated.local_sft import LocalResult, LocalSettings, Objective

Rows = tuple[Example, ...]
Delta = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear probe: logit = weight_D . unit(delta restricted to `names`) + bias, refused above `limit`."""

    names: tuple[str, ...]
    weight_D: NDArray[np.float32]
    bias: float
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """Labelled unit directions over `names`; refused when the ratio of distances to benign and malicious tops `limit`."""

    names: tuple[str, ...]
    bank_MD: NDArray[np.floating]
    malicious_M: NDArray[np.bool_]
    neighbours: int
    limit: float


@dataclass(frozen=True, slots=True)
class Check:
    """One limit of the defence: an update passes while `score(delta_D) <= limit`."""

    name: str
    score: Callable[[Delta], float]
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """The defence as an insider would give it away. What the level in force has not is None or empty.

    `prompts` are the server's secret canary refusals: only an attack that says so reads them. `harm` is the canary
    itself: how far into its refusal limits an update goes (1 = at the limit); each call measures on the model.
    """

    probe: Linear | None = None
    bank: Bank | None = None
    checks: tuple[Check, ...] = ()
    prompts: Rows = ()
    harm: Callable[[Delta], float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """All a malicious client knows before it trains.

    `place` counts the round's malicious clients from 0 (the leader of colluders), `clients` all clients of the
    round. `pool` holds the harmful rows of all
    of them, `guesses` refusals of harmful prompts as an attacker could write them: from the clients' part of the data,
    never the server's own. `start` and `initial` are the round's and round 0's adapter, `settings` the training the
    server asked for, `memory` what the attackers kept of earlier rounds. `stream(purpose)` is a seed.
    """

    name: str
    place: int
    round: int
    clients: int
    clean: Rows
    harmful: Rows
    pool: Rows
    guesses: Rows
    start: Tensors
    initial: Tensors
    settings: LocalSettings
    shadow_lr: float
    examples: int
    wants_steps: bool
    wants_shadow: bool
    defence: Handed
    memory: Tensors
    stream: Callable[[str], int]

    @property
    def seed(self) -> int:
        """The seed an honest client would train under."""
        return self.settings.seed

    def rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng(self.stream(purpose))


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One training a malicious client does: what is not given is as the server asked (from `start`, its rate)."""

    rows: Rows
    start: Tensors | None = None
    lr: float | None = None
    keep_steps: bool = False
    objective: Objective = field(default_factory=Objective)


Made = Mapping[str, LocalResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What it sees once everybody has trained: its own branches, every colluder's (by place), the honest updates.

    `honest_ND` is empty unless a part of the attack is omniscient.
    """

    mine: Made
    colluders: Sequence[Made]
    honest_ND: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """What goes into the message: the adapter, the claims beside it, the claimed count."""

    tensors: Tensors
    steps: tuple[Tensors, ...] = ()
    shadow: tuple[Tensors, ...] = ()
    num_examples: int


@runtime_checkable
class Times(Protocol):
    """In which rounds it is malicious; in the others the client is honest in everything."""

    def active(self, round: int) -> bool: ...


@runtime_checkable
class ChoosesRows(Protocol):
    """What the submitted adapter is trained on; `rows` is what the parts before it chose."""

    def rows(self, seat: Seat, rows: Rows) -> Rows: ...


@runtime_checkable
class Trains(Protocol):
    """Further trainings by name: "shadow" replaces the claimed shadow branch, the others are the part's own."""

    def branches(self, seat: Seat) -> Mapping[str, Branch]: ...


@runtime_checkable
class AddsObjective(Protocol):
    """What is added to the objective of the submitted adapter's training."""

    def objective(self, seat: Seat) -> Objective: ...


@runtime_checkable
class Changes(Protocol):
    """A new update from the trained one: delta_D -> delta_D, the input left as it is."""

    def change(self, seat: Seat, delta_D: Delta, seen: Seen) -> Delta: ...


@runtime_checkable
class Claims(Protocol):
    """What it says of itself beside the adapter."""

    def claim(self, seat: Seat, seen: Seen, sending: Sending) -> Sending: ...


@runtime_checkable
class Remembers(Protocol):
    """What the attackers keep for the next round: float32 arrays, saved with the run's checkpoint."""

    def remember(self, seat: Seat, seen: Seen) -> Tensors: ...


def spans(like: Tensors) -> dict[str, slice]:
    """Where each named tensor lies in the flattened adapter.

    >>> spans({"b": np.zeros((2, 2)), "a": np.zeros(3)})
    {'a': slice(0, 3, None), 'b': slice(3, 7, None)}
    """
    out, at = {}, 0
    for name in sorted(like):
        out[name] = slice(at, at + like[name].size)
        at += like[name].size
    return out


def where(like: Tensors, names: Sequence[str]) -> NDArray[np.int64]:
    """Indices of the named tensors in the flattened adapter, in the order of sorted names."""
    found = spans(like)
    return np.concatenate([np.arange(found[n].start, found[n].stop) for n in sorted(names)])


def delta_of(seat: Seat, result: LocalResult) -> Delta:
    """delta_D of a trained branch against the round's start."""
    return flatten(result.tensors) - flatten(seat.start)


def deltas_of(seat: Seat, seen: Seen, branch: str) -> NDArray[np.float32]:
    """delta_ND of one branch of every colluder that trained it."""
    found = [delta_of(seat, made[branch]) for made in seen.colluders if branch in made]
    return np.stack(found) if found else np.zeros((0, flatten(seat.start).size), np.float32)
