"""Calls measured side by side: in turns, in one process, so that whatever else the machine does falls on all alike.

Every call runs once unmeasured (caches, lazy set-up), then `repeats` times, one call after the other in an order that
turns with every round. Of each the fastest turn counts: noise only ever adds. The spread of a ratio is that of the
turns taken pair by pair. Memory is the most the process held in a turn beyond what it held before it.
Legend: N parameters of the matrices, L layers.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from assay.bench.soak import Peak

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Turn:
    """One call's seconds, and its peak in bytes beyond what was held before."""

    seconds: float
    memory_bytes: int


class Stopwatch:
    """Measures what is between `start` and `stop`: a call that sets something up first holds one itself."""

    def __init__(self) -> None:
        self.turn = Turn(0.0, 0)

    def start(self) -> None:
        tidy()
        self._peak = Peak()
        self._before, self._at = self._peak.bytes(), time.perf_counter()

    def stop(self) -> None:
        seconds = time.perf_counter() - self._at
        self.turn = Turn(seconds, max(0, self._peak.bytes() - self._before))


@dataclass(slots=True)
class Side:
    """All measured turns of one call."""

    turns: list[Turn] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return min(turn.seconds for turn in self.turns)

    @property
    def memory_bytes(self) -> int:
        """The most of any turn."""
        return max(turn.memory_bytes for turn in self.turns)

    def row(self, name: str, **more: Any) -> dict[str, Any]:
        """JSON form."""
        every = [turn.seconds for turn in self.turns]
        return {"name": name, "seconds": self.seconds, "all_seconds": every, "memory_bytes": self.memory_bytes, **more}


def tidy() -> None:
    """Give back what was freed, so that the next peak is the next call's own."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc keeps freed blocks; elsewhere there is no such function
        ctypes.CDLL(None).malloc_trim(0)


def take(calls: Mapping[str, Callable[[], Any]], repeats: int, say: Say) -> dict[str, Side]:
    """Measure the calls in turns. A call that returns a `Turn` was measured by itself."""
    names, sides = list(calls), {name: Side() for name in calls}
    for index in range(repeats + 1):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            watch = Stopwatch()
            watch.start()
            made = calls[name]()
            watch.stop()
            turn = made if isinstance(made, Turn) else watch.turn
            if index:
                sides[name].turns.append(turn)
                say(f"{index}/{repeats} {name}: {turn.seconds:.3f} s")
    return sides


def ratio(
    what: str, of: Side, to: Side, target: float | None = None, least: bool = False, part: float = 1.0
) -> dict[str, Any]:
    """Seconds of `of` over those of `to`, times `part`; `target` is the most it may be, or, with `least`, the least."""
    pairs = [part * a.seconds / b.seconds for a, b in zip(of.turns, to.turns)]
    return told(what, part * of.seconds / to.seconds, target, least, spread=[min(pairs), max(pairs)])


def told(what: str, value: float, target: float | None = None, least: bool = False, **more: Any) -> dict[str, Any]:
    """One figure of a part: a ratio and its target, where it has one. `unit` "s": seconds."""
    met = None if target is None else bool(value >= target if least else value <= target)
    return {"what": what, "value": value, "target": target, "least": least, "met": met, **more}


# --- arithmetic -------------------------------------------------------------------------------------------------------


def matmul_peak(dtype: torch.dtype, size: int = 2048, seconds: float = 1.0) -> float:
    """FLOP/s of the fastest of square matrix products over about so many seconds, on torch's threads."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    fastest, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or fastest == float("inf"):
        at = time.perf_counter()
        a @ b
        fastest = min(fastest, time.perf_counter() - at)
    return 2 * size**3 / fastest


def model_flops(model: Any, tokens: int, scored: int, pairs: int) -> float:
    """FLOP of one training step on `tokens` without padding, of which `scored` go through the head.

    A matrix of n parameters costs 2 n a token forward and 2 n for the gradient of its input; a trained one 2 n more for
    its own gradient. So 6 N a token for a model that is trained whole, 4 N for one that carries adapters. Attention
    costs 4 x heads x width forward and twice that backward for each of the `pairs` of a token with one it attends to,
    in each layer. Embeddings, norms and softmax are left out.
    """
    head = model.get_output_embeddings().weight
    total = 0.0
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and weight is not head and "embed" not in name:
            total += (6 if weight.requires_grad else 4) * weight.numel() * tokens
    total += (6 if head.requires_grad else 4) * head.numel() * scored
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return float(total + 12 * config.num_hidden_layers * config.num_attention_heads * width * pairs)
