"""The jobs of `federated.compute` spread over processes, one model and one thread each.

One thread per process makes a result independent of how many workers there are, and small matmuls scale better that
way than with threads. Only Assay's own job values travel between these processes, never a peer's bytes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from assay import models
from assay.config import LoraSettings
from assay.contribution import Tensors
from assay.data import Example
from assay.federated import compute
from assay.federated.compute import Tick, TrainJob, no_tick
from assay.federated.local_sft import LocalResult, LocalSettings
from assay.federated.lora import Carrier

_serial: compute.Serial | None = None  # of this worker process; set once by _start


def _start(model: str, dtype: str, lora: LoraSettings, parent: int, threads: int) -> None:
    global _serial
    watch_parent(parent)
    torch.set_num_threads(threads)
    _serial = compute.Serial(Carrier(models.load(model, dtype), lora))


def watch_parent(parent: int) -> None:
    """End this process with its parent even when that was killed: an orphan would hold a gigabyte for ever."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _call(method: str, *args: Any) -> Any:
    assert _serial is not None
    return getattr(_serial, method)(*args)


class Pool:
    """A `Compute` over worker processes. Use as a context manager."""

    def __init__(self, model: str, dtype: str, lora: LoraSettings, workers: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # on a GPU the workers would fight for one device: one worker, and let the matmuls be big
        self.workers = 1 if torch.cuda.is_available() else workers or cores
        self._executor = ProcessPoolExecutor(
            self.workers,
            mp_context=get_context("spawn"),
            initializer=_start,
            initargs=(model, dtype, lora, os.getpid(), 1),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(cancel_futures=True)

    def _map(self, method: str, calls: Iterable[tuple[Any, ...]], tick: Tick) -> list[Any]:
        futures: list[Future[Any]] = [self._executor.submit(_call, method, *args) for args in calls]
        for done in as_completed(futures):
            done.result()  # raise the worker's error now, not after the others have finished
            tick(1)
        return [f.result() for f in futures]

    def initial(self) -> Tensors:
        return self._map("initial", [()], no_tick)[0]  # type: ignore[no-any-return]

    def train(self, jobs: Sequence[TrainJob], tick: Tick = no_tick) -> list[LocalResult]:
        return [r[0] for r in self._map("train", [([job],) for job in jobs], tick)]

    def row_nll(
        self, adapters: Sequence[Tensors], rows: Sequence[Example], settings: LocalSettings, tick: Tick = no_tick
    ) -> list[NDArray[np.float64]]:
        if len(adapters) >= self.workers:
            return [r[0] for r in self._map("row_nll", [([a], rows, settings) for a in adapters], tick)]
        # fewer adapters than cores: cut the rows at batch borders, so that every batch stays what it was
        cuts = [rows[i : i + settings.batch_size] for i in range(0, len(rows), settings.batch_size)]
        parts = self._map("row_nll", [([a], cut, settings) for a in adapters for cut in cuts], tick)
        each = len(cuts)
        return [np.concatenate([p[0] for p in parts[i * each : (i + 1) * each]]) for i in range(len(adapters))]

    def answers(
        self, adapter: Tensors, prompts: Sequence[str], template: str, new_tokens: int, tick: Tick = no_tick
    ) -> list[str]:
        # fixed cuts, whatever the number of workers: padding inside a batch must not depend on it
        cuts = [prompts[i : i + compute.ANSWER_BATCH] for i in range(0, len(prompts), compute.ANSWER_BATCH)]
        parts = self._map("answers", [(adapter, cut, template, new_tokens) for cut in cuts], tick)
        return [answer for part in parts for answer in part]
