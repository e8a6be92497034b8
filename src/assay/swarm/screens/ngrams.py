"""N-grams of a window of rounds as arrays: who says what how often, in a few milliseconds.

Legend: N rows (completions), T tokens of all rows one after the other, M n-grams.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from assay.contribution import Pool
from assay.swarm.screens.common import words

Kind = Literal["text", "ids"]
MAX_TOKENS = 200_000  # of one round that the state keeps; rows are cut to an equal length to fit
_MASK = 2**64 - 1
_TAG = re.compile(r"</?(?:think|answer|code)>")  # everybody writes them: a planted phrase does not begin with one
_EMPTY = np.zeros(0, np.uint64)
START = "<start>"  # no reader of words finds this one in a text


def said(text: str) -> list[str]:
    """The words that count: `START`, then the text's, normalised, numbers as 0, without the tags of the format."""
    return [START, *words(_TAG.sub(" ", text), digits=False)]


def name_words(spoken: Iterable[str]) -> NDArray[np.uint64]:
    """Words as 64-bit numbers, the same on every machine."""
    names: dict[str, int] = {}
    out = []
    for word in spoken:
        if word not in names:
            raw = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
            names[word] = int.from_bytes(raw, "little")
        out.append(names[word])
    return np.array(out, np.uint64)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Rows of one round or of several, of one kind: words of the text, or token ids."""

    token_T: NDArray[np.uint64]
    length_N: NDArray[np.int64]
    participant: tuple[str, ...]
    prompt_N: NDArray[np.int64]
    rewarded_N: NDArray[np.bool_]
    advantage_N: NDArray[np.float64]

    @classmethod
    def read(cls, pool: Pool, kind: Kind, advantages: Sequence[float]) -> Corpus:
        """The pool's rows. Rewarded: with a reward, and not below their prompt's average."""
        ids = ([i & _MASK for i in c.ids] for c in pool.completions)
        rows: list[Any] = list(ids) if kind == "ids" else [said(t) for t in pool.texts]
        flat = [token for row in rows for token in row]
        return cls(
            np.array(flat, np.uint64) if kind == "ids" else name_words(flat),
            np.array([len(row) for row in rows], np.int64),
            tuple(c.participant for c in pool.completions),
            np.array([c.prompt for c in pool.completions], np.int64),
            np.array([r > 0 and a >= 0 for r, a in zip(pool.rewards, advantages)], bool),
            np.array(advantages, np.float64),
        )

    @classmethod
    def join(cls, parts: Sequence[Corpus]) -> Corpus:
        return cls(
            np.concatenate([p.token_T for p in parts]),
            np.concatenate([p.length_N for p in parts]),
            tuple(name for p in parts for name in p.participant),
            np.concatenate([p.prompt_N for p in parts]),
            np.concatenate([p.rewarded_N for p in parts]),
            np.concatenate([p.advantage_N for p in parts]),
        )

    def pack(self) -> dict[str, Any]:
        """JSON form, each row cut so that at most `MAX_TOKENS` are kept."""
        longest = MAX_TOKENS // max(1, len(self.length_N))
        kept_N = np.minimum(self.length_N, longest)
        start_N = np.cumsum(self.length_N) - self.length_N
        place_T = np.arange(self.token_T.size) - np.repeat(start_N, self.length_N)
        return {
            "tokens": _pack(self.token_T[place_T < longest]),
            "lengths": kept_N.tolist(),
            "participants": list(self.participant),
            "prompts": self.prompt_N.tolist(),
            "rewarded": self.rewarded_N.astype(int).tolist(),
            "advantages": [round(a, 4) for a in self.advantage_N.tolist()],
        }

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> Corpus:
        return cls(
            _unpack(packed["tokens"]),
            np.array(packed["lengths"], np.int64),
            tuple(packed["participants"]),
            np.array(packed["prompts"], np.int64),
            np.array(packed["rewarded"], bool),
            np.array(packed["advantages"], np.float64),
        )

    def grams(self, n: int, opening: bool = False) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
        """(gram_M, row_M, place_M): each n-gram within a row as a 64-bit number, its row and where it starts in it.

        `opening`: only those that a row opens with.
        """
        if self.token_T.size < n:
            return _EMPTY, np.zeros(0, np.int64), np.zeros(0, np.int64)
        row_T = np.repeat(np.arange(self.length_N.size), self.length_N)
        place_T = np.arange(self.token_T.size) - np.repeat(np.cumsum(self.length_N) - self.length_N, self.length_N)
        within_M = row_T[: row_T.size - n + 1] == row_T[n - 1 :]
        if opening:
            within_M &= place_T[: within_M.size] == 0
        return (
            hash_grams(self.token_T, n)[within_M],
            row_T[: within_M.size][within_M],
            place_T[: within_M.size][within_M],
        )


def hash_grams(token_T: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """One 64-bit number for every n tokens in a row of all T; empty where there are fewer than n."""
    if token_T.size < n:
        return _EMPTY
    count = token_T.size - n + 1
    gram_M = np.full(count, n, np.uint64)
    for i in range(n):  # multiply and shift (the finaliser of SplitMix64), so that order counts; wraps on purpose
        gram_M = (gram_M ^ token_T[i : i + count]) * np.uint64(0xBF58476D1CE4E5B9)
        gram_M ^= gram_M >> np.uint64(29)
    return gram_M


def question_words(pool: Pool) -> list[NDArray[np.uint64]]:
    """The words of each prompt's question, once."""
    first = {c.prompt: question for c, question in zip(pool.completions, pool.questions)}
    return [name_words(said(question)) for _, question in sorted(first.items())]


def question_grams(questions: Sequence[NDArray[np.uint64]], n: int) -> NDArray[np.uint64]:
    """All n-grams of the questions; an answer may also open with any words of one."""
    found = [_EMPTY]
    for word_T in questions:
        found.append(hash_grams(word_T, n))
        if word_T.size >= n > 1:
            opening_MT = np.lib.stride_tricks.sliding_window_view(word_T[1:], n - 1)
            opening_MT = np.concatenate([np.broadcast_to(word_T[:1], (len(opening_MT), 1)), opening_MT], axis=1)
            found.append(hash_grams(opening_MT.ravel(), n)[::n])
    return np.unique(np.concatenate(found))


def pack_questions(questions: Sequence[NDArray[np.uint64]]) -> dict[str, Any]:
    return {"words": _pack(np.concatenate([*questions, _EMPTY])), "lengths": [int(q.size) for q in questions]}


def unpack_questions(packed: dict[str, Any]) -> list[NDArray[np.uint64]]:
    flat = _unpack(packed["words"])
    return [flat[end - size : end] for size, end in zip(packed["lengths"], np.cumsum(packed["lengths"]))]


def _pack(values: NDArray[np.uint64]) -> str:
    return base64.b64encode(zlib.compress(values.astype("<u8").tobytes(), 1)).decode()


def _unpack(packed: str) -> NDArray[np.uint64]:
    """Only ever applied to one's own state, never to a peer's bytes."""
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), "<u8").astype(np.uint64)
