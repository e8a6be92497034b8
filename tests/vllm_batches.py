"""What vLLM hands to a logits processor, made from a real model's logits: batches that requests enter, leave and move in.

Not vLLM. It makes the inputs that vLLM documents (`BatchUpdate` of model runner V1; slots, rows and positions of V2)
with as much moving about as its interfaces allow, and takes the arg max of what comes back, as vLLM does at
temperature 0. Whether a token is right is for Assay's own sampler and verifier to say.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from assay.swarm.rollout import Item

WIDEST = 5  # rows of a batch; fewer than there are requests


class Move(Enum):
    """As vLLM's `MoveDirectionality`."""

    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass(slots=True)
class Request:
    """`seen` is the list that a processor is shown: placeholders, as under asynchronous scheduling."""

    number: int
    prompt: tuple[int, ...]
    params: Any
    drawn: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    slot: int = -1


@torch.no_grad()
def last_logits(model: Any, texts: Sequence[Sequence[int]]) -> Tensor:
    """Logits (B, V) after each text: one pass over right-padded rows, no cache."""
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    logits = model(input_ids=ids, attention_mask=mask).logits
    return logits[torch.arange(len(texts)), torch.tensor([len(text) - 1 for text in texts])].float()


def requests(items: Sequence[Item], params: Callable[[int], dict[str, Any] | None]) -> list[Request]:
    """A request for each item; `params(number)` is its `extra_args`."""
    return [Request(n, item.prompt, SimpleNamespace(extra_args=params(n))) for n, item in enumerate(items)]


def run_v1(
    model: Any, processor: Any, waiting: list[Request], *, max_tokens: int, eos: int, seed: int = 0
) -> list[tuple[int, ...]]:
    """A persistent batch: finished rows are removed, new ones take their places or the end, holes are filled from the
    end (one-way moves), and rows are swapped at random."""
    rng, batch, done, moves = random.Random(seed), [], list(waiting), {Move.SWAP: 0, Move.UNIDIRECTIONAL: 0}
    waiting = list(waiting)
    over: set[int] = set()
    while waiting or batch:
        removed = [row for row, one in enumerate(batch) if one.number in over]
        holes, added, moved = sorted(removed, reverse=True), [], []
        while waiting and (holes or len(batch) < WIDEST):
            one = waiting.pop(0)
            if holes:
                row = holes.pop()  # the lowest; a row that is taken again is not listed as removed
                removed.remove(row)
                batch[row] = one
            else:
                row = len(batch)
                batch.append(one)
            added.append((row, one.params, list(one.prompt), one.seen))
        for hole in sorted(holes):
            while batch and len(batch) - 1 in holes:
                batch.pop()
            if hole < len(batch):
                moved.append((len(batch) - 1, hole, Move.UNIDIRECTIONAL))
                batch[hole] = batch.pop()
        if len(batch) > 1 and rng.random() < 0.5:
            a, b = rng.sample(range(len(batch)), 2)
            moved.append((a, b, Move.SWAP))
            batch[a], batch[b] = batch[b], batch[a]
        for *_, direction in moved:
            moves[direction] += 1
        if not batch:
            break
        changed = removed or added or moved
        processor.update(
            SimpleNamespace(batch_size=len(batch), removed=removed, added=added, moved=moved) if changed else None
        )
        over = _step(model, processor.apply, batch, max_tokens, eos)
    assert min(moves.values()) > 0, f"the batch never moved about: {moves}"
    return [tuple(one.drawn) for one in done]


def run_v2(
    model: Any, processor: Any, waiting: list[Request], *, max_tokens: int, eos: int, seed: int = 0
) -> list[tuple[int, ...]]:
    """Slots that are given again as they come free; rows in another order in every step, one of them padding."""
    rng, batch, done, free = random.Random(seed), [], list(waiting), list(range(WIDEST))
    waiting, used = list(waiting), 0
    while waiting or batch:
        while waiting and free:
            one = waiting.pop(0)
            one.slot = free.pop(rng.randrange(len(free)))
            used += 1
            processor.add(one.slot, one.params)
            batch.append(one)
        rng.shuffle(batch)
        slot_B = torch.tensor([*(one.slot for one in batch), -1], dtype=torch.int32)
        position_B = torch.tensor([*(len(one.prompt) + len(one.drawn) - 1 for one in batch), 0])

        def apply(logits_BV: Tensor, slot_B: Tensor = slot_B, position_B: Tensor = position_B) -> Tensor:
            padded_BV = torch.cat([logits_BV, torch.zeros(1, logits_BV.shape[1])])
            found_BV: Tensor = processor.apply(padded_BV, slot_B, position_B)
            assert not found_BV[-1].any()
            return found_BV[:-1]

        over = _step(model, apply, batch, max_tokens, eos)
        free += [one.slot for one in batch if one.number in over]
        batch = [one for one in batch if one.number not in over]
    assert used > WIDEST, "no slot was given again"
    return [tuple(one.drawn) for one in done]


def _step(
    model: Any, apply: Callable[[Tensor], Tensor], batch: Sequence[Request], max_tokens: int, eos: int
) -> set[int]:
    """One token for each; the numbers of those that are done with it."""
    logits_BV = last_logits(model, [[*one.prompt, *one.drawn] for one in batch])
    token_B = apply(logits_BV.clone()).argmax(-1).tolist()
    over = set()
    for one, token, own in zip(batch, token_B, logits_BV):
        if one.params.extra_args is None:
            assert token == int(own.argmax()), "a request that is none of Assay's was changed"
        one.drawn.append(token)
        one.seen.append(-1)
        if token == eos or len(one.drawn) == max_tokens:
            over.add(one.number)
    return over
