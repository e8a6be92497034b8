"""Requests and answers of a swarm as Flower's records, both ways. Whatever comes in is checked field by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from assay.engines.relay import Answer, Request
from assay.verdict import Reason
from assay.wire import WireError
from assay.wire.envelope import malformed, show

ASKED, POOLS, ANSWER = "assay.asked", "assay.pools", "assay.answer"
STATUSES = ("ok", "behind", "refused", "done")
MAX_TEXT = 500
ANSWER_TYPES: Mapping[str, type] = {
    "status": str, "learnt": int, "head": str, "model": str, "message": bytes, "reason": str, "sentence": str,
}  # fmt: skip


def request_content(request: Request) -> RecordDict:
    """What a node is sent."""
    pools = ConfigRecord({str(index): pool for index, pool in request.pools.items()})
    return RecordDict({ASKED: ConfigRecord({"round": request.round, "plan": request.plan}), POOLS: pools})


def read_request(content: RecordDict) -> Request:
    """What a relay asks. WireError for what is no request."""
    asked, pools = _record(content, ASKED), _record(content, POOLS)
    round, plan = asked.get("round"), asked.get("plan")
    if type(round) is not int or type(plan) is not bytes:
        raise malformed(f"a request needs a round and a plan, got {show(round)} and {show(plan)}")
    read = {}
    for name, pool in pools.items():
        if not (isinstance(name, str) and name.isascii() and name.isdecimal() and len(name) < 10):
            raise malformed(f"a pool is called {show(name)}, expected the number of its round")
        if type(pool) is not bytes:
            raise malformed(f"pool {name} is {show(pool)}, expected bytes")
        read[int(name)] = pool
    return Request(round=round, plan=plan, pools=read)


def answer_content(answer: Answer) -> RecordDict:
    """What a node replies."""
    return RecordDict({ANSWER: ConfigRecord({name: getattr(answer, name) for name in ANSWER_TYPES})})


def read_answer(content: RecordDict, max_message: int) -> Answer:
    """What a node says. WireError for what is no answer; everything but `message` is a claim nothing rests on."""
    record = _record(content, ANSWER)
    for name, kind in ANSWER_TYPES.items():
        if type(record.get(name)) is not kind:
            raise malformed(f"an answer's {name} is {show(record.get(name))}, expected {kind.__name__}")
    found: dict[str, Any] = {name: record[name] for name in ANSWER_TYPES}
    if found["status"] not in STATUSES:
        raise malformed(f"an answer's status is {show(found['status'])}, expected one of {', '.join(STATUSES)}")
    if len(found["message"]) > max_message:
        raise WireError(Reason.TOO_LARGE, f"message has {len(found['message'])} bytes, limit {max_message}")
    for name in ("head", "model", "reason", "sentence"):
        found[name] = found[name][:MAX_TEXT]
    return Answer(**found)


def _record(content: RecordDict, name: str) -> ConfigRecord:
    record = content.get(name)
    if not isinstance(record, ConfigRecord):
        raise malformed(f"record {name} is missing")
    return record
