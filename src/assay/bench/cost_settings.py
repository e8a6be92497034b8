"""How large a bench of costs is. Defaults: SmolLM2-135M in the settings of the two demos."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`repeats`: measured turns of every call; the federated parts take the demo's other figures, from its defaults."""

    model: str = "smollm2-135m"
    dtype: str = "auto"
    repeats: int = 5
    seed: int = 0
    clients: int = 10
    paper_steps: int = 10
    """Local steps of the paper, of `paper_batch` rows each: the round the demo's two steps of eight stand in for."""
    paper_batch: int = 16
    local_steps: int = 10
    """Steps of one local training in part `local`."""
    prompts: int = 4
    group: int = 8
    max_tokens: int = 64
    lora_r: int = 16
    layers: int = 32
    """Of the 8B model; its other shapes are Llama-3.1-8B's."""
    bank: int = 66
    """Labelled updates that a rehearsal of six rounds leaves for `neighbours`."""


PART_NAMES = ("screening", "verdict", "checks", "grpo", "local", "rollouts")
