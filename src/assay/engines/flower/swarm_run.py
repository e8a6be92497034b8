"""A swarm experiment on Flower's simulation: every node an app of its own, in one run directory.

    nodes/node-0/ ...    each node's own run directory (relayed_swarm.py)
    relay/pools/         what the relay keeps
    keys.toml            the nodes' public keys; the private ones lie in their folders

Ledger, metrics and summary of the first honest node stand at the top as well, so that a report reads the run like any
other; `summary.json` adds everybody's fingerprint. A killed run goes on where it stopped.
"""

from __future__ import annotations

import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context

from assay import checkpoint, run_dir, track
from assay.config import ConfigError, SwarmExperiment
from assay.engines import journal
from assay.engines.flower import swarm_node, swarm_relay
from assay.engines.local_swarm import finished, units
from assay.engines.relayed_swarm import Settings
from assay.engines.swarm_world import malicious_nodes, node_names
from assay.progress import Silent, Tracker
from assay.swarm.keys import make_key, public_hex, read_key, write_keys

KEYS, KEY = "keys.toml", "node.pem"
RAY: dict[str, Any] = {"include_dashboard": False}  # nobody looks at it
TIMEOUT = 3600.0
"""Seconds a round may take in a simulation, in which nobody is ever gone."""


def run_swarm(
    experiment: SwarmExperiment,
    directory: str | Path,
    tracker: Tracker | None = None,
    *,
    given: str = "",
    command: str = "",
    timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """Run or resume `experiment` in `directory` on Flower's simulation (Ray); returns the summary.

    The same result as `local_swarm.run_swarm` for the same seeds: the nodes' weights have the same hash. ConfigError as there.
    """
    directory, tracker = Path(directory).resolve(), tracker or Silent()
    track.check(experiment.track)
    done = finished(experiment, directory)
    if done is not None:
        return done
    if (directory / run_dir.CHECKPOINTS).exists():
        raise ConfigError(f"{directory}: holds a run of the local engine; choose another directory (--out)")
    with journal.locked(directory):
        _simulate(experiment, directory, tracker, timeout)
        return collect(experiment, directory, given=given, command=command)


def _simulate(experiment: SwarmExperiment, directory: Path, tracker: Tracker, timeout: float) -> None:
    from flwr.simulation import run_simulation

    settings = prepare(experiment, directory)
    share = units(experiment) / experiment.swarm.iterations
    relay = swarm_relay.RelaySettings(
        folder=directory / "relay", experiment=experiment, keys=directory / KEYS, timeout=timeout, poll=0.1
    )

    def closed(index: int) -> None:
        tracker.say(f"{experiment.name}: iteration {index}/{experiment.swarm.iterations}")
        tracker.tick(share)

    # by partition, which is all a simulated node knows of itself
    node_app = swarm_node.make_app(partial(_by_partition, settings))
    over = threading.Event()
    try:
        run_simulation(
            swarm_relay.make_app(lambda context: relay, closed, over.is_set),
            node_app,
            num_supernodes=experiment.swarm.nodes,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": RAY},
        )
    finally:
        over.set()  # Flower's thread of the relay outlives a simulation that crashed


def _by_partition(settings: list[Settings], context: Context) -> Settings:
    return settings[int(context.node_config["partition-id"])]


def prepare(experiment: SwarmExperiment, directory: Path) -> list[Settings]:
    """Keys and a folder for each node, made where they are not there yet -> the nodes' settings, in order."""
    nodes, folder = node_names(experiment), directory / "nodes"
    for node in nodes:
        if not (folder / node / KEY).exists():
            make_key(folder / node / KEY)
    public = {node: public_hex(read_key(folder / node / KEY)) for node in nodes}
    write_keys(directory / KEYS, public)
    bad = malicious_nodes(experiment)
    alone = experiment.changed(track={})  # trackers follow the run at the top
    return [
        Settings(
            node=node, folder=folder / node, experiment=alone, keys=directory / KEYS, key=folder / node / KEY,
            malicious=node in bad,
        )
        for node in nodes
    ]  # fmt: skip


def collect(experiment: SwarmExperiment, directory: Path, *, given: str = "", command: str = "") -> dict[str, Any]:
    """What all nodes ended with -> the run's summary, beside the first honest node's ledger and metrics."""
    found = {node: run_dir.read_summary(directory / "nodes" / node) for node in node_names(experiment)}
    absent = [node for node, summary in found.items() if summary is None]
    if absent:
        raise ConfigError(f"{directory}: {', '.join(absent)} did not finish; run it again, it goes on where it stopped")
    summaries = {node: summary for node, summary in found.items() if summary is not None}
    bad = malicious_nodes(experiment)
    first = next(node for node in summaries if node not in bad)
    if given:
        checkpoint.write_atomic(directory / run_dir.EXPERIMENT, given)
    for name in (run_dir.RESOLVED, run_dir.LEDGER, run_dir.METRICS):
        shutil.copyfile(directory / "nodes" / first / name, directory / name)
    summary = summaries[first] | {
        "command": command,
        "engine": "flower",
        "fingerprints": {node: one["fingerprint"] for node, one in summaries.items()},
    }
    checkpoint.write_json(directory / run_dir.SUMMARY, summary)
    with track.following(experiment, directory):
        return summary
