"""Whether the installed trainer does what screening needs: a probe of the real class, on a model of 2,000 weights.

`rollout_func` is marked experimental in TRL. A trainer that ignored it would train on its own completions and screen
nothing; one that ignored `env_mask` would learn from rows that were refused. So both are tried: two steps of training
whose gradients are known beforehand. `start()` does it in a process of its own (the trainer sets global state), while
the user's model loads; `python -m assay.engines.trl.contract` is the same by hand.
"""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from assay.config import ConfigError

GROUP, PROMPTS = 4, ("a b", "c d")
VOCABULARY = {word: at for at, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *"abcdefghijklm"])}
TIMEOUT = 600.0


def signature_fault(trainer_class: Any) -> str:
    """What its signature lacks; "" if nothing."""
    if "rollout_func" in inspect.signature(trainer_class.__init__).parameters:
        return ""
    return f"{named(trainer_class)} takes no rollout_func: install trl>=1.16,<1.17"


def behaviour_fault(trainer_class: Any) -> str:
    """What the trainer does otherwise than TRL 1.16, in one line; "" if nothing.

    Step 1: all rewards differ, but every row is masked by env_mask: the gradient must be zero. Step 2: nothing is
    masked, and all but one row of each group get None from every reward: zero again, for one row has nothing to be
    compared with. Step 3: nothing is masked, every row counts: it must not be zero, or the probe has seen nothing.
    """
    masked = dict.fromkeys(range(GROUP * len(PROMPTS)), 0)
    rewards = [float(row % GROUP) for row in range(GROUP * len(PROMPTS))]
    alone = [value if row % GROUP == 1 else None for row, value in enumerate(rewards)]
    if fault := step(trainer_class, lambda row: masked[row], rewards, "env_mask"):
        return fault
    if fault := step(trainer_class, lambda row: 1, alone, "a reward of None"):
        return fault
    return step(trainer_class, lambda row: 1, rewards, "")


def named(trainer_class: Any) -> str:
    import trl

    return f"the installed {trainer_class.__name__} (trl {trl.__version__})"


def step(trainer_class: Any, mask: Callable[[int], int], rewards: list[float | None] | list[float], what: str) -> str:
    """Train one step on fixed rows; `what` should have kept it from learning ("": nothing should)."""
    import torch
    from transformers import TrainerCallback

    seen: dict[str, Any] = {"prompts": None, "size": 0.0, "forwarded": False}

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
            seen["size"] += float(sum(g.abs().sum() for g in grads))

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        seen["prompts"] = prompts
        ids = [[3 + (5 * row + at) % 13 for at in range(4)] + [1] for row in range(len(prompts))]
        return {
            "prompt_ids": [[3, 4]] * len(prompts),
            "completion_ids": ids,
            "logprobs": None,
            "env_mask": [[mask(row)] * 5 for row in range(len(prompts))],
            "row": list(range(len(prompts))),
        }

    def reward(completions: list[str], row: list[int] | None = None, **kwargs: Any) -> list[float | None]:
        seen["forwarded"] = "env_mask" in kwargs
        return [rewards[at] for at in (range(len(completions)) if row is None else row)]

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        made_trainer(trainer_class, folder, reward, rollout, Look()).train()
    who = named(trainer_class)
    if seen["prompts"] is None:
        return f"{who} ignores rollout_func: it trained without calling it; install trl>=1.16,<1.17"
    if list(seen["prompts"]) != [p for p in dict.fromkeys(seen["prompts"]) for _ in range(GROUP)]:
        return f"{who} does not hand rollout_func each prompt num_generations times; install trl>=1.16,<1.17"
    if what and (seen["size"] > 0 or seen["forwarded"]):
        return f"{who} ignores {what}: it learns from rows that were refused; install trl>=1.16,<1.17"
    if not what and seen["size"] == 0:
        return f"{who} learns nothing from what rollout_func returns; install trl>=1.16,<1.17"
    return ""


def made_trainer(trainer_class: Any, folder: str, reward: Any, rollout: Any, callback: Any) -> Any:
    """The real trainer on a model made here."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig

    words = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="[EOS]", pad_token="[PAD]", unk_token="[UNK]", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, eos_token_id=1, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    args = GRPOConfig(
        output_dir=folder, max_steps=1, per_device_train_batch_size=GROUP * len(PROMPTS), num_generations=GROUP,
        max_completion_length=5, shuffle_dataset=False, max_grad_norm=0.0, gradient_checkpointing=False, bf16=False,
        use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return trainer_class(
        model=LlamaForCausalLM(config), reward_funcs=reward, args=args, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}), rollout_func=rollout, callbacks=[callback],
    )  # fmt: skip


@functools.cache
def start() -> subprocess.Popen[str]:
    """Begin the probe of the installed GRPOTrainer, once a process."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__], env=quiet(os.environ), text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def quiet(environment: Mapping[str, str]) -> dict[str, str]:
    """Of the environment what the probe may see: not the launcher's (it is one process), not the accelerator."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")
    kept = {name: value for name, value in environment.items() if not name.startswith(launched)}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1"}


@functools.cache
def finished() -> str:
    """Wait for `start` -> the fault, or "". What keeps the probe from running is a fault as well."""
    process = start()
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"the self-test did not end within {TIMEOUT:.0f} s; ScreenedRollouts(..., self_test=False) skips it"
    if process.returncode == 0:
        return ""
    told = out.strip().splitlines()
    if process.returncode == 1 and told:
        return told[-1]
    last = (err.strip().splitlines() or ["no output"])[-1]
    return f"the self-test could not run ({last}); ScreenedRollouts(..., self_test=False) skips it"


def require() -> None:
    """ConfigError if the installed trainer failed the probe."""
    if fault := finished():
        raise ConfigError(fault)


def main() -> int:
    import trl

    fault = signature_fault(trl.GRPOTrainer) or behaviour_fault(trl.GRPOTrainer)
    print(fault or f"ok: trl {trl.__version__} does what screening needs")
    return 1 if fault else 0


if __name__ == "__main__":
    raise SystemExit(main())
