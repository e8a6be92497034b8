"""The site: `make docs` builds it into build/site, and any warning is an error.

The source is the whole checkout, so that README, SECURITY, the pages of docs/ and the notebooks stay where a code host
shows them, and links between them are checked as they stand.
"""

from __future__ import annotations

import re
from importlib.metadata import version as _version
from pathlib import Path
from typing import Any

import typer
from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx import addnodes
from sphinx.application import Sphinx

project = "Assay"
author = "The Assay authors"
copyright = "The Assay authors, Apache-2.0"
release = version = _version("assay")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/reference/*.md", "examples/*.ipynb"]
exclude_patterns = [".*", "build", "dist", "results", "runs", "scripts", "src", "tests"]

myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are run by tests/test_notebooks.py

default_role = "code"  # docstrings write `name` as Markdown does
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100

smartquotes = False  # --set is no dash

html_theme = "furo"
html_title = "Assay"
html_extra_path = ["root"]  # an index.html that leads to the first page
html_copy_source = False


class CommandHelp(Directive):
    """`--help` of the command and of all below it, as the installed parser says it."""

    def run(self) -> list[nodes.Node]:
        from assay.cli import app

        found: list[nodes.Node] = []

        def add(command: Any, path: str) -> None:
            context = typer.Context(command, info_name=path, max_content_width=100, terminal_width=100)
            if hasattr(command, "commands"):
                for name, one in command.commands.items():
                    add(one, f"{path} {name}")
                return
            options = [p.get_help_record(context) for p in command.params]
            section = nodes.section(ids=[nodes.make_id(path)], names=[path])
            section += nodes.title("", path)
            section += nodes.paragraph("", re.sub(r"\s+", " ", command.help or "").strip())
            section += _table([record for record in options if record])
            found.append(section)

        add(typer.main.get_command(app), "assay")
        return found


def _table(rows: list[tuple[str, str]]) -> nodes.definition_list:
    found = nodes.definition_list()
    for name, words in rows:
        said = nodes.paragraph("", words.replace("\\[", "["))  # escaped for the terminal's markup
        found += nodes.definition_list_item("", nodes.term("", "", nodes.literal("", name)), nodes.definition("", said))
    return found


def _as_markdown(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are prose with `code`, as in Markdown: `|` and `*` are themselves, indented blocks are code."""
    out: list[str] = []
    code = False
    for i, line in enumerate(lines):
        indented = line.startswith("    ")
        if indented and not code and i and not lines[i - 1].strip():
            out += ["::", ""]
            code = True
        elif line.strip() and not indented:
            code = False
        if not (code or line.lstrip().startswith((">>>", "..."))):
            parts = re.split(r"(`[^`]*`)", line)
            line = "".join(p if p.startswith("`") else re.sub(r"([|*])", r"\\\1", p) for p in parts)
        out.append(line)
    lines[:] = out


def _folders(app: Sphinx, doctree: nodes.document) -> None:
    """A link to a folder of the checkout (a code host shows it) is text here; one to nothing stays an error."""
    here = Path(str(app.env.doc2path(app.env.docname))).parent
    for link in list(doctree.findall(addnodes.pending_xref)):
        if link["reftype"] == "myst" and (here / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def setup(app: Sphinx) -> None:
    app.add_directive("assay-commands", CommandHelp)
    app.connect("autodoc-process-docstring", _as_markdown)
    app.connect("doctree-read", _folders)
