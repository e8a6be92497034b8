"""Who was weighed how in every round and what each screen said of it: the data under the tables of participants.

Both wings hand in a `Played` for each run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from assay.report.limits import MEANING, is_limit, limit
from assay.report.records import ROLES, Role, natural
from assay.report.verdicts import Cell, Kept, Said
from assay.report.words import shorten

HASH = 12  # digits of a sha256: enough to find it in the ledger


@dataclass(frozen=True, kw_only=True)
class Played:
    """One run: who was weighed how (the share learnt from, in a swarm), and what is known of the reasons."""

    rounds: Sequence[int]
    roles: Mapping[str, Role]
    weights: Mapping[int, Mapping[str, float]]
    why: Mapping[Cell, tuple[str, str, str]]
    """Screen, reason and sentence of what was not a plain pass."""
    kept: Kept
    config: Mapping[str, Any]
    sha256: Mapping[Cell, str] = field(default_factory=dict)


def meaning(kept: Iterable[Kept]) -> list[tuple[str, str]]:
    """What the numbers of the screens that spoke are, for those of which it is known."""
    spoke = {one.screen for some in kept for said in some.cells.values() for one in said if one.evidence}
    return [(screen, words) for screen, words in MEANING.items() if screen in spoke]


def payload(runs: Sequence[Played]) -> dict[str, Any]:
    """The JSON: texts are listed once and referred to by index, rounds are columns, and a plain pass is only a weight.

    Of run r, `who` are indices of names, `roles` of ROLES. In the order of `who`: `weights` by round (None: not asked),
    `sha` (HASH characters a round), `why` ([column, screen, reason, sentence], ...), `said` ([column, verdict, ...], ...)
    with verdict = [form, reason, weight, sentence, score, limit, sha, *numbers] and form = [screen, mode, *names].
    """
    texts: dict[str, int] = {}

    def at(text: str) -> int:
        return texts.setdefault(text, len(texts))

    names = sorted(dict.fromkeys(name for run in runs for name in run.roles), key=natural)
    place = {name: index for index, name in enumerate(names)}
    forms: dict[tuple[int, ...], int] = {}

    def verdict(said: Said, of: str, config: Mapping[str, Any]) -> list[Any]:
        numbers = {name: value for name, value in said.evidence.items() if not is_limit(name)}
        form = (at(said.screen), at(said.mode), *map(at, numbers))
        other = said.contribution[:HASH] if said.contribution != of else ""
        return [
            forms.setdefault(form, len(forms)), at(said.reason), _short(said.weight), at(shorten(said.sentence, 240)),
            _short(said.score), at(limit(said.screen, said.evidence, said.score, config)), at(other),
            *map(_short, numbers.values()),
        ]  # fmt: skip

    found: list[dict[str, Any]] = []
    for run in runs:
        column = {number: index for index, number in enumerate(run.rounds)}
        why: dict[str, list[list[int]]] = {}
        for (number, name), (screen, reason, sentence) in run.why.items():
            if number in column:
                row = [column[number], at(screen), at(reason), at(shorten(sentence, 240))]
                why.setdefault(name, []).append(row)
        said: dict[str, list[list[Any]]] = {}
        for (number, name), verdicts in run.kept.cells.items():
            if number in column:
                sha = run.sha256.get((number, name), "")
                rows = [verdict(one, sha, run.config) for one in verdicts]
                said.setdefault(name, []).append([column[number], *rows])
        hashes = [[run.sha256.get((number, name), "")[:HASH] for number in run.rounds] for name in run.roles]
        found.append(
            {
                "rounds": list(run.rounds),
                "who": [place[name] for name in run.roles],
                "roles": [ROLES.index(role) for role in run.roles.values()],
                "weights": [[_short(run.weights[n].get(name)) for n in run.rounds] for name in run.roles],
                "sha": ["".join(one.ljust(HASH) for one in row) if any(row) else "" for row in hashes],
                "why": [why.get(name, []) for name in run.roles],
                "said": [said.get(name, []) for name in run.roles],
                "level": run.kept.level,
                "cut": run.kept.cut,
            }
        )
    return {"names": names, "runs": found, "texts": list(texts), "forms": [list(form) for form in forms]}


def _short(value: float | None) -> float | int | None:
    """Four digits, and 1 instead of 1.0: most weights are 0 or 1."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return None
    return int(value) if value == int(value) and abs(value) < 1e6 else float(f"{value:.4g}")
