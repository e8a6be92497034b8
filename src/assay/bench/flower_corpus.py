"""Hostile replies against stock FedAvg and against Assay: `python -m assay.bench.flower_corpus` writes
results/flower-corpus.json, from which `python -m assay.bench.tables` makes the table of docs/FLOWER.md.

Five clients, one of them hostile, two rounds on the in-process grid, whose replies travel as Flower's own bytes. Both
sides get the same replies. Measured, for the model and for the aggregated evaluation:
  crashed    an exception came out of `strategy.start`, which ends a ServerApp
  poisoned   the final model is not finite, or further from what the four honest clients make without the fifth than half
             of their way (evaluation: accuracy more than a quarter off, or gone)
  survived   anything else; `waited`: only when the time was over
Assay runs with its defaults: every client counts the same, whatever it claims.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from assay import checkpoint, run_dir
from assay.bench.flower_grid import InProcessGrid, Node
from assay.bench.flower_hostile import CORPUS, VICTIM
from assay.bench.flower_replies import Hostile, honest, start
from assay.contribution import flatten
from assay.engines.flower import GuardedGrid, Screened
from assay.federated.screens import Norm, Structure

CLIENTS, ROUNDS, HOSTILE = 5, 2, VICTIM + 10
POISONED, ACCURACY_OFF = 0.5, 0.25
WAIT = 0.03
"""Seconds a round waits for a client that never answers; all others have answered before the first look."""
RESULTS = Path("results/flower-corpus.json")


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of a run."""

    outcome: str
    error: str = ""
    reason: str = ""
    waited: bool = False
    """Until the time was over: a ServerApp's default is an hour."""


def nodes(case: Hostile | None) -> dict[int, Node]:
    """Four honest clients by id and, unless there is no case, the hostile one."""
    found: dict[int, Node] = {VICTIM + i: _honest(i) for i in range(CLIENTS - 1)}
    if case is not None:
        found[HOSTILE] = _hostile(case)
    return found


def _honest(seed: int) -> Node:
    return lambda message: honest(message, seed)


def _hostile(case: Hostile) -> Node:
    def node(message: Message) -> Any:
        return case.make(message) if message.metadata.message_type == case.phase else honest(message, 99)

    return node


def fedavg() -> FedAvg:
    return FedAvg(min_train_nodes=CLIENTS - 1, min_evaluate_nodes=CLIENTS - 1, min_available_nodes=CLIENTS - 1)


def play(strategy: Strategy, grid: Grid, rounds: int = ROUNDS) -> Result:
    arrays = ArrayRecord({name: Array(value) for name, value in start().items()})
    return strategy.start(grid, arrays, num_rounds=rounds, timeout=WAIT)


def _judged(result: Result, baseline: Result) -> str:
    """Whether the result of a run is what honest clients would have made of it."""
    away, way = _distance(result.arrays, baseline.arrays), _distance(baseline.arrays, None)
    accuracy = [m.get("accuracy") for m in result.evaluate_metrics_clientapp.values()]
    known = [float(a) for a in accuracy if isinstance(a, int | float)]
    # one client can leave the metric out; what he must not do is to make it say something else
    off = any(not abs(a - 0.5) <= ACCURACY_OFF for a in known)
    return "survived" if away <= POISONED * way and not off else "poisoned"


def _distance(arrays: ArrayRecord, other: ArrayRecord | None) -> float:
    """Euclidean distance of two models, `None` being the one that was sent; infinite where they cannot be compared."""
    theirs = start() if other is None else {name: array.numpy() for name, array in other.items()}
    ours = {name: array.numpy() for name, array in arrays.items()}
    if {n: v.shape for n, v in ours.items()} != {n: v.shape for n, v in theirs.items()}:
        return float("inf")
    if any(np.iscomplexobj(value) or not np.isfinite(value).all() for value in ours.values()):
        return float("inf")
    return float(np.linalg.norm(flatten(ours).astype(np.float64) - flatten(theirs)))


def run_stock(case: Hostile, baseline: Result) -> Seen:
    grid = InProcessGrid(nodes(case))
    return replace(_run(lambda: play(fedavg(), grid), baseline), waited=grid.timed_out > 0)


def run_assay(case: Hostile, baseline: Result) -> Seen:
    """As `run_stock`, with the reason that was given for the hostile client in its first bad round."""
    strategy = Screened(fedavg(), [Structure(), Norm(None)])
    grid = GuardedGrid(InProcessGrid(nodes(case)), poll=0.005)
    seen = _run(lambda: play(strategy, grid), baseline)
    reason = "ok"
    if case.phase == "evaluate":
        reason = next((r.reason for r in strategy.refused_evaluations if r.participant == str(HOSTILE)), "ok")
    elif strategy.outcome is not None and str(HOSTILE) in strategy.outcome.screened.deciding:
        reason = strategy.outcome.screened.deciding[str(HOSTILE)].reason.value
    return replace(seen, reason=reason, waited=grid.timed_out > 0)


def _run(go: Callable[[], Result], baseline: Result) -> Seen:
    try:
        with np.errstate(all="ignore"):
            return Seen(_judged(go(), baseline))
    except Exception as error:  # noqa: BLE001 - this is what is measured
        return Seen("crashed", type(error).__name__)


def honest_alone() -> Result:
    """What the four honest clients make without the fifth."""
    return play(fedavg(), InProcessGrid(nodes(None)))


def measure(corpus: Sequence[Hostile] = CORPUS) -> list[dict[str, Any]]:
    """A row per reply: what it is, what stock FedAvg made of it, what Assay did and why."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    baseline, rows = honest_alone(), []
    for case in corpus:
        stock, assay = run_stock(case, baseline), run_assay(case, baseline)
        rows.append(
            {
                "name": case.name, "what": case.what, "phase": case.phase, "expected": case.reason,
                "stock": stock.outcome, "stock_error": stock.error, "stock_waited": stock.waited,
                "assay": assay.outcome, "assay_error": assay.error, "assay_waited": assay.waited,
                "reason": assay.reason,
            }
        )  # fmt: skip
    return rows


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m assay.bench.flower_corpus", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    path = parser.parse_args(list(arguments)).results
    rows = measure()
    found = {
        "wing": "flower",
        "command": "python -m assay.bench.flower_corpus",
        "commit": run_dir.commit(),
        "versions": {**run_dir.versions(), "flwr": version("flwr")},
        "machine": run_dir.machine(),
        "rows": rows,
    }
    checkpoint.write_json(path, found)
    wrong = [row for row in rows if row["assay"] != "survived" or row["reason"] != row["expected"]]
    for row in wrong:
        print(json.dumps(row))
    print(f"{len(rows)} replies, {len(wrong)} not as expected; {path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
