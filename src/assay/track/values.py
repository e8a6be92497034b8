"""A round and a finished run as flat numbers: what a tracker can draw.

Nothing about single participants, no texts, no paths and no secret of the config: a tracker's files are made to be sent
to others. Who got which weight, and why, stands in the ledger and in the report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NESTED = ("seconds", "heldout")
COUNTED = ("banned", "struck")


def of_row(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row of metrics.jsonl by name; what was not measured in that round is absent.

    Counted are clients that were refused or got less than full weight, a swarm's completions refused by reason, nodes
    banned and struck.

    >>> of_row({"round": 2, "outcome": "applied", "refusal_rate": None, "weights": {"a": 1, "b": 0}, "seconds": {"train": 2.5}})
    {'seconds/train': 2.5, 'applied': 1.0, 'clients/heard': 2.0, 'clients/refused': 1.0, 'clients/reduced': 0.0}
    """
    out = _numbers({key: value for key, value in row.items() if key != "round"})
    for key in NESTED:
        if isinstance(row.get(key), Mapping):
            out |= {f"{key}/{name}": value for name, value in _numbers(row[key]).items()}
    if row.get("outcome") not in (None, "start"):
        out["applied"] = float(row["outcome"] == "applied")
    if weights := row.get("weights"):
        refused = sum(weight == 0 for weight in weights.values())
        reduced = sum(0 < weight < 1 for weight in weights.values())
        out |= {
            "clients/heard": float(len(weights)),
            "clients/refused": float(refused),
            "clients/reduced": float(reduced),
        }
    if admitted := row.get("admitted"):
        out["admitted_mean"] = sum(admitted.values()) / len(admitted)
    out |= {key: float(len(row[key])) for key in COUNTED if isinstance(row.get(key), list)}
    for found in row.get("reasons", ()):
        name = f"refused/{found['reason']}"
        out[name] = out.get(name, 0.0) + found["honest"] + found["malicious"]
    return out


def of_summary(summary: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str | float]]:
    """A finished run's numbers, and its setting as it can be filtered by."""
    seconds = {f"seconds/{name}": value for name, value in _numbers(summary.get("seconds", {})).items()}
    setting = {"wing": summary["wing"], "assay": summary["assay"], **summary["setting"]}
    plain = {k: v for k, v in setting.items() if isinstance(v, str | int | float) and k != "data"}
    return {**_numbers(summary["metrics"]), **seconds}, plain


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
