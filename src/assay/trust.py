"""What is remembered of a participant over rounds: frozen values, each update returns a new one.

States go through `to_json` into the run's checkpoint, so that a run killed between rounds resumes with the same
trust. A stored state that does not parse is an error of the operator (an edited or damaged file): ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self


@dataclass(frozen=True, slots=True)
class Beta:
    """Beta-distributed trust: samples judged good against samples judged bad, older rounds fading.

    Step-Level of Safe-FedLLM (arXiv 2601.07177, section on defence levels): alpha = beta = 1 at first; a round
    multiplies both by `decay`, then adds its good and its bad samples; the weight is the mean alpha / (alpha + beta).
    With decay 0.95 a round has lost half its say after 13.5 rounds: nearer to 1 a sleeper lives off his good past for
    longer, nearer to 0 one unlucky round of an honest client costs him most of his weight.

    >>> Beta().weight
    0.5
    >>> Beta().update(good=16, bad=16)
    Beta(alpha=16.95, beta=16.95, decay=0.95)
    """

    alpha: float = 1.0
    beta: float = 1.0
    decay: float = 0.95

    def __post_init__(self) -> None:
        if not (0 <= self.alpha < math.inf and 0 <= self.beta < math.inf and self.alpha + self.beta > 0):
            raise ValueError(f"alpha {self.alpha} and beta {self.beta} must be finite, not negative, not both 0")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay {self.decay} is not in (0, 1]")

    @property
    def weight(self) -> float:
        """Expected share of good samples, in [0, 1]."""
        return self.alpha / (self.alpha + self.beta)

    def update(self, good: float, bad: float) -> Self:
        """Trust after a round with `good` and `bad` samples (counts, not shares; at least one in all)."""
        if not (0 <= good < math.inf and 0 <= bad < math.inf and good + bad > 0):
            raise ValueError(f"good {good} and bad {bad} must be finite counts, not both 0")
        return type(self)(self.alpha * self.decay + good, self.beta * self.decay + bad, self.decay)

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        _check_keys(cls.__name__, state, ("alpha", "beta", "decay"))
        return cls(*(_number(cls.__name__, key, state[key]) for key in ("alpha", "beta", "decay")))


@dataclass(frozen=True, slots=True)
class RunningMean:
    """Mean of a participant's values over rounds; 1 before the first, which counts as no round.

    Client-Level of Safe-FedLLM: full trust at first, and after the first update exactly that round's value.

    >>> RunningMean().value, RunningMean().update(0.25).value, RunningMean().update(0.25).update(0.75).value
    (1.0, 0.25, 0.5)
    """

    value: float = 1.0
    count: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or self.count < 0:
            raise ValueError(f"a running mean needs a finite value and a count of at least 0, got {self}")

    def update(self, x: float) -> Self:
        """The mean with one more finite value. Weighing the old mean by its count keeps [0, 1] closed and x exact."""
        if not math.isfinite(x):
            raise ValueError(f"a running mean takes finite values, got {x}")
        return type(self)((self.value * self.count + x) / (self.count + 1), self.count + 1)

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        _check_keys(cls.__name__, state, ("value", "count"))
        count = _number(cls.__name__, "count", state["count"])
        if count != int(count):
            raise ValueError(f"stored RunningMean: count {count} is not a whole number")
        return cls(_number(cls.__name__, "value", state["value"]), int(count))


BY_CHANCE = 1e-3
"""Groups lost within a window are held against a node where fewer honest ones than this would lose as many."""


def by_chance(groups: Sequence[tuple[int, int]], chance: float) -> float:
    """P[an honest node loses at least as many groups], each lost with `chance`; `groups` are (lost, owed) by round.

    >>> round(by_chance([(1, 2), (1, 2)], 0.5), 4)  # 2 or more of 4: 11 of 16
    0.6875
    """
    k, n = sum(lost for lost, _ in groups), sum(owed for _, owed in groups)
    return math.fsum(math.comb(n, i) * chance**i * (1 - chance) ** (n - i) for i in range(k, n + 1))


@dataclass(frozen=True, slots=True)
class Strikes:
    """Rounds in which a node's contribution was forged, and whether that has cost it its place.

    `lost` is how many groups it lost to forged members, of how many it owed, by round: `spoilt` holds those against
    chance. `ban_after` strikes within `window` rounds ban it. A banned node is still screened (its audits): `readmit_after`
    clean rounds in a row bring it back, with its strikes forgotten: no verdict is for ever. A silent round is neither.

    >>> s = Strikes().update(1, forged=True, ban_after=2, window=5, readmit_after=2)
    >>> s = s.update(2, forged=True, ban_after=2, window=5, readmit_after=2); s.banned
    True
    >>> s = s.update(3, forged=False, ban_after=2, window=5, readmit_after=2); s.banned
    True
    >>> s.update(4, forged=False, ban_after=2, window=5, readmit_after=2).banned
    False
    """

    rounds: tuple[int, ...] = ()
    banned: bool = False
    clean: int = 0
    lost: tuple[tuple[int, int, int], ...] = ()

    def update(
        self, round: int, *, forged: bool, ban_after: int, window: int, readmit_after: int,
        groups: tuple[int, int] = (0, 0), chance: float = 0.0,
    ) -> Self:  # fmt: skip
        """State after `round`, in which the node sent something that was `forged` or clean.

        `groups`: how many it lost to forged members, and how many it owed; `chance`: that an honest group is lost. Too
        many within the window, though few in each round, are forged as well: who spoils a member of the groups he
        dislikes chooses what is learnt from.
        """
        recent = tuple(r for r in self.rounds if r > round - window)
        lost = tuple(x for x in self.lost if x[0] > round - window)
        lost = (*lost, (round, *groups)) if groups[1] else lost
        if forged or (groups[0] and by_chance([x[1:] for x in lost], chance) < BY_CHANCE):
            recent = (*recent, round)
            return type(self)(recent, self.banned or len(recent) >= ban_after, 0, lost)
        if self.banned:
            return type(self)(recent, True, self.clean + 1, lost) if self.clean + 1 < readmit_after else type(self)()
        return type(self)(recent, False, 0, lost)

    def to_json(self) -> dict[str, Any]:
        lost = [list(x) for x in self.lost]
        return {"rounds": list(self.rounds), "banned": self.banned, "clean": self.clean, "lost": lost}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        state = {"lost": [], **state}  # runs begun before groups were counted
        _check_keys(cls.__name__, state, ("rounds", "banned", "clean", "lost"))
        rounds, banned, clean, lost = state["rounds"], state["banned"], state["clean"], state["lost"]
        if (
            not (isinstance(rounds, list) and isinstance(lost, list))
            or not all(isinstance(x, list) and len(x) == 3 for x in lost)
            or not all(type(r) is int for r in [*rounds, clean, *(n for x in lost for n in x)])
            or type(banned) is not bool
        ):
            raise ValueError(f"stored Strikes: expected whole numbers and a truth value, got {dict(state)!r}")
        return cls(tuple(rounds), banned, clean, tuple((x[0], x[1], x[2]) for x in lost))


@dataclass(frozen=True, slots=True)
class Audited:
    """What audits have shown of a client (Assay's evidence level): no verdict is for ever.

    `weights`: those of its last clean audited rounds. `barred`: it failed an audit and has passed `clean` rounds in a
    row since. Who is not trusted is audited in every round (levels.py).
    """

    weights: tuple[float, ...] = ()
    barred: bool = False
    clean: int = 0

    def __post_init__(self) -> None:
        if not all(0 <= w <= 1 for w in self.weights) or self.clean < 0:
            raise ValueError(f"audited weights must lie in [0, 1] and clean rounds be counted from 0, got {self}")

    def trusted(self, agree: int) -> bool:
        """`agree` clean audits in a row and none failed since."""
        return not self.barred and len(self.weights) >= agree

    @property
    def mean(self) -> float:
        """Mean of the remembered weights; 0 with none."""
        return sum(self.weights) / len(self.weights) if self.weights else 0.0

    def to_json(self) -> dict[str, Any]:
        return {"weights": list(self.weights), "barred": self.barred, "clean": self.clean}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        _check_keys(cls.__name__, state, ("weights", "barred", "clean"))
        if (
            not isinstance(state["weights"], list)
            or type(state["barred"]) is not bool
            or type(state["clean"]) is not int
        ):
            raise ValueError(f"stored Audited: expected numbers, a truth value and a count, got {dict(state)!r}")
        weights = tuple(_number(cls.__name__, "weights", w) for w in state["weights"])
        return cls(weights, state["barred"], state["clean"])


Verdicts = Literal["", "benign", "malicious"]


@dataclass(frozen=True, slots=True)
class Frozen:
    """Safe-FedLLM's published evidence state, its permanent verdicts included; used by the faithful path only.

    `verdict` "" collects `rounds` of (weight, judged malicious); a frozen "benign" keeps `weight` and counts its
    rounds `since` the last audit.
    """

    verdict: Verdicts = ""
    weight: float = 0.0
    since: int = 0
    rounds: tuple[tuple[float, bool], ...] = ()

    def __post_init__(self) -> None:
        if self.verdict not in ("", "benign", "malicious"):
            raise ValueError(f"a frozen verdict is benign, malicious or none yet, got {self.verdict!r}")
        if not all(0 <= w <= 1 for w in (self.weight, *(w for w, _ in self.rounds))) or self.since < 0:
            raise ValueError(f"frozen weights must lie in [0, 1] and rounds be counted from 0, got {self}")

    def to_json(self) -> dict[str, Any]:
        rounds = [[w, bad] for w, bad in self.rounds]
        return {"verdict": self.verdict, "weight": self.weight, "since": self.since, "rounds": rounds}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        _check_keys(cls.__name__, state, ("verdict", "weight", "since", "rounds"))
        rounds = state["rounds"]
        if (
            not isinstance(rounds, list)
            or not all(isinstance(r, list) and len(r) == 2 and type(r[1]) is bool for r in rounds)
            or type(state["since"]) is not int
        ):
            raise ValueError(f"stored Frozen: expected a count and rounds of weight and verdict, got {dict(state)!r}")
        kept = tuple((_number(cls.__name__, "rounds", w), bool(bad)) for w, bad in rounds)
        return cls(state["verdict"], _number(cls.__name__, "weight", state["weight"]), state["since"], kept)


def _check_keys(kind: str, state: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    if not isinstance(state, Mapping) or set(state) != set(keys):
        raise ValueError(f"stored {kind} must hold exactly {', '.join(keys)}; got {state!r}")


def _number(kind: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"stored {kind}: {key} must be a finite number, got {value!r}")
    return float(value)
