"""A heat map of a grid of runs as an SVG file: attacks down, defence and malicious share across.

Plain text without scripts or fonts of its own, so that it shows wherever Markdown does, in light and dark pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

CELL, HEIGHT, LEFT, TOP, GAP = 64, 26, 190, 62, 14
LOW, MIDDLE, HIGH = (178, 24, 43), (247, 247, 247), (33, 102, 172)  # ColorBrewer's RdBu: told apart by the colour-blind


def heatmap(rows: Sequence[Mapping[str, Any]], metric: str, title: str, good: float = 1.0) -> str:
    """Means over seeds of `metric` in [0, 1]; blue is `good` (1 or 0). Cells without a run stay empty.

    Rows of honest clients only (`attack` none) and of a level with something more (`a + b`) are no part of it.
    """
    attacked = [r for r in rows if r["attack"] != "none" and " + " not in r["defence"] and r.get(metric) is not None]
    attacks = list(dict.fromkeys(r["attack"] for r in attacked))
    columns = sorted({(r["defence"] != "none", r["defence"], r["share"]) for r in attacked})
    levels = list(dict.fromkeys(level for _, level, _ in columns))
    parts = []
    for c, (_, level, share) in enumerate(columns):
        x = LEFT + c * CELL + levels.index(level) * GAP
        if not c or columns[c - 1][1] != level:
            name = "undefended" if level == "none" else level
            parts.append(f'<text x="{x}" y="{TOP - 26}" class="head">{escape(name)}</text>')
        parts.append(f'<text x="{x + CELL / 2}" y="{TOP - 8}" class="mid">{share:.0%}</text>')
        for a, attack in enumerate(attacks):
            values = [r[metric] for r in attacked if (r["attack"], r["defence"], r["share"]) == (attack, level, share)]
            if values:
                parts.append(_cell(x, TOP + a * HEIGHT, sum(values) / len(values), good))
    for a, attack in enumerate(attacks):
        parts.append(f'<text x="{LEFT - 10}" y="{TOP + a * HEIGHT + 18}" class="end">{escape(attack)}</text>')
    width = LEFT + len(columns) * CELL + len(levels) * GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{TOP + len(attacks) * HEIGHT + 10}" '
        f'role="img" aria-label="{escape(title)}">\n'
        "<style>text{font:13px system-ui,sans-serif;fill:#555}.head{font-weight:600}.mid{text-anchor:middle}"
        ".end{text-anchor:end}@media (prefers-color-scheme:dark){text{fill:#bbb}}.in{text-anchor:middle;fill:#111}"
        ".on{text-anchor:middle;fill:#fff}</style>\n"
        f'<text x="0" y="16" class="head">{escape(title)}</text>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _cell(x: float, y: float, value: float, good: float) -> str:
    toward = value if good == 1 else 1 - value
    side = LOW if toward < 0.5 else HIGH
    share = abs(toward - 0.5) * 2
    colour = ",".join(str(round(m + (s - m) * share)) for m, s in zip(MIDDLE, side))
    return (
        f'<rect x="{x}" y="{y}" width="{CELL - 2}" height="{HEIGHT - 2}" fill="rgb({colour})"/>'
        f'<text x="{x + CELL / 2 - 1}" y="{y + 17}" class="{"on" if share > 0.6 else "in"}">{value:.2f}</text>'
    )
