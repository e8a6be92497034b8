"""How much of what a node sent differs from its seeds' choice, against what the rounding of engines explains.

Limits of a single completion must forgive what rounding does to the unluckiest one; a node that uses them up in every
completion has chosen its tokens. Over all it sends, rounding is predictable: flips (tokens that differ) come one by one
at a rate per token, with gaps that fall off at least as fast as an exponential. Measured between bf16 and fp32: 0.14%
of tokens, mean gap 0.036 (tiny); 0.23%, 0.12 (SmolLM2-135M); variance over mean of the flips of groups 1.1 and 0.7.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BY_CHANCE = math.log(1e-4)
"""Log-probability under which a node's flips are not put down to rounding."""


@dataclass(frozen=True, slots=True)
class Flips:
    """Tokens sent, how many of them differ from the seed's choice, and the sum of their gaps in logits."""

    tokens: int = 0
    flips: int = 0
    gaps: float = 0.0

    def __add__(self, other: Flips) -> Flips:
        return Flips(self.tokens + other.tokens, self.flips + other.flips, self.gaps + other.gaps)

    def times(self, rounds: int) -> Flips:
        """The same in each of so many rounds."""
        return Flips(self.tokens * rounds, self.flips * rounds, self.gaps * rounds)


def log_chance(found: Flips, rate: float, gap: float) -> float:
    """Upper bound of ln P[rounding makes at least so many flips, or gaps of at least this sum]; the less likely of both.

    Chernoff's bounds of a Poisson count of mean `rate` * tokens, and of a sum of so many exponential gaps of mean
    `gap`. 0 for what is expected; -inf where rounding makes no flips.

    >>> log_chance(Flips(1000, 2, 0.2), rate=0.002, gap=0.1)
    0.0
    >>> round(log_chance(Flips(1000, 20, 2.0), rate=0.002, gap=0.1), 1)  # ten times as many
    -28.1
    """
    expected = rate * found.tokens
    if found.flips and not expected * gap > 0:
        return -math.inf
    count = sums = 0.0
    if found.flips > expected:
        count = found.flips - expected - found.flips * math.log(found.flips / expected)
    if found.gaps > expected * gap:
        sums = -((math.sqrt(found.gaps / gap) - math.sqrt(expected)) ** 2)
    return min(count, sums)


Memory = Mapping[str, Sequence[Sequence[float]]]
"""By node its admitted rounds as (round, tokens, flips, gaps): JSON, as a screen's state is."""


def remembered(memory: Memory, node: str, round: int, window: int) -> Flips:
    """What was admitted of `node` in the `window` rounds that end with `round`."""
    rounds = [Flips(int(r[1]), int(r[2]), r[3]) for r in memory.get(node, ()) if r[0] > round - window]
    return sum(rounds, Flips())


def remember(memory: Memory, node: str, round: int, window: int, found: Flips) -> dict[str, Sequence[Sequence[float]]]:
    """The memory with what was admitted of a node in this round, without what is older than the window."""
    kept = [list(r) for r in memory.get(node, ()) if r[0] > round - window]
    return {**memory, node: [*kept, [round, found.tokens, found.flips, found.gaps]]}
