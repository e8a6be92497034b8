"""Attacks on the update itself, from the literature on Byzantine clients: arithmetic on the honest updates of a round.

The arithmetic stands as plain functions; the values under them say what each needs to know. `sees` chooses between the
true honest updates (omniscient, the papers' strong case) and what the colluders trained on clean rows of their own.
They break the model rather than its safety; `poison` as a direction turns min-max and min-sum to harm.
Legend: N known honest updates, D values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from assay.config import ConfigError
from assay.federated.attacks.data import check_positive
from assay.federated.attacks.seat import Branch, Delta, Seat, Seen, deltas_of

Sees = Literal["honest", "colluders"]
Direction = Literal["std", "unit", "sign", "poison"]


def sign_flip(delta_D: NDArray[np.floating], factor: float = 1.0) -> Delta:
    """-factor x the update."""
    return np.asarray(-factor * delta_D, np.float32)


def scaling(delta_D: NDArray[np.floating], factor: float) -> Delta:
    return np.asarray(factor * delta_D, np.float32)


def gaussian(like_D: NDArray[np.floating], factor: float, rng: np.random.Generator) -> Delta:
    """Noise of independent coordinates, `factor` times as long as `like_D`."""
    noise_D = rng.standard_normal(like_D.size)
    return np.asarray(noise_D * (factor * _norm(like_D) / _norm(noise_D)), np.float32)


def alie(honest_ND: NDArray[np.floating], z: float) -> Delta:
    """mean - z std, coordinate by coordinate (Baruch et al. 2019, algorithm 3); std with N - 1, 0 for N = 1."""
    x_ND = honest_ND.astype(np.float64)
    std_D = x_ND.std(axis=0, ddof=1) if len(x_ND) > 1 else np.zeros(x_ND.shape[1])
    return np.asarray(x_ND.mean(axis=0) - z * std_D, np.float32)


def alie_z(clients: int, malicious: int) -> float:
    """The largest z that a median still hides behind: phi((n - f - s) / (n - f)) with s = n // 2 + 1 - f supporters.

    With half the clients or more malicious there is nobody to win over: s counts as 1.

    >>> round(alie_z(50, 24), 4)
    1.4261
    """
    honest = max(2, clients - malicious)
    supporters = min(honest - 1, max(1, clients // 2 + 1 - malicious))
    return NormalDist().inv_cdf((honest - supporters) / honest)


def ipm(honest_ND: NDArray[np.floating], epsilon: float) -> Delta:
    """-epsilon x mean: the aggregate's inner product with the true mean turns negative (Xie et al. 2020, section 3)."""
    return np.asarray(-epsilon * honest_ND.astype(np.float64).mean(axis=0), np.float32)


def min_max(honest_ND: NDArray[np.floating], direction_D: NDArray[np.floating]) -> Delta:
    """mean + gamma direction, gamma the largest whose farthest honest update is no farther than two honest ones lie
    from each other (Shejwalkar & Houmansadr 2021, equation 8; solved, not searched)."""
    return _farthest(honest_ND, direction_D, sums=False)


def min_sum(honest_ND: NDArray[np.floating], direction_D: NDArray[np.floating]) -> Delta:
    """As `min_max` for sums of squared distances: to all honest updates at most the largest of an honest one
    (equation 9)."""
    return _farthest(honest_ND, direction_D, sums=True)


def _farthest(honest_ND: NDArray[np.floating], direction_D: NDArray[np.floating], sums: bool) -> Delta:
    x_ND, p_D = honest_ND.astype(np.float64), direction_D.astype(np.float64)
    mean_D = x_ND.mean(axis=0)
    if _norm(p_D) == 0:
        return np.asarray(mean_D, np.float32)
    p_D = p_D / _norm(p_D)
    off_ND = x_ND - mean_D
    square_N = (off_ND**2).sum(axis=1)
    gram_NN = off_ND @ off_ND.T
    distance_NN = np.maximum(square_N[:, None] + square_N[None] - 2 * gram_NN, 0)
    along_N = off_ND @ p_D
    if sums:  # N gamma^2 - 2 gamma sum(along) + sum(square) <= limit, and sum(along) = 0
        limit = distance_NN.sum(axis=1).max()
        gamma = np.sqrt(max(0.0, (limit - square_N.sum()) / len(x_ND)))
    else:  # gamma^2 - 2 gamma along_i + square_i <= limit for every i
        limit = distance_NN.max()
        gamma = float((along_N + np.sqrt(np.maximum(along_N**2 - square_N + limit, 0))).min())
    return np.asarray(mean_D + max(0.0, gamma) * p_D, np.float32)


def direction_of(kind: Direction, honest_ND: NDArray[np.floating], own_D: NDArray[np.floating]) -> NDArray[np.floating]:
    """The papers' perturbations: inverse std, inverse unit, inverse sign; `poison`: towards the own harmful update."""
    mean_D = honest_ND.astype(np.float64).mean(axis=0)
    if kind == "std":
        out_D = -honest_ND.astype(np.float64).std(axis=0)
    elif kind == "poison":
        out_D = own_D.astype(np.float64) - mean_D
    else:
        out_D = -np.sign(mean_D) if kind == "sign" else -mean_D
    return np.asarray(out_D)


def known(seat: Seat, seen: Seen, sees: Sees, delta_D: Delta) -> NDArray[np.float32]:
    """The honest updates the attacker goes by; its own where it has no others (a round without honest clients)."""
    known_ND = seen.honest_ND if sees == "honest" else deltas_of(seat, seen, "clean")
    return known_ND if len(known_ND) else delta_D[None]


def clean_branch(seat: Seat, sees: Sees) -> Mapping[str, Branch]:
    return {"clean": Branch(rows=seat.clean)} if sees == "colluders" else {}


def check_sees(sees: str) -> None:
    if sees not in get_args(Sees):
        raise ConfigError(f"sees: {sees!r} is unknown; known: {', '.join(get_args(Sees))}")


@dataclass(frozen=True, slots=True)
class SignFlip:
    """Trains honestly and sends the negative of it. Knows nothing. Passes norm limits; unlike anything honest."""

    factor: float = 1.0

    honest_rows = True

    def __post_init__(self) -> None:
        check_positive("factor", self.factor)

    def change(self, seat: Seat, delta_D: Delta, seen: Seen) -> Delta:
        return sign_flip(delta_D, self.factor)


@dataclass(frozen=True, slots=True)
class Scaling:
    """The harmful update times `factor` (model replacement, Bagdasaryan et al. 2020). Knows nothing.

    Prototype: useless against L2-normalised features; norms of the honest lie within 10% of each other.
    """

    factor: float = 10.0

    def __post_init__(self) -> None:
        check_positive("factor", self.factor)

    def change(self, seat: Seat, delta_D: Delta, seen: Seen) -> Delta:
        return scaling(delta_D, self.factor)


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Noise instead of training, `factor` times as long as its own clean update. Knows nothing."""

    factor: float = 1.0

    honest_rows = True

    def __post_init__(self) -> None:
        check_positive("factor", self.factor)

    def change(self, seat: Seat, delta_D: Delta, seen: Seen) -> Delta:
        return gaussian(delta_D, self.factor, seat.rng("gaussian"))


@dataclass(frozen=True, slots=True)
class Alie:
    """A little is enough (Baruch et al. 2019). Knows the honest updates, or guesses them from colluders' clean ones.

    `z` 0: the paper's, from the numbers of clients.
    """

    z: float = 0.0
    sees: Sees = "honest"

    honest_rows = True

    def __post_init__(self) -> None:
        check_sees(self.sees)

    @property
    def omniscient(self) -> bool:
        return self.sees == "honest"

    def branches(self, seat: Seat) -> Mapping[str, Branch]:
        return clean_branch(seat, self.sees)

    def change(self, seat: Seat, delta_D: Delta, seen: Seen) -> Delta:
        honest_ND = known(seat, seen, self.sees, delta_D)
        honest = len(honest_ND) if self.sees == "honest" else max(2, seat.clients - len(seen.colluders))
        return alie(honest_ND, self.z or alie_z(honest + len(seen.colluders), len(seen.colluders)))


@dataclass(frozen=True, slots=True)
class Ipm:
    """Inner-product manipulation (Xie et al. 2020; they use 0.1 to 100). Knows the honest updates, or guesses them."""

    epsilon: float = 1.0
    sees: Sees = "honest"

    honest_rows = True

    def __post_init__(self) -> None:
        check_sees(self.sees)
        check_positive("epsilon", self.epsilon)

    @property
    def omniscient(self) -> bool:
        return self.sees == "honest"

    def branches(self, seat: Seat) -> Mapping[str, Branch]:
        return clean_branch(seat, self.sees)

    def change(self, seat: Seat, delta_D: Delta, seen: Seen) -> Delta:
        return ipm(known(seat, seen, self.sees, delta_D), self.epsilon)


@dataclass(frozen=True, slots=True)
class MinMax:
    """Min-max (`sums` False) or min-sum (Shejwalkar & Houmansadr 2021): as far as honest updates lie from each other.

    Knows the honest updates, or guesses them. `direction` "std", "unit" or "sign" is the papers' (untargeted); with
    "poison" the client trains on harmful rows and goes that way.
    """

    direction: Direction = "std"
    sees: Sees = "honest"
    sums: bool = False

    def __post_init__(self) -> None:
        check_sees(self.sees)
        if self.direction not in get_args(Direction):
            raise ConfigError(f"direction: {self.direction!r} is unknown; known: {', '.join(get_args(Direction))}")

    @property
    def omniscient(self) -> bool:
        return self.sees == "honest"

    @property
    def honest_rows(self) -> bool:
        return self.direction != "poison"

    def branches(self, seat: Seat) -> Mapping[str, Branch]:
        return clean_branch(seat, self.sees)

    def change(self, seat: Seat, delta_D: Delta, seen: Seen) -> Delta:
        honest_ND = known(seat, seen, self.sees, delta_D)
        direction_D = direction_of(self.direction, honest_ND, delta_D)
        return (min_sum if self.sums else min_max)(honest_ND, direction_D)


def _norm(x_D: NDArray[np.floating]) -> float:
    return float(np.linalg.norm(x_D.astype(np.float64)))
