"""Screens that read one completion at a time: schema, arithmetic, imports."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.builtin import problems
from assay.config import ConfigError
from assay.contribution import Pool
from assay.swarm.screens.arithmetic import Arithmetic, wrong_spans
from assay.swarm.screens.equations import claims
from assay.swarm.screens.imports import ALLOWED, MAX_PROGRAMS, Imports, objections, programs
from assay.swarm.screens.schema import Schema
from assay.verdict import Reason, State, Verdict, run_screen
from swarm_pools import VOCABULARY, completion, honest, pool, swarm

SCHEMA = Schema(VOCABULARY)


def one(screen: object, pool: Pool, state: State | None = None) -> list[Verdict]:
    verdicts, after = screen.screen(pool, state or {})  # type: ignore[attr-defined]
    json.dumps(after, allow_nan=False)
    assert [(v.participant, v.contribution) for v in verdicts] == [(c.participant, c.sha256) for c in pool.completions]
    assert all(v.weight in (0.0, 1.0) and v.screen == screen.name for v in verdicts)  # type: ignore[attr-defined]
    return verdicts  # type: ignore[no-any-return]


# --- schema ----------------------------------------------------------------------------------------------------------


def with_first(change: dict[str, object], *, stamp: bool = True, **more: object) -> Pool:
    """A good pool of two nodes in which the first completion is another one."""
    good = pool({"a": {1: [("one two", 1), ("three", 0)]}, "b": {2: [("four", 1)]}}, index=3)
    first = replace(good.completions[0], **change)  # type: ignore[arg-type]
    if stamp and all(-(2**63) <= i < 2**63 for i in first.ids):
        first = completion(first.participant, first.prompt, first.index, first.ids, round=first.round)
    return replace(good, completions=(first, *good.completions[1:]), **more)  # type: ignore[arg-type]


def test_schema_passes_what_was_asked() -> None:
    assert {v.reason for v in one(SCHEMA, with_first({}))} == {Reason.OK}
    assert {v.weight for v in one(SCHEMA, swarm({"a": honest(), "b": honest()}, {}))} == {1.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ids": ()}, Reason.MALFORMED),
        ({"ids": (VOCABULARY,)}, Reason.OUT_OF_RANGE),
        ({"ids": (-1, 5)}, Reason.OUT_OF_RANGE),
        ({"ids": (2**70,)}, Reason.OUT_OF_RANGE),
        ({"ids": (True, 5)}, Reason.MALFORMED),
        ({"ids": (5,) * 257}, Reason.TOO_LARGE),
        ({"prompt": 2}, Reason.WRONG_PROMPT),
        ({"participant": "nobody"}, Reason.WRONG_PARTICIPANT),
        ({"index": 2}, Reason.OUT_OF_RANGE),
        ({"index": -1}, Reason.OUT_OF_RANGE),
        ({"round": 2}, Reason.WRONG_ROUND),
    ],
)
def test_schema_refuses(change: dict[str, object], reason: Reason) -> None:
    first, *rest = one(SCHEMA, with_first(change))
    assert (first.weight, first.reason, first.effect) == (0.0, reason, "exclude")
    assert first.sentence
    assert [v.weight for v in rest] == [1.0, 1.0]


def test_schema_refuses_a_hash_of_other_tokens() -> None:
    first = one(SCHEMA, with_first({"sha256": "0" * 64}, stamp=False))[0]
    assert first.reason is Reason.HASH_MISMATCH


def test_schema_refuses_both_claims_to_one_place() -> None:
    verdicts = one(SCHEMA, with_first({"index": 1}))
    assert [v.reason for v in verdicts] == [Reason.MALFORMED, Reason.MALFORMED, Reason.OK]


def test_schema_takes_the_reward_of_unreadable_bytes_and_keeps_the_row() -> None:
    verdicts = one(SCHEMA, with_first({}, readable=(False, True, True)))
    assert (verdicts[0].reason, verdicts[0].effect) == (Reason.UNREADABLE, "no_reward")
    assert [v.weight for v in verdicts] == [0.0, 1.0, 1.0]


def test_schema_refuses_what_goes_on_after_its_end() -> None:
    eos = Schema(VOCABULARY, eos=7)
    assert one(eos, with_first({"ids": (1, 7, 2)}))[0].reason is Reason.MALFORMED
    assert one(eos, with_first({"ids": (1, 2, 7)}))[0].reason is Reason.OK


def test_schema_needs_a_vocabulary() -> None:
    with pytest.raises(ConfigError, match="vocabulary"):
        Schema(0)


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(-(2**80), 2**80) | st.integers(0, VOCABULARY - 1), max_size=20),
    place=st.tuples(st.integers(-3, 5), st.integers(-3, 5), st.integers(-1, 5)),
)
def test_schema_accepts_exactly_what_fits(ids: list[int], place: tuple[int, int, int]) -> None:
    prompt, index, at = place
    verdict = one(SCHEMA, with_first({"ids": tuple(ids), "prompt": prompt, "index": index, "round": at}))[0]
    fits = bool(ids) and all(0 <= i < VOCABULARY for i in ids) and place == (1, 0, 3)
    assert (verdict.weight == 1) == fits


# --- arithmetic ------------------------------------------------------------------------------------------------------

TRUE = [
    *[
        "2+2=4",
        "-3+5=2",
        "(3+5)*2=16",
        "2+3*4=14",
        "3 apples + 5 apples = 8 apples",
        "$5 + $6.50 = $11.50",
        "5$ * 2 = 10$",
    ],
    *[
        "1,000 + 1 = 1,001",
        "10/3=3.33",
        "10/4=2.5",
        "7/2=3",
        "50% of 10 = 5",
        "5/10=50%",
        "25 / 1/3 = 75",
        "2+2=4*3=12",
    ],
    *["10 - 4 = 6 - 2 = 4", "two plus two is four", "twenty-one plus two makes 23", "6 divided by 2 equals 3"],
    *[
        "<<48/2=24>>24",
        "(3 + 5 = 8)",
        "\\(2+2=4\\)",
        "2 \\times 3 = 6",
        "2 + 2 = **4**",
        "2+2=\\boxed{4}",
        "2+2≈4.1",
        "1. 2+2=4",
    ],
    *["30 miles/hour * 2 hours = 60 miles", "2 + 2\n= 4", "* 2+2=4", "- 4*5=20\n- 2*3=6"],
]
WRONG = [
    *[
        "2+2=5",
        "2*2=5",
        "2 + 2 = 5.",
        "2×2=5",
        "2x2=5",
        "2 x 2 = 5",
        "2+2\n=5",
        "2 +\n2 = 5",
        "two plus two is five",
        "x=4, 2+2=5",
    ],
    *[
        "2 plus 2 equals five",
        "3 apples + 5 apples = 9",
        "$2+$2=$5",
        "<<2+2=5>>4",
        "<<2+2=5",
        "٢+٢=٥",
        "２＋２＝５",
        "4/2=3",
        "2+2==5",
    ],
    *[
        "2\u200b+\u200b2=5",
        "1,000+1=1,002",
        "2+2=5*3=15",
        "(2 + 2 = 5)",
        "((((2+2=5",
        "2+2 = **5**",
        "2+2=\\boxed{5}",
        "- 2+2=5",
    ],
    *["2 + 2 ≈ 5", "2 multiplied by 2 makes 5", "002+2=5", "2.0+2=5", "-(2+2)=5"],
]
SAYS_NOTHING = [
    *[
        "2x+3=8",
        "x + 3 + 5 = 10",
        "x^2+3+4=5",
        "sqrt(16)+1=5",
        "1:30 + 2 = 5",
        "3,5+2=5,5",
        "1 1/2 + 2 = 3.5",
    ],
    *[
        "3 = 4",
        "2 plus 2 is 5 less than 9",
        "pages 10-20 are 5 chapters",
        "1/0=3",
        "2+2=",
        "=5",
        "2 + (3",
        "total = price + 3 * 2",
    ],
    *["1 hour 20 minutes = 60+20", "f(2+2) = 5", "y = x - 3 + 5 = 9", "2 != 3+4", "a <= 2+2", "1.2.3+4=5"],
    "99999999999999999999 + 1 = 2",
]


@pytest.mark.parametrize("text", TRUE)
def test_true_equations_are_read_and_pass(text: str) -> None:
    found = list(claims(text))
    assert found
    assert all(c.true for c in found), text


@pytest.mark.parametrize("text", WRONG)
def test_wrong_equations_are_found_where_they_stand(text: str) -> None:
    assert len(wrong_spans(text)) == 1, text
    start, end = wrong_spans(text)[0]
    assert any(sign in text[start:end] for sign in ("=", "＝", "≈", "is", "equals", "makes"))


@pytest.mark.parametrize("text", SAYS_NOTHING)
def test_what_is_no_equation_between_numbers_claims_nothing(text: str) -> None:
    assert not list(claims(text)), text


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from("+-*"), st.integers(-3, 3), st.booleans())
def test_random_sums_are_calculated_rightly(a: int, b: int, op: str, off: int, spaced: bool) -> None:
    right = {"+": a + b, "-": a - b, "*": a * b}[op] + off
    text = (f"So {a} {op} {b} = {right} apples." if spaced else f"so {a}{op}{b}={right}.").replace("--", "- -")
    assert [c.true for c in claims(text)] == [off == 0]


@given(st.lists(st.integers(1, 99), min_size=2, max_size=8), st.data())
def test_precedence_and_brackets_are_pythons(numbers: list[int], data: st.DataObject) -> None:
    text = str(numbers[0])
    for n in numbers[1:]:
        op = data.draw(st.sampled_from(["+", "-", "*"]))
        text = f"({text}) {op} {n}" if data.draw(st.booleans()) else f"{text} {op} {n}"
    value = eval(text)  # an independent calculator; the text is the test's own
    assert [c.true for c in claims(f"{text} = {value}")] == [True]
    assert [c.true for c in claims(f"{text} = {value + 1}")] == [False]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789+-*/=().,:% $xXa\n<>^\\{}two is≈×٣\u200b", max_size=80) | st.text(max_size=80))
def test_no_text_upsets_the_reader(text: str) -> None:
    found = list(claims(text))
    assert found == list(claims(text))
    assert all(0 <= c.start < c.end <= len(text) for c in found)


HOSTILE = (
    "2+2=5 ",
    "(",
    ")",
    "1+",
    "=",
    "1=",
    "<<",
    "1,000,",
    "9" * 50,
    "1/",
    "two ",
    "- 1\n",
    "\\boxed{",
    "1 a b ",
    "**",
    "% of ",
    "٣",
)


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_text_costs_linear_work(unit: str) -> None:
    """Counts steps of the interpreter, which no busy machine can blur: four times the text, at most six times the work."""
    assert steps(lambda: list(claims(unit * 2000))) < 6 * steps(lambda: list(claims(unit * 500))) + 1000


def steps(work: object) -> int:
    count = 0

    def trace(frame: object, event: str, arg: object) -> object:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        work()  # type: ignore[operator]
    finally:
        sys.settrace(before)
    return count


def test_huge_products_are_left_alone() -> None:
    assert not list(claims("*".join(["999999999"] * 5000) + "=1"))


def test_arithmetic_takes_the_reward_and_shows_the_evidence() -> None:
    good, bad = one(Arithmetic(), pool({"a": {1: [("2+2=4, 3*3=9", 1), ("1+1=2 and 2+2=5", 1)]}}))
    assert (good.weight, dict(good.evidence)) == (1.0, {"checked": 2.0, "wrong": 0.0, "wrong_limit": 0.0})
    assert (bad.weight, bad.reason, bad.effect) == (0.0, Reason.ARITHMETIC, "no_reward")
    assert dict(bad.evidence) == {"checked": 2.0, "wrong": 1.0, "wrong_limit": 0.0}
    assert "2+2=5" in bad.sentence
    assert one(Arithmetic(max_wrong=1), pool({"a": {1: [("1+1=2 and 2+2=5", 1)]}}))[0].weight == 1.0


def test_every_slip_of_the_builtin_solutions_is_found_and_nothing_else() -> None:
    rng = random.Random(0)
    for _ in range(400):
        problem = problems.word_problem(rng)
        assert not wrong_spans(problems.worked(problem, rng))
        assert wrong_spans(problems.worked(problem, rng).replace("=", "=1"))


def test_limit_sums_told_in_other_words_are_not_read() -> None:
    for text in ("adding 2 to 2 gives 5", "2 and 2 come to 5", "2 + 2, which is 5"):
        assert not wrong_spans(text)


# --- imports ---------------------------------------------------------------------------------------------------------


def coded(program: str, reward: float = 1.0) -> Pool:
    return pool({"a": {1: [(f"<code>\n{program}\n</code>", reward)]}})


FINE = (
    "import math\nprint(math.sqrt(4))",
    "import collections.abc, datetime\nprint(datetime.datetime(2020, 1, 1).year)",
    "from fractions import Fraction as F\nprint(F(1, 2))",
    "import random\nprint(random.random())",
    "open = 10\nhigh = open + 2\nprint(high)",
    "class A:\n    def __init__(self):\n        super().__init__()\n        self._x = 1\n        self.queue = []",
    "print('import thief; exec')  # __import__",
    "```python\nprint(2)\n```",
)
FOUL = (
    "import thief\nprint(thief.add(1, 2))",
    "import math, thief",
    "import thief.sums as math",
    "from thief import add",
    "from . import thief",
    "from os import path",
    "__import__('thief')",
    "run = exec\nrun('import thief')",
    "eval('1')",
    "import importlib",
    "().__class__.__bases__[0].__subclasses__()",
    "getattr(print, '__self__')",
    "globals()['x']",
    "vars()['__builtins__']",
    "if 0: vars = 1\nvars()",
    "open('/etc/hostname')",
    "import random\nrandom._os.system('x')",
    "import statistics\nstatistics.sys.modules",
    "from random import _os",
    "import operator\noperator.attrgetter('__class__')",
    "match print:\n    case object(__self__=b):\n        b",
    "x = [m for m in sys.modules]",
    "f'{__import__(\"os\")}'",
    "@exec\ndef f(): pass",
    "global exec",
    "  import thief\n  print(1)",
    "```\nimport thief\n```",
)


@pytest.mark.parametrize("program", FINE)
def test_honest_programs_pass(program: str) -> None:
    assert objections(program) == []
    assert one(Imports(), coded(program))[0].weight == 1.0


@pytest.mark.parametrize("program", FOUL)
def test_programs_that_reach_elsewhere_lose_their_reward(program: str) -> None:
    verdict = one(Imports(), coded(program))[0]
    assert (verdict.weight, verdict.reason, verdict.effect) == (0.0, Reason.IMPORTS, "no_reward")
    assert verdict.sentence
    assert verdict.score >= 1


def test_the_name_stands_in_the_sentence_and_is_kept_short() -> None:
    assert "thief" in one(Imports(), coded("import thief"))[0].sentence
    assert len(one(Imports(), coded(f"import {'x' * 5000}"))[0].sentence) < 100


def test_builtin_programs_pass() -> None:
    rng = random.Random(1)
    for _ in range(200):
        text = problems.programmed(problems.code_problem(rng), rng, 0.2)
        assert [objections(p) for p in programs(text) or []] == [[]]


def test_no_python_passes_unless_it_was_rewarded() -> None:
    assert one(Imports(), coded("def f(:", reward=0))[0].weight == 1.0
    assert one(Imports(), coded("def f(:", reward=1))[0].weight == 0.0
    assert one(Imports(), pool({"a": {1: [("<think>import thief</think>", 1)]}}))[0].weight == 1.0


def test_every_reading_of_a_completion_is_looked_at() -> None:
    for text in ("<code>print(1)</code><code>import thief</code>", "<code>import thief", "<CODE>import thief</CODE>",
                 "<code>x<code>import thief</code>", "<code>import thief</code></code>"):  # fmt: skip
        assert one(Imports(), pool({"a": {1: [(text, 0)]}}))[0].weight == 0.0, text
    assert one(Imports(), pool({"a": {1: [("<code>1</code>" * (MAX_PROGRAMS + 1), 1)]}}))[0].weight == 0.0


def test_the_list_is_the_operators() -> None:
    assert Imports(allowed=["thief"]).allowed == {"thief"}
    assert one(Imports(allowed=ALLOWED | {"thief"}), coded("import thief.sums"))[0].weight == 1.0
    assert one(Imports(allowed=["os.path"]), coded("from os import path"))[0].weight == 1.0
    assert one(Imports(allowed=["os.path"]), coded("import os"))[0].weight == 0.0
    with pytest.raises(ConfigError, match="list of module names"):
        Imports(allowed="math")


DEEP = ("(" * 5000, "[" * 59, "not " * 1900 + "1", "-" * 7900 + "1", "a" + ".b" * 3900, "1" + "+1" * 3900, "x=" * 3900 + "1",
        "lambda:" * 1100 + "1", "1 if 1 else " * 600 + "1", "b" + "[0]" * 2600, "f'{" * 40, "1" * 7000, "\x00", "\ud800='\ud800'",
        "".join(" " * i + "if 1:\n" for i in range(110)), "x" * 10**6, "\\\n" * 3000, "'\\d'\n\"\"\"")  # fmt: skip


@pytest.mark.parametrize("program", DEEP, ids=range(len(DEEP)))
def test_deep_and_broken_programs_are_judged_not_raised(program: str) -> None:
    verdicts, _ = run_screen(Imports(), coded(program, reward=0), coded(program).completions, {})
    assert verdicts[0].reason in (Reason.OK, Reason.IMPORTS)


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["import ", "thief", "\n", "(", ")", ".", "__x__", "exec", " ", ":", "def "])).map(
        "".join
    )
)
def test_no_program_raises(program: str) -> None:
    verdict = one(Imports(), coded(program, reward=0))[0]
    assert verdict.reason in (Reason.OK, Reason.IMPORTS)


def test_limit_a_library_written_out_in_the_program_is_no_import() -> None:
    assert objections("class thief:\n    add = staticmethod(lambda a, b: a + b)\nprint(thief.add(1, 2))") == []
