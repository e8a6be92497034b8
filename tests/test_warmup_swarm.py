"""The warm-up of models that do not know the format: it teaches, it is made once, and nothing else can be taken for it."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file, save_file

from assay import models
from assay.config import SwarmExperiment
from assay.progress import Silent
from assay.swarm import build, warmup
from assay.swarm.learner import Practice

STEPS, ROWS = 6, 8


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own, and one thread: the number of threads decides last bits."""
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "cache" / "swarm-warmup"
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base() -> models.Base:
    return models.load("tiny", "float32")


def wanted(**changes: Any) -> SwarmExperiment:
    """`instruct` prompts are new to `tiny`: there is something to learn."""
    values: dict[str, Any] = {
        "model__lora_r": 4, "task__style": "instruct", "task__warmup_steps": STEPS, "task__warmup_rows": ROWS,
        "task__warmup_lr": 3e-3, "defence__level": "none",
    }  # fmt: skip
    return SwarmExperiment().changed(**{**values, **changes})


def warmed(base: models.Base, experiment: SwarmExperiment) -> tuple[Any, Practice]:
    practice = build.make_practice(experiment, base, "r")
    return build.make_learner(experiment, base, practice).model, practice


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def loss(model: Any, practice: Practice, prompts: range) -> float:
    """Mean negative log-likelihood of the worked solutions, one row at a time, by Transformers' own loss."""
    total, count = 0.0, 0
    for prompt in prompts:
        before, ids = (
            practice.prompt_ids(prompt),
            practice.encode(practice.task.solution(prompt))[: practice.max_tokens],
        )
        labels = torch.tensor([[-100] * len(before) + list(ids)])
        total += float(model(input_ids=torch.tensor([[*before, *ids]]), labels=labels).loss) * len(ids)
        count += len(ids)
    return total / count


def test_it_lowers_the_loss_on_its_solutions_and_is_loaded_the_second_time(base: models.Base, cache: Path) -> None:
    cold, practice = warmed(base, wanted(task__warmup_steps=0))
    assert not cache.exists(), "nothing to do, nothing to keep"
    untouched = {n: p.clone() for n, p in base.model.named_parameters()}
    warm, _ = warmed(base, wanted())
    seen = practice.task.train[-STEPS * ROWS :]
    assert loss(warm, practice, seen) < loss(cold, practice, seen) - 0.05
    unseen = practice.task.heldout[:24]
    assert loss(warm, practice, unseen) < loss(cold, practice, unseen)
    assert all(torch.equal(p, untouched[n]) for n, p in base.model.named_parameters()), "the base is shared"

    (path,) = cache.iterdir()
    again, _ = warmed(base, wanted())
    assert trained(again).keys() == trained(warm).keys()
    assert all(torch.equal(p, trained(warm)[n]) for n, p in trained(again).items())
    # and it was read, not made again: what lies there is what comes out
    save_file({n: 0 * v for n, v in load_file(path).items()}, path)
    zero, _ = warmed(base, wanted())
    assert all(not p.any() for p in trained(zero).values())
    assert list(cache.iterdir()) == [path], "nothing half-made stays behind"


def test_everything_that_decides_it_names_it(base: models.Base) -> None:
    """Whoever changes a knob gets a warm-up of his own; seed and attack decide nothing here."""
    practice = build.make_practice(wanted(), base, "r")
    first = warmup._cached(wanted(), practice, base.sha256)
    changes: tuple[dict[str, Any], ...] = (
        {"task__warmup_steps": 7}, {"task__warmup_rows": 9}, {"task__warmup_lr": 1e-3}, {"task__style": "plain"},
        {"model__lora_r": 8}, {"model__lora_alpha": 8.0}, {"model__dtype": "bfloat16"}, {"model__lora_r": 0},
    )  # fmt: skip
    names = {warmup._cached(wanted(**c), practice, base.sha256) for c in changes}
    names |= {warmup._cached(wanted(), practice, "0" * 64)}
    shorter = build.make_practice(wanted(sampling__max_tokens=32), base, "r")
    names |= {warmup._cached(wanted(), shorter, base.sha256)}
    assert len(names | {first}) == len(changes) + 3
    same = wanted(seed=3, attack__name="text", defence__level="seeded", grpo__lr=1.0)
    assert warmup._cached(same, practice, base.sha256) == first


def test_two_runs_that_warm_up_at_once_do_not_trip_over_each_other(
    base: models.Base, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side by side both find no cache and both make one: each file is whole when it comes to its place."""
    both, real = threading.Barrier(2), os.replace

    def replace_together(*arguments: Any, **named: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(10)
        real(*arguments, **named)

    monkeypatch.setattr(os, "replace", replace_together)
    experiment = wanted(task__warmup_steps=1, model__lora_r=0)
    practice = build.make_practice(experiment, base, "r")
    problems: list[Exception] = []

    def run(model: Any) -> None:
        try:
            warmup.warm_up(model, practice, experiment, base.sha256, Silent())
        except Exception as problem:  # noqa: BLE001 - a thread's exception would only be printed
            problems.append(problem)

    both_models = [copy.deepcopy(base.model).requires_grad_(True) for _ in range(2)]
    threads = [threading.Thread(target=run, args=(model,)) for model in both_models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    (path,) = cache.iterdir()
    found = load_file(path)
    for model in both_models:
        assert all(torch.equal(torch.from_numpy(found[n]), p) for n, p in trained(model).items())


def test_engines_of_any_precision_hold_the_weights_the_run_starts_from(base: models.Base, cache: Path) -> None:
    """What is calibrated is what a run uses: the warmed-up adapter, not the raw base."""
    experiment = wanted()
    model, _ = warmed(base, experiment)
    practice, (half, full) = build.make_engines(experiment, ("bfloat16", "float32"), "r")
    assert len(list(cache.iterdir())) == 1, "the run's own warm-up, made once"
    for engine in (half, full):
        assert not engine.training
        assert all(torch.equal(p, trained(model)[n]) for n, p in trained(engine).items())
    assert next(p for n, p in half.named_parameters() if n not in trained(half)).dtype == torch.bfloat16
    raw = build.make_model(experiment.changed(task__warmup_steps=0), base, practice)
    assert loss(full, practice, range(64)) < loss(raw, practice, range(64)) - 0.1


def test_engines_without_an_adapter_are_the_base_in_two_precisions(base: models.Base) -> None:
    _, (full, half) = build.make_engines(wanted(model__lora_r=0, task__warmup_steps=0), ("float32", "bfloat16"), "r")
    for (name, p), q in zip(full.named_parameters(), half.parameters()):
        assert torch.equal(p.to(torch.bfloat16), q), name
