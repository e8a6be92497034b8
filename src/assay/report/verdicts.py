"""Single screens' verdicts, as many of a run's ledger as a page bears.

A run of 1,000 clients and 100 rounds has 700,000 verdicts; what goes first is those of contributions that no screen
marked down.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from assay.report.records import Number, Parsed, Text

VERDICTS = 40_000
"""On one page. Some 60 bytes each with a sentence of its own, 20 without."""
ALL, MARKED, BELOW = range(3)
"""How much is kept: every verdict; all of contributions that any screen marked down; only those below full weight."""


class Said(Parsed):
    """One screen's verdict on one contribution, as the ledger has it."""

    participant: Text
    contribution: Text = ""
    screen: Text = ""
    weight: Number = None
    reason: Text = ""
    sentence: Text = ""
    score: Number = None
    mode: Text = "enforce"
    evidence: dict[Text, Number] = Field(default_factory=dict)


Cell = tuple[int, str]
"""A round and a participant."""


@dataclass(slots=True)
class Kept:
    """The verdicts of one run by round and participant, at most `most` of them; `level` says what that made of them.

    Rounds come in order. `cut` is the first round of which something below full weight is missing, 0 where nothing is.
    """

    most: int
    level: int = ALL
    cut: int = 0
    cells: dict[Cell, list[Said]] = field(default_factory=dict)
    count: int = 0

    def add(self, round: int, verdicts: Iterable[Any]) -> None:
        """A round's verdicts as the ledger has them; whatever is none is passed over."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for raw in verdicts:
            if isinstance(raw, dict) and isinstance(raw.get("participant"), str):
                groups.setdefault(raw["participant"], []).append(raw)
        for group in groups.values():
            wanted = self._wanted(group)
            if wanted and self.level == BELOW and self.count + len(wanted) > self.most:
                self.cut = self.cut or round
                continue
            if wanted:
                said = [Said.model_validate(raw) for raw in wanted]
                self.cells.setdefault((round, said[0].participant), []).extend(said)
                self.count += len(said)
        while self.count > self.most and self.level < BELOW:
            self.level += 1
            found = {cell: self._kept(said) for cell, said in self.cells.items()}
            self.cells = {cell: said for cell, said in found.items() if said}
            self.count = sum(map(len, self.cells.values()))

    def relabel(self, labels: Mapping[str, str]) -> None:
        """The same with everybody called by the operator's names; two participants never have the same label."""
        self.cells = {(round, labels.get(name, name)): said for (round, name), said in self.cells.items()}

    def _wanted(self, group: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        below = [raw for raw in group if raw.get("weight") != 1]
        return group if self.level == ALL or (self.level == MARKED and below) else below if self.level == BELOW else []

    def _kept(self, said: list[Said]) -> list[Said]:
        below = [one for one in said if one.weight != 1]
        return said if self.level == MARKED and below else below
