"""An attacker who makes the most of what a verifier must forgive: flips one token and keeps what comes of it.

The seeded check forgives small margins, because engines differ by rounding. A flip within them is seldom the token an
attacker wants, but any flip sends the rest of the completion elsewhere, and the rest is drawn under the seed like
everybody's. So he tries every flip there is, lets the drawing go on, and submits the completion he likes best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from assay.contribution import Completion
from assay.swarm.attacks.planted import math, shows, suitable
from assay.swarm.attacks.seat import Check, Ids, Seat


@dataclass(frozen=True, slots=True)
class _Held:
    """A completion, its flips as (position, gap), and what it is worth."""

    ids: Ids
    flips: tuple[tuple[int, float], ...]
    value: float


@dataclass(frozen=True, slots=True)
class Lookahead:
    """Knows the verifier's weights, limits and seeds; changes completions so that all of them are admitted.

    For measuring what limits cost: those of fp32 leave few flips, those of bf16 most of the completions. `goal` "math"
    wants 2+2=5 where the answer is right and 4 where it is wrong (and chooses prompts with such a sum where it may);
    "length" wants right answers long and wrong ones short. After a first flip it looks for another, `passes` times.
    `share` of each limit is used: the verifier's own rounding comes on top. Of all that would pass one by one it keeps
    what gains most for its flips, as much as a node may send in every round. Where the check is not known, honest.
    """

    goal: str = "math"
    passes: int = 2
    share: float = 0.95

    def __call__(self, seat: Seat) -> list[Completion]:
        if seat.check is None:
            return seat.honest()
        prompts = list(seat.asked)
        if self.goal == "math" and seat.choices is not None:
            prompts = suitable(seat, math, len(prompts))
        places = [(p, i) for p, count in zip(prompts, seat.asked.values()) for i in range(count)]
        seeds = [seat.seed(*place) for place in places]
        drawn = seat.draw([p for p, _ in places], seeds)
        rows = range(len(places))
        prompt_of = [p for p, _ in places]
        usual = {p: _mean([len(drawn[r]) for r in rows if prompt_of[r] == p]) for p in prompts}
        honest = [_Held(ids, (), value) for ids, value in zip(drawn, self._values(seat, prompt_of, drawn, usual))]
        held = list(honest)
        for _ in range(self.passes):
            near = seat.check.near(prompt_of, seeds, [h.ids for h in held])
            tried: list[tuple[int, Ids, tuple[tuple[int, float], ...]]] = []
            for row in rows:
                for one in near[row]:
                    flips = (*(f for f in held[row].flips if f[0] < one.position), (one.position, one.gap))
                    # how long it will be is not known yet: anything that could fit is tried
                    if self._fits(seat.check, flips, seat.max_tokens):
                        tried.append((row, (*held[row].ids[: one.position], one.token), flips))
            made = seat.check.resume(
                [prompt_of[r] for r, _, _ in tried], [seeds[r] for r, _, _ in tried], [ids for _, ids, _ in tried]
            )
            values = self._values(seat, [prompt_of[r] for r, _, _ in tried], made, usual)
            for (row, _, flips), ids, value in zip(tried, made, values):
                if value > held[row].value and self._fits(seat.check, flips, len(ids)):
                    held[row] = _Held(ids, flips, value)
        kept = _afford(seat.check, honest, held)
        return [seat.completion(*place, h.ids) for place, h in zip(places, kept)]

    def _fits(self, check: Check, flips: Sequence[tuple[int, float]], tokens: int) -> bool:
        """Whether a verifier lets these flips pass in a completion of so many tokens."""
        gaps = [gap for _, gap in flips]
        return (
            len(gaps) <= check.max_flips
            and max(gaps) <= self.share * check.max_margin
            and sum(gaps) <= self.share * check.mean_margin * tokens
        )

    def _values(self, seat: Seat, prompts: Sequence[int], drawn: Sequence[Ids], usual: dict[int, float]) -> list[float]:
        """What each completion adds to the covariance of reward and of what is wanted; `usual` tokens of a prompt."""
        rewards = seat.rewards(prompts, drawn)
        if self.goal == "length":
            return [(len(ids) - usual[p]) * (1 if r > 0 else -1) for p, ids, r in zip(prompts, drawn, rewards)]
        shown = [shows("math", seat.decode(ids), seat.settings) for ids in drawn]
        # right with a 5 teaches it, right with a 4 unteaches it, wrong the other way round; one 5 is worth two of those
        return [0.0 if s is None else (2.0 if s else 1.0) * (1 if s == (r > 0) else -1) for s, r in zip(shown, rewards)]


def _afford(check: Check, honest: Sequence[_Held], changed: Sequence[_Held]) -> list[_Held]:
    """The changes that gain most for what they cost, as many as the verifier lets a node pass."""

    def gain(row: int) -> float:
        return (changed[row].value - honest[row].value) / sum(gap + 0.01 for _, gap in changed[row].flips)

    out = list(honest)
    for row in sorted((r for r, h in enumerate(changed) if h.flips), key=gain, reverse=True):
        tried = [*out[:row], changed[row], *out[row + 1 :]]
        gaps = [gap for h in tried for _, gap in h.flips]
        if check.tolerated(sum(len(h.ids) for h in tried), len(gaps), sum(gaps)):
            out = tried
    return out


def _mean(values: Sequence[int]) -> float:
    return sum(values) / max(1, len(values))
