"""Run directories in, checked values out: which wing a directory is of, and the runs of federated training.

`records` parses what both wings write, `swarm_load` the swarm's runs; nothing else on this page reads a file of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from assay import run_dir
from assay.report.records import (
    Kind,
    Number,
    Parsed,
    Recorded,
    ReportError,
    Role,
    Row,
    Summary,
    Text,
    chain_of,
    clean,
    labels_of,
    lines,
    parse,
    read_config,
    read_json,
    roles_of,
    tell_apart,
)
from assay.report.swarm_load import SwarmRun, load_swarm
from assay.report.verdicts import VERDICTS, Cell, Kept

WINGS = ("federated", "swarm")
AS_PUBLISHED = " (as published)"


class RoundRow(Row):
    refusal_rate: Number = None
    over_refusal_rate: Number = None
    benign_loss: Number = None
    mean_weight: Number = None
    auroc: Number = None
    outcome: Text = ""
    weights: dict[Text, Number] = Field(default_factory=dict)


class Contribution(Parsed):
    participant: Text
    sha256: Text = ""
    weight: Number = None
    reason: Text = ""
    screen: Text = ""
    sentence: Text = ""


class LedgerRound(Parsed):
    round: int
    contributions: tuple[Contribution, ...] = ()
    verdicts: tuple[Any, ...] = ()
    """Parsed as far as they are kept."""


Contributions = dict[int, dict[str, Contribution]]  # round -> participant


@dataclass(frozen=True)
class Run(Recorded):
    """One run of federated training."""

    rows: tuple[RoundRow, ...]
    ledger: Mapping[int, Mapping[str, Contribution]]  # round -> participant
    verdicts: Kept
    config: Mapping[str, Any]
    faithful: bool = False
    """Runs the published code's rules with their holes, for comparison; marked wherever it appears."""

    @property
    def level(self) -> str:
        return str(self.setting.get("level") or "none") if self.summary else ""

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
        return roles_of(said, (name for weights in self.weights.values() for name in weights))

    @property
    def why(self) -> dict[Cell, tuple[str, str, str]]:
        """Screen, reason and sentence of every contribution that was not simply let pass."""
        return {
            (number, name): (said.screen, said.reason, said.sentence)
            for number, found in self.ledger.items()
            for name, said in found.items()
            if said.reason != "ok" or said.weight != 1
        }

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


def load_runs(directories: Sequence[Path]) -> tuple[list[Run], list[SwarmRun]]:
    """All runs by wing, in the given order, with labels that tell those of a wing apart."""
    most = VERDICTS // max(1, len(directories))
    if not directories:
        raise ReportError("no run directory given: pass at least one directory written by `assay run` or `assay demo`")
    federated: list[Run] = []
    swarm: list[SwarmRun] = []
    for directory in map(Path, directories):
        summary = _summary(directory)
        if _wing(directory, summary) == "swarm":
            swarm.append(load_swarm(directory, summary, most))
        else:
            federated.append(_load(directory, summary, most))
    return tell_apart(federated), tell_apart(swarm)


def _summary(directory: Path) -> Any:
    """What summary.json says, unchecked; None for an unfinished run."""
    file = directory / run_dir.SUMMARY
    if not directory.is_dir():
        raise ReportError(f"{directory} is not a directory: pass one written by `assay run` or `assay demo`")
    if not file.is_file() and not (directory / run_dir.METRICS).is_file():
        raise ReportError(
            f"{directory} has neither summary.json nor metrics.jsonl: pass a directory written by `assay run`"
        )
    return (read_json(file) or {}) if file.is_file() else None


def _wing(directory: Path, summary: Any) -> str:
    """Of an unfinished run the config says it; runs older than the swarm's do not name their wing."""
    said, resolved = summary, directory / run_dir.RESOLVED
    if summary is None and resolved.is_file():
        config = read_json(resolved)
        said = config.get("experiment") if isinstance(config, dict) else None
    wing = said.get("wing") if isinstance(said, dict) else None
    if wing not in (None, "", *WINGS):
        raise ReportError(f"{directory} is a run of the wing {clean(str(wing))!r}: the page knows {', '.join(WINGS)}")
    return wing or "federated"


def _load(directory: Path, said: Any, most: int) -> Run:
    metrics_file, ledger_file = directory / run_dir.METRICS, directory / run_dir.LEDGER
    notices: list[str] = []
    summary = parse(Summary, said, directory / run_dir.SUMMARY) if said is not None else None
    rows = {  # a resumed run may have written a round twice: the later line is what the run went on from
        row.round: row for row in (parse(RoundRow, line, metrics_file) for line in lines(metrics_file, notices))
    }
    chain = chain_of(ledger_file, summary, notices)
    contributions: Contributions = {}
    verdicts = Kept(most)
    faithful = bool(summary and summary.faithful)
    for line in lines(ledger_file, notices):
        # either record is enough: nobody unmarks a run by editing one file
        if isinstance(line, dict) and line.get("kind") == "start" and isinstance(line.get("body"), dict):
            faithful = faithful or line["body"].get("faithful") is True
        if isinstance(line, dict) and line.get("kind") == "round":
            record = parse(LedgerRound, line.get("body"), ledger_file)
            contributions[record.round] = {said.participant: said for said in record.contributions}
            verdicts.add(record.round, record.verdicts)
    if differ := sum(
        (said := contributions.get(row.round, {}).get(name)) is not None
        and abs((said.weight or 0.0) - (weight or 0.0)) > 1e-6
        for row in rows.values()
        for name, weight in row.weights.items()
    ):
        notices.append(f"metrics.jsonl and the ledger disagree on {differ} weights; this page shows metrics.jsonl")
    label = (summary.name if summary else str(clean(directory.name))).removeprefix("federated.")
    label += AS_PUBLISHED if faithful else ""
    if summary and summary.names:
        summary, rows, contributions = _named(summary, rows, contributions, verdicts)
    ordered = tuple(rows[number] for number in sorted(rows))
    return Run(
        directory,
        label,
        summary,
        ordered,
        chain,
        tuple(notices),
        contributions,
        verdicts,
        read_config(directory),
        faithful,
    )


def _named(
    summary: Summary, rows: dict[int, RoundRow], contributions: Contributions, verdicts: Kept
) -> tuple[Summary, dict[int, RoundRow], Contributions]:
    """The same with everybody called by the operator's names."""
    seen = [*summary.participants, *(n for row in rows.values() for n in row.weights)]
    seen += [name for said in contributions.values() for name in said]
    labels = labels_of(summary.names, [*seen, *(name for _, name in verdicts.cells)])
    verdicts.relabel(labels)
    participants = {labels[name]: role for name, role in summary.participants.items()}
    told = {
        number: row.model_copy(update={"weights": {labels[n]: w for n, w in row.weights.items()}})
        for number, row in rows.items()
    }
    by_round = {
        number: {labels[name]: one.model_copy(update={"participant": labels[name]}) for name, one in said.items()}
        for number, said in contributions.items()
    }
    return summary.model_copy(update={"participants": participants}), told, by_round
