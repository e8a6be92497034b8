"""What a malicious node sees and can do in one round, and what an attack is."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """All a malicious node sees and can do in one round.

    `draw(prompt, seeds)` samples from the weights it holds; `seed(prompt, index)` is the public seed of a completion.
    `choices` is set when nodes choose their prompts. `previous` holds the others' completions of the round before.
    `gaps(prompt, seed, ids)` is the defence handed to it: the margins a verifier will see; `steered(prompt, seed,
    favour)` draws under the seed but takes the token `favour` wants wherever its gap is at most the verifier's limit.
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
    steered: Callable[[Sequence[int], Sequence[int], Callable[[Ids], Sequence[int]]], list[Ids]] | None = None

    def honest(self) -> list[Completion]:
        """What an honest node would send."""
        places = [(p, i) for p, count in self.asked.items() for i in range(count)]
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
