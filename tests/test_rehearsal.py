"""The rehearsal's rounds, seen through a compute that keeps what it is given: no model, real actors and rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from assay.config import Experiment
from assay.contribution import Tensors
from assay.data import Example
from assay.federated.canary import Measure
from assay.federated.compute import Tick, TrainJob, no_tick
from assay.federated.local_sft import LocalResult, LocalSettings
from assay.federated.population import load_sources
from assay.federated.rehearsal import canary_rows, cast, rehearse

NAMES = [f"model.layers.{i}.q_proj.lora_{ab}.weight" for i in (0, 1) for ab in "AB"]


class Kept:
    """Clients whose adapters move by a vector of their own; losses are the adapter's mean."""

    def __init__(self) -> None:
        self.rounds: list[list[TrainJob]] = []
        self.made: list[list[Tensors]] = []

    def initial(self) -> Tensors:
        return {n: np.zeros((2, 2), np.float32) for n in NAMES}

    def train(self, jobs: Sequence[TrainJob], tick: Tick = no_tick) -> list[LocalResult]:
        self.rounds.append(list(jobs))
        out = []
        for i, job in enumerate(jobs):
            rng = np.random.default_rng([len(self.rounds), i])
            tensors = {n: t + rng.standard_normal(t.shape).astype(np.float32) for n, t in job.start.items()}
            out.append(LocalResult(tensors, (tensors,), (0.0,)))
        self.made.append([r.tensors for r in out])
        return out

    def row_nll(
        self, adapters: Sequence[Tensors], rows: Sequence[Example], settings: LocalSettings, tick: Tick = no_tick
    ) -> list[NDArray[np.float64]]:
        return [np.full(len(rows), float(np.mean([t.mean() for t in a.values()]))) for a in adapters]

    def answers(self, *args: Any, **more: Any) -> list[str]:
        raise AssertionError("a rehearsal asks for no answers")


def rehearsed(experiment: Experiment) -> tuple[Kept, list[Any]]:
    compute, sources = Kept(), load_sources(experiment)
    settings = LocalSettings(lr=1e-3, steps=1, batch_size=8, seed=0, max_length=64)
    measure = Measure(compute, *canary_rows(experiment, sources), settings)
    rehearse(compute, compute.initial(), sources, experiment, measure, [settings], "base")
    return compute, cast(experiment, sources)


def test_actors_train_on_the_same_rows_in_every_round_as_live_clients_do() -> None:
    compute, actors = rehearsed(Experiment())
    assert len(compute.rounds) == 6
    for jobs in compute.rounds:
        assert [job.rows for job in jobs] == [a.rows for a in actors]
    assert len({job.settings.seed for jobs in compute.rounds for job in jobs}) == sum(map(len, compute.rounds))


@pytest.mark.parametrize("count", [1, 3, 100])
def test_the_adapter_moves_by_the_mean_of_a_few_honest_actors(count: int) -> None:
    """The same few in every round, as live ones who are left are."""
    compute, actors = rehearsed(Experiment().changed(defence__rehearsal__honest=count))
    honest = [i for i, a in enumerate(actors) if not a.malicious]
    size = min(count, len(honest))
    chosen: set[tuple[int, ...]] = set()
    for before, made in zip(compute.rounds[1:], compute.made):
        start = before[0].start
        moved = [
            rows
            for rows in combinations(honest, size)
            if all(np.allclose(start[n], np.mean([made[i][n] for i in rows], axis=0), atol=1e-5) for n in NAMES)
        ]
        chosen |= set(moved)
        assert len(moved) == 1
    assert len(chosen) == 1
