"""Pools that come by a relay: how one is written, hashed and read, and what a node makes of what the others signed.

A pool is every node's signed message of one round, as the relay says it got them. Its bytes have one form, and each
node keeps the *head*: a hash chained over all pools it was given. A node's next message carries its head inside the
signature, so that everybody sees, one round later, who was given something else.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay.contribution import Refusal
from assay.swarm.exchange import Gathered, Plan, Rules, gather, template
from assay.swarm.keys import public_hex
from assay.swarm.signed import OVERHEAD, Expected, Keys, Opened, Statement, open_signed
from assay.verdict import Reason
from assay.wire import WireError
from assay.wire.envelope import malformed, show

MAGIC = b"ASSAYPL1"
HEADER = struct.Struct("<8sQI")


def plan_bytes(plan: Plan) -> bytes:
    """The one form of a plan: canonical JSON."""
    asked = [[node, [[prompt, count] for prompt, count in plan.asked[node].items()]] for node in sorted(plan.asked)]
    return _canonical({"round": plan.round, "mode": plan.mode, "assigned": plan.assigned, "asked": asked})


def plan_sha256(plan: Plan) -> str:
    """What a node signs of the plan it answers."""
    return hashlib.sha256(b"assay.plan.1" + plan_bytes(plan)).hexdigest()


def genesis(run: str, keys: Keys, identity: Mapping[str, Any]) -> str:
    """The head before the first pool: the run, everybody's keys, and the experiment as this node understands it."""
    told = {"run": run, "keys": {node: public_hex(key) for node, key in keys.items()}, "identity": identity}
    return hashlib.sha256(b"assay.genesis.1" + _canonical(told)).hexdigest()


def next_head(head: str, pool: bytes) -> str:
    """The head after one more pool."""
    return hashlib.sha256(b"assay.head.1" + bytes.fromhex(head) + hashlib.sha256(pool).digest()).hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def encode_pool(round: int, messages: Mapping[str, bytes]) -> bytes:
    """MAGIC | round u64 | count u32 | for each node in order: u16 name, u32 message."""
    out = [HEADER.pack(MAGIC, round, len(messages))]
    for node in sorted(messages):
        name = node.encode()
        out += [struct.pack("<H", len(name)), name, struct.pack("<I", len(messages[node])), messages[node]]
    return b"".join(out)


def decode_pool(pool: bytes, *, round: int, nodes: Sequence[str]) -> dict[str, bytes]:
    """Messages by node, of known nodes only and in the one order. WireError: the relay did not send a pool."""
    if len(pool) < HEADER.size or not pool.startswith(MAGIC):
        raise malformed(f"not a pool: {len(pool)} bytes that begin with {pool[: len(MAGIC)]!r}")
    _, found_round, count = HEADER.unpack_from(pool)
    if found_round != round:
        raise WireError(Reason.WRONG_ROUND, f"pool of round {found_round}, expected {round}")
    if count > len(nodes):
        raise malformed(f"pool of {show(count)} messages from {len(nodes)} nodes")
    view, at = memoryview(pool), HEADER.size
    out: dict[str, bytes] = {}

    def take(size: int) -> memoryview:
        nonlocal at
        if len(view) < at + size:
            raise malformed(f"pool ends at byte {len(view)}, {at + size} were announced")
        at += size
        return view[at - size : at]

    for _ in range(count):
        raw = bytes(take(int.from_bytes(take(2), "little")))
        message = bytes(take(int.from_bytes(take(4), "little")))
        node = raw.decode(errors="replace")
        if node not in nodes or (out and node <= max(out)):
            raise malformed(f"pool names {show(node)}: unknown, twice or out of order")
        out[node] = message
    if at != len(view):
        raise malformed(f"{len(view) - at} bytes behind the pool")
    return out


def pool_bytes(plan: Plan, rules: Rules) -> int:
    """Most bytes a pool of this plan may have."""
    owed = sum(template(node, plan, rules).message_bytes + OVERHEAD for node in plan.asked)
    return HEADER.size + owed + sum(6 + len(node.encode()) for node in plan.asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """One pool as one node reads it, before any of it is learnt: what the signatures prove.

    `sha256` and `head`: of the pool, and of all pools with it; `messages`: sha256 of what came under each name.
    `votes`: the head each node signed, of those that signed for this run and round at all.
    """

    plan: Plan
    sha256: str
    head: str
    messages: Mapping[str, str]
    opened: Mapping[str, Opened]
    votes: Mapping[str, str]

    def gathered(self, rules: Rules) -> Gathered:
        """The completions of what is in order, through the wire; everything else as refusals."""
        good = {n: o.statement.contents for n, o in self.opened.items() if o.statement is not None and not o.refusal}
        found = gather(good, self.plan, rules)
        known = {n: o.refusal for n, o in self.opened.items() if o.refusal is not None}
        refused = tuple(known.get(r.participant, r) for r in found.refused)
        return Gathered(plan=found.plan, completions=found.completions, refused=refused)


def hear(pool: bytes, *, plan: Plan, rules: Rules, keys: Keys, head: str) -> Heard:
    """Open every message of the pool of `plan`'s round; `head` is the head before it. WireError: it is no pool."""
    if len(pool) > (limit := pool_bytes(plan, rules)):
        raise WireError(Reason.TOO_LARGE, f"pool has {len(pool)} bytes, limit {limit}")
    messages = decode_pool(pool, round=plan.round, nodes=sorted(plan.asked))
    sha256 = plan_sha256(plan)
    opened = {}
    for node, message in messages.items():
        expected = Expected(
            run=rules.run, round=plan.round, plan=sha256, head=head,
            max_contents=template(node, plan, rules).message_bytes,
        )  # fmt: skip
        opened[node] = open_signed(message, node=node, key=keys[node], expected=expected)
    said: dict[str, Statement] = {n: o.statement for n, o in opened.items() if o.statement is not None}
    votes = {n: s.head for n, s in said.items() if (s.run, s.round) == (rules.run, plan.round)}
    return Heard(
        plan=plan, sha256=hashlib.sha256(pool).hexdigest(), head=next_head(head, pool),
        messages={n: hashlib.sha256(m).hexdigest() for n, m in messages.items()}, opened=opened, votes=votes,
    )  # fmt: skip


def majority(nodes: int) -> int:
    """Nodes that must hold one head before anybody goes on from it: more than half."""
    return nodes // 2 + 1


def shared_by(heard: Heard, head: str, me: str | None) -> int:
    """How many nodes hold `head`: by what they signed in the pool, and `me` if it is this node's own."""
    return len({n for n, h in heard.votes.items() if h == head} | ({me} if me is not None else set()))


def about_mine(heard: Heard, me: str, sent: bytes | None) -> Refusal | None:
    """What the relay did to this node's own message of that round, if anything: nobody else can know."""
    if sent is None:
        return None
    mine, found = hashlib.sha256(sent).hexdigest(), heard.messages.get(me)
    if found is None:
        return Refusal(me, mine, Reason.MISSING.value, "this node's message is not in the pool: lost, late or left out")
    if found != mine:
        return Refusal(me, mine, Reason.HASH_MISMATCH.value, "this node's message was altered on its way into the pool")
    return None
