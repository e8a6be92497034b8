"""Who was asked in a round, for what, and which reply is whose."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flwr.app import Message

from assay.config import ConfigError
from assay.contribution import Refusal, Tensors
from assay.engines.flower.arrays import Form
from assay.engines.flower.replies import Reply, participant_of, refuse
from assay.verdict import Reason
from assay.wire import missing

log = logging.getLogger("flwr")


@dataclass(frozen=True, slots=True)
class Asked:
    """What was sent in a round: to whom, and what a reply must look like."""

    round: int
    nodes: tuple[int, ...]
    form: Form | None = None
    start: Tensors | None = None
    name: str = ""
    """Of the array record."""


def nodes_of(messages: Sequence[Message]) -> tuple[int, ...]:
    nodes = [message.metadata.dst_node_id for message in messages]
    if len(set(nodes)) != len(nodes):
        raise ConfigError("the strategy sends a node more than one message a round; Assay judges one reply of each")
    return tuple(nodes)


def array_names(message: Message, form: Form) -> list[str]:
    """The name of the one array record in a message, which must be the global arrays or look like them."""
    found = message.content.array_records
    for record in found.values():
        if {name: tuple(array.shape) for name, array in record.items()} != dict(form.shapes):
            raise ConfigError(
                "the strategy sends arrays of another form than the global ones; Assay cannot compare replies"
            )
    if len(found) != 1:
        raise ConfigError(f"the strategy sends {len(found)} array records in a message; Assay screens exactly one")
    return list(found)


def sort_replies(
    replies: Iterable[Message], nodes: Sequence[int], read: Callable[[Message, int], Reply | Refusal]
) -> tuple[list[Reply], list[Refusal]]:
    """One reply or one refusal for each node that was asked, by node: the order of arrival changes nothing."""
    by_node: dict[int, list[Message]] = {node: [] for node in nodes}
    for message in replies:
        source = message.metadata.src_node_id
        if source in by_node:
            by_node[source].append(message)
        else:
            log.warning("Assay: dropped a reply that says it is from node %s, which was not asked", source)
    good, refused = [], []
    for node in sorted(by_node):
        found = by_node[node]
        if len(found) == 1:
            one = read(found[0], node)
        elif found:
            sentence = f"{len(found)} replies say they are from it, and not all can be"
            one = refuse(node, Reason.WRONG_PARTICIPANT, sentence)
        else:
            one = missing(participant_of(node))
        if isinstance(one, Reply):
            good.append(one)
        else:
            refused.append(one)
    return good, refused
