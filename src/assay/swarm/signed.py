"""A node's message with its signature: what a relay that nobody trusts can carry.

    MAGIC (8) | ed25519 signature (64) | round u64 | plan (32) | head (32) | u16 + run | u16 + node | contents

All little-endian, no second spelling: one statement has one form, and everything after the signature is signed, behind
a prefix of its own. `plan` is the hash of the plan the node answers, `head` the hash of all pools it has received so
far (relayed.py), `contents` its completions as the wire writes them. Nothing of Flower here: extra `assay[flower]` is
asked for because Flower brings the `cryptography` package along.

Who signed is known only from the key that is registered for the name the message came under. Until the signature holds,
nothing in a message says anything about that node: such a refusal is not `proven` and costs it no trust.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from assay.config import ConfigError
from assay.contribution import Refusal
from assay.verdict import Reason
from assay.wire.envelope import WireError, malformed, show

try:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
except ImportError as error:
    raise ConfigError(f"signed messages need cryptography ({error}); pip install 'assay[flower]'") from error

MAGIC = b"ASSAYSG1"
DOMAIN = b"assay.signed.1\0"  # a signature made for anything else is none here
SIGNATURE, HASH = 64, 32
FIXED = struct.Struct(f"<Q{HASH}s{HASH}s")
MAX_NAME = 256  # bytes of run and node
OVERHEAD = len(MAGIC) + SIGNATURE + FIXED.size + 2 * (2 + MAX_NAME)
"""Bytes of a message at most, besides its contents."""

Keys = Mapping[str, Ed25519PublicKey]


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What a node signs. `plan` and `head` are sha256 in hex."""

    run: str
    round: int
    node: str
    plan: str
    head: str
    contents: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a receiver asks of every message of a round: its own run, plan and head, and how long contents may be."""

    run: str
    round: int
    plan: str
    head: str
    max_contents: int


@dataclass(frozen=True, slots=True)
class Opened:
    """A message as its receiver may use it: `statement` where the signature holds, `refusal` where it is not used."""

    statement: Statement | None
    refusal: Refusal | None


def sign(statement: Statement, key: Ed25519PrivateKey) -> bytes:
    """The message a node sends. ValueError for what the form cannot hold."""
    body = _body(statement)
    return MAGIC + key.sign(DOMAIN + body) + body


def _body(statement: Statement) -> bytes:
    if not 0 <= statement.round < 2**64:
        raise ValueError(f"round is {statement.round}: give a number in [0, 2**64)")
    plan, head = (bytes.fromhex(text) for text in (statement.plan, statement.head))
    if len(plan) != HASH or len(head) != HASH:
        raise ValueError("plan and head must be sha256 in hex")
    names = b""
    for name in (statement.run, statement.node):
        raw = name.encode()
        if len(raw) > MAX_NAME:
            raise ValueError(f"{show(name)} has {len(raw)} bytes, limit {MAX_NAME}")
        names += struct.pack("<H", len(raw)) + raw
    return FIXED.pack(statement.round, plan, head) + names + statement.contents


def parse(message: bytes, max_contents: int) -> tuple[Statement, bytes, bytes]:
    """Statement, signature and the bytes it should sign; nothing is verified. WireError says what is wrong."""
    if len(message) > OVERHEAD + max_contents:
        raise WireError(Reason.TOO_LARGE, f"message has {len(message)} bytes, limit {OVERHEAD + max_contents}")
    start = len(MAGIC) + SIGNATURE
    if not message.startswith(MAGIC) or len(message) < start + FIXED.size:
        found = f"{len(message)} bytes that begin with {message[: len(MAGIC)]!r}"
        raise malformed(f"not a signed message: {found}, expected {MAGIC!r} and at least {start + FIXED.size} bytes")
    body = message[start:]
    round, plan, head = FIXED.unpack_from(body)
    at, names = FIXED.size, []
    for what in ("run", "node"):
        size = int.from_bytes(body[at : at + 2], "little")
        raw = body[at + 2 : at + 2 + size]
        if len(body) < at + 2 or size > MAX_NAME or len(raw) < size:
            raise malformed(f"the name of the {what} is said to have {size} bytes, limit {MAX_NAME}, {len(raw)} follow")
        try:
            names.append(raw.decode())
        except UnicodeDecodeError:
            raise malformed(f"the name of the {what} is not UTF-8") from None
        at += 2 + size
    statement = Statement(
        run=names[0], round=round, node=names[1], plan=plan.hex(), head=head.hex(), contents=body[at:]
    )
    if len(statement.contents) > max_contents:
        raise WireError(Reason.TOO_LARGE, f"contents have {len(statement.contents)} bytes, limit {max_contents}")
    return statement, message[len(MAGIC) : start], body


def open_signed(message: bytes, *, node: str, key: Ed25519PublicKey, expected: Expected) -> Opened:
    """Read the message that came under the name `node`. Never raises for what anybody sent.

    First what shows that it is the node's own: size, form, name, signature (refusals are not `proven`). Then what the
    node itself says: run and round (`wrong_round`, also a replay), plan, head.
    """
    try:
        statement, signature, body = parse(message, expected.max_contents)
        if statement.node != node:
            raise WireError(Reason.WRONG_PARTICIPANT, f"says that it is from {show(statement.node)}")
        _verify(node, key, signature, body)
    except WireError as error:
        return Opened(None, _refusal(node, message, error.reason, str(error), proven=False))
    checks = (
        ("run", statement.run, expected.run, Reason.WRONG_ROUND),
        ("round", statement.round, expected.round, Reason.WRONG_ROUND),
        ("plan", statement.plan, expected.plan, Reason.WRONG_PLAN),
        ("head", statement.head, expected.head, Reason.WRONG_POOL),
    )
    for what, said, mine, reason in checks:
        if said != mine:
            sentence = f"signed for {what} {show(said)}, expected {show(mine)}"
            return Opened(statement, _refusal(node, message, reason, sentence))
    return Opened(statement, None)


def _verify(node: str, key: Ed25519PublicKey, signature: bytes, body: bytes) -> None:
    try:
        key.verify(signature, DOMAIN + body)
    except InvalidSignature:
        raise WireError(Reason.WRONG_SIGNATURE, f"is not signed with the key registered for {node}") from None


def verified(message: bytes, keys: Keys, max_contents: int) -> Statement:
    """What a message says, where its signature is that of the node it names. WireError where not.

    For a relay, which does not know under which name a message comes before it has read it.
    """
    statement, signature, body = parse(message, max_contents)
    if statement.node not in keys:
        raise WireError(Reason.WRONG_PARTICIPANT, f"says that it is from {show(statement.node)}, who is not registered")
    _verify(statement.node, keys[statement.node], signature, body)
    return statement


def _refusal(node: str, message: bytes, reason: Reason, sentence: str, *, proven: bool = True) -> Refusal:
    return Refusal(node, hashlib.sha256(message).hexdigest(), reason.value, sentence, proven)
