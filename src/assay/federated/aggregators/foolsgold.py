"""FoolsGold: who pulls the same way as somebody else, round after round, is one of many. Legend: as in common.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from assay.federated.aggregators.common import Block, Memory, Present, Remembering, check_number
from assay.federated.aggregators.geometry import SCORE_SLACK, combine

LARGEST = float(np.finfo(np.float32).max)


def foolsgold(confidence: float = 1.0) -> Remembering:
    """FoolsGold (Fung et al. 2020, RAID, algorithm 1): weights by the cosine similarity of summed histories.

    A participant's history is the sum of all deltas he was heard with (weight above 0), kept by name; the published
    Safe-FedLLM code keeps none and so judges a single round. Rows most similar to another row's history lose weight;
    who resembles a worse offender is pardoned in part; the largest weight is 1; a logit (`confidence`, the paper's
    kappa, 1) drives the rest apart. The result is the mean with these weights times the given ones; the paper adds up
    without dividing. Where every row is a copy of another one nobody is left and the result is zeros.

    It is made for Sybils among honest clients whose data differ: honest clients who share a task look like Sybils
    (their cosine is high), a lone attacker does not, and a Sybil who mixes in noise of his own escapes. Repeated rows
    are Sybils here, so a weight of 2 is not a row twice.

    Memory: the history is as large as one update for each participant ever heard, in the run and in its checkpoint.

    >>> foolsgold()(np.array([[1, 0], [0, 1], [-1, -1], [-1, -1]], np.float32), [1, 1, 1, 1])
    array([0.5, 0.5], dtype=float32)
    """
    check_number("foolsgold", "confidence", confidence, 0.0, strict=True)

    def rule(rows: Present, names: Sequence[str], memory: Memory) -> tuple[NDArray[np.float32], Memory]:
        after = {f"history/{name}": np.empty(rows.width, np.float32) for name in names}
        gram_NN = np.zeros((rows.n, rows.n))
        for columns, block_NB in rows.blocks():
            history_NB = _history(block_NB, columns, names, memory)
            for key, history_B in zip(after, history_NB):
                after[key][columns] = history_B
            gram_NN += history_NB @ history_NB.T
        weight_N = rows.weight_N * similarity_weights(gram_NN, confidence)
        if not weight_N.any():
            return np.zeros(rows.width, np.float32), {**memory, **after}
        return combine(rows, weight_N / weight_N.sum()), {**memory, **after}

    return Remembering(rule)


def _history(block_NB: Block, columns: slice, names: Sequence[str], memory: Memory) -> NDArray[np.float64]:
    """What each has sent so far, this round included; as float32 keeps it, so that a resumed run sees the same."""
    history_NB = block_NB.astype(np.float64)
    for name, history_B in zip(names, history_NB):
        before_D = memory.get(f"history/{name}")
        if before_D is not None:
            history_B += before_D[columns]
    return np.clip(history_NB, -LARGEST, LARGEST).astype(np.float32).astype(np.float64)


def similarity_weights(gram_NN: NDArray[np.float64], confidence: float) -> NDArray[np.float64]:
    """Learning rates alpha in [0, 1] of algorithm 1 from inner products of the histories."""
    norm_N = np.sqrt(np.diagonal(gram_NN))
    unit_N = np.divide(1.0, norm_N, out=np.zeros_like(norm_N), where=norm_N > 0)  # no direction is like nobody's
    cosine_NN = gram_NN * unit_N[:, None] * unit_N
    np.fill_diagonal(cosine_NN, -1.0)
    if len(cosine_NN) == 1:
        return np.ones(1)
    closest_N = np.maximum(cosine_NN.max(axis=1), 0.0)
    pardoned = closest_N[None, :] > closest_N[:, None]
    ratio_NN = np.divide(closest_N[:, None], closest_N[None, :], out=np.ones_like(cosine_NN), where=pardoned)
    alpha_N = np.clip(1 - (cosine_NN * ratio_NN).max(axis=1), 0.0, 1.0)
    alpha_N[alpha_N <= SCORE_SLACK] = 0.0  # copies: 1e-16 of rounding must not be blown up to a whole weight
    if not alpha_N.any():
        return np.zeros(len(alpha_N))
    alpha_N = np.minimum(alpha_N / alpha_N.max(), 0.99)
    logit_N = np.full_like(alpha_N, -np.inf)
    np.log(np.divide(alpha_N, 1 - alpha_N), out=logit_N, where=alpha_N > 0)
    return np.asarray(np.clip(confidence * (logit_N + 0.5), 0.0, 1.0))
