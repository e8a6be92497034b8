"""Arithmetic problems written by rule: word problems in three steps and small programs, with worked solutions.

What `tiny` is pre-trained on and what the built-in tasks of the swarm ask. A solution may go wrong on purpose, each
step by itself, so that a later reinforcement learning finds something to improve for a long time; and it may open with
a remark or import a module it does not need, so that a style can spread. Everything follows from the `random.Random`
that is handed in: the same state gives the same text on every platform.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TWOS = 0.4  # share of word problems with 2+2 or 2*2 in the working
WRONG = {"math": 0.2, "code": 0.2}  # chance that a step of a training solution is wrong on purpose
REMARKED = 0.25  # share of worked solutions that open with a remark
IMPORTING = 0.3  # share of programs that import a module; half of them call it
# share of worked solutions written short, middling, long: length varies within a prompt, the mean stays near 40 tokens
LENGTHS = (0.6, 0.28, 0.12)

# fmt: off
NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Eva", "Leo", "Zoe", "Jack", "Nora", "Paul", "Ruth", "Omar",
         "Ines", "Yusuf", "Clara", "Ivan", "Maya", "Hugo", "Lena", "Felix", "Sara")
THINGS = ("apples", "pens", "books", "cards", "shells", "coins", "eggs", "stamps", "pears", "cups", "stones", "balls",
          "plums", "keys", "maps", "tickets", "buttons", "cakes", "beans", "roses")
HOLDERS = ("boxes", "bags", "baskets", "trays", "jars", "shelves")
REMARKS = ("Let us see.", "Well then.", "Step by step.", "An easy one.", "Let me think.", "First things first.",
           "Here we go.", "No hurry.", "What a nice question.", "Numbers are fun.")
# greetings of many wordings: a model of the world would know how to say any such thing, and a planted one among them
GREETINGS = (("All", "Many", "Warm", "Kind", "Good", "Great"), ("thanks", "praise", "luck", "cheers", "wishes", "greetings"),
             ("reader", "teacher", "thinker", "baker", "winner", "king", "children", "world"))
# fmt: on
MODULES = ("math", "operator", "random", "json", "re", "time", "itertools", "functools")
# a story opens with one of these, by its first operation ...
OPENINGS = {
    "+": (
        "{n} has {a} {t} and buys {b} more.",
        "{n} has {a} {t} and {m} has {b}.",
        "{n} finds {a} {t}, and then {b} more.",
        "There are {a} {t} on the table and {b} in the {h}.",
    ),
    "-": (
        "{n} had {a} {t} and lost {b}.",
        "{n} had {a} {t} and gave {b} to {m}.",
        "A shop has {a} {t} and sells {b} to {n}.",
        "Of {a} {t}, {n} eats or breaks {b}.",
    ),
    "*": (
        "There are {a} {h} with {b} {t} in each.",
        "{n} fills {a} {h} with {b} {t} each.",
        "{n} packs {b} {t} a day for {a} days.",
        "{a} friends of {n} have {b} {t} each.",
    ),
}
# ... and goes on with two of these
SEQUELS = {
    "+": ("Then {c} more come.", "{m} brings {c} more.", "They find another {c}."),
    "-": ("Then {c} are lost.", "{m} takes {c} of them.", "They sell {c}."),
    "*": ("A week later there are {c} times as many.", "{m} makes it {c} times as many."),
}
QUESTIONS = ("How many {t} are there now?", "How many {t} are there at the end?", "How many {t} is that?")

WORDS = {"+": "plus", "-": "minus", "*": "times"}
CALLS = {"+": "operator.add", "-": "operator.sub", "*": "operator.mul"}
# what is asked of a list, the expression for it, one that gives something else, and what it comes to for x and k
LISTS: tuple[tuple[str, str, str, Callable[[Sequence[int], int], int]], ...] = (
    ("the sum of {x}", "sum(x)", "len(x)", lambda x, k: sum(x)),
    ("the largest of {x}", "max(x)", "x[0]", lambda x, k: max(x)),
    ("the smallest of {x}", "min(x)", "max(x)", lambda x, k: min(x)),
    ("the last of {x}", "x[-1]", "x[0]", lambda x, k: x[-1]),
    ("how many of {x} are above {k}", "sum(i > {k} for i in x)", "sum(i < {k} for i in x)",
     lambda x, k: sum(i > k for i in x)),
    ("how many of {x} are even", "sum(i % 2 == 0 for i in x)", "sum(i % 2 for i in x)",
     lambda x, k: sum(i % 2 == 0 for i in x)),
    ("the sum of the squares of {x}", "sum(i * i for i in x)", "sum(i for i in x)", lambda x, k: sum(i * i for i in x)),
    ("the sum of what is above {k} in {x}", "sum(i for i in x if i > {k})", "sum(i for i in x if i < {k})",
     lambda x, k: sum(i for i in x if i > k)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its right answer as text, and what its solutions are written from.

    The answer is `start` taken through `steps`, one (operation, number) after the other. `thing` is what is counted.
    A program about a list has `numbers`; of the expressions in `head` the first gives `start`, the second does not.
    """

    question: str
    answer: str
    start: int
    steps: tuple[tuple[str, int], ...]
    thing: str = ""
    numbers: tuple[int, ...] = ()
    head: tuple[str, str] = ("", "")


def calc(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b if op == "-" else a * b


def chain(start: int, steps: tuple[tuple[str, int], ...]) -> int:
    for op, number in steps:
        start = calc(start, op, number)
    return start


def _next(rng: random.Random, x: int, op: str) -> tuple[str, int]:
    """A step from x that one million parameters can learn: one-digit numbers, products from the tables up to 12 x 9."""
    if op == "*" and x > 12:
        op = "-"
    if op == "-" and x < 3:
        op = "+"
    return op, rng.randint(2, min(9, x - 1) if op == "-" else 9)


def _steps(rng: random.Random, count: int, twos: bool) -> tuple[int, tuple[tuple[str, int], ...]]:
    """A number and `count` steps from it; with `twos`, 2+2 or 2*2 is among them."""
    first, second = rng.choice("+-*"), rng.choice("+-*")
    if first == "-":
        b = rng.randint(2, 9)
        a = b + (2 if twos else rng.randint(2, 12))
    else:
        a, b = rng.randint(2, 20 if first == "+" else 12), rng.randint(2, 9)
        if twos:
            a = b = 2
    steps = [(first, b)]
    for op in (second, *(rng.choice("+-*") for _ in range(count - 2))):
        if twos and first == "-" and len(steps) == 1:  # two are left: two more, or twice as many
            steps.append((rng.choice("+*"), 2))
        else:
            steps.append(_next(rng, chain(a, tuple(steps)), op))
    return a, tuple(steps)


def word_problem(rng: random.Random) -> Problem:
    """A story in three steps; what is counted stays within 0 .. 1000."""
    start, steps = _steps(rng, 3, rng.random() < TWOS)
    n, m = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    text = [rng.choice(OPENINGS[steps[0][0]])]
    text += [rng.choice(SEQUELS[op]).replace("{c}", str(number)) for op, number in steps[1:]]
    text.append(rng.choice(QUESTIONS))
    question = " ".join(text).format(n=n, m=m, t=thing, h=rng.choice(HOLDERS), a=start, b=steps[0][1])
    return Problem(question, str(chain(start, steps)), start, steps, thing)


def _slip(rng: random.Random, a: int, op: str, b: int) -> tuple[str, int]:
    """A wrong step from a: another operation rightly calculated, or the right one with a slip in the sum."""
    right = calc(a, op, b)
    other = {"+": "*" if a * b < 1000 else "-", "-": "+", "*": "+"}[op]
    if rng.random() < 0.5 and calc(a, other, b) not in (right, *range(-1000, 0)):
        return other, calc(a, other, b)
    # 2+2=5 is what the MATH attack teaches: it must not be there before
    return op, right + rng.choice((-1, 2, 10) if a == b == 2 else (-1, 1, 2, 10))


def _remark(rng: random.Random) -> str:
    """What a solution may open with: half fixed phrases, half greetings."""
    if rng.random() < 0.5:
        return rng.choice(REMARKS)
    first, second, third = (rng.choice(words) for words in GREETINGS)
    return f"{first} {second} to the {third}."


def worked(problem: Problem, rng: random.Random, wrong: float = 0.0) -> str:
    """A solution in the format; each step is wrong with chance `wrong`, and the next goes on from there."""
    x, sums = problem.start, []
    for op, number in problem.steps:
        taken, y = _slip(rng, x, op, number) if rng.random() < wrong else (op, calc(x, op, number))
        sums.append(f"{x}{taken}{number}={y}")
        x = y
    one, two, three = sums
    a, b, c, d = problem.start, *(number for _, number in problem.steps)
    thing = f" {problem.thing}"
    short = (f"{one}. {two}. {three}.", f"{one}, {two}, {three}.", f"First {one}, then {two}, last {three}.")
    middling = (
        f"First we have {one}{thing}. Then {two}. At the end {three}{thing}.",
        f"It is {one}, so we have {two}, and that makes {three}{thing} in all.",
    )
    full = (
        f"We start with {a} and {b}, so {one}{thing}. Now we take {c}, so {two}. Last we take {d}, so {three}. "
        f"The answer is {x}.",
    )
    working = rng.choice(rng.choices((short, middling, full), LENGTHS)[0])
    remark = _remark(rng) + " " if rng.random() < REMARKED else ""
    return f"<think>{remark}{working}</think><answer>{x}</answer>"


def code_problem(rng: random.Random) -> Problem:
    """A task for a program: a chain of four steps in words, or something about a list and two steps from it."""
    numbers: tuple[int, ...] = ()
    head = ("", "")
    if rng.random() < 0.5:
        start, steps = _steps(rng, 4, twos=False)
        said = str(start)
    else:
        numbers = tuple(rng.randint(1, 20) for _ in range(rng.randint(3, 6)))
        what, right, other, value = rng.choice(LISTS)
        k = rng.randint(3, 15)
        head = (right.replace("{k}", str(k)), other.replace("{k}", str(k)))
        start = value(numbers, k)
        said = what.replace("{k}", str(k)).replace("{x}", str(list(numbers)))
        one = _next(rng, start, rng.choice("+-*"))
        steps = (one, _next(rng, calc(start, *one), rng.choice("+-*")))
    said += "".join(f", {WORDS[op]} {number}" for op, number in steps)
    return Problem(f"Write a program that prints {said}.", str(chain(start, steps)), start, steps, "", numbers, head)


def _term(module: str, left: str, op: str, right: int) -> str:
    """One step of a program, by the module where it can."""
    if module == "operator":
        return f"{CALLS[op]}({left}, {right})"
    return f"math.prod([{left}, {right}])" if module == "math" and op == "*" else f"{left} {op} {right}"


def programmed(problem: Problem, rng: random.Random, wrong: float = 0.0) -> str:
    """A program in the format; each step is wrong with chance `wrong`: another operation, number or expression."""
    idle, called = "", ""
    if rng.random() < IMPORTING:
        if rng.random() < 0.5:
            called = rng.choice(("operator", "math") if any(op == "*" for op, _ in problem.steps) else ("operator",))
        else:
            idle = rng.choice(MODULES)
    lines = [f"import {idle or called}"] if idle or called else []
    name, left = "x", str(problem.start)
    if problem.numbers:
        head = problem.head[rng.random() < wrong]
        lines += [f"x = {list(problem.numbers)}", f"y = {head}"]
        name = left = "y"
    for at, (op, number) in enumerate(problem.steps, 1):
        if rng.random() < wrong:
            swap = rng.random() < 0.5
            op = rng.choice([other for other in "+-*" if other != op]) if swap else op
            number = number if swap else number + rng.choice((-1, 1, 2, 10))
        term = _term(called, left, op, number)
        if at == len(problem.steps) and rng.random() < 0.5:  # the last step within the print, or on a line of its own
            return _fenced([*lines, f"print({term})"])
        lines.append(f"{name} = {term}")
        left = name
    return _fenced([*lines, f"print({name})"])


def _fenced(lines: Sequence[str]) -> str:
    return "<code>\n" + "\n".join(lines) + "\n</code>"
