"""GRPO: hand-worked numbers, and what must hold for any pool. Parity with TRL's trainer is in test_grpo_trl.py.

Legend: N rows, T completion tokens, V vocabulary.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.config import ConfigError
from assay.swarm.grpo import GrpoSettings, LossSums, advantages, loss_sums, normaliser, token_logprobs

LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo")
every_loss = pytest.mark.parametrize("loss", LOSSES)
examples = settings(max_examples=60, deadline=None)


@dataclass(frozen=True)
class Batch:
    logprob: Tensor
    mask: Tensor
    reward: Tensor
    group: Tensor
    weight: Tensor
    old: Tensor
    ref: Tensor

    def rows(self, index: Tensor) -> "Batch":
        return Batch(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def make(seed: int, rows: int, tokens: int, groups: int, absent: float = 0.3) -> Batch:
    """A pool in float64 with ragged lengths, holes in the masks, graded weights and absent rows."""
    rng = np.random.default_rng(seed)
    mask = np.arange(tokens) < rng.integers(1, tokens + 1, (rows, 1))
    mask &= rng.random((rows, tokens)) > 0.2
    logprob = -rng.exponential(1.5, (rows, tokens))
    weight = np.where(rng.random(rows) < absent, 0.0, rng.choice([0.25, 0.5, 1.0], rows))
    near, far = (-rng.exponential(0.2, (rows, tokens)) + rng.exponential(0.2, (rows, tokens)) for _ in range(2))
    reward = rng.choice([0.0, 0.1, 0.5, 1.0], rows)
    parts = (logprob, mask, reward, rng.integers(0, groups, rows), weight, logprob + near, logprob + 2 * far)
    return Batch(*(torch.tensor(part) for part in parts))


batches = st.builds(
    make, st.integers(0, 2**32 - 1), st.integers(1, 14), st.integers(1, 7), st.integers(1, 4), st.sampled_from([0, 0.3])
)
settings_of = st.builds(
    GrpoSettings,
    max_tokens=st.integers(7, 20),
    loss=st.sampled_from(LOSSES),
    scale_rewards=st.booleans(),
    clip_low=st.sampled_from([0.1, 0.3]),
    clip_high=st.sampled_from([None, 0.1, 0.5]),
    kl=st.sampled_from([0.0, 0.04]),
    negative_floor=st.sampled_from([0.0, 0.1]),
)


def sums_of(batch: Batch, config: GrpoSettings, advantage: Tensor) -> tuple[LossSums, Tensor]:
    """Sums, detached, and the un-normalised gradient by log-probability."""
    logprob = batch.logprob.clone().requires_grad_()
    old = None if config.clip_low is None else batch.old
    sums = loss_sums(logprob, batch.mask, advantage, batch.weight, config, old_logprob_NT=old, ref_logprob_NT=batch.ref)
    sums.loss.backward()
    assert logprob.grad is not None
    return sums.detach(), logprob.grad


def step(batch: Batch, config: GrpoSettings) -> tuple[float, Tensor]:
    """Loss and gradient as training takes them: normalised."""
    advantage = advantages(batch.reward, batch.group, batch.weight, scale=config.scale_rewards)
    sums, grad = sums_of(batch, config, advantage)
    by = normaliser(config, sums)
    return float(sums.loss) / by, grad / by


# ---- numbers worked out by hand -------------------------------------------------------------------------------------

P = torch.tensor  # short, for tables of numbers


def test_advantages_by_hand() -> None:
    # group 5: 1, 0, 0, 1 with mean 1/2 and unbiased variance 4 * 1/4 / 3; group 2: 3, 1 with mean 2 and variance 2
    reward = P([1.0, 3.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    group = P([5, 2, 5, 5, 2, 5])
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-4), 1 / (math.sqrt(2) + 1e-4)
    found = advantages(reward, group, torch.ones(6))
    torch.testing.assert_close(found, P([a, b, -a, -a, -b, a], dtype=torch.float64), rtol=1e-15, atol=0)
    unscaled = advantages(reward, group, torch.ones(6), scale=False)
    assert unscaled.tolist() == [0.5, 1.0, -0.5, -0.5, -1.0, 0.5]


def test_advantages_look_at_admitted_rows_only() -> None:
    reward = P([1.0, 0.0, math.nan, 1.0, 4.0])
    found = advantages(reward, P([0, 0, 0, 0, 1]), P([1.0, 0.5, 0.0, 0.0, 1.0]), scale=False)
    assert found.tolist() == [0.5, -0.5, 0.0, 0.0, 0.0]  # and the last is alone in its group
    assert advantages(P([1, 0]), P([0, 0]), P([1, 1]), scale=False).tolist() == [0.5, -0.5]
    assert advantages(reward, P([0, 0, 0, 0, 1]), torch.zeros(5)).tolist() == [0.0] * 5
    with pytest.raises(ValueError, match="not finite"):
        advantages(reward, P([0, 0, 0, 0, 1]), torch.ones(5))


# Two rows. Row 0: A = 1, ratios 1.5, 1.1, 0.5. Row 1: A = -2, ratios 0.5, 1.5, and a masked token. Clip .2 / .4:
# row 0 takes min(r, clip(r, .8, 1.4)) = 1.4, 1.1, 0.5; row 1 takes max of the like times 2: 2 * .8, 2 * 1.5.
RATIO = P([[1.5, 1.1, 0.5], [0.5, 1.5, 7.0]], dtype=torch.float64)
MASK = P([[1, 1, 1], [1, 1, 0]])
BY_HAND = {  # loss, then what each token's gradient by log-probability is: -A r where the min is not the clipped one
    "grpo": ((-3.0 / 3 + 4.6 / 2) / 2, [[0, -1.1 / 6, -0.5 / 6], [0, 3.0 / 4, 0]]),
    "dr_grpo": ((-3.0 + 4.6) / 20, [[0, -1.1 / 20, -0.5 / 20], [0, 3.0 / 20, 0]]),
    "dapo": ((-3.0 + 4.6) / 5, [[0, -1.1 / 5, -0.5 / 5], [0, 3.0 / 5, 0]]),
    "bnpo": ((-3.0 + 4.6) / 5, [[0, -1.1 / 5, -0.5 / 5], [0, 3.0 / 5, 0]]),
}


@every_loss
def test_clipped_losses_by_hand(loss: Any) -> None:
    config = GrpoSettings(loss=loss, clip_low=0.2, clip_high=0.4, max_tokens=10)
    logprob = torch.full((2, 3), -1.0, dtype=torch.float64, requires_grad=True)
    old = logprob.detach() - RATIO.log()
    sums = loss_sums(logprob, MASK, P([1.0, -2.0]), torch.ones(2), config, old_logprob_NT=old)
    by = normaliser(config, sums)
    (sums.loss / by).backward()
    assert (sums.rows, sums.tokens) == (2.0, 5.0)
    assert by == {"grpo": 2, "dr_grpo": 20, "dapo": 5, "bnpo": 5}[loss]
    expected, gradient = BY_HAND[loss]
    assert float(sums.loss.detach()) / by == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(logprob.grad, P(gradient, dtype=torch.float64), rtol=1e-12, atol=1e-15)


@every_loss
def test_a_weight_multiplies_a_rows_gradient_and_no_count(loss: Any) -> None:
    config = GrpoSettings(loss=loss, max_tokens=10)
    logprob = torch.full((2, 3), -1.0, dtype=torch.float64, requires_grad=True)
    sums = loss_sums(logprob, MASK, P([1.0, -2.0]), P([1.0, 0.25]), config)
    sums.loss.backward()
    per_row = (3, 2) if loss == "grpo" else (1, 1)
    expected = P([[-1 / per_row[0]] * 3, [2 * 0.25 / per_row[1]] * 2 + [0]], dtype=torch.float64)
    torch.testing.assert_close(logprob.grad, expected, rtol=1e-12, atol=0)
    assert (sums.rows, sums.tokens) == (2.0, 5.0)


def test_kl_by_hand() -> None:
    # one token, A = 0, p = 1/2, reference 1/4: k3 = 1/2 - ln(1/2) - 1; on policy its corrected gradient is
    # d k3/d logp + k3 = (1 - 1/2) + (ln 2 - 1/2) = ln 2, the log ratio of policy and reference: that of the reverse KL
    config = GrpoSettings(kl=0.1, max_tokens=1)
    logprob = P([[math.log(0.5)]], dtype=torch.float64, requires_grad=True)
    ref = P([[math.log(0.25)]], dtype=torch.float64)
    sums = loss_sums(logprob, torch.ones(1, 1), torch.zeros(1), torch.ones(1), config, ref_logprob_NT=ref)
    sums.loss.backward()
    assert float(sums.loss.detach()) == pytest.approx(0.1 * (math.log(2) - 0.5), rel=1e-12)
    assert logprob.grad is not None
    assert float(logprob.grad) == pytest.approx(0.1 * math.log(2), rel=1e-12)


def test_the_gradient_of_the_kl_is_that_of_the_reverse_kl() -> None:
    # in expectation over the policy's own tokens: summed over the vocabulary with their probabilities as weights
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    ref = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    config = GrpoSettings(kl=1.0, max_tokens=1)
    logprob = logits.log_softmax(-1)[:, None]
    weight = logprob.detach().exp()[:, 0]
    sums = loss_sums(logprob, torch.ones(6, 1), torch.zeros(6), weight, config, ref_logprob_NT=ref[:, None])
    (found,) = torch.autograd.grad(sums.loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad((logprob[:, 0].exp() * (logprob[:, 0] - ref)).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_token_logprobs_are_the_log_softmax_and_so_is_their_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5, 11, generator=generator, dtype=torch.float64) * 4
    token = torch.randint(0, 11, (3, 5), generator=generator)
    pull = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    for temperature in (1.0, 0.7):
        ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        found = token_logprobs(ours, token, temperature)
        expected = (plain / temperature).log_softmax(-1).gather(-1, token[..., None])[..., 0]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        (found * pull).sum().backward()
        (expected * pull).sum().backward()
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-14)
    assert token_logprobs(logits.bfloat16(), token, 1.0).dtype == torch.float32
    assert token_logprobs(logits[:0], token[:0], 1.0).shape == (0, 5)
    with pytest.raises(ConfigError, match="above 0"):
        token_logprobs(logits, token, 0.0)


# ---- what holds for any pool ----------------------------------------------------------------------------------------


@examples
@given(batch=batches, config=settings_of)
def test_weight_zero_equals_absence_to_the_bit(batch: Batch, config: GrpoSettings) -> None:
    absent = batch.weight == 0
    poison = replace(batch, logprob=batch.logprob.clone(), reward=batch.reward.clone())
    poison.logprob[absent] = math.nan  # nothing of an absent row is looked at
    poison.reward[absent] = math.inf
    with_rows, without = step(poison, config), step(batch.rows(~absent), config)
    assert with_rows[0] == without[0]
    assert torch.equal(with_rows[1][~absent], without[1])
    assert not with_rows[1][absent].any()


@examples
@given(batch=batches, config=settings_of, chunks=st.integers(1, 3))
def test_chunks_of_whole_groups_add_up_to_one_batch(batch: Batch, config: GrpoSettings, chunks: int) -> None:
    whole_loss, whole_grad = step(batch, config)
    gradient, total = torch.zeros_like(batch.logprob), None
    for at in range(chunks):
        rows = batch.group % chunks == at
        chunk = batch.rows(rows)
        # advantages of a chunk, too: groups are whole
        advantage = advantages(chunk.reward, chunk.group, chunk.weight, scale=config.scale_rewards)
        sums, gradient[rows] = sums_of(chunk, config, advantage)
        total = sums if total is None else total + sums
    assert total is not None
    by = normaliser(config, total)
    assert float(total.loss) / by == pytest.approx(whole_loss, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(gradient / by, whole_grad, rtol=1e-12, atol=1e-15)


@examples
@given(batch=batches, config=settings_of, seed=st.integers(0, 2**32 - 1))
def test_order_of_rows_does_not_matter(batch: Batch, config: GrpoSettings, seed: int) -> None:
    order = torch.tensor(np.random.default_rng(seed).permutation(len(batch.weight)))
    (loss, grad), (moved_loss, moved_grad) = step(batch, config), step(batch.rows(order), config)
    assert moved_loss == pytest.approx(loss, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(moved_grad, grad[order], rtol=1e-10, atol=1e-13)


@examples
@given(batch=batches, config=settings_of, extra=st.integers(1, 4))
def test_padding_changes_nothing(batch: Batch, config: GrpoSettings, extra: int) -> None:
    def pad(value: Tensor, by: float) -> Tensor:
        return torch.nn.functional.pad(value, (0, extra), value=by)

    junk = {name: pad(getattr(batch, name), math.nan) for name in ("logprob", "old", "ref")}
    padded = replace(batch, **junk, mask=pad(batch.mask.int(), 0))
    (loss, grad), (padded_loss, padded_grad) = step(batch, config), step(padded, config)
    assert padded_loss == pytest.approx(loss, rel=1e-12, abs=1e-15)
    torch.testing.assert_close(padded_grad[:, : grad.shape[1]], grad, rtol=1e-12, atol=0)
    assert not padded_grad[:, grad.shape[1] :].any()


@examples
@given(batch=batches, factor=st.floats(1.0, 1e6), shift=st.integers(-1000, 1000))
def test_advantages_do_not_know_the_scale_of_rewards(batch: Batch, factor: float, shift: int) -> None:
    plain = advantages(batch.reward, batch.group, batch.weight)
    moved = advantages(batch.reward * factor + shift, batch.group, batch.weight)
    # the 1e-4 beside the std is the only thing that sees the scale; the smallest std here is above 0.02
    torch.testing.assert_close(moved, plain, rtol=5e-3, atol=1e-9)
    for group in batch.group.unique():
        rows = (batch.group == group) & (batch.weight > 0)
        assert abs(float(plain[rows].sum())) < 1e-9
        if len(batch.reward[rows].unique()) > 1:
            assert float(plain[rows].std()) == pytest.approx(1.0, rel=5e-3)
        else:
            assert not plain[rows].any()


@examples
@given(batch=batches, config=settings_of, reward=st.floats(-1e6, 1e6))
def test_groups_without_spread_have_no_gradient(batch: Batch, config: GrpoSettings, reward: float) -> None:
    level = replace(batch, reward=torch.full_like(batch.reward, reward))
    loss, grad = step(level, replace(config, kl=0.0))
    assert loss == 0
    assert not grad.any()


@examples
@given(batch=batches, config=settings_of)
def test_the_negative_floor_leaves_out_exactly_those_tokens(batch: Batch, config: GrpoSettings) -> None:
    off, on = replace(config, negative_floor=0.0, kl=0.0), replace(config, negative_floor=0.2, kl=0.0)
    advantage = advantages(batch.reward, batch.group, batch.weight, scale=config.scale_rewards)
    hit = (advantage < 0)[:, None] & (batch.logprob.exp() < 0.2)
    assume(bool(hit.any()))
    grad_off, grad_on = step(batch, off)[1], step(batch, on)[1]
    assert not grad_on[hit].any()
    assert torch.equal(grad_on[~hit], grad_off[~hit])  # the others pull as before: counts keep the tokens
    # and the KL keeps them as well
    kl = step(batch, replace(on, kl=0.1))[1] - grad_on
    torch.testing.assert_close(kl, step(batch, replace(off, kl=0.1))[1] - grad_off, rtol=1e-9, atol=1e-12)


@every_loss
@examples
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_extreme_log_probabilities_never_make_nan(loss: Any, seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    values = [-math.inf, -3e38, -1e4, -90.0, -20.0, -1e-30, 0.0]
    logprob, old, ref = (torch.tensor(rng.choice(values, (6, 4))).to(dtype) for _ in range(3))
    logprob.requires_grad_()
    advantage = torch.tensor(rng.choice([-3.0, 0.0, 3.0], 6))
    config = GrpoSettings(loss=loss, clip_low=0.2, kl=0.1, negative_floor=0.01, max_tokens=4)
    mask = torch.tensor(rng.random((6, 4)) < 0.7)
    sums = loss_sums(logprob, mask, advantage, torch.ones(6), config, old_logprob_NT=old, ref_logprob_NT=ref)
    sums.loss.backward()
    assert logprob.grad is not None
    assert torch.isfinite(sums.loss)
    assert sums.loss.dtype == torch.float32
    assert torch.isfinite(logprob.grad).all()
    assert not logprob.grad[~mask].any()


def test_a_token_the_model_rules_out_leaves_the_others_alone() -> None:
    logits = torch.tensor([[[0.5, -0.5, -math.inf], [1.0, 0.0, -math.inf]]], requires_grad=True)
    logprob = token_logprobs(logits, torch.tensor([[2, 0]]), 0.9)
    sums = loss_sums(logprob, torch.ones(1, 2), torch.ones(1), torch.ones(1), GrpoSettings(max_tokens=2))
    sums.loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[0, 0].any()
    assert logits.grad[0, 1, 0] < 0


@every_loss
def test_an_empty_pool_is_a_zero_gradient(loss: Any) -> None:
    config = GrpoSettings(loss=loss, max_tokens=4)
    logprob = torch.full((2, 3), -1.0, requires_grad=True)
    for sums in (
        loss_sums(logprob, torch.ones(2, 3), torch.ones(2), torch.zeros(2), config),
        loss_sums(logprob, torch.zeros(2, 3), torch.ones(2), torch.ones(2), config),
    ):
        (sums.loss / normaliser(config, sums)).backward()
        assert logprob.grad is not None
        assert not logprob.grad.any()


def test_mistakes_of_the_caller_are_said_at_once() -> None:
    for wrong in (
        {"loss": "gspo"},
        {"clip_high": 0.2},
        {"max_tokens": 0},
        {"kl": -0.1},
        {"kl": math.nan},
        {"negative_floor": 2.0},
        {"clip_low": -0.1},
        {"clip_low": 0.2, "clip_high": -0.2},
    ):
        with pytest.raises(ConfigError):
            GrpoSettings(**{"max_tokens": 4, **wrong})
    logprob, one = torch.zeros(2, 3), torch.ones(2)
    plain = GrpoSettings(max_tokens=4)
    for wrong in (
        {"mask_NT": torch.ones(2, 1)},  # would broadcast, silently
        {"advantage_N": torch.ones(2, 1)},
        {"weight_N": torch.ones(3)},
        {"old_logprob_NT": logprob},  # without clipping it would be ignored
        {"settings": replace(plain, kl=0.1)},
    ):
        call = {"mask_NT": torch.ones(2, 3), "advantage_N": one, "weight_N": one, "settings": plain, **wrong}
        with pytest.raises(ValueError, match=r"fit|clip|ref"):
            loss_sums(logprob, **call)
