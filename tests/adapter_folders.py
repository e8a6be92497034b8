"""Adapters in PEFT's format for tests, written byte by byte where they have to be wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/base", "r": 4, "lora_alpha": 8,
    "lora_dropout": 0.0, "bias": "none", "target_modules": ["q_proj", "v_proj"], "inference_mode": True,
    "modules_to_save": None, "rank_pattern": {}, "layers_to_transform": None, "init_lora_weights": True,
}  # fmt: skip


def names(layers: tuple[str, ...] = LAYERS) -> list[str]:
    return [f"base_model.model.{layer}.lora_{half}.weight" for layer in layers for half in "AB"]


def tensors(
    seed: int, rank: int = 4, width: int = 12, layers: tuple[str, ...] = LAYERS
) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    shape = {"A": (rank, width), "B": (width, rank)}
    return {n: rng.normal(0, 0.1, shape[n[-8]]).astype(np.float32) for n in names(layers)}


def blob(
    arrays: dict[str, NDArray[Any]], dtype: str = "F32", header: dict[str, Any] | None = None, tail: bytes = b""
) -> bytes:
    """A safetensors file; `header` changes entries of its header, None removes one."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, array in arrays.items():
        raw = array.tobytes()
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    for name, entry in (header or {}).items():
        entries = {k: v for k, v in entries.items() if k != name} if entry is None else {**entries, name: entry}
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body + tail


def write(folder: Path, weights: bytes | None = None, seed: int = 0, rank: int = 4, **config: Any) -> Path:
    """An adapter; `config` changes keys of its adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "r": rank, "lora_alpha": 2 * rank, **config}))
    (folder / "adapter_model.safetensors").write_bytes(blob(tensors(seed, rank)) if weights is None else weights)
    return folder
