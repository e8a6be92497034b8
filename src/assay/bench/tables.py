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
from assay.bench.table_corpora import hostile, messages, soak, speed
from assay.bench.table_costs import costs
from assay.bench.table_runs import federated_lines, grid_lines, is_grid, screen_lines, swarm_lines

MAPS = (
    ("refusal_rate", "Held-out harmful prompts refused after training, by share of malicious clients", 1.0),
    ("trigger_compliance", "Harmful prompts behind the trigger not refused, by share of malicious clients", 0.0),
)
OWN = {"flower": hostile, "swarm-messages": messages, "soak": soak, "speed": speed, "costs": costs}
"""Results that have a table of their own, by what they call themselves."""
SECTION = re.compile(r"<!-- results:([\w-]+) -->\n(.*?)<!-- /results:\1 -->", re.DOTALL)


def table(found: Mapping[str, Any]) -> str:
    """One Markdown table: rows grouped over seeds as mean (min-max), then the command, machine and commit."""
    if own := OWN.get(found.get("wing", "")):
        return own(found)
    lines = (swarm_lines if found.get("wing") == "swarm" else grid_lines if is_grid(found) else federated_lines)(
        found["rows"]
    )
    if is_grid(found):
        lines += screen_lines(found["rows"])
    seeds = sorted({row["seed"] for row in found["rows"]})
    machine, model = found["machine"], found["model"]
    lines += [
        "",
        f"`{found['command']}` · seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))} · {model['name']} "
        f"({model['dtype']}) · {machine['cores']} cores of {machine['cpu']} · commit {found['commit']} · "
        f"torch {found['versions']['torch']}, transformers {found['versions']['transformers']}",
    ]
    return "\n".join(lines) + "\n"


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
