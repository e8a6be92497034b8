"""`GuardedGrid`: any grid of Flower's, so that no reply can end a run or speak for somebody else.

What Flower 1.41 does without it (its sources, `superlink/grid/http_grid.py`): a reply that cannot be decoded raises out
of `pull_messages` and ends the ServerApp; replies that were pulled together with it are lost; who sent a reply and
which message it answers is read from the reply itself; an error made on the way has the SuperLink's id for a source;
`timeout=None` waits for ever for a client that crashed.

Here a reply belongs to the node its message was *pushed* to. Each id is pulled by itself, so what comes back can only be
from that node, and is let through only if it says so too. What is not let through becomes an error reply of that node,
which every strategy knows how to leave out.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httpx
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message.message import make_message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from assay.config import ConfigError
from assay.engines.flower.inflating import at_most
from assay.engines.flower.replies import GuardError, measured
from assay.verdict import Reason
from assay.wire import WireError

log = logging.getLogger("flwr")
TRANSPORT = (httpx.HTTPError, OSError)
"""What a broken connection raises: nobody's reply is to blame, the id is pulled again."""
MAX_ERROR = 500  # characters of a node's own words about its error


@dataclass(frozen=True, slots=True)
class Pushed:
    """A message that waits for its reply."""

    metadata: Metadata
    max_bytes: int
    at: float


@dataclass(frozen=True, slots=True)
class Late:
    """A node that had not answered when its time was over."""

    node: int
    message_type: str
    group: str
    waited: float


class GuardedGrid(Grid):
    """Wraps any grid; `send_and_receive` waits `timeout` seconds at most and looks for replies every `poll` seconds.

    `max_reply_bytes`: bytes of a reply's content. None: twice what the message carried and 1 MiB more, which allows
    float64 for float32. `refused` counts what was not let through, by reason, over the run; `late` are the nodes that had
    not answered the last time replies were waited for, `timed_out` counts such times.

    >>> from assay.bench.flower_grid import InProcessGrid
    >>> grid = GuardedGrid(InProcessGrid({}), timeout=600, poll=1.0)
    >>> list(grid.get_node_ids())
    []
    """

    def __init__(
        self, grid: Grid, *, timeout: float = 3600.0, poll: float = 3.0, max_reply_bytes: int | None = None
    ) -> None:
        if not timeout > 0 or not poll > 0:
            raise ConfigError(f"timeout {timeout} and poll {poll} must be above 0 seconds")
        if max_reply_bytes is not None and max_reply_bytes < 1:
            raise ConfigError(f"max_reply_bytes is {max_reply_bytes}: give a positive number or None")
        self.grid, self.timeout, self.poll, self.max_reply_bytes = grid, timeout, poll, max_reply_bytes
        self.refused: Counter[Reason] = Counter()
        self.late: tuple[Late, ...] = ()
        self.timed_out = 0
        self._waiting: dict[str, Pushed] = {}

    # --- delegated ----------------------------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Run:
        return self.grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self.grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self.grid.get_nodes()

    def __getattr__(self, name: str) -> Any:
        if name == "grid":  # asked for before it is set, as copying does
            raise AttributeError(name)
        return getattr(self.grid, name)

    # --- guarded ------------------------------------------------------------------------------------------------------

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Push, and remember to whom each message went. Returns the ids of those that were accepted."""
        sent = list(messages)
        ids = list(self.grid.push_messages(sent)) if sent else []
        if len(ids) != len(sent):  # some grids leave out what they could not push; then the messages know their ids
            known = {message.metadata.message_id: message for message in sent}
            sent = [known[id] for id in ids]
        accepted = {id: message for id, message in zip(ids, sent) if id}
        if len(accepted) < len(sent):
            log.warning("Assay: %d of %d messages could not be pushed", len(sent) - len(accepted), len(sent))
        for id, message in accepted.items():
            limit = self.max_reply_bytes or 2 * measured(message.content) + 2**20
            self._waiting[id] = Pushed(message.metadata, limit, time.monotonic())
        return list(accepted)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have come for these ids, at most one each; an id that waits for none has none."""
        out = []
        for id in dict.fromkeys(message_ids):
            pushed = self._waiting.get(id)
            reply = None if pushed is None else self._pull(id, pushed)
            if reply is not None:
                del self._waiting[id]
                out.append(reply)
        return out

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then pull until everybody has answered or the time is over; late nodes are in `late` and in the log."""
        ids = self.push_messages(messages)
        limit = self.timeout if timeout is None else timeout
        end = time.monotonic() + limit
        replies: list[Message] = []
        while True:
            replies += self.pull_messages([id for id in ids if id in self._waiting])
            left = end - time.monotonic()
            if left <= 0 or not any(id in self._waiting for id in ids):
                break
            time.sleep(min(self.poll, left))
        self._give_up([id for id in ids if id in self._waiting])
        return replies

    def _give_up(self, ids: Iterable[str]) -> None:
        now = time.monotonic()
        late = []
        for id in ids:
            pushed = self._waiting.pop(id)
            meta = pushed.metadata
            late.append(Late(meta.dst_node_id, meta.message_type, meta.group_id, now - pushed.at))
        self.late = tuple(late)
        self.timed_out += bool(late)
        if late:
            nodes = ", ".join(str(one.node) for one in late[:20])
            log.warning("Assay: %d nodes have not answered in time: %s%s", len(late), nodes, "…" * (len(late) > 20))

    def _pull(self, id: str, pushed: Pushed) -> Message | None:
        """The reply to one message as it may be passed on; None while there is none."""
        try:
            with at_most(pushed.max_bytes):
                found = list(self.grid.pull_messages([id]))
        except WireError as error:
            return self._refuse(id, pushed, error.reason, str(error))
        except TRANSPORT as error:
            log.warning("Assay: replies could not be pulled, will be tried again: %s: %s", type(error).__name__, error)
            return None
        except Exception as error:  # noqa: BLE001 - whatever a client's bytes do to Flower's decoder; recorded below
            return self._refuse(id, pushed, Reason.MALFORMED, f"cannot be decoded: {type(error).__name__}: {error}")
        if not found:
            return None
        try:
            return self._check(id, pushed, found)
        except Exception as error:  # noqa: BLE001 - a record can hold anything once it is decoded; recorded below
            return self._refuse(id, pushed, Reason.MALFORMED, f"cannot be read: {type(error).__name__}: {error}")

    def _check(self, id: str, pushed: Pushed, found: list[Message]) -> Message:
        mine = [message for message in found if message.metadata.reply_to_message_id == id]
        if not mine:
            return self._refuse(id, pushed, Reason.WRONG_PARTICIPANT, "says that it answers another message")
        if len(mine) > 1:
            return self._refuse(
                id, pushed, Reason.WRONG_PARTICIPANT, f"{len(mine)} replies say they answer this message"
            )
        if len(found) > 1:
            log.warning("Assay: dropped %d messages that nobody asked for", len(found) - 1)
            self.refused[Reason.WRONG_PARTICIPANT] += len(found) - 1
        [message] = mine
        if message.has_error():  # made by the node or on the way: its source says nothing either way
            return self._stamped(id, pushed, error=_plain(message.error))
        source, node = message.metadata.src_node_id, pushed.metadata.dst_node_id
        if source != node:
            return self._refuse(id, pushed, Reason.WRONG_PARTICIPANT, f"says that it is from node {source}")
        size = measured(message.content)
        if size > pushed.max_bytes:
            return self._refuse(id, pushed, Reason.TOO_LARGE, f"reply has {size} bytes, limit {pushed.max_bytes}")
        return self._stamped(id, pushed, content=message.content, reply_id=message.metadata.message_id)

    def _refuse(self, id: str, pushed: Pushed, reason: Reason, sentence: str) -> Message:
        self.refused[reason] += 1
        short = sentence[:MAX_ERROR]
        log.warning("Assay: reply of node %s refused: %s: %s", pushed.metadata.dst_node_id, reason.value, short)
        return self._stamped(id, pushed, error=GuardError(reason, short))

    def _stamped(self, id: str, pushed: Pushed, *, reply_id: str = "", **body: Any) -> Message:
        """A reply whose metadata follow from the message that was pushed and from nothing the reply says."""
        asked = pushed.metadata
        return make_message(
            Metadata(
                run_id=asked.run_id,
                message_id=reply_id,
                src_node_id=asked.dst_node_id,
                dst_node_id=asked.src_node_id,
                reply_to_message_id=id,
                group_id=asked.group_id,
                created_at=time.time(),
                ttl=asked.ttl,
                message_type=asked.message_type,
            ),
            **body,
        )


def _plain(error: Error) -> Error:
    """A node's own error with a code that is a number and a text of bounded length."""
    code = error.code if isinstance(error.code, int) and abs(error.code) < 2**31 else 0
    reason = error.reason if isinstance(error.reason, str) else ""
    return Error(code, reason if len(reason) <= MAX_ERROR else reason[:MAX_ERROR] + "…")
