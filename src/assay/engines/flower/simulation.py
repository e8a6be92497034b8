"""`assay run --engine flower`: a simulated experiment on Flower's own simulation (Ray), one node a client.

The two apps are those that a deployment runs. Same config and seeds, same result as the `local` engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from threading import Event
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.serverapp import Grid
from flwr.simulation import run_simulation

from assay import run_dir
from assay.config import ConfigError, Experiment
from assay.engines.flower import federated_client, federated_server
from assay.engines.flower.federated_settings import Settings
from assay.engines.flower.guard import GuardedGrid
from assay.progress import Tracker


class Watched(GuardedGrid):
    """Ends the server with the simulation: Flower stops its nodes alone, and the server would wait for them."""

    def __init__(self, grid: Grid, settings: Settings, ended: Event) -> None:
        super().__init__(grid, timeout=settings.timeout, poll=settings.poll)
        self.ended = ended

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        if self.ended.is_set():
            raise RuntimeError("the simulation has ended")
        return super().pull_messages(message_ids)


def run(
    experiment: Experiment, directory: Path, *, given: str = "", command: str = "", tracker: Tracker | None = None
) -> dict[str, Any]:
    """Run or resume `experiment` in `directory` with each client a node of Flower's simulation; returns the summary."""
    settings = Settings(
        experiment=experiment, out=directory.resolve(), given=given, simulation=True, poll=0.1, wait=120.0
    )

    ended = Event()

    def known(context: Context) -> Settings:
        return settings

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of Assay's reports anything to anybody
    gpu = torch.cuda.is_available()
    try:
        run_simulation(
            server_app=federated_server.make_app(known, command, tracker, lambda grid, s: Watched(grid, s, ended)),
            client_app=federated_client.make_app(known),
            num_supernodes=experiment.clients.total,
            backend_config={
                # one at a time on a GPU, as the workers of `local`
                "client_resources": {"num_cpus": 1, "num_gpus": 1.0 if gpu else 0.0},
                "init_args": {"num_cpus": experiment.workers or cores},
            },
        )
    except RuntimeError as error:  # Ray gives its own processes half a minute to start, whatever the machine has to do
        raise ConfigError(
            f"{directory}: Flower's simulation broke off ({error.__cause__ or error}); its log above says why; "
            "run again: it goes on after its last whole round"
        ) from error
    finally:
        ended.set()
    summary = run_dir.read_summary(directory)
    if summary is None:
        raise ConfigError(f"{directory}: Flower's simulation ended without a summary; its log above says why")
    return summary
