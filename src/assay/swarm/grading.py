"""Whether a completion is right: the format it must have, and answers compared as numbers.

A completion is a stranger's text. Anything that is not exactly the format, or longer than an answer can be, is wrong;
nothing here raises on it, evaluates it, or takes more than linear time.
"""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 320  # characters of an answer; beyond Python's own limit int() of a longer one would raise or take long
TAG = re.compile(r"</?(?:think|answer|code)>")
THOUGHT = ("<think>", "</think>")
ANSWERED = re.compile(r"\s*<think>.*</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
PROGRAM = re.compile(r"\s*(?:<think>.*</think>\s*)?<code>(.*)</code>\s*", re.DOTALL)
# ASCII only ([0-9], not \d): digits of other scripts are text, as they are to a program that prints them
_WHOLE = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+"
NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*\\?[$€£]?\s*(?P<sign2>[-+]?)(?:(?P<whole>{_WHOLE})(?P<point>\.[0-9]*)?|(?P<bare>\.[0-9]+))"
    r"(?:[eE](?P<power>[-+]?[0-9]{1,3}))?\s*\\?[%$€£]?"
)
RATIO = re.compile(r"(?P<sign>[-+]?)\s*(?P<up>[0-9]+)\s*/\s*(?P<down>[0-9]+)")
FRAC = re.compile(r"(?P<sign>[-+]?)\s*\\[dt]?frac\{(?P<up>[0-9]+)\}\{(?P<down>[0-9]+)\}")


def final_answer(text: str) -> str | None:
    """What stands in `<answer>`: one `<think>` block, then one `<answer>` block, nothing else; else None.

    >>> final_answer("<think>1+1=2</think><answer> 2 </answer>")
    '2'
    >>> final_answer("<answer>2</answer>") is None
    True
    """
    found = ANSWERED.fullmatch(text) if _tags(text) == (*THOUGHT, "<answer>", "</answer>") else None
    return found[1].strip() if found else None


def program(text: str) -> str | None:
    """What stands in `<code>`: one block, after at most one `<think>` block, nothing else; else None.

    >>> program("<code>\\nprint(2)\\n</code>")
    'print(2)'
    """
    tags = _tags(text)
    found = PROGRAM.fullmatch(text) if tags[-2:] == ("<code>", "</code>") and tags[:-2] in ((), THOUGHT) else None
    return found[1].strip() if found else None


def _tags(text: str) -> tuple[str, ...]:
    """Every tag in its order: what is nested, repeated or misplaced shows here."""
    return tuple(found[0] for found in TAG.finditer(text))


def number(text: str) -> tuple[Fraction, bool] | None:
    """The number a text is, and whether it was written exactly (whole or as a fraction); None for any other text.

    Thousands commas, a currency sign, a percent sign (not divided by 100), decimals, powers of ten up to 999, a/b and
    LaTeX's frac. Never inf or nan.

    >>> number("$1,200.50") == (Fraction(2401, 2), False)
    True
    """
    text = text.strip()
    if len(text) > LONGEST:
        return None
    ratio = RATIO.fullmatch(text) or FRAC.fullmatch(text)
    if ratio:
        down = int(ratio["down"])
        return (Fraction(int(ratio["sign"] + ratio["up"]), down), True) if down else None
    found = NUMBER.fullmatch(text)
    if found is None or (found["sign"] and found["sign2"]):
        return None
    digits = found["bare"] or (found["whole"].replace(",", "") + (found["point"] or ""))
    whole, _, rest = digits.partition(".")
    value = Fraction(int((whole + rest) or "0"), 10 ** len(rest)) * Fraction(10) ** int(found["power"] or 0)
    return (-value if "-" in (found["sign"], found["sign2"]) else value), not (rest or found["power"])


def same(given: str | None, wanted: str) -> bool:
    """Whether a given answer is the wanted one: as numbers where both are, else the same words.

    Two exact numbers must be equal; where one has decimals (a program's 0.30000000000000004) 1e-9 of its size will do.

    >>> same("1,200.0", "1200"), same("1/2", "0.5"), same("١٢", "12"), same("nan", "12")
    (True, True, False, False)
    """
    if given is None:
        return False
    a, b = number(given), number(wanted)
    if a is None or b is None:
        if a is not b or len(given) > len(wanted) + LONGEST:
            return False
        said, meant = (" ".join(text.casefold().split()) for text in (given, wanted))
        return said == meant != ""
    if a[1] and b[1]:
        return a[0] == b[0]
    return abs(a[0] - b[0]) <= max(Fraction(1, 10**9) * max(abs(a[0]), abs(b[0])), Fraction(1, 10**12))
