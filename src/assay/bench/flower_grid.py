"""A grid of Flower's within one process: nodes are functions, and replies travel as the very bytes Flower sends.

Each reply is taken apart into Flower's objects, kept by their hash as the SuperLink keeps them, and put together again
by Flower's own code when it is pulled; so what a client can do to a ServerApp by the bytes it sends happens here too.
The loop of `send_and_receive` is HttpGrid's, with its trust in what a reply says of itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

from flwr.app import Message, RecordDict
from flwr.app.message.message import make_message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER = 1
"""Flower's id of the SuperLink."""


@dataclass(frozen=True, slots=True)
class Objects:
    """A reply as the SuperLink holds it: object contents by hash, and which of them is the message.

    `answers`: the id under which it comes in, which a node cannot choose: that of the message the node was sent.
    """

    contents: Mapping[str, bytes]
    root: str
    answers: str


Reply = Message | Objects | None
Node = Callable[[Message], Reply | list[Reply]]


def objects_of(message: Message, answers: str) -> Objects:
    """What is sent of a message."""
    message.metadata.__dict__["_message_id"] = ""
    root = message.object_id
    return Objects({id: part.deflate() for id, part in get_all_nested_objects(message).items()}, root, answers)


def with_object(sent: Objects, old: bytes, new: bytes) -> Objects:
    """The reply with one object's content replaced, and the hashes of all above it made to fit, as a client would."""
    contents = dict(sent.contents)
    changes = {get_object_id(old): new}
    root = sent.root
    while changes:
        was, content = changes.popitem()
        contents.pop(was, None)
        now = get_object_id(content)
        contents[now] = content
        root = now if was == root else root
        for id, other in list(contents.items()):
            if was.encode() in other:
                changes[id] = other.replace(was.encode(), now.encode())
    return Objects(contents, root, sent.answers)


@dataclass
class InProcessGrid(Grid):
    """`nodes` by id; each is called when a message is pushed to it and answers with a message, raw objects or nothing."""

    nodes: Mapping[int, Node]
    poll: float = 0.002
    held: dict[str, list[Objects]] = field(default_factory=dict)
    timed_out: int = 0
    """How often somebody had not answered in time."""

    def __post_init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SERVER, 1

    def set_run(self, run: Run) -> None:
        raise NotImplementedError("there is only one run in a process")

    @property
    def run(self) -> Run:
        raise NotImplementedError("there is only one run in a process")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            id = message.object_id
            message.metadata.__dict__["_message_id"] = id
            received = make_message(message.metadata, _copied(message.content))
            made = self.nodes[message.metadata.dst_node_id](received)
            for reply in made if isinstance(made, list) else [made]:
                if isinstance(reply, Message):
                    reply = objects_of(reply, id)
                if reply is not None:
                    self.held.setdefault(reply.answers, []).append(reply)
            ids.append(id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        out = []
        for reply in [reply for id in message_ids for reply in self.held.pop(id, [])]:  # gone once they are pulled
            message = cast(Message, inflate_object_from_contents(reply.root, dict(reply.contents)))
            message.metadata.__dict__["_message_id"] = reply.root
            out.append(message)
        return out

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        waiting = set(self.push_messages(list(messages)))
        end = time.monotonic() + (timeout or 0.0)
        replies: list[Message] = []
        while timeout is None or time.monotonic() < end:
            pulled = self.pull_messages(waiting)
            replies += pulled
            waiting -= {message.metadata.reply_to_message_id for message in pulled}
            if not waiting:
                break
            time.sleep(self.poll)
        self.timed_out += bool(waiting)
        return replies


def _copied(content: RecordDict) -> RecordDict:
    """What a node receives is its own: Flower's strategies send one record to all."""
    out = RecordDict()
    for name, record in content.items():
        out[name] = record.copy()
    return out
