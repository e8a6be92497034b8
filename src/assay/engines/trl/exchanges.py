"""How nodes hand each other their messages: a small protocol, and two ways to keep it.

An exchange carries bytes and reads nothing. Who a message is from is for the exchange to know (a folder's permissions,
a relay's authentication): the name inside a message is only a claim, and the wire compares the two.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from assay.checkpoint import write_atomic
from assay.config import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Exchange(Protocol):
    """`run`: the run's public name, drawn after the nodes' names were fixed (else a node chooses a name whose seeds it
    likes). `node`: this node; `nodes`: all of them, this one too."""

    @property
    def run(self) -> str: ...
    @property
    def node(self) -> str: ...
    @property
    def nodes(self) -> tuple[str, ...]: ...

    def publish(self, round: int, message: bytes) -> None:
        """Send this node's message of a round."""
        ...

    def collect(self, round: int, limits: Mapping[str, int]) -> Mapping[str, bytes | None]:
        """The messages of the nodes named in `limits`; None for who sent nothing in time.

        Of a message longer than its limit (bytes) read one byte more than that: the wire refuses it as too large. An
        exchange that can lose this node's own message names this node as well: what it says is then what counts.
        """
        ...


def checked(run: str, node: str, nodes: Iterable[str]) -> tuple[str, ...]:
    """The names of all nodes, sorted. ConfigError for names that cannot stand in a path, or twice."""
    found = tuple(sorted(nodes))
    for name in (run, *found):
        if not NAME.fullmatch(name):
            raise ConfigError(f"exchange: {name!r} is no name; use letters, digits, dot, dash, underscore, at most 64")
    if len(set(found)) != len(found) or node not in found:
        raise ConfigError(f"exchange: nodes must be different names, {node!r} among them; got {', '.join(found)}")
    return found


class Hub:
    """Messages in memory, for nodes that are threads of one process. `seat(node)` is one node's exchange."""

    def __init__(self, *, run: str, nodes: Iterable[str], timeout: float = 600.0) -> None:
        names = tuple(nodes)
        self.run, self.nodes = run, checked(run, names[0] if names else "", names)
        self.timeout = timeout
        self._messages: dict[tuple[int, str], bytes] = {}
        self._news = threading.Condition()

    def seat(self, node: str) -> MemoryExchange:
        return MemoryExchange(self, node)

    def put(self, round: int, node: str, message: bytes) -> None:
        with self._news:
            self._messages[round, node] = message
            self._news.notify_all()

    def wait(self, round: int, nodes: Iterable[str]) -> dict[str, bytes | None]:
        keys = {node: (round, node) for node in nodes}
        with self._news:
            self._news.wait_for(lambda: all(key in self._messages for key in keys.values()), self.timeout)
            return {node: self._messages.get(key) for node, key in keys.items()}


class MemoryExchange:
    """One node's side of a `Hub`."""

    def __init__(self, hub: Hub, node: str) -> None:
        self.run, self.node, self.nodes = hub.run, node, checked(hub.run, node, hub.nodes)
        self._hub = hub

    def publish(self, round: int, message: bytes) -> None:
        self._hub.put(round, self.node, message)

    def collect(self, round: int, limits: Mapping[str, int]) -> Mapping[str, bytes | None]:
        return self._hub.wait(round, limits)


class FolderExchange:
    """Messages as files in a folder all nodes see: PATH/RUN/round-000001/NODE.rollout.

    A file appears whole (written aside, then renamed). Of others' files nothing but bytes of plain files is read, up
    to the limit: a link, a pipe, a folder count as a message that says nothing. Whoever may write another node's file
    may speak for it: give each node a place of its own by the file system's permissions. `timeout`: seconds to wait for
    the others in each round.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        run: str,
        node: str,
        nodes: Iterable[str],
        timeout: float = 600.0,
        poll: float = 0.2,
    ) -> None:
        self.run, self.node, self.nodes = run, node, checked(run, node, nodes)
        self.path, self.timeout, self.poll = Path(path), timeout, poll

    def file(self, round: int, node: str) -> Path:
        return self.path / self.run / f"round-{round:06d}" / f"{node}.rollout"

    def publish(self, round: int, message: bytes) -> None:
        write_atomic(self.file(round, self.node), message)

    def collect(self, round: int, limits: Mapping[str, int]) -> Mapping[str, bytes | None]:
        found: dict[str, bytes | None] = dict.fromkeys(limits)
        end = time.monotonic() + self.timeout
        while True:
            for node, limit in limits.items():
                if found[node] is None:
                    found[node] = read_bounded(self.file(round, node), limit)
            if None not in found.values() or time.monotonic() >= end:
                return found
            time.sleep(self.poll)


def read_bounded(file: Path, limit: int) -> bytes | None:
    """At most `limit` + 1 bytes of a plain file; None where there is none, b"" for anything that is no plain file."""
    try:
        # a stranger may have put a pipe there, which would block, or a link to somewhere else
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:
        return b""
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return b""
        parts, left = [], limit + 1
        while left > 0 and (part := os.read(handle, left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
    except OSError:
        return b""
    finally:
        os.close(handle)
