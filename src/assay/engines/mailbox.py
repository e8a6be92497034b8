"""A node's folder between a relay and a trainer that keeps its own time: pools come in, signed messages go out.

    mail.toml keys.toml node.pem    what the node's operator put there (relay.py, swarm/keys.py)
    pools/000012.pool               what the relay says everybody sent in a round; the side of the relay writes it
    sent/000012.signed              this node's message, once for each round; the trainer's side writes it

The two sides are processes of their own and may die at any moment: every file appears whole. This side reads no
message and believes nothing; the trainer's does (`trl/relayed.py`). Knows nothing of Flower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from assay import checkpoint
from assay.config import ConfigError
from assay.engines.relay import Answer, Mail, Request, Status
from assay.swarm.relayed import HEADER
from assay.swarm.signed import MAX_NAME, OVERHEAD
from assay.verdict import Reason

POOLS, SENT = "pools", "sent"
KEPT = 256
"""Pools that are kept for a trainer that goes on from an older checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`nodes`: how many there are. `wait`: seconds to wait for the trainer in a round, `poll` between two looks."""

    folder: Path
    mail: Mail
    nodes: int
    wait: float = 540.0
    poll: float = 0.2

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise ConfigError(f"{self.folder}: there is no such folder")
        if not (0 < self.wait < float("inf") and 0 < self.poll < float("inf")):
            raise ConfigError("wait and poll must be seconds above 0")


def pool_file(folder: Path, index: int) -> Path:
    """Where the pool of a round lies."""
    return folder / POOLS / f"{index:06d}.pool"


def sent_file(folder: Path, index: int) -> Path:
    """Where this node's message of a round lies."""
    return folder / SENT / f"{index:06d}.signed"


def newest(folder: Path) -> int:
    """The last round whose pool has come; 0 if none has."""
    return max((int(path.stem) for path in (folder / POOLS).glob("[0-9]*.pool")), default=0)


def largest_pool(mail: Mail, nodes: int) -> int:
    """Most bytes a pool may have."""
    return HEADER.size + nodes * (mail.max_bytes + OVERHEAD + 6 + MAX_NAME)


def turn(settings: Settings, request: Request, sleep: Callable[[float], None] = time.sleep) -> Answer:
    """Take the pools that are missing, then hand over the trainer's message of the round as soon as it is there.

    A trainer that is not ready in time is silent in that round. Nothing the relay sends raises.
    """
    folder, last = settings.folder, settings.mail.rounds
    if not 1 <= request.round <= last + 1:
        return _says(folder, "refused", Reason.WRONG_ROUND, f"asked for round {request.round} of {last}")
    if refusal := _take(settings, request):
        return refusal
    if newest(folder) + 1 < request.round:
        return _says(folder, "behind")
    if request.round == last + 1:
        return _says(folder, "done")
    path, end = sent_file(folder, request.round), time.monotonic() + settings.wait
    while not path.exists() and time.monotonic() < end:
        sleep(settings.poll)
    if not path.exists():
        return _says(folder, "ok", Reason.MISSING, f"the trainer sent nothing for {settings.wait:g} s")
    return _says(folder, "ok", message=path.read_bytes())


def _take(settings: Settings, request: Request) -> Answer | None:
    """Write the pools that follow on the newest; a refusal for one that is too large or was another before."""
    folder, limit = settings.folder, largest_pool(settings.mail, settings.nodes)
    for index in sorted(request.pools):
        pool, path = request.pools[index], pool_file(folder, index)
        if not 1 <= index < request.round:
            return _says(
                folder, "refused", Reason.WRONG_ROUND, f"pool of round {index} when round {request.round} is asked"
            )
        if len(pool) > limit:
            return _says(
                folder, "refused", Reason.TOO_LARGE, f"pool of round {index}: {len(pool)} bytes, limit {limit}"
            )
        if path.exists():
            if path.read_bytes() != pool:
                return _says(folder, "refused", Reason.WRONG_POOL, f"pool of round {index} was another before")
        elif index == newest(folder) + 1:
            checkpoint.write_atomic(path, pool)
            pool_file(folder, index - KEPT).unlink(missing_ok=True)
    return None


def _says(folder: Path, status: Status, reason: Reason = Reason.OK, sentence: str = "", message: bytes = b"") -> Answer:
    return Answer(
        status=status, learnt=newest(folder), head="", model="", message=message, reason=reason.value, sentence=sentence
    )
