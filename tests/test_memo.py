"""A memory that changes no result: the same adapters, losses and answers, and less work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay import models
from assay.config import Experiment, LoraSettings
from assay.data import Example
from assay.engines import local
from assay.engines.memo import Memo, key_of
from assay.federated.compute import Serial, TrainJob
from assay.federated.local_sft import LocalSettings, Objective
from assay.federated.lora import Carrier
from assay.federated.preparation import prepare
from assay.progress import Silent
from assay.run_dir import read_metrics

ROWS = tuple(Example(f"What is {i} plus {i}?", f"{2 * i}") for i in range(6))
SETTINGS = LocalSettings(steps=2, batch_size=2, max_length=24, lr=1e-3, seed=1)


@dataclass(frozen=True)
class Pull:
    """A term of an objective: a constant gradient."""

    towards: dict[str, Any]

    def gradient(self, delta: Any) -> Any:
        return self.towards


@pytest.fixture(scope="module")
def serial() -> Serial:
    return Serial(Carrier(models.load("tiny", "float32"), LoraSettings()))


def test_what_was_done_once_is_not_done_again(serial: Serial) -> None:
    memo = Memo(serial)
    start = memo.initial()
    job = TrainJob(start, ROWS, SETTINGS)
    ticks: list[int] = []
    first = memo.train([job, job], ticks.append)
    again = memo.train([TrainJob({n: v.copy() for n, v in start.items()}, tuple(ROWS), SETTINGS)], ticks.append)
    assert sum(ticks) == 3, "a progress bar ends, whoever did the work"
    assert (memo.asked, memo.done) == (4, 2)
    plain = serial.train([job])[0]
    for result in (*first, *again):
        assert result.losses == plain.losses
        for name, value in plain.tensors.items():
            np.testing.assert_array_equal(result.tensors[name], value)
    assert memo.answers(start, ["Hello"], "chatml", 4) == memo.answers(start, ["Hello"], "chatml", 4)
    assert memo.done == 3


def test_losses_are_remembered_by_adapter_and_rows(serial: Serial) -> None:
    memo = Memo(serial)
    one, other = memo.initial(), {n: v + 0.5 for n, v in memo.initial().items()}
    first = memo.row_nll([one], ROWS, SETTINGS)[0]
    both = memo.row_nll([other, one], ROWS, SETTINGS)
    fewer = memo.row_nll([one], ROWS[:3], SETTINGS)[0]
    np.testing.assert_array_equal(both[1], first)
    assert not np.array_equal(both[0], first)
    assert len(fewer) == 3
    both[1][:] = 0  # the caller's own copy
    np.testing.assert_array_equal(memo.row_nll([one], ROWS, SETTINGS)[0], first)


def test_whatever_decides_a_result_is_in_its_key() -> None:
    start = {"a": np.zeros((2, 3), np.float32)}
    job = TrainJob(start, ROWS, SETTINGS)
    others = [
        TrainJob({"a": np.zeros((3, 2), np.float32)}, ROWS, SETTINGS),
        TrainJob({"a": np.zeros((2, 3), np.float64)}, ROWS, SETTINGS),
        TrainJob({"b": start["a"]}, ROWS, SETTINGS),
        TrainJob(start, ROWS[::-1], SETTINGS),
        TrainJob(start, (*ROWS[:-1], replace(ROWS[-1], response="0")), SETTINGS),
        TrainJob(start, ROWS, replace(SETTINGS, seed=2)),
        TrainJob(start, ROWS, replace(SETTINGS, keep_steps=False)),
        TrainJob(start, ROWS, SETTINGS, start),
        TrainJob(start, ROWS, SETTINGS, None, Objective(beside=ROWS[:1], weight=1.0)),
        TrainJob(start, ROWS, SETTINGS, None, Objective(terms=(Pull({"a": start["a"]}),))),
        TrainJob(start, ROWS, SETTINGS, None, Objective(terms=(Pull({"a": start["a"] + 1}),))),
    ]
    assert len({key_of("train", one) for one in (job, *others)}) == len(others) + 1
    assert key_of("train", job) == key_of("train", TrainJob({"a": start["a"].copy()}, ROWS, SETTINGS))
    assert key_of("train", ("ab", "c")) != key_of("train", ("a", "bc"))
    assert key_of("train", (1, 1.0)) != key_of("train", (1.0, 1))


def test_a_term_that_is_no_plain_value_is_trained_each_time(serial: Serial) -> None:
    class Foreign:
        def gradient(self, delta: Any) -> Any:
            return {}

    memo = Memo(serial)
    job = TrainJob(serial.initial(), ROWS, SETTINGS, None, Objective(terms=(Foreign(),)))
    made = memo.train([job, job])
    memo.train([job])
    assert memo.done == 3
    np.testing.assert_array_equal(*(next(iter(m.tensors.values())) for m in made))


def test_memory_is_bounded_and_what_is_shared_cannot_be_written(serial: Serial) -> None:
    size = sum(v.nbytes for v in serial.initial().values())
    memo = Memo(serial, limit=3 * size)
    job = TrainJob(memo.initial(), ROWS, replace(SETTINGS, keep_steps=False))
    for seed in range(4):
        result = memo.train([replace(job, settings=replace(job.settings, seed=seed))])[0]
    assert memo._bytes <= 3 * size
    assert len(memo._known) <= 3
    with pytest.raises(ValueError, match="read-only"):
        next(iter(result.tensors.values()))[:] = 0


def test_runs_with_a_memory_write_what_runs_without_one_write(tmp_path: Path) -> None:
    """Two attacks one after the other: adapters to the byte, and all that was measured on the way."""
    base = Experiment().changed(
        model__name="tiny", model__dtype="float32", training__rounds=2, clients__total=4, clients__examples=16,
        evaluate__harmful_prompts=4, evaluate__benign_prompts=4, evaluate__benign_rows=4, defence__level="none",
    )  # fmt: skip
    runs = [base.changed(name=a.replace("+", "-"), attack__name=a) for a in ("sign_flip", "alie+sybil")]
    prepared = prepare(base, Silent())
    serial = Serial(Carrier(models.load(str(prepared.path), prepared.dtype), base.lora))
    memo = Memo(serial)
    for name, compute in (("plain", serial), ("memo", memo)):
        for run in runs:
            local.run(run, tmp_path / name / run.name, prepared, compute)
    assert memo.done < memo.asked
    for run in runs:
        plain, remembered = (tmp_path / kind / run.name for kind in ("plain", "memo"))
        adapter = "adapter/adapter_model.safetensors"
        assert (plain / adapter).read_bytes() == (remembered / adapter).read_bytes()
        rows = [[{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(d)] for d in (plain, remembered)]
        assert rows[0] == rows[1]
