"""Flower's `ArrayRecord` <-> named float32 tensors; whatever a client put into a record is data to be refused.

Flower's own reader hands a client's bytes to `np.load`, which also opens zip archives and memory maps headers of any
size. Here a value is read only as numpy's raw `.npy` form with a plain header: magic, version 1 or 2, one dtype, the
shape that was asked for, and exactly the bytes these need. Nothing is evaluated, nothing is allocated for a size that
has not been checked against the bytes that are there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from assay.config import ConfigError
from assay.contribution import Tensors
from assay.verdict import Reason
from assay.wire import WireError
from assay.wire.envelope import exact_keys, malformed, show

STYPE = "numpy.ndarray"
MAGIC = b"\x93NUMPY"
MAX_HEADER = 1024
"""Bytes of a `.npy` header; numpy writes 118 for any adapter."""
DTYPES: Mapping[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
}
HEADER = re.compile(
    rb"\{ *'descr': *'(?P<descr>[^']{1,16})', *'fortran_order': *(?P<order>True|False), *"
    rb"'shape': *\((?P<shape>[0-9, ]*)\),? *\} *\n?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What the arrays of a reply must look like: names in the order they were sent, shapes, and the dtype to write."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype[Any]]

    @property
    def max_bytes(self) -> int:
        """The most that all arrays together can need: float64 and the longest headers."""
        return sum(8 * math.prod(shape) + MAX_HEADER + 12 for shape in self.shapes.values())


def form_of(record: ArrayRecord) -> tuple[Form, dict[str, NDArray[np.float32]]]:
    """The form of the operator's own arrays, and their values. ConfigError where Assay cannot screen such a model."""
    if not record:
        raise ConfigError("the arrays sent to clients are empty: there is nothing to compare replies with")
    for name, array in record.items():
        if array.stype != STYPE or array.dtype not in DTYPES:
            raise ConfigError(
                f"array {name!r} is {array.dtype} ({array.stype}); Assay screens {', '.join(DTYPES)} as {STYPE}"
            )
    form = Form(
        shapes={name: tuple(array.shape) for name, array in record.items()},
        dtypes={name: DTYPES[array.dtype] for name, array in record.items()},
    )
    try:
        return form, decode_arrays(record, form, max_abs_value=math.inf)
    except WireError as error:
        raise ConfigError(f"the arrays sent to clients cannot be read: {error}") from None


def encode_arrays(tensors: Tensors, form: Form) -> ArrayRecord:
    """Tensors as a new record, in the order and the dtypes of `form`: several strategies go by position."""
    return ArrayRecord({n: Array(np.asarray(tensors[n]).astype(dtype)) for n, dtype in form.dtypes.items()})


def decode_arrays(record: ArrayRecord, form: Form, *, max_abs_value: float) -> dict[str, NDArray[np.float32]]:
    """A client's record as read-only float32 arrays that have exactly `form`. WireError says why not.

    float16, float32 and float64 are read, whichever was sent; `max_abs_value` bounds |x| before it is rounded.
    """
    exact_keys(dict.fromkeys(record), dict.fromkeys(form.shapes), "arrays", Reason.WRONG_KEYS)
    out = {}
    for name, shape in form.shapes.items():
        values = _read(record[name], name, shape)
        finite = np.isfinite(values)
        if not finite.all():
            raise WireError(Reason.NOT_FINITE, f"{name!r} holds {int((~finite).sum())} NaN or infinite values")
        peak = max(float(values.max()), -float(values.min())) if values.size else 0.0
        if peak > max_abs_value:
            raise WireError(Reason.OUT_OF_RANGE, f"{name!r} holds |x| = {peak:.9g}, limit {max_abs_value:g}")
        with np.errstate(over="ignore"):  # only where the limit is infinite: the operator's own arrays
            out[name] = np.ascontiguousarray(values, np.float32)
        out[name].flags.writeable = False
    return out


def _read(array: Array, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The numbers of one array, in the dtype they came in."""
    # a record in memory can hold anything: Flower checks types when an Array is made, not when it is changed
    for value, kind in ((array.dtype, str), (array.stype, str), (array.shape, tuple), (array.data, bytes)):
        if type(value) is not kind:
            raise malformed(f"{name!r}: a field is {show(value)}, expected {kind.__name__}")
    if array.stype != STYPE:
        raise malformed(f"{name!r}: stype is {show(array.stype)}, expected {STYPE}")
    if array.dtype not in DTYPES:
        raise WireError(Reason.WRONG_DTYPE, f"{name!r} is {show(array.dtype)}, expected one of {', '.join(DTYPES)}")
    if array.shape != shape:
        raise _wrong_shape(name, array.shape, shape)
    dtype, order, body = _split_npy(array.data, name, shape)
    if dtype != DTYPES[array.dtype]:
        raise WireError(Reason.WRONG_DTYPE, f"{name!r} is said to be {array.dtype}, its bytes are {dtype.name}")
    nbytes = math.prod(shape) * dtype.itemsize
    if len(body) != nbytes:
        raise malformed(f"{name!r} has {len(body)} bytes of values, its dtype and shape need {nbytes}")
    return np.frombuffer(body, dtype).reshape(shape, order=order)


def _split_npy(data: bytes, name: str, shape: tuple[int, ...]) -> tuple[np.dtype[Any], Any, memoryview]:
    """dtype, order ("C" or "F") and the bytes after the header of a `.npy` file of this shape."""
    if len(data) < 10 or not data.startswith(MAGIC):
        raise malformed(f"{name!r} begins with {data[:8]!r}, expected numpy's raw form")
    if data[6:8] not in (b"\x01\x00", b"\x02\x00"):  # version 3 exists for names of fields, and there are none
        raise malformed(f"{name!r}: .npy version {data[6]}.{data[7]}, expected 1.0 or 2.0")
    start = 10 if data[6] == 1 else 12
    length = int.from_bytes(data[8:start], "little")
    if length > MAX_HEADER:
        raise WireError(Reason.TOO_LARGE, f"{name!r}: header of {length} bytes, limit {MAX_HEADER}")
    found = HEADER.fullmatch(data, start, start + length)
    if found is None or start + length > len(data):
        raise malformed(f"{name!r}: not a plain .npy header: {data[start : start + min(length, 60)]!r}")
    descr = found["descr"].decode("latin-1")
    dtype = next((known for known in DTYPES.values() if known.str == descr), None)
    if dtype is None:
        raise WireError(Reason.WRONG_DTYPE, f"{name!r}: bytes of type {show(descr)}, expected <f2, <f4 or <f8")
    written = [part for part in found["shape"].replace(b" ", b"").split(b",") if part]
    if written != [b"%d" % size for size in shape]:  # as text: a peer's number may have a thousand digits
        raise _wrong_shape(name, found["shape"][:80].decode(), shape)
    return dtype, "F" if found["order"] == b"True" else "C", memoryview(data)[start + length :]


def _wrong_shape(name: str, found: object, expected: tuple[int, ...]) -> WireError:
    text = ", ".join(show(size) for size in found[:8]) if isinstance(found, tuple) else str(found)
    return WireError(Reason.WRONG_SHAPE, f"{name!r} has shape ({text[:80]}), expected {expected}")
