"""A bound on what Flower puts together of a client's objects, before anybody can look at it.

An array travels as chunks and a list of which chunk comes where. Flower's reader follows that list whatever its length:
a client who sends one chunk of 20 MB and names it a thousand times makes the server allocate 20 GB, within
`pull_messages`, where a guard around the grid only sees the result. So the reader of arrays is replaced, for the whole
process and once, by one that adds up the sizes first; the limit is that of the message being pulled, and without one it
is Flower's own reader.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from flwr.app import Array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_children_ids_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry

from assay.verdict import Reason
from assay.wire import WireError

_LEFT: ContextVar[list[int] | None] = ContextVar("assay_flower_left", default=None)


class BoundedArray(Array):
    """Flower's `Array`, read only if its chunks fit into what is left of the message's limit."""

    @classmethod
    def inflate(cls, object_content: bytes, children: dict[str, InflatableObject] | None = None) -> Array:
        left = _LEFT.get()
        if left is not None:
            ids = get_object_children_ids_from_object_content(object_content)
            order = json.loads(get_object_body(object_content, Array).decode())["arraychunk_ids"]
            sizes = {id: len(c.data) for id, c in (children or {}).items() if isinstance(c, ArrayChunk)}
            for index in order:
                left[0] -= sizes[ids[index]]
                if left[0] < 0:
                    raise WireError(Reason.TOO_LARGE, "its arrays are put together of more bytes than are allowed")
        return Array.inflate(object_content, children)


@contextmanager
def at_most(nbytes: int) -> Iterator[None]:
    """Arrays inflated in this context may have `nbytes` in all; more is a WireError, raised before they are made."""
    inflatable_class_registry["Array"] = BoundedArray
    token = _LEFT.set([nbytes])
    try:
        yield
    finally:
        _LEFT.reset(token)
