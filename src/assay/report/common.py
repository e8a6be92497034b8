"""What both wings' sections say in the same way: looks of runs, seconds by stage, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from assay.report.records import Recorded, clean
from assay.report.words import plain, shorten

SCREENING = ("screen", "screens", "probe", "canary", "rehearse", "rehearsal", "gate")
"""Stages counted as the cost of the defence."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")
COLOURS = 5  # --c-0 .. --c-4 in style.css, beside --c-ref (honest only) and --c-bare (undefended)
LOOKS = {
    "honest": {"colour": "ref", "dash": "dot", "symbol": "diamond"},
    "undefended": {"colour": "bare", "dash": "dash", "symbol": "x"},
}


def numbered_look(turn: int) -> dict[str, str]:
    """Of the runs that are neither honest only nor undefended: colour, dash and marker, none twice in 25 turns."""
    # past the palette the dash tells two of a colour apart
    dash, symbol = DASHES[turn // COLOURS % len(DASHES)], SYMBOLS[turn % len(SYMBOLS)]
    return {"colour": str(turn % COLOURS), "dash": dash, "symbol": symbol}


def settings_differ(runs: Sequence[Recorded]) -> list[str]:
    """What else than attack, level and share of malicious clients differs: such runs are not like for like."""
    done = [run for run in runs if run.summary]
    rows = [
        {
            key: plain(value)
            for key, value in run.setting.items()
            if key not in ("level", "attack", "mix", "attack_params", "malicious")
        }
        | {"seed": plain(run.summary.seed), "commit": run.summary.commit, "model": run.summary.model.sha256}
        for run in done
        if run.summary
    ]
    found = []
    for key in dict.fromkeys(key for row in rows for key in row):
        values = list(dict.fromkeys(row.get(key, "–")[:24] for row in rows))
        if len(values) > 1:
            found.append(f"{key} ({' / '.join(values)})")
    return found


def stages(runs: Sequence[Recorded]) -> list[str]:
    """Stages in order of first appearance, screening first, `other` last."""
    found = dict.fromkeys(stage for run in runs for stage in run.seconds)
    return sorted(found, key=lambda stage: (stage not in SCREENING, stage == "other"))


def cost(run: Recorded) -> dict[str, Any]:
    """Seconds by stage, their sum, and the share that screening took."""
    spent = run.seconds
    total = sum(spent.values())
    share = sum(value for stage, value in spent.items() if stage in SCREENING) / total if total else None
    return {"stages": spent, "total": total or None, "share": share}


def cost_payload(runs: Sequence[Recorded]) -> dict[str, Any]:
    """The stacked bars: seconds by stage and run."""
    names = stages(runs)
    return {
        "stages": names,
        "screening": [stage in SCREENING for stage in names],
        "seconds": [[round(run.seconds.get(stage, 0.0), 3) for run in runs] for stage in names],
    }


def provenance(runs: Sequence[Recorded]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Facts that all runs share, and per fact the values where they differ."""
    rows = []
    for run in runs:
        row = {"directory": str(clean(str(run.directory))), "state": "finished" if run.finished else "unfinished"}
        if (s := run.summary) is not None:
            row |= {"command": s.command, "started": s.started, "finished": s.finished, "seed": plain(s.seed)}
            row |= {"assay": s.assay, "commit": s.commit, "machine": plain(s.machine)}
            row |= {"model": s.model.name, "model sha256": s.model.sha256, "dtype": s.model.dtype}
            row |= {"alignment": s.model.alignment}
            row |= {f"version: {name}": plain(value) for name, value in s.versions.items()}
            row |= {f"setting: {name}": plain(value) for name, value in s.setting.items()}
        if run.chain:
            row |= {"ledger": f"{run.chain.entries} entries, chain {'holds' if run.chain.ok else 'BROKEN'}"}
            row |= {"ledger head": run.chain.head}
        rows.append({key: value for key, value in row.items() if value})
    shared: dict[str, str] = {}
    differing: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [shorten(row.get(key, "")) or "–" for row in rows]
        if len(set(values)) == 1:
            shared[key] = values[0]
        else:
            differing[key] = values
    return shared, differing
