"""What can be bound of a client's claims: step adapters and shadow branches it says it went through.

Bound: the last step is the submission, bit for bit; a chain has as many steps as were ordered, of the adapter's names
and shapes, finite; it starts at the adapter the server sent, so its moves sum to the submission; every move is one that
AdamW with fresh state can make at the ordered rate; no two moves are the same or parallel; each goes on roughly where
the one before went. Whatever is missing or does not fit is a reason and weight 0, never an exception. Chains must travel
as float32: in half precision the rounding of a value is larger than a step, and an honest client looks like a forger.

What binding cannot do. A *shadow* branch is trained beside the submission and nothing ties the two together: a client
may train a clean shadow on clean rows, chain and all, and send it beside a poisoned adapter. A *step* chain ends in the
submission, but whoever knows the probe can search for poison whose steps score clean. So a bound claim proves effort,
not innocence; what judges the very update that is aggregated (probe on the submission, canary, gate) stays the ground.
Legend: D values of a flattened adapter, K steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assay.contribution import LoraUpdate, Tensors

BETA1, BETA2 = 0.9, 0.999  # AdamW's, as in local_sft.py
ULPS = 4.0 * 2.0**-24  # rounding of a difference of two float32 values, in units of the larger one
SIGN = 0.05  # a first move within 5 % of the rate counts as a sign step: AdamW's eps and rounding take less


@dataclass(frozen=True, slots=True, kw_only=True)
class Ordered:
    """The local training a chain claims to be, and how much is forgiven.

    `lr`: rate of the branch (None: no bound from the optimiser, for clients that do not use AdamW with fresh state and
    no weight decay). `slack`: share by which a coordinate may pass AdamW's bound. `first_step`: least share of the
    coordinates moved by step 1 that move by the rate itself; fresh AdamW moves every one of them by +-lr. `turn`:
    least cosine between consecutive moves; AdamW's momentum keeps it up, and where there is none it must be -1.
    36 chains of honest clients on `tiny` (2 to 10 steps, rates 5e-5 to 1e-2) moved by at most 1.03 x the rate, with sign
    steps from 0.97 and cosines from 0.33. So did 36 chains of malicious clients who trained as ordered: what this catches
    is made-up chains, nothing else. Tighter settings refuse honest clients whose gradients vanish; looser ones let
    interpolated chains through.
    """

    steps: int
    lr: float | None = None
    slack: float = 0.05
    first_step: float = 0.5
    turn: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")


def last_step_matches(update: LoraUpdate, tolerance: float = 0.0) -> bool:
    """Whether the last claimed step is the submitted adapter: same names and shapes, values within `tolerance`.

    Exact by default: both are copies of the same float32 numbers, so any difference means that the evidence speaks
    of another adapter than the one that would be aggregated. No steps, NaN or infinity: False.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be finite and not negative, got {tolerance}")
    if not update.steps or _unlike(update.steps[-1], update.tensors):
        return False
    last = update.steps[-1]
    for name, value in update.tensors.items():
        claimed, sent = np.asarray(last[name]), np.asarray(value)
        if not (np.isfinite(claimed).all() and np.isfinite(sent).all()):
            return False
        if tolerance == 0:  # no float64 copies where equality is the question
            if not np.array_equal(claimed, sent):
                return False
        elif claimed.size and np.abs(claimed.astype(np.float64) - sent).max() > tolerance:
            return False
    return True


def adamw_bound(step: int) -> float:
    """Largest |move| of one coordinate in AdamW's step `step` (1-based, fresh state), in units of the rate.

    |m_hat| / sqrt(v_hat) with m and v weighted sums of the same gradients: Cauchy-Schwarz on m = sum beta1^(t-i) g_i
    against v = sum beta2^(t-i) g_i^2. Clipping scales a gradient and so both sides; eps only lowers the quotient.

    >>> adamw_bound(1), round(adamw_bound(2), 4), round(adamw_bound(10), 4)
    (1.0, 1.0014, 1.0431)
    """
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    ratio = BETA1**2 / BETA2
    spread = (1 - ratio**step) / (1 - ratio)
    return (1 - BETA1) / (1 - BETA1**step) * math.sqrt((1 - BETA2**step) / (1 - BETA2) * spread)


def chain_problem(chain: Sequence[Tensors], start: Tensors, ordered: Ordered) -> str:
    """Why `chain` cannot be the ordered training from `start`; "" if nothing speaks against it. Never raises on data.

    The whole chain is held against `Ordered`; the sentence names the step (1-based).
    """
    if len(chain) != ordered.steps:  # first, so that nobody makes the server walk a million steps
        return f"{len(chain)} steps claimed, expected {ordered.steps}"
    for number, step in enumerate(chain, 1):
        if unlike := _unlike(step, start):
            return f"step {number}: {unlike}"
        if not all(np.isfinite(value).all() for value in step.values()):
            return f"step {number} is not finite"
    flat = [_flat64(start)]
    moves: list[NDArray[np.float64]] = []
    for number, step in enumerate(chain, 1):
        flat.append(_flat64(step))
        move_D = flat[-1] - flat[-2]
        rounding_D = ULPS * np.maximum(np.abs(flat[-1]), np.abs(flat[-2]))
        if why := _move_problem(move_D, rounding_D, moves, number, ordered):
            return why
        moves.append(move_D)
    return ""


def _move_problem(
    move_D: NDArray[np.float64], rounding_D: NDArray[np.float64], before: Sequence[NDArray[np.float64]],
    number: int, ordered: Ordered,
) -> str:  # fmt: skip
    size_D = np.abs(move_D)
    if not size_D.any():
        return f"step {number} does not move"
    if ordered.lr is not None:
        limit = ordered.lr * adamw_bound(number) * (1 + ordered.slack)
        if (size_D > limit + rounding_D).any():
            worst = float(size_D.max() / ordered.lr)
            return f"step {number} moves a value by {worst:.3g} x the rate; AdamW moves it by at most {limit / ordered.lr:.3g} x"
        if number == 1:
            moved_D = size_D > rounding_D
            sign = np.abs(size_D - ordered.lr) <= SIGN * ordered.lr + rounding_D
            share = float(sign[moved_D].mean()) if moved_D.any() else 0.0
            if share < ordered.first_step:
                return f"step 1 moves {share:.0%} of its values by the rate; AdamW's first step does for nearly all"
    norm = float(np.linalg.norm(move_D))
    for earlier, other_D in enumerate(before, 1):
        scale = norm / float(np.linalg.norm(other_D))
        # parallel within rounding: no two batches give that, an interpolated chain does
        if (np.abs(move_D - scale * other_D) <= (1 + scale) * rounding_D).all():
            return f"steps {earlier} and {number} are the same move"
    if before:
        last_D = before[-1]
        cosine = float(move_D @ last_D) / (norm * float(np.linalg.norm(last_D)))
        if cosine < ordered.turn:
            return f"step {number} turns back (cosine {cosine:.2f} to the step before, least {ordered.turn:.2f})"
    return ""


def _unlike(tensors: Tensors, like: Tensors) -> str:
    """Why names or shapes differ from those of `like`; "" if they are the same."""
    if set(tensors) != set(like):
        return "tensor names differ from the adapter's"
    for name in sorted(like):
        found, wanted = np.shape(tensors[name]), np.shape(like[name])
        if found != wanted:
            return f"{name} has shape {found}, expected {wanted}"
    return ""


def _flat64(tensors: Tensors) -> NDArray[np.float64]:
    """float64, because float32 squares of 1e20 are infinite."""
    return np.concatenate([np.asarray(tensors[name], np.float64).ravel() for name in sorted(tensors)])
