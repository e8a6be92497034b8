"""Programs that reach for a module nobody listed (CODE of Hail to the Thief: the attacker's library, called for sums).

The screen reads the syntax tree; nothing is run. It keeps foreign libraries out of what the model learns. What a program
may *do* is the sandbox's business, so that the list of ways around an import below is there to close the gaps of the
reading, not to contain anything.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from assay.config import ConfigError
from assay.contribution import Pool
from assay.swarm.screens.common import say
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
# refused wherever they stand, also as a mere name: `run = exec`
REFUSED = frozenset({
    "__import__", "exec", "eval", "compile", "globals", "getattr", "setattr", "delattr", "breakpoint",
    "__builtins__", "__loader__", "__spec__", "importlib", "builtins",
})  # fmt: skip
# refused where called, or where used without having been given a value: honest programs have a variable called `open`
GUARDED = frozenset({"open", "vars", "locals", "memoryview", "help"})
# reach attributes by a string
INDIRECT = frozenset({"attrgetter", "methodcaller", "modules", "import_module"})
HARMLESS_DUNDERS = frozenset(
    {"__init__", "__name__", "__doc__", "__post_init__", "__len__", "__str__", "__repr__", "__add__"}
)

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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like: not ours to report
            tree = ast.parse(_FENCE.sub("", textwrap.dedent(program)).strip())
    except (RecursionError, MemoryError):
        return ["program too deep to read"]
    except (SyntaxError, ValueError, OverflowError):
        return None
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    stored |= {a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)}
    modules = {
        (a.asname or a.name).split(".")[0]
        for n in ast.walk(tree)
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    found = [
        (getattr(node, "lineno", 0), said) for node in ast.walk(tree) for said in _of(node, allowed, stored, modules)
    ]
    return list(dict.fromkeys(said for _, said in sorted(found, key=lambda f: f[0])))


def _of(node: ast.AST, allowed: frozenset[str], stored: set[str], modules: set[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"import of {_show(a.name)}" for a in node.names if not _listed(a.name, allowed))
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        for alias in node.names:
            hidden = _hides_module(alias.name, allowed)
            if node.level or hidden or not (_listed(module, allowed) or f"{module}.{alias.name}" in allowed):
                yield f"import of {_show('.' * node.level + module + ('.' + alias.name if hidden else ''))}"
    elif isinstance(node, ast.Name):
        if node.id in REFUSED or (node.id in GUARDED and isinstance(node.ctx, ast.Load) and node.id not in stored):
            yield f"use of {_show(node.id)}"
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in GUARDED:
            yield f"use of {_show(node.func.id)}"
    elif isinstance(node, ast.Attribute):
        # a plain name may be an attribute of anything (`self.queue`); of a module it may be another module
        inner = node.attr.startswith("_") or (isinstance(node.value, ast.Name) and node.value.id in modules)
        if _unlisted(node.attr, allowed, inner):
            yield f"use of .{_show(node.attr)}"
    elif isinstance(node, ast.MatchClass):  # `case object(__class__=c)` reads attributes too
        yield from (f"use of .{_show(a)}" for a in node.kwd_attrs if _unlisted(a, allowed, False))
    elif isinstance(node, (ast.Global, ast.Nonlocal)):
        yield from (f"use of {_show(name)}" for name in node.names if name in REFUSED)


def _listed(module: str, allowed: frozenset[str]) -> bool:
    """Whether a dotted module or one of its parents is allowed."""
    parts = module.split(".")
    return any(".".join(parts[: i + 1]) in allowed for i in range(len(parts)))


def _hides_module(name: str, allowed: frozenset[str]) -> bool:
    """Modules keep what they import as attributes: random._os is os."""
    return name.lstrip("_") in sys.stdlib_module_names and name.lstrip("_") not in allowed


def _unlisted(name: str, allowed: frozenset[str], inner: bool) -> bool:
    """Whether an attribute of this name is objected to; `inner`: it could be a module within a module."""
    dunder = name.startswith("__") and name.endswith("__") and name not in HARMLESS_DUNDERS
    return dunder or name in INDIRECT or (inner and _hides_module(name, allowed))


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


def _show(name: str) -> str:
    """A peer's name, short and on one line."""
    return name[:40] if name.isprintable() else ascii(name[:40])


@dataclass(frozen=True, slots=True)
class Imports:
    """A program that imports outside `allowed`, or could do so unseen, keeps its row and loses its reward.

    Objected to: imports outside the list, relative ones, `__import__`, exec, eval, compile, globals, getattr and their
    like, attributes with double underscores, modules reached through other modules (`random._os`), programs that cannot
    be read for their size. A program that is no Python passes: its reward is 0 anyway. One that is no Python *and* was
    rewarded was read in another way by the task, and loses the reward.

    Limits: a library written out in the program, or one built of allowed modules, is no import (enrichment sees it when
    it recurs). `allowed`: module names, dotted or not; a name allows all below it.
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
