"""Screened strategies on real Flower, in one process: every stock strategy, foreign ones, what weights do to them."""

from __future__ import annotations

import doctest
import gc
import importlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy import __all__ as stock_names

from assay.bench.flower_grid import InProcessGrid, Node
from assay.config import ConfigError
from assay.contribution import flatten, tensors_sha256, unflatten
from assay.data import Example
from assay.engines.flower import GuardedGrid, Screened, acting, guard
from assay.engines.flower import screened as screened_module
from assay.engines.flower.acting import acting_of, drawn
from assay.federated import aggregators
from assay.federated.canary import CanaryLimits, Gate, Measure
from assay.federated.local_sft import LocalSettings
from assay.federated.screens import Duplicate, Norm, Structure
from assay.ledger import verify
from assay.run_dir import LEDGER
from assay.verdict import Reason
from flower_nodes import (
    CLAIMS,
    NODES,
    START,
    STRATEGIES,
    Weights,
    assert_same,
    client,
    clients,
    numbers,
    record,
    screened,
    step,
    stock,
)

logging.getLogger("flwr").setLevel(logging.ERROR)
MANY = 10**6


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """Some of Flower's strategies collect garbage per array, which takes half a second where torch is loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def wrapped(strategy: Strategy, weight: dict[int, float] | None = None, **more: Any) -> Screened:
    return Screened(strategy, [Structure(), Weights(weight or {})], claims=CLAIMS, seed=7, **more)


def refusals(strategy: Screened) -> dict[str, Reason]:
    assert strategy.outcome is not None
    screened = strategy.outcome.screened
    return {name: screened.deciding[name].reason for name, weight in screened.weight.items() if weight == 0}


def deltas(nodes: Iterable[int]) -> np.ndarray:
    return np.stack([flatten(step(node)) for node in nodes])


# --- every stock strategy -------------------------------------------------------------------------------------------


def test_every_stock_strategy_is_in_these_tests() -> None:
    known = {type(make()).__name__ for make in STRATEGIES.values()} | {"FedXgbBagging", "FedXgbCyclic"}
    assert set(stock_names) - {"Result", "Strategy"} == known


@pytest.mark.parametrize("module", [acting, guard, screened_module])
def test_the_examples_in_the_docstrings(module: ModuleType) -> None:
    failed, tried = doctest.testmod(module)
    assert failed == 0 < tried


@pytest.mark.parametrize("name", STRATEGIES)
def test_weight_1_for_all_is_the_strategy_itself(name: str) -> None:
    theirs = stock(STRATEGIES[name](), clients(), rounds=3)
    ours = screened(wrapped(STRATEGIES[name](), max_examples=MANY), clients(), rounds=3)
    assert_same(ours.arrays, theirs.arrays)
    for round, metrics in theirs.train_metrics_clientapp.items():
        assert dict(ours.train_metrics_clientapp[round]) == pytest.approx(dict(metrics))
    for round, metrics in theirs.evaluate_metrics_clientapp.items():
        assert dict(ours.evaluate_metrics_clientapp[round]) == pytest.approx(dict(metrics))


@pytest.mark.parametrize("name", STRATEGIES)
def test_weight_0_is_absence(name: str) -> None:
    """Of two clients, though they claim a million examples and send what is far from everybody else's."""

    def lie(message: Message) -> Message:
        if message.metadata.message_type == "train":
            arrays = message.content["arrays"]
            message.content["arrays"] = ArrayRecord({n: Array(-50 * a.numpy()) for n, a in arrays.items()})
        return message

    liars = {node: client(node, MANY, lie) for node in (13, 17)}
    ours = screened(wrapped(STRATEGIES[name](), {13: 0.0, 17: 0.0}), clients() | liars, rounds=2)
    assert_same(ours.arrays, stock(STRATEGIES[name](), clients(13, 17), rounds=2).arrays)


@pytest.mark.parametrize("name", STRATEGIES)
def test_weights_between_act_in_every_strategy(name: str) -> None:
    """Exactly by the weighted mean or rule, or by who was drawn; never as if nothing had been said."""
    weight = {13: 0.5, 17: 0.25, 12: 0.75}
    strategy = wrapped(STRATEGIES[name](), weight)
    found = screened(strategy, clients()).arrays
    full = {node: weight.get(node, 1.0) for node in NODES}
    if strategy.acting.how == "counts":
        counted = {node: client(node, round(1000 * w)) for node, w in full.items()}
        assert_same(found, stock(STRATEGIES[name](), counted).arrays)
    elif strategy.acting.how == "own":
        assert strategy.acting.own is not None
        delta_D = strategy.acting.own(len(NODES))(deltas(NODES), list(full.values()))
        assert_same(found, unflatten(flatten(START) + delta_D, START))
    else:
        taking = drawn(full, 7, 1)
        assert 0 < sum(taking.values()) < len(NODES)
        assert_same(found, stock(STRATEGIES[name](), clients(*(n for n in NODES if not taking[n]))).arrays)
    assert not np.allclose(
        flatten(numbers(found)), flatten(numbers(stock(STRATEGIES[name](), clients()).arrays)), atol=1e-5
    ) or (
        name == "Krum"  # whom it chooses may stay the same
    )


@pytest.mark.parametrize(("name", "rule"), [
    ("FedMedian", aggregators.make("median")), ("FedTrimmedAvg", aggregators.make("trimmed_mean", f=2)),
    ("Krum", aggregators.make("krum", f=2)), ("MultiKrum", aggregators.make("krum", f=2, m=3)),
])  # fmt: skip
def test_assays_own_rules_are_the_strategies_own_at_equal_weights(name: str, rule: aggregators.Aggregator) -> None:
    delta_D = rule(deltas(NODES), np.ones(len(NODES)))
    assert_same(stock(STRATEGIES[name](), clients()).arrays, unflatten(flatten(START) + delta_D, START))


@pytest.mark.parametrize("name", STRATEGIES)
def test_only_proportions_of_weights_matter(name: str) -> None:
    third = screened(wrapped(STRATEGIES[name](), dict.fromkeys(NODES, 1 / 3)), clients())
    assert_same(third.arrays, stock(STRATEGIES[name](), clients(examples=1)).arrays)


def test_a_drawn_client_takes_part_in_his_share_of_the_rounds() -> None:
    weight = {1: 1.0, 2: 0.8, 3: 0.3, 4: 0.0}
    rounds = [drawn(weight, seed=3, round=round) for round in range(4000)]
    shares = {node: np.mean([taking.get(node, False) for taking in rounds]) for node in weight}
    assert shares[1] == 1
    assert shares[4] == 0
    assert shares[2] == pytest.approx(0.8, abs=0.03)  # 5 standard deviations
    assert shares[3] == pytest.approx(0.3, abs=0.036)
    both = np.mean([taking[2] and taking[3] for taking in rounds])
    assert both == pytest.approx(0.24, abs=0.034), "independently of the others"
    assert drawn(weight, 3, 1) == drawn(weight, 3, 1)
    assert [drawn(weight, seed, 5) for seed in range(9)] != [drawn(weight, 3, 5)] * 9


def test_a_rule_that_bears_too_few_is_drawn() -> None:
    """f = 4 needs 11 of 9 present: Flower's Krum goes on without its bound, so must a round in which weights differ."""
    strategy = wrapped(flower.Krum(num_malicious_nodes=4), {13: 0.5})
    found = screened(strategy, clients()).arrays
    out = [13] if not drawn({node: 1.0 for node in NODES} | {13: 0.5}, 7, 1)[13] else []
    assert_same(found, stock(flower.Krum(num_malicious_nodes=4), clients(*out)).arrays)


# --- foreign strategies ---------------------------------------------------------------------------------------------


class SignMean(flower.FedAvg):
    """Moves by the mean sign: scaling an update does nothing to it."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.seen = [reply.content for reply in replies]
        signs = [np.sign(flatten(numbers(content["arrays"])) - flatten(START)) for content in self.seen]
        return record(unflatten(flatten(START) + np.mean(signs, axis=0), START)), None


class Nosy(flower.FedAvg):
    """FedAvg but for a helper of its own."""

    def _check_and_log_replies(self, *args: Any, **kwargs: Any) -> Any:
        return super()._check_and_log_replies(*args, **kwargs)


class OwnLoop(flower.FedAvg):
    def start(self, *args: Any, **kwargs: Any) -> Any:
        return super().start(*args, **kwargs)


def test_weights_act_on_a_strategy_that_undoes_scaling() -> None:
    away = {13: client(13, 1, lambda m: negated(m))}
    expected = stock(SignMean(), clients(13)).arrays
    assert_same(screened(wrapped(SignMean(), {13: 0.0}), clients() | away).arrays, expected)
    rounds = [
        flatten(numbers(screened(Screened(SignMean(), [Weights({13: 0.3})], seed=seed), clients() | away).arrays))
        for seed in range(20)
    ]
    kept = sum(np.allclose(found, flatten(numbers(expected))) for found in rounds)
    assert kept == sum(not drawn({n: 1.0 for n in NODES} | {13: 0.3}, seed, 1)[13] for seed in range(20))
    assert 5 < kept < 20


def negated(message: Message) -> Message:
    if message.metadata.message_type == "train":
        arrays = message.content["arrays"]
        message.content["arrays"] = ArrayRecord({n: Array(2 * START[n] - a.numpy()) for n, a in arrays.items()})
    return message


@pytest.mark.parametrize("strategy", [SignMean(), Nosy()])
def test_of_what_overrides_aggregation_nothing_is_taken_for_known(strategy: Strategy) -> None:
    assert acting_of(strategy).how == "draw"


def test_a_patched_instance_is_foreign() -> None:
    strategy = flower.FedAvg()
    strategy.aggregate_train = lambda *_: (None, None)  # type: ignore[method-assign]
    assert acting_of(strategy).how == "draw"


def test_subclasses_that_aggregate_as_their_parent_are_known() -> None:
    class Sampling(flower.FedMedian):
        def configure_train(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
            return super().configure_train(*args, **kwargs)

    assert acting_of(Sampling()).how == "own"


def test_a_foreign_strategy_sees_only_what_was_read() -> None:
    def more(message: Message) -> Message:
        message.content["code"] = ConfigRecord({"run": b"me"})
        return message

    strategy = SignMean()
    screened(wrapped(strategy), clients() | {13: client(13, 77, more)})
    assert len(strategy.seen) == len(NODES)
    for content in strategy.seen:
        assert set(content) == {"arrays", "metrics"}
        assert content["metrics"]["num-examples"] == 1, "a count is a claim"
        assert list(content["arrays"]) == list(START)


@pytest.mark.parametrize(("fails", "why"), [
    (lambda *_: 1 / 0, "failed: ZeroDivisionError"),
    (lambda *_: (record({**START, "a": START["a"] * np.nan}), None), "is no model"),
    (lambda *_: (record({"a": START["a"]}), None), "is no model"),
    (lambda *_: (None, None), "did not aggregate"),
])  # fmt: skip
def test_a_strategy_that_fails_leaves_the_model_and_the_run_alone(
    fails: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "disabled", True)  # says it, with the traceback
    monkeypatch.setattr(SignMean, "aggregate_train", fails)
    strategy = wrapped(SignMean())
    result = screened(strategy, clients(), rounds=2)
    assert not result.arrays
    assert strategy.outcome is not None
    assert strategy.outcome.result == "skipped"
    assert why in strategy.outcome.why
    assert strategy.outcome.model_before == strategy.outcome.model_after == tensors_sha256(START)


# --- what clients claim ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "believed"), [(1, 1), (50, 50), (MANY, 1000)])
def test_a_claimed_count_is_capped(most: int, believed: int) -> None:
    given = {node: client(node, 1000 if node == 13 else 1) for node in NODES}
    as_if = {node: client(node, believed if node == 13 else 1) for node in NODES}
    assert_same(
        screened(wrapped(flower.FedAvg(), max_examples=most), given).arrays, stock(flower.FedAvg(), as_if).arrays
    )


def test_the_metric_that_weighs_has_the_strategys_name() -> None:
    def renamed(message: Message) -> Message:
        metrics = dict(message.content["metrics"])
        message.content["metrics"] = MetricRecord({"tokens": metrics.pop("num-examples"), **metrics})
        return message

    nodes = {node: client(node, node, renamed) for node in NODES}
    inner = flower.FedAvg(weighted_by_key="tokens")
    assert_same(
        screened(wrapped(inner, max_examples=MANY), nodes).arrays,
        stock(flower.FedAvg(weighted_by_key="tokens"), nodes).arrays,
    )


def test_a_metric_the_strategy_acts_upon_is_clipped_and_owed() -> None:
    def claiming(loss: float | None) -> Any:
        def change(message: Message) -> Message:
            if message.metadata.message_type == "train":
                message.content["metrics"] = MetricRecord(
                    {"num-examples": 1} | ({} if loss is None else {"train_loss": loss})
                )
            return message

        return change

    def run(loss: float | None) -> tuple[ArrayRecord, Screened]:
        strategy = wrapped(STRATEGIES["QFedAvg"]())
        return screened(strategy, clients() | {13: client(13, 1, claiming(loss))}).arrays, strategy

    assert_same(run(1e30)[0], run(10.0)[0])
    assert_same(run(-3.0)[0], run(0.1)[0])
    found, strategy = run(None)
    assert_same(found, stock(STRATEGIES["QFedAvg"](), clients(13)).arrays)
    assert refusals(strategy) == {"13": Reason.CLAIM_MISSING}


# --- rounds ---------------------------------------------------------------------------------------------------------


def test_screens_keep_their_state_and_take_it_up_again() -> None:
    strategy = wrapped(flower.FedAvg())
    screened(strategy, clients(), rounds=3)
    assert strategy.states["weights"] == {"rounds": 3}
    again = wrapped(flower.FedAvg(), states=json.loads(json.dumps(strategy.states)))
    screened(again, clients())
    assert again.states["weights"] == {"rounds": 4}


def test_monitored_screens_do_not_act() -> None:
    strategy = wrapped(flower.FedAvg(), {13: 0.0}, monitor=["weights"])
    assert_same(screened(strategy, clients()).arrays, stock(flower.FedAvg(), clients()).arrays)
    assert strategy.outcome is not None
    assert [
        v.weight for v in strategy.outcome.screened.verdicts if v.screen == "weights" and v.participant == "13"
    ] == [0.0]


def test_the_order_of_arrival_changes_not_a_bit() -> None:
    made = []
    for order in (NODES, reversed(NODES)):
        strategy = wrapped(flower.FedAvg(), {13: 0.5})
        messages = list(strategy.configure_train(1, record(), ConfigRecord(), InProcessGrid(clients())))
        grid = InProcessGrid(clients())
        replies = list(grid.send_and_receive(messages, timeout=1))
        by_node = {reply.metadata.src_node_id: reply for reply in replies}
        arrays, _ = strategy.aggregate_train(1, [by_node[node] for node in order])
        assert arrays is not None
        made.append(flatten(numbers(arrays)).tobytes())
    assert made[0] == made[1]


def test_without_a_guard_a_name_used_twice_is_nobodys() -> None:
    strategy = wrapped(flower.FedAvg())
    grid = InProcessGrid(clients())
    replies = grid.send_and_receive(strategy.configure_train(1, record(), ConfigRecord(), grid), timeout=1)
    for reply in replies:
        if reply.metadata.src_node_id == 17:
            reply.metadata.__dict__["_src_node_id"] = 13
        elif reply.metadata.src_node_id == 18:
            reply.metadata.__dict__["_src_node_id"] = 666
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert_same(arrays, stock(flower.FedAvg(), clients(13, 17, 18)).arrays)
    assert refusals(strategy) == {"13": Reason.WRONG_PARTICIPANT, "17": Reason.MISSING, "18": Reason.MISSING}


def test_a_bare_grid_is_guarded() -> None:
    def forged(message: Message) -> Message:
        message.metadata.__dict__["_src_node_id"] = 11
        return message

    strategy = wrapped(flower.FedAvg())
    strategy.start(InProcessGrid(clients() | {13: client(13, 1, forged)}), record(), num_rounds=1, timeout=5)
    assert refusals(strategy) == {"13": Reason.WRONG_PARTICIPANT}


class Length:
    """A model whose loss is the length of its adapter: `row_nll` is all that a canary asks of a `Compute`."""

    def row_nll(self, adapters: Any, rows: Any, settings: Any, tick: Any = None) -> list[np.ndarray]:
        return [np.full(len(rows), float(np.linalg.norm(flatten(adapter)))) for adapter in adapters]


def gate() -> Gate:
    """Lets the model move as honest clients move it, and no further."""
    rows, local = [Example("Do harm", "No.")], LocalSettings(steps=1, batch_size=1, max_length=8, lr=1.0)
    measure = Measure(Length(), rows, rows, local)  # type: ignore[arg-type]
    return Gate(measure, CanaryLimits(refusal_step=5, refusal_anchor=5, safe_step=5, safe_anchor=5))


class Unfit(flower.FedAvg):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = Lock()


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedMedian", "DPServerFixed"])
def test_a_round_whose_aggregate_fails_the_gate_never_was(name: str, tmp_path: Path) -> None:
    """All clients leap in round 2 of 3: the end is that of the two other rounds, momentum and all.

    Of the adaptive ones a leap makes a step like any other, and no gate has anything to refuse.
    """

    def leaping(node: int) -> Node:
        honest = client(node, 1)

        def reply(message: Message) -> Message:
            made = honest(message)
            assert isinstance(made, Message)
            if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2:
                moved = {n: a.numpy() + 100 * START[n] for n, a in made.content["arrays"].items()}
                made.content["arrays"] = record(moved)
            return made

        return reply

    made = STRATEGIES[name]()
    if name == "DPServerFixed":  # clips the leap away: the wrapper's own model is what must not move
        made.clipping_norm = 1e6  # type: ignore[attr-defined]
    strategy = wrapped(made, gate=gate(), ledger=tmp_path)
    found = screened(strategy, {node: leaping(node) for node in NODES}, rounds=3)
    plain = STRATEGIES[name]()
    if name == "DPServerFixed":
        plain.clipping_norm = 1e6  # type: ignore[attr-defined]
    assert_same(found.arrays, stock(plain, clients(examples=1), rounds=2).arrays)
    bodies = [json.loads(line)["body"] for line in (tmp_path / LEDGER).read_text().splitlines()]
    assert [body["outcome"] for body in bodies[1:]] == ["applied", "rolled_back", "applied"]
    assert bodies[2]["model_after"] == bodies[2]["model_before"]
    assert not bodies[2]["gate"]["passed"]
    assert "refusals cost" in bodies[2]["why"]


def test_what_a_strategy_remembers_stays_where_it_cannot_be_copied() -> None:
    strategy = wrapped(Unfit(), gate=gate())
    screened(strategy, {n: client(n, 1, far) for n in NODES})
    assert strategy.outcome is not None
    assert strategy.outcome.model_after == tensors_sha256(START)
    assert strategy.outcome.why.endswith("what Unfit remembers of the round stays")


def far(message: Message) -> Message:
    if message.metadata.message_type == "train":
        message.content["arrays"] = ArrayRecord({n: Array(50 * value) for n, value in START.items()})
    return message


def test_nobody_admitted_leaves_the_model_alone() -> None:
    strategy = wrapped(flower.FedAdam(), dict.fromkeys(NODES, 0.0))
    assert not screened(strategy, clients(), rounds=2).arrays
    assert strategy.outcome is not None
    assert strategy.outcome.why == "no contribution was admitted"
    assert strategy.strategy.m_t is None, "nor does the strategy remember anything of it"  # type: ignore[attr-defined]


def test_a_round_without_training() -> None:
    result = screened(wrapped(flower.FedAvg(fraction_train=0.0)), clients())
    assert not result.arrays
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(0.65)


def test_models_in_half_precision_come_back_in_it() -> None:
    halves = {name: value.astype(np.float16) for name, value in START.items()}

    def half(message: Message) -> Message:
        if message.metadata.message_type == "train":
            arrays = message.content["arrays"]
            message.content["arrays"] = ArrayRecord({n: Array(a.numpy().astype(np.float16)) for n, a in arrays.items()})
        return message

    strategy = Screened(flower.FedAdam(), [Structure(), Norm(None), Duplicate()])
    nodes = {node: client(node, 1, half) for node in NODES}
    result = strategy.start(GuardedGrid(InProcessGrid(nodes), poll=0.01), record(halves), num_rounds=2, timeout=5)
    assert {array.dtype for array in result.arrays.values()} == {"float16"}


def test_the_ledger_has_every_round(tmp_path: Path) -> None:
    strategy = wrapped(flower.FedMedian(), {13: 0.0, 14: 0.5}, ledger=tmp_path)
    grid = GuardedGrid(InProcessGrid(clients() | {15: lambda message: None}), poll=0.01)
    result = strategy.start(grid, record(), num_rounds=2, timeout=0.05)
    assert verify(tmp_path / LEDGER).ok
    entries = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines()]
    assert [entry["kind"] for entry in entries] == ["start", "round", "round"]
    assert entries[0]["body"]["model"] == entries[1]["body"]["model_before"] == tensors_sha256(START)
    assert entries[2]["body"]["model_after"] == tensors_sha256(numbers(result.arrays))
    rows = {row["participant"]: row for row in entries[1]["body"]["contributions"]}
    assert len(rows) == len(NODES)
    assert (rows["13"]["weight"], rows["13"]["screen"], rows["14"]["weight"]) == (0.0, "weights", 0.5)
    assert (rows["15"]["weight"], rows["15"]["screen"], rows["15"]["reason"]) == (0.0, "wire", "missing")
    with pytest.raises(ConfigError, match="already holds a run"):
        wrapped(flower.FedAvg(), ledger=tmp_path)


@pytest.mark.parametrize(("name", "said"), [
    ("FedAvg", "weights act as num-examples"), ("FedMedian", "weights act by Assay's rule"), ("QFedAvg", "weights act by drawing"),
])  # fmt: skip
def test_the_summary_says_how_weights_act(name: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "flwr"):
            wrapped(STRATEGIES[name](), monitor=["weights"]).summary()
    finally:
        logger.removeHandler(caplog.handler)
    assert said in caplog.text
    assert "structure, weights (monitor)" in caplog.text
    assert "Weighted by" in caplog.text, "and then what the strategy says itself"


def test_everything_else_is_the_strategys() -> None:
    strategy = wrapped(flower.FedTrimmedAvg(beta=0.3, fraction_train=0.5))
    assert (strategy.beta, strategy.fraction_train) == (0.3, 0.5)
    with pytest.raises(AttributeError):
        _ = strategy.no_such_thing


# --- the operator's mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Screened(flower.FedXgbBagging(), []), "collects trees"),
    (lambda: Screened(flower.FedXgbCyclic(), []), "collects trees"),
    (lambda: Screened(OwnLoop(), []), r"start\(\) of its own"),
    (lambda: Screened(flower.QFedAvg(0.1), []), r"claims=\{'train_loss'"),
    (lambda: Screened(flower.QFedAvg(0.1), [], claims={"train_loss": (1.0, 0.5)}), "two finite numbers in order"),
    (lambda: Screened(flower.FedAvg(), [Structure(), Structure()]), "named twice"),
    (lambda: Screened(flower.FedAvg(), [Norm(None, acts="length")]), "norm wants rows cut to length"),
    (lambda: Screened(flower.FedAvg(), [Structure()], monitor=["norm"]), "no screen 'norm'"),
    (lambda: Screened(flower.FedAvg(), [], max_examples=0), "max_examples"),
    (lambda: wrapped(flower.FedAvg()).aggregate_train(1, []), "without configure_train"),
    (lambda: wrapped(flower.FedAvg()).aggregate_evaluate(1, []), "without configure_evaluate"),
    (lambda: configured(record({})), "are empty"),
    (lambda: configured(record({"a": np.zeros(3, np.int64)})), "'a' is int64"),
    (lambda: configured(ArrayRecord({"a": Array("float32", (3,), "pickle", b"")})), "pickle"),
    (lambda: configured(record({"a": np.full(3, np.nan, np.float32)})), "cannot be read"),
])  # fmt: skip
def test_mistakes_of_the_operator_raise_at_once(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def configured(arrays: ArrayRecord) -> list[Message]:
    return list(wrapped(flower.FedAvg()).configure_train(1, arrays, ConfigRecord(), InProcessGrid(clients())))


def test_without_flower_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr.serverapp", None)
    monkeypatch.delitem(sys.modules, "assay.engines.flower")
    with pytest.raises(ConfigError, match=r"pip install 'assay\[flower\]'"):
        importlib.import_module("assay.engines.flower")


@pytest.mark.parametrize(("content", "message"), [
    ({"arrays": record(), "controls": record()}, "2 array records"),
    ({"arrays": record({"a": START["a"]})}, "another form"),
    ({}, "0 array records"),
])  # fmt: skip
def test_messages_that_cannot_be_compared_with_replies(content: dict[str, Any], message: str) -> None:
    class Odd(flower.FedAvg):
        def configure_train(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
            return [Message(RecordDict(content), 11, "train")]

    with pytest.raises(ConfigError, match=message):
        wrapped(Odd()).configure_train(1, record(), ConfigRecord(), InProcessGrid(clients()))
