"""The corpus of hostile replies to a Flower server: a name, what it is, how it is made, the reason Assay must give.

From reading Flower 1.41's sources (records, inflatable objects, strategies, HttpGrid) and numpy's reader. `ok` is the
reason where there is nothing to refuse: the lie is not believed, or the oddity is no lie. What stock FedAvg makes of
each is measured (`flower_corpus`), not written down here.
"""

from __future__ import annotations

import math

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord

from assay.bench.flower_replies import (
    Hostile,
    arrays,
    body,
    both,
    bytes_of,
    claims,
    edited,
    error,
    evaluation,
    fields,
    header,
    inflated,
    many_metrics,
    metadata,
    npy,
    npz,
    put,
    records,
    saved,
    unchanged,
    value,
)

NAN, INF = math.nan, math.inf
VICTIM = 11
"""An honest node's id."""
PICKLE = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."  # as data: nothing here reads it
DEEP = b"[" * 100_000

KEYS = [
    Hostile("name-missing", "an array left out", arrays(lambda a: a.__delitem__("scale")), "wrong_keys"),
    Hostile("name-extra", "an array too many", arrays(lambda a: a.update(more=a["scale"])), "wrong_keys"),
    Hostile("name-renamed", "an array under another name", arrays(lambda a: a.update(Scale=a.pop("scale"))), "wrong_keys"),
    Hostile("names-none", "an empty array record", arrays(lambda a: a.clear()), "wrong_keys"),
    Hostile("names-many", "1,000 arrays too many",
            arrays(lambda a: a.update({f"x{i}": a["scale"] for i in range(1_000)})), "wrong_keys"),
    Hostile("names-reordered", "the arrays in another order",
            arrays(lambda a: [a.update({n: a.pop(n)}) for n in sorted(a, reverse=True)]), "ok"),
    Hostile("names-surrogate", "a name that is no UTF-8", arrays(lambda a: a.update({"\ud800": a.pop("scale")})), "wrong_keys"),
]  # fmt: skip

SHAPES = [
    Hostile("shape-wrong", "(6, 6) for (4, 6)", value(lambda x: np.zeros((6, 6), np.float32)), "wrong_shape"),
    Hostile("shape-broadcast", "(1, 6), which numpy stretches to (4, 6)",
            value(lambda x: -3 * x[:1]), "wrong_shape"),
    Hostile("shape-scalar", "one number for a matrix", value(lambda x: np.float32(-3)), "wrong_shape"),
    Hostile("shape-transposed", "(6, 4) for (4, 6)", value(lambda x: x.T.copy()), "wrong_shape"),
    Hostile("shape-grows", "(2, 4, 6): the mean is broadcast to a third axis",
            value(lambda x: np.stack([x, x])), "wrong_shape"),
    Hostile("shape-claimed", "the record says (4, 6), the bytes are (24,)", fields(data=saved(np.zeros(24, np.float32))), "wrong_shape"),
    Hostile("shape-declared", "the record says (24,), the bytes are (4, 6)", fields(shape=(24,)), "wrong_shape"),
    Hostile("shape-negative", "the record says (-4, -6)", fields(shape=(-4, -6)), "wrong_shape"),
    Hostile("shape-empty", "no rows", value(lambda x: x[:0]), "wrong_shape"),
    Hostile("shape-bomb", "a header of 10^14 rows and no bytes", npy(header(shape="(100000000000000, 6)"), b""), "wrong_shape"),
    Hostile("shape-digits", "a header whose shape has 900 digits", npy(header(shape=f"({'9' * 900}, 6)")), "wrong_shape"),
    Hostile("order-fortran", "columns first, and said so", value(np.asfortranarray), "ok"),
]  # fmt: skip

DTYPES = [
    Hostile("dtype-int", "int64", value(lambda x: x.astype(np.int64)), "wrong_dtype"),
    Hostile("dtype-bool", "bool", value(lambda x: x > 0), "wrong_dtype"),
    Hostile("dtype-complex", "complex64: the model becomes complex", value(lambda x: x + 3j), "wrong_dtype"),
    Hostile("dtype-string", "text", value(lambda x: np.full((4, 6), "x")), "wrong_dtype"),
    Hostile("dtype-object", "objects, which only pickle can read", npy(header("'|O'"), PICKLE), "wrong_dtype"),
    Hostile("dtype-structured", "named fields", npy(header("[('a', '<f4')]")), "malformed"),
    Hostile("dtype-big-endian", "big-endian", npy(header("'>f4'")), "wrong_dtype"),
    Hostile("dtype-void", "bfloat16 as raw bytes", npy(header("'|V2'"), bytes(48)), "wrong_dtype"),
    Hostile("dtype-claimed", "said to be float32, bytes are float16", fields(data=saved(np.zeros((4, 6), np.float16))), "wrong_dtype"),
    Hostile("dtype-unknown", "a dtype nobody knows", fields(dtype="float31"), "wrong_dtype"),
    Hostile("dtype-double", "an honest update in float64", value(lambda x: x.astype(np.float64)), "ok"),
    Hostile("dtype-half", "an honest update in float16", value(lambda x: x.astype(np.float16)), "ok"),
]  # fmt: skip

VALUES = [
    Hostile("value-nan", "one NaN", value(lambda x: put(x, NAN)), "not_finite"),
    Hostile("value-inf", "one infinity", value(lambda x: put(x, INF)), "not_finite"),
    Hostile("value-minus-inf", "one negative infinity", value(lambda x: put(x, -INF)), "not_finite"),
    Hostile("value-all-nan", "nothing but NaN", value(lambda x: x * np.float32(NAN)), "not_finite"),
    Hostile("value-huge", "one 1e38", value(lambda x: put(x, 1e38)), "out_of_range"),
    Hostile("value-double", "one 1e300 in float64", value(lambda x: put(x.astype(np.float64), 1e300)), "out_of_range"),
    Hostile("value-half-inf", "infinity in float16", value(lambda x: put(x.astype(np.float16), INF)), "not_finite"),
    Hostile("value-scaled", "the opposite update, 30 times as long", arrays(
        lambda a: a.update({n: Array(30 * v.numpy()) for n, v in a.items()}), sign=-1.0), "norm"),
    Hostile("value-unchanged", "the model as it was sent",
            unchanged, "structure"),
]  # fmt: skip

BYTES = [
    Hostile("stype-pickle", "serialised as pickle", fields(stype="pickle", data=PICKLE), "malformed"),
    Hostile("stype-torch", "serialised by torch", fields(stype="torch.Tensor"), "malformed"),
    Hostile("stype-empty", "serialised as nothing", fields(stype=""), "malformed"),
    Hostile("bytes-pickle", "a pickle where numbers should be", fields(data=PICKLE), "malformed"),
    Hostile("bytes-garbage", "random bytes", fields(data=np.random.default_rng(3).bytes(200)), "malformed"),
    Hostile("bytes-none", "no bytes", fields(data=b""), "malformed"),
    Hostile("bytes-truncated", "the last four bytes missing", fields(data=saved(np.zeros((4, 6), np.float32))[:-4]), "malformed"),
    Hostile("bytes-trailing", "four bytes too many", fields(data=saved(np.zeros((4, 6), np.float32)) + b"more"), "malformed"),
    Hostile("bytes-zip", "an .npz archive", fields(data=npz()), "malformed"),
    Hostile("header-none", "a header of no bytes", npy(b""), "malformed"),
    Hostile("header-long", "a header said to have 4 GB", fields(data=b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(200)), "too_large"),
    Hostile("header-padded", "a header of 60,000 spaces", npy(header() + b" " * 60_000), "too_large"),
    Hostile("header-deep", "9,000 brackets", npy(header(shape="(" * 9_000)), "too_large"),
    Hostile("header-code", "a call in the header", npy(header(shape="__import__('os').abort()")), "malformed"),
    Hostile("header-twice", "two shapes in one header", npy(header(shape="(9, 9), 'shape': (4, 6)")), "malformed"),
    Hostile("header-version", ".npy version 9", npy(header(), version=9), "malformed"),
]  # fmt: skip

RECORDS = [
    Hostile("records-none", "no records", records(lambda c: c.clear()), "malformed"),
    Hostile("records-no-arrays", "no array record", records(lambda c: c.__delitem__("arrays")), "malformed"),
    Hostile("records-no-metrics", "no metric record", records(lambda c: c.__delitem__("metrics")), "malformed"),
    Hostile("records-two-arrays", "two array records", records(lambda c: c.update(more=c["arrays"])), "malformed"),
    Hostile("records-two-metrics", "two metric records", records(lambda c: c.update(more=c["metrics"])), "malformed"),
    Hostile("records-renamed", "records under names of their own", records(
        lambda c: c.update(a=c.pop("arrays"), m=c.pop("metrics"))), "ok"),
    Hostile("records-swapped", "arrays called metrics and metrics called arrays", records(
        lambda c: c.update({"arrays": c.pop("metrics"), "metrics": c.pop("arrays")})), "ok"),
    Hostile("records-config", "a config record nobody asked for", records(
        lambda c: c.update(config=ConfigRecord({"lr": 1e9}))), "ok"),
    Hostile("records-config-huge", "a config record of 3 MB", records(
        lambda c: c.update(config=ConfigRecord({"x": bytes(3 << 20)}))), "too_large"),
    Hostile("records-many", "500 more array records", records(
        lambda c: c.update({f"r{i}": ArrayRecord() for i in range(500)})), "malformed"),
]  # fmt: skip

METRICS = [
    Hostile("count-missing", "no num-examples", claims(drop="num-examples"), "claim_missing"),
    Hostile("count-list", "num-examples is a list", claims(count=[10]), "out_of_range"),
    Hostile("count-zero", "num-examples 0", claims(count=0), "out_of_range"),
    Hostile("count-negative", "num-examples -1000", claims(count=-1000), "out_of_range"),
    Hostile("count-cancels", "num-examples -40, so that the sum is 0", claims(count=-40), "out_of_range"),
    Hostile("count-nan", "num-examples NaN", claims(count=NAN), "not_finite"),
    Hostile("count-inf", "num-examples infinite", claims(count=INF), "not_finite"),
    Hostile("count-absurd", "num-examples 1e18", claims(count=10**18), "out_of_range"),
    Hostile("count-large", "num-examples 1,000,000", claims(count=1_000_000), "ok"),
    Hostile("metric-missing", "a metric that all others send left out", claims(1.0, drop="train_loss"), "ok"),
    Hostile("metric-extra", "a metric nobody else sends", claims(1.0, mine=1.0), "ok"),
    Hostile("metric-list", "a list where the others send a number", claims(1.0, train_loss=[0.5, 0.5]), "ok"),
    Hostile("metric-nan", "a metric that is NaN", claims(1.0, train_loss=NAN), "not_finite"),
    Hostile("metric-inf", "a metric that is infinite", claims(1.0, train_loss=INF), "not_finite"),
    Hostile("metric-many", "20,000 metrics", many_metrics(**{f"m{i}": 1 for i in range(20_000)}), "too_large"),
    Hostile("metric-long", "a metric of 100,000 values", many_metrics(train_loss=[0.5] * 100_000), "too_large"),
    Hostile("metric-name", "a metric with a name of 2 MB", many_metrics(**{"x" * (2 << 20): 1}), "too_large"),
]  # fmt: skip

SOURCES = [
    Hostile("source-victim", "says it is from another node", metadata(src_node_id=VICTIM), "wrong_participant"),
    Hostile("source-unknown", "says it is from a node that does not exist", metadata(src_node_id=666), "wrong_participant"),
    Hostile("source-server", "says it is from the SuperLink", metadata(src_node_id=1), "wrong_participant"),
    Hostile("answers-other", "says it answers a message that nobody sent", metadata(reply_to_message_id="f" * 64), "wrong_participant"),
    Hostile("answers-none", "says it answers nothing", metadata(reply_to_message_id=""), "wrong_participant"),
    Hostile("type-other", "says it is an evaluation", metadata(1.0, message_type="evaluate"), "ok"),
    Hostile("run-other", "says it is of another run and group", metadata(1.0, run_id=99, group_id="x"), "ok"),
    Hostile("time-negative", "says it was made in the year 1901 and has expired", metadata(1.0, created_at=-2.1e9, ttl=-1.0), "ok"),
    Hostile("twice-same", "the same reply twice", both(metadata(), metadata()), "wrong_participant"),
    Hostile("twice-other", "two replies that differ", both(metadata(-1.0), metadata(1.0)), "wrong_participant"),
    Hostile("phantom", "an honest reply and one that answers nothing", both(
        metadata(1.0), metadata(-1.0, reply_to_message_id="")), "ok"),
    Hostile("error", "the client reports an error", error("out of memory"), "missing"),
    Hostile("error-nameless", "an error without a word", error(None), "missing"),
    Hostile("error-long", "an error of 5 MB", error("x" * (5 << 20)), "missing"),
    Hostile("error-source", "an error that says it is from another node", error("crashed", VICTIM), "missing"),
    Hostile("silence", "never answers", lambda message: None, "missing"),
]  # fmt: skip

OBJECTS = [
    Hostile("message-garbage", "a message that is no message", bytes_of("Message", body(b"\xff\xff\xff")), "malformed"),
    Hostile("message-typed", "a message whose type is none", metadata(message_type="x" * 10), "malformed"),
    Hostile("object-unknown", "an object of a kind that does not exist",
            bytes_of("Array", lambda old: b"Evil" + old[5:]), "malformed"),
    Hostile("object-missing", "an object that is nowhere", bytes_of("Array", lambda old: None), "malformed"),
    Hostile("object-confused", "an array record that says it is a metric record",
            bytes_of("ArrayRecord", lambda old: b"MetricRecord" + old[11:]), "malformed"),
    Hostile("records-json", "records that are no JSON", bytes_of("RecordDict", body(b"{")), "malformed"),
    Hostile("records-deep", "records of 100,000 brackets", bytes_of("RecordDict", body(DEEP)), "malformed"),
    Hostile("records-strangers", "records that are not there", bytes_of("RecordDict", edited(lambda r: r.update(a="0" * 64))), "malformed"),
    Hostile("array-json", "an array that is no JSON", bytes_of("Array", body(b"\xff\xfe")), "malformed"),
    Hostile("array-shape", "a shape of text", bytes_of("Array", edited(lambda a: a.update(shape=["4", "6"]))), "malformed"),
    Hostile("array-fields", "an array without a dtype", bytes_of("Array", edited(lambda a: a.pop("dtype"))), "malformed"),
    Hostile("array-chunks", "chunks that are not there", bytes_of("Array", edited(lambda a: a.update(arraychunk_ids=[7]))), "malformed"),
    Hostile("array-inflated", "one chunk of 1 MB, named 20 times", inflated(20, 1 << 20), "too_large"),
    Hostile("metrics-garbage", "metrics that are no protobuf", bytes_of("MetricRecord", body(b"\x0a\xff\xff")), "malformed"),
]  # fmt: skip

EVALUATIONS = [
    Hostile("evaluation-none", "an evaluation without metrics", records(lambda c: c.clear()), "malformed", "evaluate"),
    Hostile("evaluation-count", "without num-examples", evaluation(count=None), "claim_missing", "evaluate"),
    Hostile("evaluation-cancels", "num-examples -40", evaluation(count=-40), "out_of_range", "evaluate"),
    Hostile("evaluation-nan", "accuracy NaN", evaluation(accuracy=NAN), "not_finite", "evaluate"),
    Hostile("evaluation-absurd", "accuracy 1, counted 1e18 times", evaluation(accuracy=1.0, count=10**18), "out_of_range", "evaluate"),
    Hostile("evaluation-large", "accuracy 1, counted 1e6 times", evaluation(accuracy=1.0, count=10**6), "ok", "evaluate"),
    Hostile("evaluation-other", "another metric", evaluation(accuracy=None, mine=1.0), "ok", "evaluate"),
    Hostile("evaluation-garbage", "metrics that are no protobuf", bytes_of("MetricRecord", body(b"\x0a\xff")), "malformed", "evaluate"),
]  # fmt: skip


CORPUS: tuple[Hostile, ...] = (
    *KEYS, *SHAPES, *DTYPES, *VALUES, *BYTES, *RECORDS, *METRICS, *SOURCES, *OBJECTS, *EVALUATIONS,
)  # fmt: skip
