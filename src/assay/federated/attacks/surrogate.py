"""A probe of the attackers' own: fitted on their clean and poisoned updates where the real one is secret.

Few dozen labelled updates are enough (prototype: every linear probe falls to it, secret coordinates included).
Legend: M labelled updates, D values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from assay.contribution import Tensors
from assay.federated.attacks.seat import Seat, Seen, deltas_of, where
from assay.federated.lora import Features, feature_names, unit_rows

BENIGN, POISON = "surrogate/benign", "surrogate/poison"
REMEMBERED = 24
"""Rows of each kind kept for later rounds: a checkpoint carries them."""


def names_of(like: Tensors, features: Features) -> tuple[str, ...]:
    return feature_names(list(like), features)


def labelled(seat: Seat, seen: Seen) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """benign_MD and poison_MD, unit rows over lora_B of all layers: this round's branches of all colluders, and memory."""
    at = where(seat.start, names_of(seat.start, "all_b"))
    out = []
    for branch, key in (("clean", BENIGN), ("main", POISON)):
        now_ND = unit_rows(deltas_of(seat, seen, branch)[:, at])
        out.append(np.concatenate([seat.memory[key], now_ND]) if key in seat.memory else now_ND)
    return out[0], out[1]


def remember(seat: Seat, seen: Seen) -> Tensors:
    """The newest labelled rows, for the next round."""
    benign_MD, poison_MD = labelled(seat, seen)
    return {BENIGN: benign_MD[-REMEMBERED:], POISON: poison_MD[-REMEMBERED:]}


def fit_direction(
    benign_MD: NDArray[np.floating], poison_MD: NDArray[np.floating], ridge: float = 0.1
) -> tuple[NDArray[np.float64], float]:
    """Unit direction from benign to malicious (ridge regression of the labels, solved in the rows) and the mean cosine
    of the benign rows with it."""
    x_MD = np.concatenate([benign_MD, poison_MD]).astype(np.float64)
    y_M = np.concatenate([-np.ones(len(benign_MD)), np.ones(len(poison_MD))])
    centred_MD, label_M = x_MD - x_MD.mean(axis=0), y_M - y_M.mean()
    gram_MM = centred_MD @ centred_MD.T
    scale = max(float(np.trace(gram_MM)) / len(y_M), 1e-12)
    w_D = centred_MD.T @ np.linalg.solve(gram_MM + ridge * scale * np.eye(len(y_M)), label_M)
    norm = float(np.linalg.norm(w_D))
    if norm == 0:
        return w_D, 0.0
    w_D = w_D / norm
    return w_D, float((benign_MD.astype(np.float64) @ w_D).mean()) if len(benign_MD) else 0.0


def with_cosine(x_D: NDArray[np.floating], unit_D: NDArray[np.floating], cosine: float) -> NDArray[np.float64]:
    """x with the part along `unit_D` replaced so that its cosine with it is `cosine`; the part across stays as it is.

    >>> with_cosine(np.array([3.0, 4.0]), np.array([1.0, 0.0]), 0.0)
    array([0., 4.])
    """
    x_D, unit_D = x_D.astype(np.float64), unit_D.astype(np.float64)
    across_D = x_D - (x_D @ unit_D) * unit_D
    cosine = float(np.clip(cosine, -0.99, 0.99))
    along = float(np.linalg.norm(across_D)) * cosine / float(np.sqrt(1 - cosine**2))
    return np.asarray(across_D + along * unit_D)
