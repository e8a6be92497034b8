"""Swarm experiments side by side, one process and one thread each.

One thread makes a result independent of how many run beside it; a small model gains nothing from a second one.
Progress is read off the run directories: what is written there is what is done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch

from assay import run_dir
from assay.config import SwarmExperiment
from assay.engines import local_swarm
from assay.engines.pool import watch_parent
from assay.progress import Tracker

Job = tuple[SwarmExperiment, Path]


def run_swarms(
    jobs: Sequence[Job], tracker: Tracker, *, given: str = "", command: str = ""
) -> dict[str, dict[str, Any]]:
    """Run or resume every job; summaries by name. An operator's mistake in one is raised when it is met."""
    out: dict[str, dict[str, Any]] = {}
    todo = []
    for experiment, directory in jobs:
        finished = local_swarm.finished(experiment, directory)
        if finished is None:
            todo.append((experiment, directory))
        else:
            out[experiment.name] = finished
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = 1 if torch.cuda.is_available() else min(cores, len(todo))
    if workers == 0:
        return out
    run_dir.commit()
    others = set(active_children())
    executor = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start, initargs=(os.getpid(),)
    )
    try:
        running: dict[Future[dict[str, Any]], Job] = {
            executor.submit(_run, experiment, directory, given, command): (experiment, directory)
            for experiment, directory in todo
        }
        _follow(running, tracker, out)
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        ended = set(active_children()) - others
        for process in ended:  # what they did so far can be resumed
            process.kill()
        for process in ended:  # nobody writes to a run directory any more once the caller hears of the mistake
            process.join()
        raise
    executor.shutdown()
    return out


def _follow(running: dict[Future[dict[str, Any]], Job], tracker: Tracker, out: dict[str, dict[str, Any]]) -> None:
    seen = {directory: 0 for _, directory in running.values()}
    while running:
        done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
        for experiment, directory in running.values():
            rounds = max(0, len(_lines(directory)) - 1)
            if rounds > seen[directory]:
                tracker.tick(local_swarm.units(experiment) * (rounds - seen[directory]) / experiment.swarm.iterations)
                tracker.say(f"{experiment.name}: iteration {rounds}/{experiment.swarm.iterations}")
                seen[directory] = rounds
        for future in done:
            experiment, _ = running.pop(future)
            out[experiment.name] = future.result()
        time.sleep(0.05)


def _lines(directory: Path) -> list[bytes]:
    path = directory / run_dir.METRICS
    return path.read_bytes().splitlines() if path.exists() else []


def _start(parent: int) -> None:
    watch_parent(parent)
    torch.set_num_threads(1)


def _run(experiment: SwarmExperiment, directory: Path, given: str, command: str) -> dict[str, Any]:
    return local_swarm.run_swarm(experiment, directory, given=given, command=command)
