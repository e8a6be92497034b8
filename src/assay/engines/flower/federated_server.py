"""The ServerApp of the federated wing: the rounds of `engines.rounds`, with clients that are Flower nodes.

`assay.engines.flower.federated_server:app` in a Flower app's pyproject.toml. Its state is the run directory: a ServerApp
that was killed is started again with the same run config and goes on after its last whole round. `Context.state` names
the round, the model's hash and the directory, and holds nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from assay import report, run_dir, track
from assay.engines import rounds
from assay.engines.flower.federated_nodes import recruiter
from assay.engines.flower.federated_settings import Settings
from assay.engines.flower.guard import GuardedGrid
from assay.engines.pool import Pool
from assay.federated.preparation import prepare
from assay.progress import Silent, Tracker

STATE = "assay"


def guard(grid: Grid, settings: Settings) -> GuardedGrid:
    """The grid that clients are reached through."""
    return GuardedGrid(grid, timeout=settings.timeout, poll=settings.poll)


def make_app(
    settings_of: Callable[[Context], Settings],
    command: str = "",
    tracker: Tracker | None = None,
    guard: Callable[[Grid, Settings], GuardedGrid] = guard,
) -> ServerApp:
    """The ServerApp; `settings_of` reads the run config."""
    made = ServerApp()

    @made.main()
    def main(grid: Grid, context: Context) -> None:
        settings = settings_of(context)
        summary = serve(guard(grid, settings), settings, command=command, tracker=tracker)
        ledger = [json.loads(line) for line in (settings.out / run_dir.LEDGER).read_text().splitlines()]
        done = {"round": summary["setting"]["rounds"], "sha256": ledger[-1]["body"]["model"], "path": str(settings.out)}
        context.state[STATE] = ConfigRecord(done)

    return made


def serve(
    grid: GuardedGrid, settings: Settings, *, command: str = "", tracker: Tracker | None = None
) -> dict[str, Any]:
    """Run or resume the experiment over a grid; the summary. The report is written into the run directory."""
    experiment, tracker = settings.experiment, tracker or Silent()
    track.check(experiment.track)  # before minutes of preparation
    prepared = prepare(experiment, tracker)
    with Pool(str(prepared.path), prepared.dtype, experiment.lora, experiment.workers) as pool:
        summary = rounds.run(
            experiment, settings.out, prepared, pool, recruiter(grid, settings),
            engine="flower", given=settings.given, command=command or "flwr run", tracker=tracker,
        )  # fmt: skip
    report.write([settings.out], settings.out / run_dir.REPORT)
    return summary


def _settings(context: Context) -> Settings:
    return Settings.of(context.run_config)


app = make_app(_settings)
