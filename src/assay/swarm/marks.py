"""Which tokens of a completion a screen of texts objected to, for the report: what it names, found again in the text.

Only shown to people: no verdict depends on it, and where a place cannot be told nothing is marked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from assay.swarm.grading import TAG
from assay.swarm.screens import ngrams
from assay.swarm.screens.arithmetic import wrong_spans
from assay.swarm.screens.imports import objections, programs
from assay.verdict import State

Span = tuple[int, int]
WORD = re.compile(r"\d+|[^\W\d_]+|[^\w\s]|_")


def spans(screen: str, text: str, state: State) -> list[Span]:
    """Characters (start, end) of what `screen` objects to in `text`; `state` is what the screen remembers.

    >>> spans("arithmetic", "2+2=5, so 5*2=10", {})
    [(0, 5)]
    """
    if screen == "arithmetic":
        return wrong_spans(text)
    if screen == "imports":
        return sorted(set(_named(text)))
    return list(_listed(text, state)) if screen == "enrichment" else []


def _named(text: str) -> Iterator[Span]:
    """Every mention of a name that the import list objects to."""
    for said in {said for program in programs(text) or () for said in objections(program) or ()}:
        name = re.search(r"(?:import of|use of) \.?(\S+)", said)
        if name:
            yield from (found.span() for found in re.finditer(rf"(?<!\w){re.escape(name[1])}(?!\w)", text))


def _listed(text: str, state: State) -> Iterator[Span]:
    """Every n-gram of words that is listed as planted."""
    bare = TAG.sub(lambda tag: " " * len(tag[0]), text)
    placed = [(word, found.span()) for found in WORD.finditer(bare) for word in ngrams.said(found[0])[1:]]
    at = placed[0][1][0] if placed else 0
    placed = [(ngrams.START, (at, at)), *placed]
    words = [word for word, _ in placed]
    if words != ngrams.said(text):  # normalised in a way that moves words: no telling where
        return
    for name in state.get("listed", {}):
        kind, n, gram = name.split(":")
        if kind == "text" and int(n) <= len(words):
            hashed_M = ngrams.hash_grams(ngrams.name_words(words), int(n))
            for at in (hashed_M == int(gram, 16)).nonzero()[0].tolist():
                yield placed[at][1][0], placed[at + int(n) - 1][1][1]


def tokens_in(pieces: Sequence[str], text: str, marked: Sequence[Span]) -> list[int]:
    """Numbers of the tokens that touch a span; none where the tokens' own texts do not make up the whole one.

    >>> tokens_in(["2+", "2", "=5", "."], "2+2=5.", [(2, 5)])
    [1, 2]
    """
    if not "".join(pieces).startswith(text):  # bytes of one character shared by tokens
        return []
    out, end = [], 0
    for at, piece in enumerate(pieces):
        start, end = end, end + len(piece)
        if any(start < last and first < end for first, last in marked):
            out.append(at)
    return out
