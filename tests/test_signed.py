"""Signed messages and pools of them: one form for one meaning, nothing passes that was not signed, nothing raises."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from assay.config import ConfigError
from assay.swarm.keys import make_key, public_hex, read_key, read_keys, write_keys
from assay.swarm.relayed import decode_pool, encode_pool, genesis, next_head
from assay.swarm.signed import MAGIC, MAX_NAME, Expected, Opened, Statement, open_signed, sign, verified
from assay.wire import WireError

NODES = ("a", "b", "c")
PRIVATE = {node: Ed25519PrivateKey.from_private_bytes(node.encode() * 32) for node in NODES}
PUBLIC = {node: key.public_key() for node, key in PRIVATE.items()}
HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_NAME // 4)
STATEMENTS = st.builds(
    Statement, run=NAMES, round=st.integers(0, 2**64 - 1), node=st.sampled_from(NODES), plan=HASHES, head=HASHES,
    contents=st.binary(max_size=64),
)  # fmt: skip
ONE = Statement(run="r", round=3, node="a", plan="1" * 64, head="2" * 64, contents=b"completions")


def expected(statement: Statement, **changes: object) -> Expected:
    values = {k: getattr(statement, k) for k in ("run", "round", "plan", "head")} | {"max_contents": 64} | changes
    return Expected(**values)


def opened(message: bytes, statement: Statement = ONE, node: str = "a", **changes: object) -> Opened:
    return open_signed(message, node=node, key=PUBLIC[node], expected=expected(statement, **changes))


@given(STATEMENTS)
def test_what_is_signed_is_what_is_read(statement: Statement) -> None:
    message = sign(statement, PRIVATE[statement.node])
    assert opened(message, statement, statement.node) == Opened(statement, None)
    assert verified(message, PUBLIC, 64) == statement


@given(STATEMENTS, STATEMENTS)
def test_two_statements_never_share_their_bytes(one: Statement, other: Statement) -> None:
    same = sign(one, PRIVATE["a"]) == sign(other, PRIVATE["a"])
    assert same == (one == other)


@given(STATEMENTS, st.data())
def test_a_byte_changed_anywhere_is_proof_of_nothing(statement: Statement, data: st.DataObject) -> None:
    message = bytearray(sign(statement, PRIVATE[statement.node]))
    message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    found = opened(bytes(message), statement, statement.node)
    assert found.statement is None
    assert found.refusal is not None
    assert not found.refusal.proven


@given(STATEMENTS, st.integers(0, 300), st.binary(max_size=80))
def test_a_message_cut_or_lengthened_is_proof_of_nothing(statement: Statement, keep: int, more: bytes) -> None:
    message = sign(statement, PRIVATE[statement.node])
    changed = message[:keep] + more
    if changed != message:
        assert opened(changed, statement, statement.node).statement is None


@given(st.binary(max_size=400), st.booleans())
def test_no_bytes_raise(raw: bytes, begun: bool) -> None:
    found = opened(MAGIC + raw if begun else raw)
    assert found.refusal is not None
    assert not found.refusal.proven


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run": "other"}, "wrong_round"),
        ({"round": 4}, "wrong_round"),
        ({"plan": "3" * 64}, "wrong_plan"),
        ({"head": "3" * 64}, "wrong_pool"),
    ],
)
def test_what_a_node_has_signed_for_something_else_is_refused_as_its_own(changes: dict, reason: str) -> None:
    found = opened(sign(ONE, PRIVATE["a"]), **changes)
    assert found.statement == ONE
    assert found.refusal is not None
    assert (found.refusal.reason, found.refusal.proven) == (reason, True)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (sign(ONE, PRIVATE["b"]), "wrong_signature"),
        (sign(Statement(run="r", round=3, node="b", plan="1" * 64, head="2" * 64, contents=b""), PRIVATE["b"]), "wrong_participant"),
        (sign(Statement(run="r", round=3, node="a", plan="1" * 64, head="2" * 64, contents=bytes(65)), PRIVATE["a"]), "too_large"),
        (bytes(10_000), "too_large"),
        (b"", "malformed"),
    ],
)  # fmt: skip
def test_what_may_be_anybodys_costs_nobody_trust(message: bytes, reason: str) -> None:
    refusal = opened(message).refusal
    assert refusal is not None
    assert (refusal.participant, refusal.reason, refusal.proven) == ("a", reason, False)


def test_a_signature_made_for_something_else_is_none() -> None:
    message = sign(ONE, PRIVATE["a"])
    body = message[len(MAGIC) + 64 :]
    assert opened(MAGIC + PRIVATE["a"].sign(body) + body).statement is None


def test_only_registered_names_can_sign() -> None:
    with pytest.raises(WireError, match="not registered"):
        verified(sign(ONE, PRIVATE["a"]), {"b": PUBLIC["b"]}, 64)
    with pytest.raises(WireError, match="key registered"):
        verified(sign(ONE, PRIVATE["b"]), PUBLIC, 64)


@given(st.dictionaries(st.sampled_from(NODES), st.binary(max_size=40)), st.integers(0, 2**40))
def test_a_pool_is_read_as_it_was_written(messages: dict[str, bytes], round: int) -> None:
    assert decode_pool(encode_pool(round, messages), round=round, nodes=NODES) == messages


@given(
    st.dictionaries(st.sampled_from(NODES), st.binary(max_size=9)),
    st.integers(0, 60),
    st.integers(0, 60),
    st.binary(max_size=9),
)
def test_a_pool_has_one_form_or_is_none(messages: dict[str, bytes], low: int, high: int, put: bytes) -> None:
    pool = encode_pool(5, messages)
    changed = pool[:low] + put + pool[high:]
    try:
        found = decode_pool(changed, round=5, nodes=NODES)
    except WireError:
        return
    assert encode_pool(5, found) == changed


def test_heads_hang_on_every_pool_before_on_the_keys_and_on_the_experiment() -> None:
    start = genesis("r", PUBLIC, {"experiment": {"seed": 0}})
    assert start == genesis("r", dict(reversed(PUBLIC.items())), {"experiment": {"seed": 0}})
    others = {
        genesis("s", PUBLIC, {"experiment": {"seed": 0}}),
        genesis("r", {**PUBLIC, "a": PUBLIC["b"]}, {"experiment": {"seed": 0}}),
        genesis("r", PUBLIC, {"experiment": {"seed": 1}}),
        next_head(start, b"one"),
        next_head(start, b"other"),
        next_head(next_head(start, b"one"), b"two"),
        next_head(next_head(start, b"other"), b"two"),
    }
    assert len(others | {start}) == 8


# --- key files -------------------------------------------------------------------------------------------------------


def test_keys_are_written_once_and_read_back(tmp_path: Path) -> None:
    public = {node: make_key(tmp_path / f"{node}.pem") for node in NODES}
    assert stat.S_IMODE((tmp_path / "a.pem").stat().st_mode) == 0o600
    write_keys(tmp_path / "keys.toml", public)
    read = read_keys(tmp_path / "keys.toml", NODES)
    assert {n: public_hex(k) for n, k in read.items()} == public
    assert public_hex(read_key(tmp_path / "a.pem")) == public["a"]
    with pytest.raises(ConfigError, match="there is a key already"):
        make_key(tmp_path / "a.pem")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "must name exactly a, b"),
        ('[nodes]\na = "00"', "must name exactly a, b"),
        ('[nodes]\na = "00"\nb = "01"', "key of a is not 64 hex digits"),
        ('[nodes]\na = 1\nb = "01"', "key of a is not 64 hex digits"),
        (f'[nodes]\na = "{"0" * 64}"\nb = "{"0" * 64}"', "two nodes have the same key"),
        ("[nodes", "cannot be read"),
    ],
)
def test_a_wrong_key_file_is_the_operators_mistake(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "keys.toml").write_text(text)
    with pytest.raises(ConfigError, match=match):
        read_keys(tmp_path / "keys.toml", ("a", "b"))


def test_a_file_that_is_no_key_is_the_operators_mistake(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("no key")
    for path in (tmp_path / "x.pem", tmp_path / "absent.pem"):
        with pytest.raises(ConfigError, match="no private key"):
            read_key(path)
