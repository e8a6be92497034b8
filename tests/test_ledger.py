"""The ledger: what is done to a line is found at that line; what only the anchor can find is shown too."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay import ledger as module
from assay.ledger import GENESIS, Ledger, LedgerError, verify


def make(path: Path, rounds: int = 5) -> list[bytes]:
    """A ledger of `rounds` entries; its lines."""
    ledger = Ledger(path)
    for i in range(rounds):
        ledger.append("round", {"round": i, "weights": {"anna": 1.0, "bö\u2028b": 0.25 * i}, "note": "é \ud800"})
    return path.read_bytes().splitlines(keepends=True)


def respell(line: bytes, **changes) -> bytes:
    """The line with changed keys and, as a forger would, the right hash for them."""
    entry = {**json.loads(line), **changes}
    entry["hash"] = module._hash(entry)
    return module._canonical(entry) + b"\n"


def found(path: Path, lines: list[bytes], head: str | None = None) -> tuple[bool, int | None]:
    path.write_bytes(b"".join(lines))
    result = verify(path, head)
    assert result.ok == (result.problem == "")
    if not result.ok and head is None and not result.problem.startswith("torn"):
        with pytest.raises(LedgerError, match=f"entry {result.first_broken} is broken"):
            Ledger(path)
        assert path.read_bytes() == b"".join(lines), "a broken ledger must be left as it is"
    return result.ok, result.first_broken


def test_append_reopen_append(tmp_path):
    path = tmp_path / "run" / "ledger.jsonl"
    first = Ledger(path)
    assert (first.head, first.entries, first.last("round")) == (GENESIS, (), None)
    assert verify(path).ok
    a = first.append("start", {"seed": 1, "shape": (2, 3)})
    again = Ledger(path)
    b = again.append("round", {"round": 0})
    c = Ledger(path).append("round", {"round": 1})

    ledger = Ledger(path)
    assert ledger.entries == (a, b, c)
    assert [entry["index"] for entry in ledger.entries] == [0, 1, 2]
    assert [entry["prev"] for entry in ledger.entries] == [GENESIS, a["hash"], b["hash"]]
    assert a["body"] == {"seed": 1, "shape": [2, 3]}, "what is returned is what a reader will read"
    assert ledger.head == c["hash"]
    assert ledger.last("round") == c
    assert ledger.last("start") == a
    result = verify(path, ledger.head)
    assert (result.ok, result.entries, result.head, result.first_broken) == (True, 3, ledger.head, None)


def test_edits_of_an_entry(tmp_path):
    path = tmp_path / "ledger.jsonl"
    lines = make(path)
    head = json.loads(lines[-1])["hash"]
    body = lines[2].replace(b'"anna":1.0', b'"anna":0.0')
    wrong_hash = lines[2].replace(json.loads(lines[2])["hash"].encode(), b"0" * 64)
    assert found(path, [*lines[:2], body, *lines[3:]]) == (False, 2)
    assert found(path, [*lines[:2], wrong_hash, *lines[3:]]) == (False, 2)
    assert found(path, [*lines[:2], lines[2].replace(b":", b": ", 1), *lines[3:]]) == (False, 2)
    # with the hash made right again, the entry after it no longer follows
    forged = respell(lines[2], body={})
    assert found(path, [*lines[:2], forged, *lines[3:]]) == (False, 3)
    # the last one has nobody after it: only the anchor tells
    forged = respell(lines[4], body={})
    assert found(path, [*lines[:4], forged]) == (True, None)
    assert found(path, [*lines[:4], forged], head) == (False, None)


def test_entries_deleted_inserted_swapped_doubled(tmp_path):
    path = tmp_path / "ledger.jsonl"
    a, b, c, d, e = make(path)
    assert found(path, [b, c, d, e]) == (False, 0)
    assert found(path, [a, b, d, e]) == (False, 2)
    assert found(path, [a, c, b, d, e]) == (False, 1)
    assert found(path, [a, b, b, c, d, e]) == (False, 2)
    assert found(path, [a, b, c, d, e, e]) == (False, 5)
    assert found(path, [a, b, b"\n", c, d, e]) == (False, 2)
    forged = respell(c, prev=json.loads(c)["hash"], index=3)
    assert found(path, [a, b, c, forged, d, e]) == (False, 4)
    assert found(path, [a, b, respell(c, prev=GENESIS), d, e]) == (False, 2)


@pytest.mark.parametrize(
    "line",
    [b"{}", b"null", b"[]", b"x", b"\xff", b"[" * 50_000, b'{"body":NaN}', b'{"a":' * 9000, b'{"body":1,"body":2}'],
)
def test_a_line_that_is_no_entry(tmp_path, line):
    path = tmp_path / "ledger.jsonl"
    lines = make(path)
    assert found(path, [*lines[:2], line + b"\n", *lines[2:]]) == (False, 2)


@pytest.mark.parametrize("change", [{"index": 2.0}, {"index": "2"}, {"kind": None}, {"body": []}, {"prev": 0}])
def test_an_entry_of_wrong_types_with_the_right_hash(tmp_path, change):
    path = tmp_path / "ledger.jsonl"
    lines = make(path)
    assert found(path, [*lines[:2], respell(lines[2], **change), *lines[3:]]) == (False, 2)


def test_true_is_no_index(tmp_path):
    path = tmp_path / "ledger.jsonl"
    lines = make(path)
    assert found(path, [lines[0], respell(lines[1], index=True)]) == (False, 1)


def test_a_cut_or_rewritten_ledger_is_found_by_its_head_only(tmp_path):
    path = tmp_path / "ledger.jsonl"
    lines = make(path)
    head = json.loads(lines[-1])["hash"]
    assert found(path, lines[:3]) == (True, None)
    assert found(path, lines[:3], head) == (False, None)
    assert found(path, [], head) == (False, None)
    path.write_bytes(b"")
    other = Ledger(path)
    other.append("round", {"all": "lies"})
    assert verify(path).ok
    assert "rewritten" in verify(path, head).problem


def test_entries_after_the_head_are_named(tmp_path):
    path = tmp_path / "ledger.jsonl"
    lines = make(path)
    assert found(path, lines, json.loads(lines[2])["hash"]) == (False, 3)
    assert found(path, lines, GENESIS) == (False, 0)


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> tuple[Path, list[bytes]]:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    return path, make(path)


@given(st.data())
@settings(deadline=None, derandomize=True, max_examples=300)
def test_any_changed_byte_is_found_at_its_entry(sample, data):
    path, lines = sample
    line = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(0, len(lines[line]) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != lines[line][at]))
    changed = bytearray(lines[line])
    changed[at] = value
    path.write_bytes(b"".join([*lines[:line], bytes(changed), *lines[line + 1 :]]))
    result = verify(path)
    assert (result.ok, result.first_broken, result.entries) == (False, line, line)


def test_a_torn_last_line_is_reported_then_dropped(tmp_path):
    path = tmp_path / "ledger.jsonl"
    lines = make(path)
    for keep in (1, len(lines[4]) // 2, len(lines[4]) - 1):
        path.write_bytes(b"".join(lines[:4]) + lines[4][:keep])
        result = verify(path)
        assert (result.ok, result.first_broken, result.entries) == (False, 4, 4)
        assert result.problem.startswith("torn")
        ledger = Ledger(path)
        assert path.read_bytes() == b"".join(lines[:4])
        assert ledger.append("round", json.loads(lines[4])["body"]) == json.loads(lines[4])
        assert path.read_bytes() == b"".join(lines)


def test_a_broken_entry_before_a_torn_line_is_not_repaired(tmp_path):
    path = tmp_path / "ledger.jsonl"
    lines = make(path)
    damaged = [lines[0], lines[1].replace(b"1", b"2", 1), lines[2][:-9]]
    assert found(path, damaged) == (False, 1)


def test_a_second_writer_is_noticed(tmp_path):
    path = tmp_path / "ledger.jsonl"
    one, two = Ledger(path), Ledger(path)
    one.append("round", {})
    with pytest.raises(LedgerError, match="somebody else"):
        two.append("round", {})
    assert verify(path, one.head).ok


@pytest.mark.parametrize(
    "body", [{"x": float("nan")}, {"x": np.float32(1)}, {"x": {1: "a", "1": "b"}}, {"x": b""}, {1: 2, "a": 3}]
)
def test_what_is_not_json_is_not_recorded(tmp_path, body):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(LedgerError, match="cannot be recorded"):
        ledger.append("round", body)
    assert ledger.path.read_bytes() == b""
    assert ledger.append("round", {"x": 1})["index"] == 0


def test_no_ledger_is_the_operators_mistake(tmp_path):
    with pytest.raises(LedgerError, match="no ledger here"):
        verify(tmp_path / "nothing.jsonl")
