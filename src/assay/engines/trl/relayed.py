"""An exchange by a relay that nobody trusts: what a trainer signs, and what it makes of the pools that come back.

The trainer's side of `engines/mailbox.py`; the other side hands the files to Flower. What is proven, and how, is what
`swarm/relayed.py` proves for Assay's own nodes, but for the plan: a trainer brings its own prompts, the relay knows none,
and `swarm/exchange.py` refuses completions of prompts that were not asked for.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from assay.checkpoint import write_atomic
from assay.config import ConfigError
from assay.engines.mailbox import largest_pool, pool_file, sent_file
from assay.engines.relay import read_mail
from assay.engines.trl.exchanges import checked
from assay.swarm.keys import public_hex, read_key, read_keys
from assay.swarm.relayed import decode_pool, genesis, majority, next_head
from assay.swarm.signed import Expected, Opened, Statement, open_signed, parse, sign
from assay.wire import WireError

log = logging.getLogger("trl")
NO_PLAN = hashlib.sha256(b"assay.plan.none").hexdigest()


class RelayError(RuntimeError):
    """The relay is silent, or showed nodes different pools. Training stops: from here on weights would differ."""


class RelayExchange:
    """Messages through `folder`, which the node's mailbox fills and empties (`flower/mailbox_node.py`).

    `quorum`: how many nodes must have been given this node's own pools before it goes on; None is more than half of all.
    `timeout`: seconds to wait for a round's pool. The run's name is in `mail.toml`, the nodes' names in `keys.toml`.
    ConfigError for what is wrong with the node's own files; RelayError for what the relay does.
    """

    def __init__(
        self, folder: str | Path, *, node: str, quorum: int | None = None, timeout: float = 3600.0, poll: float = 0.2
    ) -> None:
        self.folder, self.node, self.timeout, self.poll = Path(folder), node, timeout, poll
        self.mail, self._keys = read_mail(self.folder / "mail.toml"), read_keys(self.folder / "keys.toml")
        self.run, self.nodes = self.mail.run, checked(self.mail.run, node, self._keys)
        self._key = read_key(self.folder / "node.pem")
        if public_hex(self._key) != public_hex(self._keys[node]):
            raise ConfigError(f"{self.folder / 'node.pem'}: is not the key that keys.toml has for {node}")
        if quorum is not None and not 1 <= quorum <= len(self.nodes):
            raise ConfigError(f"quorum is {quorum}: give a number from 1 to {len(self.nodes)}, or leave it out")
        self.quorum = quorum or majority(len(self.nodes))

    def publish(self, round: int, message: bytes) -> None:
        """Sign and hand over; of one round never two messages, so a trainer that goes back sends what it sent before."""
        head, path = self.head(round - 1), sent_file(self.folder, round)
        if round > self.mail.rounds:
            raise ConfigError(f"mail.toml says {self.mail.rounds} rounds, the trainer begins round {round}")
        if len(message) > self.mail.max_bytes:
            raise ConfigError(
                f"max_bytes is {self.mail.max_bytes}, a message has {len(message)}; raise it in mail.toml"
            )
        if path.exists():
            kept, _, _ = parse(path.read_bytes(), self.mail.max_bytes)
            if kept.head != head:
                raise RelayError(f"round {round} was signed before, after other pools than these")
            if kept.contents != message:
                log.warning(f"round {round} was signed before with other completions; those stand")
            return
        statement = Statement(run=self.run, round=round, node=self.node, plan=NO_PLAN, head=head, contents=message)
        write_atomic(path, sign(statement, self._key))

    def collect(self, round: int, limits: Mapping[str, int]) -> Mapping[str, bytes | None]:
        """What the round's pool holds of the nodes in `limits`, and of this node itself: None where it was left out.

        What a relay lost of this node's own the others have not learnt from, so nobody may.
        """
        pool = self._pool(round)
        head = self.head(round - 1)
        opened = self._open(round, pool, head)
        self._agree(round, opened, head)
        write_atomic(self._head_file(round), next_head(head, pool))
        found: dict[str, bytes | None] = {}
        for node in {*limits, self.node}:
            one = opened.get(node)
            if one is not None and one.refusal is not None:
                log.warning(f"round {round}: message of {node} refused: {one.refusal.reason}: {one.refusal.sentence}")
            good = one is not None and one.refusal is None and one.statement is not None
            contents = one.statement.contents if good else None  # type: ignore[union-attr]
            limit = limits.get(node, self.mail.max_bytes)
            found[node] = contents if contents is None else contents[: limit + 1]
        if found[self.node] is None:
            log.warning(f"round {round}: this node's own message is not in the pool; nobody learns from it")
        return found

    def head(self, round: int) -> str:
        """The hash chained over all pools up to that round, this node's files its witnesses. RelayError without them."""
        if round == 0:
            return genesis(self.run, self._keys, {"mail": asdict(self.mail)})
        try:
            return self._head_file(round).read_text().strip()
        except FileNotFoundError:
            raise RelayError(
                f"{self.folder}: round {round} was never collected here; let the trainer go on from its own checkpoint"
            ) from None

    def _head_file(self, round: int) -> Path:
        return self.folder / "heads" / f"{round:06d}"

    def _pool(self, round: int) -> bytes:
        path, end = pool_file(self.folder, round), time.monotonic() + self.timeout
        while not path.exists():
            if time.monotonic() >= end:
                raise RelayError(f"no pool of round {round} in {self.timeout:g} s: the relay or the mailbox is silent")
            time.sleep(self.poll)
        if os.path.getsize(path) > (limit := largest_pool(self.mail, len(self.nodes))):
            raise RelayError(f"pool of round {round} has more than {limit} bytes")
        return path.read_bytes()

    def _open(self, round: int, pool: bytes, head: str) -> dict[str, Opened]:
        expected = Expected(run=self.run, round=round, plan=NO_PLAN, head=head, max_contents=self.mail.max_bytes)
        try:
            messages = decode_pool(pool, round=round, nodes=self.nodes)
        except WireError as error:
            raise RelayError(f"pool of round {round}: {error}") from None
        return {n: open_signed(m, node=n, key=self._keys[n], expected=expected) for n, m in messages.items()}

    def _agree(self, round: int, opened: Mapping[str, Opened], head: str) -> None:
        """Every message says what its node had been given before: a quorum must have been given the same."""
        said = {n: o.statement for n, o in opened.items() if o.statement is not None}
        votes = {n: s.head for n, s in said.items() if (s.run, s.round) == (self.run, round)}
        count = len({n for n, h in votes.items() if h == head} | {self.node})
        if count < self.quorum:
            other = sorted(n for n, h in votes.items() if h != head and n != self.node)
            told = f"{', '.join(other)} signed another" if other else "too few have spoken"
            raise RelayError(
                f"pool of round {round}: {count} of {len(self.nodes)} nodes hold this node's pools, {told}; "
                f"{self.quorum} are needed"
            )
