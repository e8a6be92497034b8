"""Multiple choice: which of the options the model finds likeliest as its answer. Utility that wording cannot hide.

As in the common harnesses: the option with the highest log-likelihood, as it is or divided by its length. A file has
JSON lines with `question`, `options` (two or more texts) and `answer` (index of the right one, from 0).
Legend: N questions, O options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from assay import data
from assay.contribution import Tensors
from assay.data import DataError, Example
from assay.federated.compute import Compute
from assay.federated.local_sft import LocalSettings

BUILTIN = "general-knowledge"
LENGTH = 256
"""Tokens of question and option together; longer ones lose the beginning of the question."""
Normalise = Literal["tokens", "characters", "none"]


@dataclass(frozen=True, slots=True)
class Choice:
    question: str
    options: tuple[str, ...]
    answer: int


def load(source: str, root: Path) -> list[Choice]:
    """Questions of the built-in set or of a JSON-lines file; a bad row is an error that names its line."""
    if source == BUILTIN:
        from assay.builtin import quiz

        return [Choice(*row) for row in quiz.rows()]
    if not source.endswith(".jsonl"):
        raise DataError(f"evaluate.choices.source: unknown set {source!r}; give a .jsonl file or {BUILTIN}")
    out = []
    for where, row in data.read_jsonl(root / source):
        question, options, answer = (row.get(key) for key in ("question", "options", "answer"))
        texts = [o for o in options if isinstance(o, str) and o] if isinstance(options, list) else []
        # type(): True is an int for Python, and no index
        if not isinstance(question, str) or len(texts) < 2 or texts != options or type(answer) is not int:
            raise DataError(f"{where} is no question: it needs question, two or more options, and answer (an index)")
        if not 0 <= answer < len(texts):
            raise DataError(f"{where} is no question: answer is {answer}, its options are 0 to {len(texts) - 1}")
        out.append(Choice(question, tuple(texts), answer))
    return out


def pick(nll_O: Sequence[float], options: Sequence[str], normalise: Normalise) -> int:
    """The option chosen, from each option's loss: its sum in nats, or for `tokens` its mean. Ties: the first.

    >>> pick([4.0, 6.0], ["No", "Certainly"], "none"), pick([4.0, 6.0], ["No", "Certainly"], "characters")
    (0, 1)
    """
    length_O = [len(o.encode()) if normalise == "characters" else 1 for o in options]
    return int(np.argmin(np.asarray(nll_O) / length_O))


def accuracy(
    compute: Compute, adapter: Tensors, choices: Sequence[Choice], settings: LocalSettings, normalise: Normalise
) -> float:
    """Share of questions whose right option is chosen. The end of the answer counts as part of every option."""
    rows = [Example(c.question, option) for c in choices for option in c.options]
    settings = replace(
        settings, max_length=max(LENGTH, settings.max_length), reduce="mean" if normalise == "tokens" else "sum"
    )
    nll = compute.row_nll([adapter], rows, settings)[0].tolist()
    right = 0
    for choice in choices:
        own, nll = nll[: len(choice.options)], nll[len(choice.options) :]
        right += pick(own, choice.options, normalise) == choice.answer
    return right / len(choices)
