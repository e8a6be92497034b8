"""The trackers Assay knows by name, and how others are found. Each is built and lives in a process of its own.

Nothing here talks to a network: W&B writes in its offline mode, trackio into a local database, both into the run's
folder. Who wants them elsewhere sends them with the tracker's own command (docs/TRACKERS.md).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from assay.config import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a tracker is told of the run before its first round. `folder` is empty and the tracker's own."""

    name: str
    id: str
    """The same for the same experiment, whenever and wherever it goes on."""
    wing: str
    folder: Path


class ExperimentTracker(Protocol):
    """What `package.module:callable` must return when called with a `Run` and its parameters.

    It gets a whole run, rounds in order from 0, each once. Whatever it raises switches it off, and nothing else.
    """

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """The finite numbers of one round, by name."""

    def finish(self, summary: Mapping[str, float], setting: Mapping[str, str | float]) -> None:
        """The finished run's numbers and what was set. Not called for a run that broke off."""

    def close(self) -> None:
        """The last call, also of a run that broke off."""


Build = Callable[..., ExperimentTracker]


class TensorBoard:
    """Scalars in TensorBoard's event files; `tensorboard --logdir runs` shows them."""

    def __init__(self, run: Run) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(run.folder))
        self._last = 0
        # an open TensorBoard then forgets what it has read of the run before it was written anew
        self._add(0, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, summary=Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()]))
        self._writer.flush()

    def log(self, round: int, values: Mapping[str, float]) -> None:
        self._scalars(round, values)
        self._last = round

    def finish(self, summary: Mapping[str, float], setting: Mapping[str, str | float]) -> None:
        self._scalars(self._last, {f"summary/{name}": value for name, value in summary.items()})

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A W&B run in offline mode; `wandb sync` sends it when its owner wants to."""

    def __init__(self, run: Run, *, project: str = "assay", group: str | None = None, tags: Sequence[str] = ()) -> None:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
        import wandb

        quiet = wandb.Settings(
            console="off", disable_code=True, disable_git=True, x_disable_meta=True, x_disable_machine_info=True,
            x_disable_stats=True, x_save_requirements=False,
        )  # fmt: skip
        self._run = wandb.init(
            mode="offline", dir=str(run.folder), id=run.id, name=run.name, project=project, group=group, tags=tuple(tags),
            settings=quiet,
        )  # fmt: skip

    def log(self, round: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=round)

    def finish(self, summary: Mapping[str, float], setting: Mapping[str, str | float]) -> None:
        self._run.summary.update({f"summary/{name}": value for name, value in summary.items()})
        self._run.config.update(dict(setting))

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run in trackio's local database; `trackio show` shows it."""

    def __init__(self, run: Run, *, project: str = "assay") -> None:
        for name in [name for name in os.environ if name.startswith("TRACKIO_")]:
            del os.environ[name]  # a Space, a server or a webhook that the shell names for other runs
        os.environ |= {"TRACKIO_DIR": str(run.folder), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        import trackio

        self._run = trackio.init(project=project, name=run.name, embed=False, auto_log_gpu=False, auto_log_cpu=False)
        self._last = 0

    def log(self, round: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=round)
        self._last = round

    def finish(self, summary: Mapping[str, float], setting: Mapping[str, str | float]) -> None:
        self._run.log({f"summary/{name}": value for name, value in summary.items()}, step=self._last)

    def close(self) -> None:
        self._run.finish()


TRACKERS: Mapping[str, Build] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
"""By the name of the package each needs, which is that of the extra too."""


def find(name: str) -> Build:
    """What builds the tracker: Assay's own, one of the entry-point group `assay.trackers`, or `package.module:callable`."""
    if name in TRACKERS:
        if not _installed(name):
            raise ConfigError(f"track.to: {name} is not installed; pip install 'assay[{name}]'")
        return TRACKERS[name]
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            found: Build = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"track.to: {name} cannot be imported: {' '.join(str(error).split())}") from None
        return found
    plugins = {entry.name: entry for entry in entry_points(group="assay.trackers")}
    if name not in plugins:
        known = ", ".join([*TRACKERS, *plugins])
        raise ConfigError(f"track.to: unknown tracker {name!r}; known: {known}, and package.module:callable")
    found = plugins[name].load()
    return found


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:
        return False


def accept(name: str, build: Build, params: Mapping[str, Any]) -> None:
    """ConfigError for parameters that the tracker does not take."""
    try:
        signature = inspect.signature(build)
    except (TypeError, ValueError):  # no function, or one that does not say what it takes
        if not callable(build):
            raise ConfigError(f"track.to: {name} is no function") from None
        return
    try:
        signature.bind(None, **params)
    except TypeError as error:
        known = ", ".join([*signature.parameters][1:]) or "none"
        raise ConfigError(f"track.params.{name}: {error}; known: {known}") from None
