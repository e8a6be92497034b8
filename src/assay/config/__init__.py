"""Experiments as frozen, checked values: TOML in, one-line errors out. `wing` says which wing a file is for."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from assay.config.common import ConfigError, ModelConfig, Root, check
from assay.config.federated import (
    AggregationConfig,
    AttackConfig,
    CanaryConfig,
    Experiment,
    LoraSettings,
    ServerConfig,
)
from assay.config.measure import REFUSAL_PHRASES, JudgeConfig
from assay.config.swarm import SwarmExperiment

__all__ = [
    "REFUSAL_PHRASES",
    "AggregationConfig",
    "AnyExperiment",
    "AttackConfig",
    "CanaryConfig",
    "ConfigError",
    "Experiment",
    "JudgeConfig",
    "LoraSettings",
    "ModelConfig",
    "ServerConfig",
    "SwarmExperiment",
    "assign",
    "check",
    "load",
    "parse",
    "parse_any",
]  # fmt: skip

AnyExperiment = Experiment | SwarmExperiment
Kind = TypeVar("Kind", bound=Root)
WINGS: dict[str, type[Experiment] | type[SwarmExperiment]] = {"federated": Experiment, "swarm": SwarmExperiment}


def parse(values: dict[str, Any]) -> Experiment:
    """A federated experiment from values."""
    return check(Experiment, values)


def parse_any(values: dict[str, Any]) -> AnyExperiment:
    """An experiment of the wing that `wing` names (default: federated)."""
    wing = values.get("wing", "federated")
    if not isinstance(wing, str) or wing not in WINGS:
        raise ConfigError(f"wing: {wing!r} is unknown; known are {', '.join(WINGS)}")
    return check(WINGS[wing], values)


def assign(experiment: Kind, setting: str) -> Kind:
    """A copy with one key changed by text, as `--set` gives it: `defence.level=step`, `training.lr=5e-4`.

    The value is read as TOML where it is TOML, else as a string.
    """
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {setting!r}: write key=value, for example defence.level=step")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    values = experiment.model_dump()
    *path, last = key.strip().split(".")
    at: Any = values
    for depth, part in enumerate(path):
        if depth and isinstance(at, dict):
            at.setdefault(part, {})  # tables of free keys, such as defence.params.seeded
        at = at.get(part) if isinstance(at, dict) else None
    if not isinstance(at, dict):
        raise ConfigError(
            f"{key.strip()}: unknown key; tables are {', '.join(k for k, v in values.items() if isinstance(v, dict))}"
        )
    at[last] = value
    return check(type(experiment), values)


def load(path: str | Path, *, data_root: str | Path | None = None) -> AnyExperiment:
    """Read an experiment from TOML; `data.root` is made absolute (relative to the file, or `data_root`)."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of an experiment in TOML") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a TOML file ({error.__class__.__name__})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    experiment = parse_any({"name": path.stem, **values})
    root = Path(data_root) if data_root is not None else path.parent / experiment.data.root
    return experiment.changed(data__root=str(root.resolve()))
