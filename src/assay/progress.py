"""Progress as the engines see it: work is added, work is done, something is said. The terminal draws it.

`ASSAY_PROGRESS` in the environment says how: `quiet` nothing, `plain` lines (as where stderr is no terminal), else a bar.
Colours: `NO_COLOR` takes them away.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PROGRESS = "ASSAY_PROGRESS"


class Tracker(Protocol):
    """Units are rough seconds of one core, so that the time left means something across kinds of work."""

    def add(self, units: float) -> None: ...
    def tick(self, units: float) -> None: ...
    def say(self, text: str) -> None: ...


class Silent:
    """Shows nothing."""

    def add(self, units: float) -> None: ...
    def tick(self, units: float) -> None: ...
    def say(self, text: str) -> None: ...


class Bar:
    """A bar with the time left on stderr; plain lines where stderr is not a terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._quiet = os.environ.get(PROGRESS) == "quiet"
        self._drawn = self._console.is_terminal and os.environ.get(PROGRESS) not in ("quiet", "plain")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._drawn,
            speed_estimate_period=120,
        )
        self._task = self._progress.add_task("starting", total=0)
        self._total = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def add(self, units: float) -> None:
        self._total += units
        self._progress.update(self._task, total=self._total)

    def tick(self, units: float) -> None:
        self._progress.advance(self._task, units)

    def say(self, text: str) -> None:
        if self._drawn:
            self._progress.update(self._task, description=text)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)
