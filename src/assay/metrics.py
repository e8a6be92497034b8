"""Detection metrics on suspicion scores (higher = more suspicious). N scores, malicious_N their truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def auroc(score_N: Sequence[float], malicious_N: Sequence[bool]) -> float | None:
    """Area under the ROC curve with ties counted half (Mann-Whitney); None when a class is absent.

    >>> auroc([0.1, 0.9, 0.5], [False, True, False])
    1.0
    """
    bad, good = _classes(score_N, malicious_N)
    if not bad.size or not good.size:
        return None
    wins = (bad[:, None] > good[None]).sum() + 0.5 * (bad[:, None] == good[None]).sum()
    return float(wins / (bad.size * good.size))


def tpr_at_fpr(score_N: Sequence[float], malicious_N: Sequence[bool], fpr: float = 0.01) -> float | None:
    """Share of malicious scores above the lowest threshold at which at most `fpr` of the honest ones lie above it.

    With fewer than 1/fpr honest scores that means: above every honest score. None when a class is absent.
    """
    bad, good = _classes(score_N, malicious_N)
    if not bad.size or not good.size:
        return None
    allowed = int(np.floor(fpr * good.size))
    threshold = np.sort(good)[::-1][allowed]
    return float((bad > threshold).mean())


def _classes(score_N: Sequence[float], malicious_N: Sequence[bool]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    score, truth = np.asarray(score_N, float), np.asarray(malicious_N, bool)
    keep = np.isfinite(score)
    return score[keep & truth], score[keep & ~truth]
