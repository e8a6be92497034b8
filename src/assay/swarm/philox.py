"""Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") on int64 tensors.

The counter-based generator of CUDA's libraries and of Triton. Here keyed by a completion's seed, the counter being
(position, token, 0, 0); the first of the four output words is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four output words of counters and keys: int64 tensors of values below 2**32 that broadcast together.

    A product of two 32-bit words fits 64 bits; in int64 its top bit becomes the sign, so that the high word has to be
    masked after an arithmetic shift.

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [hex(int(word)) for word in philox4x32((zero, zero, zero, zero), (zero, zero))]  # Random123's known answer
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        low, high = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((high >> 32) & _MASK) ^ c1 ^ k0,
            high & _MASK,
            ((low >> 32) & _MASK) ^ c3 ^ k1,
            low & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def words(seed_B: Tensor, position_B: Tensor, token_BK: Tensor) -> Tensor:
    """32-bit words (B, K) int64 for `token_BK` at `position_B` under `seed_B`, all int64."""
    zero = torch.zeros((), dtype=torch.int64, device=token_BK.device)
    key = seed_B[:, None] & _MASK, (seed_B[:, None] >> 32) & _MASK
    return philox4x32((position_B[:, None] & _MASK, token_BK & _MASK, zero, zero), key)[0]
