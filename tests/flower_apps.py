"""The federated wing's apps on a grid in one process: what tests of whole runs and of killed ones have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from assay.bench.flower_grid import InProcessGrid, Node
from assay.config import Experiment
from assay.engines import rounds
from assay.engines.flower import GuardedGrid, federated_client
from assay.engines.flower.federated_nodes import recruiter
from assay.engines.flower.federated_settings import Settings
from assay.federated.compute import Serial
from assay.federated.preparation import Prepared


def node(settings: Settings, id: int, change: Callable[[Message], Any] = lambda m: m, **config: Any) -> Node:
    """A SuperNode with Assay's ClientApp; `change` is what becomes of its replies."""
    app = federated_client.make_app(lambda context: settings)
    context = Context(run_id=1, node_id=id, node_config=config, state=RecordDict(), run_config={})

    def answer(message: Message) -> Any:
        reply = app(message, context)
        return change(reply) if message.metadata.message_type == "train" else reply

    return answer


def simulated(settings: Settings, **change: Callable[[Message], Any]) -> dict[int, Node]:
    """One node a client, in an order of its own, as Flower's ids are."""
    total = settings.experiment.clients.total
    return {
        100 - i: node(settings, 100 - i, change.get(f"client_{i}", lambda m: m), **{"partition-id": i})
        for i in range(total)
    }


def settings_for(experiment: Experiment, out: Path, **more: Any) -> Settings:
    return Settings(**{"experiment": experiment, "out": out, "simulation": True, "poll": 0.001, "timeout": 5.0, **more})


def on_flower(settings: Settings, nodes: Mapping[int, Node], prepared: Prepared, compute: Serial) -> dict[str, Any]:
    grid = GuardedGrid(InProcessGrid(nodes), poll=settings.poll)
    recruit = recruiter(grid, settings)
    return rounds.run(settings.experiment, settings.out, prepared, compute, recruit, engine="flower")
