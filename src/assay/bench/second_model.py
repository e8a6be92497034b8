"""A second small model for heterogeneous swarms: another family, size, seed and stream of text than `tiny`.

Qwen2 architecture of about 0.7 M parameters with `tiny`'s tokenizer (token ids travel), trained from nothing on the same
kind of problems. Some minutes on one core, once; kept in the cache.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from assay import models
from assay.builtin.problems import WRONG, code_problem, programmed, word_problem, worked
from assay.data import render_prompt
from assay.progress import Silent, Tracker

STEPS, BATCH, LR, SEED = 1600, 48, 4e-3, 1
CODE_SHARE = 0.3
UNITS = 250.0  # seconds of one core


def second_model(tracker: Tracker | None = None, steps: int = STEPS) -> Path:
    """Directory of the second model, made if it is not in the cache."""
    tracker = tracker or Silent()
    target = models.second_dir()
    if target.exists():
        return target
    tracker.say("training a second small model (once, some minutes)")
    tracker.add(UNITS * steps / STEPS)
    base = models.load("tiny", "float32")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads decides last bits
    try:
        model = _train(_new(base.tokenizer), base.tokenizer, steps, tracker)
    finally:
        torch.set_num_threads(threads)
    with models.building(target) as work:
        models.save_model(model.to(torch.float16), base.tokenizer, work)
    return target


def _new(tokenizer: Any) -> Any:
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
           "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=320, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def _rows(tokenizer: Any, count: int) -> Iterator[tuple[list[int], int]]:
    """Token ids of prompt and solution, and how many of them are the prompt."""
    rng = random.Random(f"second/{SEED}")
    for _ in range(count):
        code = rng.random() < CODE_SHARE
        problem = (code_problem if code else word_problem)(rng)
        solution = (programmed if code else worked)(problem, rng, WRONG["code" if code else "math"])
        prompt = tokenizer(render_prompt(problem.question, "chatml"), add_special_tokens=False)["input_ids"]
        answer = tokenizer(solution, add_special_tokens=False)["input_ids"]
        yield [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def _batches(rows: Sequence[tuple[list[int], int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and loss mask, rows of like length together within every twenty batches."""
    rng = random.Random(SEED)
    for at in range(0, len(rows), 20 * BATCH):
        some = sorted(rows[at : at + 20 * BATCH], key=lambda row: len(row[0]))
        parts = [some[i : i + BATCH] for i in range(0, len(some), BATCH)]
        rng.shuffle(parts)
        for part in parts:
            width = max(len(ids) for ids, _ in part)
            ids_BL = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part])
            place_L = torch.arange(width)
            mask_BL = torch.stack([(place_L >= start) & (place_L < len(ids)) for ids, start in part])
            yield ids_BL, mask_BL


def _train(model: Any, tokenizer: Any, steps: int, tracker: Tracker) -> Any:
    """AdamW, short warm-up, cosine to 5%; the loss is on the solutions."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.05)
    rows = list(_rows(tokenizer, steps * BATCH))
    for step, (ids_BL, mask_BL) in enumerate(_batches(rows)):
        phase = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = LR * phase * min(1.0, (step + 1) / min(100, steps // 4 + 1))
        logits = model(input_ids=ids_BL).logits[:, :-1][mask_BL[:, 1:]]
        loss = torch.nn.functional.cross_entropy(logits, ids_BL[:, 1:][mask_BL[:, 1:]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tracker.tick(UNITS / STEPS)
    return model.eval()
