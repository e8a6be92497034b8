"""A guarded grid on real Flower objects: whose reply is whose, what is let through, how long anybody is waited for."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg

from assay.bench.flower_grid import InProcessGrid, objects_of
from assay.bench.flower_replies import inflated
from assay.bench.flower_replies import start as model
from assay.config import ConfigError
from assay.engines.flower import GuardedGrid
from assay.engines.flower.replies import GuardError
from assay.verdict import Reason
from flower_nodes import NODES, client, clients, record

logging.getLogger("flwr").setLevel(logging.CRITICAL)


def sent(nodes: Iterable[int] = NODES, arrays: ArrayRecord | None = None) -> list[Message]:
    return [Message(RecordDict({"arrays": arrays or record()}), node, "train", group_id="7") for node in nodes]


def asked(nodes: dict[int, Any], **options: Any) -> tuple[dict[int, Message], GuardedGrid]:
    """Everybody's reply by its true source."""
    grid = GuardedGrid(InProcessGrid(clients() | nodes), **{"poll": 0.01, **options})
    replies = grid.send_and_receive(sent(), timeout=0.05)
    found = {reply.metadata.src_node_id: reply for reply in replies}
    assert len(found) == len(replies)
    return found, grid


def refused(found: dict[int, Message]) -> dict[int, Reason]:
    return {
        node: reply.error.refused for node, reply in found.items()
        if reply.has_error() and isinstance(reply.error, GuardError)
    }  # fmt: skip


def lying(**metadata: Any) -> Callable[[Message], Any]:
    def node(message: Message) -> Any:
        reply = client(13)(message)
        assert isinstance(reply, Message)
        for name, value in metadata.items():
            reply.metadata.__dict__[f"_{name}"] = value
        return objects_of(reply, message.metadata.message_id)

    return node


def test_honest_replies_pass_unchanged() -> None:
    found, grid = asked({})
    assert set(found) == set(NODES)
    bare = InProcessGrid(clients())
    for reply in bare.send_and_receive(sent(), timeout=1):
        assert reply.content == found[reply.metadata.src_node_id].content
    assert not grid.refused
    assert grid.timed_out == 0


@pytest.mark.parametrize("lie", [
    {"src_node_id": 11}, {"src_node_id": 666}, {"src_node_id": 1}, {"reply_to_message_id": "0" * 64},
    {"reply_to_message_id": ""},
])  # fmt: skip
def test_a_forged_source_is_the_forgers_own_refusal(lie: dict[str, Any]) -> None:
    found, grid = asked({13: lying(**lie)})
    assert set(found) == set(NODES), "the victim's own reply is there"
    assert refused(found) == {13: Reason.WRONG_PARTICIPANT}
    assert grid.refused == {Reason.WRONG_PARTICIPANT: 1}


def test_what_a_reply_says_of_itself_is_replaced_by_what_was_asked() -> None:
    lie = {"message_type": "evaluate", "run_id": 99, "group_id": "x", "dst_node_id": 5, "ttl": -1.0, "created_at": -1e9}
    found, _ = asked({13: lying(**lie)})
    meta, like = found[13].metadata, found[11].metadata
    assert found[13].has_content()
    for name in ("message_type", "run_id", "group_id", "dst_node_id", "ttl"):
        assert getattr(meta, name) == getattr(like, name)
    assert meta.created_at > 0


def test_two_replies_to_one_message_are_nobodys() -> None:
    found, _ = asked({13: lambda m: [client(13)(m), client(14)(m)]})
    assert refused(found) == {13: Reason.WRONG_PARTICIPANT}


def test_messages_nobody_asked_for_are_dropped_and_counted() -> None:
    found, grid = asked({13: lambda m: [client(13)(m), lying(reply_to_message_id="")(m)]})
    assert set(found) == set(NODES)
    assert not refused(found)
    assert grid.refused == {Reason.WRONG_PARTICIPANT: 1}


def test_undecodable_bytes_cost_nobody_else_his_reply() -> None:
    def broken(message: Message) -> Any:
        made = objects_of(client(13)(message), message.metadata.message_id)  # type: ignore[arg-type]
        return type(made)({made.root: b"Message  3\x00\xff\xff\xff"}, made.root, made.answers)

    with pytest.raises(Exception, match="parsing"):
        InProcessGrid(clients() | {13: broken}).send_and_receive(sent(), timeout=1)
    found, _ = asked({13: broken})
    assert set(found) == set(NODES)
    assert refused(found) == {13: Reason.MALFORMED}


def test_errors_belong_to_the_node_that_was_asked() -> None:
    def on_the_way(message: Message) -> Message:
        reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone " * 10_000), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 1
        return reply

    found, grid = asked({13: on_the_way})
    assert found[13].error.code == ErrorCode.NODE_UNAVAILABLE
    assert len(found[13].error.reason or "") < 600
    assert not isinstance(found[13].error, GuardError)
    assert not grid.refused, "an error is no attack"


@pytest.mark.parametrize(("limit", "passes"), [(None, True), (100_000, True), (400, False)])
def test_a_reply_is_bounded_by_what_was_sent(limit: int | None, passes: bool) -> None:
    found, _ = asked({}, max_reply_bytes=limit)
    assert all(reply.has_content() for reply in found.values()) == passes
    assert set(refused(found).values()) == (set() if passes else {Reason.TOO_LARGE})


def test_a_reply_may_hold_twice_what_was_sent_and_a_mebibyte() -> None:
    def padded(by: int) -> Callable[[Message], Any]:
        def node(message: Message) -> Message:
            metrics = MetricRecord({"x" * by: 1})
            return Message(RecordDict({"metrics": metrics}), reply_to=message)

        return node

    found, _ = asked({13: padded(1 << 20), 14: padded((1 << 20) + 10_000)})
    assert refused(found) == {14: Reason.TOO_LARGE}


def test_arrays_are_not_put_together_beyond_the_limit() -> None:
    """2 GB of one chunk of 1 MB: refused before it is made."""
    arrays = ArrayRecord({name: Array(value) for name, value in model().items()})
    grid = GuardedGrid(InProcessGrid({13: inflated(2_000, 1 << 20)}), poll=0.01)
    tracemalloc.start()
    try:
        [reply] = grid.send_and_receive(sent([13], arrays), timeout=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(reply.error, GuardError)
    assert reply.error.refused is Reason.TOO_LARGE
    assert peak < 50 << 20


def test_the_bound_holds_only_where_a_guard_pulls() -> None:
    asked({})
    found = InProcessGrid({13: lambda m: Message(RecordDict({"a": record()}), reply_to=m)}).send_and_receive(sent([13]))
    assert found[0].content["a"] == record()


def test_late_nodes_are_reported_and_their_replies_never_taken() -> None:
    answers: list[Message] = []
    inner = InProcessGrid(clients() | {13: lambda m: answers.append(m)})
    grid = GuardedGrid(inner, poll=0.01)
    replies = grid.send_and_receive(sent(), timeout=0.03)
    assert len(replies) == len(NODES) - 1
    [late] = grid.late
    assert (late.node, late.message_type, late.group, grid.timed_out) == (13, "train", "7", 1)
    [message] = answers
    id = message.metadata.message_id
    inner.held[id] = [objects_of(client(13)(message), id)]  # type: ignore[arg-type]
    assert grid.pull_messages([id]) == []
    grid.send_and_receive(sent([11]), timeout=1)
    assert grid.late == ()


def test_none_is_not_for_ever() -> None:
    grid = GuardedGrid(InProcessGrid({13: lambda m: None}), poll=0.005, timeout=0.02)
    assert grid.send_and_receive(sent([13]), timeout=None) == []
    assert [late.node for late in grid.late] == [13]


def test_a_broken_connection_is_nobodys_fault() -> None:
    class Flaky(InProcessGrid):
        failures = 12

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            if self.failures:
                self.failures -= 1
                raise httpx.ConnectError("no route") if self.failures % 2 else ConnectionResetError()
            return super().pull_messages(message_ids)

    grid = GuardedGrid(Flaky(clients()), poll=0.001)
    assert len(grid.send_and_receive(sent(), timeout=5)) == len(NODES)
    assert not grid.refused


def test_a_reply_is_given_out_once() -> None:
    grid = GuardedGrid(InProcessGrid(clients()))
    ids = grid.push_messages(sent())
    assert len(grid.pull_messages([*ids, *ids])) == len(NODES)
    assert grid.pull_messages(ids) == []
    assert grid.pull_messages(["never pushed"]) == []


def test_messages_that_could_not_be_pushed_are_not_waited_for() -> None:
    class Full(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            return [id if i % 2 else "" for i, id in enumerate(super().push_messages(messages))]

    class Silent(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            return super().push_messages(messages)[1:]

    replies = GuardedGrid(Full(clients())).send_and_receive(sent(), timeout=5)
    assert {reply.metadata.src_node_id for reply in replies} == {12, 14, 16, 18}
    replies = GuardedGrid(Silent(clients())).send_and_receive(sent(), timeout=5)
    assert {reply.metadata.src_node_id for reply in replies} == set(NODES) - {11}


def test_nothing_is_kept_of_rounds_that_are_over() -> None:
    grid = GuardedGrid(InProcessGrid(clients() | {13: lambda m: None}), poll=0.001)
    for _ in range(3):
        grid.send_and_receive(sent(), timeout=0.002)
    assert not grid._waiting
    assert grid.send_and_receive([]) == []


def test_the_rest_is_the_grids_own() -> None:
    inner = InProcessGrid(clients())
    grid = GuardedGrid(inner)
    assert list(grid.get_node_ids()) == list(NODES)
    assert [node.node_id for node in grid.get_nodes()] == list(NODES)
    assert grid.create_message(RecordDict(), "train", 11, "1").metadata.dst_node_id == 11
    assert grid.held is inner.held
    with pytest.raises(AttributeError):
        _ = grid.no_such_thing


def test_a_stock_strategy_is_helped_too() -> None:
    found = FedAvg(min_train_nodes=9).start(
        GuardedGrid(InProcessGrid(clients() | {13: lying(src_node_id=11)}), poll=0.01),
        record(),
        num_rounds=1,
        timeout=5,
    )
    assert set(found.arrays) == {"a", "b"}


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": float("nan")}, {"poll": -1}, {"max_reply_bytes": 0}])
def test_mistakes_of_the_operator(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GuardedGrid(InProcessGrid({}), **options)
