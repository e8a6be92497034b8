"""A `Compute` that remembers: the same job is done once, however many runs of a bench ask for it.

Runs that differ in the attack have most of their work in common: where a defence keeps every malicious update out, the
honest clients start each round from the very same adapter on the very same rows. A job's key is all that decides its
result, so what comes from memory is what the workers would have made, bit for bit. Seconds are then shared among runs:
a bench that remembers says so beside its figures.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.contribution import Tensors
from assay.data import Example
from assay.federated.compute import Compute, Tick, TrainJob, no_tick
from assay.federated.local_sft import LocalResult, LocalSettings


class Memo:
    """`inner` with a memory of its newest results, at most `limit` bytes of arrays and texts."""

    def __init__(self, inner: Compute, limit: int = 2 * 10**9) -> None:
        self.inner, self.limit = inner, limit
        self.asked = self.done = 0  # jobs asked for, jobs the workers did
        self._known: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._unknown = count()

    def initial(self) -> Tensors:
        return dict(self._recall("initial", [()], lambda calls: [self.inner.initial()], no_tick)[0])

    def train(self, jobs: Sequence[TrainJob], tick: Tick = no_tick) -> list[LocalResult]:
        return self._recall("train", jobs, partial(self.inner.train, tick=tick), tick)

    def row_nll(
        self, adapters: Sequence[Tensors], rows: Sequence[Example], settings: LocalSettings, tick: Tick = no_tick
    ) -> list[NDArray[np.float64]]:
        asked = [(adapter, tuple(rows), settings) for adapter in adapters]
        measure = partial(self.inner.row_nll, rows=rows, settings=settings, tick=tick)
        found = self._recall("row_nll", asked, lambda calls: measure([c[0] for c in calls]), tick)
        return [nll.copy() for nll in found]

    def answers(
        self, adapter: Tensors, prompts: Sequence[str], template: str, new_tokens: int, tick: Tick = no_tick
    ) -> list[str]:
        asked = [(adapter, tuple(prompts), template, new_tokens)]
        write = partial(self.inner.answers, adapter, prompts, template, new_tokens, tick)
        return list(self._recall("answers", asked, lambda calls: [write()], tick)[0])

    def _recall(self, kind: str, calls: Sequence[Any], work: Any, tick: Tick) -> list[Any]:
        """Results of the calls in order; `work` is handed those that are new, each once."""
        keys = [self._key(kind, call) for call in calls]
        new = {key: call for key, call in zip(keys, calls) if key not in self._known}
        self.asked, self.done = self.asked + len(keys), self.done + len(new)
        found = {key: self._known[key][0] for key in keys if key not in new}
        for key in found:
            self._known.move_to_end(key)
        if new:
            found |= zip(new, work(list(new.values())))
        if len(keys) > len(new):
            tick(len(keys) - len(new))
        for key in new:
            self._keep(key, found[key])
        return [found[key] for key in keys]

    def _key(self, kind: str, call: Any) -> str:
        try:
            return key_of(kind, call)
        except TypeError:  # an attacker's term from outside that is no plain value: done each time
            return f"unknown {next(self._unknown)}"

    def _keep(self, key: str, value: Any) -> None:
        size = _size(value)
        for array in _arrays(value):  # shared from now on: who writes into one would change another run
            array.flags.writeable = False
        self._known[key] = value, size
        self._bytes += size
        while self._bytes > self.limit and len(self._known) > 1:
            self._bytes -= self._known.popitem(last=False)[1][1]


def key_of(kind: str, call: Any) -> str:
    """SHA-256 over the content of a job, the same for equal values however they came about."""
    digest = hashlib.sha256(kind.encode())
    _feed(digest, call)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Type and length go in before the content, so that no two different values write the same bytes."""
    if is_dataclass(value):
        digest.update(f"<{type(value).__qualname__}>".encode())
        for field in fields(value):
            _feed(digest, getattr(value, field.name))
    elif isinstance(value, np.ndarray):
        digest.update(f"a{value.dtype.str}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        digest.update(f"m{len(value)}".encode())
        for key in sorted(value):
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, tuple | list):
        digest.update(f"s{len(value)}".encode())
        for one in value:
            _feed(digest, one)
    elif isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        digest.update(f"t{len(data)}:".encode())
        digest.update(data)
    elif value is None or isinstance(value, bool | int | float):
        digest.update(f"{type(value).__name__}{value!r};".encode())
    else:
        raise TypeError(f"{type(value).__qualname__} has no key: dataclasses, arrays, texts and numbers have")


def _parts(value: Any) -> Iterator[Any]:
    """The value's leaves."""
    if is_dataclass(value):
        inside: Iterable[Any] = (getattr(value, f.name) for f in fields(value))
    elif isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, tuple | list):
        inside = value
    else:
        yield value
        return
    for one in inside:
        yield from _parts(one)


def _arrays(value: Any) -> Iterator[NDArray[Any]]:
    return (part for part in _parts(value) if isinstance(part, np.ndarray))


def _size(value: Any) -> int:
    return sum(p.nbytes if isinstance(p, np.ndarray) else len(p) if isinstance(p, str) else 8 for p in _parts(value))
