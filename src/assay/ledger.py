"""Append-only, hash-chained record of a run: JSON lines, each bound to the one before.

Entry: {"index": int, "kind": str, "prev": hex, "body": {...}, "hash": hex} with `hash` = sha256 of the canonical JSON
of the entry without it, and `prev` = the hash of the entry before (64 zeros for the first). A line is canonical to the
byte (sorted keys, no spaces, ASCII, no NaN), so that no second spelling of an entry passes.

What the chain finds by itself: an entry edited, deleted, inserted, swapped or doubled anywhere before the end. What it
cannot find without help from outside: entries cut off the end, and a whole rewrite, for whoever can write the file can
compute hashes too. Against both, give `verify` the `head` (last hash) kept elsewhere: in the run's summary.json, better
in a place the same hand cannot write (a mail, a git tag, a public board). It proves nothing about what was never
recorded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.checkpoint import fsync_folder

GENESIS = "0" * 64
TYPES: dict[str, type] = {"index": int, "kind": str, "prev": str, "body": dict, "hash": str}

Entry = dict[str, Any]


class LedgerError(ValueError):
    """The ledger is broken, or what is to be recorded is not JSON."""


class _Broken(Exception):
    """Entry `index` is not what the chain asks for; the text says why."""

    def __init__(self, index: int, problem: str, *, torn: bool = False) -> None:
        super().__init__(problem)
        self.index, self.torn = index, torn


@dataclass(frozen=True, slots=True)
class Verification:
    """Outcome of `verify`: number of good entries from the start, hash of the last of them, and the first bad one.

    `first_broken` is None if `ok`, and also when only the anchor disagrees and no entry can be named.
    """

    ok: bool
    entries: int
    head: str
    first_broken: int | None = None
    problem: str = ""


class Ledger:
    """A ledger file open for appending; made if it is not there. One writer at a time.

    Opening verifies the whole chain (LedgerError names the first broken entry) and drops a torn last line, that is one
    without a newline, which only a kill in the middle of `append` leaves: its `append` never returned. Entries stay on
    the disk: an entry of a thousand clients is megabytes, and a run has many.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._count, self._size, self._head = 0, 0, GENESIS
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            fsync_folder(self.path.parent)
        try:
            for entry, size in _read(self.path):
                self._count, self._head = self._count + 1, str(entry["hash"])
                self._size += size
        except _Broken as broken:
            if not broken.torn:
                raise LedgerError(f"{self.path}: entry {broken.index} is broken: {broken}") from None
            os.truncate(self.path, self._size)

    @property
    def count(self) -> int:
        """How many entries there are."""
        return self._count

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All of them, read again. LedgerError where the file was changed since."""
        return tuple(self)

    @property
    def head(self) -> str:
        """Hash of the last entry: the anchor to keep elsewhere. 64 zeros for an empty ledger."""
        return self._head

    def last(self, kind: str) -> Entry | None:
        """The newest entry of this kind."""
        found = None
        for entry in self:
            found = entry if entry["kind"] == kind else found
        return found

    def __iter__(self) -> Iterator[Entry]:
        """One after the other, read again."""
        try:
            for entry, _ in _read(self.path):
                yield entry
        except _Broken as broken:
            raise LedgerError(f"{self.path}: entry {broken.index} is broken: {broken}") from None

    def append(self, kind: str, body: Mapping[str, Any]) -> Entry:
        """Record one entry; it is on the disk when this returns. LedgerError if `body` is not strict JSON."""
        try:
            text = _canonical(dict(body))
            plain = json.loads(text)
            same = _canonical(plain) == text  # keys 1 and "1" would be two entries here and one for a reader
        except (TypeError, ValueError, RecursionError) as error:
            raise LedgerError(f"{kind}: cannot be recorded, it is not strict JSON: {error}") from None
        if not same:
            raise LedgerError(f"{kind}: cannot be recorded: use text keys throughout")
        entry: Entry = {"index": self._count, "kind": kind, "prev": self.head, "body": plain}
        entry["hash"] = _hash(entry)
        line = _canonical(entry) + b"\n"
        with self.path.open("ab") as file:
            if file.tell() != self._size:
                raise LedgerError(f"{self.path}: was changed by somebody else while open; one run, one writer")
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._count, self._head = self._count + 1, str(entry["hash"])
        self._size += len(line)
        return entry


def verify(path: str | Path, head: str | None = None) -> Verification:
    """Check every entry of a ledger file and, if given, that it ends at `head` (see the module's text for why).

    Reads line by line and changes nothing: a torn last line is reported, not dropped. LedgerError if there is no file.
    """
    path = Path(path)
    if not path.is_file():
        raise LedgerError(f"{path}: no ledger here")
    count, last, anchored = 0, GENESIS, 0 if head == GENESIS else None
    try:
        for entry, _ in _read(path):
            count, last = count + 1, str(entry["hash"])
            if last == head:
                anchored = count
    except _Broken as broken:
        return Verification(False, count, last, broken.index, str(broken))
    if head is None or head == last:
        return Verification(True, count, last)
    if anchored is not None:
        problem = f"{count - anchored} entries were added after the expected head {head}"
        return Verification(False, count, last, anchored, problem)
    problem = f"ends at {last}, expected head {head}: entries were cut off the end, or the ledger was rewritten"
    return Verification(False, count, last, None, problem)


def _read(path: Path) -> Iterator[tuple[Entry, int]]:
    """Yield each entry and the bytes of its line; raises _Broken at the first that does not fit the chain."""
    prev = GENESIS
    with path.open("rb") as file:
        for index, line in enumerate(file):
            if not line.endswith(b"\n"):
                problem = "torn: the line has no end, as a kill in the middle of a write leaves it"
                raise _Broken(index, problem, torn=True)
            entry = _check(line[:-1], index, prev)
            prev = entry["hash"]
            yield entry, len(line)


def _check(line: bytes, index: int, prev: str) -> Entry:
    try:
        entry = json.loads(line.decode("ascii"))
        canonical = _canonical(entry) == line
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError and NaN
        raise _Broken(index, f"the line is not an entry: {error}") from None
    if not isinstance(entry, dict) or entry.keys() != TYPES.keys():
        raise _Broken(index, f"the line is not an object with the keys {', '.join(TYPES)}")
    if wrong := [key for key, kind in TYPES.items() if type(entry[key]) is not kind]:  # exact: true is no index
        raise _Broken(index, f"{wrong[0]} is not of type {TYPES[wrong[0]].__name__}")
    if entry["hash"] != _hash(entry):
        raise _Broken(index, "its content does not have its hash: body, kind, index, prev or hash was edited")
    if entry["index"] != index:
        where = f"it is numbered {entry['index']}, expected {index}"
        raise _Broken(index, f"{where}: an entry was deleted, inserted, doubled or moved")
    if entry["prev"] != prev:
        raise _Broken(index, "it does not follow the entry before: that one was replaced, or this one inserted")
    if not canonical:
        raise _Broken(index, "the line was respelled: same content, other bytes")
    return entry


def _hash(entry: Entry) -> str:
    return hashlib.sha256(_canonical({key: value for key, value in entry.items() if key != "hash"})).hexdigest()


def _canonical(value: object) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.encode("ascii")
