"""Safe-FedLLM's defence levels as pure functions on probe scores, and what can be bound of a client's claims.

Source of the formulas: arXiv 2601.07177 (ACL 2026), defence levels. A *level* turns this round's scores into a trust
weight in [0, 1]. Scores and counts come from the server's own probe; steps are a client's claims, and the functions
at the end of this file hold them against the submitted adapter. Numbers out of range raise ValueError: they are the
caller's mistake, never a peer's. Malformed claims of a peer never raise.
"""

from __future__ import annotations

import math

import numpy as np

from assay.contribution import LoraUpdate, Tensors
from assay.trust import Beta, RunningMean


def step_level(trust: Beta, malicious_steps: int, steps: int, batch_size: int) -> tuple[Beta, float]:
    """Step-Level: every local step is judged; returns the new trust and its weight.

    h = malicious_steps * batch_size samples are bad, n = steps * batch_size in all. `batch_size` is the server's
    configured one, never a client's count: with a count of his own choosing a client would fill alpha at will.

    >>> step_level(Beta(), malicious_steps=1, steps=2, batch_size=8)[1]
    0.5
    """
    _check_steps(malicious_steps, steps)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    bad = malicious_steps * batch_size
    trust = trust.update(good=steps * batch_size - bad, bad=bad)
    return trust, trust.weight


def suspicion(score: float, threshold: float = 0.8, k: float = 10.0) -> float:
    """Client-Level's t in (0, 1): a sigmoid on either side of the threshold, below and above one half.

    s <= threshold: t = sigmoid(k (s / threshold - 1/2)) / 2;
    s >  threshold: t = 1/2 + sigmoid(k ((s - threshold) / (1 - threshold) - 1/2)) / 2.
    The paper has threshold = 0.8 and k = 10. t rises with s; at the threshold it jumps from 0.4967 to 0.5033
    (k = 10). A smaller k makes that jump larger and the ends (t near 0 and near 1) softer.

    >>> [round(suspicion(s), 4) for s in (0.0, 0.4, 0.8, 0.9, 1.0)]
    [0.0033, 0.25, 0.4967, 0.75, 0.9967]
    """
    if not 0 <= score <= 1:  # also refuses NaN
        raise ValueError(f"score must be a probability in [0, 1], got {score}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    if not 0 < k < math.inf:
        raise ValueError(f"k must be positive and finite, got {k}")
    if score <= threshold:
        return 0.5 * _sigmoid(k * (score / threshold - 0.5))
    return 0.5 + 0.5 * _sigmoid(k * ((score - threshold) / (1.0 - threshold) - 0.5))


def client_level(
    trust: RunningMean, score: float, threshold: float = 0.8, k: float = 10.0
) -> tuple[RunningMean, float]:
    """Client-Level: only the submitted update's score counts; the weight is the running mean of 1 - t."""
    trust = trust.update(1.0 - suspicion(score, threshold, k))
    return trust, trust.value


def shadow_level(malicious_steps: int, steps: int, power: float = 7.0) -> float:
    """Shadow-Level: (1 - r)^power with r the share of shadow steps judged malicious; no memory.

    Power 7 (paper) leaves 0.8% to a client with half its steps malicious and 48% to one with a tenth.

    >>> shadow_level(0, 10), shadow_level(5, 10), shadow_level(10, 10)
    (1.0, 0.0078125, 0.0)
    """
    _check_steps(malicious_steps, steps)
    if not 0 < power < math.inf:
        raise ValueError(f"power must be positive and finite, got {power}")
    return float((1.0 - malicious_steps / steps) ** power)


def skip_round(mean_weight: float, minimum: float = 0.2) -> bool:
    """Whether to keep the global adapter as it is: the clients' mean weight is below `minimum` (paper: 0.2).

    A NaN mean skips as well. Raised to 0.5 a round with half its clients malicious would always be skipped.
    """
    return not mean_weight >= minimum


# --- what can be bound of a claim ---------------------------------------------------------------------------------


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


def plausible_chain(update: LoraUpdate, start: Tensors, max_step_norm: float | None, steps: int) -> str:
    """Why the claimed steps cannot be the local training that was ordered; "" if nothing speaks against them.

    Checked: exactly `steps` of them; names and shapes of `start`; finite; every step moves; no step is longer (L2 norm
    over the whole adapter, float64) than `max_step_norm` (None: no bound). The bound belongs to model, learning rate
    and clipping: take the rehearsed benign maximum with a margin; too small refuses honest clients, too large lets
    one jump carry the whole poison. A plausible chain is not a true one: whoever knows the probe can make one up.
    """
    if max_step_norm is not None and not max_step_norm > 0:
        raise ValueError(f"max_step_norm must be positive, got {max_step_norm}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if len(update.steps) != steps:  # first, so that nobody makes the server walk a million steps
        return f"{len(update.steps)} steps claimed, expected {steps}"
    before = start
    for number, step in enumerate(update.steps, 1):
        unlike = _unlike(step, start)
        if unlike:
            return f"step {number}: {unlike}"
        norm = _distance(step, before)
        if not math.isfinite(norm):
            return f"step {number} is not finite"
        if norm == 0:
            return f"step {number} does not move"
        if max_step_norm is not None and norm > max_step_norm:
            return f"step {number} moves by {norm:.3g}, more than {max_step_norm:.3g}"
        before = step
    return ""


def _check_steps(malicious_steps: int, steps: int) -> None:
    if not (steps >= 1 and 0 <= malicious_steps <= steps):
        raise ValueError(f"{malicious_steps} malicious of {steps} steps: needs 0 <= malicious <= steps and a step")


def _sigmoid(x: float) -> float:
    return 0.5 + 0.5 * math.tanh(0.5 * x)  # equal to 1 / (1 + exp(-x)), but exp would overflow for a large k


def _unlike(tensors: Tensors, like: Tensors) -> str:
    """Why names or shapes differ from those of `like`; "" if they are the same."""
    if set(tensors) != set(like):
        return "tensor names differ from the adapter's"
    for name in sorted(like):
        found, wanted = np.shape(tensors[name]), np.shape(like[name])
        if found != wanted:
            return f"{name} has shape {found}, expected {wanted}"
    return ""


def _distance(a: Tensors, b: Tensors) -> float:
    """L2 norm of a - b over all tensors; float64, because float32 squares of 1e20 are infinite."""
    total = 0.0
    for name in a:
        difference = np.asarray(a[name], np.float64).ravel() - np.asarray(b[name], np.float64).ravel()
        total += float(difference @ difference)
    return math.sqrt(total)
