"""Models that judge answers: any Hugging Face sequence classifier (safety label or reward), or a causal safety judge.

The papers': MD-Judge (OpenSafetyLab/MD-Judge-v0.1: causal, it writes "safe" or "unsafe") and the OpenAssistant reward
model (OpenAssistant/reward-model-deberta-v3-large-v2: a classifier with one output, on the pair of question and
answer). A judge reads what a model under attack wrote: the text is data, filled in once and never read as a template.
Legend: B batch, L labels, T tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from assay import models
from assay.config import ConfigError, Experiment, JudgeConfig


@dataclass(frozen=True, slots=True)
class Judge:
    """A loaded judge. `outputs` are the outputs its score is a softmax over; `at` is the wanted one among them."""

    model: Any
    tokenizer: Any
    config: JudgeConfig
    outputs: tuple[int, ...]
    at: int


def load_all(experiment: Experiment) -> None:
    """Load every judge of the config now: one that cannot be had should not end a run after its first round."""
    for config in experiment.evaluate.judges:
        load(config)


@lru_cache(maxsize=4)
def load(config: JudgeConfig) -> Judge:
    """Load a judge once. ConfigError if it cannot be had or does not have the label."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    path = models.resolve(config.model)
    kind: Any = AutoModelForCausalLM if config.kind == "causal" else AutoModelForSequenceClassification
    dtype = getattr(torch, models.resolve_dtype(config.dtype))
    try:
        with models.quiet_transformers():
            model = kind.from_pretrained(path, dtype=dtype, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"evaluate.judges: Transformers cannot load {config.model}: {str(error).splitlines()[0]}"
        ) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"evaluate.judges: the tokenizer of {config.model} has neither a padding nor an end token; take another"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    # the verdict is asked for at the end and the answer stands there: a text too long loses its beginning
    tokenizer.truncation_side = "left" if config.template is not None else "right"
    tokenizer.padding_side = "right"
    find = _words if config.kind == "causal" else _labels
    return Judge(model.to(models.device()).eval(), tokenizer, config, *find(config, model, tokenizer))


def _labels(config: JudgeConfig, model: Any, tokenizer: Any) -> tuple[tuple[int, ...], int]:
    """Outputs of a classifier: all of them where a label is wanted, its only one where a score is."""
    count = int(model.config.num_labels)
    known = {str(name): int(i) for i, name in model.config.id2label.items()}
    if config.label is None:
        if count != 1:
            raise ConfigError(
                f"evaluate.judges: {config.model} has {count} labels, name one in label: {', '.join(known)}"
            )
        return (0,), 0
    if count == 1:
        raise ConfigError(f"evaluate.judges: {config.model} has one score and no labels; leave label out")
    if config.label not in known:
        raise ConfigError(f"evaluate.judges: {config.model} has no label {config.label!r}; one of {', '.join(known)}")
    return tuple(range(count)), known[config.label]


def _words(config: JudgeConfig, model: Any, tokenizer: Any) -> tuple[tuple[int, ...], int]:
    """Vocabulary entries of a causal judge's two words: the first token of each."""
    first = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (config.label, config.against)]
    if first[0] == first[1]:
        raise ConfigError(
            f"evaluate.judges: {config.label!r} and {config.against!r} begin with the same token for {config.model}"
        )
    return tuple(first), 0


def text_of(template: str, question: str, answer: str) -> str:
    """The template with both filled in, in one pass: what they hold is never filled in again.

    >>> text_of("Q {question} A {answer}", "{answer}", "{question}")
    'Q {answer} A {question}'
    """
    parts = {"{question}": question, "{answer}": answer}
    return re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], template)


@torch.no_grad()
def scores(judge: Judge, questions: Sequence[str], answers: Sequence[str]) -> NDArray[np.float64]:
    """One number per answer: the only output of a reward model, or the probability of the label."""
    config, tokenizer = judge.config, judge.tokenizer
    out: list[float] = []
    for at in range(0, len(questions), config.batch):
        asked, said = list(questions[at : at + config.batch]), list(answers[at : at + config.batch])
        if config.template is None:
            rows: tuple[list[str], ...] = (asked, said)
        else:
            rows = ([text_of(config.template, q, a) for q, a in zip(asked, said, strict=True)],)
        batch = tokenizer(*rows, padding=True, truncation=True, max_length=config.max_length, return_tensors="pt")
        batch = batch.to(judge.model.device)
        known = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
        if config.kind == "causal":
            logits_BTV = judge.model(input_ids=known["input_ids"], attention_mask=known["attention_mask"]).logits
            last_B = known["attention_mask"].sum(dim=1) - 1  # right-padded
            logits_BL = logits_BTV[torch.arange(len(asked)), last_B]
        else:
            logits_BL = judge.model(**known).logits
        logits_BL = logits_BL[:, list(judge.outputs)].double()
        score_B = logits_BL[:, 0] if len(judge.outputs) == 1 else logits_BL.softmax(dim=1)[:, judge.at]
        out += score_B.cpu().tolist()
    return np.array(out)


def measure(config: JudgeConfig, questions: Sequence[str], answers: Sequence[str]) -> float:
    """Mean reward, or the share of answers the judge gives the label (more likely than not; the paper's MD-Judge)."""
    judge = load(config)
    score_N = scores(judge, questions, answers)
    return float(score_N.mean() if len(judge.outputs) == 1 else (score_N > 0.5).mean())


def name_of(config: JudgeConfig) -> str:
    """Name of the metric: `judge_` and the judge's name, or what ends its model's path."""
    said = config.name or Path(config.model).name
    return "judge_" + "".join(c if c.isalnum() else "_" for c in said.lower())
