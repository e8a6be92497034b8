"""Experiment trackers (TensorBoard, W&B, trackio, your own): a run's numbers where its people already look.

A tracker is a reader of the run directory, like the report. Each works in a process of its own (`__main__`) that reads
`metrics.jsonl` and is woken after every round. So it can neither stop nor change a run, whatever it does to its process,
and what it holds is no part of what a run is. It always gets the whole run, from row 0, into an empty folder: a run that
goes on after a kill is written anew, so that no round stands there twice and none is missing.

    track/tensorboard/      what the tracker wrote; its own folder
    track/tensorboard.log   what it said
    track/tensorboard.done  there once it holds the summary
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from assay import run_dir
from assay.config import AnyExperiment, ConfigError
from assay.config.common import TrackConfig
from assay.track.kinds import ExperimentTracker, Run, accept, find

__all__ = ["ExperimentTracker", "Run", "check", "following"]

FOLDER = "track"
PATIENCE = 60.0
"""Seconds a tracker has at the end of a run to write what it still holds. W&B needs about ten to start and to end."""


def check(config: TrackConfig) -> None:
    """ConfigError, one line, for a tracker that is not known or not installed, or parameters it does not take."""
    for name in config.to:
        accept(name, find(name), config.params.get(name, {}))
    for name in config.params:
        if name not in config.to:
            raise ConfigError(
                f"track.params.{name}: track.to does not name it; it names {', '.join(config.to) or 'none'}"
            )


@contextmanager
def following(experiment: AnyExperiment, directory: Path) -> Iterator[Callable[[], None]]:
    """Trackers that follow the run in `directory` as long as the block lasts -> call it after every round written.

    When the block ends they write the summary, if the run has one, and end. Of a finished run only those are started that
    have not written it yet. A tracker that fails or hangs is told of on stderr, once; nothing is raised.
    """
    with ExitStack() as ends:
        found = []
        for name in experiment.track.to:
            if not _has_all(directory, name):
                one = _Follower(name, experiment, directory)
                ends.callback(one.end)
                found.append(one)

        def wake() -> None:
            for one in found:
                one.wake()

        yield wake


def folder_of(directory: Path, name: str) -> Path:
    """The tracker's own folder in a run directory; what stands beside it begins with its name."""
    return directory / FOLDER / re.sub(r"[^\w.-]", "_", name)


def _has_all(directory: Path, name: str) -> bool:
    """Whether the tracker holds the whole of a finished run."""
    return _beside(directory, name, "done").exists() and (directory / run_dir.SUMMARY).exists()


def _beside(directory: Path, name: str, ending: str) -> Path:
    folder = folder_of(directory, name)
    return folder.with_name(f"{folder.name}.{ending}")


class _Follower:
    """One tracker's process, as the run sees it: woken, ended, given up."""

    def __init__(self, name: str, experiment: AnyExperiment, directory: Path) -> None:
        self.name = name
        self.directory, self.log = directory, _beside(directory, name, "log")
        self.process: subprocess.Popen[bytes] | None = None
        told: Mapping[str, Any] = {
            "tracker": name, "params": experiment.track.params.get(name, {}), "directory": str(directory.resolve()),
            "folder": str(folder_of(directory, name).resolve()), "name": experiment.name, "wing": experiment.wing,
        }  # fmt: skip
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "assay.track", json.dumps(told)],
                    stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                    start_new_session=True,  # Ctrl-C is for the run, which ends its trackers in order
                )  # fmt: skip
            os.set_blocking(self._pipe(), False)
        except OSError as error:
            self._off(f"{type(error).__name__}: {error}")

    def wake(self) -> None:
        """There is a new row. What it is stands in the file: a call lost to a full pipe loses nothing."""
        if self.process is None:
            return
        try:
            os.write(self._pipe(), b"\n")
        except BlockingIOError:  # it is slow, and has been woken often enough
            pass
        except OSError:
            self.end(gone=True)

    def end(self, gone: bool = False) -> None:
        """Let it write what is left; tell of it where it could not. `gone`: it has ended before it was asked to."""
        if self.process is None:
            return
        process = self.process
        gone = gone or process.poll() is not None
        assert process.stdin is not None
        process.stdin.close()
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            self._off(f"it did not end within {PATIENCE:g} s")
        else:
            left = (self.directory / run_dir.SUMMARY).exists() and not _has_all(self.directory, self.name)
            if code or left or gone:
                self._off(_last_line(self.log) or f"its process ended with code {code}")
        self.process = None

    def _pipe(self) -> int:
        assert self.process is not None
        assert self.process.stdin is not None
        return self.process.stdin.fileno()

    def _off(self, why: str) -> None:
        self.process = None
        print(
            f"assay: tracker {self.name} is off: {why} (see {self.log}); the run is as it was",
            file=sys.stderr,
            flush=True,
        )


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
