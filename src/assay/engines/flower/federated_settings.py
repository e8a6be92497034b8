"""What the federated apps are told by Flower's run config and node config.

Run config (`[tool.flwr.app.config]`, `flwr run --run-config`), which Flower shows to every node:

    experiment   the path of an experiment in TOML on the server's machine, or its content. A path keeps it there
    out          the run directory on the server's machine; default runs/<name>
    data-root    folder that relative data paths of the experiment start from
    simulation   true: nodes are the experiment's simulated clients, by Flower's partition-id, and see the experiment too
    timeout      seconds a node has for a round; poll: seconds between looks for replies
    wait         seconds to wait for nodes; min-nodes: fewest connected nodes to play a round with

Node config (`flower-supernode --node-config`), which stays on the node:

    data         the node's own rows, JSON lines
    base         a directory with the base model of the run; without it the model is had as on the server
    threads      threads to train with
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay import config
from assay.config import AnyExperiment, ConfigError, Experiment
from assay.federated import defence


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The run config as it was understood; times in seconds. `given` is the experiment's TOML as it was given."""

    experiment: Experiment
    out: Path
    given: str = ""
    simulation: bool = False
    timeout: float = 3600.0
    poll: float = 3.0
    wait: float = 600.0
    min_nodes: int = 2

    @classmethod
    def of(cls, run_config: Mapping[str, Any]) -> Settings:
        """ConfigError for what is missing or does not fit. Keys of others are left alone."""
        experiment, given = _experiment(run_config)
        simulation = run_config.get("simulation", False)
        if not isinstance(simulation, bool):
            raise ConfigError(f"run config: simulation is {simulation!r}, expected true or false")
        if not simulation:
            check_deployment(experiment)
        return cls(
            experiment=experiment,
            given=given,
            out=Path(str(run_config.get("out") or Path("runs") / experiment.name)).resolve(),
            simulation=simulation,
            timeout=_positive(run_config, "timeout", cls.timeout),
            poll=_positive(run_config, "poll", 0.1 if simulation else cls.poll),
            wait=_positive(run_config, "wait", cls.wait),
            min_nodes=round(_positive(run_config, "min-nodes", min(cls.min_nodes, experiment.clients.total))),
        )


def check_deployment(experiment: Experiment) -> None:
    """ConfigError for what only a simulation can have, and for secrets that everybody could guess."""
    if experiment.clients.malicious or experiment.clients.stranger_count:
        raise ConfigError(
            "clients.malicious and clients.strangers are for simulations; set both to 0 in a deployment, or "
            "simulation = true in the run config"
        )
    config, wanted = experiment.defence, set(defence.names(experiment))
    for screens, key, seed in (
        ({"canary", "crowd", "gate"}, "canary", config.canary.seed),
        ({"evidence"}, "evidence", config.evidence.seed),
    ):
        if screens & wanted and seed is None:
            raise ConfigError(
                f"defence.{key}.seed: set it in a deployment and keep it secret; it decides what clients must not foresee"
            )


def _experiment(run_config: Mapping[str, Any]) -> tuple[Experiment, str]:
    """The experiment and its TOML as given."""
    said, root = run_config.get("experiment"), run_config.get("data-root")
    if not isinstance(said, str) or not said.strip():
        raise ConfigError("run config: `experiment` is missing; give the path of an experiment in TOML, or its content")
    found: AnyExperiment
    if "\n" in said or "=" in said:
        try:
            found, given = config.parse_any(tomllib.loads(said)), said
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"run config: experiment is not valid TOML: {error}") from None
        found = found if found.wing != "federated" else found.changed(data__root=str(Path(str(root or ".")).resolve()))
    else:
        found, given = config.load(said, data_root=None if root is None else str(root)), Path(said).read_text()
    if not isinstance(found, Experiment):
        raise ConfigError(
            f"run config: the experiment is of the {found.wing} wing, these apps are the federated wing's"
        )
    return found, given


def _positive(run_config: Mapping[str, Any], key: str, default: float) -> float:
    value = run_config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ConfigError(f"run config: {key} is {value!r}, expected a number above 0")
    return float(value)
