"""What runs of either wing write, parsed and checked: schemas, JSON files and lines, the state of the ledger.

Strings are cleaned as they are parsed: control, bidirectional and other invisible characters become visible escapes
(a name cannot reorder the line it stands in, nor hold what UTF-8 cannot write). Numbers that are not finite are None.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
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
        if (
            value.isprintable()
        ):  # nothing of the categories below: nearly every string, and there are hundreds of thousands
            return value
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


class Parsed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


Schema = TypeVar("Schema", bound=Parsed)


class ModelInfo(Parsed):
    name: Text = ""
    sha256: Text = ""
    dtype: Text = ""
    alignment: Text = ""


class ReasonCount(Parsed):
    screen: Text = ""
    reason: Text
    honest: int = 0
    malicious: int = 0
    sentence: Text = ""


class Answer(Parsed):
    prompt: Text
    answer: Text


class LastStep(Parsed):
    """A step on the final adapter, with the metrics before and after it."""

    step: Text
    before: dict[Text, Number] = {}
    after: dict[Text, Number] = {}


class LedgerHead(Parsed):
    entries: int = 0
    head: Text = ""


class Summary(Parsed):
    """`summary.json`; what is not listed is ignored, what is missing is shown as missing."""

    name: Text
    wing: Text = "federated"
    faithful: bool = False
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
    names: dict[Text, Text] = {}
    """What the operator calls participants whose identity is a number; for reading alone."""
    seconds: dict[Text, Number] = {}
    metrics: dict[Text, Number] = {}
    detection: dict[Text, dict[Text, Number]] = {}
    reasons: tuple[ReasonCount, ...] = ()
    finish: tuple[LastStep, ...] = ()
    ledger: LedgerHead | None = None
    answers: tuple[Answer, ...] = ()


class Row(Parsed):
    """A line of `metrics.jsonl`, whatever the wing; round 0 is the model before training."""

    round: int = Field(ge=0)
    seconds: dict[Text, Number] = {}


@dataclass(frozen=True)
class Recorded:
    """One run as the page shows it. `label` is unique in its wing; `summary` is None while it is unfinished."""

    directory: Path
    label: str
    summary: Summary | None
    rows: tuple[Row, ...]
    chain: Verification | None
    notices: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def setting(self) -> Mapping[str, Any]:
        return self.summary.setting if self.summary else {}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage without `total`; what no stage accounts for is `other`."""
        total: Counter[str] = Counter()
        for part in [self.summary.seconds] if self.summary else [row.seconds for row in self.rows]:
            total.update({stage: value for stage, value in part.items() if value and stage != "total"})
        spent = sum(total.values())
        whole = (self.summary.seconds.get("total") if self.summary else None) or spent
        return dict(total) | ({"other": whole - spent} if whole - spent > 0.005 * whole else {})


Kept = TypeVar("Kept", bound=Recorded)


def tell_apart(runs: Iterable[Kept]) -> list[Kept]:
    """The same runs with labels that differ: name, else name and directory, else a number too."""
    runs = list(runs)
    for suffixes in ([f" ({clean(run.directory.name)})" for run in runs], [f" #{i + 1}" for i in range(len(runs))]):
        count = Counter(run.label for run in runs)
        runs = [
            replace(run, label=run.label + suffix) if count[run.label] > 1 else run
            for run, suffix in zip(runs, suffixes, strict=True)
        ]
    return runs


def played(run: Recorded) -> int:
    """Rounds played so far; round 0 is none."""
    return sum(row.round > 0 for row in run.rows)


def roles_of(said: Mapping[str, str], seen: Iterable[str]) -> dict[str, Role]:
    """Every participant said or seen, honest first, then malicious, then those of whom nothing is known."""
    known: dict[str, Role] = {}
    for name in [*said, *seen]:
        role = said.get(name)
        known[name] = "honest" if role == "honest" else "malicious" if role == "malicious" else "unknown"
    return dict(sorted(known.items(), key=lambda item: (ROLES.index(item[1]), natural(item[0]))))


def labels_of(names: Mapping[str, str], seen: Iterable[str]) -> dict[str, str]:
    """What each participant is called on the page. Never what another one is: a name may be given twice.

    >>> labels_of({"170001": "North", "170002": "North", "170003": "170004"}, ["170004"])
    {'170004': '170004', '170001': 'North …0001', '170002': 'North …0002', '170003': '170004 …0003'}
    >>> labels_of({"180001": "North", "170001": "North"}, [])
    {'180001': 'North (180001)', '170001': 'North (170001)'}
    """
    everybody = dict.fromkeys([*seen, *names])
    short = {one: f"{names[one]} …{one[-4:]}" if one in names else one for one in everybody}
    count = Counter(short.values())
    return {
        one: f"{names[one]} ({one})" if one in names and count[label] > 1 else label for one, label in short.items()
    }


def chain_of(file: Path, summary: Summary | None, notices: list[str]) -> Verification | None:
    """The state of the chain, checked here and now; None without a ledger."""
    if not file.is_file():
        notices.append("there is no ledger, so reasons and hashes of single contributions are missing")
        return None
    head = summary.ledger.head if summary and summary.ledger else None
    chain = verify(file, head or None)
    if not chain.ok and summary:  # an unfinished run may end in a torn line
        where = "" if chain.first_broken is None else f"entry {chain.first_broken}: "
        notices.append(f"the ledger is broken, do not rely on this run ({where}{clean(chain.problem)})")
    return chain


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """client-2 before client-10; digits that int() might not take (or take too long over) stay text."""
    return tuple(
        (int(part), "") if part.isascii() and part.isdigit() and len(part) < 16 else (-1, part)
        for part in re.split(r"([0-9]+)", name)
    )


def parse(schema: type[Schema], value: Any, file: Path) -> Schema:
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the top"
        raise ReportError(
            f"{file} is damaged at {clean(place)!r} ({first['msg']}): restore the file or run again"
        ) from error


def lines(file: Path, notices: list[str]) -> Iterator[Any]:
    """JSON lines, one in memory at a time; a torn last line (killed while writing it) is left out and said."""
    if not file.is_file():
        return
    try:
        with file.open(encoding="utf-8", newline="\n") as opened:
            for number, line in enumerate(opened, start=1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except ValueError as error:
                    if not line.endswith("\n"):  # only the last one can be
                        notices.append(f"the last line of {file.name} is torn and left out")
                        return
                    raise ReportError(f"{file} line {number} is not JSON: restore the file or run again") from error
                yield value
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{file} cannot be read ({type(error).__name__}): restore the file or run again") from error


def read_json(file: Path) -> Any:
    text = _read(file)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ReportError(f"{file} is not JSON: restore it, or delete it to show the run as unfinished") from error


def read_config(directory: Path) -> Mapping[str, Any]:
    """The experiment as it was understood; empty where the directory does not say."""
    file = directory / run_dir.RESOLVED
    resolved = clean(read_json(file)) if file.is_file() else {}
    experiment = resolved.get("experiment") if isinstance(resolved, dict) else None
    return experiment if isinstance(experiment, dict) else {}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{file} cannot be read ({type(error).__name__}): restore the file or run again") from error
