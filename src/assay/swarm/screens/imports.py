"""Programs that reach for a module nobody listed (CODE of Hail to the Thief: the attacker's library, called for sums).

The screen reads the syntax tree; nothing is run. It keeps foreign libraries out of what the model learns. What a program
may *do* is the sandbox's business.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Collection
from dataclasses import dataclass

from assay.config import ConfigError
from assay.contribution import Pool
from assay.swarm.screens.common import say
from assay.swarm.screens.reach import reaches
from assay.verdict import Reason, State, Verdict

MAX_CHARACTERS = (
    8_000  # the parser takes up to 0.2 s for a hostile text of this size, quadratically more for a longer one
)
MAX_DEPTH = 60  # brackets within brackets; an honest program has a handful
MAX_PROGRAMS = 8

ALLOWED = frozenset({
    "abc", "array", "bisect", "calendar", "cmath", "collections", "contextlib", "copy", "dataclasses", "datetime",
    "decimal", "enum", "fractions", "functools", "heapq", "itertools", "json", "math", "numbers", "operator",
    "random", "re", "statistics", "string", "textwrap", "time", "types", "typing", "unicodedata",
})  # fmt: skip
_ENCODING = re.compile(r"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)", re.MULTILINE | re.ASCII)  # Python's own rule
_TAG = re.compile(r"</?code>", re.IGNORECASE)
_FENCE = re.compile(r"^\s*```[a-zA-Z0-9]*[ \t]*$", re.MULTILINE)


def programs(text: str) -> list[str] | None:
    """Every program of a completion, also nested or unclosed ones; None if there are more than `MAX_PROGRAMS`.

    Which of them the task would run is the task's rule: a screen that read another one could be led past.
    """
    tags = list(_TAG.finditer(text))
    opens = [t for t in tags if not t[0].startswith("</")]
    if len(opens) > MAX_PROGRAMS:
        return None
    out = []
    for tag in opens:
        ends = [t.start() for t in tags if t.start() >= tag.end() and t[0].startswith("</")]
        for end in dict.fromkeys((ends[0], ends[-1])) if ends else (len(text),):
            out.append(text[tag.end() : end])
    return out


def objections(program: str, allowed: frozenset[str] = ALLOWED) -> list[str] | None:
    """What the program reaches for and may not, in the order of its lines; None if it is no Python.

    A program too large or too deep to be read is objected to as such.

    >>> objections("import math, thief\\nprint(thief.add(1, 2))")
    ['import of thief']
    """
    if len(program) > MAX_CHARACTERS or _depth(program) > MAX_DEPTH:
        return [f"program too large or too deep to read ({len(program)} characters)"]
    for encoding in _ENCODING.findall(program):
        if encoding.lower() not in ("utf-8", "utf8", "ascii"):
            return [f"a program in {encoding[:40]}, which runs as another text than it reads"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like: not ours to report
            tree = ast.parse(_FENCE.sub("", textwrap.dedent(program)).strip())
    except (RecursionError, MemoryError):
        return ["program too deep to read"]
    except (SyntaxError, ValueError, OverflowError):
        return None
    try:
        found = sorted(reaches(tree, allowed), key=lambda f: f[0])
    except RecursionError:
        return ["program too deep to read"]
    return list(dict.fromkeys(said for _, said in found))


def _depth(program: str) -> int:
    """Deepest nesting of brackets, those in strings and comments too: an upper bound."""
    depth = deepest = 0
    for character in program:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(0, depth - 1)
    return deepest


@dataclass(frozen=True, slots=True)
class Imports:
    """A program that imports outside `allowed`, or could do so unseen, keeps its row and loses its reward.

    Objected to (`reach`): imports outside the list, relative ones, modules used otherwise than before a dot, parts of
    a module that it does not make public or that are modules, what reads attributes or runs text by a string,
    underscores that are not the program's own, frames, classes made by calls, a declared encoding other than UTF-8,
    programs too large to be read. A program that is no Python passes: its reward is 0 anyway. One that is no Python
    *and* was rewarded was read in another way by the task, and loses the reward.

    Limits: this reads a program, it does not contain it (the sandbox does). A library written out in the program is no
    import (enrichment sees it when it recurs). Modules from outside the standard library are known by name alone: listing
    one trusts all it offers. The public parts of listed standard modules are trusted too, held against the interpreter
    this runs in, not the sandbox's: one that turned out to import by a name would be a way. Honest programs pay where they
    hand a module on, keep `type(x)`, or use `wraps`, `TypedDict`, a metaclass or a dataclass with a base.
    `allowed`: module names, dotted or not; a name allows all below it.
    """

    allowed: Collection[str] = ALLOWED
    name: str = "imports"

    def __post_init__(self) -> None:
        if isinstance(self.allowed, str):
            raise ConfigError("imports: allowed is a list of module names, not one text")
        object.__setattr__(self, "allowed", frozenset(self.allowed))  # a TOML list will do

    def screen(self, pool: Pool, state: State) -> tuple[list[Verdict], State]:
        out = []
        for completion, text, reward in zip(pool.completions, pool.texts, pool.rewards):
            count, found, unread = self._read(text)
            sentence = "; ".join(found[:3])
            if unread and not found:
                sentence = "the program is no Python" + (", yet it was rewarded" if reward > 0 else "")
            bad = bool(found) or (unread and reward > 0)
            out.append(
                say(
                    completion,
                    self.name,
                    Reason.IMPORTS if bad else Reason.OK,
                    sentence,
                    score=len(found) + (unread and reward > 0),
                    effect="no_reward",
                    programs=count,
                    objections=len(found),
                    objections_limit=0,
                )
            )
        return out, state

    def _read(self, text: str) -> tuple[int, list[str], bool]:
        """Number of programs, objections to all of them, whether none of them could be parsed."""
        written = programs(text)
        if written is None:
            return MAX_PROGRAMS + 1, [f"more than {MAX_PROGRAMS} programs"], False
        read = [objections(p, frozenset(self.allowed)) for p in written]
        found = list(dict.fromkeys(said for r in read if r for said in r))
        return len(written), found, bool(read) and all(r is None for r in read)
