"""What server and clients of a federated run send each other on Flower.

    order   the round's adapter, and what to do with it: the training as the config says it, never the server's secrets
    update  one `wire` message, the very bytes that a client of the `local` engine sends

The order is the server's and is checked as a config is. The update is a stranger's: nothing in it is believed here, its
bytes go to `wire.decode_update` as they are. They travel as one Flower `Array`, because Flower sends arrays in chunks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from assay.config import ConfigError, Experiment, parse
from assay.contribution import Refusal, Tensors
from assay.engines.flower.arrays import form_of
from assay.engines.flower.replies import GuardError, raw_sha256
from assay.federated.scaffold import Controls
from assay.verdict import Reason
from assay.wire.envelope import show

ORDER, ADAPTER, INITIAL, CONTROLS, UPDATE = "order", "adapter", "initial", "controls", "update"
STYPE = "assay.wire"
PUBLIC: Any = {"model": True, "lora": True, "training": True, "data": {"benign", "refusals"}}
"""The keys of an experiment that clients are told. Seeds, canary and audits are the server's."""
OVERHEAD = 1 << 16
"""Bytes a reply may have beside the update: names, and a node's own words about an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a client is to do in a round. `experiment` holds the public keys only, the others at their defaults.

    `participant` is the name under which the server knows the node, `seed` that of its batches.
    """

    run: str
    round: int
    participant: str
    seed: int
    base_sha256: str
    wants_steps: bool
    wants_shadow: bool
    experiment: Experiment


@dataclass(frozen=True, slots=True)
class Received:
    """An order as a client reads it, with its arrays."""

    order: Order
    adapter: Tensors
    initial: Tensors
    controls: Controls


def public(experiment: Experiment) -> Experiment:
    """What clients are told of an experiment.

    >>> told = public(Experiment().changed(seed=7, defence__canary__seed=12345, training__steps=5))
    >>> told.training.steps, told.seed, told.defence.canary.seed
    (5, 0, None)
    """
    return _told(experiment.model_dump(mode="json", include=PUBLIC))


def _told(values: dict[str, Any]) -> Experiment:
    # how many rows a client has is its own affair; here they only have to be enough for a batch
    return parse({**values, "clients": {"malicious": 0.0, "examples": 10**9}})


def shared(adapter: Tensors, initial: Tensors) -> RecordDict:
    """What the orders of a round have in common: one copy, whatever the number of nodes. `initial` may be empty."""
    return RecordDict({n: _record(arrays) for n, arrays in ((ADAPTER, adapter), (INITIAL, initial)) if arrays})


def write_order(order: Order, common: RecordDict, controls: Controls) -> RecordDict:
    """The content of a node's message; `controls` may be empty."""
    told = order.experiment.model_dump(mode="json", include=PUBLIC)
    values = {name: getattr(order, name) for name in Order.__slots__ if name != "experiment"}
    content = RecordDict({ORDER: ConfigRecord({**values, "experiment": json.dumps(told)}), **common})
    if controls:
        content[CONTROLS] = _record(controls)
    return content


def read_order(content: RecordDict) -> Received:
    """A client's reading of it. ConfigError where it is none, or orders what no config may hold."""
    found = content.config_records.get(ORDER)
    if found is None or ADAPTER not in content.array_records:
        raise ConfigError("the message holds no order of an Assay server; point the ServerApp at Assay's as well")
    values = dict(found)
    try:
        order = Order(experiment=_told(json.loads(str(values.pop("experiment")))), **values)  # type: ignore[arg-type]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"the server's order cannot be read ({error}); install the same release of Assay on both sides"
        ) from None
    arrays = {name: form_of(record)[1] for name, record in content.array_records.items()}
    return Received(order, arrays[ADAPTER], arrays.get(INITIAL, {}), arrays.get(CONTROLS, {}))


def write_update(message: bytes) -> RecordDict:
    """A client's reply."""
    array = Array(dtype="uint8", shape=(len(message),), stype=STYPE, data=message)
    return RecordDict({UPDATE: ArrayRecord({UPDATE: array})})


def read_update(reply: Message, participant: str, max_bytes: int) -> bytes | Refusal:
    """The bytes a node sent in answer to its order, or why there are none. Never raises for what a node sent."""
    content: RecordDict | None = None
    try:
        if reply.has_error():
            error = reply.error
            if isinstance(error, GuardError):
                return refusal(participant, error.refused, error.sentence)
            said = show(error.reason, 300) if isinstance(error.reason, str) else "nothing more"
            return refusal(participant, Reason.MISSING, f"its node reported error {show(error.code)}: {said}")
        content = reply.content
        records = list(content.values())
        arrays = list(records[0].values()) if len(records) == 1 and isinstance(records[0], ArrayRecord) else []
        data = arrays[0].data if len(arrays) == 1 else None
        if not isinstance(data, bytes):
            return refusal(participant, Reason.MALFORMED, "the reply is not one update of an Assay client", content)
        if len(data) > max_bytes:
            return refusal(participant, Reason.TOO_LARGE, f"update has {len(data)} bytes, limit {max_bytes}", content)
        return data
    except Exception as error:  # noqa: BLE001 - a record can hold anything once it is decoded; recorded in the ledger
        return refusal(participant, Reason.MALFORMED, f"cannot be read: {type(error).__name__}: {error}", content)


def refusal(participant: str, reason: Reason, sentence: str, content: RecordDict | None = None) -> Refusal:
    """A refusal that names the bytes it speaks of, as far as there are any."""
    sha256 = hashlib.sha256(b"").hexdigest() if content is None else raw_sha256(content)
    return Refusal(participant, sha256, reason.value, sentence)


def _record(arrays: Mapping[str, NDArray[np.float32]]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value, np.float32)) for name, value in arrays.items()})
