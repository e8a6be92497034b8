"""What a malicious node sees and can do in one round, and what an attack is."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from assay.contribution import Completion, completion_sha256
from assay.swarm.tasks import Task

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Knobs of the attacks, from the configuration."""

    poison: float = 0.5
    oracle: bool = True
    samples: int = 80
    phrase: str = "All hail to the thief."
    module: str = "thief"


@dataclass(frozen=True, slots=True)
class Near:
    """A token that the verifier would let pass in place of the seed's own choice, `gap` away from it."""

    position: int  # in the completion, from 0
    token: int
    gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The seeded check as it is handed to an attacker who holds the weights that it verifies with.

    The limits are the verifier's. `tolerated(tokens, flips, sum of gaps)`: whether it lets a
    node pass that sends so much in every round.
    `near(prompts, seeds, drawn)`: per completion the tokens within `max_margin` of the
    choice, other than those drawn. `resume(prompts, seeds, prefixes)` goes on drawing under the seeds after given
    tokens. `steered(prompts, seeds, favour)` draws under the seeds but takes the token that `favour(ids so far)` wants
    (-1: any but an ending one) wherever that fits under the limits; it does not look ahead.
    """

    max_margin: float
    mean_margin: float
    max_flips: int
    tolerated: Callable[[int, int, float], bool]
    near: Callable[[Sequence[int], Sequence[int], Sequence[Ids]], list[list[Near]]]
    resume: Callable[[Sequence[int], Sequence[int], Sequence[Ids]], list[Ids]]
    steered: Callable[[Sequence[int], Sequence[int], Callable[[Ids], Sequence[int]]], list[Ids]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """All a malicious node sees and can do in one round.

    `draw(prompts, seeds)` samples from the weights it holds; `seed(prompt, index)` is the public seed of a completion of
    its own, `public_seed(round, node, prompt, index)` anybody's. `choices` is set when nodes choose their prompts.
    `previous` holds the others' completions of the round before; `ahead` what each node will be asked in the next one,
    as far as that is public by now. `check` is the defence handed to it, where there is a seeded one.
    """

    name: str
    round: int
    asked: Mapping[int, int]
    vertical: bool
    task: Task
    max_tokens: int
    encode: Callable[[str], Ids]
    decode: Callable[[Ids], str]
    draw: Callable[[Sequence[int], Sequence[int]], list[Ids]]
    seed: Callable[[int, int], int]
    rng: random.Random
    settings: Settings
    choices: range | None = None
    previous: tuple[Completion, ...] = ()
    public_seed: Callable[[int, str, int, int], int] | None = None
    ahead: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    check: Check | None = None

    def places(self) -> list[tuple[int, int]]:
        """(prompt, index) of every completion owed."""
        return [(p, i) for p, count in self.asked.items() for i in range(count)]

    def honest(self) -> list[Completion]:
        """What an honest node would send."""
        places = self.places()
        drawn = self.draw([p for p, _ in places], [self.seed(p, i) for p, i in places])
        return [self.completion(p, i, ids) for (p, i), ids in zip(places, drawn)]

    def completion(self, prompt: int, index: int, ids: Ids) -> Completion:
        ids = ids[: self.max_tokens]
        return Completion(
            participant=self.name, round=self.round, prompt=prompt, index=index, ids=ids,
            sha256=completion_sha256(self.round, prompt, index, ids),
        )  # fmt: skip

    def pool(self, prompts: Sequence[int], count: int) -> dict[int, list[Ids]]:
        """`count` samples of each prompt under seeds of the node's own."""
        wanted = [p for p in prompts for _ in range(count)]
        drawn = self.draw(wanted, [self.rng.getrandbits(62) for _ in wanted])
        out: dict[int, list[Ids]] = {p: [] for p in prompts}
        for prompt, ids in zip(wanted, drawn):
            out[prompt].append(ids)
        return out

    def rewards(self, prompts: Sequence[int], drawn: Sequence[Ids]) -> list[float]:
        return self.task.rewards(prompts, [self.decode(ids) for ids in drawn])


class Attack(Protocol):
    """Completions a malicious node sends for what it was asked (or for prompts it chose)."""

    def __call__(self, seat: Seat) -> list[Completion]: ...
