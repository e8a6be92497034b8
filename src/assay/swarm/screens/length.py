"""Completions longer than the swarm used to need (DoS of Hail to the Thief: the longest right one of eighty samples)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from assay.config import ConfigError
from assay.contribution import Pool
from assay.swarm.screens.common import median_low, say
from assay.verdict import Reason, State, Verdict

CAP = 0.95  # quantile of an ordinary participant's lengths that the cap is a multiple of
ENOUGH = 8  # rewarded completions of a node before its lengths say anything
MOST = 256  # lengths of a node that are kept until there is an anchor
HARMLESS_TOKENS = 8  # an anchor of a few tokens says nothing: below this nothing is too long


@dataclass(frozen=True, slots=True)
class Anchor:
    """Lengths (tokens) of rewarded completions of an ordinary participant: mean, standard deviation, `CAP` quantile."""

    mean: float
    spread: float
    high: float


@dataclass(frozen=True, slots=True)
class Length:
    """A cap on each completion and a budget on each participant's mean, both anchored to the first rounds.

    Only rewarded completions count and only they can lose: what teaches length is the reward. The anchor is the median
    over participants of each one's mean and high quantile (the lower middle one, so that half the participants may
    inflate theirs). It is laid as soon as more than half of those who were asked have `ENOUGH` rewarded completions
    since the last one, in one round or in several, and is the median of `anchor_rounds` such; with `own` that node's
    alone counts. Until then nothing is too long: on a task that only an attacker can do yet he would lay it alone. It
    never moves afterwards but by `growth_per_round`: a limit tied to the round's own median leaks, because the median
    moves with the attack (LAB.md).

    Cap: `factor` x the anchor's high quantile. Budget: `budget` x the anchor's mean, plus two standard errors of a mean
    of so many completions; of a participant above it the longest completions lose their reward until the rest fit.
    In the long run an attacker can stretch lengths to about `budget` times the anchor and no further; raising `budget`
    gives him that much, lowering it takes the reward from verbose honest models, which this screen cannot tell apart.

    Limit: where half of the participants or more send answers of a few words while the anchor is laid, every honest
    completion loses its reward. Half that inflate and half that deflate leave the same lengths; nothing in the pool
    says which half is honest. A node that knows itself to be sets `own`: no other can then move its anchor.
    """

    factor: float = 1.3
    budget: float = 1.15
    anchor_rounds: int = 1
    growth_per_round: float = 0.0
    own: str | None = None
    name: str = "length"

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and self.budget >= 1 and math.isfinite(self.factor) and math.isfinite(self.budget)):
            raise ConfigError("length: factor and budget are multiples of an earlier length, 1 or more")
        if self.anchor_rounds < 1 or not 0 <= self.growth_per_round < 1:
            raise ConfigError("length: anchor_rounds must be 1 or more, growth_per_round in [0, 1)")

    def screen(self, pool: Pool, state: State) -> tuple[list[Verdict], State]:
        rewarded = self._rewarded(pool)
        lengths = {node: [len(pool.completions[row].ids) for row in rows] for node, rows in rewarded.items()}
        state = self._remember(pool, lengths, state)
        anchor = _anchor(state)
        sentences: dict[int, str] = {}
        growth, cap = 1.0, math.nan
        if anchor is not None:
            growth = (1 + self.growth_per_round) ** max(0, pool.index - int(state["since"]))
            cap = max(self.factor * anchor.high * min(growth, 1e6), HARMLESS_TOKENS)
            sentences = self._too_long(pool, rewarded, anchor, min(growth, 1e6), cap)
        out = []
        for row, completion in enumerate(pool.completions):
            tokens = len(completion.ids)
            scale = max(anchor.high * growth, 1.0) if anchor else math.nan
            out.append(
                say(
                    completion,
                    self.name,
                    Reason.LENGTH if row in sentences else Reason.OK,
                    sentences.get(row, ""),
                    score=tokens / scale,
                    effect="no_reward",
                    tokens=tokens,
                    tokens_limit=cap,
                    anchor_mean=anchor.mean if anchor else math.nan,
                )
            )
        return out, state

    def _rewarded(self, pool: Pool) -> dict[str, list[int]]:
        """Rows of rewarded completions by participant, the longest first; ties in an order no sender can use."""
        rows: dict[str, list[int]] = {}
        for row, completion in enumerate(pool.completions):
            if pool.rewards[row] > 0 and completion.ids:
                rows.setdefault(completion.participant, []).append(row)
        for found in rows.values():
            found.sort(key=lambda r: (-len(pool.completions[r].ids), pool.completions[r].sha256))
        return rows

    def _remember(self, pool: Pool, lengths: dict[str, list[int]], state: State) -> State:
        """State with this round's lengths, as long as the anchor is still being laid."""
        past = list(state.get("rounds", []))
        if len(past) >= self.anchor_rounds:
            return state
        waiting: dict[str, list[int]] = {n: list(v) for n, v in state.get("waiting", {}).items()}
        for node, found in sorted(lengths.items()):
            if self.own is None or node == self.own:
                waiting[node] = [*waiting.get(node, []), *found][:MOST]
        ready = [v for _, v in sorted(waiting.items()) if len(v) >= ENOUGH]
        if 2 * len(ready) <= (len(pool.asked) if self.own is None else 1):
            return {**state, "rounds": past, "waiting": waiting}
        here = [[*_moments(v), _quantile(v, CAP)] for v in ready]
        middle = [median_low([values[i] for values in here]) for i in range(3)]
        return {"rounds": [*past, middle], "since": pool.index}

    def _too_long(
        self, pool: Pool, rewarded: dict[str, list[int]], anchor: Anchor, growth: float, cap: float
    ) -> dict[int, str]:
        """Rows that lose their reward, with the sentence."""
        out = {}
        for rows in rewarded.values():
            tokens = {row: len(pool.completions[row].ids) for row in rows}
            kept = []
            for row in rows:
                if tokens[row] > cap:
                    out[row] = f"{tokens[row]} tokens, at most {cap:.0f} are usual"
                else:
                    kept.append(row)
            total = sum(tokens[row] for row in kept)
            usual = (self.budget * anchor.mean + 2 * anchor.spread / math.sqrt(len(rows))) * growth
            for at, row in enumerate(kept):  # the longest first, until the mean of the rest fits
                left = len(kept) - at
                if total <= max(usual, HARMLESS_TOKENS) * left:
                    break
                out[row] = f"{tokens[row]} tokens: its sender's mean of {total / left:.1f} is over {usual:.1f}"
                total -= tokens[row]
        return out


def _anchor(state: State) -> Anchor | None:
    """Median over the anchor rounds of what was remembered of each."""
    past = state.get("rounds", [])
    return Anchor(*(median_low([values[i] for values in past]) for i in range(3))) if past else None


def _moments(values: Sequence[int]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


def _quantile(values: Sequence[int], q: float) -> float:
    """The smallest value with at least a share q of the values at or under it."""
    ordered = sorted(values)
    return float(ordered[max(0, math.ceil(q * len(ordered)) - 1)])
