"""Where a federated run stands: its directory claimed, its first state, and the state after every whole round.

A checkpoint holds all of it, so a run goes on after SIGKILL as if nothing had happened (journal.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from assay import checkpoint, run_dir
from assay.config import ConfigError, Experiment
from assay.contribution import Tensors, tensors_sha256
from assay.engines import journal
from assay.engines.setup import ANSWER_UNITS, Setup, units
from assay.federated import server_opt, store
from assay.federated.evaluate import evaluate
from assay.federated.preparation import Prepared
from assay.federated.round import ServerState


def claim(directory: Path, experiment: Experiment, prepared: Prepared, given: str, engine: str) -> str:
    """The run's id, the directory now its own. ConfigError where another run is there, or one of another engine."""
    # how many workers, where the data folder lies and who follows the run changes no number
    dumped = experiment.model_dump(mode="json", exclude={"workers": True, "track": True, "data": {"root"}})
    model = {"sha256": prepared.base_sha256, "dtype": prepared.dtype, "alignment": prepared.alignment}
    identity = {"experiment": dumped, "model": prepared.base_sha256, "dtype": prepared.dtype}
    # no part of the identity: the same experiment is the same run on every engine, as long as it stays on one
    named = {} if engine == "local" else {"engine": engine}
    run_id = journal.claim(directory, identity, {"experiment": dumped, "model": model, **named}, given)
    begun = json.loads((directory / run_dir.RESOLVED).read_text()).get("engine", "local")
    if begun != engine:
        raise ConfigError(
            f"{directory}: was begun with --engine {begun}, where its attackers keep what they remember; "
            "go on with it, or choose another directory (--out)"
        )
    return run_id


def resume_or_start(
    setup: Setup, directory: Path, prepare_seconds: float
) -> tuple[ServerState, Tensors, list[dict[str, Any]]]:
    """The state after the newest whole round and the attackers' memory, with ledger and metrics brought up to it."""
    found = checkpoint.load_latest(directory / run_dir.CHECKPOINTS)
    experiment = setup.experiment
    if found is None:
        opt = server_opt.of(experiment.server)
        flat = np.concatenate([setup.initial[n].ravel() for n in sorted(setup.initial)])
        state = ServerState(round=0, adapter=setup.initial, initial=setup.initial, opt=opt.init(flat))
        at = time.perf_counter()
        scores = evaluate(setup.compute, state.adapter, setup.panel, experiment, setup.ticker(ANSWER_UNITS))
        row = {
            "round": 0,
            **scores.metrics(),
            "mean_weight": None,
            "outcome": "start",
            "weights": {},
            "seconds": {"prepare": prepare_seconds, "evaluate": time.perf_counter() - at},
            "answers": scores.answers,
        }
        body = {
            "run": setup.run_id,
            "base_sha256": setup.prepared.base_sha256,
            "model": tensors_sha256(state.adapter),
            "defence": setup.defence.summary(),
            "faithful": setup.defence.faithful,
            "aggregator": experiment.aggregation.name,
        }
        if experiment.keep_updates:
            store.put(directory / store.UPDATES, state.adapter)
        save(directory, state, {}, body, row)
        return state, {}, [row]
    state = ServerState(
        round=found.step,
        adapter=_branch(found.tensors, "adapter/"),
        initial=setup.initial,
        opt=_branch(found.tensors, "opt/"),
        controls=_branch(found.tensors, "control/"),
        screens=found.meta["screens"],
        memory=_branch(found.tensors, "aggregator/"),
    )
    journal.publish(directory, found.step, found.meta["entry"], found.meta["row"])
    rows = run_dir.read_metrics(directory)
    setup.tracker.tick(units(experiment) * found.step / experiment.training.rounds)
    setup.tracker.say(f"resuming after round {found.step}")
    return state, _branch(found.tensors, "attack/"), rows


def save(directory: Path, state: ServerState, memory: Tensors, entry: dict[str, Any], row: dict[str, Any]) -> None:
    """A whole round, written down: what the next one begins with, its ledger entry, its row."""
    tensors = {f"adapter/{n}": v for n, v in state.adapter.items()}
    tensors |= {f"opt/{n}": v for n, v in state.opt.items()}
    tensors |= {f"aggregator/{n}": v for n, v in state.memory.items()}
    tensors |= {f"control/{n}": v for n, v in state.controls.items()}
    tensors |= {f"attack/{n}": v for n, v in memory.items()}
    journal.save(directory, state.round, tensors, {"screens": dict(state.screens)}, entry, row)


def _branch(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
