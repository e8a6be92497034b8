"""The three things that need the model: training clients, measuring losses, writing answers.

Everything else in this wing is arithmetic on adapters and is handed a `Compute`. `Serial` works in this process;
`engines.pool.Pool` spreads the same jobs over processes with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from assay.contribution import Tensors
from assay.data import Example, render_prompt
from assay.federated.local_sft import LocalResult, LocalSettings, Objective, row_nll, train
from assay.federated.lora import Carrier

Tick = Callable[[int], None]
ANSWER_BATCH = 20
"""Prompts per generation batch; fixed, because padding decides last bits and no result may hang on the worker count."""


def no_tick(count: int) -> None:
    """Default progress callback: nobody watches."""


@dataclass(frozen=True, slots=True)
class TrainJob:
    """One client's local training: where it starts, its rows, its settings, SCAFFOLD's correction if there is one, and
    what it minimises beside its rows' loss."""

    start: Tensors
    rows: tuple[Example, ...]
    settings: LocalSettings
    correction: Tensors | None = None
    objective: Objective = field(default_factory=Objective)


class Compute(Protocol):
    """Jobs in, results out, in order. `tick(n)` is called as n more jobs are done."""

    def initial(self) -> Tensors:
        """Round 0's adapter."""
        ...

    def train(self, jobs: Sequence[TrainJob], tick: Tick = no_tick) -> list[LocalResult]: ...

    def row_nll(
        self, adapters: Sequence[Tensors], rows: Sequence[Example], settings: LocalSettings, tick: Tick = no_tick
    ) -> list[NDArray[np.float64]]: ...

    def answers(
        self, adapter: Tensors, prompts: Sequence[str], template: str, new_tokens: int, tick: Tick = no_tick
    ) -> list[str]: ...


class Serial:
    """One carrier, one thread of work."""

    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier

    def initial(self) -> Tensors:
        return self.carrier.initial()

    def train(self, jobs: Sequence[TrainJob], tick: Tick = no_tick) -> list[LocalResult]:
        out = []
        for job in jobs:
            out.append(train(self.carrier, job.start, job.rows, job.settings, None, job.correction, job.objective))
            tick(1)
        return out

    def row_nll(
        self, adapters: Sequence[Tensors], rows: Sequence[Example], settings: LocalSettings, tick: Tick = no_tick
    ) -> list[NDArray[np.float64]]:
        out = []
        for adapter in adapters:
            out.append(row_nll(self.carrier, adapter, rows, settings))
            tick(1)
        return out

    def answers(
        self, adapter: Tensors, prompts: Sequence[str], template: str, new_tokens: int, tick: Tick = no_tick
    ) -> list[str]:
        out = answers(self.carrier, adapter, prompts, template, new_tokens)
        tick(1)
        return out


@torch.no_grad()
def answers(carrier: Carrier, adapter: Tensors, prompts: Sequence[str], template: str, new_tokens: int) -> list[str]:
    """Greedy answers, special tokens removed, in batches of `ANSWER_BATCH` prompts as they stand."""
    carrier.set(adapter)
    tokenizer, model = carrier.base.tokenizer, carrier.model
    ids = [tokenizer(render_prompt(p, template), add_special_tokens=False)["input_ids"] for p in prompts]
    pad, device = tokenizer.pad_token_id, next(model.parameters()).device
    out: list[str] = []
    for at in range(0, len(ids), ANSWER_BATCH):
        part = ids[at : at + ANSWER_BATCH]
        longest = max(len(row) for row in part)
        left_BT = torch.tensor([[pad] * (longest - len(row)) + row for row in part])
        mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in part])
        made_BT = model.generate(
            input_ids=left_BT.to(device),
            attention_mask=mask_BT.to(device),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )[:, longest:]
        out += [text.strip() for text in tokenizer.batch_decode(made_BT, skip_special_tokens=True)]
    return out
