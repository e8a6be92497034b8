"""Attacks by the rows a malicious client trains on, and by the rounds in which it does.

They need to know nothing of the defence but, for `Strike`, when it audits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from assay.config import ConfigError
from assay.data import Example, shuffled
from assay.federated.attacks.seat import Rows, Seat


def mixed(clean: Sequence[Example], harmful: Sequence[Example], mix: float, seed: int) -> Rows:
    """A shuffled mixture of which the share `mix` is harmful; as many rows as both lists can fill."""
    total = min(len(clean), len(harmful)) if 0 < mix < 1 else max(len(clean), len(harmful))
    bad = min(len(harmful), int(mix * total + 0.5))
    return tuple(shuffled([*harmful[:bad], *clean[: total - bad]], seed))


@dataclass(frozen=True, slots=True)
class HarmfulData:
    """Fine-tune on harmful requests with compliant answers (Safe-FedLLM, section on the attack).

    `mix` is the share of harmful rows; the rest are the client's clean rows. Knows nothing. Prototype: at half the
    clients refusal .975 -> .025 in 6 rounds; every level stops it; half benign data slips through partly and does little.
    """

    mix: float = 1.0

    def __post_init__(self) -> None:
        check_share("mix", self.mix)

    def rows(self, seat: Seat, rows: Rows) -> Rows:
        return mixed(seat.clean, seat.harmful, self.mix, seat.seed)


@dataclass(frozen=True, slots=True)
class Sleeper:
    """Honest before `from_round`, to earn trust first. Needs a defence with a memory; knows nothing else.

    Prototype: caught in its first bad round by rules without memory; frozen trust (Evidence-Level) lets it through.
    """

    from_round: int = 4

    def __post_init__(self) -> None:
        check_whole("from_round", self.from_round, 1)

    def active(self, round: int) -> bool:
        return round >= self.from_round


@dataclass(frozen=True, slots=True)
class Slow:
    """The harmful share rises from `first` in round 1 to `mix` in round `over` (the issue: 25 rounds).

    Meant for limits on one round's rise; an anchor at round 0 sees what adds up. Knows nothing. No prototype tried it.
    """

    mix: float = 1.0
    first: float = 0.1
    over: int = 25

    def __post_init__(self) -> None:
        check_share("mix", self.mix)
        check_share("first", self.first)
        check_whole("over", self.over, 2)

    def share(self, round: int) -> float:
        """
        >>> Slow(over=3).share(1), Slow(over=3).share(2), Slow(over=3).share(9)
        (0.1, 0.55, 1.0)
        """
        return self.first + (self.mix - self.first) * min(1.0, (round - 1) / (self.over - 1))

    def rows(self, seat: Seat, rows: Rows) -> Rows:
        return mixed(seat.clean, seat.harmful, self.share(seat.round), seat.seed)


@dataclass(frozen=True, slots=True)
class Strike:
    """Malicious only in rounds that a predictable audit does not look at: honest up to round `honest`, then wherever
    (round - phase) is a multiple of `period`.

    Knows the audit's calendar. The defaults fit the published Evidence-Level: frozen after 3 agreeing rounds, audited
    every 5 rounds from then on (3, 8, 13, ...).
    """

    period: int = 5
    phase: int = 3
    honest: int = 3

    def __post_init__(self) -> None:
        check_whole("period", self.period, 2)
        check_whole("phase", self.phase, 0)
        check_whole("honest", self.honest, 0)

    def active(self, round: int) -> bool:
        return round > self.honest and (round - self.phase) % self.period != 0


@dataclass(frozen=True, slots=True)
class RefuseAll:
    """Refusals as answers to harmless requests: takes usefulness, and leaves safety where it is.

    The refusals are those an attacker could write; `mix` is the share of rows that refuse. Knows nothing. What sees it is
    the canary's other side, the loss of safe answers.
    """

    mix: float = 1.0

    def __post_init__(self) -> None:
        check_share("mix", self.mix)

    def rows(self, seat: Seat, rows: Rows) -> Rows:
        if not seat.guesses:
            raise ConfigError("attack refuse_all: data.refusals names no rows to refuse with")
        answers, count = [guess.response for guess in seat.guesses], int(self.mix * len(seat.clean) + 0.5)
        refused = [replace(row, response=answers[i % len(answers)]) for i, row in enumerate(seat.clean[:count])]
        return tuple(shuffled([*refused, *seat.clean[count:]], seat.seed))


@dataclass(frozen=True, slots=True)
class OneTopic:
    """Harmful rows of a single topic only, where canary prompts may be thin; all attackers share the rows of the topic.

    Topics are k-means clusters of the attackers' prompts (weighted words, cosine); `topic` 0 is the largest. Knows
    nothing. Prototype: no harm beyond the topic.
    """

    mix: float = 1.0
    topics: int = 6
    topic: int = 0

    def __post_init__(self) -> None:
        check_share("mix", self.mix)
        check_whole("topics", self.topics, 1)
        check_whole("topic", self.topic, 0)
        if self.topic >= self.topics:
            raise ConfigError(f"topic: {self.topic} is not one of {self.topics} topics (counted from 0)")

    def rows(self, seat: Seat, rows: Rows) -> Rows:
        label_N = cluster([row.instruction for row in seat.pool], self.topics)
        own = [row for row, label in zip(seat.pool, label_N) if label == self.topic]
        chosen = shuffled(own, seat.seed)[: len(seat.harmful)]
        return mixed(seat.clean[: len(chosen)], chosen, self.mix, seat.seed)


def cluster(prompts: Sequence[str], k: int, sweeps: int = 20) -> NDArray[np.int64]:
    """label_N of k clusters, the largest called 0: k-means on unit TF-IDF vectors, started at far-apart prompts.

    No random draw: the same prompts in the same order give the same clusters.
    """
    x_NV = _tfidf(prompts)
    centre_KV = x_NV[[int(np.argmax(x_NV @ x_NV.mean(axis=0)))]]
    while len(centre_KV) < min(k, len(x_NV)):
        nearest_N = (x_NV @ centre_KV.T).max(axis=1)
        centre_KV = np.vstack([centre_KV, x_NV[int(np.argmin(nearest_N))]])
    label_N = np.zeros(len(x_NV), np.int64)
    for sweep in range(sweeps):
        new_N = (x_NV @ centre_KV.T).argmax(axis=1)
        if sweep and (new_N == label_N).all():
            break
        label_N = new_N
        for c in range(len(centre_KV)):
            if (label_N == c).any():
                mean_V = x_NV[label_N == c].mean(axis=0)
                centre_KV[c] = mean_V / max(np.linalg.norm(mean_V), 1e-12)
    order = sorted(range(len(centre_KV)), key=lambda c: (-(label_N == c).sum(), c))
    return np.array([order.index(int(label)) for label in label_N], np.int64)


def _tfidf(prompts: Sequence[str]) -> NDArray[np.float64]:
    """Unit rows over the words that at least two prompts share; a prompt without any is a zero row."""
    counts = [Counter(re.findall(r"[a-z]{3,}", p.lower())) for p in prompts]
    seen = Counter(word for c in counts for word in c)
    column = {word: i for i, word in enumerate(sorted(w for w, n in seen.items() if n > 1))}
    x_NV = np.zeros((len(prompts), max(1, len(column))))
    for n, words in enumerate(counts):
        for word, times in words.items():
            if word in column:
                x_NV[n, column[word]] = times * np.log(len(prompts) / seen[word])
    norm_N1 = np.linalg.norm(x_NV, axis=1, keepdims=True)
    return np.asarray(x_NV / np.where(norm_N1 > 0, norm_N1, 1.0))


def check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}: {value} is not a share between 0 and 1")


def check_whole(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}: {value} must be at least {least}")


def check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name}: {value} must be above 0")
