"""A round's adapters on disk: written as they arrive, read in blocks, gone with the round.

A thousand adapters of 3.4M values are 13.6 GB. A `Spool` takes each one out of memory when it has been parsed; what
stays is a `Stored`, which stands wherever an adapter does and reads its tensors when it is asked for them. Screens and
aggregators read blocks of columns (`Round.blocks`, `Deltas`), so that a round needs, beside its few adapters of the
server's own, one panel of PANEL_VALUES and what its rules keep for each client or pair of clients.
Results are those of the same round in memory, bit for bit (tests/test_spool.py).

The file has no name: a kill leaves nothing behind, and nobody else can open it. It is read and not mapped, because
mapped pages count as the process's own until somebody takes them away. Folder: one on a disk; /tmp is memory on many
machines.
Legend: N adapters, D values of a flattened adapter (names sorted), B of them in a row.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from assay import contribution
from assay.contribution import LoraUpdate, Tensors, flatten

VALUE = np.dtype("<f4")


class SpoolError(OSError):
    """The disk does not hold what a round needs, or a round's adapters are asked for after it."""


class Stored(Mapping[str, NDArray[np.float32]]):
    """An adapter in a spool: `Tensors` whose every reading is a copy from the disk. Travels as a plain dict."""

    __slots__ = ("_at", "_spool")

    def __init__(self, spool: Spool, at: int) -> None:
        self._spool, self._at = spool, at

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        low, shape = self._spool.layout[name]
        array = self.flat(low, low + int(np.prod(shape))).reshape(shape)
        array.flags.writeable = False  # as the wire hands out what is hashed
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._spool.layout)

    def __len__(self) -> int:
        return len(self._spool.layout)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # worker processes have no access to the file

    def part(self, name: str, low: int, high: int) -> NDArray[np.float32]:
        """Values [low, high) of one tensor, flattened."""
        first, shape = self._spool.layout[name]
        end = first + int(np.prod(shape))
        return self.flat(min(first + low, end), min(first + high, end))

    def flat(self, low: int, high: int) -> NDArray[np.float32]:
        """Values [low, high) of the flattened adapter."""
        out_B = np.empty(high - low, VALUE)
        self.read_into(out_B, low)
        return out_B

    def read_into(self, out_B: NDArray[np.float32], low: int) -> None:
        """As many values as fit into `out_B`, a contiguous row, from `low` on."""
        self._spool.read(out_B, self._at + low)


class Spool:
    """One nameless file of adapters that look like `like`, one after the other. A context manager: it ends with its
    round, before a checkpoint or after it. OSError as the disk has it."""

    def __init__(self, folder: str | Path, like: Tensors) -> None:
        self.layout: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.values = 0
        for name in sorted(like):
            self.layout[name] = (self.values, tuple(like[name].shape))
            self.values += like[name].size
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed with the spool
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk back; what was stored can no longer be read."""
        self._file.close()

    @property
    def bytes(self) -> int:
        """What the file holds."""
        return VALUE.itemsize * self._end

    def fits(self, tensors: Tensors) -> bool:
        """Whether an adapter has the names and shapes of `like`."""
        return {n: tuple(np.shape(tensors[n])) for n in tensors} == {n: shape for n, (_, shape) in self.layout.items()}

    def put(self, tensors: Tensors) -> Stored:
        """Write an adapter down. ValueError for other names or shapes."""
        if not self.fits(tensors):
            raise ValueError("a spool takes adapters of one form; names or shapes of this one differ")
        rest = flatten(tensors).astype(VALUE, copy=False).data.cast("B")
        at = self._end
        while rest:
            rest = rest[os.pwrite(self._file.fileno(), rest, VALUE.itemsize * (at + self.values) - len(rest)) :]
        self._end = at + self.values
        return Stored(self, at)

    def keep(self, update: LoraUpdate) -> LoraUpdate:
        """The same contribution with its adapter, and the adapters it claims, on the disk. One of another form, which
        no round reads, is handed back as it is."""
        branches = [(update.tensors,), update.steps, update.shadow]
        if not all(self.fits(tensors) for branch in branches for tensors in branch):
            return update
        (adapter,), steps, shadow = (tuple(self.put(tensors) for tensors in branch) for branch in branches)
        return replace(update, tensors=adapter, steps=steps, shadow=shadow)

    def read(self, out_B: NDArray[np.float32], at: int) -> None:
        """Fill a contiguous row with the values from `at` on."""
        if self._file.closed:
            raise SpoolError("the round's spool is closed: read its adapters before the round is over")
        rest = out_B.data.cast("B")
        at *= VALUE.itemsize
        while rest:
            count = os.preadv(self._file.fileno(), [rest], at)
            if not count:
                raise SpoolError("the round's spool is shorter than what was written to it; check the disk")
            rest, at = rest[count:], at + count


class Deltas:
    """delta_ND that is never built: stored adapters minus `start`, read a panel at a time.

    Takes the place of a float32 matrix in Assay's aggregators. A foreign rule gets a real one (`matrix`).
    """

    __slots__ = ("_adapters", "_part_N", "_start_D")
    dtype, ndim = np.dtype(np.float32), 2

    def __init__(self, adapters: Sequence[Stored], start: Tensors, part_N: NDArray[np.float32] | None = None) -> None:
        self._adapters, self._start_D, self._part_N = tuple(adapters), flatten(start), part_N

    def times(self, part_N: NDArray[np.float32]) -> Deltas:
        """The same with every row multiplied by its part."""
        out = object.__new__(Deltas)
        out._adapters, out._start_D, out._part_N = self._adapters, self._start_D, part_N
        return out

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._adapters), self._start_D.size

    @property
    def nbytes(self) -> int:
        """What the matrix would take."""
        return self._start_D.nbytes * len(self._adapters)

    def read(self, row_M: Sequence[int] | NDArray[np.intp], columns: slice | NDArray[np.intp]) -> NDArray[np.float32]:
        """delta_MB of some rows and columns (slices without a step). Single columns cost a reading of their rows."""
        if not isinstance(columns, slice):
            return np.stack([self.read([row], slice(0, self._start_D.size))[0, columns] for row in row_M])
        low, high, _ = columns.indices(self._start_D.size)
        out_MB = np.empty((len(row_M), high - low), np.float32)
        for out_B, row in zip(out_MB, row_M):
            self._adapters[row].read_into(out_B, low)
        out_MB -= self._start_D[low:high]
        if self._part_N is not None:
            out_MB *= self._part_N[row_M][:, None]
        return out_MB

    def matrix(self, row_M: Sequence[int] | NDArray[np.intp]) -> NDArray[np.float32]:
        """Whole rows, in memory."""
        return self.read(row_M, slice(0, self._start_D.size))

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        """Row after row."""
        return (self.matrix([row])[0] for row in range(len(self._adapters)))


Matrix = NDArray[np.float32] | Deltas
"""What Assay's aggregators read."""


def deltas(adapters: Sequence[Tensors], start: Tensors) -> Deltas | None:
    """Adapters minus `start`, where all of them are stored; None where any is in memory."""
    stored = [adapter for adapter in adapters if isinstance(adapter, Stored)]
    return Deltas(stored, start) if stored and len(stored) == len(adapters) else None


def take(delta_ND: Matrix, row_M: NDArray[np.intp], columns: slice | NDArray[np.intp]) -> NDArray[np.float32]:
    """A copy of some rows and columns of either kind."""
    if isinstance(delta_ND, Deltas):
        return delta_ND.read(row_M, columns)
    if isinstance(columns, slice):
        return np.asarray(delta_ND[row_M, columns])
    return np.asarray(delta_ND[np.ix_(row_M, columns)])


def row(delta_ND: Matrix, index: int, low: int, high: int) -> NDArray[np.float32]:
    """Values [low, high) of one row, or as many as there are."""
    found: NDArray[np.float32] = (
        delta_ND.read([index], slice(low, high))[0] if isinstance(delta_ND, Deltas) else delta_ND[index, low:high]
    )
    return found


def panel_width(delta_ND: Matrix, rows: int, block: int) -> int:
    """Columns to take from the matrix at once, a whole number of blocks of `block`: from memory one, from the disk a
    panel, for a kilobyte of each row at a time would be all seeking. At most a 32nd of a small matrix."""
    if not isinstance(delta_ND, Deltas):
        return block
    return block * max(
        1, min(contribution.PANEL_VALUES, delta_ND.nbytes // VALUE.itemsize // 32) // (block * max(1, rows))
    )


def check_room(folder: str | Path, adapters: int, values: int) -> None:
    """SpoolError before the round where the disk of `folder` has no room for so many adapters."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    need, free = adapters * values * VALUE.itemsize, shutil.disk_usage(folder).free
    if need > free:
        raise SpoolError(
            f"{folder}: a round of {adapters} adapters needs {need / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are "
            "free; name a folder on a larger disk"
        )
