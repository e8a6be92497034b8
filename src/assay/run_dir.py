"""What a run directory holds, and where the run was made.

experiment.toml   the config as it was given            resolved.json   the config as it was understood, versions
ledger.jsonl      hash-chained record of every round    metrics.jsonl   one row per round, row 0 before training
checkpoints/      state to resume from                  adapter/        the final adapter in PEFT format
updates/          accepted updates by hash (excise)     excised/        adapters without a client, with reports
track/            what experiment trackers made of metrics and summary, where the config names any
summary.json      written last: a run without it is not finished
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

EXPERIMENT, RESOLVED = "experiment.toml", "resolved.json"
LEDGER, METRICS, SUMMARY = "ledger.jsonl", "metrics.jsonl", "summary.json"
CHECKPOINTS, ADAPTER, REPORT = "checkpoints", "adapter", "report.html"


def versions() -> dict[str, str]:
    """Versions of Assay and of the libraries that decide numbers."""
    names = ("assay", "torch", "transformers", "peft", "numpy", "safetensors")
    return {"python": platform.python_version(), **{name: version_of(name) for name in names}}


def version_of(name: str) -> str:
    """Version of one installed package, or "absent"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def machine() -> dict[str, Any]:
    """CPU name, cores this process may use, memory in GB."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0.0
    return {"cpu": name, "cores": cores, "memory_gb": round(memory, 1)}


@cache
def commit() -> str:
    """Commit of the checkout Assay runs from; empty for an installed wheel.

    Asked once, when the command starts: a commit made while a run goes on is not what it ran.
    """
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl so far."""
    path = directory / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_summary(directory: Path) -> dict[str, Any] | None:
    """summary.json, or None while the run is unfinished."""
    path = directory / SUMMARY
    return json.loads(path.read_text()) if path.exists() else None
