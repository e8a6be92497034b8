"""Seconds of a verdict on an adapter for an 8B model: Llama-3.1-8B's shapes, every linear layer, rank 16.

No base model is needed: the adapters are random numbers of the size training leaves. Two ways to a verdict: `assay screen`
on a folder (reading, hashing, norm, a fitted probe, neighbours, copies), and the screens of a federated round on an
update in memory (structure, norm, probe, neighbours), with a bank as large as a rehearsal of six rounds leaves.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from assay.bench.cost_settings import Settings
from assay.bench.turns import Say, Side, Turn, take, told
from assay.checkpoint import write_json
from assay.contribution import LoraUpdate, Round, Tensors, tensors_sha256
from assay.engines.screen import screen_adapters
from assay.federated.adapter_probe import FEWEST, fit_adapters
from assay.federated.lora import feature_names
from assay.federated.probe import Probe
from assay.federated.screens import Neighbours, Norm, ProbeFilter, Structure
from assay.verdict import screen_round

SECOND = 1.0
HIDDEN, INNER, KEYS = 4096, 14336, 1024
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, KEYS), "self_attn.v_proj": (HIDDEN, KEYS),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (HIDDEN, INNER), "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}  # fmt: skip
"""Inputs and outputs of Llama-3.1-8B's linear layers."""
B_SIZE = 1e-3


def adapter(settings: Settings, seed: int) -> dict[str, NDArray[np.float32]]:
    """Random lora_A as it is drawn, random lora_B about as large as a few steps leave it."""
    rng, out = np.random.default_rng(seed), {}
    for layer in range(settings.layers):
        for module, (inputs, outputs) in MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            a_RI = rng.standard_normal((settings.lora_r, inputs), np.float32)
            a_RI /= np.sqrt(np.float32(inputs))
            out[f"{name}.lora_A.weight"] = a_RI
            b_OR = rng.standard_normal((outputs, settings.lora_r), np.float32)
            b_OR *= np.float32(B_SIZE)
            out[f"{name}.lora_B.weight"] = b_OR
    return out


def write(folder: Path, tensors: Tensors, rank: int, dtype: torch.dtype) -> Path:
    """A folder in PEFT's format, its numbers in `dtype`."""
    folder.mkdir()
    save_file({n: torch.from_numpy(v).to(dtype) for n, v in tensors.items()}, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in MODULES})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    write_json(folder / "adapter_config.json", config)
    return folder


def verdict(settings: Settings, say: Say) -> dict[str, Any]:
    """Seconds of one verdict by both ways, and of each screen."""
    one = adapter(settings, 0)
    values = sum(v.size for v in one.values())
    stages: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        full = write(root / "float32", one, settings.lora_r, torch.float32)
        half = write(root / "bfloat16", one, settings.lora_r, torch.bfloat16)
        say("fitting a probe")
        probe = root / "probe.safetensors"
        benign, malicious = ([adapter(settings, 10 * c + i) for i in range(FEWEST)] for c in (1, 2))
        fit_adapters(benign, malicious, seed=0).save(probe)
        del benign, malicious
        round, screens = federated_round(settings, one)
        calls = {
            "assay screen, float32 file": lambda: screen_folder(full, probe, "float32", stages),
            "assay screen, bfloat16 file": lambda: screen_folder(half, probe, "bfloat16", stages),
            "federated screens, 1 client": lambda: note(screen_round(round, screens).verdicts, "federated", stages),
        }
        sides = take(calls, settings.repeats, say)
    return {
        "values": values,
        "bank": settings.bank,
        "rows": [
            *(side.row(name) for name, side in sides.items()),
            *(Side(side.turns[1:]).row(name) for name, side in stages.items()),
        ],
        "ratios": [
            told(f"{name}, {values / 1e6:.1f} M values", side.seconds, SECOND, unit="s",
                 spread=[min(t.seconds for t in side.turns), max(t.seconds for t in side.turns)])
            for name, side in sides.items()
        ],
    }  # fmt: skip


def screen_folder(folder: Path, probe: Path, name: str, stages: dict[str, Side]) -> None:
    """`assay screen FOLDER --probe FILE`, without its process's start."""
    note(screen_adapters([folder], probe=probe).every, f"screen, {name}", stages)


def note(verdicts: Any, way: str, stages: dict[str, Side]) -> None:
    """Each screen's seconds."""
    for v in verdicts:
        stages.setdefault(f"{way}: {v.screen}", Side()).turns.append(Turn(v.seconds, 0))


def federated_round(settings: Settings, one: Tensors) -> tuple[Round, list[Any]]:
    """A round of one update, and screens with a random probe and bank."""
    start = {n: (v if "lora_A" in n else np.zeros_like(v)) for n, v in one.items()}
    update = LoraUpdate(participant="client", round=1, base_sha256="", tensors=one, sha256=tensors_sha256(one))
    size = sum(one[n].size for n in feature_names(list(one), "all_b"))
    rng = np.random.default_rng(0)
    probe = Probe(weight_D=rng.standard_normal(size, np.float32), bias=0.0, features="all_b")
    bank_MD = np.empty((settings.bank, size), np.float16)
    for row_D in bank_MD:
        row_D[:] = rng.standard_normal(size, np.float32) / np.float32(np.sqrt(size))
    malicious_M = np.arange(settings.bank) % 11 >= 8  # eight honest clients a rehearsed round, three malicious
    screens = [Structure(), Norm(None), ProbeFilter(probe, 1e9), Neighbours(bank_MD, malicious_M, 1e9)]
    return Round(index=1, start=start, initial=start, updates=(update,)), screens
