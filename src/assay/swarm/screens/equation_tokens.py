"""Text cut into the signs an equation is made of, in one linear pass over hostile text."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from assay.swarm.screens.common import is_format

Number = int | Fraction  # whole numbers stay ints: they are most, and fractions take ten times as long
DIGITS = "0123456789"
MAX_DIGITS = 18  # of one number; longer ones are not read

_BLANK = (  # emphasis, thin spaces, degrees, fonts and fractions (`over` divides them)
    r"_+(?![^\W_])|`+|\\[,;:! ]|(?:(?<=[0-9])|(?<=[0-9] ))°(?:[CF]\b)?|\\[dtc]?frac(?=\{)"
    r"|\\(?:left|right|text|displaystyle|q?quad|(?:math|text)(?:rm|bf|it))(?![a-z])"
    r"|</?(?:b|i|u|em|strong|sub|span|mark|small|code|font|tt)(?: [^<>\n]{0,40})?>"
)
_TOKEN = re.compile(
    r"(?P<number>(?:(?<![\w).])\.)?[0-9]+(?:[.,:_][0-9]+)*)"
    r"|(?P<times>(?<=[0-9)])[xX](?=[0-9(]))|(?P<power>(?<=[0-9)])\*\*(?=[0-9(])|\^)|(?P<decor>\*\*|\\boxed\{)"
    rf"|(?P<mark><<|>>)|(?P<over>(?<=\}})(?=\{{))|(?P<blank>{_BLANK})|(?P<word>\\?[^\W\d_]\w*|_+[^\W\d_]\w*)"
    r"|(?P<sign>[<>!]=|=>|->|=+|[-+*/=()%~])|(?P<line>\n)|(?P<other>[^\s\w])"
)
_PLAIN = re.compile(r"[0-9]*(?:\.[0-9]+)?|[0-9]{1,3}(?:[,_][0-9]{3})+(?:\.[0-9]+)?")
TIME = re.compile(r"[0-9]{1,2}(?::[0-9]{2}){1,2}")
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z]{2,8});")
_SIGNS = str.maketrans("×✕✖⋅·∙∗⊗⊠✱⁎÷∕⁄➗−–—➖＋➕⊕⊞＝≡⩵꞊≔≙≈≅≃≒：", "***********////----++++======~~~~:")
_MONEY = "$€£¥₹"
_OTHERS = {"]": "close", "}": "close", "&": "odd", "|": "odd"}
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_ROUND = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
TENS = {word: 10 * value for value, word in enumerate(_ROUND, 2)}
NUMBERS = {word: value for value, word in enumerate(_SMALL)} | TENS
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
ONES = frozenset(_SMALL[1:10])
_WORDS = {
    **{"plus": ("op", "+"), "minus": ("op", "-"), "times": ("op", "*")},
    **{r"\equiv": ("eq", "="), r"\approx": ("about", "~")},
    **{r"\times": ("op", "*"), r"\cdot": ("op", "*"), r"\div": ("op", "/")},
    **{word: ("eq", word) for word in ("equals", "equal")},
    **{word: ("makes", word) for word in ("is", "are", "makes", "make", "gives")},
}
_KINDS = {"=": "eq", "~": "about", "(": "open", ")": "close", "%": "percent"} | dict.fromkeys("+-*/", "op")


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
    """The text with digits and signs of other scripts, raised and circled ones and HTML's as ASCII, invisible ones dropped.

    Also where each character came from; None where nothing moved.

    >>> plain("2\u200b+２&equals;5²")[0]
    '2+2=5^2'
    """
    if text.isascii() and "&" not in text:
        return text, None
    said: list[str] = []
    where: list[int] = []
    raised, at = False, 0
    while at < len(text):
        begun, character = at, text[at]
        at += 1
        if character == "&" and (entity := _ENTITY.match(text, begun)):
            meant = html.unescape(entity[0])
            if len(meant) == 1:
                at, character = entity.end(), meant
        shown, place = (character, "") if character.isascii() else _shown(character)
        before = said[-1] if said else ""
        if place == "super" and not raised:  # a power of a number, else of a unit (5 m²), which is part of its name
            shown = "^" + shown if before.isdigit() or before == ")" else ""
        elif place == "fraction" and before.isdigit():
            shown = shown.removeprefix("0") if "." in shown else " " + shown
        elif place == "sub" and before.isalnum():
            shown = ""
        raised = place == "super" and bool(shown)
        said += shown
        where += [begun] * len(shown)
    return "".join(said), where


@lru_cache(4096)
def _shown(character: str) -> tuple[str, str]:
    """A character that is no ASCII as the digits or sign it shows, and where it stands: super, sub, fraction or ""."""
    character = character.translate(_SIGNS)
    category = unicodedata.category(character)
    if character.isascii():
        return character, ""
    if is_format(character) or category in ("Mn", "Me"):  # accents, strokes and frames around what is meant
        return "", ""
    place = unicodedata.decomposition(character).partition(">")[0].strip("<")
    if place == "fraction":
        value = Fraction(unicodedata.numeric(character)).limit_denominator(1000)
        finite = 1000 % value.denominator == 0
        return (f"{float(value):g}" if finite else f"{value.numerator}/{value.denominator}"), place
    if (digit := unicodedata.digit(character, None)) is not None:
        return str(digit), place if place in ("super", "sub") else ""
    value_of = unicodedata.numeric(character, None) if category in ("No", "Nl") else None
    if value_of is not None and value_of == int(value_of) and 0 <= value_of < 10**6:  # ⑫, Ⅴ
        return str(int(value_of)), ""
    simple = unicodedata.normalize("NFKC", character).translate(_SIGNS)
    if len(simple) == 1 and simple.isascii() and not simple.isalpha():
        return simple, place if place in ("super", "sub") else ""
    return character, ""


def tokens(text: str) -> Iterator[Token]:
    end = 0
    for match in _TOKEN.finditer(text):
        kind, said, start = str(match.lastgroup), match[0], match.start()
        if kind == "blank":
            continue
        glued, end = start == end, match.end()
        value: Number = 0
        decimals = 0
        if kind == "number":
            if _PLAIN.fullmatch(said) and (found := number(said)):
                value, decimals = found
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
        elif kind == "over":  # \frac{1}{2}
            kind, said = "op", "//"
        elif kind == "power":
            kind, said = "op", "^"
        elif kind == "sign":
            said = said if said.strip("=") else "="
            kind = _KINDS.get(said, "odd")
            value = Fraction(1, 100) if said == "%" else 0
        elif kind == "other" and said in "[{":
            kind, said = "open", "("
        elif kind == "other":
            kind = "money" if said in _MONEY else _OTHERS.get(said, "stop")
        yield Token(kind, said, start, end, value, decimals, glued)


def number(said: str) -> tuple[Number, int] | None:
    """Value and decimals of digits with a point and separators; None where there are too many digits, or none."""
    whole, _, part = said.replace(",", "").replace("_", "").partition(".")
    if not said or len(whole.lstrip("0")) + len(part) > MAX_DIGITS:
        return None
    digits = int((whole + part) or "0")
    return (Fraction(digits, 10 ** len(part)) if part else digits), len(part)
