"""The federated wing's own Flower apps, on a grid in one process: as `local`, and what nodes that fail do to a round."""

from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from assay import models, run_dir, wire
from assay.bench.flower_grid import InProcessGrid, Node
from assay.config import ConfigError, Experiment
from assay.contribution import Template
from assay.engines import local, rounds
from assay.engines.flower import GuardedGrid, federated_client, federated_messages
from assay.engines.flower.federated_nodes import recruiter
from assay.engines.flower.federated_settings import Settings
from assay.federated.compute import Serial
from assay.federated.lora import Carrier
from assay.federated.preparation import Prepared
from assay.ledger import verify
from assay.verdict import Reason

logging.getLogger("flwr").setLevel(logging.CRITICAL)
TOML = """
name = "small"
workers = 1
[model]
name = "tiny"
dtype = "float32"
[clients]
total = 4
malicious = 0.5
examples = 16
[training]
rounds = 2
steps = 2
lr = 1e-2
[defence.rehearsal]
rounds = 1
examples = 16
[defence.canary]
refusals = 8
safe = 4
floor = 0.2
anchor_floor = 0.3
[evaluate]
every = 2
harmful_prompts = 2
benign_prompts = 2
benign_rows = 4
"""
BASE = {"defence__level": "none"}
REMEMBERS = {"attack__name": "remove_probe+sybil", "attack__params": {"remove_probe": {"probe": "surrogate"}}}
"""Looks at what colluders trained, and keeps labelled updates for the next round."""
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def compute(prepared: Prepared, small: Experiment) -> Serial:
    return Serial(Carrier(models.load(str(prepared.path), prepared.dtype), small.lora))


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


def entries(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["body"] for line in (out / run_dir.LEDGER).read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"defence__level": "evidence", "clients__sampled": 3},
        {**BASE, "attack__name": "alie", "attack__params": {"sees": "honest"}},
        {**BASE, **REMEMBERS},
        {**BASE, "training__scaffold": True, "training__optimizer": "sgd", "training__lr": 0.5},
    ],
    ids=["submitted", "claims", "omniscient", "memory", "scaffold"],
)
def test_the_same_run_as_local(
    changes: dict[str, Any], tmp_path: Path, small: Experiment, prepared: Prepared, compute: Serial
) -> None:
    """Byte for byte: hashes of what everybody sent, verdicts, weights, the model after each round."""
    experiment = small.changed(**changes)
    settings = settings_for(experiment, tmp_path / "flower")
    theirs = local.run(experiment, tmp_path / "local", prepared, compute)
    ours = on_flower(settings, simulated(settings), prepared, compute)
    assert (settings.out / run_dir.LEDGER).read_bytes() == (tmp_path / "local" / run_dir.LEDGER).read_bytes()
    unlike = {"seconds", "finished"}
    assert {k: v for k, v in ours.items() if k not in unlike} == {k: v for k, v in theirs.items() if k not in unlike}


class Dies(Exception):
    """The end of a ServerApp."""


@pytest.mark.parametrize("round", [1, 2])
def test_a_server_that_died_goes_on_where_it_stopped(
    round: int, tmp_path: Path, small: Experiment, prepared: Prepared, compute: Serial
) -> None:
    """Its end comes when the round's replies are half in, after the attackers have written down what they remember."""
    experiment = small.changed(**BASE, **REMEMBERS)
    whole, broken = (settings_for(experiment, tmp_path / name) for name in ("whole", "broken"))
    on_flower(whole, simulated(whole), prepared, compute)
    seen: list[int] = []

    def die(reply: Message) -> Message:
        seen.append(1)
        if len(seen) == round:
            raise Dies
        return reply

    last = experiment.clients.total - 1
    with pytest.raises(Dies):
        on_flower(broken, simulated(broken, **{f"client_{last}": die}), prepared, compute)
    assert [row["round"] for row in run_dir.read_metrics(broken.out)] == list(range(round))
    on_flower(broken, simulated(broken), prepared, compute)
    assert (broken.out / run_dir.LEDGER).read_bytes() == (whole.out / run_dir.LEDGER).read_bytes()
    assert [row["round"] for row in run_dir.read_metrics(broken.out)] == [0, 1, 2]
