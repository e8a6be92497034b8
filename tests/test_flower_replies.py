"""Reading what Flower clients send: the corpus of hostile replies, and fuzzing of records and of their bytes."""

from __future__ import annotations

import json
import logging
import math
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from assay.bench import flower_corpus
from assay.bench.flower_grid import InProcessGrid, Objects, objects_of
from assay.bench.flower_hostile import CORPUS
from assay.bench.flower_replies import Hostile
from assay.contribution import LoraUpdate, Refusal, tensors_sha256
from assay.engines.flower import GuardedGrid, Limits
from assay.engines.flower.arrays import decode_arrays, encode_arrays, form_of
from assay.engines.flower.replies import Protocol, Reply, read_evaluation, read_training
from assay.verdict import Reason
from flower_nodes import START, client, record
from mutations import mutated, wild

logging.getLogger("flwr").setLevel(logging.CRITICAL)
FORM, _ = form_of(record())
RESULTS = Path(__file__).parents[1] / "results" / "flower-corpus.json"


# --- the corpus -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baseline() -> Result:
    return flower_corpus.honest_alone()


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_assay_survives_with_the_right_reason(case: Hostile, baseline: Result) -> None:
    seen = flower_corpus.run_assay(case, baseline)
    assert (seen.outcome, seen.error, seen.reason) == ("survived", "", case.reason)


@pytest.mark.parametrize(("name", "outcome"), [
    ("dtype-double", "survived"), ("value-nan", "poisoned"), ("count-large", "poisoned"), ("evaluation-large", "poisoned"),
    ("name-missing", "crashed"), ("message-garbage", "crashed"), ("shape-bomb", "crashed"),
])  # fmt: skip
def test_what_stock_fedavg_makes_of_it_is_measured(name: str, outcome: str, baseline: Result) -> None:
    case = next(case for case in CORPUS if case.name == name)
    assert flower_corpus.run_stock(case, baseline).outcome == outcome


def test_the_corpus_has_no_name_twice_and_the_table_is_of_it() -> None:
    names = [case.name for case in CORPUS]
    assert len(set(names)) == len(names) >= 60
    rows = json.loads(RESULTS.read_text())["rows"]
    assert [(r["name"], r["what"], r["expected"]) for r in rows] == [(c.name, c.what, c.reason) for c in CORPUS]
    assert {(r["assay"], r["reason"] == r["expected"]) for r in rows} == {("survived", True)}
    assert {r["stock"] for r in rows} == {"crashed", "poisoned", "survived"}


def test_the_command_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    some = [case for case in CORPUS if case.name in ("value-nan", "error")]
    wrong = Hostile("wrong", "an honest update", lambda message: flower_corpus.honest(message, 3), "norm")
    monkeypatch.setattr(flower_corpus, "measure", lambda measure=flower_corpus.measure: measure([*some, wrong]))
    assert flower_corpus.main(["--results", str(tmp_path / "x.json")]) == 1
    found = json.loads((tmp_path / "x.json").read_text())
    assert [(r["name"], r["stock"], r["assay"], r["reason"]) for r in found["rows"]] == [
        ("value-nan", "poisoned", "survived", "not_finite"),
        ("error", "survived", "survived", "missing"),
        ("wrong", "survived", "survived", "ok"),
    ]
    assert "3 replies, 1 not as expected" in capsys.readouterr().out


# --- the codec ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_survive_the_way_there_and_back(dtype: type) -> None:
    sent = record({name: value.astype(dtype) for name, value in START.items()})
    form, tensors = form_of(sent)
    again = encode_arrays(tensors, form)
    assert list(again) == list(sent)
    assert {n: a.data for n, a in again.items()} == {n: a.data for n, a in sent.items()}
    assert tensors_sha256(decode_arrays(again, form, max_abs_value=1e4)) == tensors_sha256(tensors)
    with pytest.raises(ValueError, match="read-only"):
        tensors["a"][0] = 1


def test_a_transposed_view_is_written_in_its_own_order() -> None:
    value = np.arange(12, dtype=np.float32).reshape(4, 3).T
    sent = ArrayRecord({"a": Array(value)})
    form, tensors = form_of(sent)
    np.testing.assert_array_equal(tensors["a"], value)
    np.testing.assert_array_equal(encode_arrays(tensors, form)["a"].numpy(), value)


def test_a_scalar_is_an_array() -> None:
    form, tensors = form_of(ArrayRecord({"a": Array(np.array(2.0, np.float32))}))
    assert form.shapes == {"a": ()}
    assert encode_arrays(tensors, form)["a"].numpy() == 2


InProcessGrid({})  # Flower wants to know who it is before it makes messages
ASKED = Message(RecordDict({"arrays": record()}), 11, "train")
ASKED.metadata.__dict__["_message_id"] = "0" * 64


def asked(content: RecordDict) -> Message:
    """A reply to a training message."""
    return Message(content, reply_to=ASKED)


@pytest.mark.parametrize(("limits", "value", "reason"), [
    ({"max_abs_value": 5.0}, 5.0, None), ({"max_abs_value": 5.0}, -5.001, Reason.OUT_OF_RANGE),
    ({"max_metrics": 3}, 0.0, None), ({"max_metrics": 2}, 0.0, Reason.TOO_LARGE),
    ({"max_other_bytes": 10}, 0.0, Reason.TOO_LARGE),
])  # fmt: skip
def test_limits_are_the_operators(limits: dict[str, Any], value: float, reason: Reason | None) -> None:
    reply = client(11)(ASKED)
    assert isinstance(reply, Message)
    reply.content["arrays"] = record({name: np.full_like(a, value) for name, a in START.items()})
    # the form leaves room for float64 and long headers, which this reply does not need
    extra = FORM.max_bytes if "max_other_bytes" in limits else 0
    if extra:
        reply.content["more"] = ConfigRecord({"x": bytes(extra)})
    read = read_training(reply, 11, 1, FORM, Protocol(limits=Limits(**limits)))
    assert (read.reason if isinstance(read, Refusal) else None) == reason


@pytest.mark.parametrize("limits", [{"max_abs_value": 0}, {"max_abs_value": math.nan}, {"max_list": 0}])
def test_limits_must_make_sense(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"limits|max_abs_value"):
        Limits(**limits)


def test_a_refusal_names_the_bytes_it_speaks_of() -> None:
    def refusal(value: float) -> Refusal:
        bad = {**START, "a": np.full(7, value, np.float32)}
        read = read_training(
            asked(RecordDict({"x": record(bad), "m": MetricRecord({"num-examples": 1})})), 11, 1, FORM, Protocol()
        )
        assert isinstance(read, Refusal)
        return read

    assert refusal(math.nan) == refusal(math.nan)
    assert refusal(math.nan).sha256 != refusal(math.inf).sha256


# --- fuzzing --------------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "arrays", "metrics", "num-examples", "train_loss", "", "\ud800", "x" * 300)
PIECES = (b"'descr'", b"'<f4'", b"(3, 4)", b"False", b"}", b" ", b"\n", b"True", b"'>f8'", b"(", b"9" * 99)
GOOD = {name: array.data for name, array in record().items()}


def odd(rng: random.Random) -> Any:
    """Anything that may stand in a field of a record in memory."""
    extra = (b"", rng.randbytes(40), (-1, 2), (3, 2**40), 10**6000, (), ((),), range(3))
    return rng.choice(extra) if rng.random() < 0.3 else wild(rng)


def array(name: str, rng: random.Random) -> Array:
    made = Array(
        "float32", tuple(START[name].shape), "numpy.ndarray", mutated(GOOD[name], rng, PIECES, rng.choice((0, 0, 4)))
    )
    if rng.random() < 0.2:
        setattr(made, rng.choice(("dtype", "shape", "stype", "data")), odd(rng))
    return made


def content(rng: random.Random) -> RecordDict:
    """Mostly a good reply; any part of it may be anything a record in memory can be made to hold."""
    arrays, metrics = ArrayRecord(), MetricRecord({"num-examples": 3})
    for name in rng.choice((["b", "a"], ["b", "a"], ["b", "a"], ["a"], [])):
        arrays[name] = array(name, rng)
    for name in rng.choices(NAMES, k=rng.choice((0, 0, 1, 2))):
        metrics.__dict__["_data"][name] = odd(rng)
    made = RecordDict({"arrays": arrays, "metrics": metrics})
    if rng.random() < 0.3:
        more = (ArrayRecord(), MetricRecord(), ConfigRecord({"x": b"y"}), arrays, metrics)
        made[rng.choice(NAMES)] = rng.choice(more)
    return made


def holds(made: RecordDict) -> bool:
    """A reply is what it should be (True), or a refusal that says why not; nothing raises, nothing is unforeseen."""
    read = read_training(asked(made), 11, 1, FORM, Protocol(ranges={"train_loss": (0.1, 9.0)} if len(made) > 2 else {}))
    for one in (read, read_evaluation(asked(made), 11, Protocol())):
        if isinstance(one, Refusal):
            assert one.reason in list(Reason)
            assert "internal error" not in one.sentence
            assert len(one.sentence) < 1000
            json.dumps([one.sentence, one.sha256])
        else:
            assert isinstance(one, Reply)
            assert 0 < one.count <= 1e9
            numbers = [x for v in one.metrics.values() for x in (v if isinstance(v, list) else [v])]
            assert all(math.isfinite(x) for x in numbers)
    if isinstance(read, Reply):
        assert isinstance(read.update, LoraUpdate)
        assert {n: v.shape for n, v in read.update.tensors.items()} == dict(FORM.shapes)
        assert all(v.dtype == np.float32 and np.abs(v).max() <= 1e4 for v in read.update.tensors.values())
    return isinstance(read, Reply)


def fuzzed(rng: random.Random) -> bool:
    return holds(content(rng))


def fuzzed_bytes(rng: random.Random) -> bool:
    """The objects of a reply, changed as bytes and put together by Flower: a message or an error of that node."""

    def node(message: Message) -> Objects:
        reply = client(11)(message)
        assert isinstance(reply, Message)
        reply.metadata.__dict__.update(_created_at=1.0, _ttl=1.0)  # a hypothesis must be the same twice
        made = objects_of(reply, message.metadata.message_id)
        id = rng.choice(sorted(made.contents))
        return Objects({**made.contents, id: mutated(made.contents[id], rng, PIECES)}, made.root, made.answers)

    [reply] = GuardedGrid(InProcessGrid({11: node})).send_and_receive([ASKED], timeout=1)
    assert reply.metadata.src_node_id == 11
    return reply.has_content() and holds(reply.content)


def fuzz(check: Callable[[random.Random], bool], examples: int, each: int) -> None:
    """`examples` seeds of Hypothesis, `each` replies a seed; a tenth of the seeds in counted memory, which is slow."""
    good = 0

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**60))
    def run(seed: int) -> None:
        nonlocal good
        counted, peak = seed % 10 == 0, 0
        if counted:
            tracemalloc.start()
        try:
            for more in range(each):
                good += check(random.Random(seed * each + more))
            peak = tracemalloc.get_traced_memory()[1] if counted else 0
        finally:
            tracemalloc.stop()
        assert peak < 16 << 20, "a reply of a few kilobytes needs no megabytes"

    run()
    assert examples * each / 50 < good < examples * each


@pytest.mark.parametrize("check", [fuzzed, fuzzed_bytes])
def test_whatever_is_sent_is_read_or_refused(check: Callable[[random.Random], bool]) -> None:
    fuzz(check, 15, 10)


@pytest.mark.slow
@pytest.mark.parametrize("check", [fuzzed, fuzzed_bytes])
def test_100_000_inputs_are_read_or_refused(check: Callable[[random.Random], bool]) -> None:
    fuzz(check, 2_000, 25)
