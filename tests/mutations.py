"""Bytes and values to fuzz with, made from one seed each: a failure names its seed, and the seed makes it again.

A strategy that draws every byte costs Hypothesis more than what is tested costs; it draws the seed and keeps, reports
and replays failing ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

PIECES: tuple[bytes, ...] = (
    b"[", b"]", b"{", b"}", b'"', b",", b":", b"0", b"-", b"1e9", b"1e999", b"NaN", b"true", b"null", b"\\u0000", b"\0",
    b"\xff\xff\xff\xff", b"\xed\xa0\x80", b"9" * 99, b"[" * 999, b" " * 300,
)  # fmt: skip
WILD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, float("inf"), float("-inf"),
    float("nan"), "", "a", "\ud800", "x" * 5000, "__metadata__", [], [[]], [0], [None], {}, {"a": []}, [[[[]]]],
)  # fmt: skip


def mutated(data: bytes, rng: random.Random, pieces: Sequence[bytes] = PIECES, most: int = 4) -> bytes:
    """Up to `most` bits flipped, bytes set, spans cut, doubled or moved, pieces put in."""
    made = bytearray(data)
    for _ in range(rng.randint(0, most)):
        if not made:
            break
        at, to = sorted((rng.randrange(len(made)), rng.randrange(len(made))))
        kind = rng.randrange(6)
        if kind == 0:
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            made[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del made[at : to if rng.random() < 0.3 else at + rng.randint(1, 8)]
        elif kind == 3:
            made[at:at] = made[to : to + rng.choice((4, 16, 64, len(made)))]
        elif kind == 4:
            made[at:at] = rng.choice(pieces)
        else:
            made[at : at + rng.randint(0, 8)] = rng.randbytes(rng.randint(0, 8))
    return bytes(made)


def wild(rng: random.Random, depth: int = 2) -> Any:
    """Any value JSON, or what Python's reader takes for it, can hold."""
    roll = rng.random()
    if depth and roll < 0.15:
        return [wild(rng, depth - 1) for _ in range(rng.randint(0, 4))]
    if depth and roll < 0.25:
        return {str(wild(rng, 0))[:9]: wild(rng, depth - 1) for _ in range(rng.randint(0, 3))}
    return rng.choice(WILD) if roll < 0.7 else rng.randint(-9, 2 ** rng.randint(1, 70))
