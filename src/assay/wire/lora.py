"""Bytes <-> `LoraUpdate`: the only door by which a peer's update comes in.

One message is

    MAGIC (8 bytes) | u32 little-endian header length | JSON header (UTF-8) | parts

and a part is one safetensors blob: the adapter first, then the optional claims (adapters after each local step of the
real and of the shadow branch). Whatever a peer sends, `decode_update` returns: a `LoraUpdate`, or a `Refusal` with a
reason and a sentence. It raises only for the operator's own mistakes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_safetensors

from assay.contribution import LoraUpdate, Refusal, Template, Tensors, tensors_sha256
from assay.verdict import Reason
from assay.wire.envelope import (
    START,
    Header,
    WireError,
    check_header,
    decoded_or_refused,
    exact_keys,
    join,
    json_object,
    malformed,
    show,
    split,
)

MAGIC = b"ASSAYLU1"
FORMAT = "assay.lora_update/1"
MAX_NUM_EXAMPLES = 10**9  # a claim, capped again by the round; this bound only keeps sums exact in float64

Shapes = Mapping[str, tuple[int, ...]]

HEADER_TYPES: dict[str, type] = {
    "format": str,
    "participant": str,
    "run": str,
    "round": int,
    "base_sha256": str,
    "num_examples": int,
    "sha256": str,
    "parts": list,
}
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
MAX_METADATA = 4096  # characters of a part's `__metadata__`; PEFT writes {"format": "pt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a message may cost the server. ValueError when a limit makes no sense.

    `max_message_bytes`: None = derived from the template (`message_bytes`).
    `max_header_bytes`: the JSON header; a full one with 32 claims has about 2 kB.
    `max_steps`: claims per branch; set it to the number of local steps you ask for, 0 if you read no claims.
    `max_abs_value`: largest |x| of a tensor. Trained LoRA values lie below about 1; 1e4 leaves four orders of
    magnitude to odd scalings, fits float16, and squares of 1e8 such values still sum far below float32's maximum. Set
    near 1 it refuses honest clients; above 1e18 the product B A overflows and the norm screens see infinities.
    """

    max_message_bytes: int | None = None
    max_header_bytes: int = 1 << 16
    max_steps: int = 16
    max_abs_value: float = 1e4

    def __post_init__(self) -> None:
        if self.max_message_bytes is not None and self.max_message_bytes < 1:
            raise ValueError(f"max_message_bytes is {self.max_message_bytes}: give a positive number or None")
        if self.max_header_bytes < 1 or self.max_steps < 0:
            raise ValueError(f"max_header_bytes {self.max_header_bytes} must be > 0, max_steps {self.max_steps} >= 0")
        if not self.max_abs_value > 0:  # also refuses NaN
            raise ValueError(f"max_abs_value is {self.max_abs_value}: give a positive number")

    def message_bytes(self, template: Template) -> int:
        """Largest message in bytes: the adapter and all claims in float32, with the largest headers allowed."""
        if self.max_message_bytes is not None:
            return self.max_message_bytes
        part = 8 + _max_part_header(template.shapes) + 4 * template.values
        return START + self.max_header_bytes + (1 + 2 * self.max_steps) * part


DEFAULT_LIMITS = Limits()


def encode_tensors(tensors: Tensors) -> bytes:
    """Named tensors as one safetensors blob, float32, names sorted: the same tensors give the same bytes."""
    if "__metadata__" in tensors:
        raise ValueError("a tensor cannot be called __metadata__: safetensors keeps that name for itself")
    # order="C" is not cosmetic: safetensors writes a transposed view in memory order, that is, the wrong numbers
    return bytes(save_safetensors({n: np.asarray(tensors[n], np.float32, order="C") for n in sorted(tensors)}))


def encode_update(update: LoraUpdate, *, run: str) -> bytes:
    """The message a client sends. ValueError if `update.sha256` is not the hash of its tensors."""
    if update.sha256 != tensors_sha256(update.tensors):
        raise ValueError(f"{update.participant}: sha256 is not the hash of the tensors; use tensors_sha256(tensors)")
    blobs = {"adapter": encode_tensors(update.tensors)}
    for branch, claims in (("steps", update.steps), ("shadow", update.shadow)):
        blobs |= {f"{branch}/{i}": encode_tensors(claim) for i, claim in enumerate(claims)}
    header = {
        "format": FORMAT,
        "participant": update.participant,
        "run": run,
        "round": update.round,
        "base_sha256": update.base_sha256,
        "num_examples": update.num_examples,
        "sha256": update.sha256,
        "parts": [[name, len(blob)] for name, blob in blobs.items()],
    }
    return join(MAGIC, header, list(blobs.values()))


def decode_update(
    message: bytes, *, template: Template, run: str, participant: str, limits: Limits = DEFAULT_LIMITS
) -> LoraUpdate | Refusal:
    """Read one message, or say why not. Never raises for what a peer sent.

    `participant` is the sender as the transport authenticated it; the name in the header is only a claim and must
    agree. A message of another run is refused as `wrong_round`. F32, F16 and BF16 tensors are accepted and become
    float32; the header's sha256 is that of the float32 values. The tensors come back read-only: their hash is what
    verdicts and the ledger speak of. `num_examples`, `steps` and `shadow` stay unproven claims.
    """
    if not template.shapes or "__metadata__" in template.shapes:
        raise ValueError("template: needs at least one tensor, and none called __metadata__")
    return decoded_or_refused(lambda: _decode(message, template, run, participant, limits), message, run, participant)


def _decode(message: bytes, template: Template, run: str, participant: str, limits: Limits) -> LoraUpdate:
    limit = limits.message_bytes(template)
    if len(message) > limit:
        raise WireError(Reason.TOO_LARGE, f"message has {len(message)} bytes, limit {limit}")
    header, body = split(message, MAGIC, limits.max_header_bytes, "update")
    num_examples = _check_header(header, template, run, participant)
    branches: dict[str, list[Tensors]] = {"adapter": [], "steps": [], "shadow": []}
    at = 0
    for name, nbytes in _parts(header["parts"], len(body), limits):
        blob = body[at : at + nbytes]
        tensors = decode_tensors(blob, template.shapes, max_abs_value=limits.max_abs_value, what=f"part {name}")
        branches[name.partition("/")[0]].append(tensors)
        at += nbytes
    (adapter,) = branches["adapter"]
    sha256 = tensors_sha256(adapter)
    if sha256 != header["sha256"]:
        sentence = f"adapter has sha256 {sha256}, the header says {show(header['sha256'])}"
        raise WireError(Reason.HASH_MISMATCH, sentence)
    return LoraUpdate(
        participant=participant,
        round=template.round,
        base_sha256=template.base_sha256,
        tensors=adapter,
        sha256=sha256,
        num_examples=num_examples,
        steps=tuple(branches["steps"]),
        shadow=tuple(branches["shadow"]),
    )


def _check_header(header: Header, template: Template, run: str, participant: str) -> int:
    """Keys, types and what the message says it is for -> the claimed num_examples."""
    expected: list[tuple[str, object, Reason]] = [
        ("format", FORMAT, Reason.MALFORMED),
        ("participant", participant, Reason.WRONG_PARTICIPANT),
        ("run", run, Reason.WRONG_ROUND),
        ("round", template.round, Reason.WRONG_ROUND),
        ("base_sha256", template.base_sha256, Reason.WRONG_BASE),
    ]
    check_header(header, HEADER_TYPES, expected)
    examples = header["num_examples"]
    if not isinstance(examples, int) or not 1 <= examples <= MAX_NUM_EXAMPLES:
        raise malformed(f"header: num_examples is {show(examples)}, expected 1 to {MAX_NUM_EXAMPLES}")
    return examples


def _parts(parts: object, available: int, limits: Limits) -> list[tuple[str, int]]:
    """Check the list of parts: names in order, few enough, sizes that add up to exactly the bytes that are there."""
    named: list[tuple[str, int]] = []
    for entry in parts if isinstance(parts, list) else []:
        if not (isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is str and type(entry[1]) is int):
            raise malformed(f"header: a part is {show(entry)}, expected [name, bytes]")
        if entry[1] < 0:
            raise malformed(f"header: part {show(entry[0])} has {show(entry[1])} bytes")
        named.append((entry[0], entry[1]))
    expected = ["adapter"]
    for branch in ("steps", "shadow"):
        count = sum(name.startswith(f"{branch}/") for name, _ in named)
        if count > limits.max_steps:
            raise WireError(Reason.TOO_LARGE, f"{count} {branch} claims, limit {limits.max_steps}")
        expected += [f"{branch}/{i}" for i in range(count)]
    if [name for name, _ in named] != expected:
        # `expected` follows the peer's own counts, so a length that differs means a name that fits nowhere
        found = next((n for (n, _), e in zip(named, expected) if n != e), named[-1][0] if named else None)
        raise malformed(f"header: parts must be adapter, steps/0.., shadow/0.. in this order; found {show(found)}")
    total = sum(size for _, size in named)
    if total != available:
        raise malformed(f"parts are said to have {show(total)} bytes, {available} follow the header")
    return named


def decode_tensors(
    blob: bytes | memoryview, shapes: Shapes, *, max_abs_value: float = math.inf, what: str = "tensors"
) -> dict[str, NDArray[np.float32]]:
    """Read a safetensors blob that must hold exactly `shapes`, as read-only float32 arrays. WireError says why not."""
    view = memoryview(blob)
    out = {}
    for name, (dtype, data) in _layout(view, shapes, what).items():
        array = _to_float32(data, dtype).reshape(shapes[name])
        if not np.isfinite(array).all():
            bad = int(array.size - np.isfinite(array).sum())
            raise WireError(Reason.NOT_FINITE, f"{what}: {name!r} holds {bad} NaN or infinite values")
        peak = max(float(array.max()), -float(array.min())) if array.size else 0.0
        if peak > max_abs_value:
            raise WireError(Reason.OUT_OF_RANGE, f"{what}: {name!r} holds |x| = {peak:.9g}, limit {max_abs_value:g}")
        array.flags.writeable = False
        out[name] = array
    return out


def _layout(view: memoryview, shapes: Shapes, what: str) -> dict[str, tuple[str, memoryview]]:
    """Check a safetensors header against `shapes` and cut the data: name -> dtype, bytes. Touches no number."""
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or length > len(view) - 8:
        raise malformed(f"{what}: tensor header is said to have {length} bytes, the part has {len(view)}")
    if length > (limit := _max_part_header(shapes)):
        raise WireError(Reason.TOO_LARGE, f"{what}: tensor header has {length} bytes, limit {limit}")
    header = json_object(view[8 : 8 + length], f"{what}: tensor header")
    _check_metadata(header.pop("__metadata__", {}), what)
    exact_keys(header, shapes, what, Reason.WRONG_KEYS)
    data = view[8 + length :]
    spans = sorted((*_span(header[name], name, shapes[name], what), name) for name in shapes)
    out, at = {}, 0
    for begin, end, dtype, name in spans:
        if begin != at:
            raise malformed(f"{what}: {name!r} begins at byte {show(begin)}, expected {at} (no gap, no overlap)")
        at = end
        out[name] = (dtype, data[begin:end])
    if at != len(data):
        raise malformed(f"{what}: tensors end at byte {show(at)}, the data has {len(data)}")
    return out


def _span(entry: object, name: str, shape: tuple[int, ...], what: str) -> tuple[int, int, str]:
    """One entry of a safetensors header -> begin, end, dtype, with the size that dtype and shape ask for."""
    if not isinstance(entry, dict):
        raise malformed(f"{what}: entry of {name!r} is {show(entry)}, expected an object")
    exact_keys(entry, {"dtype": 0, "shape": 0, "data_offsets": 0}, f"{what}: entry of {name!r}")
    dtype, found, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise WireError(Reason.WRONG_DTYPE, f"{what}: {name!r} is {show(dtype)}, expected one of {', '.join(DTYPES)}")
    if not _is_ints(found) or not _is_ints(offsets) or len(offsets) != 2:
        raise malformed(f"{what}: shape and data_offsets of {name!r} must be lists of whole numbers >= 0")
    if tuple(found) != tuple(shape):
        text = str(found[:8])[:80]  # a peer's shape may be long and its numbers too
        raise WireError(Reason.WRONG_SHAPE, f"{what}: {name!r} has shape {text}, expected {list(shape)}")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise malformed(f"{what}: {name!r} spans {show(end - begin)} bytes, its dtype and shape need {nbytes}")
    return begin, end, dtype


def _to_float32(data: memoryview, dtype: str) -> NDArray[np.float32]:
    """Little-endian F32, F16 or BF16 bytes -> a new, flat, aligned float32 array."""
    raw: NDArray[Any] = np.frombuffer(data, DTYPES[dtype])
    if dtype == "BF16":  # numpy has no bfloat16; it is the upper half of a float32
        raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN warns when widened; it is refused just after
        return raw.astype(np.float32)


def _check_metadata(metadata: object, what: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise malformed(f"{what}: __metadata__ must map text to text")
    if (size := sum(len(key) + len(value) for key, value in metadata.items())) > MAX_METADATA:
        raise malformed(f"{what}: __metadata__ has {size} characters, limit {MAX_METADATA}")


def _max_part_header(shapes: Shapes) -> int:
    """Bytes a safetensors header may have: every name fully escaped, 200 for its entry, metadata, padding."""
    return sum(len(json.dumps(name)) + 200 for name in shapes) + 8 * MAX_METADATA


def _is_ints(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
