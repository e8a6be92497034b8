"""Thresholds of the seeded check for a pair of engines: one samples, another verifies, honest data only.

Between equal engines in fp32 every margin is 0. Another precision, kernel or library moves logits a little, and with
them the margins: measure it on the pair in use, on fresh honest completions. Whatever is allowed to honest rounding is
open to an attacker, too: `slack_bits` says how much he could write into a token at these thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.config import ConfigError
from assay.swarm.rollout import Item, generate, noise_position, score
from assay.swarm.sampling import Sampler, candidates, gumbel, margin

Ids = tuple[int, ...]
BOUNDARIES = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
FLIP_RATE = 1e-4  # least share of tokens that rounding may flip: a day of equal engines shows none in 40,000
HEADROOM = 1.25  # limits are the honest quantile times this: a quantile of a sample is itself uncertain


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Parameters of `Seeded` and of the evidence, and what they cost.

    `flip_rate`, `flip_gap`: share of tokens that rounding flips (95% upper bound) and their mean gap, with headroom.
    `false_positive_rate`: share of the calibration's own completions refused. `upper_95`: the exact 95% upper bound of
    the true rate for that many completions. `slack_bits`: log2 of the tokens within `max_margin`, mean over positions.
    """

    max_margin: float
    mean_margin: float
    max_flips: int
    flip_rate: float
    flip_gap: float
    boundary: float
    completions: int
    tokens: int
    false_positive_rate: float
    upper_95: float
    slack_bits: float
    identical: float

    def params(self) -> dict[str, float | int]:
        """What goes under `[defence.params.seeded]`."""
        return {
            "max_margin": self.max_margin,
            "mean_margin": self.mean_margin,
            "max_flips": self.max_flips,
            "flip_rate": self.flip_rate,
            "flip_gap": self.flip_gap,
            "boundary": self.boundary,
        }

    def cost(self) -> dict[str, float | int]:
        """What these limits cost the honest and leave to an attacker, and on how much that was measured."""
        return {k: v for k, v in asdict(self).items() if k not in self.params()}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(
    sampling_model: Any,
    verifying_model: Any,
    items: Sequence[Item],
    sampler: Sampler,
    *,
    max_tokens: int,
    eos: int,
    quantile: float = 0.999,
    floor: float = 0.01,
    flip: float = 1e-3,
) -> Calibration:
    """Sample `items` with one model, verify with the other, and set limits at the honest `quantile`, with headroom.

    `floor` is the least `max_margin`: rounding differs from day to day. ConfigError for fewer than 20 completions.
    """
    _enough(items)
    made = generate(sampling_model, items, sampler, max_tokens=max_tokens, eos=eos)
    return calibrate_on(
        verifying_model, items, made, sampler, max_tokens=max_tokens, eos=eos, quantile=quantile, floor=floor, flip=flip
    )


def calibrate_on(
    verifying_model: Any,
    items: Sequence[Item],
    made: Sequence[Ids],
    sampler: Sampler,
    *,
    max_tokens: int,
    eos: int,
    quantile: float = 0.999,
    floor: float = 0.01,
    flip: float = 1e-3,
) -> Calibration:
    """`calibrate` on completions of `items` that another engine drew honestly from the same weights: vLLM, say."""
    _enough(items)
    if len(made) != len(items):
        raise ConfigError(f"{len(made)} completions for {len(items)} items: give one for each, in their order")
    same = generate(verifying_model, items, sampler, max_tokens=max_tokens, eos=eos)
    boundary = BOUNDARIES[-1]
    gaps: list[NDArray[np.float32]] = []
    for boundary in BOUNDARIES:
        gaps = verify(verifying_model, items, made, sampler, boundary)
        if sum(bool(np.isinf(g).any()) for g in gaps) <= (1 - quantile) * len(gaps):
            break
    finite = [np.minimum(g, 50.0) for g in gaps]
    largest = float(np.quantile([g.max() for g in finite], quantile)) * HEADROOM
    mean = float(np.quantile([g.mean() for g in finite], quantile)) * HEADROOM
    flips = math.ceil(float(np.quantile([(g > flip).sum() for g in finite], quantile)) * HEADROOM)
    limit, mean_limit = max(floor, largest), max(floor / 10, mean)
    refused = sum(bool(g.max() > limit or g.mean() > mean_limit or (g > flip).sum() > flips) for g in finite)
    tokens, odd = sum(map(len, made)), np.concatenate([g[g > flip] for g in finite])
    return Calibration(
        max_margin=round(limit, 4),
        mean_margin=round(mean_limit, 5),
        max_flips=flips,
        flip_rate=round(max(FLIP_RATE, upper_rate(len(odd), tokens) * HEADROOM), 6),
        flip_gap=round(max(floor, float(odd.mean()) * HEADROOM if len(odd) else 0.0), 4),
        boundary=boundary,
        completions=len(made),
        tokens=tokens,
        false_positive_rate=refused / len(made),
        upper_95=upper_bound(refused, len(made)),
        slack_bits=slack_bits(verifying_model, items, made, sampler, limit),
        identical=float(np.mean([a == b for a, b in zip(made, same)])),
    )


def _enough(items: Sequence[Item]) -> None:
    if len(items) < 20:
        raise ConfigError(f"{len(items)} completions say nothing of a rate: take at least 20, better 1,000")


@torch.no_grad()
def verify(
    model: Any, items: Sequence[Item], made: Sequence[Ids], sampler: Sampler, boundary: float
) -> list[NDArray[np.float32]]:
    """Margins of each completion's tokens under its seed, in the order given."""
    out: dict[int, NDArray[np.float32]] = {}
    for at, logits_TV, seed_T, position_T, token_T in positions(model, items, made):
        out[at] = margin(logits_TV, token_T, seed_T, position_T, sampler, boundary).gap_B.cpu().numpy()
    return [out[i] for i in range(len(made))]


@torch.no_grad()
def slack_bits(model: Any, items: Sequence[Item], made: Sequence[Ids], sampler: Sampler, limit: float) -> float:
    """Mean over tokens of log2(how many candidates lie within `limit` of the seed's choice)."""
    total, count = 0.0, 0
    for _, logits_TV, seed_T, position_T, _ in positions(model, items, made):
        token_TK, value_TK = candidates(logits_TV, sampler)
        value_TK = value_TK + gumbel(seed_T, position_T, token_TK, sampler.noise)
        near_T = (value_TK >= value_TK.max(1, keepdim=True).values - limit).sum(1)
        total += float(near_T.float().log2().sum())
        count += len(near_T)
    return total / max(1, count)


def positions(
    model: Any, items: Sequence[Item], made: Sequence[Ids]
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """Per completion: its row, logits (T, V), seed, noise position and token of each position."""
    for start in range(0, len(items), 64):  # the logits of a large vocabulary do not fit at once
        part = slice(start, start + 64)
        for scored in score(model, [i.prompt for i in items[part]], made[part], micro_rows=16):
            for i, row in enumerate(scored.rows):
                size = int(scored.mask_NT[i].sum())
                steps = torch.arange(size, device=scored.token_NT.device)
                position_T = noise_position(scored.length_N[i], 0) + steps
                seed_T = torch.full_like(steps, items[start + row].seed)
                yield start + row, scored.logits_NTV[i, :size].float(), seed_T, position_T, scored.token_NT[i, :size]


def upper_rate(events: int, exposure: int, level: float = 0.95) -> float:
    """Exact one-sided upper bound of the rate of a Poisson process with so many events.

    >>> round(upper_rate(0, 1000), 5)  # the rule of three
    0.003
    """
    from scipy.stats import gamma  # takes a second to import

    return float(gamma.ppf(level, events + 1)) / exposure


def upper_bound(bad: int, count: int, level: float = 0.95) -> float:
    """Exact (Clopper-Pearson) one-sided upper bound of a rate of which `bad` of `count` were seen.

    >>> round(upper_bound(0, 1000), 5)  # the rule of three
    0.00299
    """
    from scipy.stats import beta

    return 1.0 if bad >= count else float(beta.ppf(level, bad + 1, count - bad))
