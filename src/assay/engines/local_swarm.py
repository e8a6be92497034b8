"""A whole swarm on one machine.

Honest nodes that start from the same weights share one learner: they read the same pool with the same screens, so that
one update stands for all of them (tests/test_swarm.py shows that it equals running them apart). Everybody's message
goes through the wire. A run is resumable at any point (journal.py).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from assay import checkpoint, run_dir, track
from assay.config import ConfigError, SwarmExperiment
from assay.engines import journal
from assay.engines.swarm_world import (
    World,
    absorb,
    answer,
    build,
    dumped,
    model_sha256,
    plan_of,
    restore,
    save,
    start,
)
from assay.progress import Silent, Tracker
from assay.swarm import summary
from assay.swarm.exchange import gather
from assay.wire import encode_rollout

UNITS = 2.0  # seconds of one core: an iteration of 192 completions on tiny


def run_swarm(
    experiment: SwarmExperiment,
    directory: str | Path,
    tracker: Tracker | None = None,
    *,
    given: str = "",
    command: str = "",
) -> dict[str, Any]:
    """Run or resume `experiment` in `directory`; returns the summary. A finished run is returned as it is."""
    directory, tracker = Path(directory), tracker or Silent()
    run_dir.commit()
    track.check(experiment.track)
    with journal.locked(directory):
        at = time.perf_counter()
        world, identity, model = build(experiment, tracker)
        run_id = journal.claim(directory, identity, {"experiment": identity["experiment"], "model": model}, given)
        finished = run_dir.read_summary(directory)
        if finished is not None:
            with track.following(experiment, directory):  # one that was switched on later
                return finished
        rows = _resume_or_start(world, directory, run_id, time.perf_counter() - at)
        with track.following(experiment, directory) as written:
            while world.round < experiment.swarm.iterations:
                rows.append(play(world, directory))
                written()
            found = summary.summarise(experiment, rows, world.kind_of, world.malicious, model, command)
            found["ledger"] = journal.close(directory, world.round, model_sha256(world))
            found["defence"] = next(iter(world.learners.values())).defence.summary()
            checkpoint.write_json(directory / run_dir.SUMMARY, found)
            return found


def finished(experiment: SwarmExperiment, directory: Path) -> dict[str, Any] | None:
    """The summary of a finished run of this very experiment, without loading a model; None if there is none yet.

    Trackers that were switched on since then are given the run.
    """
    summary = run_dir.read_summary(directory)
    if summary is None:
        return None
    resolved = json.loads((directory / run_dir.RESOLVED).read_text())
    if resolved["experiment"] != json.loads(json.dumps(dumped(experiment))):
        raise ConfigError(f"{directory}: holds another experiment; choose another directory (--out) or delete it")
    track.check(experiment.track)
    with track.following(experiment, directory):
        return summary


def units(experiment: SwarmExperiment) -> float:
    """Rough seconds of one core a run takes, for progress bars."""
    swarm = experiment.swarm
    return UNITS * swarm.iterations * swarm.prompts * swarm.group / 192


def play(world: World, directory: Path) -> dict[str, Any]:
    """One round: every node answers, every learner screens and learns, the round is written down."""
    experiment, index = world.experiment, world.round + 1
    world.tracker.say(f"{experiment.name}: iteration {index}/{experiment.swarm.iterations}")
    before = model_sha256(world)
    at = time.perf_counter()
    plan = plan_of(world, index)
    messages = {node: encode_rollout(r, run=world.rules.run) for node, r in answer(world, plan, before).items()}
    seconds = {"generate": time.perf_counter() - at}
    entry, row = absorb(world, gather(messages, plan, world.reading), before, seconds)
    save(world, directory, entry, row)
    world.tracker.tick(units(experiment) / experiment.swarm.iterations)
    return row


def _resume_or_start(world: World, directory: Path, run_id: str, prepare_seconds: float) -> list[dict[str, Any]]:
    found = checkpoint.load_latest(directory / run_dir.CHECKPOINTS)
    if found is None:
        entry, row = start(world, run_id, prepare_seconds)
        save(world, directory, entry, row)
        return [row]
    restore(world, found)
    journal.publish(directory, found.step, found.meta["entry"], found.meta["row"])
    world.tracker.tick(units(world.experiment) * found.step / world.experiment.swarm.iterations)
    world.tracker.say(f"resuming after iteration {found.step}")
    return run_dir.read_metrics(directory)
