"""What a relay asks of a node and what the node answers, and runs whose messages a relay carries unread.

Knows nothing of Flower: `flower/swarm_records.py` writes these down as its records.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from assay.config import ConfigError
from assay.verdict import Reason

Status = Literal["ok", "behind", "refused", "done"]
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LARGEST = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a relay asks: answer `round` (the one after the last: only learn), given these pools by round."""

    round: int
    plan: bytes
    pools: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`ok`: here is the signed message. `behind`: pools from `learnt` + 1 on are needed. `refused`: the reason says why.
    `done`: the run is over. `learnt`: rounds learnt; `model`: the hash of the weights since then."""

    status: Status
    learnt: int
    head: str
    model: str
    message: bytes = b""
    reason: str = Reason.OK.value
    sentence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mail:
    """A run of which the relay knows no plan: `rounds` rounds, in each a message of at most `max_bytes` from every node.

    `run`: public, and drawn after the nodes' names were fixed. Who the nodes are stands in their file of keys.
    """

    run: str
    rounds: int
    max_bytes: int = 8_000_000

    def __post_init__(self) -> None:
        if type(self.run) is not str or not RUN.fullmatch(self.run):
            raise ConfigError("run: give a name of letters, digits, dot, dash and underscore, at most 64")
        for key in ("rounds", "max_bytes"):
            if type(value := getattr(self, key)) is not int or not 1 <= value <= LARGEST:
                raise ConfigError(f"{key}: give a whole number from 1 to {LARGEST}")


def read_mail(path: str | Path) -> Mail:
    """The file `mail.toml`: run, rounds and, if wanted, max_bytes. ConfigError says what is wrong with it."""
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({type(error).__name__})") from None
    if unknown := sorted(set(found) - set(Mail.__dataclass_fields__)):
        raise ConfigError(f"{path}: {unknown[0]} is no key of it; known: {', '.join(Mail.__dataclass_fields__)}")
    try:
        return Mail(**found)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error if isinstance(error, ConfigError) else 'needs run and rounds'}") from None
