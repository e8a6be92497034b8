"""Tables in the docs, generated from results/*.json: `python -m assay.bench.tables` rewrites, `--check` only compares.

A section of a Markdown file between `<!-- results:NAME -->` and `<!-- /results:NAME -->` holds the table of
results/NAME.json; nothing else in the file is touched.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
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
SECTION = re.compile(r"<!-- results:([\w-]+) -->\n(.*?)<!-- /results:\1 -->", re.DOTALL)


def table(found: Mapping[str, Any]) -> str:
    """One Markdown table: rows grouped over seeds as mean (min-max), then the command, machine and commit."""
    lines = _swarm_lines(found["rows"]) if found.get("wing") == "swarm" else _federated_lines(found["rows"])
    seeds = sorted({row["seed"] for row in found["rows"]})
    machine, model = found["machine"], found["model"]
    lines += [
        "",
        f"`{found['command']}` · seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))} · {model['name']} "
        f"({model['dtype']}) · {machine['cores']} cores of {machine['cpu']} · commit {found['commit']} · "
        f"torch {found['versions']['torch']}, transformers {found['versions']['transformers']}",
    ]
    return "\n".join(lines) + "\n"


def _swarm_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per experiment: attack, who takes part, defence."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["name"], []).append(row)
    lines = ["| run | " + " | ".join([*SWARM_COLUMNS, "AUROC", "seconds"]) + " |"]
    lines.append("|---" * (len(SWARM_COLUMNS) + 3) + "|")
    for name, some in groups.items():
        cells = [_cell([r[k] for r in some], 1 if k == "completion_tokens_mean" else 3) for k in SWARM_COLUMNS.values()]
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
    print(f"stale: {', '.join(stale)}" if stale else "tables agree with results/")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
