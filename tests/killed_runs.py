"""Runs that are killed: a process that has imported everything forks one child for each attempt at a run.

    python killed_runs.py CONFIG      then a line of JSON for each attempt on stdin, a line for each answer on stdout

An attempt is {"directory": ..., "event": k} (SIGKILL as the k-th thing happens to a file of the run), {"directory":
..., "after": s} (SIGKILL s seconds after the fork) or {"directory": ...} alone (nobody kills). With "flower": true a federated run goes over messages between the apps
of Flower, on a grid in one process. The answer says how it ended, how many such things happened and how long it took. Imports are what most of a start-up is, and nothing of a run
exists before they are done.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

TOUCHING = ("open", "os.mkdir", "os.rename", "os.remove", "os.truncate")
"""Audit events of Python that create, move or change files (`os.replace` is `os.rename`)."""


def count_events(directory: Path, fatal: int | None) -> Any:
    """Count what happens to files of the run; at the `fatal`-th, before it is done, the process is no more."""
    counter, inside = [0], str(directory)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in TOUCHING and str(arguments[0]).startswith(inside):
            counter[0] += 1
            if counter[0] == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return counter


def play(config: str, directory: Path, on_flower: bool) -> None:
    """One attempt, in this process."""
    import torch

    from assay.config import Experiment, load

    torch.set_num_threads(1)
    experiment = load(Path(config))
    if isinstance(experiment, Experiment):
        from assay import models
        from assay.engines import local
        from assay.federated.compute import Serial
        from assay.federated.lora import Carrier
        from assay.federated.preparation import prepare
        from assay.progress import Silent

        prepared = prepare(experiment, Silent())
        base = models.load(str(prepared.path), prepared.dtype)
        compute = Serial(Carrier(base, experiment.lora))
        if on_flower:
            import flower_apps

            settings = flower_apps.settings_for(experiment, directory)
            flower_apps.on_flower(settings, flower_apps.simulated(settings), prepared, compute)
        else:
            local.run(experiment, directory, prepared, compute, given="# given\n")
    else:
        from assay.engines.local_swarm import run_swarm

        run_swarm(experiment, directory)


def attempt(config: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Fork, play, kill or wait."""
    directory, started = Path(asked["directory"]), time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            counter = count_events(directory, asked.get("event"))
            play(config, directory, asked.get("flower", False))
            os.write(writing, str(counter[0]).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001 - a child must never come back into the loop; the answer says 1
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    code = None
    while code is None:
        done, status = os.waitpid(child, os.WNOHANG if "after" in asked else 0)
        if done:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() - started > asked["after"]:
            os.kill(child, signal.SIGKILL)  # not waited for yet, so it is still ours
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            time.sleep(0.002)
    events = os.read(reading, 32).decode()
    os.close(reading)
    return {"code": code, "events": int(events or 0), "seconds": time.monotonic() - started}


def main() -> None:
    import assay.engines.local
    import assay.engines.local_swarm  # noqa: F401
    import flower_apps  # noqa: F401 - all of them before any fork

    for line in sys.stdin:
        print(json.dumps(attempt(sys.argv[1], json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
