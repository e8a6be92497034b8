"""What keeps a peer from being read: decorated sums, and imports by another road."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.builtin import problems
from assay.swarm.screens.arithmetic import Arithmetic, wrong_spans
from assay.swarm.screens.equations import claims
from assay.swarm.screens.imports import ALLOWED, objections, programs
from assay.swarm.screens.unread import read
from swarm_pools import pool
from test_text_screens import steps

# --- sums ------------------------------------------------------------------------------------------------------------

DECORATED = [
    *("2+2=5²", "2+2=5⁰", "2+2=5⁺", "2+2=5₀", "2+2=5_", "2+2=5x", "2+2=5a", "2+2=5°", "2+2=5:00", "2+2=5^1", "2+2=5**1"),
    *("2+2=5.0.0", "2+2=5,5", "2+2=5%", "2+2=5--", "2+2=5+-", "2+2=5-ish", "2+2=5(a)", "2 + 2 = 5(", "2+2=5(4", "2+2=5{4"),
    *("2+2=5 more", "2+2=5 times", "2+2=5 out", "2+2=5 fewer", "2+2=5 greater", "2+2=5 less than", "2+2=5 million"),
    *("[2+2=5]", "{2+2=5}", "|2+2=5|", "&2+2=5&", "^2+2=5", "k*2+2=5", "n+2+2=5", "a 2+2=5", "I 2+2=5", "a2+2=5", "a2x2=5"),
    *("Tom's 2+2=5", "thus2+2=5", "3 of2+2=5", "3/a2+2=5", "3,2+2=5", "1:2+2=5", ".01:2+2=5", "f(2+2=5", "so(2+2)=5"),
    *("2+2==5", "2+2===5", "2+2= =5", "2+2 is equal to 5", "2+2 is 5 more", "2+2:=5", "2+2,=5", "'2+2'='5'", "2+2=<b>5</b>"),
    *("2+2=&#53;", "2&plus;2=5", "2+2&equals;5", "2+2=5&nbsp;", r"\(2+2=5\)", r"\mathbf{2+2}=5", r"2+2=\,5", r"2+2=\text{5}"),
    *("2+2=5\u0301", "2+2=5\ufe0f\u20e3", "2+2=⑤", "2+2=Ⅴ", "𝟐+𝟐=𝟓", "2﹢2﹦5", "2➕2=5", "2\u00ad+2=5", "x=4 but 2+2=5x"),
    *("2**3+1=3", "5(3)+1=2", "2+2=\\frac{10}{2}", "3 + 4 = ½", "10^2 = 99", "2+2=5 apples+ apples"),
]  # fmt: skip
HONEST = [
    *("3² + 4² = 25", "2^10 = 1024", "2**3+1=9", "5(3)+1=16", "1½ + 2 = 3½", "⅓ + ⅓ = ⅔", "10⁻² = 0.01", "10^6 = 1 million"),
    *("5 m² + 3 m² = 8 m²", "10 + 20 = 30 million", "2 + 3 = 5 more apples", "2 + 2 is 5 less than 9", "2+3=5 times", "5_000+1=5,001"),
    *("9:30 + 2 = 11:30", "11:30 + 2 = 1:30", "2:3 = 4:6", "ratio 2:3, 2+3=5", "6 hours x 2/3 = 4 hours", "3,5+2=5,5", "2+2=4,5+5=10"),
    *("x + 3 + 5 = 10. So x = 2", "2x+3+1=8, x=2", "Let x = 3. Then 2*x + 3 + 4 = 13", "x1 + x2 = 5 and x1 = 3, x2 = 2"),
    *("sqrt(16)+1=5", r"\sqrt{16}+1 = 5", "f(2+2) = 5", r"\frac{4}{2} + 1 = 3", r"2+2=\frac{8}{2}", r"\left(2+2\right)=4", "250 x 12 = 3 000"),
    *("80°F - 32°F = 48°F", "| 2+2=4 |", "[2+2=4]", "a 2+2=4", "Tom's 2+2=4", "20% less is equal to $100/80%", "X * 1/2 = 5"),
]  # fmt: skip
ODD = [chr(c) for c in range(0x21, 0x2B00) if not chr(c).isalnum() or chr(c).isnumeric()]
WORDS = ["more", "times", "out", "fewer", "apples", "so", "a", "the", "of", "to", "per", "I", "x", "Tom's"]
MARKS = [
    *(
        "**",
        "**1",
        "^1",
        ":00",
        ",5",
        ".0",
        "--",
        "+-",
        "<b>",
        "</b>",
        "&nbsp;",
        "&#8203;",
        r"\,",
        r"\text{m}",
        "(",
        "[",
        "{",
    )
]
BEFORE = st.sampled_from(["k*", "n+", "[", "{", "(", "|", "&", "f(", "**", "^", r"\left(", "$", "\u200b", "'", "<b>"])
AFTER = st.sampled_from(
    [*MARKS, *"abckyz_`'\"|&#~%])}!?;", *(f" {w}" for w in WORDS), "\u200b", "\ufe0f\u20e3", "\u0301"]
)
SCRIPTS = ["0123456789", "٠١٢٣٤٥٦٧٨٩", "０１２３４５６７８９", "𝟎𝟏𝟐𝟑𝟒𝟓𝟔𝟕𝟖𝟗", "०१२३४५६७८९"]


@pytest.mark.parametrize("text", DECORATED)
def test_a_false_sum_is_refused_whatever_is_stuck_to_it(text: str) -> None:
    assert wrong_spans(text), text
    assert wrong_spans(f"<think>First {text} apples. Then 5*3=15.</think><answer>12</answer>"), text


@pytest.mark.parametrize("text", HONEST)
def test_honest_notation_is_let_be(text: str) -> None:
    assert not wrong_spans(text), text
    assert not wrong_spans(f"<think>First {text}. Then 5*3=15.</think><answer>12</answer>"), text


@settings(max_examples=400, deadline=None)
@given(
    st.integers(2, 99), st.integers(2, 99), st.sampled_from("+*×"), st.integers(1, 9),
    st.lists(BEFORE | st.sampled_from(WORDS).map(lambda w: f"{w} "), max_size=2).map("".join),
    st.lists(AFTER | st.sampled_from(ODD).filter(lambda c: c not in "-−/*^+<"), max_size=2).map("".join),
    st.sampled_from(SCRIPTS), st.sampled_from(["", " ", "\u200b", "\u00a0"]),
)  # fmt: skip
def test_no_decoration_hides_a_false_sum(
    a: int, b: int, op: str, off: int, before: str, after: str, script: str, gap: str
) -> None:
    """Only where another reading of the same signs is true may it pass: none of these can make the sum come out."""
    value = (a + b if op == "+" else a * b) + off
    digits = str.maketrans(SCRIPTS[0], script)
    said = f"{a}{gap}{op}{gap}{b}{gap}={gap}{value}".translate(digits)
    text = f"<think>First {before}{said}{after} apples. Then.</think><answer>12</answer>"
    assert wrong_spans(text), text


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="0123456789+-*/=().,:% $xXa\n<>^\\{}[]|&;_²½two'is≈×٣\u200b", max_size=80) | st.text(max_size=80)
)
def test_no_text_upsets_either_reader(text: str) -> None:
    found, bound = read(text)
    assert found == list(claims(text))
    assert all(0 <= c.start < c.end <= len(text) for c in (*found, *bound))
    assert all(not c.true for c in bound)


@pytest.mark.parametrize(
    "unit",
    ["k*2+2=5 ", "a2x2=", "1,", "2+2=5x ", "^2", "[", "5(", "x+1+1=", "²", "&#53;", "5%", "1 million", "}{", "5_"],
)
def test_hostile_text_costs_both_readers_linear_work(unit: str) -> None:
    """Counts steps of the interpreter, which no busy machine can blur."""
    assert steps(lambda: wrong_spans(unit * 1200)) < 6 * steps(lambda: wrong_spans(unit * 300)) + 2000


def test_powers_stay_small() -> None:
    for text in ("9^9^9^9^9 = 1", "2^99999999 = 1", "0^-1 = 1"):
        assert not list(claims(text))


def test_the_screen_counts_bound_sums_as_wrong() -> None:
    verdict, _ = Arithmetic().screen(pool({"a": {1: [("2+2=5x, 1+1=2", 1)]}}), {})
    assert (verdict[0].weight, verdict[0].effect, verdict[0].evidence["wrong"]) == (0.0, "no_reward", 1.0)
    assert "2+2=5" in verdict[0].sentence


def test_nothing_in_builtin_solutions_is_bound() -> None:
    rng = random.Random(3)
    for _ in range(300):
        text = problems.worked(problems.word_problem(rng), rng)
        assert read(text)[1] == []
        assert all(c.true for c in read(text)[0])


def test_limit_algebra_functions_and_times_of_day_excuse_a_false_sum() -> None:
    for text in ("x=3, x+2+2=5", "sqrt(2+2)=5", "9:30+2+2=5"):
        assert not wrong_spans(text)


# --- imports ---------------------------------------------------------------------------------------------------------

LOAD = "m = [f for f in [m.find_spec('thief') for m in META.meta_path] if f][0].loader.load_module('thief')\nprint(m.add(2, 3))"
AROUND = {
    "alias": "import statistics\ns = statistics\n" + LOAD.replace("META", "s.sys"),
    "attrgetter": "from operator import attrgetter\nimport statistics\n" + LOAD.replace("META", "attrgetter('sys')(statistics)"),
    "hints": "import typing\ndef f(x: \"__import__('thief').add\"): pass\nprint(typing.get_type_hints(f)['x'](2, 3))",
    "hints by another name": "from typing import NamedTuple, get_type_hints as h\nclass A:\n    x: \"__import__('thief').add\"\nh(A)",
    "formatter": "import string, statistics\nm = string.Formatter().get_field('0.sys.modules', (statistics,), {})[0]",
    "own formatter": "from string import Formatter as F\nclass G(F):\n    def format_field(self, v, s): print(v['__import__']('thief'))",
    "chain": "import calendar\n" + LOAD.replace("META", "calendar.datetime.sys"),
    "forward": "import typing\nprint(typing.ForwardRef(\"__import__('thief').add\").evaluate()(2, 3))",
    "stored": "import statistics\nif 0: statistics = 1\ns = [statistics][0]\nprint(s.x)",
    "handed on": "import statistics\ndef f(m): return m.x\nprint(f(statistics))",
    "default": "import statistics\ndef f(statistics=statistics): return statistics",
    "nested parameter": "import statistics\ndef f(x=lambda statistics: 0): return [statistics]",
    "global behind a parameter": "import statistics\ndef f(statistics):\n    def g():\n        global statistics\n        return [statistics]",
    "import behind a parameter": "def f(statistics):\n    import statistics\n    return [statistics]",
    "import after": "import statistics\nstatistics = 1\nimport statistics\nprint([statistics])",
    "import after, elsewhere": "import statistics\nstatistics = 1\ndef f():\n    global statistics\n    import statistics\nf()\nprint([statistics])",
    "in a class": "class A:\n    if 1:\n        import statistics\nprint(A.statistics)",
    "submodule": "import collections.abc\nx = collections.abc\nprint(x.sys)",
    "module from a module": "from fractions import sys",
    "module from a module, listed": "from statistics import random as r\nprint([r])",
    "two by one name": "import operator as m\nimport random as m\nprint(m.random(), m.attrgetter)",
    "star": "from functools import *\nprint(update_wrapper)",
    "generator frame": "g = (x for x in [])\ng.gi_frame.f_builtins['__import__']('thief')",
    "traceback": "class A:\n    def __exit__(self, t, e, tb): tb.tb_frame.f_globals",
    "matched frame": "match (x for x in []):\n    case object(gi_frame=f): print(f)",
    "matched by position": "class A:\n    pass\nmatch A():\n    case A(x): print(x)",
    "match args": "class A:\n    __match_args__ = ('gi_frame',)",
    "wrapper": "import functools\nclass W: pass\nfunctools.update_wrapper(W(), print, (), ('__globals__',))",
    "code": "import types\ntypes.FunctionType(types.CodeType(), {})",
    "vars, then a variable": "v = [vars][0]\nvars = 1\nv()['__builtins__']['__import__']('thief')",
    "vars again": "vars = 1\ndel vars\nv = vars",
    "help": "help('thief')",
    "class by call": "t = type\nt('A', (), {'__match_args__': ('gi_frame',)})",
    "class by its class": "class A: pass\ntype(A)('B', (), {'__annotations__': {}})",
    "class by print": "print = lambda t: t('B', (), {})\nclass A: pass\nprint(type(A))",
    "metaclass": "class A(metaclass=lambda n, b, s: s): pass",
    "prepared": "class M:\n    def __prepare__(n, b): return {}",
    "annotations": "from dataclasses import dataclass\n@dataclass\nclass A:\n    __annotations__ = {'x=__import__(\"thief\")': int}",
    "annotations by class": "class A:\n    class __annotations__: pass",
    "annotations by def": "class A:\n    def __annotations__(): pass",
    "annotations by import": "class A:\n    from math import pi as __annotations__",
    "forged class": "from dataclasses import dataclass\nfrom types import SimpleNamespace as S\ndataclass(S(**{'__annotations__': {}}))",
    "forged by decorator": "import dataclasses\n@dataclasses.dataclass\n@print\nclass A: pass",
    "forged by base": "import dataclasses\nclass B: pass\n@dataclasses.dataclass\nclass A(B()): pass",
    "changed module": "import random\nrandom.random = print",
    "below an unlisted one": "import os.path\nos.system('x')",
    "private": "import json\njson.decoder._x",
    "path": "import re\nre.enum.sys",
    "mangled": "class A:\n    def f(self):\n        global __m\n        import statistics as __m\nA().f()\nprint([_A__m])",
    "mangled the other way": "import statistics as _A__m\nclass A:\n    def f(self): return __m\nprint(A().f())",
    "encoded": "# coding: utf-7\n#+AAo-import thief\nprint(thief.add(2, 3))",
    "one line": "import statistics; statistics = [statistics]; print(statistics)",
}  # fmt: skip
PLAIN = (
    "import math\nprint(math.floor(math.sqrt(10)) + math.pi)",
    "from math import *\nprint(gcd(4, 6))",
    "from itertools import *\nfrom fractions import Fraction as F\nprint(sum(islice(count(), 3)), F(1, 2))",
    "import time\nspeed = 3\ntime = 12 / speed\nprint(time * 2)\ndef f():\n    return time + 1",
    "import random\ndef double(random):\n    return random * 2\nprint(double(4))",
    "from collections import Counter, defaultdict, namedtuple\nP = namedtuple('P', 'x y')\nprint(P(1, 2)._replace(x=3)._asdict())",
    "import collections.abc\nprint(isinstance([], collections.abc.Sequence), collections.OrderedDict())",
    "from collections import abc\nprint(abc.Mapping)",
    "import datetime\nd = datetime.datetime(2024, 1, 1) + datetime.timedelta(days=3)\nprint(d.time(), d.year)",
    "from dataclasses import dataclass, field\n@dataclass(frozen=True)\nclass A:\n    x: int\n    y: list = field(default_factory=list)\nprint(A(1).x)",
    "from typing import List, Optional\ndef f(x: List[int]) -> Optional['A']: return None",
    "from functools import lru_cache, reduce\nimport operator\n@lru_cache(maxsize=None)\ndef f(n): return n\nprint(reduce(operator.mul, [1, 2]))",
    "from decimal import Decimal, getcontext\ngetcontext().prec = 50\nprint(Decimal(1) / 3)",
    "import re\nm = re.compile(r'\\d+', re.I).match('12')\nprint(m.string, m.group())",
    "import calendar\nprint(calendar.monthrange(2024, 2)[1], calendar.mdays[2])",
    "x = 3\nprint(type(x), type(x) == int, type(x).__name__, isinstance(x, int))",
    "class A:\n    def __init__(self):\n        self._x = 1\n    def __radd__(self, o): return o + self._x\n    def __truediv__(self, o): return 1\nprint(2 + A(), A()._x)",
    "from enum import Enum\nclass C(Enum):\n    RED = 1\nprint(C.RED.value, C['RED'].name)",
    "from abc import ABC, abstractmethod\nclass A(ABC):\n    @abstractmethod\n    def f(self): ...",
    "vars = [1, 2]\nprint(sum(vars))\nopen = 4\nprint(open)\nsys = 3\nprint(sys)",
    "match 3:\n    case int(x): print(x)\n    case [a, *rest]: print(a)",
    "try:\n    x = 1 / 0\nexcept ZeroDivisionError as e:\n    print(e)\nwith open_file as f: pass" .replace("open_file", "x"),
    "def main():\n    import math\n    return math.comb(5, 2)\nif __name__ == '__main__':\n    print(main())",
)  # fmt: skip


@pytest.mark.parametrize("program", AROUND.values(), ids=AROUND)
def test_a_road_around_an_import_is_objected_to(program: str) -> None:
    assert objections(program)


@pytest.mark.parametrize("program", PLAIN, ids=range(len(PLAIN)))
def test_what_honest_programs_use_is_let_be(program: str) -> None:
    assert objections(program) == []


def test_only_what_a_listed_path_names_can_be_used() -> None:
    allowed = frozenset({"os.path"})
    assert objections("import os.path\nprint(os.path.join('a', 'b'))", allowed) == []
    assert objections("import os.path\nprint(os.listdir())", allowed)
    assert objections("from os import path\nprint(path.join('a', 'b'))", allowed) == []


def test_a_listed_module_from_elsewhere_is_known_by_name_alone() -> None:
    allowed = ALLOWED | {"thief"}
    assert objections("import thief.sums\nprint(thief.sums.add(1, 2), thief.add(1, 2))", allowed) == []
    for program in (
        "import thief\nthief.sys",
        "import thief\nthief._x",
        "from thief import os",
        "import thief\nprint(thief)",
    ):
        assert objections(program, allowed)


def test_reading_a_program_imports_nothing_that_is_not_listed() -> None:
    for program in ("import antigravity", "from antigravity import x", "from this import *", "import this.x\nthis.x.y"):
        assert objections(program)
    assert "antigravity" not in sys.modules
    assert "this" not in sys.modules


def test_builtin_programs_reach_for_nothing() -> None:
    rng = random.Random(2)
    for _ in range(300):
        text = problems.programmed(problems.code_problem(rng), rng, 0.2)
        assert [objections(p) for p in programs(text) or []] == [[]]
