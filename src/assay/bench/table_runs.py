"""Tables of runs: grids of attacks, shares and levels; single experiments of either wing. Rows are grouped over seeds as
mean (min-max)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SWARM_COLUMNS = {
    "ASR": "asr",
    "held-out reward": "heldout_reward",
    "tokens": "completion_tokens_mean",
    "honest refused": "honest_rejected_rate",
    "malicious refused": "poison_rejected_rate",
}
COLUMNS = {
    "refusal": "refusal_rate",
    "over-refusal": "over_refusal_rate",
    "benign loss": "benign_loss",
    "AUROC": "auroc",
    "TPR at 1% FPR": "tpr_at_1pct_fpr",
    "weight honest": "honest_weight_mean",
    "weight malicious": "malicious_weight_mean",
}


def is_grid(found: Mapping[str, Any]) -> bool:
    """Whether these are attacks x shares x levels; their runs share work, so seconds are not each one's own."""
    return bool(found.get("seconds_shared"))


def grid_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What honest clients alone reach, then one line per attack and level, its malicious shares side by side."""
    attacked = [r for r in rows if r["attack"] != "none"]
    shares = sorted({r["share"] for r in attacked if r["share"]})
    triggers = any(r.get("trigger_compliance") is not None for r in attacked)
    metrics = ["trigger_compliance", "refusal_rate"] if triggers else ["refusal_rate"]
    judged = {k: COLUMNS[k] for k in ("AUROC", "TPR at 1% FPR", "weight honest", "weight malicious")}
    columns = {**{k: COLUMNS[k] for k in ("over-refusal", "benign loss")}, **judged}
    heads = [f"{m.replace('_', ' ').removesuffix(' rate')}, {s:.0%}" for m in metrics for s in shares]
    lines = []
    for level, some in by(rows, "defence").items():
        if alone := [r for r in some if r["attack"] == "none"]:
            told = f"refusal {_cell([r['refusal_rate'] for r in alone], 2)}"
            if level != "none":
                told += f", weight {_cell([r['honest_weight_mean'] for r in alone], 2)}"
            lines += [f"Honest clients only{'' if level == 'none' else f' under `{level}`'}: {told}.", ""]
    lines += [
        "| attack | level | " + " | ".join([*heads, *columns]) + " |",
        "|---" * (len(heads) + 2 + len(columns)) + "|",
    ]
    for level in sorted(by(attacked, "defence"), key=lambda level: level != "none"):
        for attack, some in by([r for r in attacked if r["defence"] == level], "attack").items():
            cells = [_cell([r.get(m) for r in some if r["share"] == s], 2) for m in metrics for s in shares]
            seen = level != "none" and "auroc" in some[0]  # where nobody looks nothing is judged
            rest = ["–" if k in judged and not seen else _cell([r.get(columns[k]) for r in some], 2) for k in columns]
            name = "–" if attack == "honest_alone" else "undefended" if level == "none" else f"`{level}`"
            lines.append("| " + " | ".join([f"`{attack}`", name, *cells, *rest]) + " |")
    return lines


def screen_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each screen by its own continuous score: what the final weight hides, for which one honest update in a hundred that
    is refused outright makes every TPR 0. Nothing where no screen gave a score."""
    judged = [r for r in rows if r["attack"] != "none" and _told(r)]
    screens = list(dict.fromkeys(name for r in judged for name in _told(r)))
    if not judged:
        return []
    lines = [
        "",
        "The same by each screen's own score, means over shares and seeds. The best single screen is named after the fact, by "
        "its TPR: it is what one threshold could have done, and nobody knows it beforehand.",
        "",
        "| attack | level | best single screen | its AUROC | its TPR at 1% FPR | "
        + " | ".join(f"TPR of `{name}`" for name in screens)
        + " |",
        "|---" * (5 + len(screens)) + "|",
    ]
    for level, of_level in by(judged, "defence").items():
        for attack, some in by(of_level, "attack").items():
            tpr, auroc = ({s: [_told(r)[s][k] for r in some if s in _told(r)] for s in screens} for k in DETECTED)
            best = max((s for s in screens if tpr[s]), key=lambda s: (_mean(tpr[s]), _mean(auroc[s])))
            cells = [_cell(auroc[best], 2), _cell(tpr[best], 2), *(_mean_cell(tpr[s]) for s in screens)]
            lines.append("| " + " | ".join([f"`{attack}`", f"`{level}`", f"`{best}`", *cells]) + " |")
    return lines


DETECTED = ("tpr_at_1pct_fpr", "auroc")


def _told(row: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """A row's screens that gave scores of both kinds of clients: one that saw only the honest tells nothing apart."""
    return {name: d for name, d in row.get("detection", {}).items() if all(d.get(k) is not None for k in DETECTED)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_cell(values: Sequence[float]) -> str:
    return f"{_mean(values):.2f}" if values else "–"


def swarm_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per experiment: attack, who takes part, defence."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["name"], []).append(row)
    columns = dict(SWARM_COLUMNS)
    if any(row.get("models", 1) > 1 and "honest_rejected_worst_model" in row for row in rows):
        columns["honest refused, worst model"] = "honest_rejected_worst_model"
    lines = ["| run | " + " | ".join([*columns, "AUROC", "seconds"]) + " |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for name, some in groups.items():
        cells = [_cell([r.get(k) for r in some], 1 if k == "completion_tokens_mean" else 3) for k in columns.values()]
        auroc = _cell([r["detection"].get(r["defence"], {}).get("auroc") for r in some])
        seconds = _cell([r["seconds"]["total"] for r in some], 0)
        lines.append("| " + " | ".join([f"`{name}`", *cells, auroc, seconds]) + " |")
    return lines


def federated_lines(found_rows: Sequence[Mapping[str, Any]]) -> list[str]:
    groups: dict[tuple[str, str, float, str], list[Mapping[str, Any]]] = {}
    for row in found_rows:
        key = (row["attack"], row["defence"], row["share"], row["aggregator"])
        groups.setdefault(key, []).append(row)
    columns = COLUMNS
    if any("trigger_compliance" in row for row in found_rows):
        columns = {"refusal": "refusal_rate", "trigger compliance": "trigger_compliance", **COLUMNS}
    lines = ["| run | " + " | ".join([*columns, "seconds"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for (attack, defence, share, aggregator), rows in groups.items():
        name = "honest only" if attack == "none" else "undefended" if defence == "none" else f"`{defence}`"
        if attack != "none":
            name += f", {share:.0%} malicious"
        if attack not in ("none", "harmful_data"):
            name += f": {attack}"
        if aggregator != "mean":
            name += f", {aggregator}"
        seconds = _cell([r["seconds"]["total"] for r in rows], 0)
        lines.append(
            "| " + " | ".join([name, *(_cell([r.get(k) for r in rows]) for k in columns.values()), seconds]) + " |"
        )
    return lines


def by(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    out: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        out.setdefault(row[key], []).append(row)
    return out


def _cell(values: Sequence[float | None], digits: int = 3) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean = f"{sum(known) / len(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.{digits}f}–{max(known):.{digits}f})"
