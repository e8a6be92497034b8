"""Numbers and findings in words: how a figure is rounded, and the headline sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal

from assay.report.load import Run

LONGEST = 600  # characters of an answer or a sentence that are shown


def headline(runs: Sequence[Run]) -> list[tuple[str, int | None]]:
    """The finding in one or two sentences, as pieces of text; a piece with a number is the label of that run."""
    done = [(i, run) for i, run in enumerate(runs) if run.finished]
    if not done:
        return [("No run is finished yet; what there is so far is below.", None)]
    attacked = [(i, run) for i, run in done if run.malicious]
    pieces: list[tuple[str, int | None]] = []
    if attacked:
        bad, every = ({count(run) for _, run in attacked} for count in (_malicious, _total))
        pieces.append((f"{span(bad)} of {span(every)} clients {'was' if bad == {1} else 'were'} malicious. ", None))
    elif all(role == "honest" for _, run in done for role in run.roles.values()):
        pieces.append(("Every client was honest. ", None))
    else:
        pieces.append(("Which clients were malicious is not known. ", None))
    measured = [(i, r) for i, r in attacked or done if None not in (r.start("refusal_rate"), r.end("refusal_rate"))]
    if not measured:
        return [*pieces, ("Refusal of harmful prompts was not measured.", None)]
    subject = "the model’s refusal of harmful prompts"
    undefended = [run for _, run in measured if run.kind == "undefended"]  # of a grid: at every share, for every attack
    bare = min(undefended, key=lambda run: run.end("refusal_rate") or 0.0, default=None)
    rest = [(i, run) for i, run in measured if run.kind != "undefended"]
    if len(rest) > 3:  # the best and the worst end
        ranked = sorted(rest, key=lambda item: -(item[1].end("refusal_rate") or 0.0))
        rest = [ranked[0], ranked[-1]]
    if bare is not None:
        worst = " at worst" if len(undefended) > 1 else ""
        pieces.append((f"Undefended, {subject} {_moved(bare)}{worst}", None))
    for turn, (i, run) in enumerate(rest):
        if bare is not None:
            before = "; with " if turn == 0 else ", with "
            after = f"{' it ended' if turn == 0 else ''} at {fixed(run.end('refusal_rate'), 2)}"
        else:
            before, after = ("With ", f", {subject} ") if turn == 0 else ("; with ", " it ")
            after += _moved(run)
        pieces += [(before, None), (run.label, i), (after, None)]
    return [*pieces, (".", None)]


def _moved(run: Run) -> str:
    start, end = fixed(run.start("refusal_rate"), 2), fixed(run.end("refusal_rate"), 2)
    if start == end:
        return f"stayed at {end}"
    return f"{'fell' if float(end) < float(start) else 'rose'} from {start} to {end}"


def _malicious(run: Run) -> int:
    return run.malicious


def _total(run: Run) -> int:
    return len(run.roles)


def span(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def fixed(value: float | None, places: int) -> str:
    """Rounded half up, as a reader would: 0.975 is 0.98 although the float is a hair below. None is an en dash.

    >>> fixed(0.975, 2), fixed(None, 2), fixed(-0.001, 2)
    ('0.98', '–', '0.00')
    """
    if value is None:
        return "–"
    if abs(value) >= 1e9:
        return f"{value:.2e}"
    rounded = Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP)
    return str(abs(rounded) if rounded == 0 else rounded)


def seconds(value: float | None) -> str:
    """Seconds without false precision.

    >>> seconds(3.21), seconds(1234.6), seconds(None)
    ('3.2', '1,235', '–')
    """
    return "–" if value is None else f"{value:.1f}" if value < 10 else f"{Decimal(repr(value)):,.0f}"


def shorten(text: str, longest: int = LONGEST) -> str:
    """At most `longest` characters, with a mark where something was cut."""
    text = text.strip()
    return text if len(text) <= longest else f"{text[:longest].rstrip()} …"


def plain(value: object) -> str:
    """A JSON value in a line of text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return "–" if value is None else re.sub(r"\s+", " ", str(value).lower() if isinstance(value, bool) else str(value))
