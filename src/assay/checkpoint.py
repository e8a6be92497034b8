"""Atomic files: whole or not there. And checkpoints: the whole state of a run in one safetensors file per step.

A file is written beside its final place, flushed to the disk and renamed, so that a reader (or the run after a kill)
sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors

Arrays = Mapping[str, NDArray[Any]]

KEY = "assay.checkpoint"  # one metadata key, for safetensors writes several in random order
DTYPES = ("float32", "float64", "int64", "uint8")  # uint8: the state of a random generator
NAME = re.compile(r"(\d{6,})\.safetensors")
LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


class CheckpointError(ValueError):
    """Checkpoints are there, and none of them can be used."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `save` was given, and where it lies. The arrays are the caller's own copies."""

    step: int
    tensors: dict[str, NDArray[Any]]
    meta: dict[str, Any]
    path: Path


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file whole or not at all (text as UTF-8); makes the folder. OSError as usual."""
    _replace(Path(path), lambda file: file.write(data.encode() if isinstance(data, str) else data))


def append_atomic(path: str | Path, text: str) -> None:
    """Add text to a file, of which a reader sees all or nothing; a copy of the file by way of the disk."""

    def write(file: BinaryIO) -> None:
        if Path(path).exists():
            with Path(path).open("rb") as before:
                shutil.copyfileobj(before, file)
        file.write(text.encode())

    _replace(Path(path), write)


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # same folder, because a rename is atomic only within one file system; not mkstemp, whose files only the owner reads
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temp.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_json(path: str | Path, obj: object) -> None:
    """Write strict, indented JSON atomically, keys in the order given. ValueError for NaN: say None instead."""
    write_atomic(path, json.dumps(obj, indent=2, allow_nan=False) + "\n")


def fsync_folder(folder: Path) -> None:
    """Make a rename or a new file in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: str | Path, step: int, tensors: Arrays, meta: Mapping[str, Any], keep: int = 2) -> Path:
    """Write checkpoint `step` (>= 0) and keep the newest `keep` (>= 1; 2 leaves one to fall back to).

    `meta` is strict JSON (no NaN). A run has one history: checkpoints of later steps are removed, or a run that went
    back would resume from the future it left. TypeError for an array of another dtype than DTYPES.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step is {step}, keep is {keep}: step must be >= 0 and keep >= 1")
    arrays = {name: _plain(tensors[name]) for name in sorted(tensors)}
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise TypeError(f"{name} is {array.dtype}: a checkpoint holds {', '.join(DTYPES)}")
    text = json.dumps(meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
    header = json.dumps({"step": step, "meta": text, "sha256": _digest(step, arrays, text)}, sort_keys=True)
    folder = Path(folder)
    path = folder / f"{step:06d}.safetensors"
    write_atomic(path, bytes(save_safetensors(arrays, {KEY: header})))
    clean(folder)
    steps = [s for s in _steps(folder) if s <= step]
    for other, file in _steps(folder).items():
        if other not in steps[-keep:]:
            file.unlink(missing_ok=True)
    return path


def load_latest(folder: str | Path) -> Checkpoint | None:
    """The newest checkpoint whose content has its hash; None if there is none.

    A damaged one is skipped with a RuntimeWarning that names it. CheckpointError if all are damaged: starting again
    from nothing beside a ledger that goes on would be the worse surprise. OSError (rights, disk) is raised.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    clean(folder)
    files = _steps(folder)
    for step, path in reversed(files.items()):
        try:
            return _load(path, step)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            text = f"checkpoint {path} is damaged and skipped: {type(error).__name__}: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    if files:
        raise CheckpointError(f"{folder}: all {len(files)} checkpoints are damaged; start the run in a new directory")
    return None


def _load(path: Path, step: int) -> Checkpoint:
    with safe_open(str(path), framework="numpy") as file:
        header = json.loads((file.metadata() or {})[KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict, not iterable
    if header["step"] != step:
        raise ValueError(f"it is the checkpoint of step {header['step']}, renamed")
    if _digest(step, tensors, header["meta"]) != header["sha256"]:
        raise ValueError("its content does not have the sha256 it was saved with")
    return Checkpoint(step, tensors, json.loads(header["meta"]), path)


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """Native byte order, C order. safetensors writes a transposed view in memory order, that is, the wrong numbers."""
    array = np.asarray(array)
    return np.asarray(array, array.dtype.newbyteorder("="), order="C")


def _digest(step: int, arrays: Arrays, meta: str) -> str:
    """sha256 (hex) of everything a checkpoint says: step, meta, and each array's name, dtype, shape and values."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode() + b"\n")
        digest.update(array.data)
    digest.update(json.dumps([step, meta]).encode())
    return digest.hexdigest()


def _steps(folder: Path) -> dict[int, Path]:
    """Checkpoint files by step, oldest first."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def clean(folder: Path) -> None:
    """Remove what a kill between write and rename left behind in a folder that nobody else writes to."""
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)
