"""Completions on the wire: they come back as sent; all else is refused with the right reason, and nothing is raised."""

import json
import pickle
import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from assay.contribution import Completion, Refusal, Rollout, completion_sha256, pool_sha256
from assay.verdict import Reason
from assay.wire import MAGIC as UPDATE_MAGIC
from assay.wire import RolloutTemplate, decode_rollout, encode_rollout
from assay.wire.rollout import FORMAT, MAGIC

RUN, ROUND, MODEL, VOCABULARY, MAX_TOKENS = "run-1", 7, "ba" * 32, 300, 9
TEMPLATE = RolloutTemplate(
    round=ROUND, asked={3: 2, 11: 1}, model_sha256=MODEL, vocabulary=VOCABULARY, max_tokens=MAX_TOKENS
)
IDS = {(3, 0): (5, 6, 299), (3, 1): (0,), (11, 0): (1, 2, 3, 4, 5, 6, 7, 8, 9)}

fuzz = settings(deadline=None, derandomize=True, max_examples=200)


def completion(prompt: int, index: int, ids: tuple[int, ...], who: str = "eve", round: int = ROUND) -> Completion:
    return Completion(
        participant=who,
        round=round,
        prompt=prompt,
        index=index,
        ids=ids,
        sha256=completion_sha256(round, prompt, index, ids),
    )


def rollout(ids: dict = IDS, who: str = "eve", round: int = ROUND, model_sha256: str = MODEL) -> Rollout:
    completions = tuple(completion(prompt, index, ids[prompt, index], who, round) for prompt, index in sorted(ids))
    return Rollout(participant=who, round=round, model_sha256=model_sha256, completions=completions)


SENT = rollout()
GOOD = encode_rollout(SENT, run=RUN)


def decode(message: bytes, template: RolloutTemplate = TEMPLATE, who: str = "eve", **kwargs) -> Rollout | Refusal:
    return decode_rollout(message, template=template, run=RUN, participant=who, **kwargs)


def envelope(header: bytes, body: bytes = b"", magic: bytes = MAGIC) -> bytes:
    return magic + struct.pack("<I", len(header)) + header + body


def raw_ids(ids: dict) -> bytes:
    """Token ids by hand, each four bytes."""
    return b"".join(token.to_bytes(4, "little") for own in ids.values() for token in own)


def fields(ids: dict = IDS, **changes) -> dict:
    return {
        "format": FORMAT,
        "participant": "eve",
        "run": RUN,
        "round": ROUND,
        "model_sha256": MODEL,
        "sha256": pool_sha256([completion(*place, own) for place, own in ids.items()]),
        "completions": [[prompt, index, len(own)] for (prompt, index), own in ids.items()],
    } | changes


def pack(ids: dict = IDS, /, drop: str = "", body: bytes | None = None, **changes) -> bytes:
    """A message made by hand, in the order of `ids`; right in itself but for `changes`."""
    header = fields(ids, **changes)
    header.pop(drop, None)
    return envelope(json.dumps(header).encode(), raw_ids(ids) if body is None else body)


def entries(*listed: object, tokens: int = 0) -> bytes:
    """A message with this list of completions and `tokens` ids behind it."""
    return pack(completions=list(listed), body=bytes(4 * tokens))


def text(old: str, new: str) -> bytes:
    """The good header with a piece of its JSON text replaced."""
    header = json.dumps(fields())
    assert old in header
    return envelope(header.replace(old, new, 1).encode(), raw_ids(IDS))


def lying_header(length: int) -> bytes:
    return MAGIC + struct.pack("<I", length) + GOOD[12:]


def padded_header(length: int) -> bytes:
    return json.dumps(fields()).encode().ljust(length)


def assert_readable(refused: Refusal) -> None:
    """A sentence goes into ledgers, terminals and pages: one printable line of bounded length, no crash behind it."""
    assert 0 < len(refused.sentence) < 500
    assert refused.sentence.isprintable(), refused.sentence
    assert "internal error" not in refused.sentence, refused.sentence


def test_the_message_by_hand_is_the_message_of_the_encoder():
    by_hand = envelope(json.dumps(fields(), separators=(",", ":")).encode(), raw_ids(IDS))
    assert encode_rollout(SENT, run=RUN) == by_hand
    assert decode(by_hand) == SENT


tokens = st.integers(0, VOCABULARY - 1)
places = st.tuples(st.integers(0, 2**63 - 1) | st.integers(0, 3), st.integers(0, 4))
plans = st.dictionaries(places, st.lists(tokens, min_size=1, max_size=MAX_TOKENS).map(tuple), max_size=6)


def covering(ids: dict, **changes) -> RolloutTemplate:
    """A template that asked for just enough."""
    asked: dict[int, int] = {}
    for prompt, index in ids:
        asked[prompt] = max(asked.get(prompt, 0), index + 1)
    return replace(TEMPLATE, asked=asked, **changes)


@given(plans, st.text(st.characters(codec="utf-8"), max_size=20), st.integers(0, 2**63 - 1))
@example({}, "", 0)
@fuzz
def test_what_is_sent_comes_back(ids, who, round):
    sent = rollout(ids, who, round)
    got = decode(encode_rollout(sent, run=RUN), covering(ids, round=round), who)
    assert got == sent
    assert got.sha256 == sent.sha256
    for each in got.completions:
        assert each.sha256 == completion_sha256(round, each.prompt, each.index, ids[each.prompt, each.index])
        assert all(type(token) is int for token in each.ids)


@given(plans, st.randoms(use_true_random=False))
@fuzz
def test_order_of_sending_does_not_matter(ids, rng):
    order = list(ids)
    rng.shuffle(order)
    mixed = {place: ids[place] for place in order}
    sent = rollout(ids)
    shuffled = replace(sent, completions=tuple(completion(*place, ids[place]) for place in order))
    assert encode_rollout(shuffled, run=RUN) == encode_rollout(sent, run=RUN)
    assert decode(pack(mixed), covering(ids)) == sent


def test_the_largest_rollout_of_a_plan_fits_its_limit():
    largest = 2**63 - 1
    asked = {largest - i: 5 for i in range(40)}
    ids = {(prompt, index): (2**32 - 1,) * 50 for prompt in asked for index in range(5)}
    template = RolloutTemplate(round=largest, asked=asked, model_sha256=None, vocabulary=2**32, max_tokens=50)
    who = "x" * 500
    sent = rollout(ids, who, largest)
    message = encode_rollout(sent, run=RUN)
    assert decode(message, template, who) == sent
    assert isinstance(decode(message, replace(template, vocabulary=2**32 - 1), who), Refusal)


def test_fewer_completions_than_asked_are_returned():
    for short in ({(3, 1): (4,)}, {(11, 0): (4,)}, {(3, 0): (4,), (11, 0): (4,)}):
        assert decode(encode_rollout(rollout(short), run=RUN)) == rollout(short)


def test_nothing_asked_and_nothing_sent_is_no_offence():
    assert decode(pack({}), replace(TEMPLATE, asked={})) == rollout({})


def test_a_heterogeneous_swarm_takes_any_model():
    other = encode_rollout(rollout(model_sha256="cd" * 32), run=RUN)
    assert decode(other, replace(TEMPLATE, model_sha256=None)) == rollout(model_sha256="cd" * 32)
    assert decode(other).reason == "wrong_base"
    for claim in ("", "CD" * 32, "cd" * 31, "cd" * 32 + "\n", "g" * 64):
        assert decode(pack(model_sha256=claim), replace(TEMPLATE, model_sha256=None)).reason == "malformed"


M, L, R = Reason.MALFORMED, Reason.TOO_LARGE, Reason.OUT_OF_RANGE
BAD_UTF8 = json.dumps(fields(participant="?")).encode().replace(b"?", b"\xff\xfe")
CASES: dict[str, tuple[Reason, Callable[[], bytes]]] = {
    # the envelope
    "no bytes": (M, lambda: b""),
    "magic only": (M, lambda: MAGIC),
    "no header": (M, lambda: MAGIC + b"\0\0\0\0"),
    "pickle": (M, lambda: pickle.dumps({"completions": IDS})),
    "an update": (M, lambda: UPDATE_MAGIC + GOOD[8:]),
    "another version": (M, lambda: b"ASSAYRO2" + GOOD[8:]),
    "shifted by a byte": (M, lambda: b"\0" + GOOD),
    "10 MB of zeros": (L, lambda: bytes(10**7)),
    "10 MB behind a good message": (L, lambda: GOOD + bytes(10**7)),
    "10 MB of header": (L, lambda: envelope(b" " * 10**7)),
    "header longer than the message": (M, lambda: lying_header(2**32 - 1)),
    "header cut": (M, lambda: lying_header(struct.unpack_from("<I", GOOD, 8)[0] - 1)),
    "header reaches into the ids": (M, lambda: lying_header(struct.unpack_from("<I", GOOD, 8)[0] + 4)),
    "header above its limit": (L, lambda: envelope(padded_header(TEMPLATE.header_bytes + 1), raw_ids(IDS))),
    "invalid UTF-8": (M, lambda: envelope(BAD_UTF8, raw_ids(IDS))),
    "UTF-16": (M, lambda: envelope(json.dumps(fields()).encode("utf-16"), raw_ids(IDS))),
    "byte order mark": (M, lambda: envelope(b"\xef\xbb\xbf" + json.dumps(fields()).encode(), raw_ids(IDS))),
    "no JSON": (M, lambda: text("{", "(")),
    "two JSON values": (M, lambda: text('{"format"', '{} {"format"')),
    "a list": (M, lambda: envelope(b"[]")),
    "deep lists": (M, lambda: text("[[3, 0, 3]", "[" * 5000)),
    "deep objects": (M, lambda: text("[[3, 0, 3]", '{"a":' * 2000)),
    "integer of 9000 digits": (M, lambda: text('"round": 7', '"round": ' + "7" * 9000)),
    "NaN": (M, lambda: text("[3, 0, 3]", "[3, 0, NaN]")),
    "key named twice": (M, lambda: text('"round": 7', '"round": 7, "round": 7')),
    **{f"no {key}": (M, lambda key=key: pack(drop=key)) for key in fields()},
    **{f"{key} is null": (M, lambda key=key: pack(**{key: None})) for key in fields()},
    "unknown key": (M, lambda: pack(reward=1.0)),
    "another format": (M, lambda: pack(format="assay.rollout/2")),
    # who, when, from what
    "in another's name": (Reason.WRONG_PARTICIPANT, lambda: pack(participant="alice")),
    "name with a space": (Reason.WRONG_PARTICIPANT, lambda: pack(participant="eve ")),
    "surrogate name": (Reason.WRONG_PARTICIPANT, lambda: pack(participant="\ud800")),
    "replay of the round before": (Reason.WRONG_ROUND, lambda: encode_rollout(rollout(round=ROUND - 1), run=RUN)),
    "round to come": (Reason.WRONG_ROUND, lambda: encode_rollout(rollout(round=ROUND + 1), run=RUN)),
    "another run": (Reason.WRONG_ROUND, lambda: encode_rollout(SENT, run="run-2")),
    "round of 4000 digits": (Reason.WRONG_ROUND, lambda: text('"round": 7', '"round": ' + "7" * 4000)),
    "round is a float": (M, lambda: pack(round=7.0)),
    "round is true": (M, lambda: pack(round=True)),
    "another model": (Reason.WRONG_BASE, lambda: pack(model_sha256="cd" * 32)),
    "no model": (Reason.WRONG_BASE, lambda: pack(model_sha256="")),
    # the list of completions
    "nothing": (Reason.MISSING, lambda: pack({})),
    "completions is an object": (M, lambda: pack(completions={})),
    "a completion is a number": (M, lambda: entries(3)),
    "a completion of two numbers": (M, lambda: entries([3, 0], tokens=1)),
    "a completion of four numbers": (M, lambda: entries([3, 0, 1, 1], tokens=1)),
    "a completion as text": (M, lambda: entries(["3", "0", "1"], tokens=1)),
    "a completion of booleans": (M, lambda: entries([3, False, True], tokens=1)),
    "a completion of floats": (M, lambda: entries([3.0, 0, 1], tokens=1)),
    "empty completion": (M, lambda: pack({**IDS, (3, 1): ()})),
    "negative tokens": (M, lambda: entries([3, 0, 2], [3, 1, -1], tokens=1)),
    "one token too many": (L, lambda: pack({**IDS, (3, 1): (1,) * (MAX_TOKENS + 1)})),
    "2**62 tokens": (L, lambda: entries([3, 0, 2**62], tokens=1)),
    "10**4000 tokens": (L, lambda: entries([3, 0, 10**4000], tokens=1)),
    "wrong prompt": (Reason.WRONG_PROMPT, lambda: pack({**IDS, (4, 0): (1,)})),
    "negative prompt": (Reason.WRONG_PROMPT, lambda: pack({(-1, 0): (1,)})),
    "prompt of 300 digits": (Reason.WRONG_PROMPT, lambda: entries([10**300, 0, 1], tokens=1)),
    "the same place twice": (Reason.DUPLICATE, lambda: entries([3, 0, 1], [3, 0, 1], tokens=2)),
    "the same place twice, other ids": (Reason.DUPLICATE, lambda: entries([3, 0, 1], [11, 0, 1], [3, 0, 2], tokens=4)),
    "index too large": (R, lambda: pack({(3, 2): (1,)})),
    "negative index": (R, lambda: pack({(3, -1): (1,)})),
    "index of 300 digits": (R, lambda: entries([3, 10**300, 1], tokens=1)),
    "more than asked": (L, lambda: pack({**IDS, (3, 2): (1,)})),
    "more than asked, of a prompt asked once": (L, lambda: pack({(11, 0): (1,), (11, 1): (1,)})),
    # the ids
    "id just outside": (R, lambda: pack({**IDS, (3, 1): (VOCABULARY,)})),
    "id 2**32 - 1": (R, lambda: pack({**IDS, (3, 1): (2**32 - 1,)})),
    "ids big-endian": (R, lambda: pack(body=b"".join(t.to_bytes(4, "big") for own in IDS.values() for t in own))),
    "no ids": (M, lambda: pack(body=b"")),
    "one id short": (M, lambda: pack(body=raw_ids(IDS)[:-4])),
    "one byte short": (M, lambda: pack(body=raw_ids(IDS)[:-1])),
    "hidden tail": (M, lambda: pack(body=raw_ids(IDS) + b"MZ\x90\0")),
    "two ids exchanged": (Reason.HASH_MISMATCH, lambda: pack(body=raw_ids({**IDS, (3, 0): (6, 5, 299)}))),
    "ids cut elsewhere": (Reason.HASH_MISMATCH, lambda: entries([3, 0, 1], [3, 1, 3], [11, 0, 9], tokens=13)),
    "another's hash": (Reason.HASH_MISMATCH, lambda: pack(sha256=rollout(who="alice").sha256)),
    "hash in capitals": (Reason.HASH_MISMATCH, lambda: pack(sha256=SENT.sha256.upper())),
    "no hash": (Reason.HASH_MISMATCH, lambda: pack(sha256="")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_message_is_refused_with_its_reason(name: str):
    reason, make = CASES[name]
    refused = decode(make())
    assert isinstance(refused, Refusal)
    assert (refused.reason, refused.participant) == (reason.value, "eve"), refused.sentence
    assert_readable(refused)


def choice(counts: list[int], ids: dict) -> Rollout | Refusal:
    """Decode under free choice: the plan's counts stand at prompts that do not matter."""
    template = replace(TEMPLATE, asked=dict(enumerate(counts)), free_choice=range(100))
    return decode(pack(dict(sorted(ids.items()))), template)


def chosen(*sizes: int) -> dict:
    return {(50 + prompt, index): (1,) for prompt, size in enumerate(sizes) for index in range(size)}


def test_free_choice_binds_the_numbers_only():
    for ok in (chosen(2, 2), chosen(2), chosen(1, 2), {(99, 1): (1,), (0, 0): (1,)}):
        assert isinstance(choice([2, 2], ok), Rollout)
    for bad, reason in [
        (chosen(1, 1, 1), Reason.TOO_LARGE),
        (chosen(2, 3), Reason.TOO_LARGE),
        ({(50, 2): (1,)}, Reason.OUT_OF_RANGE),
        ({(50, -1): (1,)}, Reason.OUT_OF_RANGE),
        ({(100, 0): (1,)}, Reason.WRONG_PROMPT),
        ({(-1, 0): (1,)}, Reason.WRONG_PROMPT),
        ({}, Reason.MISSING),
    ]:
        got = choice([2, 2], bad)
        assert isinstance(got, Refusal), bad
        assert got.reason == reason.value, got.sentence
        assert_readable(got)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.lists(st.integers(1, 4), min_size=1, max_size=3))
@fuzz
def test_free_choice_takes_whatever_some_assignment_fits(counts, sizes):
    """Independent of the greedy match: groups fit if, for each size, no more groups than slots are that large."""
    at_least, slots = Counter(), Counter()
    for tally, values in ((at_least, sizes), (slots, counts)):
        tally.update(step for value in values for step in range(1, value + 1))
    fits = all(at_least[step] <= slots[step] for step in at_least)
    assert isinstance(choice(counts, chosen(*sizes)), Rollout) == fits


def check_mutated(message: bytes) -> Rollout | Refusal:
    got = decode(message)
    if isinstance(got, Refusal):
        assert_readable(got)
    else:  # only the spelling of the header is free
        assert got == SENT
    return got


def test_every_single_byte_mutation_is_refused_or_the_same_rollout():
    kept = []
    for at in range(len(GOOD)):
        for value in {*(GOOD[at] ^ (1 << bit) for bit in range(8)), 0, 32, 48, 255} - {GOOD[at]}:
            kept.append(check_mutated(GOOD[:at] + bytes([value]) + GOOD[at + 1 :]) == SENT)
    assert len(kept) > 3000
    assert not any(kept)


def test_every_truncation_deletion_and_repetition_is_refused():
    for at in range(len(GOOD)):
        for message in (GOOD[:at], GOOD[at + 1 :], GOOD[:at] + GOOD[at + 1 :], GOOD[: at + 1] + GOOD[at:]):
            assert isinstance(check_mutated(message), Refusal)


def test_thousands_of_random_mutations_never_raise():
    """Several bytes at once, with the header's length put right half of the time so that they reach the JSON."""
    rng = random.Random(0)
    reasons = Counter()
    pieces = [b"[", b"]", b"{", b"}", b'"', b",", b"0", b"-", b"1e9", b"[3,0,1],", b"true", b"\0", b"\xff\xff\xff\xff"]
    for _ in range(6000):
        data = bytearray(GOOD)
        for _ in range(rng.randint(1, 4)):
            at, kind = rng.randrange(len(data)), rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                data[at:at] = rng.choice(pieces)
            elif kind == 2:
                del data[at : at + rng.randint(1, 8)]
            else:
                other = rng.randrange(len(data))
                data[at:at] = data[other : other + 16]
        if rng.random() < 0.5 and len(data) > 60:
            struct.pack_into("<I", data, 8, max(0, len(data) - 12 - len(raw_ids(IDS))))
            data[:8] = MAGIC
        got = check_mutated(bytes(data))
        reasons[got.reason if isinstance(got, Refusal) else "same"] += 1
    # the fuzz is worth something only if it gets past the envelope
    assert {"malformed", "wrong_round", "wrong_base", "wrong_participant", "hash_mismatch", "out_of_range"} <= set(
        reasons
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(fields())), json_values, st.integers(0, 2))
@settings(fuzz, max_examples=500)
def test_any_json_value_in_any_field_is_refused(key, value, at):
    entry = [3, 0, 3]
    entry[at] = value
    for message in (pack(**{key: value}), pack(completions=[entry, *fields()["completions"][1:]])):
        check_mutated(message)


@given(st.binary(max_size=400), st.sampled_from([b"", MAGIC, MAGIC + b"\x02\0\0\0{}"]))
@fuzz
def test_random_bytes_are_refused(raw, prefix):
    assert isinstance(check_mutated(prefix + raw), Refusal)


HUGE = replace(TEMPLATE, asked={prompt: 2**10 for prompt in range(2**10)}, max_tokens=2**31)  # limit 80 MB of header
BOMBS = {
    "header of 4 GB": lambda: lying_header(2**32 - 1),
    "2**31 tokens": lambda: entries([3, 0, 2**31], tokens=1),
    "2**41 tokens": lambda: entries(*([3, index, 2**31] for index in range(2**10)), tokens=1),
    "deep lists": lambda: envelope(b"[" * 10**6),
    "deep objects": lambda: envelope(b'{"a":' * 10**5),
    "empty lists": lambda: envelope(b'{"completions":[' + b"[]," * 10**5 + b"[]]}"),
    "many keys": lambda: envelope(("{" + ",".join(f'"{i}":0' for i in range(10**5)) + "}").encode()),
    "one key many times": lambda: envelope(("{" + ",".join(['"a":0'] * 10**5) + "}").encode()),
    "long integers": lambda: pack(completions=[10**4000] * 100),
    "long text": lambda: pack(participant="\\" * 10**5),
    "many entries": lambda: entries(*([3, 0, 1] for _ in range(10**4)), tokens=1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_memory_follows_the_bytes_that_came_and_not_those_spoken_of(name: str):
    message = BOMBS[name]()
    tracemalloc.start()
    try:
        refused = decode(message, HUGE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(refused, Refusal)
    assert_readable(refused)
    # an empty JSON object of two bytes and a comma costs Python 64 + 8 bytes, an integer key more
    assert peak < 2**18 + 60 * len(message), refused.sentence


def test_a_bomb_is_no_larger_than_the_plan():
    """Under a plan of three completions the same bombs are turned away by their size, before JSON is read."""
    for name in ("deep lists", "deep objects", "empty lists", "many keys", "one key many times", "long text"):
        message = BOMBS[name]()
        tracemalloc.start()
        try:
            refused = decode(message)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert refused.reason == "too_large", refused.sentence
        assert peak < 2**16


def test_the_limits_themselves_are_allowed():
    assert decode(envelope(padded_header(TEMPLATE.header_bytes), raw_ids(IDS))) == SENT
    assert decode(GOOD, max_message_bytes=len(GOOD)) == SENT
    assert decode(GOOD, max_message_bytes=len(GOOD) - 1).reason == "too_large"


def test_the_operators_mistakes_raise():
    with pytest.raises(TypeError, match="message must be bytes"):
        decode("text")
    with pytest.raises(TypeError, match="participant"):
        decode(GOOD, who=None)
    with pytest.raises(ValueError, match="max_message_bytes"):
        decode(GOOD, max_message_bytes=0)
    for match, bad in [
        ("round", {"round": -1}),
        ("vocabulary", {"vocabulary": 0}),
        ("vocabulary", {"vocabulary": 2**32 + 1}),
        ("max_tokens", {"max_tokens": 0}),
        ("asked", {"asked": {3: 0}}),
        ("prompt ids", {"asked": {-3: 1}}),
        ("prompt ids", {"asked": {2**63: 1}}),
        ("prompt ids", {"free_choice": range(-1, 9)}),
        ("free_choice offers 1", {"free_choice": range(1)}),
        ("model_sha256", {"model_sha256": "tiny"}),
    ]:
        with pytest.raises(ValueError, match=match):
            replace(TEMPLATE, **bad)
    first = SENT.completions[0]
    for match, bad in [
        ("model_sha256", {"model_sha256": "tiny"}),
        ("same prompt and index", {"completions": (first, first)}),
        ("completion of alice", {"completions": (replace(first, participant="alice"),)}),
        ("in round 8", {"completions": (replace(first, round=8),)}),
        ("at least one", {"completions": (completion(3, 0, ()),)}),
        ("each a u32", {"completions": (completion(3, 0, (2**32,)),)}),
        ("each a u32", {"completions": (completion(3, 0, (-1,)),)}),
        ("not its completion_sha256", {"completions": (replace(first, ids=(1, 2, 3)),)}),
    ]:
        with pytest.raises(ValueError, match=match):
            encode_rollout(replace(SENT, **bad), run=RUN)
