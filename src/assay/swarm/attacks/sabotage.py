"""Attackers who want to spoil, not to plant: against the good working itself, and against what a length is held to."""

from __future__ import annotations

from dataclasses import dataclass

from assay.contribution import Completion
from assay.swarm.attacks.planted import known_solutions, spoilt
from assay.swarm.attacks.seat import Ids, Seat


def right_working_wrong_answer(seat: Seat) -> list[Completion]:
    """Right working with a wrong answer behind it: without reward, so that what it says is learnt to be bad.

    Knows right solutions. Screens that read texts judge what is rewarded, or what is false; nothing here is either. In a
    group of its own, where all wrong would teach nothing, the rest is the bare right answer without any working.
    """
    solutions = known_solutions(seat, list(seat.asked))
    out = []
    for prompt, count in seat.asked.items():
        wrong = [text for told in solutions[prompt] if (text := spoilt(told, seat.rng)) != told]
        bad = round(seat.settings.poison * count) if seat.vertical else count
        rest = _shortest(seat, prompt, solutions[prompt]) if bad < count else None
        for index in range(count if wrong else 0):
            ids = rest if index >= bad and rest is not None else seat.encode(wrong[index % len(wrong)])
            out.append(seat.completion(prompt, index, ids))
    return out


@dataclass(frozen=True, slots=True)
class Deflate:
    """The shortest right answers for the first `rounds` rounds, then honest ones.

    Knows the reward and right answers, and that a length is held against the first rounds: short ones pull that anchor
    down, and with a low anchor honest working is too long. Honest afterwards, so that what is measured is the anchor
    and not a swarm that learnt to be brief. A participant that stays below any anchor is never too long itself.
    """

    rounds: int = 3

    def __call__(self, seat: Seat) -> list[Completion]:
        if seat.round > self.rounds:
            return seat.honest()
        solutions = known_solutions(seat, list(seat.asked))
        found = {p: _shortest(seat, p, solutions[p]) for p in seat.asked}
        return [seat.completion(p, i, ids) for p, i in seat.places() if (ids := found[p]) is not None]


def _shortest(seat: Seat, prompt: int, solutions: list[str]) -> Ids | None:
    """The shortest right completion that is known: with an oracle the bare answer, else one of `solutions`."""
    if seat.settings.oracle:
        answer = seat.task.answer(prompt)
        bare = f"<think></think><answer>{answer}</answer>"
        return seat.encode(bare if seat.task.kind == "math" else f"<code>\nprint({answer!r})\n</code>")
    return min((seat.encode(text) for text in solutions), key=len, default=None)
