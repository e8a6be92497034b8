"""Text cut into the signs an equation is made of, in one linear pass over hostile text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from assay.swarm.screens.common import is_format

Number = int | Fraction  # whole numbers stay ints: they are most, and fractions take ten times as long
MAX_DIGITS = 18  # of one number; longer ones are not read

_TOKEN = re.compile(
    r"(?P<number>(?:(?<![\w).])\.)?[0-9]+(?:[.,:][0-9]+)*)"
    r"|(?P<times>(?<=[0-9)])[xX](?=[0-9(]))|(?P<decor>\*\*|\\boxed\{)|(?P<word>\\?[^\W\d]\w*)|(?P<mark><<|>>)"
    r"|(?P<sign>[=<>!]=|=>|->|[-+*/=()%^~])|(?P<line>\n)|(?P<other>[^\s\w])"
)
_PLAIN = re.compile(r"[0-9]*(?:\.[0-9]+)?|[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_SIGNS = str.maketrans("×✕✖⋅·∙∗÷∕⁄−–—＋＝≈：", "*******///---+=~:")
_MONEY = "$€£¥₹"
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_ROUND = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
TENS = {word: 10 * value for value, word in enumerate(_ROUND, 2)}
NUMBERS = {word: value for value, word in enumerate(_SMALL)} | TENS
ONES = frozenset(_SMALL[1:10])
_WORDS = {
    **{"plus": ("op", "+"), "minus": ("op", "-"), "times": ("op", "*")},
    **{r"\times": ("op", "*"), r"\cdot": ("op", "*"), r"\div": ("op", "/")},
    **{word: ("eq", word) for word in ("equals", "equal")},
    **{word: ("makes", word) for word in ("is", "are", "makes", "make", "gives")},
}
_KINDS = {"=": "eq", "==": "eq", "~": "about", "(": "open", ")": "close", "%": "percent"} | dict.fromkeys("+-*/", "op")


class Token(NamedTuple):
    """A sign at characters start..end.

    kind: number, op, eq, about, makes, open, close, percent, money, word, mark (<< or >>), line, decor (bold, boxed),
    stop (ends a phrase), odd (binds a number to what is none).
    """

    kind: str
    text: str
    start: int
    end: int
    value: Number = 0
    decimals: int = 0
    glued: bool = False  # no space before it


def plain(text: str) -> tuple[str, list[int] | None]:
    """The text with digits and signs of other scripts as ASCII and invisible characters dropped.

    Also where each character came from; None where nothing moved.
    """
    if text.isascii():
        return text, None
    kept = [(i, c) for i, c in enumerate(text.translate(_SIGNS)) if c.isascii() or not is_format(c)]
    digits = (c if c.isascii() or (d := unicodedata.decimal(c, None)) is None else str(d) for _, c in kept)
    return "".join(digits), [i for i, _ in kept]


def tokens(text: str) -> Iterator[Token]:
    end = 0
    for match in _TOKEN.finditer(text):
        kind, said, start = str(match.lastgroup), match[0], match.start()
        glued, end = start == end, match.end()
        value: Number = 0
        decimals = 0
        if kind == "number":
            whole, _, part = said.replace(",", "").partition(".")
            if _PLAIN.fullmatch(said) and len(whole.lstrip("0")) + len(part) <= MAX_DIGITS:
                digits, decimals = int((whole + part) or "0"), len(part)
                value = Fraction(digits, 10**decimals) if decimals else digits
            else:  # a time of day, a version, a list, more digits than anybody means
                kind = "odd"
        elif kind == "word":
            said = said.lower()
            if said in NUMBERS:
                kind, value = "number", NUMBERS[said]
            else:
                kind, said = _WORDS.get(said, ("word", said))
        elif kind == "times":
            kind, said = "op", "*"
        elif kind == "sign":
            kind = _KINDS.get(said, "odd")
        elif kind == "other":
            kind = "money" if said in _MONEY else "odd" if said in "{}[]&|" else "stop"
        yield Token(kind, said, start, end, value, decimals, glued)
