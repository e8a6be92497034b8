"""The updates a run accepted, kept by content: `updates/<sha256>.safetensors` under the run directory.

The name is `tensors_sha256`, the hash the ledger speaks of, so that a file proves itself and the same bytes are kept
once. Files are written atomically and before the round's checkpoint: a kill leaves at most a file nobody refers to.
Legend: a file holds one whole adapter (not the difference), float32, about 4 bytes a value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors

from assay.checkpoint import write_atomic
from assay.config import ConfigError, Experiment
from assay.contribution import LoraUpdate, Tensors, tensors_sha256

UPDATES = "updates"
KEPT = ("applied", "rolled_back")
"""Outcomes of rounds whose accepted updates are kept: an aggregator may remember what the gate sent back."""
NAME = re.compile(r"[0-9a-f]{64}")


def most_bytes(experiment: Experiment, adapter: Tensors) -> int:
    """The most a run can keep: every client of every round accepted, and the initial adapter."""
    one = sum(4 * value.size for value in adapter.values())
    return (experiment.training.rounds * experiment.clients.per_round + 1) * one


def check_room(experiment: Experiment, adapter: Tensors) -> None:
    """ConfigError before round 1 where a run could keep more than `keep_updates_gb`."""
    need = most_bytes(experiment, adapter) / 1e9
    if experiment.keep_updates and need > experiment.keep_updates_gb:
        raise ConfigError(
            f"keep_updates: this run may keep {need:.1f} GB of updates and keep_updates_gb is "
            f"{experiment.keep_updates_gb:g}; raise it, or set keep_updates = false and do without `assay excise`"
        )


def put(folder: Path, tensors: Tensors) -> Path:
    """Keep an adapter; one that is there already is not written again."""
    path = folder / f"{tensors_sha256(tensors)}.safetensors"
    if not path.exists():
        arrays = {n: np.asarray(tensors[n], np.float32, order="C") for n in sorted(tensors)}
        write_atomic(path, bytes(save_safetensors(arrays)))
    return path


def put_accepted(folder: Path, updates: list[LoraUpdate], weight: Mapping[str, float]) -> None:
    """Keep the updates of a round whose weight is above 0."""
    for update in updates:
        if weight.get(update.participant, 0.0) > 0:
            put(folder, update.tensors)


def get(folder: Path, sha256: str) -> dict[str, NDArray[np.float32]]:
    """The adapter of that hash, checked. ConfigError where it is missing, damaged or another one."""
    path = folder / f"{sha256}.safetensors"
    if not NAME.fullmatch(sha256):
        raise ConfigError(f"{sha256[:80]!r} is no sha256: the ledger was not written by Assay")
    if not path.exists():
        raise ConfigError(f"{path}: this update was not kept; runs with keep_updates = true keep them")
    try:
        with safe_open(str(path), framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict, not iterable
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: is damaged ({error}); restore it from a copy") from None
    if any(t.dtype != np.float32 for t in tensors.values()) or tensors_sha256(tensors) != sha256:
        raise ConfigError(f"{path}: its content does not have the hash in its name; restore it from a copy")
    return tensors


def size(folder: Path) -> dict[str, int]:
    """How many files a run keeps and their bytes."""
    files = [path for path in folder.glob("*.safetensors") if NAME.fullmatch(path.stem)] if folder.is_dir() else []
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
