"""One tracker's process: `python -m assay.track JSON`, started by `following` and woken through standard input.

It ends when the input does, which it also does when the run's process is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from assay import run_dir
from assay.track.kinds import ExperimentTracker, Run, find
from assay.track.values import of_row, of_summary


def main(told: Mapping[str, Any]) -> None:
    """Write the whole run in `told["directory"]` anew, and what comes as long as it goes on."""
    directory, folder = Path(told["directory"]), Path(told["folder"])
    done = folder.with_name(f"{folder.name}.done")
    done.unlink(missing_ok=True)
    _empty(folder)
    run_id = json.loads((directory / run_dir.RESOLVED).read_text())["run_id"]
    run = Run(name=told["name"], id=run_id, wing=told["wing"], folder=folder)
    tracker = find(told["tracker"])(run, **told["params"])
    rows = Rows(directory / run_dir.METRICS)
    rows.log(tracker)
    while os.read(sys.stdin.fileno(), 1 << 16):
        rows.log(tracker)
    rows.log(tracker)
    summary = run_dir.read_summary(directory)
    if summary is not None:
        tracker.finish(*of_summary(summary))
    tracker.close()
    if summary is not None:
        done.touch()


class Rows:
    """metrics.jsonl as it grows. It is replaced by a longer one, never changed: whole rows, read once each."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0

    def log(self, tracker: ExperimentTracker) -> None:
        """Hand on the rows since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                self.offset += len(line)
                row = json.loads(line)
                tracker.log(row["round"], of_row(row))


def _empty(folder: Path) -> None:
    """A new folder. What a killed run's tracker may still be writing to is moved away first."""
    for old in folder.parent.glob(f"{folder.name}.old-*"):
        shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        moved = folder.with_name(f"{folder.name}.old-{os.getpid()}")
        folder.rename(moved)
        shutil.rmtree(moved, ignore_errors=True)
    folder.mkdir(parents=True)


def _fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The last line is what the run's user is told; a library's threads or exit hooks must not hold the end up."""
    traceback.print_exception(kind, error, trace)
    print(f"{kind.__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    sys.excepthook = _fail
    main(json.loads(sys.argv[1]))
