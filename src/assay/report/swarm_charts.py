"""The swarm's charts as numbers: courses over iterations, the margins' histogram, nodes by iteration.

Long runs are drawn in steps: values of neighbouring iterations are averaged until a chart has at most so many points,
so that the page's size does not grow with the run.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from assay.report.records import Role
from assay.report.swarm_load import HELDOUT, SwarmRun

COURSES = (
    # key, metric on held-out prompts, the row's figure in training, heading, places
    ("asr", "asr", "asr", "Attack success rate", 2),
    ("reward", "heldout_reward", "train_reward", "Reward", 2),
    ("tokens", "completion_tokens_mean", "completion_tokens_mean", "Tokens of a completion", 0),
)
POINTS, TABLE = 160, 40  # of a line, and rows of the table behind it
CELLS, COLUMNS, ROWS = 6000, 120, 100  # of the grid of nodes by iteration
ATTACKS_DRAWN = 5  # malicious series in the histogram: one colour each

Point = tuple[float, float]


def courses(runs: Sequence[SwarmRun], groups: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """Charts by attack: success rate (length where the attack has no such rate), reward, each with its table."""
    found = []
    for attack, members in groups.items():
        rates = any(value is not None for i in members for value in (runs[i].end("asr"), runs[i].peak()))
        for key, metric, trained, heading, places in COURSES:
            if key == ("tokens" if rates else "asr"):
                continue
            found.append(
                {
                    "attack": attack,
                    "key": key,
                    "heading": heading,
                    "places": places,
                    "runs": list(members),
                    "table": _table([runs[i] for i in members], metric, trained),
                    "stepped": any(len(runs[i].played) > POINTS for i in members),
                    "drawn": {
                        "key": key,
                        "series": [
                            {
                                "run": i,
                                "line": _thin(_trained(runs[i], trained)),
                                "marks": _thin(_heldout(runs[i], metric)),
                            }
                            for i in members
                        ],
                    },
                }
            )
    return found


def _trained(run: SwarmRun, name: str) -> list[Point]:
    values = [(row.round, getattr(row, name)) for row in run.played]
    return [(number, value) for number, value in values if value is not None]


def _heldout(run: SwarmRun, metric: str) -> list[Point]:
    values = [(row.round, getattr(row.heldout, HELDOUT[metric])) for row in run.rows if row.heldout]
    return [(number, value) for number, value in values if value is not None]


def _thin(points: Sequence[Point], most: int = POINTS) -> list[list[float]]:
    """At most `most` points: means of neighbours; the first and the last stay what they are."""
    if len(points) <= most:
        return [[x, _short(y)] for x, y in points]
    inner, step = points[1:-1], math.ceil((len(points) - 2) / (most - 2))
    parts = [inner[at : at + step] for at in range(0, len(inner), step)]
    means = [(round(sum(x for x, _ in part) / len(part), 1), sum(y for _, y in part) / len(part)) for part in parts]
    return [[x, _short(y)] for x, y in (points[0], *means, points[-1])]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _table(runs: Sequence[SwarmRun], metric: str, trained: str) -> list[tuple[int, list[float | None]]]:
    """Per iteration and run the figure in training and on held-out prompts; evenly spaced rows of a long run."""
    lines = [dict(_trained(run, trained)) for run in runs]
    marks = [dict(_heldout(run, metric)) for run in runs]
    numbers = sorted({int(number) for found in (*lines, *marks) for number in found})
    measured = sorted({int(number) for found in marks for number in found})
    if len(numbers) > TABLE:
        numbers = measured or numbers
        step = math.ceil(len(numbers) / TABLE)
        numbers = sorted({*numbers[::step], numbers[-1]})
    return [
        (number, [value for line, mark in zip(lines, marks, strict=True) for value in (line.get(number), mark.get(number))])
        for number in numbers
    ]  # fmt: skip


def margins(runs: Sequence[SwarmRun]) -> dict[str, Any] | None:
    """Counts of completions by their largest margin: honest ones of all runs, malicious ones by attack."""
    found = [(run, row.margins) for run in runs for row in run.played if row.margins]
    if not found:
        return None
    edges = found[0][1].edges
    fitting = [(run, one) for run, one in found if one.edges == edges]
    series: dict[tuple[Role, str], list[int]] = {("honest", ""): [0] * len(edges)}
    for run, one in fitting:
        _add(series[("honest", "")], one.honest)
        if any(one.malicious):
            _add(series.setdefault(("malicious", run.attack), [0] * len(edges)), one.malicious)
    of = list(dict.fromkeys(run.label for run, _ in fitting))
    return {
        "bins": [_bin(edges, at) for at in range(len(edges))],
        "edges": list(edges),
        "limits": sorted({run.limit for run, _ in fitting})[:3],
        "series": [
            {"role": role, "attack": attack, "counts": counts, "all": sum(counts)}
            for (role, attack), counts in series.items()
            if any(counts)
        ],
        "of": of[:8],
        "more": max(0, len(of) - 8),
        "left_out": len({run.label for run, one in found if one.edges != edges}),
    }


def _add(to: list[int], counts: Sequence[int]) -> None:
    to[:] = [a + b for a, b in zip(to, counts, strict=True)]


def _bin(edges: Sequence[float], at: int) -> str:
    """`0–0.0001`, ..., `from 32`."""
    low = f"{edges[at]:g}"
    return f"{low}–{edges[at + 1]:g}" if at + 1 < len(edges) else f"from {low}"


def bars(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The histogram as it is drawn: shares by bin, and where between the bins each limit stands."""
    if found is None:
        return None
    edges = found["edges"]
    return {
        "bins": found["bins"],
        "limits": [[_place(edges, limit), f"{limit:g}"] for limit in found["limits"]],
        "series": [
            {
                "name": one["role"] if one["role"] == "honest" else f"malicious: {one['attack'] or 'unnamed'}",
                "honest": one["role"] == "honest",
                "counts": one["counts"],
                "shares": [_short(count / one["all"]) for count in one["counts"]],
            }
            for one in found["series"][: ATTACKS_DRAWN + 1]
        ],
    }


def _place(edges: Sequence[float], limit: float) -> float:
    """On an axis where bin i is centred on i; within a bin in proportion to its width."""
    at = bisect_right(edges, limit) - 1
    if at < 0:
        return -0.5
    if at + 1 >= len(edges):
        return float(at)
    return round(at - 0.5 + (limit - edges[at]) / (edges[at + 1] - edges[at]), 3)


def eventful(runs: Sequence[SwarmRun]) -> list[int]:
    """Runs in which any node lost anything: only these are worth a grid."""
    return [
        i
        for i, run in enumerate(runs)
        if any(
            row.struck or row.banned or any(share is not None and share < 1 for share in row.admitted.values())
            for row in run.played
        )
    ]


def grids(runs: Sequence[SwarmRun]) -> list[dict[str, Any]]:
    """Share admitted by node and iteration (None: nothing was owed), with the cells struck and banned."""
    return [_grid(runs[i], i) for i in eventful(runs)]


def _grid(run: SwarmRun, i: int) -> dict[str, Any]:
    names = _drawn_nodes(run)
    columns = max(1, min(COLUMNS, CELLS // max(1, len(names))))
    step = math.ceil(len(run.played) / columns)
    parts = [run.played[at : at + step] for at in range(0, len(run.played), step)]
    z = []
    struck, banned = [], []
    for line, name in enumerate(names):
        cells: list[float | None] = []
        for column, part in enumerate(parts):
            shares = [share for row in part if (share := row.admitted.get(name)) is not None]
            cells.append(round(sum(shares) / len(shares), 3) if shares else None)
            if any(name in row.struck for row in part):
                struck.append([line, column])
            if any(name in row.banned for row in part):
                banned.append([line, column])
        z.append(cells)
    return {
        "run": i,
        "rounds": [part[0].round for part in parts],
        "step": step,
        "spans": [_span(part[0].round, part[-1].round) for part in parts],
        "clients": names,
        "roles": [run.roles[name] for name in names],
        "z": z,
        "struck": struck,
        "banned": banned,
    }


def _drawn_nodes(run: SwarmRun) -> list[str]:
    """All nodes, or as many as fit: first those that lost something, in the order of the roles."""
    lost = {
        name
        for row in run.played
        for name in (*row.struck, *row.banned, *(n for n, share in row.admitted.items() if share is not None and share < 1))
    }  # fmt: skip
    kept = set(sorted(run.roles, key=lambda name: name not in lost)[:ROWS])
    return [name for name in run.roles if name in kept]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"
