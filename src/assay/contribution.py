"""What one participant sent in one round, parsed, bounded and hashed.

Federated: a `LoraUpdate`, judged within its `Round`. Swarm: a `Rollout` of `Completion`s, judged within the `Pool` of
all nodes. All are frozen: a screen that wants to change a number has to say so in a verdict. Hashes are taken over
canonical bytes (sorted names, dtype, shape, little-endian data), so that two encodings of the same values are the same
contribution.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, NDArray[np.float32]]
BLOCK_VALUES = 2**18
"""Values of one block over all participants: it and its float64 copies stay in the cache of one core."""
PANEL_VALUES = 2**24
"""Values read from a disk at once over all participants, 64 MiB: of 1,000 adapters 64 KiB each, in blocks in memory."""


def tensors_sha256(tensors: Tensors) -> str:
    """sha256 (hex) of the canonical bytes of named float32 tensors; independent of order and encoding.

    >>> import numpy as np
    >>> a, b = np.zeros((1, 2), np.float32), np.ones(3, np.float32)
    >>> tensors_sha256({"a": a, "b": b}) == tensors_sha256({"b": b, "a": a})
    True
    >>> tensors_sha256({"a": a}) == tensors_sha256({"a": a.reshape(2, 1)})
    False
    """
    digest = hashlib.sha256(b"assay.tensors.1")
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name], dtype="<f4")
        raw = name.encode()
        digest.update(struct.pack("<I", len(raw)) + raw)
        digest.update(struct.pack(f"<I{array.ndim}Q", array.ndim, *array.shape))
        digest.update(array.data)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Template:
    """What an adapter must look like: exact names and shapes, the base model and the round it is for.

    Made by the server from its own global adapter; every incoming update is checked against it before a tensor is
    touched (wire.py).
    """

    shapes: Mapping[str, tuple[int, ...]]
    base_sha256: str
    round: int

    @property
    def values(self) -> int:
        """Number of float32 values D of one adapter."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraUpdate:
    """A client's adapter after local training, as float32 tensors under PEFT names.

    `tensors` is the whole adapter (not the difference). `steps` and `shadow` are the client's *claims*: adapters
    after each local step of the real and of the shadow branch (levels.py binds what can be bound).
    `num_examples` is a claim as well.
    """

    participant: str
    round: int
    base_sha256: str
    tensors: Tensors
    sha256: str
    num_examples: int = 1
    steps: tuple[Tensors, ...] = ()
    shadow: tuple[Tensors, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """A message refused before it became a contribution: who, the sha256 of its raw bytes, a reason and a sentence.

    `proven` False: nothing shows that the bytes are the participant's own, so that they can cost it no trust.
    """

    participant: str
    sha256: str
    reason: str
    sentence: str
    proven: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """All contributions of one round and the adapters they are compared with.

    `start` is the global adapter the clients began this round from, `initial` the adapter of round 0 (the restart
    point of shadow branches). `batch_size` is the server's own configured batch, the sample count of one local step.
    """

    index: int
    start: Tensors
    initial: Tensors
    updates: tuple[LoraUpdate, ...]
    refused: tuple[Refusal, ...] = ()
    batch_size: int = 1

    def deltas(self, names: tuple[str, ...] | None = None) -> NDArray[np.float32]:
        """`delta_ND`: each update minus `start`, flattened over sorted `names` (default: all), float32."""
        return differences([u.tensors for u in self.updates], self.start, names)

    def blocks(self, names: tuple[str, ...] | None = None) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """`deltas` in blocks of columns: where they stand, and block_NB. A matrix of all updates would be as large as
        they are, its float64 copy twice that."""
        count = len(self.updates)
        at, width = 0, max(1, BLOCK_VALUES // max(1, count))
        # a 32nd of a small round: a panel of all of it would be the matrix
        whole = count * sum(value.size for value in self.start.values())
        wide = width * max(1, min(PANEL_VALUES, whole // 32) // (width * max(1, count)))
        for name in names or tuple(sorted(self.start)):
            start_B = np.asarray(self.start[name], np.float32).ravel()
            for left in range(0, start_B.size if count else 0, wide):
                rows = [part(u.tensors, name, left, left + wide) for u in self.updates]
                for low in range(0, rows[0].size, width):
                    here, there = slice(low, low + width), slice(left + low, left + low + width)
                    block_NB = np.stack([row[here] for row in rows])
                    block_NB -= start_B[there][: block_NB.shape[1]]
                    yield slice(at + left + low, at + left + low + block_NB.shape[1]), block_NB
                rows.clear()  # or the next panel is read beside this one
            at += start_B.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer, as token ids (a fifth of sampled completions do not survive decode-encode).

    `prompt` is the id of a prompt of the task, `index` says which of the participant's samples for it this is (from
    0). Text and reward are the receiver's business and never travel. `sha256`: see `completion_sha256`.
    """

    participant: str
    round: int
    prompt: int
    index: int
    ids: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """All completions a node sends in one round. `model_sha256` is its claim of the weights it sampled from."""

    participant: str
    round: int
    model_sha256: str
    completions: tuple[Completion, ...]

    @property
    def sha256(self) -> str:
        """Hash over the completions' hashes, in the order of (prompt, index)."""
        return pool_sha256(self.completions)


def completion_sha256(round: int, prompt: int, index: int, ids: Sequence[int]) -> str:
    """sha256 (hex) of what a completion is: its place in the plan and its token ids. Who sent it is not part of it.

    >>> completion_sha256(1, 2, 0, (5, 6)) == completion_sha256(1, 2, 0, [5, 6])
    True
    >>> completion_sha256(1, 2, 0, (5, 6)) == completion_sha256(1, 2, 1, (5, 6))
    False
    """
    raw = struct.pack(f"<qqqQ{len(ids)}q", round, prompt, index, len(ids), *ids)
    return hashlib.sha256(b"assay.completion.1" + raw).hexdigest()


def pool_sha256(completions: Sequence[Completion]) -> str:
    """sha256 (hex) of a set of completions and their senders: nodes compare it to know that they hold the same pool."""
    digest = hashlib.sha256(b"assay.pool.1")
    for participant, sha256 in sorted((c.participant, c.sha256) for c in completions):
        raw = participant.encode()
        digest.update(struct.pack("<I", len(raw)) + raw + bytes.fromhex(sha256))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvidence:
    """What the receiver's own forward pass says of each token; one array of T_i values per completion of the pool.

    `logprob`: log-probability at the sampler's temperature (nats). `outside`: how far the raw logit lies under the
    k-th largest (0 inside the top k of the logit check). `margin`: the post-Gumbel gap max(l + g) - (l_tok + g_tok)
    under the seed of the plan, infinite for a token no sampler of these settings can draw; empty where not wanted.
    """

    logprob: tuple[NDArray[np.float32], ...]
    outside: tuple[NDArray[np.float32], ...] = ()
    margin: tuple[NDArray[np.float32], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """All completions of one round as one receiver sees them, in the order of (participant, prompt, index).

    Aligned with `completions`: `questions` (the receiver's own text of the prompt), `texts` (decoded by the receiver;
    bytes that are not UTF-8 show as U+FFFD), `rewards` (computed by the receiver), `ended` (the last token is EOS),
    `readable` (the bytes are UTF-8). `asked` is the plan: how many completions of which prompt each participant owes.
    `evidence` is there only for screens that run with the training forward pass.
    """

    index: int
    completions: tuple[Completion, ...]
    questions: tuple[str, ...]
    texts: tuple[str, ...]
    rewards: tuple[float, ...]
    ended: tuple[bool, ...]
    readable: tuple[bool, ...]
    asked: Mapping[str, Mapping[int, int]]
    max_tokens: int
    refused: tuple[Refusal, ...] = ()
    evidence: TokenEvidence | None = None

    def groups(self) -> dict[tuple[str, int], list[int]]:
        """Rows of each (participant, prompt): what one node sent for one prompt."""
        out: dict[tuple[str, int], list[int]] = {}
        for row, completion in enumerate(self.completions):
            out.setdefault((completion.participant, completion.prompt), []).append(row)
        return out


def flatten(tensors: Tensors, names: tuple[str, ...] | None = None) -> NDArray[np.float32]:
    """Concatenate named tensors, sorted by name, into one float32 vector of D values."""
    return np.concatenate([np.asarray(tensors[n], dtype=np.float32).ravel() for n in names or sorted(tensors)])


def part(tensors: Tensors, name: str, low: int, high: int) -> NDArray[np.float32]:
    """Values [low, high) of one tensor, flattened, or as many as there are; from an adapter on a disk (spool.py) no
    more than these are read."""
    read = getattr(tensors, "part", None)
    found: NDArray[np.float32] = (
        np.asarray(tensors[name], np.float32).ravel()[low:high] if read is None else read(name, low, high)
    )
    return found


def differences(
    adapters: Sequence[Tensors], start: Tensors, names: tuple[str, ...] | None = None
) -> NDArray[np.float32]:
    """delta_ND: each adapter minus `start`, flattened over sorted `names` (default: all); one matrix and no second one."""
    base_D = flatten(start, names)
    delta_ND = np.empty((len(adapters), base_D.size), np.float32)
    for row_D, adapter in zip(delta_ND, adapters):
        np.subtract(flatten(adapter, names), base_D, out=row_D)
    return delta_ND


def misfit(tensors: Tensors, like: Tensors) -> str:
    """Why an adapter cannot stand beside `like`: other names or shapes, NaN or infinity; "" if it can.

    >>> like = {"a": np.zeros(2, np.float32)}
    >>> misfit({"a": np.zeros(3, np.float32)}, like), misfit(like, like)
    ('a has shape (3,), expected (2,)', '')
    """
    if set(tensors) != set(like):
        return "tensor names differ from the global adapter's"
    for name in sorted(like):
        if np.shape(tensors[name]) != like[name].shape:
            return f"{name} has shape {np.shape(tensors[name])}, expected {like[name].shape}"
        if not np.isfinite(tensors[name]).all():
            return f"{name} is not finite"
    return ""


def unflatten(vector_D: NDArray[np.floating], like: Tensors) -> dict[str, NDArray[np.float32]]:
    """Inverse of `flatten` for the names and shapes of `like`."""
    out, at = {}, 0
    for name in sorted(like):
        shape = like[name].shape
        size = int(np.prod(shape))
        out[name] = np.asarray(vector_D[at : at + size], dtype=np.float32).reshape(shape)
        at += size
    if at != vector_D.size:
        raise ValueError(f"vector of {vector_D.size} values does not fit an adapter of {at}")
    return out
