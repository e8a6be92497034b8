"""The wire: what is sent comes back to the bit; all else is refused with the right reason, and nothing is raised."""

import io
import json
import pickle
import struct
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from assay.contribution import LoraUpdate, Refusal, Round, Template, tensors_sha256
from assay.verdict import Reason, screen_round
from assay.wire import (
    FORMAT,
    MAGIC,
    Limits,
    WireError,
    decode_tensors,
    decode_update,
    encode_tensors,
    encode_update,
    missing,
)

RUN, ROUND, BASE = "run-1", 7, "ba" * 32
A, B, V = "m.q.lora_A.weight", "m.q.lora_B.weight", "m.v.lora_B.weight"
SHAPES = {A: (2, 3), B: (3, 2), V: (4,)}
TEMPLATE = Template(SHAPES, BASE, ROUND)
TENSORS = {name: np.random.default_rng(len(name)).normal(size=shape).astype("f4") for name, shape in SHAPES.items()}

fuzz = settings(deadline=None, derandomize=True, max_examples=200)


def update(who: str = "eve", tensors: dict = TENSORS, **changes) -> LoraUpdate:
    plain = LoraUpdate(
        participant=who, round=ROUND, base_sha256=BASE, tensors=tensors, sha256=tensors_sha256(tensors), num_examples=5
    )
    return replace(plain, **changes)


def decode(message: bytes, who: str = "eve", template: Template = TEMPLATE, **kwargs) -> LoraUpdate | Refusal:
    return decode_update(message, template=template, run=RUN, participant=who, **kwargs)


def envelope(header: bytes, body: bytes = b"") -> bytes:
    return MAGIC + struct.pack("<I", len(header)) + header + body


def fields(who: str, blobs: dict[str, bytes], /, **changes) -> dict:
    return {
        "format": FORMAT,
        "participant": who,
        "run": RUN,
        "round": ROUND,
        "base_sha256": BASE,
        "num_examples": 5,
        "sha256": tensors_sha256(TENSORS),
        "parts": [[name, len(blob)] for name, blob in blobs.items()],
    } | changes


def pack(who: str, blobs: dict[str, bytes] | None = None, /, drop: str = "", **changes) -> bytes:
    """A message whose header is right except for `changes`."""
    blobs = {"adapter": encode_tensors(TENSORS)} if blobs is None else blobs
    header = fields(who, blobs, **changes)
    header.pop(drop, None)
    return envelope(json.dumps(header).encode(), b"".join(blobs.values()))


def blob(
    tensors: dict, header: dict | None = None, dtype: str = "F32", tail: bytes = b"", meta: object = None
) -> bytes:
    """A safetensors blob by hand: `header` overrides entries (None drops one)."""
    entries, data = {} if meta is None else {"__metadata__": meta}, b""
    for name, array in tensors.items():
        raw = array.tobytes()
        span = [len(data), len(data) + len(raw)]
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": span}
        data += raw
    for name, entry in (header or {}).items():
        entries[name] = {**entries.get(name, {}), **entry} if isinstance(entry, dict) else entry
    raw = json.dumps({name: entry for name, entry in entries.items() if entry is not None}).encode()
    return struct.pack("<Q", len(raw)) + raw + data + tail


def with_header(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw + b"\0" * 64


def put(value: float, name: str = B) -> dict:
    """The good tensors with one value replaced."""
    changed = TENSORS[name].copy()
    changed.flat[1] = value
    return {**TENSORS, name: changed}


def honest(tensors: dict) -> Callable[[str], bytes]:
    """A message that is right in itself: it carries the hash of what it carries."""
    return lambda who: pack(who, {"adapter": encode_tensors(tensors)}, sha256=tensors_sha256(tensors))


def adapter(raw: bytes) -> Callable[[str], bytes]:
    return lambda who: pack(who, {"adapter": raw})


def header(**changes) -> Callable[[str], bytes]:
    return lambda who: pack(who, **changes)


def text(old: str, new: str) -> Callable[[str], bytes]:
    """The good header with a piece of its JSON text replaced."""

    def make(who: str) -> bytes:
        body = encode_tensors(TENSORS)
        raw = json.dumps(fields(who, {"adapter": body}))
        assert old in raw
        return envelope(raw.replace(old, new, 1).encode(), body)

    return make


def cut(keep: float) -> Callable[[str], bytes]:
    return lambda who: pack(who)[: int(len(pack(who)) * keep)]


def swapped_ends(who: str) -> bytes:
    """Two tensors of equal size whose offsets both point at the first one's bytes."""
    return pack(who, {"adapter": blob(TENSORS, {B: {"data_offsets": [0, 24]}})})


def pickled(who: str) -> bytes:
    return pickle.dumps({"participant": who, "adapter": TENSORS})


def npz(who: str) -> bytes:
    file = io.BytesIO()
    np.savez(file, **TENSORS)
    return file.getvalue()


def torch_zip(who: str) -> bytes:
    file = io.BytesIO()
    torch.save({name: torch.from_numpy(value) for name, value in TENSORS.items()}, file)
    return file.getvalue()


def without(name: str) -> dict:
    return {n: t for n, t in TENSORS.items() if n != name}


def claims(branch: str, count: int, raw: bytes | None = None) -> Callable[[str], bytes]:
    good = encode_tensors(TENSORS)
    return lambda who: pack(who, {"adapter": good} | {f"{branch}/{i}": raw or good for i in range(count)})


GOOD = encode_tensors(TENSORS)
M, D = Reason.MALFORMED, Reason.WRONG_DTYPE
CASES: dict[str, tuple[Reason, Callable[[str], bytes]]] = {
    # not a message at all
    "empty": (M, lambda who: b""),
    "one byte": (M, lambda who: b"A"),
    "magic only": (M, lambda who: MAGIC),
    "wrong magic": (M, lambda who: b"ASSAYLU9" + pack(who)[8:]),
    "pickle": (M, pickled),
    "npz": (M, npz),
    "torch.save": (M, torch_zip),
    "bare safetensors": (M, lambda who: GOOD),
    "html": (M, lambda who: b"<script>alert(1)</script>" * 9),
    "too large": (Reason.TOO_LARGE, lambda who: pack(who) + bytes(Limits().message_bytes(TEMPLATE))),
    **{f"cut at {keep}": (M, cut(keep)) for keep in (0.005, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999)},
    "one byte more": (M, lambda who: pack(who) + b"\0"),
    "sent twice in one": (M, lambda who: pack(who) * 2),
    # the header as JSON
    "header length of 4 GB": (M, lambda who: MAGIC + b"\xff" * 4 + pack(who)[12:]),
    "huge header": (Reason.TOO_LARGE, lambda who: envelope(b'{"a":"' + b"x" * 70_000 + b'"}')),
    "nested lists": (M, lambda who: envelope(b"[" * 60_000)),
    "nested objects": (M, lambda who: envelope(b'{"a":' * 12_000)),
    "nested value": (M, text(f'"{RUN}"', "[" * 400 + "]" * 400)),
    "not utf-8": (M, lambda who: envelope(b'{"format": "\xff\xfe"}')),
    "utf-16": (M, lambda who: envelope(json.dumps(fields(who, {"adapter": GOOD})).encode("utf-16"), GOOD)),
    "byte order mark": (M, lambda who: envelope(b"\xef\xbb\xbf" + json.dumps(fields(who, {})).encode())),
    "a list": (M, lambda who: envelope(b"[]")),
    "null": (M, lambda who: envelope(b"null")),
    "empty header": (M, lambda who: envelope(b"")),
    "duplicate key": (M, text('"round": 7', '"round": 6, "round": 7')),
    "NaN literal": (M, text('"num_examples": 5', '"num_examples": NaN')),
    "Infinity literal": (M, text('"round": 7', '"round": Infinity')),
    "integer of 9000 digits": (M, text('"round": 7', '"round": ' + "7" * 9000)),
    "unknown key": (M, header(weight=1.0)),
    **{f"no {key}": (M, header(drop=key)) for key in fields("", {})},
    # what it is for
    "other format": (M, header(format="assay.rollout/1")),
    "other participant": (Reason.WRONG_PARTICIPANT, header(participant="good-0")),
    "lone surrogate": (Reason.WRONG_PARTICIPANT, header(participant="\ud800")),
    "long participant": (Reason.WRONG_PARTICIPANT, header(participant="\u202e\n" * 5000)),
    "participant is null": (M, header(participant=None)),
    "other run": (Reason.WRONG_ROUND, header(run="run-2")),
    "replay": (Reason.WRONG_ROUND, header(round=ROUND - 1)),
    "future round": (Reason.WRONG_ROUND, header(round=ROUND + 1)),
    "huge round": (Reason.WRONG_ROUND, header(round=10**4000)),
    "round is a float": (M, header(round=7.0)),
    "round is text": (M, header(round="7")),
    "other base model": (Reason.WRONG_BASE, header(base_sha256="cc" * 32)),
    "base is a number": (M, header(base_sha256=1)),
    **{
        f"num_examples {value!r}": (M, header(num_examples=value))
        for value in (-1, 0, 5.0, True, 10**18, 10**9 + 1, "5", None, [5], 1e300)
    },
    # the hash
    "other hash": (Reason.HASH_MISMATCH, header(sha256="0" * 64)),
    "hash in capitals": (Reason.HASH_MISMATCH, header(sha256=tensors_sha256(TENSORS).upper())),
    "no hash": (Reason.HASH_MISMATCH, header(sha256="")),
    "hash is a number": (M, header(sha256=0)),
    "one value changed": (Reason.HASH_MISMATCH, adapter(encode_tensors(put(0.123)))),
    "minus zero": (Reason.HASH_MISMATCH, lambda who: pack(who, {"adapter": encode_tensors(put(-0.0))},
                                                         sha256=tensors_sha256(put(0.0)))),
    # the list of parts
    "no parts": (M, lambda who: pack(who, {})),
    "parts too short": (M, header(parts=[["adapter", len(GOOD) - 1]])),
    "parts too long": (M, header(parts=[["adapter", len(GOOD) + 1]])),
    "parts of 10**4000 bytes": (M, header(parts=[["adapter", 10**4000]])),
    "negative part": (M, header(parts=[["adapter", len(GOOD) + 8], ["steps/0", -8]])),
    "part size is a float": (M, header(parts=[["adapter", float(len(GOOD))]])),
    "part size is a bool": (M, header(parts=[["adapter", True]])),
    "part of three": (M, header(parts=[["adapter", len(GOOD), 0]])),
    "part is text": (M, header(parts=["adapter"])),
    "parts is an object": (M, header(parts={"adapter": len(GOOD)})),
    "two adapters": (M, header(parts=[["adapter", len(GOOD)], ["adapter", 0]])),
    "claims first": (M, lambda who: pack(who, {"steps/0": GOOD, "adapter": GOOD})),
    "shadow before steps": (M, lambda who: pack(who, {"adapter": GOOD, "shadow/0": GOOD, "steps/0": GOOD})),
    "steps/1 without steps/0": (M, lambda who: pack(who, {"adapter": GOOD, "steps/1": GOOD})),
    "unknown part": (M, lambda who: pack(who, {"adapter": GOOD, "../../etc/passwd": GOOD})),
    "too many steps": (Reason.TOO_LARGE, claims("steps", 17)),
    "too many shadows": (Reason.TOO_LARGE, claims("shadow", 17)),
    "empty part": (M, adapter(b"")),
    "bad claim": (M, claims("steps", 1, b"\0" * 40)),
    "NaN in a claim": (Reason.NOT_FINITE, claims("shadow", 2, encode_tensors(put(np.nan)))),
    # the tensor header
    "pickle as part": (M, adapter(pickle.dumps(TENSORS))),
    "tensor header of 2**63": (M, adapter(struct.pack("<Q", 2**63) + GOOD[8:])),
    "huge tensor header": (Reason.TOO_LARGE, adapter(with_header(b'{"a":"' + b"x" * 100_000 + b'"}'))),
    "nested tensor header": (M, adapter(with_header(b"[" * 30_000))),
    "tensor header not utf-8": (M, adapter(with_header(b'{"\xff": 0}'))),
    "NaN in tensor header": (M, adapter(with_header(b'{"a": NaN}'))),
    "duplicate tensor": (M, adapter(with_header(f'{{"{A}": {{}}, "{A}": {{}}}}'.encode()))),
    "entry is a list": (M, adapter(blob(TENSORS, {A: []}))),
    "entry with more": (M, adapter(blob(TENSORS, {A: {"loader": "os.system"}}))),
    "metadata not text": (M, adapter(blob(TENSORS, meta={"format": 1}))),
    "metadata is a list": (M, adapter(blob(TENSORS, meta=["pt"]))),
    "much metadata": (M, adapter(blob(TENSORS, meta={"x": "y" * 5000}))),
    # names, shapes, dtypes
    "no tensors": (Reason.WRONG_KEYS, adapter(blob({}))),
    "missing tensor": (Reason.WRONG_KEYS, honest(without(V))),
    "extra tensor": (Reason.WRONG_KEYS, honest({**TENSORS, "lm_head.weight": TENSORS[A]})),
    "renamed tensor": (Reason.WRONG_KEYS, honest({**without(V), "m.v.lora_C.weight": TENSORS[V]})),
    "name in capitals": (Reason.WRONG_KEYS, honest({**without(V), V.upper(): TENSORS[V]})),
    "surrogate tensor name": (Reason.WRONG_KEYS, adapter(blob({**TENSORS, "\ud800": TENSORS[V]}))),
    "wrong shape": (Reason.WRONG_SHAPE, honest({**TENSORS, A: np.zeros((4, 3), "f4")})),
    "broadcastable shape": (Reason.WRONG_SHAPE, honest({**TENSORS, A: np.zeros((1, 3), "f4")})),
    "scalar": (Reason.WRONG_SHAPE, honest({**TENSORS, A: np.float32(1.0)})),
    "transposed": (Reason.WRONG_SHAPE, honest({**TENSORS, A: TENSORS[A].T.copy()})),
    "flattened": (Reason.WRONG_SHAPE, honest({**TENSORS, A: TENSORS[A].ravel()})),
    "one axis more": (Reason.WRONG_SHAPE, honest({**TENSORS, V: TENSORS[V][:, None]})),
    "huge shape": (Reason.WRONG_SHAPE, adapter(blob(TENSORS, {A: {"shape": [2**40, 2**40]}}))),
    "negative shape": (M, adapter(blob(TENSORS, {A: {"shape": [-2, -3]}}))),
    "shape of floats": (M, adapter(blob(TENSORS, {A: {"shape": [2.0, 3.0]}}))),
    "shape of bools": (M, adapter(blob(TENSORS, {A: {"shape": [True, 6]}}))),
    "shape is null": (M, adapter(blob(TENSORS, {A: {"shape": None}}))),
    "I64": (D, adapter(blob({n: t.astype("i8") for n, t in TENSORS.items()}, dtype="I64"))),
    "F64": (D, adapter(blob({n: t.astype("f8") for n, t in TENSORS.items()}, dtype="F64"))),
    "BOOL": (D, adapter(blob({n: t > 0 for n, t in TENSORS.items()}, dtype="BOOL"))),
    "unknown dtype": (D, adapter(blob(TENSORS, dtype="float32"))),
    "dtype is a list": (D, adapter(blob(TENSORS, {A: {"dtype": ["F32"]}}))),
    # offsets
    "F32 said to be F16": (M, adapter(blob(TENSORS, {A: {"dtype": "F16"}}))),
    "overlap": (M, swapped_ends),
    "gap": (M, adapter(blob(TENSORS, {V: {"data_offsets": [52, 68]}}, tail=b"\0" * 4))),
    "hole at the start": (M, adapter(blob({"pad": TENSORS[V], **TENSORS}, {"pad": None}))),
    "hidden tail": (M, adapter(blob(TENSORS, tail=b"MZ\x90\0" * 4))),
    "out of file": (M, adapter(blob(TENSORS, {V: {"data_offsets": [2**62, 2**62 + 16]}}))),
    "last tensor cut": (M, adapter(blob(TENSORS)[:-4])),
    "negative offsets": (M, adapter(blob(TENSORS, {A: {"data_offsets": [-24, 0]}}))),
    "reversed offsets": (M, adapter(blob(TENSORS, {A: {"data_offsets": [24, 0]}}))),
    "one offset": (M, adapter(blob(TENSORS, {A: {"data_offsets": [0]}}))),
    "offsets of floats": (M, adapter(blob(TENSORS, {A: {"data_offsets": [0.0, 24.0]}}))),
    # values
    "NaN": (Reason.NOT_FINITE, honest(put(np.nan))),
    "+Inf": (Reason.NOT_FINITE, honest(put(np.inf))),
    "-Inf": (Reason.NOT_FINITE, honest(put(-np.inf))),
    "1e38": (Reason.OUT_OF_RANGE, honest(put(1e38))),
    "-1e38": (Reason.OUT_OF_RANGE, honest(put(-1e38))),
    "just above the limit": (Reason.OUT_OF_RANGE, honest(put(np.nextafter(np.float32(1e4), np.float32(2e4))))),
    "F16 infinity": (Reason.NOT_FINITE, adapter(blob({n: np.full(s, np.inf, "f2") for n, s in SHAPES.items()},
                                                     dtype="F16"))),
    "F16 signalling NaN": (Reason.NOT_FINITE, adapter(blob({n: np.full(s, 0x7D01, "u2") for n, s in SHAPES.items()},
                                                           dtype="F16"))),
    "BF16 NaN": (Reason.NOT_FINITE, adapter(blob({n: np.full(s, 0x7FC1, "u2") for n, s in SHAPES.items()},
                                                 dtype="BF16"))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_message_is_refused_with_its_reason(name: str):
    reason, make = CASES[name]
    message = make("eve")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused = decode(message)
    assert isinstance(refused, Refusal)
    assert (refused.reason, refused.participant) == (reason.value, "eve"), refused.sentence
    assert_readable(refused)


def assert_readable(refused: Refusal) -> None:
    """A sentence goes into ledgers, terminals and pages: one printable line of bounded length, no crash behind it."""
    assert 0 < len(refused.sentence) < 500
    assert refused.sentence.isprintable(), refused.sentence
    assert "internal error" not in refused.sentence, refused.sentence


def test_all_of_them_in_one_round_leave_the_honest_untouched():
    messages = {f"bad-{i}": make(f"bad-{i}") for i, (_, make) in enumerate(CASES.values())}
    expected = {f"bad-{i}": reason for i, (reason, _) in enumerate(CASES.values())}
    messages |= {f"good-{i}": encode_update(update(f"good-{i}"), run=RUN) for i in range(2)}
    decoded = [decode(message, who) for who, message in messages.items()] + [missing("silent")]
    updates = tuple(item for item in decoded if isinstance(item, LoraUpdate))
    refused = tuple(item for item in decoded if isinstance(item, Refusal))
    start = {name: np.zeros(shape, "f4") for name, shape in SHAPES.items()}
    out = screen_round(Round(index=ROUND, start=start, initial=start, updates=updates, refused=refused), [])

    assert len(CASES) >= 45
    assert out.weight.keys() == {*messages, "silent"}
    assert {who: weight for who, weight in out.weight.items() if weight} == {"good-0": 1.0, "good-1": 1.0}
    assert {who: verdict.reason for who, verdict in out.deciding.items()} == expected | {"silent": Reason.MISSING}


def test_a_message_comes_back_as_it_was_sent():
    steps = tuple({n: t + i for n, t in TENSORS.items()} for i in range(3))
    sent = update(steps=steps, shadow=steps[:1])
    got = decode(encode_update(sent, run=RUN))
    assert isinstance(got, LoraUpdate)
    assert (got.participant, got.round, got.base_sha256, got.sha256) == ("eve", ROUND, BASE, sent.sha256)
    assert (got.num_examples, len(got.steps), len(got.shadow)) == (5, 3, 1)
    for mine, theirs in zip((sent.tensors, *sent.steps, *sent.shadow), (got.tensors, *got.steps, *got.shadow)):
        assert tensors_sha256(mine) == tensors_sha256(theirs)
    with pytest.raises(ValueError, match="read-only"):
        got.tensors[A][0, 0] = 1.0


@st.composite
def adapters(draw) -> tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """dtype, arrays as sent, the same as float32."""
    dtype = draw(st.sampled_from(["F32", "F16", "BF16"]))
    names = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")
    sent, plain = {}, {}
    for name in draw(st.lists(names, min_size=1, max_size=4, unique=True)):
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
        width = 16 if dtype == "F16" else 32
        values = draw(hnp.arrays(f"f{width // 8}", shape, elements=st.floats(-1e4, 1e4, width=width)))
        if dtype == "BF16":
            sent[name] = np.asarray(values.view("u4") >> 16, "u2")
            plain[name] = (sent[name].astype("u4") << 16).view("f4")
        else:
            sent[name], plain[name] = values, np.asarray(values, "f4")
    return dtype, sent, plain


@given(adapters())
@fuzz
def test_round_trip_of_any_shape_value_and_dtype(drawn):
    dtype, sent, plain = drawn
    template = Template({name: array.shape for name, array in plain.items()}, BASE, ROUND)
    by_hand = pack("eve", {"adapter": blob(sent, dtype=dtype, meta={"format": "pt"})}, sha256=tensors_sha256(plain))
    for message in (by_hand, encode_update(update(tensors=plain), run=RUN)):
        got = decode(message, template=template)
        assert isinstance(got, LoraUpdate), got.sentence
        assert got.tensors.keys() == plain.keys()
        for name, array in plain.items():
            assert got.tensors[name].shape == array.shape
            assert got.tensors[name].dtype == np.float32
            assert got.tensors[name].tobytes() == array.tobytes()


def test_equal_tensors_give_equal_bytes():
    strided = {n: np.repeat(t, 2, axis=0)[::2] for n, t in reversed(TENSORS.items())}
    assert encode_tensors(strided) == GOOD
    # the library alone writes Fortran-ordered arrays in memory order, that is, other numbers
    assert encode_tensors({n: np.asfortranarray(t) for n, t in TENSORS.items()}) == GOOD


def test_padded_and_reordered_tensors_are_the_same_contribution():
    reordered = blob(dict(reversed(TENSORS.items())))
    length = int.from_bytes(reordered[:8], "little")
    padded = struct.pack("<Q", length + 5) + reordered[8 : 8 + length] + b" " * 5 + reordered[8 + length :]
    got = decode(pack("eve", {"adapter": padded}))
    assert isinstance(got, LoraUpdate)
    assert got.sha256 == tensors_sha256(TENSORS)


mutation = st.tuples(
    st.sampled_from(["flip", "insert", "delete", "copy", "set"]),
    st.integers(0, 2**16),
    st.integers(0, 2**16),
    st.binary(min_size=1, max_size=8),
)


def mutate(message: bytes, ops: list) -> bytes:
    data = bytearray(message)
    for kind, at, other, raw in ops:
        if not data:
            break
        at, other = at % len(data), other % len(data)
        if kind == "flip":
            data[at] ^= 1 << other % 8
        elif kind == "insert":
            data[at:at] = raw
        elif kind == "delete":
            del data[min(at, other) : max(at, other)]
        elif kind == "copy":
            data[at:at] = data[other : other + 64]
        else:
            data[at : at + len(raw)] = raw
    return bytes(data)


@given(st.lists(mutation, min_size=1, max_size=4), st.booleans())
@settings(fuzz, max_examples=600)
def test_a_mutated_message_is_refused_or_the_same_contribution(ops, with_claims):
    sent = update(steps=(TENSORS,)) if with_claims else update()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = decode(mutate(encode_update(sent, run=RUN), ops))
    if isinstance(got, Refusal):
        assert_readable(got)
    else:  # num_examples and steps are claims, not covered by the hash
        assert tensors_sha256(got.tensors) == got.sha256 == sent.sha256
        assert (got.participant, got.round, got.base_sha256) == ("eve", ROUND, BASE)


@given(st.binary(max_size=400), st.sampled_from([b"", MAGIC, MAGIC + b"\x02\0\0\0{}"]))
@fuzz
def test_random_bytes_are_refused(raw, prefix):
    refused = decode(prefix + raw)
    assert isinstance(refused, Refusal)
    assert_readable(refused)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(fields("", {}))), json_values, st.sampled_from(["dtype", "shape", "data_offsets"]))
@fuzz
def test_any_json_value_in_any_field_is_refused_or_harmless(key, value, inner):
    for message in (pack("eve", **{key: value}), adapter(blob(TENSORS, {A: {inner: value}}))("eve")):
        got = decode(message)
        if isinstance(got, Refusal):
            assert_readable(got)
        else:
            assert got.sha256 == tensors_sha256(TENSORS)


def test_limits_are_the_operators():
    message = encode_update(update(steps=(TENSORS, TENSORS)), run=RUN)
    assert isinstance(decode(message), LoraUpdate)
    for limits, reason in [
        (Limits(max_message_bytes=len(message) - 1), Reason.TOO_LARGE),
        (Limits(max_header_bytes=100), Reason.TOO_LARGE),
        (Limits(max_steps=1), Reason.TOO_LARGE),
        (Limits(max_abs_value=0.5), Reason.OUT_OF_RANGE),
    ]:
        got = decode(message, limits=limits)
        assert isinstance(got, Refusal)
        assert got.reason == reason.value
    assert isinstance(decode(message, limits=Limits(max_message_bytes=len(message))), LoraUpdate)
    assert isinstance(decode(honest(put(1e4))("eve")), LoraUpdate)  # the limit itself is allowed


def test_the_largest_allowed_message_fits_the_derived_limit():
    full = tuple(TENSORS for _ in range(Limits().max_steps))
    assert isinstance(decode(encode_update(update(steps=full, shadow=full), run=RUN)), LoraUpdate)


def test_the_operators_mistakes_raise():
    message = encode_update(update(), run=RUN)
    with pytest.raises(TypeError, match="message must be bytes"):
        decode("text")
    with pytest.raises(TypeError, match="participant"):
        decode(message, who=None)
    with pytest.raises(ValueError, match="at least one tensor"):
        decode(message, template=Template({}, BASE, ROUND))
    with pytest.raises(ValueError, match="not the hash"):
        encode_update(update(sha256="0" * 64), run=RUN)
    with pytest.raises(ValueError, match="__metadata__"):
        encode_tensors({"__metadata__": TENSORS[A]})
    for bad in ({"max_steps": -1}, {"max_header_bytes": 0}, {"max_abs_value": float("nan")}, {"max_message_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Limits(**bad)


def test_decode_tensors_alone_says_what_is_wrong():
    assert tensors_sha256(decode_tensors(GOOD, SHAPES)) == tensors_sha256(TENSORS)
    with pytest.raises(WireError, match=r"'m\.q\.lora_A\.weight' has shape \[2, 3\], expected \[3, 2\]") as caught:
        decode_tensors(GOOD, {**SHAPES, A: (3, 2)})
    assert caught.value.reason is Reason.WRONG_SHAPE


def test_missing():
    refused = missing("silent")
    assert (refused.participant, refused.reason) == ("silent", "missing")
