"""Tables of what is no grid of trainings: hostile replies, hostile messages, a soak, the speed of aggregators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from assay.bench.table_runs import by


def hostile(found: Mapping[str, Any]) -> str:
    """Hostile replies to a Flower server: what stock FedAvg made of each, what Assay did."""
    rows = found["rows"]
    lines = [
        f"{len(rows)} replies. {_counts(rows, {'Stock FedAvg': 'stock', 'Assay': 'assay'})}",
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


def messages(found: Mapping[str, Any]) -> str:
    """Hostile messages in a swarm's pool: what became of the round, why the message was refused, what it cost its node."""
    rows = found["rows"]
    lines = [
        f"{len(rows)} messages. {_counts(rows, {'A node without checks': 'plain', 'Assay': 'assay'})}",
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


def _counts(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """`columns`: who, and the key of what became of it: "Assay: 89 survived."."""
    told = (
        f"{who}: " + ", ".join(f"{len(some)} {what}" for what, some in sorted(by(rows, key).items()))
        for who, key in columns.items()
    )
    return ". ".join(told) + "."


def soak(found: Mapping[str, Any]) -> str:
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


def speed(found: Mapping[str, Any]) -> str:
    """Aggregators: reads of the data, seconds beside everybody else's, memory beyond the matrix."""
    rows, settings, machine = found["rows"], found["settings"], found["machine"]
    read = min(row["seconds"] for row in rows if row["rule"] == "read")
    rules = [row["rule"] for row in rows if row["by"] == "assay"]
    peers = list(
        dict.fromkeys(row["by"] for row in rows if row["by"] not in ("assay", "numpy") and row["rule"] != "read")
    )
    size = next(row["matrix_bytes"] for row in rows)
    lines = [
        f"{settings['clients']} clients, {size / 4 / settings['clients']:,.0f} values each ({size / 1e6:,.0f} MB); one read "
        f"of them takes {read:.3f} s on {machine['threads']} threads. *Reads*: Assay's seconds in reads. Memory is Assay's beyond "
        "the matrix.",
        "",
        "| rule | reads | Assay, s | memory, MB | " + " | ".join(f"{peer}, s" for peer in peers) + " | to the fastest peer |",
        "|---" * (5 + len(peers)) + "|",
    ]  # fmt: skip
    for rule in rules:
        of = {row["by"]: row for row in rows if row["rule"] == rule}
        mine, others = of["assay"], [of[peer]["seconds"] for peer in peers if peer in of]
        cells = [f"{of[peer]['seconds']:.3f}" if peer in of else "–" for peer in peers]
        best = f"{min(others) / mine['seconds']:.1f} x" if others else "–"
        told = [f"{mine['reads']:.1f}", f"{mine['seconds']:.3f}", f"{mine['memory_bytes'] / 1e6:,.0f}", *cells, best]
        lines.append(f"| `{rule}` | " + " | ".join(told) + " |")
    lines += [
        "",
        f"`{found['command']}` · the fastest of {settings['repeats']} turns · {machine['cores']} cores of {machine['cpu']} · "
        f"commit {found['commit']} · torch {found['versions']['torch']}, numpy {found['versions']['numpy']}",
    ]
    return "\n".join(lines) + "\n"
