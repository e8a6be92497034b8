"""Run directories in, checked values out. Everything a run wrote is parsed here and nowhere else.

Strings are cleaned as they are parsed: control, bidirectional and other invisible characters become visible escapes
(a name cannot reorder the line it stands in, nor hold what UTF-8 cannot write). Numbers that are not finite are None.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from assay import run_dir
from assay.ledger import Verification, verify

Role = Literal["honest", "malicious", "unknown"]
Kind = Literal["honest", "undefended", "defended", "unknown"]

ROLES: tuple[Role, ...] = ("honest", "malicious", "unknown")


class ReportError(ValueError):
    """The report cannot be made; the message is one line that says what to do."""


def clean(value: Any) -> Any:
    r"""Make invisible characters of a string visible; containers keep their shape, numbers that are not finite go.

    >>> clean("a\u202eb"), clean({"k": [float("nan"), "x\ty"]})
    ('a\\u202eb', {'k': [None, 'x\ty']})
    """
    if isinstance(value, str):
        return "".join(_visible(char) for char in value)
    if isinstance(value, Mapping):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _visible(char: str) -> str:
    if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return char
    return f"\\u{ord(char):04x}"


Text = Annotated[str, BeforeValidator(lambda value: clean("" if value is None else value))]
Number = Annotated[float | None, BeforeValidator(clean)]
Open = Annotated[dict[str, Any], BeforeValidator(clean)]


class _Parsed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


Schema = TypeVar("Schema", bound=_Parsed)


class ModelInfo(_Parsed):
    name: Text = ""
    sha256: Text = ""
    dtype: Text = ""
    alignment: Text = ""


class ReasonCount(_Parsed):
    screen: Text = ""
    reason: Text
    honest: int = 0
    malicious: int = 0
    sentence: Text = ""


class Answer(_Parsed):
    prompt: Text
    answer: Text


class LedgerHead(_Parsed):
    entries: int = 0
    head: Text = ""


class Summary(_Parsed):
    """`summary.json`; what is not listed is ignored, what is missing is shown as missing."""

    name: Text
    wing: Text = "federated"
    assay: Text = ""
    commit: Text = ""
    versions: Open = {}
    machine: Open = {}
    seed: int | None = None
    command: Text = ""
    started: Text = ""
    finished: Text = ""
    model: ModelInfo = ModelInfo()
    setting: Open = {}
    participants: dict[Text, Text] = {}
    seconds: dict[Text, Number] = {}
    metrics: dict[Text, Number] = {}
    detection: dict[Text, dict[Text, Number]] = {}
    reasons: tuple[ReasonCount, ...] = ()
    ledger: LedgerHead | None = None
    answers: tuple[Answer, ...] = ()


class RoundRow(_Parsed):
    """A line of `metrics.jsonl`; round 0 is the model before training."""

    round: int = Field(ge=0)
    refusal_rate: Number = None
    over_refusal_rate: Number = None
    benign_loss: Number = None
    mean_weight: Number = None
    outcome: Text = ""
    weights: dict[Text, Number] = {}
    seconds: dict[Text, Number] = {}


class Contribution(_Parsed):
    participant: Text
    sha256: Text = ""
    weight: Number = None
    reason: Text = ""
    screen: Text = ""
    sentence: Text = ""


class LedgerRound(_Parsed):
    round: int
    contributions: tuple[Contribution, ...] = ()


@dataclass(frozen=True)
class Run:
    """One run as the page shows it. `label` is unique on the page; `summary` is None while it is unfinished."""

    directory: Path
    label: str
    summary: Summary | None
    rows: tuple[RoundRow, ...]
    ledger: Mapping[int, Mapping[str, Contribution]]  # round -> participant
    chain: Verification | None
    notices: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def level(self) -> str:
        return str(self.setting.get("level") or "none") if self.summary else ""

    @property
    def setting(self) -> Mapping[str, Any]:
        return self.summary.setting if self.summary else {}

    @property
    def kind(self) -> Kind:
        """Unknown while unfinished: nothing on disk says yet who was who."""
        if self.summary is None:
            return "unknown"
        if self.level != "none":
            return "defended"
        return "undefended" if self.malicious else "honest"

    @cached_property
    def roles(self) -> dict[str, Role]:
        """Every participant seen, honest first, then malicious, then those of whom nothing is known."""
        said = self.summary.participants if self.summary else {}
        known: dict[str, Role] = {}
        for name in [*said, *(name for weights in self.weights.values() for name in weights)]:
            role = said.get(name)
            known[name] = "honest" if role == "honest" else "malicious" if role == "malicious" else "unknown"
        return dict(sorted(known.items(), key=lambda item: (ROLES.index(item[1]), natural(item[0]))))

    @property
    def malicious(self) -> int:
        return sum(role == "malicious" for role in self.roles.values())

    @cached_property
    def weights(self) -> dict[int, dict[str, float]]:
        """round -> participant -> weight; the ledger's where `metrics.jsonl` has none."""
        found = {}
        for number in sorted({row.round for row in self.rows if row.round} | set(self.ledger)):
            weights = {name: c.weight for name, c in self.ledger.get(number, {}).items()}
            weights |= next((row.weights for row in self.rows if row.round == number), {})
            found[number] = {name: weight for name, weight in weights.items() if weight is not None}
        return found

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage without `total`; what no stage accounts for is `other`."""
        total: Counter[str] = Counter()
        for part in [self.summary.seconds] if self.summary else [row.seconds for row in self.rows]:
            total.update({stage: value for stage, value in part.items() if value and stage != "total"})
        spent = sum(total.values())
        whole = (self.summary.seconds.get("total") if self.summary else None) or spent
        return dict(total) | ({"other": whole - spent} if whole - spent > 0.005 * whole else {})

    def start(self, metric: str) -> float | None:
        """The metric before training (round 0), where it was measured."""
        value: float | None = getattr(self.rows[0], metric) if self.rows and self.rows[0].round == 0 else None
        return value

    def end(self, metric: str) -> float | None:
        """The summary's figure; for an unfinished run the last one measured in training."""
        if self.summary and (said := self.summary.metrics.get(metric)) is not None:
            return said
        values = [getattr(row, metric, None) for row in self.rows if row.round]
        return next((value for value in reversed(values) if value is not None), None)


def load_runs(directories: Sequence[Path]) -> list[Run]:
    """All runs, with labels that tell them apart (name, else name and directory, else a number too)."""
    if not directories:
        raise ReportError("no run directory given: pass at least one directory written by `assay run` or `assay demo`")
    runs = [_load(Path(directory)) for directory in directories]
    for suffixes in ([f" ({clean(run.directory.name)})" for run in runs], [f" #{i + 1}" for i in range(len(runs))]):
        count = Counter(run.label for run in runs)
        runs = [
            replace(run, label=run.label + suffix) if count[run.label] > 1 else run
            for run, suffix in zip(runs, suffixes, strict=True)
        ]
    return runs


def _load(directory: Path) -> Run:
    summary_file, metrics_file = directory / run_dir.SUMMARY, directory / run_dir.METRICS
    if not directory.is_dir():
        raise ReportError(f"{directory} is not a directory: pass one written by `assay run` or `assay demo`")
    if not summary_file.is_file() and not metrics_file.is_file():
        raise ReportError(
            f"{directory} has neither summary.json nor metrics.jsonl: pass a directory written by `assay run`"
        )
    notices: list[str] = []
    summary = _parse(Summary, _json(summary_file), summary_file) if summary_file.is_file() else None
    if summary and summary.wing != "federated":
        raise ReportError(f"{directory} is a {summary.wing} run: this page shows federated runs, leave it out")
    rows = {  # a resumed run may have written a round twice: the later line is what the run went on from
        row.round: row for row in (_parse(RoundRow, line, metrics_file) for line in _lines(metrics_file, notices))
    }
    chain, contributions = _ledger(directory / run_dir.LEDGER, summary, notices)
    if differ := sum(
        (said := contributions.get(row.round, {}).get(name)) is not None
        and abs((said.weight or 0.0) - (weight or 0.0)) > 1e-6
        for row in rows.values()
        for name, weight in row.weights.items()
    ):
        notices.append(f"metrics.jsonl and the ledger disagree on {differ} weights; this page shows metrics.jsonl")
    label = (summary.name if summary else str(clean(directory.name))).removeprefix("federated.")
    ordered = tuple(rows[number] for number in sorted(rows))
    return Run(directory, label, summary, ordered, contributions, chain, tuple(notices))


def _ledger(
    file: Path, summary: Summary | None, notices: list[str]
) -> tuple[Verification | None, dict[int, dict[str, Contribution]]]:
    """The state of the chain, checked here and now, and what it says of each contribution by round."""
    if not file.is_file():
        notices.append("there is no ledger, so reasons and hashes of single contributions are missing")
        return None, {}
    head = summary.ledger.head if summary and summary.ledger else None
    chain = verify(file, head or None)
    if not chain.ok and summary:  # an unfinished run may end in a torn line
        where = "" if chain.first_broken is None else f"entry {chain.first_broken}: "
        notices.append(f"the ledger is broken, do not rely on this run ({where}{clean(chain.problem)})")
    found: dict[int, dict[str, Contribution]] = {}
    for line in _lines(file, notices):
        if isinstance(line, dict) and line.get("kind") == "round":
            record = _parse(LedgerRound, line.get("body"), file)
            found[record.round] = {said.participant: said for said in record.contributions}
    return chain, found


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """client-2 before client-10; digits that int() might not take (or take too long over) stay text."""
    return tuple(
        (int(part), "") if part.isascii() and part.isdigit() and len(part) < 16 else (-1, part)
        for part in re.split(r"([0-9]+)", name)
    )


def _parse(schema: type[Schema], value: Any, file: Path) -> Schema:
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the top"
        raise ReportError(
            f"{file} is damaged at {clean(place)!r} ({first['msg']}): restore the file or run again"
        ) from error


def _lines(file: Path, notices: list[str]) -> Iterator[Any]:
    """JSON lines; a torn last line (the run was killed while writing it) is left out and said."""
    if not file.is_file():
        return
    lines = _read(file).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                notices.append(f"the last line of {file.name} is torn and left out")
                return
            raise ReportError(f"{file} line {number} is not JSON: restore the file or run again") from error
        yield value


def _json(file: Path) -> Any:
    text = _read(file)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ReportError(f"{file} is not JSON: restore it, or delete it to show the run as unfinished") from error


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{file} cannot be read ({type(error).__name__}): restore the file or run again") from error
