"""Fuzzing of both wings' messages: whatever the bytes, a contribution or a refusal, in memory that the bytes decide."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import test_wire as lora
import test_wire_rollout as rollout
from assay.contribution import LoraUpdate, Refusal, Rollout, tensors_sha256
from assay.verdict import Reason
from assay.wire import encode_tensors, encode_update
from mutations import mutated, wild

Case = tuple[bytes, Callable[[bytes], Any]]
HEADER = 12  # magic and the header's length


def update_of(rng: random.Random) -> bytes:
    """A client's message, most of it right: its bytes changed, one field of its header, or one of a part's."""
    kind = rng.randrange(4)
    if kind == 0:
        claims = (lora.TENSORS,) * rng.randint(0, 3)
        return relengthened(
            mutated(encode_update(lora.update(steps=claims, shadow=claims[:1]), run=lora.RUN), rng), rng
        )
    if kind == 1:
        key = rng.choice(sorted(lora.fields("eve", {})))
        return lora.pack("eve", **{key: wild(rng)})
    if kind == 2:
        raw = mutated(encode_tensors(lora.TENSORS), rng)
        return lora.pack("eve", {"adapter": raw, **({"steps/0": raw} if rng.random() < 0.3 else {})})
    name, field = (
        rng.choice((lora.A, lora.B, "new", "__metadata__")),
        rng.choice(("dtype", "shape", "data_offsets", "more")),
    )
    return lora.pack(
        "eve",
        {
            "adapter": lora.blob(
                lora.TENSORS, {name: {field: wild(rng)}}, dtype=rng.choice(("F32", "F16", "BF16", "F64"))
            )
        },
    )


def rollout_of(rng: random.Random) -> bytes:
    """A node's message, most of it right: its bytes changed, a field of its header, an entry of its list."""
    kind = rng.randrange(3)
    if kind == 0:
        return relengthened(mutated(rollout.GOOD, rng), rng)
    if kind == 1:
        return rollout.pack(**{rng.choice(sorted(rollout.fields())): wild(rng)})
    listed = [list(entry) for entry in rollout.fields()["completions"]]
    for _ in range(rng.randint(1, 3)):
        entry = rng.choice(listed)
        entry[rng.randrange(3)] = wild(rng, 1)
    return rollout.pack(completions=listed, body=rng.randbytes(4 * rng.randint(0, 20)))


def relengthened(message: bytes, rng: random.Random) -> bytes:
    """Half of the time with the header's length put right where it still can be, so that the JSON is reached."""
    if rng.random() < 0.5 and (end := message.rfind(b"}", HEADER, HEADER + 4000)) > 0:
        return message[:8] + struct.pack("<I", end + 1 - HEADER) + message[HEADER:]
    return message


def read_update(message: bytes) -> LoraUpdate | Refusal:
    read = lora.decode(message)
    if isinstance(read, LoraUpdate):  # num_examples and steps are claims, which the hash does not cover
        assert read.sha256 == tensors_sha256(read.tensors)
        assert (read.participant, read.round, read.base_sha256) == ("eve", lora.ROUND, lora.BASE)
        assert len(read.steps) <= 16
    return read


def read_rollout(message: bytes) -> Rollout | Refusal:
    read = rollout.decode(message)
    if isinstance(read, Rollout):
        assert read == rollout.SENT, "the hash covers all of it"
    return read


TARGETS = {"update": (update_of, read_update), "rollout": (rollout_of, read_rollout)}


def check(name: str, seed: int, reasons: Counter[str]) -> None:
    made, read = TARGETS[name]
    message = made(random.Random(seed))
    counted = seed % 10 == 0  # it takes several times as long
    if counted:
        tracemalloc.start()
    try:
        got = read(message)
        peak = tracemalloc.get_traced_memory()[1] if counted else 0
    finally:
        tracemalloc.stop()
    # an empty JSON object of two bytes and a comma costs Python 72 bytes; sentences, errors and headers the rest
    assert peak < 2**18 + 80 * len(message), f"{peak} bytes for a message of {len(message)}"
    if isinstance(got, Refusal):
        assert got.reason in list(Reason)
        assert 0 < len(got.sentence) < 1000
        assert "internal error" not in got.sentence, got.sentence
        json.dumps([got.sentence, got.sha256])
    reasons[got.reason if isinstance(got, Refusal) else "ok"] += 1


@pytest.fixture
def strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def fuzz(name: str, examples: int, each: int) -> Counter[str]:
    """`examples` seeds of Hypothesis, `each` messages a seed; a tenth of them in counted memory."""
    reasons: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**60))
    def run(seed: int) -> None:
        for more in range(each):
            check(name, seed * each + more, reasons)

    run()
    # worth something only if it gets past the envelope, and sometimes all the way
    assert {"ok", "malformed", "hash_mismatch", "wrong_round", "wrong_participant"} <= set(reasons), reasons
    return reasons


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_is_read_or_refused(name: str) -> None:
    fuzz(name, 60, 25)


@pytest.mark.slow
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", TARGETS)
def test_50_000_messages_of_each_kind_are_read_or_refused(name: str) -> None:
    assert sum(fuzz(name, 2_000, 25).values()) >= 50_000
