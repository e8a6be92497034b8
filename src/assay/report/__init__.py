"""One self-contained HTML page that compares runs: `write(run_dirs, out)`.

The page needs no network: plotly.js is inlined once, fonts are the reader's own. What comes from a run (participants'
names, sentences, answers) is hostile text, so there are three walls: `load` makes control characters visible, Jinja
escapes everything it prints, and the page's Content-Security-Policy runs only the two scripts whose hashes it lists
and loads nothing from anywhere. Data travels as JSON in an inert script tag and reaches the page by `textContent`.
The same runs give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from assay import run_dir
from assay.report import swarm_view, view, words
from assay.report.load import load_runs
from assay.report.records import ReportError, clean

__all__ = ["Page", "ReportError", "render", "write"]

SCRIPTS = ("charts.js", "state.js", "federated.js", "swarm.js", "people.js", "page.js", "live.js")
"""Parts of one function, in this order."""
FEDERATED = {"name": "federated", "title": "Federated fine-tuning", "unit": "round"}
SWARM = {"name": "swarm", "title": "Swarm", "unit": "iteration"}


@dataclass(frozen=True, slots=True)
class Page:
    """One page: as it is opened, and without the 5 MB of plotly.js, to be put in its place."""

    whole: str
    without_plotly: str


def render(run_dirs: Sequence[Path], title: str = "Assay report", version: str = "") -> Page:
    """The page that compares `run_dirs`, in this order, a section for each wing.

    With a `version` it is one that `assay watch` serves: it may ask its own server, and only that, for a newer one.
    A run without `summary.json` is shown as unfinished. Raises ReportError, one line that says what to do, where a
    directory is no run or a file is damaged.
    """
    federated, swarm = load_runs(run_dirs)
    plotly, script = _plotly(), _script()
    data = {**view.payload(federated), "swarm": swarm_view.payload(swarm)}
    wings: list[dict[str, object]] = []
    if federated:
        wings.append({**FEDERATED, "runs": federated, "page": view.build(federated)})
    if swarm:
        wings.append({**SWARM, "runs": swarm, "page": swarm_view.build(swarm)})
    context: dict[str, object] = {
        "title": clean(title),
        "version": version,
        "wings": wings,
        # text of JSON is not HTML: < > & leave as \u escapes, so that no participant can close the tag
        "data": Markup(_json(data)),
        "style": Markup(_packaged("style.css")),
        "script": Markup(script),
        "plotly": Markup(plotly),
        "csp": " ".join(f"'sha256-{_digest(text)}'" for text in (script, plotly)),
    }
    template = _environment().get_template("page.html")
    return Page(template.render(context), template.render({**context, "plotly": ""}) if version else "")


def write(run_dirs: Sequence[Path], out: Path, title: str = "Assay report") -> Path:
    """Write the page of `render` and return its path: `out`, or `report.html` in it where it is a directory.

    Raises ReportError as `render` does, and where the file cannot be written.
    """
    html = render(run_dirs, title).whole
    target = out / run_dir.REPORT if out.is_dir() else out
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(html, encoding="utf-8", newline="\n")
        os.replace(partial, target)
    except OSError as error:
        raise ReportError(f"cannot write {target} ({error.strerror}): choose another place for the report") from error
    return target


def _json(value: Mapping[str, object]) -> str:
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII, so U+2028 is an escape too
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _packaged(name: str) -> str:
    return (Path(__file__).parent / "static" / name).read_text(encoding="utf-8")


@cache
def _script() -> str:
    parts = "\n".join(_packaged(name) for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}}})();\n'


@cache
def _plotly() -> str:
    # the browser hashes what it parsed, and HTML parsing turns \r\n into \n
    return str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")


@cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("assay.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "whole": lambda value: words.fixed(value, 0),
        "tenth": lambda value: words.fixed(value, 1),
        "capitalize_first": lambda value: f"{value[:1].upper()}{value[1:]}",
        "rate": lambda value: words.fixed(value, 2),
        "fine": lambda value: words.fixed(value, 3),
        "seconds": words.seconds,
        "shell": lambda value: shlex.quote(str(clean(str(value)))),
    }
    return found
