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
from assay.swarm.screens.unread import read
from swarm_pools import pool

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
    assert steps(unit * 1200) < 6 * steps(unit * 300) + 2000


def steps(text: str) -> int:
    count = 0

    def trace(frame: object, event: str, arg: object) -> object:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        wrong_spans(text)
    finally:
        sys.settrace(before)
    return count


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
