"""What Assay's logits processors do, without vLLM: which row asks for what, and the token its seed gives.

The token is chosen by `assay.swarm.sampling.sample`, the very function that Assay's own nodes draw with, and every other
logit of the row becomes -inf: vLLM, asked for temperature 0, can take no other. So neither its noise nor its order of
equal logits matters. `Batch` follows the batch of model runner V1, `Slots` the request slots of V2.
Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from assay.engines.vllm.requests import Asked
from assay.swarm.sampling import Sampler, sample


def choose(logits_BV: Tensor, rows: Sequence[int], asked: Sequence[Asked], position_R: Tensor) -> None:
    """Leave in each of `rows` the one token that its seed gives, in place; other rows stay as they are.

    `position_R` int64 on the device of the logits: the index of the last input token (sampling.py, Position). Raises
    ValueError where a row has no finite logit.
    """
    by_sampler: dict[Sampler, list[int]] = {}
    for at, one in enumerate(asked):
        by_sampler.setdefault(one.sampler, []).append(at)
    device = logits_BV.device
    for sampler, members in by_sampler.items():
        row_R = torch.tensor([rows[at] for at in members], device=device)
        seed_R = torch.tensor([asked[at].seed for at in members], device=device)
        token_R = sample(logits_BV[row_R], seed_R, position_R[torch.tensor(members, device=device)], sampler)
        logits_BV[row_R] = -math.inf
        logits_BV[row_R, token_R] = 0.0


@dataclass(frozen=True, slots=True)
class _Row:
    """A request of V1: its arguments, its prompt's length, and vLLM's own list of what it has drawn so far.

    Of that list only the length counts: with asynchronous scheduling the last entries may still be placeholders.
    """

    asked: Asked
    prompt: int
    drawn: Sequence[int]

    @property
    def position(self) -> int:
        return self.prompt + len(self.drawn) - 1


@dataclass(slots=True)
class Batch:
    """Who stands in which row of V1's persistent batch, from the updates it hands to a logits processor."""

    rows: dict[int, _Row] = field(default_factory=dict)

    def update(self, change: Any) -> None:
        """Follow a `BatchUpdate` (None: nothing changed): removed, then added, then moved, as its documentation says."""
        if change is None:
            return
        for row in change.removed:
            self.rows.pop(row, None)
        for row, params, prompt, drawn in change.added:
            self.rows.pop(row, None)
            asked = Asked.of(params.extra_args)
            if asked is None:
                continue
            if prompt is None:
                raise ValueError("a seeded request needs its prompt as token ids: embeddings have no position to count")
            self.rows[row] = _Row(asked, len(prompt), drawn)
        for one, other, direction in change.moved:
            first, second = self.rows.pop(one, None), self.rows.pop(other, None)
            if first is not None:
                self.rows[other] = first
            if second is not None and direction.name == "SWAP":
                self.rows[one] = second

    def apply(self, logits_BV: Tensor) -> Tensor:
        if self.rows:
            rows = sorted(self.rows)
            position_R = torch.tensor([self.rows[row].position for row in rows], device=logits_BV.device)
            choose(logits_BV, rows, [self.rows[row].asked for row in rows], position_R)
        return logits_BV


@dataclass(slots=True)
class Slots:
    """Who stands in which request slot of V2; rows are mapped to slots, and have their positions, in every step."""

    slots: dict[int, Asked] = field(default_factory=dict)

    def add(self, slot: int, params: Any) -> bool:
        """A request enters a slot, whatever was there before. Whether it is one of Assay's."""
        asked = Asked.of(params.extra_args)
        if asked is None:
            self.slots.pop(slot, None)
            return False
        self.slots[slot] = asked
        return True

    def apply(self, logits_BV: Tensor, slot_B: Tensor, position_B: Tensor) -> Tensor:
        """`slot_B`: the slot of each row (below 0: none); `position_B`: its last input token's position."""
        if self.slots:
            found = [(row, slot) for row, slot in enumerate(slot_B.tolist()) if slot in self.slots]
            if found:
                rows = [row for row, _ in found]
                position_R = position_B[torch.tensor(rows, device=position_B.device)].long()
                choose(logits_BV, rows, [self.slots[slot] for _, slot in found], position_R)
        return logits_BV
