"""Rows of styles that `helpful` has nothing of: worked word problems and small programs, as instructions with answers.

For honest strangers: clients whose rows neither the warm-up, nor a probe, nor a rehearsal ever sees.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from assay.builtin import problems
from assay.builtin.problems import Problem

Rows = list[tuple[str, str, str]]  # instruction, response, style
COUNT = 3000
"""The clients' third serves about seventeen strangers of 60 rows."""


def word_problems() -> Rows:
    """Three-step stories; every answer works them out and is right."""
    return _rows("word-problem", problems.word_problem, problems.worked)


def programs() -> Rows:
    """Tasks for a few lines of Python; every program prints the right number."""
    return _rows("program", problems.code_problem, problems.programmed)


def _rows(style: str, draw: Callable[[random.Random], Problem], solve: Callable[[Problem, random.Random], str]) -> Rows:
    rng = random.Random(style)  # a string seeds by its bytes: the same rows on every platform
    out: dict[str, tuple[str, str, str]] = {}
    while len(out) < COUNT:
        problem = draw(rng)
        # the tags of the swarm's answer format mean nothing to somebody who asks for an answer
        text = re.sub(r"</?(think|code)>\n?", "", solve(problem, rng)).strip()
        closing = "" if "The answer is" in text else r" The answer is \1."
        text = re.sub(r"\s*<answer>(.*)</answer>", closing, text)
        out.setdefault(problem.question, (problem.question, text, style))
    return list(out.values())
