"""How honest and hostile clients of a Flower server make their replies (the corpus itself: `flower_hostile`)."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from numpy.typing import NDArray

from assay.bench.flower_grid import Reply, objects_of, with_object

SHAPES = {"lora_A": (4, 6), "lora_B": (6, 4), "scale": (5,)}
Phase = Literal["train", "evaluate"]
Made = Reply | list[Reply]


def start() -> dict[str, NDArray[np.float32]]:
    """The model that is sent."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def honest_arrays(sent: Mapping[str, NDArray[Any]], seed: int, sign: float = 1.0) -> dict[str, NDArray[np.float32]]:
    """One step all honest clients agree on but for a tenth of its length; `sign` -1 is its opposite, just as long."""
    common, own = np.random.default_rng(1), np.random.default_rng([2, seed])
    return {
        name: (
            value + sign * 0.1 * (common.standard_normal(value.shape) + 0.1 * own.standard_normal(value.shape))
        ).astype(np.float32)
        for name, value in sent.items()
    }


def metrics_of(**more: Any) -> MetricRecord:
    return MetricRecord({"num-examples": 10, "train_loss": 0.5, **more})


def honest(message: Message, seed: int, sign: float = 1.0) -> Message:
    """What an honest client replies to a training or evaluation message."""
    if message.metadata.message_type == "evaluate":
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 10, "accuracy": 0.5})}), reply_to=message)
    arrays = message.content.array_records["arrays"]
    made = honest_arrays({name: array.numpy() for name, array in arrays.items()}, seed, sign)
    record = ArrayRecord({name: Array(value) for name, value in made.items()})
    return Message(RecordDict({"arrays": record, "metrics": metrics_of()}), reply_to=message)


@dataclass(frozen=True, slots=True)
class Hostile:
    """One entry of the corpus; `make` gets the message the client was sent and makes its answer."""

    name: str
    what: str
    make: Callable[[Message], Made]
    reason: str
    phase: Phase = "train"


# --- how replies are made -------------------------------------------------------------------------------------------


def arrays(change: Callable[[dict[str, Array]], object], sign: float = 1.0) -> Callable[[Message], Made]:
    """An honest reply with its arrays changed in place."""

    def make(message: Message) -> Made:
        reply = honest(message, 99, sign)
        made = dict(reply.content.array_records["arrays"].items())
        change(made)
        record = ArrayRecord()
        for name, array in made.items():
            record[name] = array
        reply.content["arrays"] = record
        return reply

    return make


def unchanged(message: Message) -> Made:
    """The model as it came."""
    reply = honest(message, 99)
    reply.content["arrays"] = message.content["arrays"]
    return reply


def value(change: Callable[[NDArray[np.float32]], Any]) -> Callable[[Message], Made]:
    """... with the numbers of `lora_A` changed."""

    def put(made: dict[str, Array]) -> None:
        made["lora_A"] = Array(np.asarray(change(made["lora_A"].numpy().copy())))

    return arrays(put)


def fields(**changed: Any) -> Callable[[Message], Made]:
    """... with fields of the array `lora_A` overwritten: bytes stay, or bytes alone change."""

    def put(made: dict[str, Array]) -> None:
        for name, new in changed.items():
            setattr(made["lora_A"], name, new)

    return arrays(put)


def npy(header: bytes, body: bytes | None = None, version: int = 1) -> Callable[[Message], Made]:
    """... with the bytes of `lora_A` made of this header and `body` (default: the right number of zeros)."""
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    data = b"\x93NUMPY" + bytes([version, 0]) + size + header + (bytes(96) if body is None else body)
    return fields(data=data)


def header(descr: str = "'<f4'", shape: str = "(4, 6)", order: str = "False") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


def claims(sign: float = -1.0, drop: str = "", count: Any = 10, **changed: Any) -> Callable[[Message], Made]:
    """A step against everybody else's, no longer than theirs, with other metrics."""

    def make(message: Message) -> Made:
        reply = honest(message, 99, sign)
        record = MetricRecord()
        for name, number in {**metrics_of(), "num-examples": count, **changed}.items():
            if name != drop:
                record[name] = number
        reply.content["metrics"] = record
        return reply

    return make


def many_metrics(sign: float = 1.0, **record: Any) -> Callable[[Message], Made]:
    """... with a metric record that is large."""

    def make(message: Message) -> Made:
        reply = honest(message, 99, sign)
        reply.content["metrics"] = MetricRecord({**metrics_of(), **record})
        return reply

    return make


def records(change: Callable[[RecordDict], None]) -> Callable[[Message], Made]:
    """... with its records changed in place."""

    def make(message: Message) -> Made:
        reply = honest(message, 99)
        change(reply.content)
        return reply

    return make


def metadata(sign: float = -1.0, **changed: Any) -> Callable[[Message], Made]:
    """... with another source, type or id; where it comes in it cannot choose."""

    def make(message: Message) -> Made:
        reply = honest(message, 99, sign)
        for name, new in changed.items():
            reply.metadata.__dict__[f"_{name}"] = new(message) if callable(new) else new
        return objects_of(reply, message.metadata.message_id)

    return make


def bytes_of(kind: str, change: Callable[[bytes], bytes | None]) -> Callable[[Message], Made]:
    """An honest reply with the first object of this kind changed as bytes; None leaves it out."""

    def make(message: Message) -> Made:
        sent = objects_of(honest(message, 99), message.metadata.message_id)
        old = next(content for content in sent.contents.values() if content.startswith(kind.encode() + b" "))
        new = change(old)
        if new is None:
            return replace(sent, contents={i: c for i, c in sent.contents.items() if c is not old})
        return with_object(sent, old, new)

    return make


def body(new: bytes) -> Callable[[bytes], bytes]:
    """The object's head with another body."""

    def change(old: bytes) -> bytes:
        kind, children, _ = old[: old.index(b"\x00")].split(b" ")
        return b"%b %b %d\x00%b" % (kind, children, len(new), new)

    return change


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """The object's JSON body, edited."""

    def again(old: bytes) -> bytes:
        parsed = json.loads(old[old.index(b"\x00") + 1 :])
        change(parsed)
        return body(json.dumps(parsed).encode())(old)

    return again


def inflated(times: int, chunk: int) -> Callable[[Message], Made]:
    """One chunk of zeros, sent once and named many times: Flower puts the array together before anybody can look."""

    def make(message: Message) -> Made:
        sent = objects_of(honest(message, 99), message.metadata.message_id)
        old = next(c for c in sent.contents.values() if c.startswith(b"Array "))
        part = ArrayChunk(memoryview(bytes(chunk)))
        meta = {"dtype": "float32", "shape": [4, 6], "stype": "numpy.ndarray", "arraychunk_ids": [0] * times}
        raw = json.dumps(meta).encode()
        new = with_object(sent, old, b"Array %b %d\x00%b" % (part.object_id.encode(), len(raw), raw))
        return replace(new, contents={**new.contents, part.object_id: part.deflate()})

    return make


def error(reason: str | None, source: int | None = None) -> Callable[[Message], Made]:
    def make(message: Message) -> Made:
        reply = Message(Error(8, reason), reply_to=message)
        if source is not None:
            reply.metadata.__dict__["_src_node_id"] = source
        return reply

    return make


def both(*makes: Callable[[Message], Made]) -> Callable[[Message], Made]:
    """Several replies to one message."""

    def make(message: Message) -> Made:
        out: list[Reply] = []
        for one in makes:
            made = one(message)
            out += made if isinstance(made, list) else [made]
        return out

    return make


def evaluation(count: Any = 10, **changed: Any) -> Callable[[Message], Made]:
    """An evaluation with these metrics in place of the honest ones; None leaves one out."""

    def make(message: Message) -> Made:
        numbers = {"num-examples": count, "accuracy": 0.5, **changed}
        record = MetricRecord({k: v for k, v in numbers.items() if v is not None})
        return Message(RecordDict({"metrics": record}), reply_to=message)

    return make


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, lora_A=np.zeros((4, 6), np.float32))
    return buffer.getvalue()


def saved(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def put(array: NDArray[np.float32], number: float) -> NDArray[np.float32]:
    array.flat[3] = number
    return array
