"""What screening and learning cost, as ratios side by side: `assay bench costs`.

Parts are measured one after the other and written down one by one: a bench that was stopped goes on with the parts that
are left, and measures those of another commit again. Each part says what it compared; both sides of a ratio run in turns,
in one process, on the same threads (turns.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from assay import run_dir
from assay.bench import cost_local, cost_screens, cost_swarm, cost_verdict
from assay.bench.cost_settings import Settings
from assay.bench.turns import Say
from assay.checkpoint import write_json
from assay.config import ConfigError


@dataclass(frozen=True, slots=True)
class Part:
    """`told`: what it measures, in a few words."""

    told: str
    measure: Callable[[Settings, Say], dict[str, Any]]


PARTS: Mapping[str, Part] = {
    "screening": Part("screens of a federated round against its local training", cost_screens.screening),
    "verdict": Part("verdicts on an adapter for an 8B model", cost_verdict.verdict),
    "checks": Part("seeded and logit checks against the GRPO step", cost_swarm.checks),
    "grpo": Part("the GRPO step against TRL's trainer", cost_swarm.grpo),
    "local": Part("a client's local steps against PEFT with Transformers' Trainer", cost_local.local),
    "rollouts": Part("seeded rollouts against Transformers' generate", cost_swarm.rollouts),
}


def run(settings: Settings, only: Sequence[str], path: Path | None, command: str, say: Say) -> dict[str, Any]:
    """Measure the parts that are named (none: all) and not in `path` at this commit; written after each."""
    for name in only:
        if name not in PARTS:
            raise ConfigError(f"--only: {name!r} is no part; known are {', '.join(PARTS)}")
    done = _kept(settings, path)
    for name in only or PARTS:
        if name in done and done[name]["commit"] == run_dir.commit():
            say(f"{name}: measured already")
            continue
        say(f"{name}: {PARTS[name].told}")
        at = time.perf_counter()
        found = PARTS[name].measure(settings, lambda text, name=name: say(f"{name} {text}"))  # type: ignore[misc]
        done[name] = {
            "told": PARTS[name].told, "commit": run_dir.commit(), "threads": torch.get_num_threads(),
            "wall_seconds": time.perf_counter() - at, **found,
        }  # fmt: skip
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, results(settings, done, command))
    return results(settings, done, command)


def results(settings: Settings, done: Mapping[str, Any], command: str) -> dict[str, Any]:
    """What results/costs.json holds."""
    return {
        "wing": "costs",
        "command": command,
        "commit": run_dir.commit(),
        "versions": {**run_dir.versions(), "trl": run_dir.version_of("trl")},
        "machine": run_dir.machine(),
        "settings": asdict(settings),
        "parts": {name: done[name] for name in PARTS if name in done},
    }


def _kept(settings: Settings, path: Path | None) -> dict[str, Any]:
    """Parts of earlier calls, which must have had these settings and this machine (ConfigError)."""
    if path is None or not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found.get("wing") != "costs":
        raise ConfigError(f"--results: {path} holds other results; name another file")
    if found["settings"] != json.loads(json.dumps(asdict(settings))) or found["machine"] != run_dir.machine():
        raise ConfigError(f"--results: {path} holds parts of other settings or another machine; name another file")
    kept: dict[str, Any] = found["parts"]
    return kept
