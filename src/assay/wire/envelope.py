"""What every message has in common: magic, u32 header length, strict JSON header; and how one is refused.

    MAGIC (8 bytes) | u32 little-endian header length | JSON header (UTF-8) | body

Nothing but JSON and raw numbers is ever read from a peer; every size is checked before the memory it speaks of is
touched.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from assay.contribution import Refusal
from assay.verdict import Reason

Header = dict[str, object]
Decoded = TypeVar("Decoded")

MAGIC_BYTES = 8  # kind and version; a change of layout changes the last byte
START = MAGIC_BYTES + 4  # where the JSON begins


class WireError(ValueError):
    """Bytes that are not what they should be: `reason` is the code, the text is the sentence."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def malformed(sentence: str) -> WireError:
    return WireError(Reason.MALFORMED, sentence)


def missing(participant: str) -> Refusal:
    """The refusal of a participant who sent nothing (hash of no bytes)."""
    return Refusal(participant, hashlib.sha256(b"").hexdigest(), Reason.MISSING.value, "sent nothing in this round")


def decoded_or_refused(decode: Callable[[], Decoded], message: bytes, run: str, participant: str) -> Decoded | Refusal:
    """`decode()`, or the refusal that says why not: no message raises. TypeError for the operator's own arguments."""
    for value, kind in ((message, bytes), (run, str), (participant, str)):
        if not isinstance(value, kind):
            raise TypeError(f"message must be bytes, run and participant str; got a {type(value).__name__}")
    try:
        return decode()
    except WireError as error:
        reason, sentence = error.reason, str(error)
    except Exception as error:  # noqa: BLE001 - one peer must not end a round; said aloud, and no test reaches it
        reason, sentence = Reason.MALFORMED, f"internal error while decoding: {type(error).__name__}: {error}"
    return Refusal(participant, hashlib.sha256(message).hexdigest(), reason.value, sentence)


def join(magic: bytes, header: Mapping[str, object], body: Sequence[bytes]) -> bytes:
    """The message."""
    raw = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    return b"".join([magic, struct.pack("<I", len(raw)), raw, *body])


def split(message: bytes, magic: bytes, max_header_bytes: int, what: str) -> tuple[Header, memoryview]:
    """Magic and header length -> parsed JSON header and the bytes of the body."""
    if len(message) < START or not message.startswith(magic):
        found = f"{len(message)} bytes that begin with {message[:MAGIC_BYTES]!r}"
        raise malformed(f"not an Assay {what}: {found}, expected {magic!r} and at least {START} bytes")
    (length,) = struct.unpack_from("<I", message, MAGIC_BYTES)
    if length > len(message) - START:
        raise malformed(f"header is said to have {length} bytes, only {len(message) - START} follow")
    if length > max_header_bytes:
        raise WireError(Reason.TOO_LARGE, f"header has {length} bytes, limit {max_header_bytes}")
    view = memoryview(message)
    return json_object(view[START : START + length], "header"), view[START + length :]


def check_header(header: Header, types: Mapping[str, type], expected: Sequence[tuple[str, object, Reason]]) -> None:
    """Exactly the keys of `types` with exactly these types, then the values the receiver expects, in their order."""
    exact_keys(header, types, "header")
    for key, kind in types.items():
        if type(header[key]) is not kind:  # keeps True and 1.0 out of the integers
            raise malformed(f"header: {key} is {show(header[key])}, expected {kind.__name__}")
    for key, value, reason in expected:
        if header[key] != value:
            raise WireError(reason, f"header: {key} is {show(header[key])}, expected {show(value)}")


def exact_keys(
    found: Mapping[str, object], expected: Mapping[str, object], what: str, reason: Reason = Reason.MALFORMED
) -> None:
    if lacking := sorted(expected.keys() - found.keys()):
        raise WireError(reason, f"{what}: {len(lacking)} of {len(expected)} keys missing, first {show(lacking[0])}")
    if extra := sorted(found.keys() - expected.keys()):
        raise WireError(reason, f"{what}: {len(extra)} unknown keys, first {show(extra[0])}")


def json_object(raw: memoryview, what: str) -> Header:
    """Strict JSON object: UTF-8 only (json.loads on bytes guesses UTF-16 and UTF-32), no duplicate key, no NaN."""
    try:
        value = json.loads(str(raw, "utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise malformed(f"{what}: JSON is nested too deeply") from None
    except ValueError as error:  # also UnicodeDecodeError and integers of thousands of digits
        raise malformed(f"{what}: not valid JSON ({str(error)[:160]})") from None
    if not isinstance(value, dict):
        raise malformed(f"{what}: {show(value)}, expected a JSON object")
    return value


def _no_duplicates(pairs: list[tuple[str, object]]) -> Header:
    out = dict(pairs)
    if len(out) != len(pairs):  # two readers might take two different values
        raise ValueError("an object names the same key twice")
    return out


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def show(value: object, limit: int = 80) -> str:
    """A peer's value for a sentence: escaped and cut; containers by type only, for their repr may be endless."""
    if isinstance(value, str):
        return repr(value) if len(value) <= limit else f"{value[:limit]!r}... ({len(value)} characters)"
    if isinstance(value, int) and value.bit_length() > 10_000:  # sums of JSON numbers may be too long for repr
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, int | float):
        text = repr(value)
        return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} digits)"
    return f"a {type(value).__name__}"
