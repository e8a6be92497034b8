"""Clients, strategies and runs for the tests of Assay on Flower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Result, Strategy

from assay.bench.flower_grid import InProcessGrid, Node
from assay.contribution import Round, Tensors
from assay.engines.flower import GuardedGrid, Screened
from assay.federated.say import say
from assay.verdict import Reason, State, Verdict

SHAPES = {"b": (3, 4), "a": (7,)}  # not sorted: some strategies go by position
START = {
    name: np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape) for name, shape in SHAPES.items()
}
NODES = range(11, 20)
TIMEOUT = 5.0
"""Everybody answers at once; nobody waits this long."""


def step(node: int) -> Tensors:
    """What an honest client adds to the model, the same in every round."""
    rng = np.random.default_rng(node)
    return {name: (0.1 + 0.05 * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


def client(node: int, examples: int = 10, change: Callable[[Message], Message] = lambda m: m) -> Node:
    def reply(message: Message) -> Message:
        if message.metadata.message_type == "evaluate":
            metrics = MetricRecord({"num-examples": examples, "accuracy": 0.5 + node / 100})
            return change(Message(RecordDict({"metrics": metrics}), reply_to=message))
        own, sent = step(node), message.content["arrays"]
        arrays = ArrayRecord(
            {name: Array((array.numpy() + own[name]).astype(np.float32)) for name, array in sent.items()}
        )
        metrics = MetricRecord({"num-examples": examples, "train_loss": 0.5 + node / 50, "norm_bit": float(node % 2)})
        return change(Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message))

    return reply


def clients(*without: int, examples: int = 10) -> dict[int, Node]:
    return {node: client(node, examples) for node in NODES if node not in without}


DP: dict[str, Any] = {"noise_multiplier": 0.0, "num_sampled_clients": len(NODES)}  # no noise: results can be compared
STRATEGIES: Mapping[str, Callable[[], Strategy]] = {
    "FedAvg": flower.FedAvg,
    "FedProx": lambda: flower.FedProx(proximal_mu=0.1),
    "FedAvgM": lambda: flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
    "FedAdagrad": flower.FedAdagrad,
    "FedAdam": flower.FedAdam,
    "FedYogi": flower.FedYogi,
    "FedMedian": flower.FedMedian,
    "FedTrimmedAvg": lambda: flower.FedTrimmedAvg(beta=0.25),
    "Krum": lambda: flower.Krum(num_malicious_nodes=2),
    "MultiKrum": lambda: flower.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=3),
    "Bulyan": lambda: flower.Bulyan(num_malicious_nodes=1),
    "QFedAvg": lambda: flower.QFedAvg(client_learning_rate=0.1),
    "DPServerFixed": lambda: flower.DifferentialPrivacyServerSideFixedClipping(flower.FedAvg(), clipping_norm=0.4, **DP),
    "DPClientFixed": lambda: flower.DifferentialPrivacyClientSideFixedClipping(flower.FedAvg(), clipping_norm=0.4, **DP),
    "DPServerAdaptive": lambda: flower.DifferentialPrivacyServerSideAdaptiveClipping(flower.FedAvg(), clipped_count_stddev=0.0, **DP),
    "DPClientAdaptive": lambda: flower.DifferentialPrivacyClientSideAdaptiveClipping(flower.FedAvg(), clipped_count_stddev=0.0, **DP),
}  # fmt: skip
CLAIMS = {"train_loss": (0.1, 10.0)}


def record(tensors: Tensors = START) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in tensors.items()})


def stock(strategy: Strategy, nodes: Mapping[int, Node], rounds: int = 1) -> Result:
    return strategy.start(InProcessGrid(nodes), record(), num_rounds=rounds, timeout=TIMEOUT)


def screened(strategy: Screened, nodes: Mapping[int, Node], rounds: int = 1) -> Result:
    return strategy.start(GuardedGrid(InProcessGrid(nodes), poll=0.005), record(), num_rounds=rounds, timeout=TIMEOUT)


def numbers(arrays: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in arrays.items()}


def assert_same(found: ArrayRecord, expected: ArrayRecord | Tensors, tolerance: float = 2e-6) -> None:
    theirs = numbers(expected) if isinstance(expected, ArrayRecord) else expected
    assert list(found) == list(SHAPES)
    for name, value in numbers(found).items():
        np.testing.assert_allclose(value, theirs[name], rtol=tolerance, atol=tolerance)


@dataclass(frozen=True)
class Weights:
    """A screen that gives weights by node; counts the rounds it has seen in its state."""

    weight: Mapping[int, float]
    name: str = "weights"

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        given = [self.weight.get(int(u.participant), 1.0) for u in round.updates]
        verdicts = [say(u, self.name, w, Reason.REVIEW, "told so") for u, w in zip(round.updates, given)]
        return verdicts, {"rounds": state.get("rounds", 0) + 1}
