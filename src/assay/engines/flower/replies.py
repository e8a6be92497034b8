"""A client's reply -> `LoraUpdate` and metrics, or a `Refusal` with a reason and a sentence. Nothing in it raises.

A reply holds one `ArrayRecord` of the form that was sent and one `MetricRecord` with the count of examples. Whatever
else it holds is never passed on. All metrics are claims: the count is capped, metrics a strategy acts upon are clipped
to the operator's range, the others are only shown.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from flwr.app import ArrayRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from assay.contribution import LoraUpdate, Refusal, tensors_sha256
from assay.engines.flower.arrays import Form, decode_arrays
from assay.verdict import Reason
from assay.wire import MAX_NUM_EXAMPLES, WireError
from assay.wire.envelope import malformed, show

Metrics = dict[str, int | float | list[int] | list[float]]
Read = TypeVar("Read")
MAX_INT = 2**63 - 1  # what Flower's own wire format can carry


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a reply may be. ValueError when a limit makes no sense.

    `max_abs_value`: largest |x| of an array, as in the wire of Assay's own runs: trained LoRA values lie below about 1;
    near 1 it refuses honest clients, above 1e18 squares overflow and screens see infinities.
    `max_metrics`, `max_list`: names in a metric record, values in a listed metric. `max_other_bytes`: all that is not
    an array, names included.
    """

    max_abs_value: float = 1e4
    max_metrics: int = 64
    max_list: int = 1024
    max_other_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        if not self.max_abs_value > 0:  # also refuses NaN
            raise ValueError(f"max_abs_value is {self.max_abs_value}: give a positive number")
        if min(self.max_metrics, self.max_list, self.max_other_bytes) < 1:
            raise ValueError(f"limits must be at least 1, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What the operator agreed on with the clients.

    `count`: the metric that holds the number of examples. `ranges`: metrics the strategy acts upon and what a claim of
    them is clipped to; a reply must have them.
    """

    count: str = "num-examples"
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Reply:
    """A well-formed reply: `count` is the claimed number of examples, `metrics` the rest; `update` of a training."""

    node: int
    metadata: Metadata
    count: int | float
    metrics: Metrics
    update: LoraUpdate | None = None


class GuardError(Error):
    """Why the guard did not let a reply through; what a client reports itself is a plain `Error`."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(ErrorCode.UNKNOWN, f"{reason.value}: {sentence}")
        self.refused, self.sentence = reason, sentence


def participant_of(node: int) -> str:
    return str(node)


def read_training(message: Message, node: int, round: int, form: Form, protocol: Protocol) -> Reply | Refusal:
    """One training reply of `node`, to be compared with what was sent in `round`."""

    def read(content: RecordDict) -> Reply:
        arrays, metrics = _records(content, form.max_bytes, protocol.limits, arrays=True)
        assert arrays is not None
        tensors = decode_arrays(arrays, form, max_abs_value=protocol.limits.max_abs_value)
        count, rest = _metrics(metrics, protocol)
        update = LoraUpdate(
            participant=participant_of(node),
            round=round,
            base_sha256="",
            tensors=tensors,
            sha256=tensors_sha256(tensors),
            num_examples=max(1, int(count)),
        )
        return Reply(node, message.metadata, count, rest, update)

    return _read_or_refuse(message, node, read)


def read_evaluation(message: Message, node: int, protocol: Protocol) -> Reply | Refusal:
    """One evaluation reply of `node`: metrics alone."""

    def read(content: RecordDict) -> Reply:
        _, metrics = _records(content, 0, protocol.limits, arrays=False)
        return Reply(node, message.metadata, *_metrics(metrics, protocol, ranges=False))

    return _read_or_refuse(message, node, read)


def refuse(node: int, reason: Reason, sentence: str, content: RecordDict | None = None) -> Refusal:
    """A refusal that names the bytes it speaks of, as far as there are any."""
    return Refusal(participant_of(node), raw_sha256(content), reason.value, sentence)


def _read_or_refuse(message: Message, node: int, read: Callable[[RecordDict], Read]) -> Read | Refusal:
    content: RecordDict | None = None
    try:
        if message.has_error():
            error = message.error
            if isinstance(error, GuardError):
                return refuse(node, error.refused, error.sentence)
            said = show(error.reason) if isinstance(error.reason, str) else "nothing more"
            return refuse(node, Reason.MISSING, f"its node reported error {show(error.code)}: {said}")
        content = message.content
        return read(content)
    except WireError as error:
        reason, sentence = error.reason, str(error)
    except Exception as error:  # noqa: BLE001 - one peer must not end a round; said aloud, and no test reaches it
        reason, sentence = Reason.MALFORMED, f"internal error while reading: {type(error).__name__}: {error}"
    return refuse(node, reason, sentence, content)


def _records(
    content: RecordDict, array_bytes: int, limits: Limits, *, arrays: bool
) -> tuple[ArrayRecord | None, MetricRecord]:
    """The array record (of a training) and the metric record, once the whole is known to be small enough."""
    size, most = measured(content), array_bytes + limits.max_other_bytes
    if size > most:
        raise WireError(Reason.TOO_LARGE, f"reply has {size} bytes, limit {most}")
    found = [record for record in content.values() if isinstance(record, ArrayRecord)]
    metrics = [record for record in content.values() if isinstance(record, MetricRecord)]
    if arrays and len(found) != 1:
        raise malformed(f"reply has {len(found)} array records, expected 1")
    if len(metrics) != 1:
        raise malformed(f"reply has {len(metrics)} metric records, expected 1")
    return found[0] if arrays else None, metrics[0]


def measured(content: RecordDict) -> int:
    """Bytes of a message's content, without copying any of it."""
    size = 0
    for name, record in content.items():
        size += len(name)
        for key, value in record.items():
            size += len(key) + _measured(value)
    return size


def _measured(value: object) -> int:
    data = getattr(value, "data", value)  # an Array
    if isinstance(data, bytes | str):
        return len(data)
    if isinstance(data, list):
        return sum(_measured(item) if isinstance(item, bytes | str) else 8 for item in data)
    return 8


def raw_sha256(content: RecordDict | None) -> str:
    """sha256 (hex) over names and bytes as they came; of no bytes where there is nothing readable."""
    digest = hashlib.sha256()
    try:
        for name, record in content.items() if content is not None else ():
            digest.update(name.encode("utf-8", "surrogatepass"))
            for key, value in record.items():
                data = getattr(value, "data", None)
                raw = data if isinstance(data, bytes) else repr(value)[:4096].encode("utf-8", "surrogatepass")
                digest.update(key.encode("utf-8", "surrogatepass") + raw)
    except Exception:  # noqa: BLE001 - the hash of what cannot be read is that of what could be
        return digest.hexdigest()
    return digest.hexdigest()


def _metrics(record: MetricRecord, protocol: Protocol, *, ranges: bool = True) -> tuple[int | float, Metrics]:
    """The claimed count and all other metrics, each a finite number or a list of them."""
    limits = protocol.limits
    if len(record) > limits.max_metrics:
        raise WireError(Reason.TOO_LARGE, f"{len(record)} metrics, limit {limits.max_metrics}")
    out: Metrics = {}
    for name, value in record.items():
        many = value if isinstance(value, list) else [value]
        if len(many) > limits.max_list:
            raise WireError(Reason.TOO_LARGE, f"metric {show(name)} has {len(many)} values, limit {limits.max_list}")
        numbers = [_number(name, one) for one in many]
        out[name] = numbers if isinstance(value, list) else numbers[0]
    count = out.pop(protocol.count, None)
    if count is None:
        raise WireError(Reason.CLAIM_MISSING, f"no metric {protocol.count!r}")
    if isinstance(count, list) or not 0 < count <= MAX_NUM_EXAMPLES:
        shown = "a list" if isinstance(count, list) else show(count)
        raise WireError(
            Reason.OUT_OF_RANGE, f"{protocol.count} is {shown}, expected above 0 and at most {MAX_NUM_EXAMPLES}"
        )
    for name, (low, high) in protocol.ranges.items() if ranges else ():
        claimed = out.get(name)
        if claimed is None or isinstance(claimed, list):
            raise WireError(Reason.CLAIM_MISSING, f"no single number {name!r}, upon which the strategy acts")
        out[name] = min(max(claimed, low), high)
    return count, out


def _number(name: str, value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise malformed(f"metric {show(name)} is {show(value)}, expected a number")
    if isinstance(value, int):
        if abs(value) > MAX_INT:
            raise WireError(Reason.OUT_OF_RANGE, f"metric {show(name)} is {show(value)}, beyond 64 bits")
        return int(value)
    if not math.isfinite(value):
        raise WireError(Reason.NOT_FINITE, f"metric {show(name)} is {show(float(value))}")
    return float(value)


def shared_metrics(replies: Sequence[Reply], counts: Sequence[int | float], count: str) -> list[MetricRecord]:
    """A metric record for each reply: its count as given here, and the metrics that all of them have in one form.

    Strategies refuse a round in which records differ; so one client could end it by leaving a metric out. Here he can
    only keep it from being shown.
    """

    def form(metrics: Metrics) -> dict[str, int]:
        return {n: len(v) if isinstance(v, list) else -1 for n, v in metrics.items()}

    common = set(form(replies[0].metrics).items()) if replies else set()
    for reply in replies[1:]:
        common &= set(form(reply.metrics).items())
    names = sorted(name for name, _ in common)
    return [MetricRecord({count: n, **{x: r.metrics[x] for x in names}}) for r, n in zip(replies, counts)]
