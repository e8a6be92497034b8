"""How hostile messages of a swarm by relay are made (the corpus itself: `swarm_hostile`)."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from assay.contribution import Completion, Rollout, completion_sha256
from assay.swarm.exchange import Plan, Rules
from assay.swarm.signed import DOMAIN, MAGIC, Keys, Statement, sign
from assay.wire import encode_rollout

Ids = tuple[int, ...]
Header = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A round as the hostile node sees it: what it owes, what it would have sent, its key, and a neighbour's message."""

    node: str
    plan: Plan
    ahead: Plan
    rules: Rules
    honest: Rollout
    statement: Statement
    key: Ed25519PrivateKey
    keys: Keys
    other_key: Ed25519PrivateKey
    other: str
    other_rollout: Rollout
    other_message: bytes
    eos: int
    redraw: Callable[[int, int], Ids]
    """(prompt, seed) -> a completion this node's weights draw under another seed."""


Make = Callable[[Stage], bytes]


@dataclass(frozen=True, slots=True)
class Hostile:
    """One entry of the corpus; `reason` is what Assay must give."""

    name: str
    what: str
    make: Make
    reason: str


def honest(stage: Stage) -> bytes:
    return sign(stage.statement, stage.key)


def raw(change: Callable[[bytes], bytes]) -> Make:
    """An honest message whose bytes are changed after it was signed."""
    return lambda stage: change(honest(stage))


def flipped(at: int) -> Make:
    """... with one bit turned over."""

    def change(message: bytes) -> bytes:
        out = bytearray(message)
        out[at] ^= 1
        return bytes(out)

    return raw(change)


def says(**changes: Any) -> Make:
    """Signed by the node itself, with other fields."""
    return lambda stage: sign(replace(stage.statement, **changes), stage.key)


def body(change: Callable[[bytes], bytes]) -> Make:
    """Signed by the node itself, over a body of bytes that no honest sender writes."""

    def make(stage: Stage) -> bytes:
        new = change(honest(stage)[len(MAGIC) + 64 :])
        return MAGIC + stage.key.sign(DOMAIN + new) + new

    return make


def contents(change: Callable[[bytes], bytes]) -> Make:
    """Signed by the node itself, over other contents."""
    return lambda stage: sign(replace(stage.statement, contents=change(stage.statement.contents)), stage.key)


def header(change: Callable[[Header], object] | None = None, text: Callable[[str], str] = lambda t: t) -> Make:
    """... over contents whose JSON header is changed, as a value or as text."""

    def new(old: bytes) -> bytes:
        (size,) = struct.unpack_from("<I", old, 8)
        found = json.loads(old[12 : 12 + size])
        if change is not None:
            change(found)
        made = text(json.dumps(found)).encode()
        return old[:8] + struct.pack("<I", len(made)) + made + old[12 + size :]

    return contents(new)


def ids(change: Callable[[bytes], bytes]) -> Make:
    """... over contents whose token ids are other bytes."""

    def new(old: bytes) -> bytes:
        (size,) = struct.unpack_from("<I", old, 8)
        return old[: 12 + size] + change(old[12 + size :])

    return contents(new)


def rows(change: Callable[[Stage, list[Completion]], list[Completion]]) -> Make:
    """... over well-formed contents with other completions."""

    def make(stage: Stage) -> bytes:
        made = change(stage, list(stage.honest.completions))
        rollout = replace(stage.honest, completions=tuple(made))
        return sign(replace(stage.statement, contents=encode_rollout(rollout, run=stage.rules.run)), stage.key)

    return make


def put(old: Completion, **changes: Any) -> Completion:
    """A completion with other fields and the hash that fits them."""
    new = replace(old, **changes)
    return replace(new, sha256=completion_sha256(new.round, new.prompt, new.index, new.ids))


def first(change: Callable[[Stage, Completion], Mapping[str, Any]]) -> Make:
    """... with the first completion changed."""
    return rows(lambda stage, found: [put(found[0], **change(stage, found[0])), *found[1:]])
