"""Reward functions behind the screens: they see admitted rows only; refused rows get None, bad examples 0 at most.

TRL calls reward functions after it has the rows, screens that read rewards need them before: then Assay calls the
functions first, once, with the data set's columns of each prompt, and hands TRL what they said.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from assay.config import ConfigError

Reward = Callable[..., Any]
ROW = "assay_row"  # the extra field by which rows come back from the trainer
_WHOLE = ("trainer_state", "log_extra", "log_metric")  # arguments that are not one value a row
_RESERVED = ("prompt", "completion", "completion_ids")


@dataclass(slots=True)
class Settled:
    """What was decided on the rows of one batch. `cap_B`: 1 admitted, 0 a bad example, None refused or nobody's.

    `known`: rewards worked out already, by function, with what it logged; empty where TRL's call is the first.
    `metrics` are the round's, to be logged once.
    """

    cap_B: Sequence[float | None]
    metrics: Mapping[str, float] = field(default_factory=dict)
    known: dict[int, Known] = field(default_factory=dict)
    logged: bool = False

    @property
    def kept(self) -> list[int]:
        return [row for row, cap in enumerate(self.cap_B) if cap is not None]

    def capped(self, rows: Sequence[int], values: Sequence[float | None]) -> list[float | None]:
        """One value for each row of the batch: None but for `rows`; at most 0 for a bad example."""
        out: list[float | None] = [None] * len(self.cap_B)
        for row, value in zip(rows, values):
            out[row] = min(0.0, value) if value is not None and self.cap_B[row] == 0.0 else value
        return out

    def log(self, kwargs: Mapping[str, Any]) -> None:
        """The round's metrics, through the door TRL opens to reward functions: so they reach every tracker."""
        if not self.logged and "log_metric" in kwargs:
            self.logged = True
            for name, value in self.metrics.items():
                kwargs["log_metric"](name, value)


@dataclass(frozen=True, slots=True)
class Known:
    """What a function said of `rows`: values and what it logged, still to be handed to TRL."""

    rows: tuple[int, ...]
    values: tuple[float | None, ...]
    extra: tuple[tuple[str, tuple[Any, ...]], ...]
    scalars: tuple[tuple[str, float], ...]


def wrapped(number: int, function: Reward, settled: Callable[[Mapping[str, Any]], Settled | None]) -> Reward:
    """`function` behind the screens. `settled(kwargs)` checks what the trainer passed; None: nothing was screened."""
    name = getattr(function, "__name__", type(function).__name__)

    def begin(kwargs: dict[str, Any]) -> tuple[Settled | None, dict[str, Any]]:
        found = settled(kwargs)
        kwargs.pop(ROW, None)
        if found is not None:
            found.log(kwargs)
        return found, kwargs

    if is_async(function):

        async def behind_async(**kwargs: Any) -> Any:
            found, kwargs = begin(kwargs)
            if found is None:
                return await function(**kwargs)
            if number in found.known:
                return handed_on(found, found.known[number], kwargs)
            rows = found.kept
            return found.capped(rows, checked(name, rows, await function(**part(kwargs, rows)) if rows else []))

        chosen: Reward = behind_async
    else:

        def behind(**kwargs: Any) -> Any:
            found, kwargs = begin(kwargs)
            if found is None:
                return function(**kwargs)
            if number in found.known:
                return handed_on(found, found.known[number], kwargs)
            rows = found.kept
            return found.capped(rows, checked(name, rows, function(**part(kwargs, rows)) if rows else []))

        chosen = behind
    chosen.__name__ = chosen.__qualname__ = name
    chosen.__doc__ = function.__doc__
    return chosen


def is_async(function: Reward) -> bool:
    """Whether calling it gives a coroutine: functions, partials and objects with an async `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def part(kwargs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The arguments of a reward function for some rows of the batch; what it logs per row is spread over all rows."""
    count = len(kwargs["completions"])
    out = {
        name: [value[row] for row in rows]
        if name not in _WHOLE and isinstance(value, list) and len(value) == count
        else value
        for name, value in kwargs.items()
    }
    if "log_extra" in kwargs:
        out["log_extra"] = lambda column, values: kwargs["log_extra"](column, spread(rows, values, count))
    return out


def spread(rows: Sequence[int], values: Sequence[Any], count: int) -> list[Any]:
    held = dict(zip(rows, values))
    return [held.get(row) for row in range(count)]


def checked(name: str, rows: Sequence[int], values: Sequence[Any]) -> list[float | None]:
    found = [None if value is None else float(value) for value in values]
    if len(found) != len(rows):
        raise ValueError(f"the reward function {name!r} returned {len(found)} rewards for {len(rows)} completions")
    return found


def handed_on(found: Settled, known: Known, kwargs: Mapping[str, Any]) -> list[float | None]:
    """Rewards worked out before, and what the function logged then. Rows refused since get None."""
    kept = set(found.kept)
    for column, values in known.extra:
        kwargs["log_extra"](column, spread(known.rows, values, len(found.cap_B)))
    for metric, value in known.scalars:
        kwargs["log_metric"](metric, value)
    pairs = [(row, value) for row, value in zip(known.rows, known.values) if row in kept]
    return found.capped([row for row, _ in pairs], [value for _, value in pairs])


class Loop:
    """One event loop in a thread of its own, for as long as the process lives: clients that async rewards hold are
    bound to the loop they were first used in."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="assay-rewards", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def work_out(
    functions: Sequence[Reward], rows: Sequence[int], kwargs: Mapping[str, Any], loop: Loop
) -> dict[int, Known]:
    """Call every function on `rows`, whose arguments `kwargs` already holds; async ones together."""
    extra: list[list[tuple[str, tuple[Any, ...]]]] = [[] for _ in functions]
    scalars: list[list[tuple[str, float]]] = [[] for _ in functions]

    def call(number: int) -> Any:
        return functions[number](
            **kwargs,
            log_extra=lambda column, values: extra[number].append((column, tuple(values))),
            log_metric=lambda name, value: scalars[number].append((name, float(value))),
        )

    async def together(numbers: Sequence[int]) -> list[Any]:
        return await asyncio.gather(*(call(number) for number in numbers))

    slow = [number for number, function in enumerate(functions) if is_async(function)]
    values = {number: call(number) for number in range(len(functions)) if number not in slow}
    values |= dict(zip(slow, loop.run(together(slow)))) if slow else {}
    names = [getattr(function, "__name__", type(function).__name__) for function in functions]
    return {
        number: Known(
            tuple(rows), tuple(checked(names[number], rows, found)), tuple(extra[number]), tuple(scalars[number])
        )
        for number, found in values.items()
    }


class Columns:
    """The columns of a data set by prompt, for rewards that are worked out before TRL passes them.

    ConfigError where they cannot be told from the prompt: a data set without length, or equal prompts whose other
    columns differ.
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__len__") or isinstance(dataset, dict):
            raise ConfigError(
                "screens that read rewards need the data set's columns by prompt: give train_dataset as a Dataset, not "
                "a stream, or use screens that read no rewards (Seeded, Logit, Arithmetic)"
            )
        self._rows: dict[str, dict[str, Any]] = {}
        for example in dataset:
            row = {name: value for name, value in example.items() if name not in _RESERVED}
            known = self._rows.setdefault(key(example["prompt"]), row)
            if known != row:
                raise ConfigError(
                    f"screens that read rewards: two rows have the prompt {str(example['prompt'])[:60]!r} and other "
                    "columns that differ; make prompts unique"
                )

    def of(self, prompts: Sequence[Any]) -> dict[str, list[Any]]:
        """Columns of prompts, as TRL passes them."""
        found = [self._rows[key(prompt)] for prompt in prompts]
        return {name: [row[name] for row in found] for name in (found[0] if found else ())}


def key(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
