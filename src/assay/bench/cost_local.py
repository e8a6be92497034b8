"""A client's local training beside PEFT in Transformers' Trainer: same rows, batches, model, adapter, precision.

Ours is the whole call a client makes (adapter in, rows tokenised, a fresh optimiser, adapter out). Theirs is what
Trainer does between its first and its last step, set-up and logging left out: AdamW, a constant rate, clipping, a padding
collator, rows in the order ours takes them. The Trainer runs with eager attention, as ours, and with SDPA, its default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from assay import models
from assay.bench import peers
from assay.bench.cost_screens import experiment_of
from assay.bench.cost_settings import Settings
from assay.bench.turns import Say, Side, matmul_peak, model_flops, ratio, take, told
from assay.contribution import Tensors
from assay.data import Example
from assay.federated.local_sft import LocalResult, LocalSettings, Tokens, batches, tokenize, train
from assay.federated.lora import Carrier
from assay.federated.population import load_sources, make_clients
from assay.federated.preparation import client_settings

TARGET = 1.3


@dataclass(frozen=True, slots=True)
class Setting:
    """What both sides train on."""

    carrier: Carrier
    start: Tensors
    rows: tuple[Example, ...]
    local: LocalSettings

    def ours(self) -> LocalResult:
        return train(self.carrier, self.start, self.rows, self.local)

    def batches(self) -> list[list[Tokens]]:
        """The rows of each step as ours takes them."""
        tokenizer, local = self.carrier.base.tokenizer, self.local
        return [
            [tokenize(tokenizer, self.rows[i], local.template, local.max_length) for i in chosen]
            for chosen in batches(len(self.rows), local)
        ]

    def theirs(self) -> peers.LocalTrainer:
        """Trainer on the very model, put back to the start before it trains."""
        return peers.LocalTrainer(self.carrier, self.start, self.batches(), self.local)


def setting(settings: Settings) -> Setting:
    """The demo's first client, on the base without its warm-up: what it has learnt costs no second."""
    experiment = experiment_of(settings)
    carrier = Carrier(models.load(settings.model, settings.dtype), experiment.lora)
    client = make_clients(experiment, load_sources(experiment))[0]
    local = replace(client_settings(experiment, 1), steps=settings.local_steps, seed=settings.seed)
    return Setting(carrier, carrier.initial(), client.clean, local)


def local(settings: Settings, say: Say) -> dict[str, Any]:
    """Seconds and memory of both, and how near each comes to the machine's matmuls."""
    both = setting(settings)
    trainer = both.theirs()
    ours, eager, sdpa = "Assay", "Trainer, eager", "Trainer, sdpa"
    sides = take(
        {ours: both.ours, eager: lambda: trainer.run("eager"), sdpa: lambda: trainer.run("sdpa")},
        settings.repeats, say,
    )  # fmt: skip
    rival = min((eager, sdpa), key=lambda name: sides[name].seconds)
    flops, tokens, scored = _arithmetic(both)
    peak = matmul_peak(next(both.carrier.model.parameters()).dtype)
    return {
        "model": settings.model,
        "dtype": both.carrier.base.dtype,
        "steps": both.local.steps,
        "batch_size": both.local.batch_size,
        "tokens": tokens,
        "scored": scored,
        "flops": flops,
        "peak_flops": peak,
        "rows": [side.row(name, utilisation=flops / side.seconds / peak) for name, side in sides.items()],
        "ratios": [
            ratio(f"{rival} / Assay, seconds", sides[rival], sides[ours], TARGET, least=True),
            told(f"{rival} / Assay, memory", _memory(sides[rival], sides[ours])),
            told("Assay: model FLOP utilisation", flops / sides[ours].seconds / peak),
            told(f"{rival}: model FLOP utilisation", flops / sides[rival].seconds / peak),
        ],
    }


def _memory(of: Side, to: Side) -> float:
    return of.memory_bytes / max(1, to.memory_bytes)


def _arithmetic(both: Setting) -> tuple[float, int, int]:
    """FLOP of the whole local training, its tokens without padding and those whose loss is taken."""
    flops, tokens, scored = 0.0, 0, 0
    weights = [p for n, p in both.carrier.model.named_parameters() if "lora_" in n]
    for weight in weights:  # `train` switches them on for itself
        weight.requires_grad_(True)
    for rows in both.batches():
        sizes = [len(row.ids) for row in rows]
        answers = sum(len(row.ids) - max(1, row.prompt) for row in rows)
        flops += model_flops(
            both.carrier.model.get_base_model(), sum(sizes), answers, sum(n * (n + 1) // 2 for n in sizes)
        )
        tokens, scored = tokens + sum(sizes), scored + answers
    for weight in weights:
        weight.requires_grad_(False)
    return flops, tokens, scored
