"""The table of `assay bench costs`: ratios and whether they meet their targets, then the seconds behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from assay.bench.cost_settings import PART_NAMES


def costs(found: Mapping[str, Any]) -> str:
    """Ratios of every part, seconds and memory below; parts that are not there yet are named."""
    parts, machine, versions = found["parts"], found["machine"], found["versions"]
    lines = ["| part | measured | value | turns | target | met |", "|---" * 6 + "|"]
    for name, part in parts.items():
        lines += [_ratio(name, one) for one in part["ratios"]]
    lines += ["", "| part | what | seconds, fastest | slowest | memory, MB |", "|---" * 5 + "|"]
    for name, part in parts.items():
        for row in part["rows"]:
            every = row["all_seconds"]
            memory = f"{row['memory_bytes'] / 1e6:,.0f}" if row["memory_bytes"] else "–"
            lines.append(f"| {name} | {row['name']} | {min(every):.4f} | {max(every):.4f} | {memory} |")
    lines.append("")
    lines += [f"*{name}*: {_setting(part)}." for name, part in parts.items()]
    if missing := [name for name in PART_NAMES if name not in parts]:
        lines += ["", f"not measured yet: {', '.join(missing)}"]
    threads = sorted({part["threads"] for part in parts.values()})
    commits = sorted({part["commit"] for part in parts.values()})
    lines += [
        "",
        f"`{found['command']}` · fastest of {found['settings']['repeats']} turns · {machine['cores']} cores of "
        f"{machine['cpu']}, {machine['memory_gb']} GB, {', '.join(map(str, threads))} threads · commit {', '.join(commits)} · "
        + ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl", "numpy")),
    ]
    return "\n".join(lines) + "\n"


def _ratio(part: str, one: Mapping[str, Any]) -> str:
    unit = one.get("unit", "")
    spread = "–" if "spread" not in one else "–".join(f"{v:.3g}" for v in one["spread"])
    target = "–" if one["target"] is None else f"{'at least' if one['least'] else 'at most'} {one['target']:g} {unit}"
    met = "–" if one["met"] is None else "yes" if one["met"] else "no"
    return f"| {part} | {one['what']} | {one['value']:.3g} {unit} | {spread} | {target} | {met} |"


def _setting(part: Mapping[str, Any]) -> str:
    """What a part ran on: its plain figures."""
    kept = {k: v for k, v in part.items() if k not in ("rows", "ratios", "told", "commit", "threads", "wall_seconds")}
    shown = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in kept.items()}
    return ", ".join([part["told"], *(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())])
