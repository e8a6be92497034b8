"""Run directories of the swarm wing: rows, what nodes were admitted, struck and banned, margins, one poisoned text.

What nodes wrote (names, questions, tokens, sentences) is hostile text; it is cleaned as it is parsed (see `records`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from assay import run_dir
from assay.report.records import (
    Kind,
    Number,
    Open,
    Parsed,
    ReasonCount,
    Recorded,
    Role,
    Row,
    Summary,
    Text,
    chain_of,
    clean,
    lines,
    parse,
    read_config,
    roles_of,
)
from assay.report.verdicts import VERDICTS, Cell, Kept

HELDOUT = {"asr": "asr", "completion_tokens_mean": "tokens", "heldout_reward": "reward"}
"""Metric of the summary -> its name in a row's `heldout`."""
EACH = 4
"""Verdicts of one node, iteration, screen and reason that the page shows."""
LIMIT = 0.05  # `seeded`'s default for the largest margin (calibrated fp32 against fp32), where a run does not say


class Heldout(Parsed):
    """On held-out prompts, after the round's update."""

    asr: Number = None
    tokens: Number = None
    reward: Number = None


class Margins(Parsed):
    """Histogram of each completion's largest margin; the last bin is open: as many counts as edges."""

    edges: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    honest: tuple[Annotated[int, Field(ge=0)], ...]
    malicious: tuple[Annotated[int, Field(ge=0)], ...]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.edges or not len(self.edges) == len(self.honest) == len(self.malicious):
            raise ValueError("edges, honest and malicious must be of one length")
        if any(low >= high for low, high in pairwise(self.edges)):
            raise ValueError("edges must rise")
        return self


class Shown(Parsed):
    """One malicious completion, token by token; `gaps` by token, where a screen measured them, or `marked` tokens."""

    participant: Text = ""
    question: Text = ""
    tokens: tuple[Text, ...] = ()
    gaps: tuple[Number, ...] = ()
    marked: tuple[int, ...] = ()
    limit: Number = None
    reward: Number = None
    admitted: bool = False
    screen: Text = ""
    reason: Text = ""
    sentence: Text = ""


class SwarmRow(Row):
    asr: Number = None
    completion_tokens_mean: Number = None
    train_reward: Number = None
    heldout: Heldout | None = None
    honest_rejected_rate: Number = None
    poison_rejected_rate: Number = None
    admitted: dict[Text, Number] = Field(default_factory=dict)
    banned: tuple[Text, ...] = ()
    struck: tuple[Text, ...] = ()
    reasons: tuple[ReasonCount, ...] = ()
    margins: Margins | None = None
    shown: Shown | None = None


class SwarmSummary(Summary):
    defence: Open = Field(default_factory=dict)


class LedgerTrust(Parsed):
    rounds: tuple[int, ...] = ()
    banned: bool = False


class LedgerLearner(Parsed):
    trust: dict[Text, LedgerTrust] = Field(default_factory=dict)
    verdicts: tuple[Any, ...] = ()


class SwarmLedgerRound(Parsed):
    """Of a round's entry who was struck and banned, to compare with metrics.jsonl, and what was refused."""

    round: int
    learners: dict[Text, LedgerLearner] = Field(default_factory=dict)

    def without_verdicts(self) -> Self:
        kept = {name: learner.model_copy(update={"verdicts": ()}) for name, learner in self.learners.items()}
        return self.model_copy(update={"learners": kept})


@dataclass(frozen=True)
class SwarmRun(Recorded):
    """One run of decentralised GRPO. `resolved` is the config, known before the run is finished."""

    summary: SwarmSummary | None
    rows: tuple[SwarmRow, ...]
    resolved: Mapping[str, Any]
    verdicts: Kept
    refused: Mapping[Cell, Mapping[tuple[str, str], int]]
    """Iteration and node -> screen and reason -> verdicts below full weight."""

    @property
    def setting(self) -> Mapping[str, Any]:
        return self.summary.setting if self.summary else _setting(self.resolved)

    @property
    def attack(self) -> str:
        """The attack played, or by whose behaviour an honest run is measured; empty: not known."""
        return str(self.setting.get("attack") or "")

    @property
    def level(self) -> str:
        """The defence; empty: not known."""
        built = self.summary.defence.get("level") if self.summary else None  # `custom` where screens are chosen singly
        return str(built or self.setting.get("level") or "")

    @property
    def kind(self) -> Kind:
        if self.level not in ("", "none"):
            return "defended"
        if not self.level:
            return "unknown"
        return "undefended" if self.malicious else "honest"

    @cached_property
    def roles(self) -> dict[str, Role]:
        """Every node seen. Who is malicious is the simulation's knowledge: no screen reads it."""
        said = self.summary.participants if self.summary else {}
        return roles_of(said, (name for row in self.rows for name in (*row.admitted, *row.struck, *row.banned)))

    @property
    def malicious(self) -> int:
        if self.summary and self.summary.participants:
            return sum(role == "malicious" for role in self.roles.values())
        said = self.setting.get("malicious")
        return said if isinstance(said, int) else 0

    @cached_property
    def shares(self) -> dict[int, dict[str, float]]:
        """Iteration -> node -> share of what it owed that was learnt from; nodes that owed nothing are absent."""
        return {row.round: {n: share for n, share in row.admitted.items() if share is not None} for row in self.played}

    @property
    def why(self) -> dict[Cell, tuple[str, str, str]]:
        """The commonest screen and reason, and in a sentence all of them, with strikes and bans."""
        found: dict[Cell, tuple[str, str, str]] = {}
        counted: dict[int, dict[str, list[tuple[tuple[str, str], int]]]] = {}
        for (number, name), kinds in self.refused.items():
            counted.setdefault(number, {})[name] = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
        for row in self.played:
            refused = counted.get(row.round, {})
            for name in sorted({*row.struck, *row.banned, *refused}):
                reasons = refused.get(name, [])
                told = [f"{count} × {reason or screen}" for (screen, reason), count in reasons]
                told += ["struck"] * (name in row.struck) + ["banned"] * (name in row.banned)
                screen, reason = reasons[0][0] if reasons else ("", "banned" if name in row.banned else "struck")
                found[row.round, name] = (screen, reason, "; ".join(told))
        return found

    @property
    def played(self) -> list[SwarmRow]:
        return [row for row in self.rows if row.round]

    @cached_property
    def reasons(self) -> tuple[ReasonCount, ...]:
        """The summary's, or added up so far; the commonest first."""
        said = self.summary.reasons if self.summary else ()
        if not said:
            total: dict[tuple[str, str], ReasonCount] = {}
            for found in (reason for row in self.played for reason in row.reasons):
                known = total.get((found.screen, found.reason))
                if known is not None:
                    more = {"honest": known.honest + found.honest, "malicious": known.malicious + found.malicious}
                    found = known.model_copy(update=more)
                total[found.screen, found.reason] = found
            said = tuple(total.values())
        return tuple(sorted(said, key=lambda reason: -(reason.honest + reason.malicious)))

    @property
    def limit(self) -> float:
        """The largest margin that `seeded` lets pass."""
        try:
            return float(self.resolved["defence"]["params"]["seeded"]["max_margin"])
        except (KeyError, TypeError, ValueError):
            said = (row.shown.limit for row in self.played if row.shown and row.shown.screen != "logit")
            return next((limit for limit in said if limit is not None), LIMIT)

    def start(self, metric: str) -> float | None:
        """The metric on held-out prompts before training (round 0)."""
        first = self.rows[0] if self.rows and self.rows[0].round == 0 else None
        value: float | None = getattr(first.heldout, HELDOUT[metric]) if first and first.heldout else None
        return value

    def end(self, metric: str) -> float | None:
        """The summary's figure; of an unfinished run the last on held-out prompts, or the mean rate so far."""
        if self.summary:
            return self.summary.metrics.get(metric)
        if metric in HELDOUT:
            found = [getattr(row.heldout, HELDOUT[metric]) for row in self.played if row.heldout]
            return next((value for value in reversed(found) if value is not None), None)
        found = [value for row in self.played if (value := getattr(row, metric, None)) is not None]
        return sum(found) / len(found) if found else None

    def peak(self) -> float | None:
        """The highest success rate among honest completions of one iteration."""
        return max((row.asr for row in self.played if row.asr is not None), default=None)

    def best_screen(self) -> tuple[str, float | None]:
        """The screen whose score separates malicious completions best, and its AUROC; `schema` reads no content."""
        found = self.summary.detection if self.summary else {}
        known = [
            (name, auroc)
            for name, said in found.items()
            if name != "schema" and (auroc := said.get("auroc")) is not None
        ]
        return max(known, key=lambda item: item[1]) if known else ("", None)


def load_swarm(directory: Path, said: Any, most: int = VERDICTS) -> SwarmRun:
    """The run in `directory`; `said` is its summary, None while it is unfinished, `most` of its verdicts are kept.

    Raises ReportError.
    """
    metrics_file, ledger_file = directory / run_dir.METRICS, directory / run_dir.LEDGER
    notices: list[str] = []
    summary = parse(SwarmSummary, said, directory / run_dir.SUMMARY) if said is not None else None
    refused: dict[Cell, Counter[tuple[str, str]]]
    rows = {row.round: row for row in (parse(SwarmRow, line, metrics_file) for line in lines(metrics_file, notices))}
    chain = chain_of(ledger_file, summary, notices)
    verdicts, entries, refused = Kept(most), [], {}
    for body in _rounds(ledger_file, notices):
        entry = parse(SwarmLedgerRound, body, ledger_file)
        entries.append(entry.without_verdicts())
        said = [verdict for learner in entry.learners.values() for verdict in learner.verdicts]
        refused |= _counted(entry.round, said)
        verdicts.add(entry.round, some_of_each(said))
    if differ := sum(not _agrees(rows[entry.round], entry) for entry in entries if entry.round in rows):
        notices.append(
            f"metrics.jsonl and the ledger disagree on who was struck or banned in {differ} iterations; "
            "this page shows metrics.jsonl"
        )
    label = (summary.name if summary else str(clean(directory.name))).removeprefix("swarm.")
    ordered = tuple(rows[number] for number in sorted(rows))
    return SwarmRun(
        directory, label, summary, ordered, chain, tuple(notices), read_config(directory), verdicts, refused
    )


def _rounds(file: Path, notices: list[str]) -> Iterator[Any]:
    for line in lines(file, notices):
        if isinstance(line, dict) and line.get("kind") == "round":
            yield line.get("body")


def _counted(round: int, verdicts: Iterable[Any]) -> dict[Cell, Counter[tuple[str, str]]]:
    found: dict[Cell, Counter[tuple[str, str]]] = {}
    for raw in verdicts:
        if isinstance(raw, dict) and isinstance(raw.get("participant"), str) and raw.get("weight") != 1:
            kind = (clean(str(raw.get("screen", ""))), clean(str(raw.get("reason", ""))))
            found.setdefault((round, clean(raw["participant"])), Counter())[kind] += 1
    return found


def some_of_each(verdicts: Iterable[Any]) -> Iterator[Any]:
    """At most EACH verdicts of a node for one reason: the twelve of a group say the same of a hundred groups."""
    seen: Counter[tuple[str, str, str]] = Counter()
    for raw in verdicts:
        if isinstance(raw, dict):
            kind = (str(raw.get("participant")), str(raw.get("screen")), str(raw.get("reason")))
            seen[kind] += 1
            if seen[kind] <= EACH:
                yield raw


def _agrees(row: SwarmRow, entry: SwarmLedgerRound) -> bool:
    """Rows tell of the first kind of learners, and the ledger does not say which that is: any will do."""
    said = (sorted(row.struck), sorted(row.banned))
    kinds = [
        (
            sorted(name for name, strikes in learner.trust.items() if entry.round in strikes.rounds),
            sorted(name for name, strikes in learner.trust.items() if strikes.banned),
        )
        for learner in entry.learners.values()
    ]
    return not kinds or said in kinds


def _setting(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config what a summary's `setting` would say; only what is there."""

    def said(section: str, key: str) -> Any:
        found = resolved.get(section)
        return found.get(key) if isinstance(found, dict) else None

    nodes, share = said("swarm", "nodes"), said("swarm", "malicious")
    known = isinstance(nodes, int) and isinstance(share, int | float)
    found = {
        "nodes": nodes,
        "malicious": round(share * nodes) if known else None,
        "plan": said("swarm", "plan"),
        "iterations": said("swarm", "iterations"),
        "task": said("task", "name"),
        "attack": said("attack", "name"),
        "level": said("defence", "level"),
    }
    return {key: value for key, value in found.items() if value is not None}
