"""Gradients and advantages equal those of TRL's real GRPOTrainer, trained through its public interface.

The trainer gets a fixed rollout (`rollout_func`), fixed rewards and a callback that copies the gradient just before
each optimiser step. Two steps per rollout: the first on policy, the second off it, with the first one's
log-probabilities as the old ones. Assay's gradient is then worked out on a second copy of the model, with a loss for
each prompt group.

How close can it be? Log-probabilities are differences of numbers near 20, so in float32 each carries an error of about
1e-6, and ratios between policies with it: TRL's gradient is 1e-6 to 1e-5 from exact arithmetic. To hold the losses to
1e-6 nevertheless, both sides run the model's body in float64 and share TRL's head; what training really does (float32,
Assay's own head and batches) is then held to that error.

Legend: N rows (completions), T completion tokens, P prompt tokens.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from assay import models
from assay.swarm.grpo import GrpoSettings, advantages, loss_sums, normaliser, token_logprobs

trl = pytest.importorskip("trl", reason="parity with TRL needs trl==1.16 (a test dependency)")
from datasets import Dataset  # noqa: E402 - comes with trl
from peft import LoraConfig, get_peft_model  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

FOLDER = models.resolve("tiny")
PROMPTS, GROUP, MAX_TOKENS, TEMPERATURE = 3, 4, 24, 0.8
CLIP_LOW, CLIP_HIGH, KL = 0.1, 0.15, 0.05
QUESTIONS = ("Tom has 2 apples and buys 2 more. How many?", "What is 3 + 4?", "Write a program that adds 7 and 5.")
REWARDS = (1.0, 0.0, 0.3, 1.0, 0.0, 1.0, 0.5, 0.1, 0.0, 0.0, 1.0, 0.7)
SILENT = 2  # a row without a token that counts: it keeps its reward
DROPPED = (1, 6, 7, 8, 9, 11)  # as TRL wants it: every reward None and env_mask 0; the last group keeps one row
LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo")

every_loss = pytest.mark.parametrize("loss", LOSSES)
every_model = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])

Forward = Callable[[Any, list["Row"]], Tensor]


@dataclass(frozen=True)
class Row:
    prompt: list[int]
    ids: list[int]
    env_mask: list[int]
    reward: float | None


@dataclass
class Seen:
    """Copied at each optimiser step: trainable parameters before it, and their gradient. At the end: advantages."""

    parameters: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)


def load(lora: bool, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    with models.quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype, attn_implementation="sdpa")
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and with it the gradient of all lora_A
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def disturb(model: Any) -> None:
    """Move the policy away from the reference."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += 0.02 * float(parameter.std()) * noise


@cache
def sampled() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and GROUP completions of each, of ragged lengths, sampled from the model but for every third token.

    Those are drawn from the whole vocabulary: tokens of which the model is sure hardly move, and clip nothing.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), load(lora=False)
    generator = torch.Generator().manual_seed(3)
    prompts, completions = [], []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        prompts.append(list(prompt["input_ids"]))
        for _ in range(GROUP):
            ids: list[int] = []
            size = int(torch.randint(2, MAX_TOKENS + 1, (1,), generator=generator))
            while len(ids) < size:
                with torch.no_grad():
                    logits = model(torch.tensor([prompts[-1] + ids])).logits[0, -1]
                weights = torch.ones_like(logits) if len(ids) % 3 == 2 else logits.softmax(-1)
                ids.append(int(torch.multinomial(weights, 1, generator=generator)))
            completions.append(ids)
    return prompts, completions


def pool(*, masked: bool = False, dropped: tuple[int, ...] = ()) -> list[Row]:
    """All rows; `masked` makes holes in the completions and silences one."""
    generator = torch.Generator().manual_seed(4)
    prompts, completions = sampled()
    rows = []
    for i, ids in enumerate(completions):
        keep = torch.randint(0, 4, (len(ids),), generator=generator) > 0
        env_mask = keep.int().tolist() if masked else [1] * len(ids)
        if i in dropped or (masked and i == SILENT):
            env_mask = [0] * len(ids)
        rows.append(Row(prompts[i // GROUP], ids, env_mask, None if i in dropped else REWARDS[i]))
    return rows


def train(folder: Path, rows: list[Row], model: Any, *, steps: int = 2, micro: int = 1, **options: Any) -> Seen:
    """TRL trains `model` on the rows, `steps` times on one rollout in `micro` batches each."""
    seen = Seen()

    class Copy(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            disturb(kwargs["model"])  # TRL has made its reference by now

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            named = {n: p for n, p in kwargs["model"].named_parameters() if p.requires_grad}
            seen.parameters.append({n: p.detach().clone() for n, p in named.items()})
            seen.gradients.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        times: Counter[str] = Counter()
        chosen = []
        for prompt in prompts:
            chosen.append(int(prompt) * GROUP + times[prompt])
            times[prompt] += 1
        picked = [rows[i] for i in chosen]
        return {
            "prompt_ids": [row.prompt for row in picked],
            "completion_ids": [row.ids for row in picked],
            "env_mask": [row.env_mask for row in picked],
            "logprobs": None,
            "row": chosen,
        }

    def reward(completions: list[str], row: list[int], **_: Any) -> list[float | None]:
        return [rows[i].reward for i in row]

    with warnings.catch_warnings(), models.quiet_transformers():
        warnings.simplefilter("ignore")
        args = trl.GRPOConfig(
            output_dir=str(folder),
            max_steps=steps,
            num_iterations=steps,
            gradient_accumulation_steps=micro,
            per_device_train_batch_size=PROMPTS * GROUP // micro,
            num_generations=GROUP,
            max_completion_length=MAX_TOKENS,
            temperature=TEMPERATURE,
            epsilon=CLIP_LOW,
            epsilon_high=CLIP_HIGH,
            optim="adamw_torch",  # a step of one size whatever the size of the gradient
            learning_rate=5e-4 if hasattr(model, "peft_config") else 3e-5,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,  # the gradient as it is
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            **options,
        )
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(PROMPTS)]}),
            processing_class=AutoTokenizer.from_pretrained(FOLDER),
            rollout_func=rollout,
            callbacks=[Copy()],
        )
        trainer.train()
    assert len(seen.gradients) == steps
    # the completions table, which TRL shows with log_completions; rows of one prompt stand in the order of the rollout
    logged = sorted(enumerate(trainer._logs["prompt"]), key=lambda at: (int(at[1]), at[0]))
    seen.advantages = [list(trainer._logs["advantages"])[i] for i, _ in logged]
    return seen


def padded(rows: list[Row], left: int, right: int) -> tuple[Tensor, Tensor]:
    """`token_NS`, `attention_NS`: prompts padded on the left to `left` tokens, completions on the right to `right`."""
    blanks = [(left - len(row.prompt), right - len(row.ids)) for row in rows]
    token = [[0] * a + row.prompt + row.ids + [0] * b for row, (a, b) in zip(rows, blanks)]
    attention = [[0] * a + [1] * (left + right - a - b) + [0] * b for a, b in blanks]
    return torch.tensor(token), torch.tensor(attention)


def with_trls_head(model: Any, rows: list[Row]) -> Tensor:
    """`logprob_NT` as TRL computes it, in the shape of its batch."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if "forward" not in vars(base):
        add_fused_lm_head(base, temperature=TEMPERATURE)
    token, attention = padded(rows, max(map(len, sampled()[0])), max(map(len, sampled()[1])))
    labels = token.masked_fill(attention == 0, -100)
    out = model(input_ids=token, attention_mask=attention, labels=labels, fused_lm_head=True)
    width = max(len(row.ids) for row in rows)
    return out.log_probs[:, max(map(len, sampled()[0])) - 1 :][:, :width]


def with_own_head(model: Any, rows: list[Row]) -> Tensor:
    """`logprob_NT` as Assay's training computes it: rows of one prompt, so no padding on the left."""
    token, _ = padded(rows, len(rows[0].prompt), max(len(row.ids) for row in rows))
    start = len(rows[0].prompt)
    return token_logprobs(model(token).logits[:, start - 1 : -1], token[:, start:], TEMPERATURE)


def judged(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, group ids, weights. A row that TRL drops has weight 0, and a reward at which nobody may look."""
    reward = torch.tensor([float("nan") if row.reward is None else row.reward for row in rows])
    weight = torch.tensor([float(row.reward is not None) for row in rows])
    return reward, torch.arange(len(rows)) // GROUP, weight


def put(model: Any, parameters: dict[str, Tensor]) -> Any:
    assert not model.load_state_dict(parameters, strict=False).unexpected_keys
    return model


def ours(
    rows: list[Row], seen: Seen, step: int, settings: GrpoSettings, make: Callable[[], Any], forward: Forward
) -> dict[str, Tensor]:
    """Assay's gradient at the parameters TRL had before `step`; old ones: before step 0; reference: as made."""
    model, before, reference = put(make(), seen.parameters[step]), put(make(), seen.parameters[0]), make()
    reward, group, weight = judged(rows)
    advantage = advantages(reward, group, weight, scale=settings.scale_rewards)
    total, clipped = None, Counter[bool]()
    for start in range(0, len(rows), GROUP):
        chunk = slice(start, start + GROUP)
        width = max(len(row.ids) for row in rows[chunk])
        mask = torch.tensor([row.env_mask + [0] * (width - len(row.ids)) for row in rows[chunk]])
        logprob = forward(model, rows[chunk])
        with torch.no_grad():
            old = forward(before, rows[chunk])
            ref = forward(reference, rows[chunk]) if settings.kl else None
        ratio, sign = (logprob.detach() - old).exp(), advantage[chunk, None] * mask
        clipped[True] += int(((ratio > 1 + CLIP_HIGH) & (sign > 0)).sum())
        clipped[False] += int(((ratio < 1 - CLIP_LOW) & (sign < 0)).sum())
        sums = loss_sums(
            logprob,
            mask,
            advantage[chunk],
            weight[chunk],
            settings,
            old_logprob_NT=None if settings.clip_low is None else old,
            ref_logprob_NT=ref,
        )
        total = sums if total is None else total + sums
    assert total is not None
    # divided before the backward pass, as TRL does: float32 parts of it (the norms, TRL's head) then round alike
    (total.loss / normaliser(settings, total)).backward()
    assert not step or min(clipped[True], clipped[False]) > 1, (
        "too little is clipped for the comparison to say anything"
    )
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 1.0) -> float:
    """Norm of `factor * found - expected`, relative to that of `expected`."""
    assert found.keys() == expected.keys()
    size = sum(float(g.double().square().sum()) for g in expected.values())
    apart = sum(float((factor * found[n].double() - g.double()).square().sum()) for n, g in expected.items())
    return float((apart / size) ** 0.5)


def settings_for(loss: Any, step: int, **more: Any) -> GrpoSettings:
    """Step 0 is on policy: no clipping, as Assay trains by default. Step 1 is clipped."""
    clip = {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH} if step else {}
    return GrpoSettings(loss=loss, max_tokens=MAX_TOKENS, **clip, **more)


@every_loss
@every_model
@pytest.mark.parametrize("full", [False, True], ids=["plain", "masked-kl"])
def test_the_gradient_is_trls(tmp_path: Path, loss: str, lora: bool, full: bool) -> None:
    rows, kl = pool(masked=full), KL if full else 0.0
    seen = train(tmp_path, rows, load(lora), loss_type=loss, beta=kl)
    for step in (0, 1):
        found = ours(rows, seen, step, settings_for(loss, step, kl=kl), lambda: load(lora), with_trls_head)
        assert distance(found, seen.gradients[step]) < 1e-6, f"step {step}"


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
@every_model
def test_so_is_that_of_float32_training_to_its_own_error(tmp_path: Path, loss: str, lora: bool) -> None:
    rows = pool(masked=True)
    seen = train(tmp_path, rows, load(lora, torch.float32), loss_type=loss, beta=KL)
    bound = (1e-5, 2e-5)  # see the top of this file; off policy the ratios' errors come on top
    for step in (0, 1):
        settings = settings_for(loss, step, kl=KL)
        found = ours(rows, seen, step, settings, lambda: load(lora, torch.float32), with_own_head)
        assert distance(found, seen.gradients[step]) < bound[step], f"step {step}"


@every_loss
def test_rows_that_trl_drops_are_rows_of_weight_zero(tmp_path: Path, loss: str) -> None:
    rows = pool(masked=True, dropped=DROPPED)
    seen = train(tmp_path, rows, load(lora=False), loss_type=loss, beta=0.0)
    # TRL keeps counting dropped rows where it divides by rows; Assay, for which they are absent, does not
    factor = 1 - len(DROPPED) / len(rows) if loss in ("grpo", "dr_grpo") else 1.0
    for step in (0, 1):
        found = ours(rows, seen, step, settings_for(loss, step), lambda: load(lora=False), with_trls_head)
        assert distance(found, seen.gradients[step], factor) < 1e-6, f"step {step}"
    reward, group, weight = judged(rows)
    assert advantages(reward, group, weight).tolist() == pytest.approx(seen.advantages, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "unscaled"])
def test_advantages_are_trls(tmp_path: Path, scale: bool) -> None:
    rows = pool()
    seen = train(tmp_path, rows, load(lora=False), steps=1, scale_rewards="group" if scale else "none")
    found = advantages(*judged(rows), scale=scale)
    assert found.tolist() == pytest.approx(seen.advantages, rel=1e-6, abs=1e-7)
    settings = settings_for("dapo", 0, scale_rewards=scale)  # dapo is TRL's default
    gradient = ours(rows, seen, 0, settings, lambda: load(lora=False), with_trls_head)
    assert distance(gradient, seen.gradients[0]) < 1e-6


@every_loss
def test_micro_batches_of_trl_are_one_pool_of_ours_but_for_bnpo(tmp_path: Path, loss: str) -> None:
    rows = pool()
    seen = train(tmp_path, rows, load(lora=False), steps=1, micro=2, loss_type=loss)
    found = ours(rows, seen, 0, settings_for(loss, 0), lambda: load(lora=False), with_trls_head)
    if loss == "bnpo":  # TRL: each micro-batch by its own tokens; here the pool is the batch
        assert distance(found, seen.gradients[0]) > 1e-3
    else:
        assert distance(found, seen.gradients[0]) < 1e-6
