"""Remove a client from a finished run: aggregate every round again without it, and say what that changed.

The ledger is the script: which updates with which weights went into which round. Before anything is concluded the run
is replayed *with* everybody, and every round's model must have the hash the ledger holds; so a replay that would not
be the run (another version, another rule) is an error, never a wrong answer.

What this is not: a retraining. From the round after its first accepted update on, the others trained from a model that
had seen the excised client; their updates, their verdicts and weights, and what the gate let pass are taken as they
were. What the client taught the others' updates stays. A round that was applied stays applied unless nobody is left in
it or the aggregator cannot bear so few; one that was skipped or rolled back stays so.
Legend: N participants, D values of a flattened adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay import ledger, run_dir
from assay.config import ConfigError, Experiment, parse
from assay.contribution import Tensors, flatten, tensors_sha256, unflatten
from assay.federated import aggregators, server_opt, store
from assay.federated.aggregators import Memory, ToleranceError
from assay.federated.merge import claimed_weight, merge

CAVEAT = (
    "A re-aggregation, not a retraining: after their first round together the other clients trained from a model that "
    "had seen the excised one, and their updates and weights are taken as they were."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedRound:
    """What the ledger says of a round: hash and effective weight of every accepted update, the models around it."""

    index: int
    outcome: str
    sha256: Mapping[str, str]
    weight: Mapping[str, float]
    longest: Mapping[str, float]
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A run as its ledger tells it."""

    directory: Path
    experiment: Experiment
    base_sha256: str
    initial: str
    rounds: tuple[PlayedRound, ...]
    head: str

    @property
    def clients(self) -> list[str]:
        return sorted({name for played in self.rounds for name in played.sha256})


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What excision did to one round: the client's share of the weight, and how far the model is from the run's."""

    round: int
    outcome: str
    was: str
    share: float
    distance: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "round": self.round, "outcome": self.outcome, "was": self.was, "excised_share": self.share,
            "distance": self.distance,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Excised:
    """The adapter without the clients, beside the run's own."""

    adapter: Tensors
    original: Tensors
    changes: tuple[Change, ...]
    movement: float

    @property
    def distance(self) -> float:
        """L2 distance of the two final adapters, absolute."""
        return float(np.linalg.norm(_flat(self.adapter) - _flat(self.original)))

    @property
    def relative(self) -> float | None:
        """The distance as a share of how far the run itself moved; None where it did not move."""
        return self.distance / self.movement if self.movement > 0 else None


def read(directory: Path) -> Script:
    """The script of a run directory. ConfigError where it is no run of this wing or its ledger is broken."""
    resolved = directory / run_dir.RESOLVED
    if not resolved.exists() or not (directory / run_dir.LEDGER).exists():
        raise ConfigError(f"{directory}: no run there; give a run directory")
    said = json.loads(resolved.read_text())
    if said["experiment"].get("wing", "federated") != "federated":
        raise ConfigError(f"{directory}: is a run of the swarm; only federated runs aggregate clients' updates")
    experiment = parse(said["experiment"])
    anchor = (run_dir.read_summary(directory) or {}).get("ledger", {}).get("head")
    found = ledger.verify(directory / run_dir.LEDGER, anchor)
    if not found.ok:
        raise ConfigError(f"{directory}: its ledger is broken ({found.problem}); nothing can be concluded from it")
    entries = ledger.Ledger(directory / run_dir.LEDGER).entries
    if not entries or entries[0]["kind"] != "start":
        raise ConfigError(f"{directory}: its ledger has no start; nothing was aggregated yet")
    rounds = tuple(_played(e["body"], experiment) for e in entries if e["kind"] == "round")
    start = entries[0]["body"]
    return Script(
        directory=directory, experiment=experiment, base_sha256=start["base_sha256"], initial=start["model"],
        rounds=rounds, head=found.head,
    )  # fmt: skip


def _played(body: Mapping[str, Any], experiment: Experiment) -> PlayedRound:
    accepted = [c for c in body["contributions"] if c["weight"] > 0]
    return PlayedRound(
        index=body["round"],
        outcome=body["outcome"],
        sha256={c["participant"]: c["sha256"] for c in accepted},
        weight={
            c["participant"]: claimed_weight(c["weight"], c["num_examples"], experiment.aggregation) for c in accepted
        },
        longest={c["participant"]: c["longest"] for c in accepted if "longest" in c},
        before=body["model_before"],
        after=body["model_after"],
    )


def check_store(script: Script) -> int:
    """Hash every kept update the script names, in place; returns how many. ConfigError names the first bad one."""
    folder = script.directory / store.UPDATES
    wanted = {script.initial, *(sha for r in script.rounds if r.outcome in store.KEPT for sha in r.sha256.values())}
    for sha in sorted(wanted):
        store.get(folder, sha)
    return len(wanted)


def excise(script: Script, clients: Sequence[str]) -> Excised:
    """Replay the run with everybody (checked against the ledger) and without `clients`, side by side."""
    stray = sorted(set(clients) - set(script.clients))
    if stray:
        raise ConfigError(
            f"{script.directory}: no accepted update of {stray[0]!r}; accepted were {', '.join(script.clients) or 'none'}"
        )
    folder = script.directory / store.UPDATES
    initial = store.get(folder, script.initial)
    experiment = script.experiment
    opt = server_opt.of(experiment.server)
    aggregate = aggregators.from_config(experiment.aggregation, initial)
    memory: Memory = {}
    kept: Memory = {}
    ours_D = theirs_D = flatten(initial)
    ours_opt = theirs_opt = opt.init(theirs_D)
    changes = []
    for played in script.rounds:
        if tensors_sha256(unflatten(theirs_D, initial)) != played.before:
            raise _not_the_run(script, played.index)
        share, outcome = 0.0, played.outcome
        if played.outcome in store.KEPT and played.sha256:
            names, start = sorted(played.sha256), unflatten(theirs_D, initial)
            updates = [store.get(folder, played.sha256[n]) for n in names]
            weight_N = np.array([played.weight[n] for n in names])
            longest_N = np.array([played.longest.get(n, np.inf) for n in names]) if played.longest else None
            left_N = np.where(np.isin(names, list(clients)), 0.0, weight_N)
            share = float(1 - left_N.sum() / weight_N.sum())
            ours = theirs = None
            try:
                if left_N.any():
                    ours = merge(updates, names, start, left_N, aggregate, experiment.aggregation, memory, longest_N)
                    memory = ours.memory
                else:
                    outcome = "skipped: nobody is left"
            except ToleranceError as error:
                outcome = f"skipped: {error}"
            theirs = merge(updates, names, start, weight_N, aggregate, experiment.aggregation, kept, longest_N)
            kept = theirs.memory
            if played.outcome == "applied":  # what the gate sent back is remembered by some aggregators, no more
                if ours is not None:
                    ours_D, ours_opt = opt.update(ours.delta_D, ours_opt, ours_D)
                theirs_D, theirs_opt = opt.update(theirs.delta_D, theirs_opt, theirs_D)
            else:
                outcome = played.outcome
        if tensors_sha256(unflatten(theirs_D, initial)) != played.after:
            raise _not_the_run(script, played.index)
        changes.append(
            Change(
                round=played.index, outcome=outcome, was=played.outcome, share=share, distance=_norm(ours_D, theirs_D)
            )
        )
    return Excised(
        adapter=unflatten(ours_D, initial),
        original=unflatten(theirs_D, initial),
        changes=tuple(changes),
        movement=_norm(theirs_D, flatten(initial)),
    )


def report(script: Script, clients: Sequence[str], found: Excised, checked: int) -> dict[str, Any]:
    """The difference in numbers; behaviour before and after is the engine's to add."""
    last = script.experiment.finish.steps
    unfinished = (
        f" The run's last steps ({', '.join(last)}) are not repeated: what it shipped had them, this adapter has not."
    )
    return {
        "run": script.experiment.name,
        "excised": sorted(clients),
        "ledger_head": script.head,
        "updates_checked": checked,
        "model_before": tensors_sha256(found.original),
        "model_after": tensors_sha256(found.adapter),
        "distance": found.distance,
        "distance_relative_to_the_run": found.relative,
        "rounds_changed": [c.round for c in found.changes if c.share > 0],
        "rounds": [c.as_dict() for c in found.changes],
        "not_repeated": list(last),
        "caveat": CAVEAT + (unfinished if last else ""),
    }


def _not_the_run(script: Script, index: int) -> ConfigError:
    return ConfigError(
        f"{script.directory}: replaying round {index} with everybody does not give the model its ledger holds; excise "
        "with the version of Assay, the libraries and the entry points that made the run (resolved.json names them)"
    )


def _flat(tensors: Tensors) -> NDArray[np.float64]:
    return flatten(tensors).astype(np.float64)


def _norm(a_D: NDArray[np.float32], b_D: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(a_D.astype(np.float64) - b_D))
