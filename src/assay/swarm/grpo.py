"""GRPO as pure functions: advantages, losses, and what to divide the accumulated gradient by.

Everything adds up over chunks of whole prompt groups: call `loss_sums` per chunk, back-propagate its `loss`, add the
sums, and divide the gradient by `normaliser` at the end. A row of weight 0 is absent: it is cut out before anything is
computed, so that nothing in it, NaN included, can reach the gradient.

Formulas are TRL's GRPOTrainer 1.16 (tests/test_grpo_trl.py holds them to the real one); grpo is equation 3 of
DeepSeekMath (arXiv 2402.03300), dr_grpo is arXiv 2503.20783, dapo arXiv 2503.14476.

Legend: N rows (completions), T completion tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from assay.config import ConfigError

Loss = Literal["grpo", "dr_grpo", "dapo", "bnpo"]
STD_EPSILON = 1e-4  # TRL's; beside it the paper's plain division blows up groups whose rewards differ by rounding
HIGHEST_LOG_RATIO = 20.0  # e^20: far outside any healthy ratio, and its square still fits float32
LOWEST_LOGPROB = -1e4  # a token the model rules out (logit -inf) must not turn the round into NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoSettings:
    """How rows become a loss. Raises ConfigError for settings that contradict each other.

    `scale_rewards` divides advantages by the group's standard deviation (`advantages`). `clip_low`, `clip_high`: the
    PPO range [1 - low, 1 + high] of the ratio to the policy that `old_logprob_NT` belongs to, `clip_high` defaulting
    to `clip_low`; None is the pure policy gradient (ratio 1), right for one update per generation (Hail to the
    Thief). `kl` weighs the penalty to a reference: the k3 estimator times the ratio, as in TRL, whose gradient is
    that of the reverse KL. `negative_floor`: tokens less likely than this (at the sampler's temperature) get no
    policy loss in rows of negative advantage; 0 is off, 0.02 was enough on a small model, which collapses without it
    from unbounded pushes on unlikely tokens; high values leave bad rows without effect. `max_tokens` is the length
    limit of a completion, the constant in dr_grpo.
    """

    max_tokens: int
    loss: Loss = "grpo"
    scale_rewards: bool = True
    clip_low: float | None = None
    clip_high: float | None = None
    kl: float = 0.0
    negative_floor: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in ("grpo", "dr_grpo", "dapo", "bnpo"):
            raise ConfigError(f"loss {self.loss!r} is unknown; known are grpo, dr_grpo, dapo, bnpo")
        if self.clip_low is None and self.clip_high is not None:
            raise ConfigError("clip_high without clip_low: give both, or clip_low alone for a symmetric range")
        if not (self.max_tokens >= 1 and self.kl >= 0.0 and 0.0 <= self.negative_floor <= 1.0):
            raise ConfigError("max_tokens must be at least 1, kl at least 0, negative_floor between 0 and 1")
        if not (0.0 <= (self.clip_low or 0.0) <= 1.0 and (self.clip_high or 0.0) >= 0.0):
            raise ConfigError("clip_low must be between 0 and 1, clip_high at least 0")


@dataclass(frozen=True, slots=True)
class LossSums:
    """An un-normalised loss (0-d, with its graph) and what `normaliser` needs: admitted rows and their tokens."""

    loss: Tensor
    tokens: float
    rows: float

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(self.loss + other.loss, self.tokens + other.tokens, self.rows + other.rows)

    def detach(self) -> LossSums:
        """Without the graph: what to keep of a chunk after its backward pass."""
        return LossSums(self.loss.detach(), self.tokens, self.rows)


def advantages(reward_N: Tensor, group_N: Tensor, weight_N: Tensor, *, scale: bool = True) -> Tensor:
    """`advantage_N`: reward minus the mean of its group, divided by the group's (unbiased) std + 1e-4 if `scale`.

    Mean and std are over rows of weight > 0, which count alike: a weight scales a row's loss, it does not make its
    reward more or less true. Rows of weight 0 get 0, and so does a group that teaches nothing: fewer than two
    admitted rows, or all rewards equal. `group_N` are integer ids in any order. Computed in float64, returned in the
    rewards' dtype (float32 if they are integers). A reward that is not finite in an admitted row is an error of the
    task and raises ValueError.

    >>> reward_N = torch.tensor([1.0, 0.0, 9.0, 5.0])
    >>> advantages(reward_N, torch.tensor([7, 7, 7, 8]), torch.tensor([1.0, 1.0, 0.0, 1.0]), scale=False)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    keep_N = weight_N > 0
    reward_M = reward_N[keep_N].double()
    if not bool(torch.isfinite(reward_M).all()):
        raise ValueError("a reward is not finite: the task must give every admitted completion a number")
    out_N = reward_N.new_zeros(reward_N.shape, dtype=reward_N.dtype if reward_N.is_floating_point() else torch.float32)
    if reward_M.numel() == 0:
        return out_N
    _, index_M = torch.unique(group_N[keep_N], return_inverse=True)
    count_M = torch.bincount(index_M).double()[index_M]
    centred_M = reward_M - _group_sum(reward_M, index_M) / count_M
    advantage_M = centred_M
    if scale:
        variance_M = _group_sum(centred_M.square(), index_M) / (count_M - 1).clamp(min=1)
        advantage_M = centred_M / (variance_M.sqrt() + STD_EPSILON)
    # equal rewards leave a rounding error that the division would blow up: compare them themselves
    blank = reward_M.new_zeros(int(index_M.max()) + 1)
    low_M = blank.scatter_reduce(0, index_M, reward_M, "amin", include_self=False)[index_M]
    high_M = blank.scatter_reduce(0, index_M, reward_M, "amax", include_self=False)[index_M]
    out_N[keep_N] = torch.where(low_M < high_M, advantage_M, 0.0).to(out_N.dtype)
    return out_N


def _group_sum(value_M: Tensor, index_M: Tensor) -> Tensor:
    """Each row's sum over its group."""
    return value_M.new_zeros(int(index_M.max()) + 1).index_add(0, index_M, value_M)[index_M]


def token_logprobs(logits_NTV: Tensor, token_NT: Tensor, temperature: float) -> Tensor:
    """`logprob_NT` in nats of the given tokens at `temperature`, in float32 at least; differentiable.

    Gather minus logsumexp, a row at a time: the forward pass makes no (N, T, V) tensor beside the logits while they are
    float32 and the temperature is 1, and keeps one scaled float32 copy of them otherwise.
    """
    if temperature <= 0:
        raise ConfigError(f"temperature {temperature} must be above 0")
    rows = []
    # unbind: its backward writes all rows at once, indexing would make a full-size gradient for each
    for logits_TV, token_T in zip(logits_NTV.unbind(), token_NT.unbind()):
        scaled_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
        if temperature != 1.0:
            scaled_TV = scaled_TV / temperature
        rows.append(scaled_TV.gather(-1, token_T[:, None])[:, 0] - scaled_TV.logsumexp(-1))
    return torch.stack(rows) if rows else logits_NTV.sum(-1)


def loss_sums(
    logprob_NT: Tensor,
    mask_NT: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    settings: GrpoSettings,
    *,
    old_logprob_NT: Tensor | None = None,
    ref_logprob_NT: Tensor | None = None,
) -> LossSums:
    """The loss of some whole groups, summed over rows and not yet normalised, with its counts.

    `mask_NT` is non-zero on tokens that count; padding and masked tokens are out of the loss, of the row's mean (grpo)
    and of the token count (dapo, bnpo). Each row's loss is multiplied by its weight; counts are not, so that a doubted
    row pulls less instead of making the others pull more. Tokens under the negative floor stay in all counts, and keep
    their KL, for the same reason. An admitted row without any token counts as a row, as in TRL.

    `old_logprob_NT`: the policy that clipping refers to (None: the current one); only with `settings.clip_low`.
    `ref_logprob_NT`: the reference, needed with `settings.kl`. Log-probabilities under -1e4 and log-ratios over 20 are
    cut there, without gradient, so that no admitted token makes NaN of the sum. Raises ValueError for tensors that do
    not fit each other or the settings.
    """
    if old_logprob_NT is not None and settings.clip_low is None:
        raise ValueError("old_logprob_NT is used with clipping only: set clip_low, or leave it out")
    if settings.kl > 0 and ref_logprob_NT is None:
        raise ValueError("kl > 0 needs ref_logprob_NT, the reference model's log-probabilities")
    others = [x.shape for x in (mask_NT, old_logprob_NT, ref_logprob_NT) if x is not None]
    rows = logprob_NT.shape[0]
    if any(shape != logprob_NT.shape for shape in others) or not advantage_N.shape == weight_N.shape == (rows,):
        raise ValueError(f"shapes do not fit log-probabilities of {tuple(logprob_NT.shape)}")

    keep_N = weight_N > 0
    mask_MT = mask_NT[keep_N].bool()
    logprob_MT = _bounded(logprob_NT[keep_N], mask_MT)
    advantage_M1 = advantage_N[keep_N].detach().to(logprob_MT.dtype)[:, None]
    old_MT = logprob_MT.detach() if old_logprob_NT is None else _bounded(old_logprob_NT[keep_N].detach(), mask_MT)
    ref_MT = None if ref_logprob_NT is None else _bounded(ref_logprob_NT[keep_N].detach(), mask_MT)

    loss_MT = _token_loss(logprob_MT, old_MT, ref_MT, advantage_M1, settings) * mask_MT
    loss_M = loss_MT.sum(-1)
    if settings.loss == "grpo":
        loss_M = loss_M / mask_MT.sum(-1).clamp(min=1)
    loss = (loss_M * weight_N[keep_N].detach().to(loss_M.dtype)).sum()
    return LossSums(loss, float(mask_MT.sum()), float(mask_MT.shape[0]))


def _bounded(logprob_MT: Tensor, mask_MT: Tensor) -> Tensor:
    """Log-probabilities in float32 at least, 0 where masked (whatever stood there), finite elsewhere."""
    if logprob_MT.dtype != torch.float64:
        logprob_MT = logprob_MT.float()
    return torch.where(mask_MT, logprob_MT, 0.0).clamp(min=LOWEST_LOGPROB)


def _token_loss(
    logprob_MT: Tensor, old_MT: Tensor, ref_MT: Tensor | None, advantage_M1: Tensor, settings: GrpoSettings
) -> Tensor:
    """Per-token loss: clipped policy gradient, less what the negative floor leaves out, plus KL."""
    ratio_MT = (logprob_MT - old_MT).clamp(max=HIGHEST_LOG_RATIO).exp()
    objective_MT = ratio_MT * advantage_M1
    if settings.clip_low is not None:
        high = settings.clip_low if settings.clip_high is None else settings.clip_high
        clipped_MT = ratio_MT.clamp(1 - settings.clip_low, 1 + high)
        objective_MT = torch.minimum(objective_MT, clipped_MT * advantage_M1)
    if settings.negative_floor > 0:
        unlikely_MT = logprob_MT.detach().exp() < settings.negative_floor
        objective_MT = torch.where(unlikely_MT & (advantage_M1 < 0), 0.0, objective_MT)
    if settings.kl > 0 and ref_MT is not None:
        gap_MT = (ref_MT - logprob_MT).clamp(max=HIGHEST_LOG_RATIO)
        k3_MT = gap_MT.exp() - gap_MT - 1
        # the ratio is 1 on policy, but its gradient makes k3's that of the reverse KL (TRL: use_bias_correction_kl)
        return settings.kl * k3_MT * ratio_MT - objective_MT
    return -objective_MT


def normaliser(settings: GrpoSettings, sums: LossSums) -> float:
    """What to divide the gradient of the accumulated `loss` by, from the counts of all chunks; 1 at least.

    grpo: admitted rows. dr_grpo: rows x max_tokens. dapo and bnpo: tokens that count. The last two are one and the
    same here: TRL's bnpo divides by the tokens of each micro-batch and takes the mean over micro-batches, its dapo by
    the tokens of the whole batch; with one micro-batch they agree, and this loop always counts the whole pool.
    """
    if settings.loss == "grpo":
        return max(1.0, sums.rows)
    if settings.loss == "dr_grpo":
        return max(1.0, sums.rows) * settings.max_tokens
    return max(1.0, sums.tokens)
