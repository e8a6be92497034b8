"""Per-token evidence from logits: log-probability, distance to the top k, margin under the plan's seed.

Taken from the logits of the training forward pass; everything here runs without gradients.
Legend: N rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from assay.contribution import TokenEvidence
from assay.swarm.rollout import Scored, noise_position
from assay.swarm.sampling import Sampler, margin


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked of the logits. `k` of the logit check; `boundary`: logits forgiven at the edge of the top k."""

    sampler: Sampler
    k: int
    seeded: bool = True
    boundary: float = 0.1


@dataclass(slots=True)
class Collected:
    """Evidence gathered micro-batch by micro-batch, by row."""

    logprob: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    outside: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    margin: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    def evidence(self, rows: Sequence[int]) -> TokenEvidence:
        """In the order of `rows`."""
        return TokenEvidence(
            logprob=tuple(self.logprob[r] for r in rows),
            outside=tuple(self.outside[r] for r in rows),
            margin=tuple(self.margin[r] for r in rows) if self.margin else (),
        )


@torch.no_grad()
def collect(into: Collected, scored: Scored, seeds: Sequence[int], logprob_NT: torch.Tensor, wanted: Wanted) -> None:
    """Add the evidence of one micro-batch. `seeds` are those of `scored.rows`, `logprob_NT` at the temperature."""
    mask_NT = scored.mask_NT
    row_B, step_B = mask_NT.nonzero(as_tuple=True)
    logits_BV = scored.logits_NTV[mask_NT].float()
    token_B = scored.token_NT[mask_NT]
    k = min(wanted.k, logits_BV.shape[1]) if wanted.k else logits_BV.shape[1]
    kth_B = logits_BV.topk(k, dim=1).values[:, -1]
    outside_B = (kth_B - logits_BV.gather(1, token_B[:, None])[:, 0]).clamp(min=0)
    parts = {"logprob": logprob_NT[mask_NT].float(), "outside": outside_B}
    if wanted.seeded:
        seed_N = torch.tensor(seeds, device=token_B.device)
        position_B = noise_position(scored.length_N[row_B], 0) + step_B
        parts["margin"] = margin(logits_BV, token_B, seed_N[row_B], position_B, wanted.sampler, wanted.boundary).gap_B
    sizes = mask_NT.sum(1).tolist()
    for name, value_B in parts.items():
        split = np.split(value_B.cpu().numpy(), np.cumsum(sizes)[:-1])
        getattr(into, name).update(zip(scored.rows, split))
