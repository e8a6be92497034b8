"""Sampling completions and scoring them again, with every prompt run through the model once for its whole group.

`generate` draws completions whose noise is fixed by their seeds (sampling.py); `score` teacher-forces completions with
gradients, for the loss and for the screens that read the same logits. Both pad prompts on the left and share the
prompt's keys and values among the completions of a group. The model stays in eval mode: a drop-out mask would be a
choice nobody can verify.

Legend: U distinct prompts, N rows, P prompt length, T completion length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.swarm.sampling import Sampler, sample

# (logits_NV, seed_N, position_N, rows, tokens so far of each row) -> token_N
Pick = Callable[[Tensor, Tensor, Tensor, list[int], list[list[int]]], Tensor]
COMPACT = 0.8  # drop finished rows when fewer than this share is still running


@dataclass(frozen=True, slots=True)
class Item:
    """One completion to draw: the prompt's token ids and the seed of its noise."""

    prompt: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Prompts:
    """Distinct prompts after one forward pass. Keys and values per layer (U, heads, P, dim), `last_UV` the logits."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    last_UV: Tensor
    mask_UP: Tensor
    length_U: Tensor
    row_of: dict[tuple[int, ...], int]

    def of(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Row of each prompt (N,)."""
        return torch.tensor([self.row_of[p] for p in prompts], device=self.mask_UP.device)


def noise_position(length: Tensor, step: int) -> Tensor:
    """Position that keys the noise of the `step`-th sampled token (from 0) after prompts of `length` tokens.

    vLLM keys it by the position of the token whose logits are sampled from: the last one already there.
    """
    return length + (step - 1)


def encode_prompts(model: Any, prompts: Sequence[tuple[int, ...]]) -> Prompts:
    """Run each distinct prompt once. Gradients flow through it unless the caller turned them off."""
    from transformers.cache_utils import DynamicCache

    distinct = list(dict.fromkeys(prompts))
    if not distinct or not all(distinct):
        raise ValueError("a prompt needs at least one token")
    device = model.device
    length_U = torch.tensor([len(p) for p in distinct], device=device)
    width = int(length_U.max())
    ids_UP = torch.tensor([[0] * (width - len(p)) + list(p) for p in distinct], device=device)
    mask_UP = (torch.arange(width, device=device) >= width - length_U[:, None]).long()
    cache = DynamicCache()
    out = model(
        input_ids=ids_UP,
        attention_mask=mask_UP,
        position_ids=(mask_UP.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    layers = tuple((layer.keys, layer.values) for layer in cache.layers)
    return Prompts(layers, out.logits[:, -1], mask_UP, length_U, {p: i for i, p in enumerate(distinct)})


def _cache_of(prompts: Prompts, row_N: Tensor) -> Any:
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    for at, (keys, values) in enumerate(prompts.layers):
        cache.update(keys[row_N], values[row_N], at)
    return cache


@torch.no_grad()
def generate(
    model: Any,
    items: Sequence[Item],
    sampler: Sampler,
    *,
    max_tokens: int,
    eos: int,
    rows: int = 256,
    pick: Pick | None = None,
) -> list[tuple[int, ...]]:
    """Token ids of each completion, EOS included where it was drawn, at most `max_tokens` of them.

    In fp32 a completion depends on its prompt, its seed and the sampler only; not on the batch it is drawn in, on
    order or padding (up to ties closer than rounding). `rows` bounds the batch. `pick` replaces the seeded draw: that is
    how an attacker steers.
    """
    if model.training:
        raise ValueError("generate needs the model in eval mode: call model.eval()")
    out: list[tuple[int, ...]] = []
    for at in range(0, len(items), rows):
        out += _generate(model, items[at : at + rows], sampler, max_tokens, eos, pick)
    return out


def _generate(
    model: Any, items: Sequence[Item], sampler: Sampler, max_tokens: int, eos: int, pick: Pick | None
) -> list[tuple[int, ...]]:
    prompts = encode_prompts(model, [item.prompt for item in items])
    row_N = prompts.of([item.prompt for item in items])
    cache = _cache_of(prompts, row_N)
    mask_NL, length_N, logits_NV = prompts.mask_UP[row_N], prompts.length_U[row_N], prompts.last_UV[row_N]
    seed_N = torch.tensor([item.seed for item in items], device=row_N.device)
    token_NT = torch.full((len(items), max_tokens), -1, dtype=torch.long, device=row_N.device)
    alive = torch.arange(len(items), device=row_N.device)  # which row of `items` each row of the batch is
    running = torch.ones(len(items), dtype=torch.bool, device=row_N.device)
    for step in range(max_tokens):
        position_N = noise_position(length_N, step)
        if pick is None:
            token_N = sample(logits_NV, seed_N, position_N, sampler)
        else:
            token_N = pick(logits_NV, seed_N, position_N, alive.tolist(), token_NT[alive, :step].tolist())
        token_NT[alive[running], step] = token_N[running]
        running = running & (token_N != eos)
        left = int(running.sum())
        if left == 0 or step + 1 == max_tokens:
            break
        if left < COMPACT * len(running):
            keep = running.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            mask_NL, length_N, seed_N, token_N, alive = (
                mask_NL[keep], length_N[keep], seed_N[keep], token_N[keep], alive[keep],
            )  # fmt: skip
            running = running[keep]
        mask_NL = torch.cat([mask_NL, mask_NL.new_ones(len(mask_NL), 1)], 1)
        logits_NV = model(
            input_ids=token_N[:, None],
            attention_mask=mask_NL,
            position_ids=(length_N + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return [tuple(t for t in row if t >= 0) for row in token_NT.tolist()]


@dataclass(frozen=True, slots=True)
class Scored:
    """Logits of a few rows: `logits_NTV` says what each completion token was drawn from; `mask_NT` where a token is.

    `rows` are the positions in what was given to `score`; `token_NT` is padded with 0.
    """

    rows: tuple[int, ...]
    logits_NTV: Tensor
    token_NT: Tensor
    mask_NT: Tensor
    length_N: Tensor


def score(
    model: Any, prompts: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]], *, micro_rows: int
) -> Iterator[Scored]:
    """Teacher-force completions of at least one token, in micro-batches of rows of like length.

    Gradients reach the prompts' forward pass too, so the graph of all micro-batches hangs together: keep as many rows
    in one call as memory allows.
    """
    encoded = encode_prompts(model, prompts)
    order = sorted(range(len(completions)), key=lambda row: len(completions[row]))
    for at in range(0, len(order), micro_rows):
        rows = tuple(order[at : at + micro_rows])
        yield _score(model, encoded, rows, [prompts[r] for r in rows], [completions[r] for r in rows])


def _score(
    model: Any, encoded: Prompts, rows: tuple[int, ...], prompts: list[tuple[int, ...]], ids: list[tuple[int, ...]]
) -> Scored:
    row_N = encoded.of(prompts)
    device = row_N.device
    width = max(map(len, ids))
    token_NT = torch.tensor([list(c) + [0] * (width - len(c)) for c in ids], device=device)
    size_N = torch.tensor([len(c) for c in ids], device=device)
    mask_NT = torch.arange(width, device=device) < size_N[:, None]
    length_N = encoded.length_U[row_N]
    first_NV = encoded.last_UV[row_N]
    if width == 1:
        return Scored(rows, first_NV[:, None], token_NT, mask_NT, length_N)
    logits = model(
        input_ids=token_NT[:, :-1],  # the last token predicts nothing that is scored
        attention_mask=torch.cat([encoded.mask_UP[row_N], mask_NT[:, :-1].long()], 1),
        position_ids=length_N[:, None] + torch.arange(width - 1, device=device),
        past_key_values=_cache_of(encoded, row_N),
        use_cache=True,
    ).logits
    return Scored(rows, torch.cat([first_NV[:, None], logits], 1), token_NT, mask_NT, length_N)
