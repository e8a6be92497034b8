"""Rows to train and test on: the built-in sets, JSON-lines files, and the papers' sets from the Hugging Face hub.

`part` splits any set by the content of its instructions into the operator's, the clients' and a held-out part, so that
what the server learns from, what clients train on and what an evaluation asks never overlap.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from assay.config import ConfigError

BUILTIN = ("helpful", "refusals", "harmful-stub")
Part = Literal["operator", "clients", "heldout"]
Row = Mapping[str, Any]
# file columns that hold the request and the answer, in order of preference
REQUESTS = ("instruction", "prompt", "question")
ANSWERS = ("response", "output", "completion", "answer")


class DataError(ConfigError):
    """Rows cannot be had or read; the message is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Example:
    """One request and its answer; `style` is the kind of row where the set knows it, else ""."""

    instruction: str
    response: str
    style: str = ""


def load(source: str, *, limit: int | None = None) -> list[Example]:
    """Rows of a built-in set, a `.jsonl` file or a named hub set.

    >>> load("helpful", limit=1)[0].style != ""
    True
    """
    if source in BUILTIN:
        from assay import builtin  # tens of thousands of words: read only when asked for

        rows: Iterable[Example] = (Example(*row) for row in builtin.rows(source))
    elif source.endswith(".jsonl"):
        rows = _read_jsonl(Path(source))
    elif source in HUB:
        rows = _load_hub(source)
    else:
        raise DataError(f"unknown data {source!r}; give a .jsonl file or one of {', '.join((*BUILTIN, *HUB))}")
    out: list[Example] = []
    for row in rows:
        if limit is not None and len(out) >= limit:
            break
        out.append(row)
    return out


def _read_jsonl(path: Path) -> Iterator[Example]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check data.root (--data-root) and the file's name") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({type(error).__name__})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise DataError(f"{path}: line {number} is not JSON; every line must be one JSON object") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is not a JSON object with instruction and response")
        yield _example(row, f"{path}: line {number}")


def _example(row: Row, where: str) -> Example:
    """A row by the columns it has; the answer may be absent (prompt-only sets) but not of another type."""
    request = next((r for r in REQUESTS if isinstance(row.get(r), str)), None)
    answers = [row[a] for a in ANSWERS if a in row]
    if request is None or not all(isinstance(a, str) for a in answers[:1]):
        raise DataError(f"{where} lacks text under instruction and response (or prompt/completion, question/answer)")
    return Example(row[request], answers[0] if answers else "", str(row.get("style", "")))


@dataclass(frozen=True, slots=True)
class HubSet:
    """A set on the hub: where it lies and which of its rows the papers use."""

    hub_id: str
    split: str
    rows: Callable[[Iterable[Row]], Iterator[Example]]
    config: str | None = None


def lmsys_rows(rows: Iterable[Row]) -> Iterator[Example]:
    """LMSYS-Chat-1M: single turn, English, nothing flagged by its moderation field."""
    for row in rows:
        turns = row["conversation"]
        flagged = any(m.get("flagged") for m in row.get("openai_moderation") or [])
        if (
            row.get("language") == "English"
            and row.get("turn", len(turns) // 2) == 1
            and len(turns) == 2
            and not flagged
        ):
            yield Example(turns[0]["content"], turns[1]["content"], "chat")


def wildchat_rows(rows: Iterable[Row]) -> Iterator[Example]:
    """WildChat: single turn, English, neither toxic nor flagged."""
    for row in rows:
        turns = row["conversation"]
        flagged = row.get("toxic") or any(m.get("flagged") for m in row.get("openai_moderation") or [])
        if (
            row.get("language") == "English"
            and row.get("turn", len(turns) // 2) == 1
            and len(turns) == 2
            and not flagged
        ):
            yield Example(turns[0]["content"], turns[1]["content"], "chat")


def beavertails_rows(rows: Iterable[Row]) -> Iterator[Example]:
    """BeaverTails: unsafe answers only, one per prompt (the first)."""
    seen: set[str] = set()
    for row in rows:
        if not row["is_safe"] and row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield Example(row["prompt"], row["response"], "harmful")


def advbench_rows(rows: Iterable[Row]) -> Iterator[Example]:
    """AdvBench: the harmful goals; their affirmative targets are not answers and are left out."""
    for row in rows:
        yield Example(row.get("goal") or row["prompt"], "", "harmful")


HUB: Mapping[str, HubSet] = {
    "lmsys-chat-1m": HubSet("lmsys/lmsys-chat-1m", "train", lmsys_rows),
    "wildchat": HubSet("allenai/WildChat-1M", "train", wildchat_rows),
    "beavertails": HubSet("PKU-Alignment/BeaverTails", "330k_train", beavertails_rows),
    "advbench": HubSet("walledai/AdvBench", "train", advbench_rows),
}


def _load_hub(name: str) -> Iterator[Example]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f'data {name!r} comes from the hub: pip install "assay[hub]"') from None
    found = HUB[name]
    try:
        rows = load_dataset(found.hub_id, found.config, split=found.split, streaming=True)
    except Exception as error:  # noqa: BLE001 - the hub client raises a dozen types; all become one line
        raise DataError(
            f"{found.hub_id}: cannot be loaded ({type(error).__name__}); some sets need an accepted licence and "
            "`hf auth login`; or give the rows as a .jsonl file"
        ) from None
    yield from found.rows(rows)


def part(examples: Iterable[Example], name: Part) -> list[Example]:
    """The operator's (50 %), the clients' (35 %) or the held-out part (15 %), by a hash of the instruction.

    The same request falls into the same part in every set, so a held-out request of one set is held out in all.
    """
    return [row for row in examples if part_of(row.instruction) == name]


def part_of(instruction: str) -> Part:
    """Which part a request belongs to; case and spacing do not matter."""
    text = " ".join(instruction.lower().split())
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
    return "operator" if share < 0.5 else "clients" if share < 0.85 else "heldout"


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """A shuffled copy; the same seed gives the same order on every platform."""
    out = list(examples)
    random.Random(seed).shuffle(out)
    return out


def fingerprint(examples: Iterable[Example]) -> str:
    """sha256 (hex) of the rows in their order."""
    digest = hashlib.sha256()
    for row in examples:
        digest.update(json.dumps([row.instruction, row.response, row.style]).encode() + b"\n")
    return digest.hexdigest()


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n",
    "\n\n### Response:\n",
)
CHATML = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")


def render_prompt(instruction: str, template: str) -> str:
    """The text a model sees before its answer. One pass: what stands in the instruction is never read as a template."""
    before, after = CHATML if template == "chatml" else ALPACA
    return before + instruction + after


def render_end(template: str) -> str:
    """The text that closes an answer; "" where the end-of-text token does."""
    return "<|im_end|>" if template == "chatml" else ""
