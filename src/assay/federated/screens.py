"""Screens of the federated wing: what is wrong with an update that has already passed the wire.

Each takes a round and returns one verdict per update (verdict.py). Nothing here trains or generates: the canary,
which needs the model, has its own module. `make` builds one by name.
Legend: N updates, M bank rows, D values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.config import ConfigError
from assay.contribution import LoraUpdate, Round
from assay.federated import levels
from assay.federated.lora import unit_rows
from assay.federated.probe import Probe, feature_deltas
from assay.trust import Beta, RunningMean
from assay.verdict import Reason, Screen, State, Verdict


def _say(
    update: LoraUpdate, screen: str, weight: float, reason: Reason, sentence: str = "", score: float = np.nan, **evidence: float
) -> Verdict:  # fmt: skip
    fine = weight == 1.0
    return Verdict(
        participant=update.participant,
        contribution=update.sha256,
        screen=screen,
        weight=weight,
        reason=Reason.OK if fine else reason,
        sentence="" if fine else sentence,
        score=float(score),
        evidence={k: float(v) for k, v in evidence.items()},
    )


class Structure:
    """Names, shapes and finiteness once more (screens may be used without the wire), and that something was trained."""

    name = "structure"

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        return [_say(u, self.name, *self._judge(u, round)) for u in round.updates], state

    def _judge(self, update: LoraUpdate, round: Round) -> tuple[float, Reason, str]:
        if set(update.tensors) != set(round.start):
            return 0.0, Reason.STRUCTURE, "tensor names differ from the global adapter's"
        for name, value in update.tensors.items():
            if value.shape != round.start[name].shape:
                return 0.0, Reason.STRUCTURE, f"{name} has shape {value.shape}, expected {round.start[name].shape}"
            if not np.isfinite(value).all():
                return 0.0, Reason.STRUCTURE, f"{name} is not finite"
        if all(np.array_equal(value, round.start[name]) for name, value in update.tensors.items()):
            return 0.0, Reason.STRUCTURE, "the update is the global adapter unchanged: nothing was trained"
        return 1.0, Reason.OK, ""


@dataclass(frozen=True, slots=True)
class Norm:
    """Norm of the update against the largest rehearsed honest norm of that round.

    Up to `clip` x the limit: weight 1; up to `refuse` x: weight limit/norm, which is clipping in the weighted sum;
    above: weight 0. Honest clients lie within 0.90-1.10 of each other; 1.15 costs them nothing.
    """

    limit_of_round: Callable[[int], float]
    clip: float = 1.15
    refuse: float = 1.5
    name: str = "norm"

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        limit = self.limit_of_round(round.index)
        norm_N = np.linalg.norm(round.deltas().astype(np.float64), axis=1)
        out = []
        for update, norm in zip(round.updates, norm_N):
            ratio = norm / limit
            weight = 1.0 if ratio <= self.clip else 0.0 if ratio > self.refuse else self.clip / ratio
            sentence = f"update norm is {ratio:.2f} x the largest rehearsed honest norm"
            out.append(_say(update, self.name, weight, Reason.NORM, sentence, ratio, norm=norm, ratio=ratio))
        return out, state


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Updates that are copies of each other count once together: k copies get weight 1/k each.

    Two honest clients never train to the same direction (their cosine stays well below `cosine`), one attacker with
    many names does. Cheap to evade by noise: it keeps careless Sybils and copied benign updates from counting twice.
    """

    cosine: float = 0.9995
    name: str = "duplicate"

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        unit_ND = unit_rows(round.deltas())
        copies_N = ((unit_ND @ unit_ND.T) >= self.cosine).sum(axis=1).clip(min=1)
        return [
            _say(u, self.name, 1.0 / int(c), Reason.DUPLICATE, f"{c} updates are copies of each other", c - 1, copies=c)
            for u, c in zip(round.updates, copies_N)
        ], state


@dataclass(frozen=True, slots=True)
class ProbeFilter:
    """A linear probe on the submitted update, refused above a rehearsed threshold on the logit.

    Stops careless attackers only: who trains a surrogate probe on his own updates removes its direction (LAB.md).
    """

    probe: Probe
    limit: float
    name: str = "probe"

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        x_ND = feature_deltas([u.tensors for u in round.updates], round.start, self.probe.features)
        out = []
        for update, logit in zip(round.updates, self.probe.logits(x_ND)):
            sentence = (
                f"probe logit {logit:.2f} is above {self.limit:.2f}, the most that honest rehearsal clients explain"
            )
            weight = float(logit <= self.limit)
            out.append(_say(update, self.name, weight, Reason.PROBE, sentence, logit - self.limit, logit=logit))
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

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        x_ND = feature_deltas([u.tensors for u in round.updates], round.start, "all_b")
        out = []
        for update, ratio in zip(round.updates, neighbour_ratio(x_ND, self.bank_MD, self.malicious_M, self.k)):
            sentence = f"{ratio:.3f} x as far from benign as from malicious updates (limit {self.limit:.3f})"
            weight = float(ratio <= self.limit)
            out.append(_say(update, self.name, weight, Reason.NEIGHBOURS, sentence, ratio - self.limit, ratio=ratio))
        return out, state


def neighbour_ratio(
    x_ND: NDArray[np.floating], bank_MD: NDArray[np.floating], malicious_M: NDArray[np.bool_], k: int
) -> NDArray[np.float64]:
    """Mean cosine distance to the k nearest benign rows over that to the k nearest malicious rows, per row of x."""
    distance_NM = 1.0 - (unit_rows(x_ND) @ unit_rows(bank_MD).T).astype(np.float64)
    benign_N = np.sort(distance_NM[:, ~malicious_M], axis=1)[:, :k].mean(axis=1)
    malicious_N = np.sort(distance_NM[:, malicious_M], axis=1)[:, :k].mean(axis=1)
    ratio_N: NDArray[np.float64] = benign_N / np.maximum(malicious_N, 1e-12)
    return ratio_N


def _claim_problem(update: LoraUpdate, round: Round, steps: int) -> tuple[Reason, str] | None:
    """Why the claimed chain of local steps cannot be believed; None if nothing speaks against it."""
    if not update.steps:
        return Reason.CLAIM_MISSING, "no step updates came with the adapter"
    if not levels.last_step_matches(update):
        return Reason.CLAIM_INCONSISTENT, "the last claimed step is not the submitted adapter"
    why = levels.plausible_chain(update, round.start, None, steps)
    return (Reason.CLAIM_INCONSISTENT, why) if why else None


@dataclass(frozen=True, slots=True)
class StepLevel:
    """Safe-FedLLM Step-Level: every local step is scored; Beta trust is the weight.

    Steps are the client's claims, bound where they can be: the last must equal the submission. `score_rounds`:
    after that round the last weight is kept (paper: 20; None = always score).
    """

    probe: Probe
    steps: int
    threshold: float = 0.8
    score_rounds: int | None = None
    name: str = "step"

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        new, out = dict(state), []
        for update in round.updates:
            trust = Beta.from_json(state[update.participant]) if update.participant in state else Beta()
            problem = _claim_problem(update, round, self.steps)
            if problem:
                out.append(_say(update, self.name, 0.0, *problem))
                continue
            if self.score_rounds is not None and round.index > self.score_rounds:
                weight, score = trust.weight, np.nan
                bad = -1
            else:
                score_K = self.probe.score_adapters(update.steps, round.start)
                bad, score = int((score_K >= self.threshold).sum()), float(score_K.max())
                trust, weight = levels.step_level(trust, bad, len(update.steps), round.batch_size)
                new[update.participant] = trust.to_json()
            sentence = f"{bad} of {len(update.steps)} steps judged malicious; trust {weight:.2f}"
            out.append(_say(update, self.name, weight, Reason.LOW_TRUST, sentence, score, malicious_steps=bad))
        return out, new


@dataclass(frozen=True, slots=True)
class ClientLevel:
    """Safe-FedLLM Client-Level: the submitted update is scored; the weight is a running mean of 1 - t."""

    probe: Probe
    threshold: float = 0.8
    score_rounds: int | None = None
    name: str = "client"

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        new, out = dict(state), []
        score_N = self.probe.score_adapters([u.tensors for u in round.updates], round.start)
        for update, score in zip(round.updates, score_N):
            trust = RunningMean.from_json(state[update.participant]) if update.participant in state else RunningMean()
            weight = trust.value
            if self.score_rounds is None or round.index <= self.score_rounds:
                trust, weight = levels.client_level(trust, float(score), self.threshold)
                new[update.participant] = trust.to_json()
            sentence = f"probe score {score:.2f}; trust {weight:.2f}"
            out.append(_say(update, self.name, weight, Reason.LOW_TRUST, sentence, score))
        return out, new


@dataclass(frozen=True, slots=True)
class ShadowLevel:
    """Safe-FedLLM Shadow-Level: a branch that restarts from the initial adapter each round is scored; w = (1-r)^7.

    Nothing binds a shadow branch to the submission: a client can send a clean one beside a poisoned adapter.
    """

    probe: Probe
    steps: int
    threshold: float = 0.8
    name: str = "shadow"

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        out = []
        for update in round.updates:
            if len(update.shadow) != self.steps:
                sentence = f"{len(update.shadow)} shadow steps came with the adapter, expected {self.steps}"
                out.append(_say(update, self.name, 0.0, Reason.CLAIM_MISSING, sentence))
                continue
            score_K = self.probe.score_adapters(update.shadow, round.initial)
            bad = int((score_K >= self.threshold).sum())
            weight = levels.shadow_level(bad, self.steps)
            sentence = f"{bad} of {self.steps} shadow steps judged malicious"
            out.append(_say(update, self.name, weight, Reason.LOW_TRUST, sentence, float(score_K.max())))
        return out, state


SCREENS: Mapping[str, Callable[..., Screen]] = {
    "structure": Structure,
    "norm": Norm,
    "duplicate": Duplicate,
    "probe": ProbeFilter,
    "neighbours": Neighbours,
    "step": StepLevel,
    "client": ClientLevel,
    "shadow": ShadowLevel,
}


def make(name: str, **params: Any) -> Screen:
    """A screen by name; third parties add theirs under the entry-point group `assay.screens`."""
    found = SCREENS.get(name)
    if found is None:
        plugins = {e.name: e for e in entry_points(group="assay.screens")}
        if name not in plugins:
            raise ConfigError(f"unknown screen {name!r}; known: {', '.join([*SCREENS, *plugins])}")
        found = plugins[name].load()
    return found(**params)
