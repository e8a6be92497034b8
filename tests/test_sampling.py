"""Seeded sampling: noise against MurmurHash3 and vLLM's own numbers, candidates and margins against plain searches.

Legend: B rows, V vocabulary, K candidates.
"""

import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn.utils import murmurhash3_32

from assay.swarm import sampling
from assay.swarm.sampling import Sampler, candidates, gumbel, margin, sample, seed_of

examples = settings(max_examples=60, deadline=None)
SAMPLERS = [
    Sampler(top_k=0),
    Sampler(top_k=5),
    Sampler(top_k=1),
    Sampler(top_k=10_000),
    Sampler(top_k=0, top_p=0.81234567),
    Sampler(top_k=12, top_p=0.61234567, temperature=0.7),
    Sampler(top_k=7, temperature=2.5),
]
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=str)

# (seed, position, token, hash, u, noise), printed by vLLM 0.33.0's own Triton functions in Triton 3.9's interpreter.
VLLM = [
    (0, 0, 0, 0x8134CDF8, 0.5047119855880737, 0.3529449701309204),
    (0, 0, 49151, 0xA4C4CC1B, 0.6436278820037842, -0.031285353004932404),
    (1, 7, 1, 0xFA249466, 0.9771206378936768, -1.3290677070617676),
    (1, 7, 0, 0xDFD5AC1E, 0.8743541240692139, -0.7296178936958313),
    (2**32, 31, 2, 0x5BF378C1, 0.3591838479042053, 0.8096525073051453),
    (2**32, 31, 50, 0x34D3CE12, 0.20635688304901123, 1.4648126363754272),
    (2**63 - 1, 2**31, 3, 0x109D5186, 0.0649004876613617, 2.7015366554260254),
    (2**63 - 1, 2**31, 1023, 0x8DDE76EE, 0.5541757941246033, 0.21340292692184448),
    (-1, 2**32 - 1, 0, 0xA9E4FE34, 0.663650393486023, -0.0858144536614418),
    (-1, 2**32 - 1, 1, 0xD7B372AD, 0.8425819277763367, -0.6145638823509216),
    (6636261888586188041, 123, 151935, 0x4D85862D, 0.3028186559677124, 1.019681692123413),
    (6636261888586188041, 123, 5, 0x3511D8F2, 0.20730358362197876, 1.459661602973938),
    (-(2**63), 4096, 1023, 0x19528C9F, 0.09891585260629654, 2.26185941696167),
    (-(2**63), 4096, 17, 0x10EBC40A, 0.06609749794006348, 2.6826274394989014),
    (0x0123456789ABCDEF, 0x1234, 0x5678, 0x181F4C55, 0.09422757476568222, 2.312966823577881),
    (0x0123456789ABCDEF, 0x1234, 99, 0xE57959AF, 0.8963829278945923, -0.8184807896614075),
]


def murmur(data: bytes, seed: int = 0) -> int:
    """MurmurHash3_x86_32 in plain integers, for whole words and a tail of up to three bytes."""

    def rotate(x: int, by: int) -> int:
        return ((x << by) | (x >> (32 - by))) & 0xFFFFFFFF

    h, whole = seed, len(data) // 4 * 4
    for at in range(0, whole, 4):
        key = int.from_bytes(data[at : at + 4], "little") * 0xCC9E2D51 % 2**32
        h = (rotate(h ^ rotate(key, 15) * 0x1B873593 % 2**32, 13) * 5 + 0xE6546B64) % 2**32
    if data[whole:]:
        h ^= rotate(int.from_bytes(data[whole:], "little") * 0xCC9E2D51 % 2**32, 15) * 0x1B873593 % 2**32
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def message(seed: int, position: int, token: int) -> bytes:
    return struct.pack("<QII", seed % 2**64, position % 2**32, token)


def vllm_noise(words: list[int]) -> np.ndarray:
    """vLLM's float32 arithmetic step by step: two exact halves, a series of degree 8 under 0.25, a floor under 1 - u."""
    f = np.float32
    word = np.array(words, np.uint64)
    high, low = (word >> np.uint64(16)).astype(f), (word & np.uint64(0xFFFF)).astype(f)
    u = high * f(2.0**-16) + (low + f(0.5)) * f(2.0**-32)
    series = f(1 / 8)
    for n in range(7, 0, -1):
        series = f(1 / n) + u * series
    return -np.log(-np.where(u < 0.25, -u * series, np.log(np.maximum(f(1) - u, f(2.0**-24)))))


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def hashes(seed: int, position: int, tokens: list[int]) -> list[int]:
    state = 0
    for word in (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, position & 0xFFFFFFFF):
        state = sampling._absorb(state, ints([word]))
    return sampling._finish(sampling._absorb(state, ints(tokens))).tolist()


def rows(count: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    """Logits, seeds and positions that look like a run's."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, vocabulary, generator=generator) * scale
    seeds = ints([seed_of("test", seed, "node", row, 0) for row in range(count)])
    return logits, seeds, torch.randint(0, 4096, (count,), generator=generator)


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "seed", "expected"),
    [
        (b"", 0, 0),
        (b"", 1, 0x514E28B7),
        (b"", 0xFFFFFFFF, 0x81F16F39),
        (b"\xff" * 4, 0, 0x76293B50),
        (b"!Ce\x87", 0, 0xF55B516B),
        (b"!Ce\x87", 0x5082EDEE, 0x2362F9DE),
        (b"!Ce", 0, 0x7E4A8634),
        (b"\0\0\0\0", 0, 0x2362F9DE),
        (b"Hello, world!", 0x9747B28C, 0x24884CBA),
        (b"The quick brown fox jumps over the lazy dog", 0x9747B28C, 0x2FA826CD),
    ],
)
def test_the_plain_hash_gives_the_published_vectors(data: bytes, seed: int, expected: int) -> None:
    assert murmur(data, seed) == expected


@examples
@given(
    seed=st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -1])),
    position=st.one_of(st.integers(0, 2**20), st.integers(0, 2**32 - 1)),
    tokens=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20),
)
def test_hash_is_murmur3_of_seed_position_token(seed: int, position: int, tokens: list[int]) -> None:
    expected = [murmur(message(seed, position, token)) for token in tokens]
    assert hashes(seed, position, tokens) == expected
    assert expected == [murmurhash3_32(message(seed, position, token), seed=0, positive=True) for token in tokens]
    noise = gumbel(ints([seed]), ints([position]), ints(tokens)[None])[0].numpy()
    np.testing.assert_allclose(noise, vllm_noise(expected), rtol=0, atol=5e-6)
    exact = [-math.log(-math.log1p(-min(float(np.float32((h + 0.5) / 2**32)), 1 - 2**-24))) for h in expected]
    np.testing.assert_array_equal(noise, np.array(exact, np.float32))


@pytest.mark.parametrize(("seed", "position", "token", "word", "u", "noise"), VLLM)
def test_numbers_of_vllm_itself(seed: int, position: int, token: int, word: int, u: float, noise: float) -> None:
    assert hashes(seed, position, [token]) == [word]
    assert sampling._uniform(ints([word])).item() == u
    assert gumbel(ints([seed]), ints([position]), ints([[token]])).item() == pytest.approx(noise, abs=5e-6)


def test_noise_is_finite_at_the_extremes() -> None:
    words = [0, 1, 2, 255, 256, 2**30 - 1, 2**30, 2**31, 2**32 - 257, 2**32 - 128, 2**32 - 2, 2**32 - 1]
    noise = sampling._noise(ints(words))
    assert noise[0].item() == pytest.approx(33 * math.log(2))
    assert noise[-1].item() == pytest.approx(-math.log(24 * math.log(2)))
    assert noise.tolist() == sorted(noise.tolist(), reverse=True)
    np.testing.assert_allclose(noise.numpy(), vllm_noise(words), rtol=0, atol=5e-6)


def test_ten_million_draws_are_finite_and_gumbel() -> None:
    low, high, total, histogram = math.inf, -math.inf, 0.0, torch.zeros(64)
    for part in range(10):
        seeds = ints([seed_of("draws", part, "n", row, 0) for row in range(20)])
        noise = gumbel(seeds, torch.arange(20) + part, torch.arange(50_000).expand(20, -1))
        low, high, total = (
            min(low, noise.min().item()),
            max(high, noise.max().item()),
            total + noise.double().sum().item(),
        )
        uniform = torch.exp(-torch.exp(-noise))
        histogram += torch.histc(uniform, 64, 0, 1)
    assert -2.82 <= low < -2.5
    assert 14 < high <= 22.88
    assert total / 1e7 == pytest.approx(0.5772157, abs=5 * 1.2825 / math.sqrt(1e7))  # Euler's constant, 5 sigma
    assert stats.chisquare(histogram.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("vary", ["seed", "position", "token"])
def test_neighbouring_inputs_have_unrelated_noise(vary: str) -> None:
    """Consecutive seeds, positions or tokens, from each place the layout has: correlation within 5 sigma of none."""
    count = 200_000
    run, still = torch.arange(count), torch.full((count,), 3)
    for shift in (0, 33) if vary == "seed" else (0,):
        seed, position, token = ((run << shift) if vary == name else still for name in ("seed", "position", "token"))
        noise = gumbel(seed, position, token[:, None])[:, 0].numpy()
        for lag in (1, 2, 16, 256):
            assert abs(np.corrcoef(noise[lag:], noise[:-lag])[0, 1]) < 5 / math.sqrt(count)


@examples
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 40))
def test_noise_depends_on_nothing_but_its_own_row_and_token(seed: int, count: int, vocabulary: int) -> None:
    logits, seeds, positions = rows(count, vocabulary, seed % 1000)
    full = gumbel(seeds, positions, torch.arange(vocabulary).expand(count, vocabulary))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    token_BK, _ = candidates(logits, Sampler(top_k=1 + seed % vocabulary))
    assert torch.equal(gumbel(seeds, positions, token_BK), full.gather(1, token_BK))
    assert torch.equal(gumbel(seeds[order], positions[order], torch.arange(vocabulary)[None]), full[order])
    assert torch.equal(gumbel(seeds[:1], positions[:1], torch.arange(vocabulary)[None]), full[:1])


def test_large_calls_are_the_small_ones_put_together() -> None:
    _, seeds, positions = rows(700, 1)
    token_BK = torch.arange(300).repeat(700, 1).roll(1, 0)
    whole = gumbel(seeds, positions, token_BK)
    assert token_BK.numel() > 3 * sampling._BLOCK_CPU
    assert torch.equal(
        whole, torch.cat([gumbel(seeds[i, None], positions[i, None], token_BK[i, None]) for i in range(700)])
    )
    assert torch.equal(whole, gumbel(seeds, positions, torch.arange(300).expand(700, -1)))


@pytest.mark.parametrize(
    ("seed", "position", "token"),
    [
        (torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 3, dtype=torch.int64)),
        (torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64)),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_inputs_that_would_give_other_noise_are_refused(
    seed: torch.Tensor, position: torch.Tensor, token: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="must be"):
        gumbel(seed, position, token)


# --- seeds and settings -----------------------------------------------------------------------------------------------

fields = st.tuples(st.text(max_size=5), st.integers(0, 99), st.text(max_size=5), st.integers(0, 99), st.integers(0, 99))


def test_seed_is_pinned() -> None:
    assert seed_of("run", 0, "node-a", 3, 0) == 6636261888586188041
    assert seed_of("run", np.int64(0), "node-a", np.int32(3), 0) == 6636261888586188041  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        seed_of("run", 0.5, "node-a", 3, 0)  # type: ignore[arg-type]


@given(fields, fields)
@example(("a", 1, "b", 1, 11), ("a", 1, "b", 11, 1))
@example(("a", 11, "b", 1, 1), ("a1", 1, "b", 1, 1))
@example(('a", 1, "b', 1, "c", 1, 1), ("a", 1, 'b", 1, "c', 1, 1))
@example(("\ud800", 0, "", 0, 0), ("\\ud800", 0, "", 0, 0))
def test_different_fields_have_different_seeds(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert 0 <= seed_of(*one) < 2**63
    assert (seed_of(*one) == seed_of(*other)) == (one == other)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": t} for t in (0.0, -1.0, math.nan, math.inf)]
    + [{"top_k": k} for k in (-1, 2.5, True)]
    + [{"top_p": p} for p in (0.0, -0.1, 1.01, math.nan)],
    ids=str,
)
def test_nonsense_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give a"):
        Sampler(**settings)


# --- candidates -------------------------------------------------------------------------------------------------------


def plain_candidates(logits: list[float], sampler: Sampler) -> dict[int, float]:
    """Sort by (-logit, id); cut at k; cut at the mass before. Python floats."""
    scaled = [float(np.float32(x) / np.float32(sampler.temperature)) for x in logits]
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))[: sampler.top_k or None]
    weight = [math.exp(scaled[token] - scaled[order[0]]) for token in order]
    before = [sum(weight[:n]) / sum(weight) for n in range(len(order))]
    return {token: scaled[token] for token, mass in zip(order, before) if mass < sampler.top_p or sampler.top_p == 1}


# Quarters make ties, also beyond the window in which they are settled first; the nucleus' edge is not on a float's edge.
quarters = st.integers(1, 60).flatmap(
    lambda v: hnp.arrays(np.float32, (3, v), elements=st.integers(-8, 8).map(lambda n: np.float32(n / 4)))
)


@every_sampler
@examples
@given(logits=quarters)
@example(logits=np.zeros((3, 60), np.float32))
def test_candidates_are_those_of_a_plain_search(sampler: Sampler, logits: np.ndarray) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        token_BK, logit_BK = candidates(torch.from_numpy(logits).to(dtype), sampler)
        assert token_BK.dtype == torch.int64
        assert logit_BK.dtype == torch.float32
        assert token_BK.shape[1] == min(sampler.top_k or logits.shape[1], logits.shape[1])
        for row, tokens, values in zip(logits.tolist(), token_BK.tolist(), logit_BK.tolist()):
            assert len(set(tokens)) == len(tokens)
            kept = {token: value for token, value in zip(tokens, values) if value > -math.inf}
            assert kept == pytest.approx(plain_candidates(row, sampler), rel=1e-6)


def test_mass_that_just_reaches_top_p_ends_the_nucleus() -> None:
    token_BK, logit_BK = candidates(torch.zeros(1, 4), Sampler(top_k=0, top_p=0.5))
    assert token_BK[logit_BK > -math.inf].tolist() == [0, 1]


def test_masked_vocabulary_entries_are_never_drawn() -> None:
    logits, seeds, positions = rows(200, 64)
    logits[:, 3:] = -math.inf
    for sampler in SAMPLERS:
        assert sample(logits, seeds, positions, sampler).max() < 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_model_is_an_error(value: float) -> None:
    logits, seeds, positions = rows(3, 20)
    logits[1, 4] = value
    with pytest.raises(ValueError, match="no finite maximum"):
        sample(logits, seeds, positions, Sampler())
    with pytest.raises(ValueError, match="no finite maximum"):
        margin(logits, ints([0, 0, 0]), seeds, positions, Sampler(top_k=5), 0.1)
    with pytest.raises(ValueError, match="no finite maximum"):
        sample(torch.full((1, 4), -math.inf), seeds[:1], positions[:1], Sampler())


# --- sample -----------------------------------------------------------------------------------------------------------


@every_sampler
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_sample_follows_the_softmax(sampler: Sampler, vary: str) -> None:
    """Chi-square over 40,000 draws from one distribution: many seeds at one position, one seed at many positions."""
    count, logits = 40_000, torch.randn(1, 20, generator=torch.Generator().manual_seed(7))
    seed = ints([seed_of("softmax", 0, "n", row if vary == "seed" else 0, 0) for row in range(count)])
    position = torch.arange(count) if vary == "position" else torch.full((count,), 11)
    drawn = sample(logits.expand(count, -1), seed, position, sampler).bincount(minlength=20)
    kept = plain_candidates(logits[0].tolist(), sampler)
    weight = {token: math.exp(value) for token, value in kept.items()}
    expected = [count * w / sum(weight.values()) for w in weight.values()]
    assert int(drawn.sum()) == sum(int(drawn[token]) for token in kept) == count
    if len(kept) > 1:
        assert stats.chisquare([int(drawn[token]) for token in kept], expected).pvalue > 1e-3


@every_sampler
def test_sample_is_the_same_in_any_batch_order_or_shape(sampler: Sampler) -> None:
    logits, seeds, positions = rows(64, 100)
    token = sample(logits, seeds, positions, sampler)
    assert token.dtype == torch.int64
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample(logits[order], seeds[order], positions[order], sampler), token[order])
    assert torch.equal(
        torch.cat([sample(logits[i, None], seeds[i, None], positions[i, None], sampler) for i in range(64)]), token
    )
    assert torch.equal(sample(logits.T.contiguous().T, seeds, positions, sampler), token)
    halves = logits.bfloat16()
    assert torch.equal(sample(halves, seeds, positions, sampler), sample(halves.float(), seeds, positions, sampler))
    assert sample(logits[:0], seeds[:0], positions[:0], sampler).shape == (0,)


def test_noise_of_the_candidates_gives_the_token_that_noise_of_the_whole_vocabulary_gives() -> None:
    logits, seeds, positions = rows(100, 500)
    full = logits + gumbel(seeds, positions, torch.arange(500)[None])
    cut = logits < logits.sort(-1, descending=True).values[:, 49:50]
    assert torch.equal(sample(logits, seeds, positions, Sampler(top_k=50)), full.masked_fill(cut, -math.inf).argmax(-1))
    assert torch.equal(sample(logits, seeds, positions, Sampler(top_k=0)), full.argmax(-1))


def test_a_tie_goes_to_the_lower_token_id() -> None:
    _, seeds, positions = rows(50, 9)
    logits = -gumbel(seeds, positions, torch.arange(9)[None])
    logits[:, :4] -= 1  # the others all score exactly 0
    assert sample(logits, seeds, positions, Sampler(top_k=0)).tolist() == [4] * 50


@examples
@given(st.integers(0, 10**6), st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_temperature_divides_the_logits(seed: int, temperature: float) -> None:
    logits, seeds, positions = rows(8, 40, seed)
    for top_p in (0.7, 1.0):
        hot = sample(logits, seeds, positions, Sampler(temperature=temperature, top_k=9, top_p=top_p))
        assert torch.equal(hot, sample(logits / temperature, seeds, positions, Sampler(top_k=9, top_p=top_p)))


# --- margin -----------------------------------------------------------------------------------------------------------


@every_sampler
def test_margin_is_the_distance_to_the_seeds_own_token(sampler: Sampler) -> None:
    """Without tolerance, for every token of the vocabulary, against a plain search over the candidates."""
    vocabulary = 30
    logits, seeds, positions = rows(20, vocabulary, scale=1.5)
    noise = gumbel(seeds, positions, torch.arange(vocabulary)[None]).tolist()
    drawn = sample(logits, seeds, positions, sampler).tolist()
    gaps = [margin(logits, torch.full((20,), t), seeds, positions, sampler, 0.0) for t in range(vocabulary)]
    for row in range(20):
        score = {t: value + noise[row][t] for t, value in plain_candidates(logits[row].tolist(), sampler).items()}
        for token in range(vocabulary):
            gap, outside = gaps[token].gap_B[row].item(), bool(gaps[token].outside_B[row])
            assert outside == (token not in score)
            assert (gap == 0) == (token == drawn[row])
            assert gap == pytest.approx(max(score.values()) - score.get(token, -math.inf), abs=1e-5)


@every_sampler
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6), boundary=st.sampled_from([0.01, 0.1, 0.5, 2.0]), scale=st.sampled_from([0.1, 1.0, 4.0])
)
def test_an_honest_node_within_the_boundary_is_never_outside(
    sampler: Sampler, seed: int, boundary: float, scale: float
) -> None:
    """Differences of the node's logits are off by at most `boundary`: its gap is at most boundary / temperature."""
    logits, seeds, positions = rows(64, 48, seed, scale)
    error = (torch.rand(64, 48, generator=torch.Generator().manual_seed(seed + 1)) - 0.5) * boundary * 0.999
    token = sample(logits + error + 3.0, seeds, positions, sampler)
    result = margin(logits, token, seeds, positions, sampler, boundary)
    assert not result.outside_B.any()
    assert result.gap_B.max() <= boundary / sampler.temperature + 1e-5


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s.temperature == 1], ids=str)
@examples
@given(seed=st.integers(0, 10**6))
def test_an_honest_node_just_at_the_boundary_is_never_outside(sampler: Sampler, seed: int) -> None:
    """The same on a grid of quarters, where ties and differences of exactly the boundary are common."""
    logits, seeds, positions = rows(64, 48, seed, 8.0)
    error = torch.randint(-1, 2, (64, 48), generator=torch.Generator().manual_seed(seed + 1)) / 4
    logits = logits.round() / 4
    result = margin(logits, sample(logits + error, seeds, positions, sampler), seeds, positions, sampler, 0.5)
    assert not result.outside_B.any()
    assert result.gap_B.max() <= 0.5 + 1e-5


def crossing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row: three clear candidates, then tokens 3 and 4 within 0.06 at the edge of k = 4; token 4 gets high noise."""
    logits = torch.tensor([[3.0, 2.9, 2.8, 1.03, 0.97, -5.0]])
    position = ints([5])
    for seed in range(100_000):
        noise = gumbel(ints([seed]), position, torch.arange(6)[None])[0]
        if noise[4] > 6 and noise[:4].max() < 1:
            return logits, ints([seed]), position
    raise AssertionError("no such seed")


def test_the_edge_of_top_k_is_forgiven_both_ways() -> None:
    logits, seed, position = crossing()
    sampler = Sampler(top_k=4)
    swapped = logits.clone()
    swapped[0, 3:5] = torch.tensor([0.98, 1.02])
    # The node's logits put token 4 inside, the verifier's just outside.
    drawn = sample(swapped, seed, position, sampler)
    assert drawn.tolist() == [4]
    strict = margin(logits, drawn, seed, position, sampler, 0.0)
    assert strict.outside_B.tolist() == [True]
    assert strict.gap_B.tolist() == [math.inf]
    tolerant = margin(logits, drawn, seed, position, sampler, 0.1)
    assert tolerant.outside_B.tolist() == [False]
    assert tolerant.gap_B.tolist() == [0.0]
    # The other way round: the verifier sees a rival that the node never had.
    drawn = sample(logits, seed, position, sampler)
    assert drawn.tolist() != [4]
    assert margin(swapped, drawn, seed, position, sampler, 0.0).gap_B.item() > 3
    assert margin(swapped, drawn, seed, position, sampler, 0.1).gap_B.item() == 0
    # The tolerance ends where it says.
    below = margin(logits, ints([5]), seed, position, sampler, 0.1)
    assert below.outside_B.tolist() == [True]
    assert margin(logits, ints([5]), seed, position, sampler, 6.04).outside_B.tolist() == [False]


def test_without_tolerance_equal_logits_at_an_edge_are_cut_by_id() -> None:
    position, flat = ints([0]), torch.zeros(1, 4)
    for sampler in (Sampler(top_k=2), Sampler(top_k=0, top_p=0.3)):  # both keep tokens 0 and 1
        for seed in range(20):
            noise = gumbel(ints([seed]), position, torch.arange(4)[None])[0]
            lost = margin(flat, ints([1]), ints([seed]), position, sampler, 0.0).gap_B.item()
            assert lost == pytest.approx(max(0.0, float(noise[0] - noise[1])))


def test_the_boundary_is_measured_before_temperature() -> None:
    logits = torch.tensor([[4.0, 2.0, 1.85, 1.0]])
    for temperature in (0.1, 1.0, 8.0):
        sampler = Sampler(top_k=2, temperature=temperature)
        outside = [margin(logits, ints([2]), ints([1]), ints([0]), sampler, b).outside_B.item() for b in (0.14, 0.16)]
        assert outside == [True, False]


def test_the_edge_of_the_nucleus_is_forgiven_both_ways() -> None:
    """Masses .5, .3, .1999, .0001: the third token's preceding mass .8 is on the edge of top_p .79 and .81."""
    logits = torch.tensor([[0.5, 0.3, 0.1999, 0.0001]]).log()
    position = ints([0])
    seed = next(
        ints([s])
        for s in range(10_000)
        if gumbel(ints([s]), position, ints([[0, 1, 2, 3]]))[0].sub(ints([1, 1, 6, 0])).sign().tolist()
        == [-1, -1, 1, -1]
    )
    third, within, without = ints([2]), Sampler(top_k=0, top_p=0.81), Sampler(top_k=0, top_p=0.79)
    assert sample(logits, seed, position, within).tolist() == [2]
    assert margin(logits, third, seed, position, without, 0.0).outside_B.tolist() == [True]
    assert margin(logits, third, seed, position, without, 0.2).outside_B.tolist() == [False]
    honest = sample(logits, seed, position, without)
    assert honest.tolist() != [2]
    assert margin(logits, honest, seed, position, within, 0.0).gap_B.item() > 3
    assert margin(logits, honest, seed, position, within, 0.2).gap_B.item() == 0
    # Far over the edge is outside in spite of the tolerance.
    assert margin(logits, ints([3]), seed, position, without, 0.2).outside_B.tolist() == [True]


def high_noise(token: int) -> torch.Tensor:
    """A seed that gives this one of two tokens far more noise at position 0."""
    return next(
        ints([seed])
        for seed in range(10_000)
        if gumbel(ints([seed]), ints([0]), ints([[token, 1 - token]]))[0].sub(ints([5, 0])).sign().tolist() == [1, -1]
    )


def test_the_tolerance_of_the_nucleus_is_no_wider_than_the_odds() -> None:
    """Logits 1 apart, within 0.4: the mass before the second lies between sigmoid(0.6) and sigmoid(1.4)."""
    logits, seed, position = torch.tensor([[1.0, 0.0]]), high_noise(1), ints([0])
    least, most = (1 / (1 + math.exp(-x)) for x in (0.6, 1.4))
    for p, outside in ((least - 1e-3, True), (least + 1e-3, False)):
        result = margin(logits, ints([1]), seed, position, Sampler(top_k=0, top_p=p), 0.4)
        assert result.outside_B.item() == outside
    for p, rival in ((most - 1e-3, False), (most + 1e-3, True)):
        result = margin(logits, ints([0]), seed, position, Sampler(top_k=0, top_p=p), 0.4)
        assert (result.gap_B.item() > 3) == rival


def test_tokens_that_may_have_tied_may_have_changed_places_in_the_nucleus() -> None:
    seed, position, sampler = high_noise(1), ints([0]), Sampler(top_k=0, top_p=0.45)
    honest = sample(torch.tensor([[-0.25, -0.25]]), seed, position, sampler)
    assert honest.tolist() == [0]
    assert margin(torch.tensor([[-0.5, 0.0]]), honest, seed, position, sampler, 0.5).gap_B.item() == 0


@every_sampler
def test_whatever_a_peer_sends_is_judged(sampler: Sampler) -> None:
    logits, seeds, positions = rows(6, 40)
    drawn = sample(logits, seeds, positions, sampler)
    token = ints([-1, 40, 2**40, -(2**63), 2**63 - 1, int(drawn[5])])
    result = margin(logits.requires_grad_(), token, seeds, positions, sampler, 0.5)
    assert result.outside_B.tolist() == [True] * 5 + [False]
    assert result.gap_B.tolist() == [math.inf] * 5 + [0.0]
    assert not result.gap_B.requires_grad


def test_masked_tokens_are_outside() -> None:
    logits = torch.tensor([[1.0, 0.0, -math.inf, -math.inf]])
    for sampler in (Sampler(top_k=0), Sampler(top_k=3), Sampler(top_k=3, top_p=0.9)):
        result = margin(logits, ints([2]), ints([1]), ints([0]), sampler, 0.5)
        assert result.outside_B.tolist() == [True]
        assert result.gap_B.tolist() == [math.inf]


@pytest.mark.parametrize("boundary", [-0.1, math.nan, math.inf])
def test_a_nonsense_boundary_is_refused(boundary: float) -> None:
    logits, seeds, positions = rows(2, 10)
    with pytest.raises(ValueError, match="boundary"):
        margin(logits, ints([0, 0]), seeds, positions, Sampler(), boundary)


def test_another_seed_or_position_shows() -> None:
    """A node that samples honestly with noise of its own choosing: large gaps, on most tokens."""
    logits, seeds, positions = rows(2000, 256)
    sampler = Sampler(top_k=50)
    for seed, position in ((seeds + 1, positions), (seeds + 2**32, positions), (seeds, positions + 1)):
        gap = margin(logits, sample(logits, seed, position, sampler), seeds, positions, sampler, 0.1).gap_B
        assert gap.median() > 0.5
        assert (gap > 0.5).float().mean() > 0.5
        assert gap.view(-1, 20).amax(-1).min() > 0.5  # no completion of 20 tokens passes
    honest = sample(
        logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)) * 0.02, seeds, positions, sampler
    )
    assert margin(logits, honest, seeds, positions, sampler, 0.25).gap_B.max() < 0.25


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu() -> None:
    logits, seeds, positions = rows(256, 5000)
    logits = logits.bfloat16()  # ties at every limit
    noise = gumbel(seeds, positions, torch.arange(5000)[None])
    there = [x.cuda() for x in (logits, seeds, positions)]
    torch.testing.assert_close(
        gumbel(*there[1:], torch.arange(5000, device="cuda")[None]).cpu(), noise, rtol=0, atol=2e-6
    )
    for sampler in (Sampler(), Sampler(top_k=0), Sampler(top_p=0.9), Sampler(top_k=0, top_p=0.9)):
        token = sample(logits, seeds, positions, sampler)
        assert torch.equal(sample(*there, sampler).cpu(), token)
        for submitted in (token, torch.arange(256) * 19):
            here = margin(logits, submitted, seeds, positions, sampler, 0.1)
            far = margin(there[0], submitted.cuda(), there[1], there[2], sampler, 0.1)
            torch.testing.assert_close(far.gap_B.cpu(), here.gap_B, rtol=0, atol=1e-5)
            assert torch.equal(far.outside_B.cpu(), here.outside_B)
