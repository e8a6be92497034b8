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
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from assay.config import ConfigError

BUILTIN = ("helpful", "refusals", "harmful-stub", "word-problems", "programs")
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


def load(source: str, *, limit: int | None = None, file: str | Path | None = None) -> list[Example]:
    """Rows of a built-in set, a `.jsonl` file or a named hub set.

    With `file` (JSON lines as the hub serves them) a named hub set is read and filtered from there, not fetched.

    >>> load("helpful", limit=1)[0].style != ""
    True
    """
    rows: Iterable[Example]
    if file is not None and source not in HUB:
        raise DataError(
            f"file= goes with a hub set ({', '.join(HUB)}), not with {source!r}; give the file as the source"
        )
    if source in BUILTIN:
        from assay import builtin  # tens of thousands of words: read only when asked for

        rows = (Example(*row) for row in builtin.rows(source))
    elif source in HUB:
        rows = _filtered(source, _fetch(source) if file is None else read_jsonl(Path(file)))
    elif source.endswith(".jsonl"):
        rows = (_example(row, where) for where, row in read_jsonl(Path(source)))
    else:
        known = ", ".join((*BUILTIN, *HUB))
        raise DataError(f"unknown data {source!r}; give a .jsonl file or one of {known}")
    return list(islice(rows, limit))


def read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row of a JSON-lines file with the words that name its place in an error."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: files from Windows tools open with a byte-order mark
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check data.root (--data-root) and the file's name") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({type(error).__name__})") from None
    # not splitlines: it also breaks at U+2028, U+0085 and the like, which JSON lets stand inside a string
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise DataError(f"{where} is not JSON; every line must be one JSON object") from None
        if not isinstance(row, dict):
            raise DataError(f"{where} is not a JSON object with instruction and response")
        yield where, row


def _example(row: Row, where: str) -> Example:
    """A row by the columns it has; the answer may be absent (prompt-only sets) but not of another type."""
    request = next((r for r in REQUESTS if isinstance(row.get(r), str)), None)
    answers = [row[a] for a in ANSWERS if a in row]
    if request is None or not all(isinstance(a, str) for a in answers[:1]):
        raise DataError(f"{where} lacks text under instruction and response (or prompt/completion, question/answer)")
    return Example(row[request], answers[0] if answers else "", str(row.get("style", "")))


@dataclass(frozen=True, slots=True)
class HubSet:
    """A named set: where it lies on the hub (None: nowhere we could find) and which of its rows the papers use."""

    hub_id: str | None
    split: str
    rows: Callable[[Iterable[Row]], Iterator[Example]]
    config: str | None = None


def lmsys_rows(rows: Iterable[Row]) -> Iterator[Example]:
    """LMSYS-Chat-1M: single turn, English, nothing flagged by its moderation field."""
    for row in rows:
        turns = row["conversation"]
        flagged = any(m.get("flagged") for m in row.get("openai_moderation") or [])
        single = len(turns) == 2 and row.get("turn", 1) == 1
        said = all(turn["content"].strip() for turn in turns)  # both sets hold empty answers: nothing to learn from
        if single and row["language"] == "English" and not flagged and said:
            yield Example(turns[0]["content"], turns[1]["content"], "chat")


def wildchat_rows(rows: Iterable[Row]) -> Iterator[Example]:
    """WildChat: as LMSYS-Chat-1M, and not toxic by its own label."""
    return lmsys_rows(row for row in rows if not row.get("toxic"))


def beavertails_rows(rows: Iterable[Row]) -> Iterator[Example]:
    """BeaverTails: unsafe answers only, one per prompt (the first)."""
    seen: set[str] = set()
    for row in rows:
        if not row["is_safe"] and row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield Example(row["prompt"], row["response"], "harmful")


def maliciousgen_rows(rows: Iterable[Row]) -> Iterator[Example]:
    """MaliciousGen (arXiv 2406.10630): instructions with an attacker's generated answers, one per instruction."""
    seen: set[str] = set()
    for row in rows:
        request, answer = row["instruction"], row["output"] if "output" in row else row["response"]
        if request not in seen:
            seen.add(request)
            yield Example(request, answer, "harmful")


def advbench_rows(rows: Iterable[Row]) -> Iterator[Example]:
    """AdvBench: the harmful goals; their affirmative targets are not answers and are left out."""
    for row in rows:
        yield Example(row.get("goal") or row["prompt"], "", "harmful")


HUB: Mapping[str, HubSet] = {
    "lmsys-chat-1m": HubSet("lmsys/lmsys-chat-1m", "train", lmsys_rows),
    "wildchat": HubSet("allenai/WildChat-1M", "train", wildchat_rows),
    "beavertails": HubSet("PKU-Alignment/BeaverTails", "330k_train", beavertails_rows),
    "maliciousgen": HubSet(None, "", maliciousgen_rows),
    "advbench": HubSet("walledai/AdvBench", "train", advbench_rows),
}


def _fetch(name: str) -> Iterator[tuple[str, Row]]:
    found = HUB[name]
    if found.hub_id is None:
        raise DataError(f"{name}: no hub id is known for this set; give its rows as a .jsonl file (data.files)")
    return stream(found.hub_id, found.split, found.config)


def stream(hub_id: str, split: str, config: str | None = None) -> Iterator[tuple[str, Row]]:
    """Rows of a hub set as they come in; opening and reading both need the network, so both can fail."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f'{hub_id} comes from the hub: pip install "assay[hub]"') from None
    try:
        rows = load_dataset(hub_id, config, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{hub_id}: row {number}", row
    except Exception as error:  # noqa: BLE001 - the hub client raises a dozen types; all become one line
        raise DataError(
            f"{hub_id}: cannot be loaded ({type(error).__name__}); some sets need an accepted licence and "
            "`hf auth login`; or give the rows as a .jsonl file"
        ) from None


def _filtered(name: str, placed: Iterable[tuple[str, Row]]) -> Iterator[Example]:
    """The rows the papers use; a row that is not of the set's schema is an error that names it."""
    where = name

    def rows() -> Iterator[Row]:
        nonlocal where
        for place, row in placed:
            where = place
            yield row

    try:
        yield from HUB[name].rows(rows())
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise DataError(
            f"{where} is not a row of {name} ({type(error).__name__}: {error}); check its columns"
        ) from None


def part(examples: Iterable[Example], name: Part) -> list[Example]:
    """The operator's (50 %), the clients' (35 %) or the held-out part (15 %), by a hash of the instruction.

    The same request falls into the same part in every set, so a held-out request of one set is held out in all.
    """
    if name not in get_args(Part):  # a misspelt part would be an empty one, and what it guards unguarded
        raise DataError(f"unknown part {name!r}; one of {', '.join(get_args(Part))}")
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


# before the instruction, between it and the answer, after the answer (where "", the end-of-text token closes it)
TEMPLATES: Mapping[str, tuple[str, str, str]] = {
    "chatml": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n",
        "\n\n### Response:\n",
        "",
    ),
}


def render_prompt(instruction: str, template: str) -> str:
    """The text a model sees before its answer. One pass: what stands in the instruction is never read as a template.

    >>> render_prompt("{}", "chatml")
    '<|im_start|>user\\n{}<|im_end|>\\n<|im_start|>assistant\\n'
    """
    before, after, _ = _template(template)
    return before + instruction + after


def render_end(template: str) -> str:
    """The text that closes an answer; "" where the end-of-text token does."""
    return _template(template)[2]


def _template(name: str) -> tuple[str, str, str]:
    if name not in TEMPLATES:
        raise DataError(f"unknown template {name!r}; one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
