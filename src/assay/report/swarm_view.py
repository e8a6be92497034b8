"""What the page says of swarm runs: headline, tables, examples. Nothing here knows HTML; `swarm_charts` has the charts.

Runs of one attack form a group: they share their charts, in which a defence looks the same from group to group.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from assay import run_dir
from assay.report import common, drill, swarm_charts, swarm_words
from assay.report.records import clean
from assay.report.swarm_load import Shown, SwarmRun
from assay.report.words import fixed, shorten

SECTIONS = (
    ("swarm-summary", "Summary"),
    ("swarm-iterations", "Iteration by iteration"),
    ("swarm-margins", "Margins"),
    ("swarm-nodes", "Nodes"),
    ("swarm-participants", "Participants"),
    ("swarm-poison", "A poisoned completion"),
    ("swarm-detection", "Detection"),
    ("swarm-cost", "Cost"),
    ("swarm-provenance", "Provenance"),
)
EXAMPLES = 12  # poisoned completions on the page
BEFORE, TOKENS, LETTERS = 24, 160, 48  # tokens shown before the first marked one, in all, and letters of a token
NODES_LISTED = 100  # rows of the table of nodes in one run
COSTLY = 0.1
"""Share of honest completions refused over which the page warns; not calibrated: a tenth of the work is worth a line."""


def build(runs: Sequence[SwarmRun]) -> dict[str, Any]:
    """Everything the template prints that is not simply an attribute of a run."""
    shared, differing = common.provenance(runs)
    groups = by_attack(runs)
    eventful, poisoned = swarm_charts.eventful(runs), examples(runs, groups)
    return {
        "sections": [section for section in SECTIONS if section[0] != "swarm-poison" or poisoned],
        "styles": styles(runs, groups),
        "groups": groups,
        "metrics": swarm_words.METRICS,
        "attacks": swarm_words.terms(swarm_words.ATTACKS, [run.attack for run in runs]),
        "defences": swarm_words.terms(swarm_words.DEFENCES, [run.level for run in runs]),
        "headline": swarm_words.headline(runs),
        "caveats": [(run.label, text) for run in runs for text in caveats(run)],
        "settings_differ": differences(runs, groups),
        "charts": swarm_charts.courses(runs, groups),
        "margins": swarm_charts.margins(runs),
        "grids": eventful,
        "nodes": {i: nodes(runs[i]) for i in eventful},
        "people": any(run.roles for run in runs),
        "meaning": drill.meaning(run.verdicts for run in runs),
        "quiet": [i for i in range(len(runs)) if i not in eventful],
        "examples": poisoned,
        "reasons": [[{"row": row, "sentence": shorten(row.sentence)} for row in run.reasons[:60]] for run in runs],
        "unrefused": [i for i, run in enumerate(runs) if run.played and not run.reasons],
        "costs": [common.cost(run) for run in runs],
        "stages": common.stages(runs),
        "screening": common.SCREENING,
        "shared": shared,
        "differing": differing,
        "seeds": sorted({run.summary.seed for run in runs if run.summary and run.summary.seed is not None}),
        "models": sorted({run.summary.model.name for run in runs if run.summary and run.summary.model.name}),
    }


def payload(runs: Sequence[SwarmRun]) -> dict[str, Any]:
    """What the script draws of these runs."""
    groups = by_attack(runs)
    return {
        "runs": [
            {"name": run.label, "ledger": shlex.quote(str(clean(str(run.directory / run_dir.LEDGER)))), **style}
            for run, style in zip(runs, styles(runs, groups), strict=True)
        ],
        "charts": [chart["drawn"] for chart in swarm_charts.courses(runs, groups)],
        "margins": swarm_charts.bars(swarm_charts.margins(runs)),
        "grids": swarm_charts.grids(runs),
        "cost": common.cost_payload(runs),
        "people": drill.payload([_played(run) for run in runs]),
    }


def _played(run: SwarmRun) -> drill.Played:
    return drill.Played(
        rounds=list(run.shares),
        roles=run.roles,
        weights=run.shares,
        why=run.why,
        kept=run.verdicts,
        config=run.resolved,
    )


def by_attack(runs: Sequence[SwarmRun]) -> dict[str, list[int]]:
    """Indices of runs by the attack they play, or by whose behaviour they are measured."""
    found: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        found.setdefault(run.attack, []).append(i)
    return found


def styles(runs: Sequence[SwarmRun], groups: Mapping[str, Sequence[int]]) -> list[dict[str, str]]:
    """Colour, dash and marker of each run: unlike within a group, and alike for one defence from group to group."""
    levels = list(dict.fromkeys(run.level for run in runs if run.kind == "defended"))
    found: dict[int, dict[str, str]] = {}
    for members in groups.values():
        taken: set[int | str] = set()
        for i in members:
            kind = runs[i].kind
            if kind in common.LOOKS and kind not in taken:
                taken.add(kind)
                found[i] = common.LOOKS[kind]
                continue
            slot = levels.index(runs[i].level) if runs[i].level in levels else len(levels)
            while slot in taken:
                slot += 1
            taken.add(slot)
            found[i] = common.numbered_look(slot)
    return [found[i] for i in range(len(runs))]


def caveats(run: SwarmRun) -> list[str]:
    """What must be read beside the headline."""
    found = list(run.notices)
    lost = run.end("honest_rejected_rate")
    if lost is not None and lost > COSTLY:
        found.append(f"{fixed(100 * lost, 0)} % of honest completions were refused or lost their reward")
    start, end = run.start("heldout_reward"), run.end("heldout_reward")
    if start is not None and end is not None and end < start:
        found.append(f"training made answers worse: held-out reward fell from {fixed(start, 2)} to {fixed(end, 2)}")
    banned = {name for row in run.played for name in row.banned if run.roles[name] == "honest"}
    if banned:
        found.append(f"{len(banned)} honest node{'s were' if len(banned) > 1 else ' was'} banned for a time")
    return found


def differences(runs: Sequence[SwarmRun], groups: Mapping[str, Sequence[int]]) -> list[str]:
    """What else than attack, defence and malicious nodes differs among the runs of one attack."""
    found = []
    for attack, members in groups.items():
        differ = common.settings_differ([runs[i] for i in members])
        found += [f"{attack or 'an unnamed attack'}: {text}" if len(groups) > 1 else text for text in differ]
    return found


def nodes(run: SwarmRun) -> dict[str, Any]:
    """Who was struck and banned when, and how much of what each node owed was learnt from on average."""
    found = []
    for name, role in run.roles.items():
        shares = [share for row in run.played if (share := row.admitted.get(name)) is not None]
        found.append(
            {
                "name": name,
                "role": role,
                "mean": sum(shares) / len(shares) if shares else None,
                "struck": swarm_words.ranges([row.round for row in run.played if name in row.struck]),
                "banned": swarm_words.ranges([row.round for row in run.played if name in row.banned]),
            }
        )
    found.sort(key=lambda node: (node["struck"] == node["banned"] == "–") and len(found) > NODES_LISTED)
    return {"listed": found[:NODES_LISTED], "more": max(0, len(found) - NODES_LISTED)}


def examples(runs: Sequence[SwarmRun], groups: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """One malicious completion a run; of each attack first the one with most to see."""
    found: list[dict[str, Any]] = []
    for attack, members in groups.items():
        made = [example for i in members if (example := _example(runs[i], i)) is not None]
        made.sort(key=lambda example: -bool(example["marked"]))
        found += [{"attack": attack, "first": place == 0, **example} for place, example in enumerate(made)]
    return sorted(found, key=lambda example: not example["first"])[:EXAMPLES]


def _example(run: SwarmRun, i: int) -> dict[str, Any] | None:
    rows = [(row.round, row.shown) for row in run.played if row.shown and row.shown.tokens]
    if not rows:
        return None
    number, shown = next((found for found in rows if _marks(found[1])), rows[0])
    marks = _marks(shown)
    gaps = [gap for gap in shown.gaps if gap is not None]
    start = max(0, marks[0] - BEFORE) if marks and len(shown.tokens) > TOKENS else 0
    end = min(len(shown.tokens), start + TOKENS)
    worst = max(range(len(shown.gaps)), key=lambda at: shown.gaps[at] or 0.0) if gaps else None
    return {
        "run": i,
        "round": number,
        "participant": shorten(shown.participant, 80),
        "question": shorten(shown.question),
        "tokens": [_token(shown, at, at in set(marks)) for at in range(start, end)],
        "before": start,
        "after": len(shown.tokens) - end,
        "count": len(shown.tokens),
        "measured": bool(gaps),
        "marked": len(marks),
        "limit": shown.limit,
        "kind": "text" if shown.marked else "logit" if shown.screen == "logit" else "seeded",
        "worst": None if worst is None else {"at": worst + 1, "gap": shown.gaps[worst]},
        "reward": shown.reward,
        "admitted": shown.admitted,
        "screen": shown.screen,
        "reason": shown.reason,
        "sentence": shorten(shown.sentence),
    }


def _marks(shown: Shown) -> list[int]:
    if shown.marked:
        return sorted({at for at in shown.marked if 0 <= at < len(shown.tokens)})
    limit = shown.limit if shown.limit is not None else float("inf")
    return [at for at, gap in enumerate(shown.gaps[: len(shown.tokens)]) if gap is not None and gap > limit]


def _token(shown: Shown, at: int, marked: bool) -> dict[str, Any]:
    text = shown.tokens[at]
    gap = shown.gaps[at] if at < len(shown.gaps) else None
    return {"text": text if len(text) <= LETTERS else f"{text[:LETTERS]}…", "gap": gap, "marked": marked}
