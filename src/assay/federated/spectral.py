"""Screen `spectral`: statistics of the round itself, for operators who have no labelled data. Weak, and said to be.

Per LoRA module the change of the product B A is taken (rank at most 2r, its spectrum through two thin QRs), and five
statistics of it; each becomes a robust z-score among the clients of the round. Cf. arXiv 2602.15195, which fits a
logistic regression on five such statistics (leading singular value, Frobenius norm, energy concentration, entropy,
kurtosis) of labelled adapters; here nothing is labelled, and the agreement of the leading singular directions stands
in for kurtosis. What is compared is the round: a majority of attackers moves the medians, an attacker who rescales
each module and borrows honest directions passes, and an honest client with odd data may not. Use it beside others.
Legend: N clients, M modules, S statistics, R rank (2r).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assay.contribution import Round, Tensors
from assay.federated.say import say
from assay.verdict import Reason, State, Verdict

STATISTICS = ("norm", "leading", "concentration", "entropy", "agreement")
FEWEST = 4
"""Updates under which a median and its spread say nothing."""


@dataclass(frozen=True, slots=True)
class Spectral:
    """Weight 0 for an update whose typical z-score in any of the five statistics lies beyond `limit`.

    The score of a statistic is the median over modules of |z|, so that one odd layer is forgiven; `limit` is in robust
    standard deviations (1.4826 MAD, floored at `floor` of the median so that near-equal clients are not torn apart).
    Fewer than four updates cannot be compared and get weight 0: with fewer clients a round use another screen.
    """

    limit: float = 6.0
    floor: float = 0.02
    name: str = "spectral"

    def __post_init__(self) -> None:
        if not (self.limit > 0 and self.floor > 0):
            raise ValueError(f"limit and floor must be positive, got {self.limit} and {self.floor}")

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        if len(round.updates) < FEWEST:
            told = f"{len(round.updates)} updates cannot be compared with each other; at least {FEWEST} are needed"
            return [say(u, self.name, 0.0, Reason.SPECTRAL, told) for u in round.updates], state
        z_NS = z_scores(statistics([u.tensors for u in round.updates], round.start), self.floor)
        out = []
        for update, z_S in zip(round.updates, z_NS):
            worst = int(z_S.argmax())
            told = f"{STATISTICS[worst]} lies {z_S[worst]:.1f} deviations from the round's (limit {self.limit:.1f})"
            weight = float(z_S[worst] <= self.limit)
            evidence = {name: float(z) for name, z in zip(STATISTICS, z_S)} | {"score_limit": self.limit}
            out.append(say(update, self.name, weight, Reason.SPECTRAL, told, float(z_S[worst]), **evidence))
        return out, state


def modules(tensors: Tensors) -> list[tuple[str, str]]:
    """Names of (lora_A, lora_B) of every module, sorted. ValueError without any."""
    pairs = [(n, n.replace("lora_A", "lora_B")) for n in sorted(tensors) if "lora_A" in n]
    pairs = [(a, b) for a, b in pairs if b in tensors]
    if not pairs:
        raise ValueError("the adapter has no pairs of lora_A and lora_B")
    return pairs


def change_svd(
    a: NDArray[np.float32], b: NDArray[np.float32], a0: NDArray[np.float32], b0: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """SVD of B A - B0 A0 without forming it: u (out, R), singular values R, v (R, in), float64."""
    left, left_r = np.linalg.qr(np.concatenate([b, -b0], axis=1, dtype=np.float64))
    right, right_r = np.linalg.qr(np.concatenate([a, a0], axis=0, dtype=np.float64).T)
    u, s, v = np.linalg.svd(left_r @ right_r.T)
    return left @ u[:, : len(s)], s, v[: len(s)] @ right.T


def statistics(adapters: list[Tensors], start: Tensors) -> NDArray[np.float64]:
    """The five statistics of every client and module: (N, M, S), in the order of STATISTICS.

    norm: log Frobenius norm; leading: log of the largest singular value; concentration: its share of the energy;
    entropy: of the energy shares, in nats; agreement: median |cosine| of the leading direction (u1 v1^T) with the
    other clients'. A module that does not move has norm and leading at log of the smallest float, the rest 0.
    """
    pairs = modules(start)
    out_NMS = np.zeros((len(adapters), len(pairs), len(STATISTICS)))
    tiny = np.finfo(np.float64).tiny
    for m, (a, b) in enumerate(pairs):
        left, right = [], []
        for n, adapter in enumerate(adapters):
            u, s, v = change_svd(adapter[a], adapter[b], start[a], start[b])
            energy = s**2 / max(float((s**2).sum()), tiny)
            positive = energy[energy > 0]
            entropy = float(-(positive * np.log(positive)).sum())
            out_NMS[n, m, :4] = (
                np.log(max(float(np.linalg.norm(s)), tiny)), np.log(max(float(s[0]), tiny)), energy[0], entropy,
            )  # fmt: skip
            moved = float(s[0] > 0)
            left.append(u[:, 0] * moved)
            right.append(v[0] * moved)
        left_N, right_N = np.stack(left), np.stack(right)
        cosine_NN = np.abs((left_N @ left_N.T) * (right_N @ right_N.T))
        for n in range(len(adapters)):
            out_NMS[n, m, 4] = np.median(np.delete(cosine_NN[n], n))
    return out_NMS


def z_scores(x_NMS: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    """|robust z| of every client in every statistic, median over modules: (N, S)."""
    middle_MS = np.median(x_NMS, axis=0)
    spread_MS = 1.4826 * np.median(np.abs(x_NMS - middle_MS), axis=0)
    # of a logarithm the floor is a share by itself; of a share or an entropy it is taken relative to the median
    least_MS = np.full_like(middle_MS, floor)
    least_MS[:, 2:] = np.maximum(floor * np.abs(middle_MS[:, 2:]), floor**2)
    z_NMS = np.abs(x_NMS - middle_MS) / np.maximum(spread_MS, least_MS)
    z_NS: NDArray[np.float64] = np.median(z_NMS, axis=1)
    return z_NS
