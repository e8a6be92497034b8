"""Sampling whose noise no node can choose: Gumbel-max over counter-based noise keyed by (seed, position, token).

A token is the arg max of logit / temperature + Gumbel noise over the candidates (top-k, then top-p), which is a draw
from their softmax. The noise is a pure function of a seed that the round's plan fixes, of the position and of the
vocabulary entry: it does not depend on the batch, the padding, the device or on which other candidates there are. A
verifier with the same weights therefore recomputes it and measures, by `margin`, how far a submitted token is from the
one the seed gives.

**Layout.** The noise of vLLM's GPU sampler (model runner V2), so that Transformers and vLLM nodes agree: read off the
released vLLM 0.33.0 (commit 4ba787ec9, vllm/v1/worker/gpu/sample/gumbel.py); 0.31.0 and 0.32.0 have the same. It is
MurmurHash3_x86_32 (Appleby, public domain) of sixteen little-endian bytes, hash seed 0:

    seed: 8 bytes | position: 4 bytes | token: 4 bytes        (older releases used Triton's Philox: not compatible)

u = (hash + 0.5) / 2^32 rounded to float32; noise = -log(-log(1 - u)) with 1 - u >= 2^-24. Hash and u agree with vLLM
bit for bit. The logarithms are taken in float64 and rounded, so that devices agree but for a rare last bit; vLLM's series
in float32 differs by less than 5e-6. A vLLM node must run with an explicit seed per request, without speculative
decoding, penalties, min_p or `use_fp64_gumbel`: each of them changes the stream or the logits.

`Sampler.noise = "philox"` takes the words from Philox4x32-10 (philox.py) instead: the generator with the better
pedigree, for swarms without vLLM nodes. Everything after the words is the same.

**Position** is vLLM's: the 0-based index, in prompt + completion without padding, of the *last input token*, whose
logits are sampled. After a prompt of P tokens the first sampled token has position P - 1, the next one P, and so on.

Shapes: B rows (any flattening of participants, group and time), V vocabulary, K candidates.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from operator import index as as_int
from typing import Literal

import torch
from torch import Tensor

from assay.swarm import philox

Noise = Literal["murmur3", "philox"]
_MASK = 0xFFFFFFFF
_MAX_U = 1.0 - 2.0**-24
# Rows are hashed in blocks that stay in a CPU's cache: 32 x 49,152 took 14 ms so, 40 ms in one piece.
_BLOCK_CPU, _BLOCK_GPU = 1 << 16, 1 << 24
# bf16 logits of 49,152 tokens have about three equals at the 50th; a tie longer than this is settled over the whole row.
_TIE_WINDOW = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How logits become a distribution, in vLLM's order: temperature, then top-k (0 = off), then top-p (1 = off).

    Raises ValueError for values that make no distribution; greedy decoding (temperature 0) has no noise to check.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    noise: Noise = "murmur3"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is {self.temperature}: give a finite number above 0")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: give a whole number, 0 to keep the whole vocabulary")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give a number above 0 and at most 1")
        if self.noise not in ("murmur3", "philox"):
            raise ValueError(f"noise is {self.noise!r}: murmur3 (as vLLM) or philox")


@dataclass(frozen=True, slots=True, eq=False)
class Margin:
    """How far submitted tokens are from those their seeds give.

    `gap_B` float32: 0 for the token the seed gives, inf for one that was no candidate at all; `outside_B` bool: the
    latter.
    """

    gap_B: Tensor
    outside_B: Tensor


def seed_of(run: str, round: int, node: str, prompt: int, index: int) -> int:
    """The seed of one completion, 0 <= seed < 2**63, fixed by the plan: first 63 bits of a sha256 of all five fields.

    The fields are written as a JSON list, so that no two different tuples have the same bytes ("a", 11 against "a1", 1).

    >>> seed_of("run", 0, "node-a", 3, 0)
    6636261888586188041
    """
    fields = [run, as_int(round), node, as_int(prompt), as_int(index)]
    digest = hashlib.sha256(b"assay.seed.1" + json.dumps(fields).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def gumbel(seed_B: Tensor, position_B: Tensor, token_BK: Tensor, noise: Noise = "murmur3") -> Tensor:
    """Gumbel noise (B, K) float32 of vocabulary entries `token_BK` at `position_B` under `seed_B`, all int64.

    `token_BK` may be (1, K), or expanded from it, when all rows share the entries. Values lie in [-2.82, 22.88]: never
    infinite. Raises ValueError for other dtypes or shapes, which would silently give other noise.
    """
    rows = len(seed_B)
    if not seed_B.dtype == position_B.dtype == token_BK.dtype == torch.int64:
        raise ValueError(
            f"seed, position and token must be int64: {seed_B.dtype}, {position_B.dtype}, {token_BK.dtype}"
        )
    if seed_B.shape != (rows,) or position_B.shape != (rows,) or token_BK.dim() != 2 or len(token_BK) not in (1, rows):
        shapes = (tuple(seed_B.shape), tuple(position_B.shape), tuple(token_BK.shape))
        raise ValueError(f"seed, position and token must be (B,), (B,) and (B, K) or (1, K): {shapes}")
    if rows and token_BK.stride(0) == 0:
        token_BK = token_BK[:1]
    if noise == "philox":
        return _noise(philox.words(seed_B, position_B, token_BK))
    state_B = _absorb(_absorb(_absorb(0, seed_B & _MASK), (seed_B >> 32) & _MASK), position_B & _MASK)
    key_BK = _scramble(token_BK)
    block = max(1, (_BLOCK_GPU if token_BK.is_cuda else _BLOCK_CPU) // max(1, token_BK.shape[1]))
    if rows <= block:
        return _noise(_finish(_mix(state_B[:, None], key_BK)))
    noise_BK = torch.empty(rows, token_BK.shape[1], device=token_BK.device)
    for start in range(0, rows, block):
        part = slice(start, start + block)
        key = key_BK if len(key_BK) == 1 else key_BK[part]
        noise_BK[part] = _noise(_finish(_mix(state_B[part, None], key)))
    return noise_BK


def candidates(logits_BV: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Candidates `token_BK` int64 and their `logit_BK` float32 = logit / temperature, -inf where top-p cuts.

    K = min(top_k, V), or V without top-k; the order within a row means nothing. Of equal logits at a limit the lower
    token ids stay, as in vLLM's kernel, so that the set depends on the logits alone. Raises ValueError when a row has
    no finite maximum (the model has diverged).
    """
    token_BK, logit_BK = _top_k(logits_BV, sampler)
    if sampler.top_p < 1:
        token_BK, logit_BK, before_BK = _nucleus(token_BK, logit_BK)
        logit_BK = logit_BK.masked_fill(before_BK[:, :-1] >= sampler.top_p, -math.inf)
    return token_BK, logit_BK


def sample(logits_BV: Tensor, seed_B: Tensor, position_B: Tensor, sampler: Sampler) -> Tensor:
    """The tokens (B,) int64 that the seeds give: arg max of candidate logit + noise, the lower token id on a tie.

    `position_B`: see the module's text; P - 1 for the first token after a prompt of P tokens.
    """
    token_BK, logit_BK = candidates(logits_BV, sampler)
    score_BK = logit_BK + gumbel(seed_B, position_B, token_BK, sampler.noise)
    best_B1 = score_BK.amax(-1, keepdim=True)
    return token_BK.masked_fill(score_BK != best_B1, logits_BV.shape[1]).amin(-1)


def margin(
    logits_BV: Tensor, token_B: Tensor, seed_B: Tensor, position_B: Tensor, sampler: Sampler, boundary: float
) -> Margin:
    """How much better than the submitted token the best rival is, after noise: 0 where the seed gives the token.

    `logits_BV` are the verifier's own, teacher-forced; `token_B` may hold anything a peer sent. `boundary` >= 0 is the
    difference of two logits (before temperature) that node and verifier may disagree by: 0.1 for a tiny float32 model,
    0.25 for a 135M one in bf16. A token that crosses the edge of the candidates would otherwise show as a huge gap, so:

    - rivals are only candidates more than `boundary` above the k-th logit, and with top-p only those whose preceding
      mass stays under top_p for any logits within `boundary`;
    - the submitted token may lie up to `boundary` under the k-th logit, and with top-p its preceding mass need only be
      under top_p for some logits within `boundary`; else it is outside.

    Then an honest node is never outside and its gap is at most boundary / temperature. With `boundary` 0 the candidates
    are exactly those of `candidates`. Raises ValueError for a negative boundary and for logits as in `candidates`.
    """
    if not (math.isfinite(boundary) and boundary >= 0):
        raise ValueError(f"boundary is {boundary}: give a finite number of logits, at least 0")
    vocabulary, slack = logits_BV.shape[1], boundary / sampler.temperature
    known_B = (token_B >= 0) & (token_B < vocabulary)
    own_B1 = torch.where(known_B, token_B, 0)[:, None]
    own_logit_B = logits_BV.detach().gather(1, own_B1)[:, 0].float() / sampler.temperature
    token_BK, logit_BK = _top_k(logits_BV, sampler)
    score_BK, kth_B = logit_BK, logit_BK.amin(-1)
    allowed_B = known_B & (own_logit_B > -math.inf)
    if sampler.top_p < 1:
        token_BK, logit_BK, before_BK = _nucleus(token_BK, logit_BK)
        surely_BK, possibly_B = _nucleus_tolerance(logit_BK, before_BK, own_logit_B, sampler.top_p, slack)
        score_BK = logit_BK.masked_fill(~surely_BK, -math.inf)
        allowed_B = allowed_B & possibly_B
    if 0 < sampler.top_k < vocabulary:
        below = torch.le if slack else torch.lt  # at just `boundary`, common on bf16's grid, the node may see a tie
        score_BK = score_BK.masked_fill(below(logit_BK, (kth_B + slack)[:, None]), -math.inf)
        allowed_B = allowed_B & (own_logit_B >= kth_B - slack)
    best_B = (score_BK + gumbel(seed_B, position_B, token_BK, sampler.noise)).amax(-1)
    own_B = own_logit_B + gumbel(seed_B, position_B, own_B1, sampler.noise)[:, 0]
    return Margin((best_B - own_B).clamp_min(0).masked_fill(~allowed_B, math.inf), ~allowed_B)


# --- candidates -------------------------------------------------------------------------------------------------------


def _top_k(logits_BV: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Exactly K tokens of the largest logits and their scaled logits; of equals at the limit the lower ids."""
    logits_BV = logits_BV.detach()
    if logits_BV.dtype not in (torch.float32, torch.bfloat16, torch.float16):  # these embed exactly in float32
        logits_BV = logits_BV.float()
    rows, vocabulary = logits_BV.shape
    if 0 < sampler.top_k < vocabulary:
        k = sampler.top_k
        value_BW, token_BW = logits_BV.topk(min(k + _TIE_WINDOW, vocabulary))
        value_BK, token_BK = value_BW[:, :k], token_BW[:, :k]
        tied_R = (value_BW[:, k - 1] == value_BW[:, k]).nonzero()[:, 0]
        if len(tied_R):  # torch picks any of the equals, and another one on another device: choose by id
            token_RK = _settle_ties(logits_BV, tied_R, value_BW[tied_R], token_BW[tied_R], k)
            token_BK = token_BK.index_put((tied_R,), token_RK)
            value_BK = logits_BV.gather(1, token_BK)
    else:
        value_BK, token_BK = logits_BV, torch.arange(vocabulary, device=logits_BV.device).expand(rows, vocabulary)
    logit_BK = value_BK.float() / sampler.temperature
    if not bool(torch.isfinite(logit_BK.amax(-1)).all()):
        raise ValueError("the model's logits have no finite maximum: it has diverged, or a mask leaves it no token")
    return token_BK, logit_BK


def _settle_ties(logits_BV: Tensor, tied_R: Tensor, value_RW: Tensor, token_RW: Tensor, k: int) -> Tensor:
    """Token ids (R, k) for the rows whose k-th logit is tied, from the W largest, or all if the tie goes beyond those."""
    kth_R1 = value_RW[:, k - 1 : k]
    token_RW, by_id_RW = token_RW.sort(-1)
    token_RK = token_RW.gather(1, _lowest_ids(value_RW.gather(1, by_id_RW), kth_R1, k))
    beyond_Q = (value_RW[:, -1:] == kth_R1).nonzero()[:, 0]
    if len(beyond_Q):
        token_RK[beyond_Q] = _lowest_ids(logits_BV[tied_R[beyond_Q]], kth_R1[beyond_Q], k)
    return token_RK


def _lowest_ids(logits_RV: Tensor, kth_R1: Tensor, k: int) -> Tensor:
    """Columns (R, k): all above the k-th logit, filled up with the first of those equal to it."""
    above_RV, equal_RV = logits_RV > kth_R1, logits_RV == kth_R1
    room_R1 = k - above_RV.sum(-1, keepdim=True)
    keep_RV = above_RV | (equal_RV & (equal_RV.cumsum(-1, dtype=torch.int32) <= room_R1))
    return keep_RV.nonzero()[:, 1].view(-1, k)


def _nucleus(token_BK: Tensor, logit_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates by falling logit, then rising id, and the mass before each: (B, K + 1), the last entry being all."""
    if token_BK.stride(0) != 0:  # else the whole vocabulary, by id already
        token_BK, by_id_BK = token_BK.sort(-1)
        logit_BK = logit_BK.gather(1, by_id_BK)
    logit_BK, order_BK = logit_BK.sort(stable=True, dim=-1, descending=True)
    token_BK = token_BK.gather(1, order_BK)
    before_BK = torch.nn.functional.pad(logit_BK.softmax(-1).cumsum(-1), (1, 0))
    return token_BK, logit_BK, before_BK


def _nucleus_tolerance(
    logit_BK: Tensor, before_BK: Tensor, own_logit_B: Tensor, top_p: float, slack: float
) -> tuple[Tensor, Tensor]:
    """Which sorted candidates are surely inside the nucleus, and whether the submitted tokens possibly are.

    When differences of logits move by at most `slack`, the odds of any set's mass move by a factor of at most exp(slack)
    and only tokens within `slack` of each other can change places: bound the mass before a token by both.
    """
    grow, q = math.expm1(min(slack, 50.0)), 1 - top_p
    surely, possibly = top_p - top_p * q * grow / (1 + q * grow), top_p + top_p * q * grow / (1 + top_p * grow)
    rising_BK = -logit_BK
    last_BK = torch.searchsorted(rising_BK, rising_BK + slack, right=slack > 0)
    most_BK = before_BK.gather(1, last_BK) - (before_BK[:, 1:] - before_BK[:, :-1])
    inside_BK = torch.maximum(most_BK, before_BK[:, :-1]) < surely
    first_B1 = torch.searchsorted(rising_BK, (-own_logit_B - slack)[:, None])
    return inside_BK, before_BK.gather(1, first_B1)[:, 0] < possibly


# --- noise: MurmurHash3_x86_32 on int64 tensors that hold 32-bit words -------------------------------------------------
# A product of two 32-bit words wraps modulo 2^64, which leaves its low 32 bits right: only what is shifted to the right
# afterwards has to be masked. In-place operations touch tensors made here only.


def _scramble(word: Tensor) -> Tensor:
    """The word times c1, rotated by 15, times c2; right in the low 32 bits."""
    word = (word * 0xCC9E2D51).bitwise_and_(_MASK)
    return (word << 15).bitwise_or_(word >> 17).mul_(0x1B873593)


def _mix(state: Tensor | int, key: Tensor) -> Tensor:
    """One step of the hash: state xor key, rotated by 13, times 5, plus a constant; right in the low 32 bits."""
    mixed = (key ^ state).bitwise_and_(_MASK)
    return (mixed << 13).bitwise_or_(mixed >> 19).mul_(5).add_(0xE6546B64)


def _absorb(state: Tensor | int, word: Tensor) -> Tensor:
    return _mix(state, _scramble(word))


def _finish(state: Tensor) -> Tensor:
    """The final avalanche over a message of 16 bytes; owns `state`. Returns 0 <= hash < 2**32."""
    state = state.bitwise_xor_(16).bitwise_and_(_MASK)
    state = state.bitwise_xor_(state >> 16).mul_(0x85EBCA6B).bitwise_and_(_MASK)
    state = state.bitwise_xor_(state >> 13).mul_(0xC2B2AE35).bitwise_and_(_MASK)
    return state.bitwise_xor_(state >> 16)


def _uniform(word: Tensor) -> Tensor:
    """Uniform float32 in [2^-33, 1] of 32-bit words; the float64 value is exact, so one rounding, as in vLLM."""
    return word.double().add_(0.5).mul_(2.0**-32).float()


def _noise(word: Tensor) -> Tensor:
    """Gumbel noise float32 of 32-bit words; the long tail that decides an arg max is at u -> 0, where u is finest."""
    u = _uniform(word).double().clamp_(max=_MAX_U)
    return u.neg_().log1p_().neg_().log_().neg_().float()
