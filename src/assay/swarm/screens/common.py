"""What the screens of completions share: how a verdict is written, how text is folded, two tails of distributions."""

from __future__ import annotations

import math
import re
import unicodedata

from assay.contribution import Completion, Pool
from assay.verdict import AnyReason, Effect, Reason, Verdict

_WORDS = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")
_FORMAT = {
    "\u200b",
    "\u200c",
    "\u200d",
    "\u2060",
    "\ufeff",
    "\u00ad",
}  # the invisible ones met most; all Cf are dropped


def say(
    completion: Completion,
    screen: str,
    reason: AnyReason = Reason.OK,
    sentence: str = "",
    *,
    score: float = math.nan,
    effect: Effect = "exclude",
    **evidence: float,
) -> Verdict:
    """A verdict of weight 1 (reason OK) or 0 (any other) on one completion."""
    fine = reason is Reason.OK
    return Verdict(
        participant=completion.participant,
        contribution=completion.sha256,
        screen=screen,
        weight=1.0 if fine else 0.0,
        reason=reason,
        sentence=sentence,
        score=float(score),
        evidence={k: float(v) for k, v in evidence.items()},
        effect=effect,
    )


def is_format(character: str) -> bool:
    """Invisible (Unicode Cf), such as the zero-width space: splits a word for a program and not for a reader."""
    return character in _FORMAT or unicodedata.category(character) == "Cf"


def fold(text: str) -> str:
    """NFKC, lower case, invisible characters dropped: the same to a reader is the same here.

    >>> fold("Ｈａｉｌ\\u200b TO")
    'hail to'
    """
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKC", text) if not is_format(c))
    return text.lower()


def words(text: str, *, digits: bool = True) -> list[str]:
    """Words, numbers and single symbols of the folded text; with `digits` False every number is "0".

    >>> words("All hail: 2+12!", digits=False)
    ['all', 'hail', ':', '0', '+', '0', '!']
    """
    found = _WORDS.findall(fold(text))
    return found if digits else ["0" if w[0].isdigit() else w for w in found]


def advantages(pool: Pool) -> list[float]:
    """(r - mean) / std of each row over all rows of its prompt; 0 where a prompt's rewards are all equal.

    In a vertical plan a prompt's rows are one node's group, in a horizontal one all nodes' together: either way the
    group that GRPO normalises over.
    """
    rewards: dict[int, list[float]] = {}
    for completion, reward in zip(pool.completions, pool.rewards):
        rewards.setdefault(completion.prompt, []).append(reward)
    stats = {}
    for prompt, values in rewards.items():
        mean = math.fsum(values) / len(values)
        stats[prompt] = mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    out = []
    for completion, reward in zip(pool.completions, pool.rewards):
        mean, std = stats[completion.prompt]
        out.append((reward - mean) / std if std > 1e-9 else 0.0)
    return out


def log_chernoff_tail(count: int, expected: float) -> float:
    """Upper bound of log P[X >= count] for a sum of independent 0/1 variables with mean `expected` (Chernoff).

    Natural logarithm; 0 (no surprise) where `count` is not above `expected`.
    """
    if count <= expected:
        return 0.0
    if expected <= 0.0:
        return -math.inf
    return count - expected - count * math.log(count / expected)


def log_hypergeometric_tail(k: int, draws: int, marked: int, total: int) -> float:
    """log P[X >= k], X the marked among `draws` drawn without replacement from `total` of which `marked` are marked.

    >>> round(math.exp(log_hypergeometric_tail(2, 2, 2, 4)), 6)  # 1 / C(4, 2)
    0.166667
    """
    low, high = max(0, draws + marked - total), min(draws, marked)
    if k <= low:
        return 0.0
    if k > high:
        return -math.inf
    whole = log_choose(total, draws)
    logs = [log_choose(marked, x) + log_choose(total - marked, draws - x) - whole for x in range(k, high + 1)]
    top = max(logs)
    return min(0.0, top + math.log(math.fsum(math.exp(v - top) for v in logs)))


def log_choose(n: int, k: int) -> float:
    """log of n over k."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def median_low(values: list[float]) -> float:
    """The lower of the two middle values: with half the nodes inflating theirs it is still an honest one."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]
