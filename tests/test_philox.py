"""Philox4x32-10 against Random123's known answers, an independent implementation, and NumPy's statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.swarm.philox import philox4x32, words
from assay.swarm.sampling import Sampler, gumbel, margin, sample

WORD = st.integers(0, 2**32 - 1)
# Random123 1.14, tests/kat_vectors, philox4x32 10
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Python's own integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def run(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    tensors = [torch.tensor([x], dtype=torch.int64) for x in (*counter, *key)]
    return tuple(int(w) for w in philox4x32(tuple(tensors[:4]), tuple(tensors[4:])))  # type: ignore[arg-type]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert run(counter, key) == expected
    assert plain(counter, key) == expected


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_agrees_with_python_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    assert run(counter, key) == plain(counter, key)


def test_words_are_keyed_by_seed_and_counted_by_position_and_token() -> None:
    seeds, positions = [0, 1, 2**40 + 7, 2**63 - 1], [0, 33, 2**31, 5]
    tokens = [[0, 1, 49151], [5, 6, 7], [9, 9, 10], [0, 2, 4]]
    found = words(torch.tensor(seeds), torch.tensor(positions), torch.tensor(tokens))
    for b, seed in enumerate(seeds):
        for k, token in enumerate(tokens[b]):
            assert int(found[b, k]) == plain((positions[b], token, 0, 0), (seed % 2**32, seed >> 32))[0]


def test_the_words_are_even() -> None:
    found = words(torch.arange(200), torch.arange(200) * 3, torch.arange(500).repeat(200, 1)).flatten().numpy()
    counts = np.histogram(found, bins=64, range=(0, 2**32))[0]
    chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert 20 < chi < 125  # 63 degrees of freedom; both bounds beyond 1e-6


def test_a_sampler_with_philox_draws_its_softmax_and_verifies_itself() -> None:
    sampler = Sampler(top_k=0, noise="philox")
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    seed = torch.arange(20_000)
    position = torch.full_like(seed, 9)
    drawn = sample(logits.expand(20_000, 4), seed, position, sampler)
    share = torch.bincount(drawn, minlength=4) / 20_000
    assert torch.allclose(share, logits.softmax(-1)[0], atol=0.015)
    rows = logits.expand(20_000, 4)
    assert float(margin(rows, drawn, seed, position, sampler, 0.0).gap_B.max()) == 0
    other = Sampler(top_k=0)
    assert float((sample(rows, seed, position, other) == drawn).float().mean()) < 0.7
    assert not torch.equal(gumbel(seed, position, drawn[:, None]), gumbel(seed, position, drawn[:, None], "philox"))


def test_unknown_noise() -> None:
    with pytest.raises(ValueError, match="murmur3"):
        Sampler(noise="dice")  # type: ignore[arg-type]
