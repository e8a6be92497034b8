"""Screens of the federated wing: what is wrong with an update that has already passed the wire.

Each takes a round and returns one verdict per update (verdict.py). Nothing here trains or generates: the canary,
which needs the model, has its own module, as have the paper's levels (level_screens.py) and the unlabelled statistics
(spectral.py). `make` builds one by name.
Legend: N updates, M bank rows, D values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.config import ConfigError
from assay.contribution import BLOCK_VALUES, LoraUpdate, Round, misfit
from assay.federated.balance import Balance
from assay.federated.level_screens import ClientLevel, EvidenceLevel, ShadowLevel, StepLevel
from assay.federated.lora import feature_names, is_a
from assay.federated.probe import Probe, feature_deltas
from assay.federated.say import say
from assay.federated.spectral import Spectral
from assay.threads import ordered
from assay.verdict import Reason, Screen, State, Verdict


@dataclass(frozen=True, slots=True)
class Structure:
    """Names, shapes and finiteness once more (for who calls it by itself), and that something was trained.

    `freeze_a`: every lora_A must be the global adapter's, bit for bit (`lora.freeze_a`).
    """

    freeze_a: bool = False
    name: str = "structure"

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        return [say(u, self.name, *self._judge(u, round)) for u in round.updates], state

    def _judge(self, update: LoraUpdate, round: Round) -> tuple[float, Reason, str]:
        if told := misfit(update.tensors, round.start):
            return 0.0, Reason.STRUCTURE, told
        if all(np.array_equal(value, round.start[name]) for name, value in update.tensors.items()):
            return 0.0, Reason.STRUCTURE, "the update is the global adapter unchanged: nothing was trained"
        if self.freeze_a:
            for name in sorted(update.tensors):
                if is_a(name) and not np.array_equal(update.tensors[name], round.start[name]):
                    return 0.0, Reason.STRUCTURE, f"{name} was moved, and lora_A is frozen in this run"
        return 1.0, Reason.OK, ""


@dataclass(frozen=True, slots=True)
class Norm:
    """Norm of the update against the largest rehearsed honest norm of that round.

    Up to `clip` x the limit: weight 1; up to `refuse` x: weight limit/norm; above: weight 0. Such a weight clips a row
    against rows of weight 1; a mean divides by the weights, so where nearly all of it is too long, it moves by up to
    `refuse` x the limit, and rules that choose rows do not shorten them. Honest clients lie within 0.90-1.10 of each
    other; 1.15 costs them nothing. Without a rehearsal (`limit_of_round` None) the limit is the median norm of the round,
    which a malicious majority moves.

    `acts = "length"`: up to `refuse` x every row keeps weight 1 and is cut to `clip` x the limit where it is merged, so
    that no row longer than that acts, whatever the others send and whatever the rule.
    """

    limit_of_round: Callable[[int], float] | None
    clip: float = 1.15
    refuse: float = 1.5
    acts: str = "weight"
    name: str = "norm"

    def __post_init__(self) -> None:
        if not 0 < self.clip <= self.refuse:
            raise ValueError(f"clip must be positive and not above refuse, got {self.clip} and {self.refuse}")
        if self.acts not in ("weight", "length"):
            raise ValueError(f"acts must be weight or length, got {self.acts!r}")

    @property
    def cuts_rows(self) -> bool:
        """Whether its verdicts want rows cut: who merges must do that."""
        return self.acts == "length"

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        square_N = np.zeros(len(round.updates))
        for _, block_NB in round.blocks():
            square_N += (block_NB.astype(np.float64) ** 2).sum(axis=1)
        norm_N = np.sqrt(square_N)
        known = self.limit_of_round is not None
        limit = self.limit_of_round(round.index) if self.limit_of_round is not None else float(np.median(norm_N))
        out = []
        for update, norm in zip(round.updates, norm_N):
            ratio = norm / limit if limit > 0 else np.inf if norm > 0 else 0.0  # a majority may send nothing
            weight = 1.0 if ratio <= self.clip else 0.0 if ratio > self.refuse else self.clip / ratio
            against = "the largest rehearsed honest norm" if known else "the median norm of the round"
            sentence = f"update norm is {ratio:.2f} x {against}"
            longest = np.inf
            if self.cuts_rows and weight > 0:
                weight, longest = 1.0, self.clip * limit
            made = say(update, self.name, weight, Reason.NORM, sentence, ratio, norm=norm, ratio=ratio,
                       ratio_limit=self.clip, refused_above=self.refuse)  # fmt: skip
            out.append(replace(made, longest=longest))
        return out, state


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Updates that are copies of each other count once together: k copies get weight 1/k each.

    Two honest clients never train to the same direction (their cosine stays well below `cosine`), one attacker with
    many names does. Cheap to evade by noise: it keeps careless Sybils and copied benign updates from counting twice.
    It stands last and counts what the others left in: copies of an honest update, spoilt so that they are refused
    (50 times as long), would else cost the honest client all but 1/k of his weight.
    """

    cosine: float = 0.9995
    name: str = "duplicate"
    among_admitted: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.cosine <= 1:
            raise ValueError(f"cosine must be in (0, 1], got {self.cosine}")

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        gram_NN = np.zeros((len(round.updates), len(round.updates)))
        for _, block_NB in round.blocks():
            wide_NB = block_NB.astype(np.float64)
            gram_NN += wide_NB @ wide_NB.T
        norm_N = np.sqrt(np.diagonal(gram_NN))
        size_NN = norm_N[:, None] * norm_N
        copies_N = ((gram_NN >= self.cosine * size_NN) & (size_NN > 0)).sum(axis=1).clip(min=1)
        return [
            say(u, self.name, 1.0 / int(c), Reason.DUPLICATE, f"{c} updates are copies of each other", c - 1, copies=c)
            for u, c in zip(round.updates, copies_N)
        ], state


@dataclass(frozen=True, slots=True)
class ProbeFilter:
    """A linear probe on the submitted update, refused above a rehearsed threshold on the logit.

    Stops careless attackers only: who trains a surrogate probe on his own updates removes its direction (LAB.md).
    `probe` reads lora_B, `probe_a` lora_A: against poison that `balance` leaves there.
    """

    probe: Probe
    limit: float
    name: str = "probe"

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        out = []
        for update in round.updates:  # one by one: a matrix of all would need more memory than the updates themselves
            logit = float(self.probe.logits(feature_deltas([update.tensors], round.start, self.probe.features))[0])
            sentence = (
                f"probe logit {logit:.2f} is above {self.limit:.2f}, the most that honest rehearsal clients explain"
            )
            weight = float(logit <= self.limit)
            out.append(say(update, self.name, weight, Reason.PROBE, sentence, logit - self.limit,
                           logit=logit, logit_limit=self.limit))  # fmt: skip
        return out, state


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Ratio of mean cosine distances to the k nearest benign and k nearest malicious rows of the bank.

    Above 1 an update lies nearer to the malicious ones; `limit` is calibrated in rehearsal.
    """

    bank_MD: NDArray[np.floating]
    malicious_M: NDArray[np.bool_]
    limit: float
    k: int = 5
    name: str = "neighbours"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        cosine_NM = _cosines(round.blocks(feature_names(list(round.start), "all_b")), len(round.updates), self.bank_MD)
        out = []
        for update, ratio in zip(round.updates, _ratio(cosine_NM, self.malicious_M, self.k)):
            sentence = f"{ratio:.3f} x as far from benign as from malicious updates (limit {self.limit:.3f})"
            weight = float(ratio <= self.limit)
            out.append(say(update, self.name, weight, Reason.NEIGHBOURS, sentence, ratio - self.limit,
                           ratio=ratio, ratio_limit=self.limit))  # fmt: skip
        return out, state


def neighbour_ratio(
    x_ND: NDArray[np.floating], bank_MD: NDArray[np.floating], malicious_M: NDArray[np.bool_], k: int
) -> NDArray[np.float64]:
    """Mean cosine distance to the k nearest benign rows over that to the k nearest malicious rows, per row of x."""
    width = max(1, BLOCK_VALUES // max(1, len(bank_MD)))
    columns = (slice(at, min(at + width, x_ND.shape[1])) for at in range(0, x_ND.shape[1], width))
    return _ratio(_cosines(((c, x_ND[:, c]) for c in columns), len(x_ND), bank_MD), malicious_M, k)


def _cosines(
    blocks: Iterable[tuple[slice, NDArray[np.floating]]], count: int, bank_MD: NDArray[np.floating]
) -> NDArray[np.float64]:
    """cosine_NM of `count` rows, given in blocks of columns, with those of the bank; 0 where there is no direction.

    A bank of 66 rows is 66 times as large as one client's update: its float64 copies are made in pieces that stay in the
    cache, which is several times as fast as in one.
    """
    dot_NM = np.zeros((count, len(bank_MD)))
    square_N, square_M = np.zeros(count), np.zeros(len(bank_MD))
    width = max(1, BLOCK_VALUES // max(1, count, len(bank_MD)))
    kept = threading.local()

    def wide(name: str, block_RB: NDArray[np.floating]) -> NDArray[np.float64]:
        """A float64 copy in the thread's own memory: fresh pages for every piece would cost more than the arithmetic."""
        if (flat := getattr(kept, name, None)) is None:
            flat = np.empty(len(block_RB) * width)
            setattr(kept, name, flat)
        out_RB: NDArray[np.float64] = flat[: block_RB.size].reshape(block_RB.shape)
        out_RB[...] = block_RB
        return out_RB

    def of(piece: tuple[NDArray[np.floating], NDArray[np.floating]]) -> tuple[NDArray[np.float64], ...]:
        x_NB, bank_MB = wide("x", piece[0]), wide("bank", piece[1])
        return x_NB @ bank_MB.T, np.einsum("nb,nb->n", x_NB, x_NB), np.einsum("mb,mb->m", bank_MB, bank_MB)

    with ordered(bank_MD.size) as each:
        for columns, block_NB in blocks:
            here_MB = bank_MD[:, columns]
            cuts = (slice(at, at + width) for at in range(0, block_NB.shape[1], width))
            for dots, own, theirs in each(of, [(block_NB[:, cut], here_MB[:, cut]) for cut in cuts]):
                dot_NM += dots
                square_N += own
                square_M += theirs
    size_NM = np.sqrt(square_N)[:, None] * np.sqrt(square_M)
    cosine_NM: NDArray[np.float64] = np.divide(dot_NM, size_NM, out=np.zeros_like(dot_NM), where=size_NM > 0)
    return cosine_NM


def _ratio(cosine_NM: NDArray[np.float64], malicious_M: NDArray[np.bool_], k: int) -> NDArray[np.float64]:
    distance_NM = 1.0 - cosine_NM
    benign_N = np.sort(distance_NM[:, ~malicious_M], axis=1)[:, :k].mean(axis=1)
    malicious_N = np.sort(distance_NM[:, malicious_M], axis=1)[:, :k].mean(axis=1)
    ratio_N: NDArray[np.float64] = benign_N / np.maximum(malicious_N, 1e-12)
    return ratio_N


SCREENS: Mapping[str, Callable[..., Screen]] = {
    "structure": Structure,
    "norm": Norm,
    "duplicate": Duplicate,
    "probe": ProbeFilter,
    "neighbours": Neighbours,
    "balance": Balance,
    "probe_a": partial(ProbeFilter, name="probe_a"),
    "step": StepLevel,
    "client": ClientLevel,
    "shadow": ShadowLevel,
    "evidence": EvidenceLevel,
    "spectral": Spectral,
}


def _plugins() -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group="assay.screens")}


def names() -> list[str]:
    """Every screen `make` knows: Assay's own and those of other packages."""
    return [*SCREENS, *_plugins()]


def known(name: str) -> bool:
    return name in SCREENS or name in _plugins()


def make(name: str, **params: Any) -> Screen:
    """A screen by name; third parties add theirs under the entry-point group `assay.screens`."""
    found = SCREENS.get(name)
    if found is None:
        plugins = _plugins()
        if name not in plugins:
            raise ConfigError(f"unknown screen {name!r}; known: {', '.join(names())}")
        found = plugins[name].load()
    try:
        return found(**params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"screen {name}: {error}") from None
