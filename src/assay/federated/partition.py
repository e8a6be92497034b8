"""How rows differ between clients: topics, Dirichlet mixtures, sizes, and who is an honest stranger.

Pure functions of counts and seeds; `population` deals the rows. Legend: N clients, R rows, K topics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from assay.config import ConfigError
from assay.data import Example

OPENINGS = 8
"""Topics made of a source without styles: its most frequent first words, and the rest together."""


def topics(rows: Sequence[Example], origin_R: Sequence[str]) -> list[str]:
    """topic_R: the source of each row and, within it, its style; where a source has one style, how requests open.

    >>> topics([Example("Name a sea", "x", "a"), Example("What is 2+2?", "4", "b")], ["s", "s"])
    ['s/a', 's/b']
    """
    by_source: dict[str, list[Example]] = {}
    for row, origin in zip(rows, origin_R, strict=True):
        by_source.setdefault(origin, []).append(row)
    styled = {origin: len({row.style for row in own}) > 1 for origin, own in by_source.items()}
    frequent = {
        origin: {word for word, _ in Counter(map(_opening, own)).most_common(OPENINGS)}
        for origin, own in by_source.items()
    }
    out = []
    for row, origin in zip(rows, origin_R, strict=True):
        word = _opening(row)
        topic = row.style if styled[origin] else word if word in frequent[origin] else "other"
        out.append(f"{origin}/{topic}")
    return out


def _opening(row: Example) -> str:
    """First word of a request, lower case, letters only."""
    words = row.instruction.lower().split()
    return "".join(c for c in words[0] if c.isalpha()) if words else ""


def dirichlet(topic_R: Sequence[str], size_N: Sequence[int], alpha: float, seed: int) -> list[list[int]]:
    """Rows of each client (indices into R, each row once): its topics are drawn from Dirichlet(alpha K p).

    p are the shares of the K topics in all rows (Hsu et al. 2019, section 3; their alpha is ours times K, so that
    alpha = 1 is flat for equal shares as in the later literature). A topic that runs out drops out of the mixtures, as
    there. Within a topic rows are taken in the order given. ConfigError if there are fewer rows than are wanted.
    """
    if sum(size_N) > len(topic_R):
        raise ConfigError(
            f"data.benign: its clients' part has {len(topic_R)} rows, the clients want {sum(size_N)}; "
            "lower clients.examples or clients.total, or name more data"
        )
    names = sorted(set(topic_R))
    left: list[list[int]] = [[] for _ in names]
    for row in reversed(range(len(topic_R))):  # reversed: `pop` takes the first
        left[names.index(topic_R[row])].append(row)
    prior_K = np.array([len(rows) for rows in left]) / max(1, len(topic_R))
    rng = np.random.default_rng(seed)
    out = []
    for size in size_N:
        # not below 1e-3: a vanishing concentration underflows to a draw of NaN
        mixture_K = rng.dirichlet(np.maximum(alpha * len(names) * prior_K, 1e-3)) if names else prior_K
        own = []
        for _ in range(size):
            open_K = np.array([bool(rows) for rows in left])
            chance_K = np.where(open_K, mixture_K, 0.0)
            if not chance_K.any():  # all its topics ran out: what is left serves
                chance_K = np.array([len(rows) for rows in left], float)
            own.append(left[int(rng.choice(len(names), p=chance_K / chance_K.sum()))].pop())
        out.append(own)
    return out


def sizes(count: int, mean: int, spread: float, least: int, seed: int) -> list[int]:
    """size_N: log-normal with sigma `spread`, scaled to the mean, at least one batch (`least`) each.

    >>> sizes(3, 60, 0.0, 8, 0)
    [60, 60, 60]
    """
    if spread == 0:
        return [mean] * count
    draw_N = np.exp(spread * np.random.default_rng(seed).standard_normal(count))
    return [max(least, int(x + 0.5)) for x in mean * draw_N / draw_N.mean()]


def strangers(honest: Sequence[int], count: int, seed: int) -> list[int]:
    """Which of the honest clients are strangers, in ascending order."""
    chosen = np.random.default_rng(seed).permutation(len(honest))[:count].tolist()
    return sorted(honest[i] for i in chosen)
