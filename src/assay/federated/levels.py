"""Safe-FedLLM's defence levels as pure functions on probe scores.

Source of the formulas: arXiv 2601.07177 (ACL 2026), defence levels. A *level* turns this round's scores into a trust
weight in [0, 1]. Scores and counts come from the server's own probe; steps are a client's claims (claims.py holds them
against the submission). Numbers out of range raise ValueError: they are the caller's mistake, never a peer's.
"""

from __future__ import annotations

import hashlib
import hmac
import math

from assay.trust import Audited, Beta, Frozen, RunningMean


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


def evidence_level(
    trust: Audited, weight: float, clean: bool, *, audited: bool, agree: int = 3, readmit: int = 3
) -> tuple[Audited, float]:
    """Assay's Evidence-Level: trust is earned by audits, spent by one bad audit, and never for ever.

    `weight` and `clean` are what this round's evidence says, `audited` whether the server looked. A client that has
    not passed `agree` audits is looked at in every round and gets that round's own weight. A trusted one that is not
    looked at gets the mean of its last `agree` weights. One that is looked at gets this round's weight and nothing of
    its past (memoryless: a sleeper is caught in its first audited bad round). A bad audit gives 0 and takes trust and
    weights away; the client then stays at 0 and under audit until `readmit` clean rounds in a row.

    >>> fresh = Audited()
    >>> fresh, w = evidence_level(fresh, 0.9, True, audited=True); w
    0.9
    >>> evidence_level(fresh, 0.9, False, audited=True)
    (Audited(weights=(), barred=True, clean=0), 0.0)
    """
    _check_weight(weight)
    if not audited:
        if not trust.trusted(agree):
            raise ValueError("a client that is not trusted yet must be audited")
        return trust, trust.mean
    if not clean:
        return Audited(barred=True), 0.0
    if trust.barred:
        if trust.clean + 1 < readmit:
            return Audited(barred=True, clean=trust.clean + 1), 0.0
        return Audited(), weight
    return Audited(weights=(*trust.weights, weight)[-agree:]), weight


def audited(secret: str, participant: str, round: int, share: float) -> bool:
    """Whether the server looks at a trusted client in this round: a draw from a secret of the run.

    HMAC-SHA256 of (participant, round) under `secret` as a number in [0, 1), below `share`. Drawn after the message is
    in, the same on resume, and without the secret no better to guess than a coin.

    >>> [audited("s", "a", r, 0.5) for r in range(6)] == [audited("s", "a", r, 0.5) for r in range(6)]
    True
    >>> audited("s", "a", 1, 1.0), audited("s", "a", 1, 0.0)
    (True, False)
    """
    digest = hmac.new(secret.encode(), f"{round}/{participant}".encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def published_evidence_level(
    trust: Frozen, weight: float, malicious: bool, *, agree: int = 3, audit_every: int = 5
) -> tuple[Frozen, float]:
    """Evidence-Level as in Safe-FedLLM's published code, holes included; only `published.py` uses it.

    `weight` is the shadow weight of the round, `malicious` the verdict on the last shadow step. Rounds are collected;
    `agree` in a row of one verdict freeze it: malicious is 0 for good, benign the mean of their weights; `agree` that
    differ are thrown away. A benign client is looked at in every `audit_every`-th of its rounds only, which it can
    count; a failed audit gives 0 and starts again from nothing.
    """
    _check_weight(weight)
    if trust.verdict == "malicious":
        return trust, 0.0
    if trust.verdict == "benign":
        if trust.since + 1 < audit_every:
            return Frozen(trust.verdict, trust.weight, trust.since + 1), trust.weight
        return (Frozen(), 0.0) if malicious else (Frozen("benign", trust.weight), trust.weight)
    rounds = (*trust.rounds, (weight, malicious))
    if len(rounds) < agree:
        return Frozen(rounds=rounds), weight
    if all(bad for _, bad in rounds):
        return Frozen("malicious"), 0.0
    if not any(bad for _, bad in rounds):
        mean = sum(w for w, _ in rounds) / len(rounds)
        return Frozen("benign", mean), mean
    return Frozen(), weight


def skip_round(mean_weight: float, minimum: float = 0.2) -> bool:
    """Whether to keep the global adapter as it is: the clients' mean weight is below `minimum` (paper: 0.2).

    A NaN mean skips as well. Raised to 0.5 a round with half its clients malicious would always be skipped.
    """
    return not mean_weight >= minimum


def _check_steps(malicious_steps: int, steps: int) -> None:
    if not (steps >= 1 and 0 <= malicious_steps <= steps):
        raise ValueError(f"{malicious_steps} malicious of {steps} steps: needs 0 <= malicious <= steps and a step")


def _check_weight(weight: float) -> None:
    if not 0 <= weight <= 1:  # also refuses NaN
        raise ValueError(f"weight must lie in [0, 1], got {weight}")


def _sigmoid(x: float) -> float:
    return 0.5 + 0.5 * math.tanh(0.5 * x)  # equal to 1 / (1 + exp(-x)), but exp would overflow for a large k
