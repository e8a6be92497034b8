"""What a side of an equation comes to: exact, of bounded size, with every reading it can have."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from assay.swarm.screens.equation_tokens import Number, Token

MAX_BITS = 256  # of a numerator or denominator; a value that outgrows it is not checked

_RANK = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 3, "neg": 4, "^": 5}


@dataclass(frozen=True, slots=True)
class Side:
    """One readable side: its values (more than one where it can be read in two ways) and what comparing it takes."""

    start: int
    end: int
    values: tuple[Number, ...]
    first: Number  # its first number, which a run-on chain is held against
    decimals: int
    operators: frozenset[str]
    units: bool  # words stand among its numbers


def evaluate(items: list[Token], start: int, end: int, units: bool) -> Side | None:
    """Value of a calculation with the usual precedence; None where it has none (division by zero, too large)."""
    depth = 0
    for i in range(len(items) - 1, -1, -1):  # "(3 + 5 = 8)": a bracket still open holds the whole equation
        depth += (items[i].kind == "close") - (items[i].kind == "open")
        if depth < 0:
            if any(t.kind == "number" for t in items[:i]):
                return None  # "5 (4" is not 4
            items, start = items[i + 1 :], items[i + 1].start
            break
    # percent signs as hundredths, millions as such, and both as mere units ("= 50%" after `/ 10 * 100`)
    readings = (True, False) if any(t.kind == "percent" for t in items) else (True,)
    values = tuple(v for scaled in readings if (v := _value(items, scaled)) is not None)
    if not values:
        return None
    numbers = [t for t in items if t.kind == "number"]
    first = -numbers[0].value if items[0].text == "neg" else numbers[0].value
    operators = frozenset(t.text for t in items if t.kind == "op")
    return Side(start, end, values, first, max(t.decimals for t in numbers), operators, units)


def _value(items: list[Token], scaled: bool) -> Number | None:
    """Shunting-yard on explicit stacks: nesting costs memory, never recursion."""
    out: list[Number] = []
    stack: list[str] = []
    for token in items:
        if token.kind == "number":
            out.append(token.value)
        elif token.kind == "percent":
            out[-1] *= token.value if scaled else 1
        elif token.kind == "open" or token.text == "neg":
            stack.append(token.text)
        elif token.kind == "close":
            if not _reduce(out, stack, 0):
                return None
            stack.pop()
        elif token.kind == "op":
            if not _reduce(out, stack, _RANK[token.text]):
                return None
            stack.append(token.text)
    return out[0] if _reduce(out, stack, 0) else None


def _reduce(out: list[Number], stack: list[str], rank: int) -> bool:
    """Apply what binds at least as closely as `rank`, in place; False where that has no (bounded) value."""
    while stack and stack[-1] != "(" and _RANK[stack[-1]] >= rank:
        op, b = stack.pop(), out.pop()
        if op == "neg":
            out.append(-b)
            continue
        a = out.pop()
        if b == 0 and op in ("/", "//"):
            return False
        if op == "^":
            if not _has_power(a, b):
                return False
            c: Number = Fraction(a) ** int(b)
        else:
            c = a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else Fraction(a, b)
        if max(c.numerator.bit_length(), c.denominator.bit_length()) > MAX_BITS:
            return False
        out.append(c)
    return True


def _has_power(a: Number, b: Number) -> bool:
    """Whether a to the b is a fraction of bounded size."""
    if b.denominator != 1 or (a == 0 and b < 0):
        return False
    return (b if b > 0 else -b) * max(a.numerator.bit_length(), a.denominator.bit_length()) <= MAX_BITS


def equal(a: Number, b: Number, decimals: int, loose: bool, divides: bool) -> bool:
    """Equal, or b is a rounded to the `decimals` it shows (to a whole number only where something was divided)."""
    gap: Number = a - b if a > b else b - a
    if gap == 0 or (loose and 10 * gap <= max(a, -a)):
        return True
    return gap * 10**decimals < 1 and (decimals > 0 or divides)
