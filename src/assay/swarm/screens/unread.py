"""Sums that cannot be read for what they are bound to, taken word for word: `2+2=5x`, `k*2+2=5`, `2+2=5:00`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from assay.swarm.screens.equation_tokens import DIGITS, MAX_DIGITS, TIME, Number, Token, number, plain
from assay.swarm.screens.equation_values import Side, equal, evaluate
from assay.swarm.screens.equations import Claim, Reader, parts, placed

WINDOW = 24  # tokens on either side of an equals sign that are looked at
NEAR = 4  # of which so many may stand before the number on its right
# their values are not calculated
FUNCTIONS = frozenset(
    {"sqrt", "log", "ln", "exp", "sin", "cos", "tan", "abs", "min", "max", "gcd", "lcm", "f", "g", "h"}
)
FUNCTIONS |= {f"\\{name}" for name in FUNCTIONS}

_ENDS = re.compile(r"(?:(?<![0-9])[0-9]+x)?(?<![0-9])[0-9]+$")  # of a2, of a2x2


def read(text: str) -> tuple[list[Claim], list[Claim]]:
    """Every claim of the text, and every sum that is none and false as it stands.

    Honest writers bind numbers to names in algebra, where a name stands at more than one sign: such a name excuses the
    sum. What is refused was measured on 9,500 rewarded honest completions of small models (1) and on 3,000 solutions
    of GSM8K (4).

    >>> [[text[c.start : c.end] for c in found] for text in ("2+2=5x", "x=5, x+2+2=9") for found in read(text)]
    [[], ['2+2=5'], [], []]
    """
    said, where = plain(text)
    found: list[Claim] = []
    bound: list[Claim] = []
    for part in parts(said):
        reader = Reader(part)
        found += reader.claims()
        bound += unread(part, reader.judged)
    return placed(found, where), placed(bound, where)


def unread(tokens: list[Token], judged: set[int]) -> list[Claim]:
    """Equals signs that `claims` did not understand: what stands there word for word, where that is false."""
    out: list[tuple[Claim, set[int]]] = []
    taken: set[int] = set()  # one false sum does not excuse another, nor itself
    for at, token in enumerate(tokens):
        if token.kind != "eq" or at in judged:
            continue
        left = _before(tokens, at)
        right = left and _after(tokens, at)
        if not left or not right:
            continue
        divides = not {"/", "//"}.isdisjoint(left.operators | right.operators)
        values = {*right.values, right.first}
        if not any(equal(a, b, right.decimals, False, divides) for a in left.values for b in values):
            found = Claim(left.start, right.end, False)
            out.append((found, _names(tokens, at, found, 2)))
            taken |= _names(tokens, at, found, 5)
    if not out:
        return []
    known = {t.text for i, t in enumerate(tokens) if t.kind == "word" and i not in taken and _variable(tokens, i)}
    return [claim for claim, names in out if known.isdisjoint(tokens[i].text for i in names)]


def _names(tokens: list[Token], at: int, claim: Claim, more: int) -> set[int]:
    """Places of the variables in the claim around the sign `at`, and among the `more` tokens beside it."""
    found = set()
    for step in (-1, 1):
        here, beside = at, 0
        while 0 <= here < len(tokens) and beside <= more:
            token = tokens[here]
            outside = token.start < claim.start or token.end > claim.end
            if outside and token.kind in ("stop", "line"):
                break
            if _variable(tokens, here):
                found.add(here)
            beside += outside
            here += step
    return found


def _variable(tokens: list[Token], at: int) -> bool:
    """Whether a word stands at a sign, as in `x =`, `2 * price` or `3x`."""
    token = tokens[at]
    if token.kind != "word":
        return False
    before = tokens[at - 1] if at else None
    after = tokens[at + 1] if at + 1 < len(tokens) else None
    if after and (after.kind in ("op", "percent") or after.text in "=("):
        return after.text != "(" or after.glued
    glued = before and before.kind == "number" and token.glued and not (after and after.kind == "number")
    return bool(glued or (before and (before.kind == "op" or before.text == "=")))


def _before(tokens: list[Token], at: int) -> Side | None:
    """The longest calculation that ends at the sign `at`, whatever it is bound to; fractions are none."""
    begin = end = at
    while begin and at - begin < WINDOW:
        kind = tokens[begin - 1].kind
        if kind in ("eq", "about") or (kind in ("stop", "line") and begin < end):
            break
        begin -= 1
        end -= kind in ("stop", "line")  # those before the sign are passed over
    part = tokens[begin:end]
    if any(TIME.fullmatch(t.text) for t in part):  # 11:30 + 2 = 1:30
        return None
    side = _ending(_bare(part, -1))
    commas = _ending(_bare(part, -1, comma=True)) if any("," in t.text for t in part) else None
    return replace(side, values=(*side.values, *commas.values)) if side and commas else side


def _ending(part: list[Token]) -> Side | None:
    """The longest calculation that the tokens end with, but for units."""
    for start, token in enumerate(part):
        if token.kind in ("number", "open"):
            if start and part[start - 1].text in FUNCTIONS and token.kind == "open" and _closes(part[start:]):
                return None
            reader = Reader(part, start)
            side = reader.side()
            if side and side.operators and {t.kind for t in part[reader.at :]} <= {"word", "open", "close"}:
                return side if len(part) - reader.at < NEAR and side.operators - {"/", "//"} else None
    return None


def _after(tokens: list[Token], at: int) -> Side | None:
    """The number after the sign `at`, with what is calculated from it if that can be read."""
    part = _bare(tokens[at + 1 : at + 1 + WINDOW], 0)
    for start, token in enumerate(part[:NEAR]):
        if token.kind == "number":
            signed = bool(start and part[start - 1].text == "-")
            side = Reader(part, start - signed).side() or evaluate([token], token.start, token.end, False)
            comma = _bare(tokens[at + 1 : at + 1 + WINDOW], 0, comma=True)[start].value
            return side and replace(side, values=(*side.values, comma, *_spaced(part[start:])))
        far = token.kind == "stop" and not token.glued
        if far or token.kind in ("eq", "line", "odd") or token.text in FUNCTIONS:
            return None
    return None


def _bare(part: list[Token], piece: int, comma: bool = False) -> list[Token]:
    """Without what binds or decorates; `a2` and `a2x2` are their numbers, a list of numbers its first or last piece.

    comma: `3,5` is 3.5.
    """
    out = []
    for token in part:
        if token.kind == "odd" and token.text[-1] in DIGITS:
            pieces = re.split("[.,:_]", token.text)
            if comma and len(pieces) == 2 and "," in token.text:
                pieces = [".".join(pieces)]
            if found := number(pieces[piece]):
                token = token._replace(kind="number", value=found[0], decimals=found[1])
        elif token.kind == "word" and token.text[-1] in DIGITS:
            first, by, last = (_ENDS.search(token.text) or [""])[0].rpartition("x")
            middle = token.end - len(last)
            if by:
                start = middle - 1 - len(first)
                out.append(Token("number", first, start, middle - 1, int(first[-MAX_DIGITS:])))
                out.append(Token("op", "*", middle - 1, middle))
            token = Token("number", last, middle, token.end, int(last[-MAX_DIGITS:]))
        elif token.kind in ("odd", "decor", "money"):
            continue
        out.append(token)
    return out


def _closes(part: Sequence[Token]) -> bool:
    """Whether the bracket that comes first holds something and is closed."""
    depth = 0
    if len(part) > 1 and part[1].kind != "number":
        return False
    for token in part:
        depth += (token.kind == "open") - (token.kind == "close")
        if depth == 0:
            return True
    return False


def _spaced(part: Sequence[Token]) -> list[Number]:
    """`3 000` as one number, if it can be one."""
    value, end = part[0].value, part[0].end
    for token in part[1:4]:
        if token.kind != "number" or (token.start, token.end) != (end + 1, end + 4) or token.decimals:
            break
        value, end = 1000 * value + token.value, token.end
    return [value] if end > part[0].end and not part[0].decimals else []
