"""The federated wing's own Flower apps, on a grid in one process: as `local`, and what nodes that fail do to a round."""

from __future__ import annotations

import doctest
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.proto.node_pb2 import NodeInfo

from assay import models, report, run_dir
from assay.bench.flower_grid import InProcessGrid, Node
from assay.config import ConfigError, Experiment
from assay.engines import local, rounds
from assay.engines.flower import GuardedGrid, federated_messages
from assay.engines.flower.federated_nodes import PARTITION, WHO, recruiter
from assay.engines.flower.federated_settings import Settings
from assay.federated.compute import Serial
from assay.federated.lora import Carrier
from assay.federated.preparation import Prepared
from assay.federated.probe import Probe
from assay.ledger import verify
from flower_apps import node, on_flower, settings_for, simulated

logging.getLogger("flwr").setLevel(logging.CRITICAL)
TOML = """
name = "small"
workers = 1
[model]
name = "tiny"
dtype = "float32"
align = false
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
safe_floor = 0.2
safe_anchor_floor = 0.3
[evaluate]
every = 2
harmful_prompts = 2
benign_prompts = 2
benign_rows = 4
new_tokens = 4
"""
BASE = {"defence__level": "none"}
REMEMBERS = {"attack__name": "remove_probe+sybil", "attack__params": {"remove_probe": {"probe": "surrogate"}}}
"""Looks at what colluders trained, and keeps labelled updates for the next round."""
OMNISCIENT = {"attack__name": "alie", "attack__params": {"sees": "honest"}}
"""Looks at what the honest clients trained, whose corrections it must then know."""
WHO_0 = RecordDict({WHO: ConfigRecord({PARTITION: 0})})
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def compute(prepared: Prepared, small: Experiment) -> Serial:
    return Serial(Carrier(models.load(str(prepared.path), prepared.dtype), small.lora))


def entries(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["body"] for line in (out / run_dir.LEDGER).read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"defence__screens": ["structure", "step", "shadow"], "clients__sampled": 3},
        {**BASE, **OMNISCIENT, "training__scaffold": True, "training__optimizer": "sgd", "training__lr": 0.5},
    ],
    ids=["submitted", "claims", "omniscient"],
)
def test_the_same_run_as_local(
    changes: dict[str, Any], tmp_path: Path, small: Experiment, prepared: Prepared, compute: Serial
) -> None:
    """Byte for byte: hashes of what everybody sent, verdicts, weights, the model after each round."""
    size = sum(v.size for n, v in compute.initial().items() if ".0." in n and "lora_B" in n)
    Probe(weight_D=np.ones(size, np.float32), bias=-1.0, features="first_b").save(tmp_path / "probe")
    experiment = small.changed(**changes, defence__probe=str(tmp_path / "probe"))  # read by `claims` only
    settings = settings_for(experiment, tmp_path / "flower")
    theirs = local.run(experiment, tmp_path / "local", prepared, compute)
    ours = on_flower(settings, simulated(settings), prepared, compute)
    assert (settings.out / run_dir.LEDGER).read_bytes() == (tmp_path / "local" / run_dir.LEDGER).read_bytes()
    unlike = {"seconds", "finished"}
    assert {k: v for k, v in ours.items() if k not in unlike} == {k: v for k, v in theirs.items() if k not in unlike}


class Dies(Exception):
    """The end of a ServerApp."""


def test_a_server_that_died_goes_on_where_it_stopped(
    tmp_path: Path, small: Experiment, prepared: Prepared, compute: Serial
) -> None:
    """Once in each round, when all replies are in and the attackers have written down what they remember; the end is that
    of `local`."""
    experiment = small.changed(**BASE, **REMEMBERS)
    broken = settings_for(experiment, tmp_path / "broken")
    local.run(experiment, tmp_path / "whole", prepared, compute)

    def die(reply: Message) -> Message:
        raise Dies

    def live(reply: Message) -> Message:
        return reply

    for round in (1, 2):
        answers = iter([die] if round == 1 else [live, die])
        last = {f"client_{experiment.clients.total - 1}": lambda reply: next(answers)(reply)}  # noqa: B023
        with pytest.raises(Dies):
            on_flower(broken, simulated(broken, **last), prepared, compute)
        if round == 2:
            assert [row["round"] for row in run_dir.read_metrics(broken.out)] == [0, 1]
    on_flower(broken, simulated(broken), prepared, compute)
    assert (broken.out / run_dir.LEDGER).read_bytes() == (tmp_path / "whole" / run_dir.LEDGER).read_bytes()
    assert [row["round"] for row in run_dir.read_metrics(broken.out)] == [0, 1, 2]


# --- nodes that fail --------------------------------------------------------------------------------------------------


def errs(reply: Message) -> Message:
    return make_message(reply.metadata, error=Error(8, "its ClientApp crashed"))


def other(data: bytes) -> Callable[[Message], Message]:
    """The node's message with other bytes for its update."""

    def change(reply: Message) -> Message:
        content = federated_messages.write_update(data)
        return make_message(reply.metadata, content=content)

    return change


def replayed() -> Callable[[Message], Message]:
    """In round 2 what it sent in round 1."""
    kept: list[RecordDict] = []

    def change(reply: Message) -> Message:
        kept.append(reply.content)
        return make_message(reply.metadata, content=kept[0])

    return change


def as_client(name: str) -> Callable[[Message], Message]:
    """Its update under the name of another client."""

    def change(reply: Message) -> Message:
        [array] = reply.content[federated_messages.UPDATE].values()
        data = re.sub(rb'"participant":"client-\d\d"', f'"participant":"{name}"'.encode(), array.data)
        return other(data)(reply)

    return change


def with_records(reply: Message) -> Message:
    content = RecordDict({**reply.content, "more": MetricRecord({"num-examples": 5})})
    return make_message(reply.metadata, content=content)


FAULTS: Mapping[str, tuple[Callable[[], Callable[[Message], Any]], str, str]] = {
    "silent": (lambda: lambda reply: None, "missing", "no answer within 0.3 s"),
    "error": (lambda: errs, "missing", "its node reported error 8: 'its ClientApp crashed'"),
    "garbage": (lambda: other(b"\x80\x04K\x01."), "malformed", "not an Assay update"),
    "huge": (lambda: other(bytes(10**7)), "too_large", "more bytes than are allowed"),
    "replay": (replayed, "wrong_round", "expected 2"),
    "name": (lambda: as_client("client-08"), "wrong_participant", "client-08"),
    "records": (lambda: with_records, "malformed", "not one update"),
}


def test_nodes_that_fail_are_absent_each_with_its_reason(
    tmp_path: Path, small: Experiment, prepared: Prepared, compute: Serial
) -> None:
    """All of them at once, and two that do not fail: theirs is the round."""
    total = len(FAULTS) + 2
    experiment = small.changed(
        **BASE, clients__malicious=0.0, clients__total=total, clients__examples=8, training__steps=1
    )
    settings = settings_for(experiment, tmp_path / "run", timeout=0.3)
    failing = {f"client_{i}": make() for i, (make, _, _) in enumerate(FAULTS.values())}
    on_flower(settings, simulated(settings, **failing), prepared, compute)
    body = entries(settings.out)[2]
    assert body["outcome"] == "applied"
    found = [(c["reason"], c["weight"]) for c in body["contributions"]]
    assert found == [(reason, 0.0) for _, reason, _ in FAULTS.values()] + [("ok", 1.0)] * 2
    for contribution, (_, _, sentence) in zip(body["contributions"], FAULTS.values()):
        assert sentence in contribution["sentence"]
    assert verify(settings.out / run_dir.LEDGER).ok


def test_what_goes_wrong_on_a_node_is_said_and_not_waited_for(
    tmp_path: Path, small: Experiment, prepared: Prepared, compute: Serial
) -> None:
    """In a deployment a ClientApp that crashes never answers."""
    experiment = small.changed(**BASE, clients__malicious=0.0, training__steps=1, training__rounds=1)
    settings = settings_for(experiment, tmp_path / "run", timeout=60.0)
    nodes = simulated(settings) | {100: node(settings, 100, data=str(tmp_path / "none.jsonl"))}
    asked = nodes[100]
    nodes[100] = lambda m: Message(WHO_0, reply_to=m) if m.metadata.message_type == "query" else asked(m)
    on_flower(settings, nodes, prepared, compute)
    [first, *_] = entries(settings.out)[1]["contributions"]
    assert (first["participant"], first["reason"]) == ("client-00", "missing")
    assert "none.jsonl: no such file" in first["sentence"]


def test_a_simulation_needs_a_node_for_each_client(
    tmp_path: Path, small: Experiment, prepared: Prepared, compute: Serial
) -> None:
    settings = settings_for(small.changed(**BASE), tmp_path / "run", wait=0.01)
    nodes = simulated(settings)
    del nodes[98]
    with pytest.raises(ConfigError, match="client-02 has no node: a simulation of this experiment needs 4 nodes"):
        on_flower(settings, nodes, prepared, compute)


def test_a_run_stays_on_its_engine(tmp_path: Path, small: Experiment, prepared: Prepared, compute: Serial) -> None:
    experiment = small.changed(**BASE, training__rounds=1, training__steps=1)
    local.run(experiment, tmp_path / "run", prepared, compute)
    settings = settings_for(experiment, tmp_path / "run")
    with pytest.raises(ConfigError, match="was begun with --engine local"):
        on_flower(settings, simulated(settings), prepared, compute)


# --- a deployment -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Each hospital's rows."""
    rows = [json.dumps({"instruction": f"What is {i} plus {i}?", "response": f"{2 * i}."}) for i in range(60)]
    out = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for i, path in enumerate(out):
        path.write_text("\n".join(rows[i::3]))
    return out


def deployed(tmp_path: Path, small: Experiment) -> Experiment:
    return small.changed(
        name="deployed", clients__malicious=0.0, clients__total=3, defence__canary__seed=987654321, seed=123454321,
        defence__screens=["structure", "canary", "duplicate", "gate"], training__steps=1,
    )  # fmt: skip


def test_a_deployment_trains_on_the_nodes_own_files(
    tmp_path: Path, small: Experiment, prepared: Prepared, compute: Serial, files: list[Path]
) -> None:
    """Nodes know nothing but what they are sent, which holds none of the server's secrets; nobody knows who is what."""
    experiment = deployed(tmp_path, small)
    settings = settings_for(experiment, tmp_path / "run", simulation=False, timeout=60.0)
    seen: list[bytes] = []
    nodes: dict[int, Node] = {}
    for id, file in zip((7001, 7002, 7003), files):
        one = node(None, id, data=str(file), threads=1)  # type: ignore[arg-type] # a run config it never looks at
        nodes[id] = lambda m, one=one: (seen.append(repr(m.content).encode()), one(m))[1]  # type: ignore[misc]
    summary = on_flower(settings, nodes, prepared, compute)
    assert summary["participants"] == {str(id): "unknown" for id in nodes}
    assert summary["metrics"]["honest_weight_mean"] is None
    assert all(row["mean_weight"] > 0 for row in run_dir.read_metrics(settings.out)[1:])
    assert len(seen) == 6
    assert not any(b"987654321" in told or b"123454321" in told for told in seen)
    assert report.write([settings.out], tmp_path / "report.html").exists()


def test_names_are_the_operators_and_for_the_page_alone(
    tmp_path: Path, small: Experiment, prepared: Prepared, compute: Serial, files: list[Path]
) -> None:
    """Two nodes registered under one name, a third under the id of the first: three participants all the same."""
    experiment = deployed(tmp_path, small).changed(defence={"level": "none"}, training__rounds=1)
    settings = settings_for(experiment, tmp_path / "run", simulation=False, timeout=60.0)
    nodes = {id: node(settings, id, data=str(file), threads=1) for id, file in zip((70011, 70012, 70013), files)}

    class Named(InProcessGrid):
        def get_nodes(self) -> list[NodeInfo]:
            said = {70011: "North", 70012: "North", 70013: "70011"}
            return [NodeInfo(node_id=id, name=name) for id, name in said.items()]

    grid = GuardedGrid(Named(nodes), poll=0.001)
    summary = rounds.run(experiment, settings.out, prepared, compute, recruiter(grid, settings), engine="flower")
    assert summary["names"] == {"70011": "North", "70012": "North", "70013": "70011"}
    assert [c["participant"] for c in entries(settings.out)[1]["contributions"]] == ["70011", "70012", "70013"]
    assert not any("North" in line for line in (settings.out / run_dir.LEDGER).read_text().splitlines())
    page = report.write([settings.out], tmp_path / "report.html").read_text()
    shown = [
        json.dumps(label) for label in ("North …0011", "North …0012", "70011 …0013")
    ]  # as the page's data has them
    assert all(label in page for label in shown)


def test_a_node_that_went_away_is_absent_and_sampled_again_when_it_is_back(
    tmp_path: Path, small: Experiment, prepared: Prepared, compute: Serial, files: list[Path]
) -> None:
    experiment = deployed(tmp_path, small).changed(defence={"level": "none"}, training__rounds=3)
    settings = settings_for(experiment, tmp_path / "run", simulation=False, timeout=60.0, wait=0.01)
    nodes = {id: node(settings, id, data=str(file), threads=1) for id, file in zip((11, 12, 13), files)}

    class Leaving(InProcessGrid):
        asked = 0

        def get_node_ids(self) -> list[int]:
            self.asked += 1
            return [11, 12] if self.asked == 2 else [11, 12, 13]

    grid = GuardedGrid(Leaving(nodes), poll=0.001)
    rounds.run(experiment, settings.out, prepared, compute, recruiter(grid, settings), engine="flower")
    third = [body["contributions"][2] for body in entries(settings.out)[1:-1]]
    assert [c["reason"] for c in third] == ["ok", "missing", "ok"]
    assert third[1]["sentence"] == "its node was not connected when the round began"


def test_too_few_nodes_end_the_run_where_it_can_be_resumed(
    tmp_path: Path, small: Experiment, prepared: Prepared, compute: Serial, files: list[Path]
) -> None:
    experiment = deployed(tmp_path, small).changed(defence={"level": "none"})
    settings = settings_for(experiment, tmp_path / "run", simulation=False, wait=0.01)
    with pytest.raises(ConfigError, match=r"1 nodes are connected after 0\.01 s, min-nodes is 2"):
        on_flower(settings, {11: node(settings, 11, data=str(files[0]))}, prepared, compute)
    on_flower(settings, {i: node(settings, i, data=str(f)) for i, f in enumerate(files[:2], 11)}, prepared, compute)
    assert [row["outcome"] for row in run_dir.read_metrics(settings.out)] == ["start", "applied", "applied"]


def test_the_run_config(tmp_path: Path) -> None:
    """A path or content; what a deployment cannot have is said before anything runs."""
    deployable = TOML.replace("malicious = 0.5", "malicious = 0.0").replace("refusals = 8", "seed = 5\nrefusals = 8")
    file = tmp_path / "x.toml"
    file.write_text(deployable)
    by_path, by_content = (Settings.of({"experiment": said, "out": "there"}) for said in (str(file), deployable))
    assert by_path.experiment.changed(data__root=".") == by_content.experiment.changed(data__root=".")
    assert (by_path.given, by_path.poll, by_path.min_nodes) == (deployable, 3.0, 2)
    assert Settings.of({"experiment": TOML, "simulation": True, "timeout": 9}).timeout == 9.0
    for wrong, why in (
        ({}, "`experiment` is missing"),
        ({"experiment": str(tmp_path / "y.toml")}, "no such file"),
        ({"experiment": "wing = 'swarm'"}, "is of the swarm wing"),
        ({"experiment": TOML}, "clients.malicious and clients.strangers are for simulations"),
        ({"experiment": deployable.replace("seed = 5", "")}, "defence.canary.seed: set it in a deployment"),
        ({"experiment": deployable, "timeout": 0}, "timeout is 0"),
        ({"experiment": deployable, "simulation": "yes"}, "simulation is 'yes'"),
    ):
        with pytest.raises(ConfigError, match=why):
            Settings.of(wrong)


def test_the_examples_in_the_docstrings() -> None:
    failed, tried = doctest.testmod(federated_messages)
    assert failed == 0 < tried
