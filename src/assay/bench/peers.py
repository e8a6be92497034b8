"""What others train the same thing with: Transformers' Trainer on a client's rows, TRL's GRPOTrainer on a pool.

Both are driven through their public interface and timed by a callback, from the beginning of a step to its end: neither
their set-up nor their logging counts. They train the very model that Assay trains, without gradient checkpointing.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from assay import models
from assay.bench.turns import Stopwatch, Turn
from assay.contribution import Tensors
from assay.federated.local_sft import LocalSettings, Tokens
from assay.federated.lora import Carrier

IGNORED = -100
COMMON: dict[str, Any] = {
    "gradient_checkpointing": False, "report_to": [], "save_strategy": "no", "logging_strategy": "no",
    "disable_tqdm": True, "bf16": False, "weight_decay": 0.0, "lr_scheduler_type": "constant", "optim": "adamw_torch",
    "remove_unused_columns": False,
}  # fmt: skip


class Timed(TrainerCallback):  # type: ignore[misc]
    """A watch on training, from its begin to its end, or on its one step."""

    def __init__(self, steps: bool) -> None:
        self.steps, self.watch = steps, Stopwatch()

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if not self.steps:
            self.watch.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if not self.steps:
            self.watch.stop()

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.steps:
            self.watch.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.steps:
            self.watch.stop()


class _InOrder(Trainer):  # type: ignore[misc]
    """Rows in the order they are given: Trainer would shuffle them."""

    def _get_train_sampler(self, *args: Any, **more: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class LocalTrainer:
    """A client's steps in Transformers' Trainer: `run` trains from the start and returns its time."""

    def __init__(
        self, carrier: Carrier, start: Tensors, batches: Sequence[Sequence[Tokens]], local: LocalSettings
    ) -> None:
        self.carrier, self.start, self.batches, self.local = carrier, start, batches, local
        self.losses: list[float] = []
        self.tokens = 0

    def run(self, attention: str) -> Turn:
        """One local training with this attention of Transformers'."""
        model, base = self.carrier.model, self.carrier.model.get_base_model()
        weights = [p for n, p in model.named_parameters() if "lora_" in n]
        self.carrier.set(self.start)
        self.losses, self.tokens = [], 0
        watch, before = Timed(steps=False), base.config._attn_implementation
        for weight in weights:
            weight.requires_grad_(True)
        base.set_attn_implementation(attention)
        try:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), models.quiet_transformers():
                warnings.simplefilter("ignore")
                args = TrainingArguments(
                    output_dir=folder, max_steps=len(self.batches), per_device_train_batch_size=self.local.batch_size,
                    learning_rate=self.local.lr, max_grad_norm=self.local.clip, use_cpu=not torch.cuda.is_available(),
                    **COMMON,
                )  # fmt: skip
                trainer = _InOrder(
                    model=model, args=args, train_dataset=[row for rows in self.batches for row in rows],
                    data_collator=self.collate, callbacks=[watch],
                )  # fmt: skip
                plain = trainer.compute_loss

                def noted(*given: Any, **more: Any) -> Any:
                    loss = plain(*given, **more)
                    self.losses.append(float(loss.detach()))
                    return loss

                trainer.compute_loss = noted
                trainer.remove_callback(PrinterCallback)  # stdout belongs to --json
                trainer.train()
        finally:
            base.set_attn_implementation(before)
            model.eval()
            for weight in weights:
                weight.grad = None
                weight.requires_grad_(False)
        return watch.watch.turn

    def collate(self, rows: Sequence[Tokens]) -> dict[str, torch.Tensor]:
        """Right-padded ids, mask and labels, no loss on the prompt: what Transformers' own padding collators give."""
        longest = max(len(row.ids) for row in rows)
        pad = self.carrier.base.tokenizer.pad_token_id
        self.tokens += sum(len(row.ids) for row in rows)
        blank = [longest - len(row.ids) for row in rows]
        labels = [[IGNORED] * row.prompt + row.ids[row.prompt :] for row in rows]
        return {
            "input_ids": torch.tensor([row.ids + [pad] * b for row, b in zip(rows, blank)]),
            "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * b for row, b in zip(rows, blank)]),
            "labels": torch.tensor([line + [IGNORED] * b for line, b in zip(labels, blank)]),
        }


class Grpo:
    """TRL's GRPOTrainer on one fixed pool: `step` takes one optimiser step on all of it and returns its time.

    `prompts` and `rewards` are by row, rows of one prompt side by side. ImportError without TRL.
    """

    def __init__(
        self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]],
        rewards: Sequence[float], *, group: int, max_tokens: int, temperature: float, lr: float, clip: float,
    ) -> None:  # fmt: skip
        trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
        self.model, self.base = model, model.get_base_model() if hasattr(model, "get_base_model") else model
        self.rows, self.tokens, self.group = list(zip(prompts, completions, rewards)), 0, group
        self.watch, self.folder = Timed(steps=True), tempfile.TemporaryDirectory()
        with warnings.catch_warnings(), models.quiet_transformers():
            warnings.simplefilter("ignore")
            args = trl.GRPOConfig(
                output_dir=self.folder.name, max_steps=1, per_device_train_batch_size=len(self.rows),
                num_generations=group, max_completion_length=max_tokens, temperature=temperature, beta=0.0,
                loss_type="grpo", learning_rate=lr, max_grad_norm=clip, use_cpu=not torch.cuda.is_available(), **COMMON,
            )  # fmt: skip
            self.trainer = trl.GRPOTrainer(
                model=model, reward_funcs=self._reward, args=args, processing_class=tokenizer,
                train_dataset=datasets.Dataset.from_dict({"prompt": [str(i) for i in range(len(self.rows) // group)]}),
                rollout_func=self._rollout, callbacks=[self.watch],
            )  # fmt: skip
            self.trainer.remove_callback(PrinterCallback)

    def step(self, attention: str) -> Turn:
        """One step with this attention of Transformers'."""
        self.tokens = 0
        before = self.base.config._attn_implementation
        self.base.set_attn_implementation(attention)
        try:
            with warnings.catch_warnings(), models.quiet_transformers():
                warnings.simplefilter("ignore")
                self.trainer.train()
        finally:
            self.base.set_attn_implementation(before)
            self.model.eval()
        return self.watch.watch.turn

    def gradient(self) -> dict[str, torch.Tensor]:
        """The clipped gradient of the first step, by parameter: a tenth of it is what Adam remembers (beta1 0.9)."""
        return momentum(self.model, self.trainer.optimizer)

    def _rollout(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """The pool's rows, each once: TRL asks for every prompt as often as a group has members."""
        times: Counter[str] = Counter()
        chosen = []
        for prompt in prompts:
            chosen.append(int(prompt) * self.group + times[prompt])
            times[prompt] += 1
        picked = [self.rows[i] for i in chosen]
        self.tokens += sum(len(ids) for _, ids, _ in picked)
        return {
            "prompt_ids": [list(prompt) for prompt, _, _ in picked],
            "completion_ids": [list(ids) for _, ids, _ in picked],
            "logprobs": None,
            "row": chosen,
        }

    def _reward(self, completions: list[Any], row: list[int], **more: Any) -> list[float]:
        return [self.rows[i][2] for i in row]


def momentum(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """What an Adam optimiser remembers of gradients, by the name of the model's parameter."""
    state = getattr(optimizer, "optimizer", optimizer).state
    return {n: state[p]["exp_avg"].detach().clone() for n, p in model.named_parameters() if p in state}
