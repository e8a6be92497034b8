"""Tables and heat maps in the docs, generated from results/*.json: `python -m assay.bench.tables` rewrites, `--check`
only compares.

A section of a Markdown file between `<!-- results:NAME -->` and `<!-- /results:NAME -->` holds the table of
results/NAME.json; nothing else in the file is touched. A grid of runs also has docs/figures/NAME.svg.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from assay.bench.heatmap import heatmap

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
MAPS = (
    ("refusal_rate", "Held-out harmful prompts refused after training, by share of malicious clients", 1.0),
    ("trigger_compliance", "Harmful prompts behind the trigger not refused, by share of malicious clients", 0.0),
)
SECTION = re.compile(r"<!-- results:([\w-]+) -->\n(.*?)<!-- /results:\1 -->", re.DOTALL)


def table(found: Mapping[str, Any]) -> str:
    """One Markdown table: rows grouped over seeds as mean (min-max), then the command, machine and commit."""
    if found.get("wing") == "flower":
        return _hostile(found)
    if found.get("wing") == "swarm-messages":
        return _messages(found)
    if found.get("wing") == "soak":
        return _soak(found)
    lines = (_swarm_lines if found.get("wing") == "swarm" else _grid_lines if is_grid(found) else _federated_lines)(
        found["rows"]
    )
    if is_grid(found):
        lines += _screen_lines(found["rows"])
    seeds = sorted({row["seed"] for row in found["rows"]})
    machine, model = found["machine"], found["model"]
    lines += [
        "",
        f"`{found['command']}` · seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))} · {model['name']} "
        f"({model['dtype']}) · {machine['cores']} cores of {machine['cpu']} · commit {found['commit']} · "
        f"torch {found['versions']['torch']}, transformers {found['versions']['transformers']}",
    ]
    return "\n".join(lines) + "\n"


def _hostile(found: Mapping[str, Any]) -> str:
    """Hostile replies to a Flower server: what stock FedAvg made of each, what Assay did."""
    rows = found["rows"]
    told = (
        f"{who} " + ", ".join(f"{len(some)} {what}" for what, some in sorted(_by(rows, key).items()))
        for who, key in (("Stock FedAvg:", "stock"), ("Assay:", "assay"))
    )
    lines = [
        f"{len(rows)} replies. {'. '.join(told)}.",
        "",
        "| reply | what the client sends | stock FedAvg | Assay | reason |",
    ]
    lines.append("|---" * 5 + "|")
    for row in rows:
        stock, assay = (
            row[who] + (f": `{row[f'{who}_error']}`" if row[f"{who}_error"] else "") + ", waited" * row[f"{who}_waited"]
            for who in ("stock", "assay")
        )
        mark = "" if row["reason"] == row["expected"] else f" (expected `{row['expected']}`)"
        lines.append(f"| `{row['name']}` | {row['what']} | {stock} | {assay} | `{row['reason']}`{mark} |")
    versions = found["versions"]
    lines += [
        "",
        f"`{found['command']}` · flwr {versions['flwr']}, numpy {versions['numpy']} · commit {found['commit']}",
    ]
    return "\n".join(lines) + "\n"


def _messages(found: Mapping[str, Any]) -> str:
    """Hostile messages in a swarm's pool: what became of the round, why the message was refused, what it cost its node."""
    rows = found["rows"]
    told = (
        f"{who} " + ", ".join(f"{len(some)} {what}" for what, some in sorted(_by(rows, key).items()))
        for who, key in (("A node without checks:", "plain"), ("Assay:", "assay"))
    )
    lines = [
        f"{len(rows)} messages. {'. '.join(told)}.",
        "",
        "| message | what it is | without checks | Assay | reason | strike |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        mark = "" if row["reason"] == row["expected"] else f" (expected `{row['expected']}`)"
        strike = "yes" if row["strike"] else "no"
        plain = row["plain"] + (f": `{row['plain_error']}`" if row["plain_error"] else "")
        lines.append(
            f"| `{row['name']}` | {row['what']} | {plain} | {row['assay']} | `{row['reason']}`{mark} | {strike} |"
        )
    lines += ["", f"`{found['command']}` · torch {found['versions']['torch']} · commit {found['commit']}"]
    return "\n".join(lines) + "\n"


def _soak(found: Mapping[str, Any]) -> str:
    """Rounds of a soak: memory beyond what the process held before it, seconds, bytes on the disk."""
    settings, rows, machine = found["settings"], found["rows"], found["machine"]
    noticed = {(row["noticed"]["refused_rightly"], row["noticed"]["malicious"]) for row in rows}
    right = ", ".join(f"{a} of {b}" for a, b in sorted(noticed))
    lines = [
        f"{settings['clients']:,} clients, {settings['values']:,} values each, {len(rows)} of {settings['rounds']} rounds "
        f"measured; `{settings['aggregator']}` behind {', '.join(f'`{s}`' for s in settings['screens'])}. "
        f"All updates of a round in memory: {found['in_memory_bytes'] / 1e6:,.0f} MB. Stated bound: "
        f"{found['bound_bytes'] / 1e6:,.0f} MB. Malicious clients refused for what they did, by round: {right}.",
        "",
        "| round | peak memory, MB | of the process, MB | seconds | hear | screens | aggregate | write | spool, MB | run, MB |",
        "|---" * 10 + "|",
    ]  # fmt: skip
    for row in rows:
        seconds = row["seconds"]
        spent = (seconds[key] for key in ("total", "hear", "screen", "aggregate", "write"))
        cells = [
            str(row["round"]), f"{(row['peak_bytes'] - row['before_bytes']) / 1e6:,.0f}", f"{row['peak_bytes'] / 1e6:,.0f}",
            *(f"{s:,.0f}" for s in spent), f"{row['spool_bytes'] / 1e6:,.0f}", f"{row['run_bytes'] / 1e6:,.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    counted = ", ".join(sorted({row["counted"] for row in rows}))
    lines += [
        "",
        f"`{found['command']}` · seed {settings['seed']} · memory by {counted} · {machine['cores']} cores of "
        f"{machine['cpu']}, {machine['memory_gb']} GB · commit {found['commit']} · numpy {found['versions']['numpy']}",
    ]
    return "\n".join(lines) + "\n"


def is_grid(found: Mapping[str, Any]) -> bool:
    """Whether these are attacks x shares x levels; their runs share work, so seconds are not each one's own."""
    return bool(found.get("seconds_shared"))


def _grid_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What honest clients alone reach, then one line per attack and level, its malicious shares side by side."""
    attacked = [r for r in rows if r["attack"] != "none"]
    shares = sorted({r["share"] for r in attacked if r["share"]})
    triggers = any(r.get("trigger_compliance") is not None for r in attacked)
    metrics = ["trigger_compliance", "refusal_rate"] if triggers else ["refusal_rate"]
    judged = {k: COLUMNS[k] for k in ("AUROC", "TPR at 1% FPR", "weight honest", "weight malicious")}
    columns = {"benign loss": COLUMNS["benign loss"], **judged}
    heads = [f"{m.replace('_', ' ').removesuffix(' rate')}, {s:.0%}" for m in metrics for s in shares]
    lines = []
    for level, some in _by(rows, "defence").items():
        if alone := [r for r in some if r["attack"] == "none"]:
            told = f"refusal {_cell([r['refusal_rate'] for r in alone], 2)}"
            if level != "none":
                told += f", weight {_cell([r['honest_weight_mean'] for r in alone], 2)}"
            lines += [f"Honest clients only{'' if level == 'none' else f' under `{level}`'}: {told}.", ""]
    lines += [
        "| attack | level | " + " | ".join([*heads, *columns]) + " |",
        "|---" * (len(heads) + 2 + len(columns)) + "|",
    ]
    for level in sorted(_by(attacked, "defence"), key=lambda level: level != "none"):
        for attack, some in _by([r for r in attacked if r["defence"] == level], "attack").items():
            cells = [_cell([r.get(m) for r in some if r["share"] == s], 2) for m in metrics for s in shares]
            seen = level != "none" and "auroc" in some[0]  # where nobody looks nothing is judged
            rest = ["–" if k in judged and not seen else _cell([r.get(columns[k]) for r in some], 2) for k in columns]
            name = "–" if attack == "honest_alone" else "undefended" if level == "none" else f"`{level}`"
            lines.append("| " + " | ".join([f"`{attack}`", name, *cells, *rest]) + " |")
    return lines


def _screen_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
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
    for level, of_level in _by(judged, "defence").items():
        for attack, some in _by(of_level, "attack").items():
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


def _by(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    out: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        out.setdefault(row[key], []).append(row)
    return out


def figures(results: Path) -> dict[str, str]:
    """Heat maps by file name, of every grid there is."""
    out = {}
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text())
        if is_grid(found):
            for metric, title, good in MAPS:
                if any(r["attack"] != "none" and r.get(metric) is not None for r in found["rows"]):
                    out[f"{path.stem}-{metric.split('_')[0]}.svg"] = heatmap(found["rows"], metric, title, good)
    return out


def _swarm_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
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


def _federated_lines(found_rows: Sequence[Mapping[str, Any]]) -> list[str]:
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


def _cell(values: Sequence[float | None], digits: int = 3) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean = f"{sum(known) / len(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.{digits}f}–{max(known):.{digits}f})"


def fill(text: str, results: Path) -> str:
    """`text` with every results section regenerated; a section without its JSON file is left as it is."""

    def section(match: re.Match[str]) -> str:
        path = results / f"{match.group(1)}.json"
        body = table(json.loads(path.read_text())) if path.exists() else match.group(2)
        return f"<!-- results:{match.group(1)} -->\n{body}<!-- /results:{match.group(1)} -->"

    return SECTION.sub(section, text)


def main(arguments: Sequence[str]) -> int:
    """Rewrite README.md and docs/*.md of the current folder; with --check return 1 where a table is stale."""
    stale = []
    for path in [Path("README.md"), *sorted(Path("docs").glob("*.md"))]:
        before = path.read_text()
        after = fill(before, Path("results"))
        if before != after:
            stale.append(str(path))
            if "--check" not in arguments:
                path.write_text(after)
    for name, drawn in figures(Path("results")).items():
        path = Path("docs/figures") / name
        if not path.exists() or path.read_text() != drawn:
            stale.append(str(path))
            if "--check" not in arguments:
                path.parent.mkdir(exist_ok=True)
                path.write_text(drawn)
    print(f"stale: {', '.join(stale)}" if stale else "tables agree with results/")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
