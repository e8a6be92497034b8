"""Sums that are wrong: every `a op b = c` of a completion is calculated again."""

from __future__ import annotations

from dataclasses import dataclass

from assay.contribution import Pool
from assay.swarm.screens.common import say
from assay.swarm.screens.equations import Claim
from assay.swarm.screens.unread import read
from assay.verdict import Reason, State, Verdict


def wrong_spans(text: str) -> list[tuple[int, int]]:
    """Character spans (start, end) of the equations that are wrong, in the order of the text.

    >>> wrong_spans("2+2=4, then 2*2 = 5.")
    [(12, 19)]
    """
    return sorted({(c.start, c.end) for c in _wrong(*read(text))})


def _wrong(claims: list[Claim], unread: list[Claim]) -> list[Claim]:
    return [c for c in claims if not c.true] + unread


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A completion with a wrong equation keeps its row and loses its reward (MATH of Hail to the Thief: 2+2=5).

    Reward 0 and not exclusion: honest models slip too (11% of rewarded honest completions of a small model held a wrong
    step), and excluding them threw away the negative signal (reward 0.58 against 0.75; LAB.md). In a chain each side is
    held against the next one, or against the first number of it: `2+2=4*3=12` is sloppy, not wrong.

    Limits: reads what is written as an equation, in signs or in the words plus, minus, times, divided by, equals, is,
    makes. `adding 2 to 2 gives 5` says the same and is not read; `2+2 = 5-1` is true. A false sum with anything else stuck
    to it (`2+2=5²`, `a2+2=5x`, `[2+2=5]`) counts as wrong; forgiven are algebra whose variable stands at another sign as
    well (`x=1, x+2+2=5`), the arguments of functions (`sqrt(2+2)=5`) and sums with a time of day (`9:30+2=5`).
    `max_wrong`: wrong equations that are forgiven.
    """

    max_wrong: int = 0
    name: str = "arithmetic"

    def screen(self, pool: Pool, state: State) -> tuple[list[Verdict], State]:
        out = []
        for completion, text in zip(pool.completions, pool.texts):
            found, unread = read(text)
            wrong = sorted({(c.start, c.end) for c in _wrong(found, unread)})
            bad = len(wrong) > self.max_wrong
            start, end = wrong[0] if wrong else (0, 0)
            sentence = f"wrong: {' '.join(text[start:end].split())[:60]}" if bad else ""
            out.append(
                say(
                    completion,
                    self.name,
                    Reason.ARITHMETIC if bad else Reason.OK,
                    sentence,
                    score=len(wrong),
                    effect="no_reward",
                    checked=len(found) + len(unread),
                    wrong=len(wrong),
                    wrong_limit=self.max_wrong,
                )
            )
        return out, state
