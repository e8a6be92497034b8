"""How a run writes itself down, whatever its wing: one process a directory, one experiment, every round once.

A round becomes real with its checkpoint, which carries the ledger entry and the metrics row along; both are appended
afterwards and appended again on resume if they are missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from assay import checkpoint, run_dir
from assay.config import ConfigError, parse_any
from assay.ledger import Ledger

ROUNDS = ("start", "round")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Two processes in one run directory would interleave rounds. What a killed one left half written is removed."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{directory}: another process is working on this run") from None
        for folder in (directory, *(path for path in directory.iterdir() if path.is_dir())):
            checkpoint.clean(folder)
        yield


def run_id_of(identity: Mapping[str, Any]) -> str:
    """Names a run by all that decides its numbers."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def claim(directory: Path, identity: Mapping[str, Any], resolved: Mapping[str, Any], given: str) -> str:
    """Write the config down, or check that the directory holds this very experiment; returns the run's id.

    A run begun before a key was added to the config is the experiment with that key at its default, and keeps its id.
    """
    run_id = run_id_of(identity)
    path = directory / run_dir.RESOLVED
    if path.exists():
        stored = json.loads(path.read_text())
        if stored.get("run_id") != run_id and not _same(stored, resolved):
            raise ConfigError(f"{directory}: holds another experiment; choose another directory (--out) or delete it")
        return str(stored["run_id"])
    if given:
        checkpoint.write_atomic(directory / run_dir.EXPERIMENT, given)
    checkpoint.write_json(path, {"run_id": run_id, **resolved, "versions": run_dir.versions()})
    return run_id


def _same(stored: Mapping[str, Any], resolved: Mapping[str, Any]) -> bool:
    if stored.get("model") != resolved.get("model") or "experiment" not in stored or "run_id" not in stored:
        return False
    try:
        return parse_any(stored["experiment"]) == parse_any(resolved["experiment"])
    except ConfigError:  # it has a key that is gone, or a value that is none any more
        return False


def save(
    directory: Path, index: int, tensors: Mapping[str, Any], meta: Mapping[str, Any],
    entry: Mapping[str, Any], row: Mapping[str, Any],
) -> None:  # fmt: skip
    """Make round `index` real, then show it."""
    arrays = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    checkpoint.save(directory / run_dir.CHECKPOINTS, index, arrays, {**meta, "entry": entry, "row": row})
    publish(directory, index, entry, row)


def publish(directory: Path, index: int, entry: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Append what the checkpoint carries, unless it is already there."""
    ledger = Ledger(directory / run_dir.LEDGER)
    if sum(entry["kind"] in ROUNDS for entry in ledger) <= index:  # the start, then a round each
        ledger.append("start" if index == 0 else "round", dict(entry))
    path = directory / run_dir.METRICS
    if _lines(path) <= index:
        checkpoint.append_atomic(path, json.dumps(row) + "\n")


def _lines(path: Path) -> int:
    """Counted without holding them: a row of a thousand clients is long, and a run has many."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def close(directory: Path, rounds: int, model: str, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The closing ledger entry, once (`more` is added to it); returns entries and head for the summary."""
    ledger = Ledger(directory / run_dir.LEDGER)
    if ledger.last("end") is None:
        ledger.append("end", {"model": model, "rounds": rounds, **(more or {})})
    return {"entries": ledger.count, "head": ledger.head}
