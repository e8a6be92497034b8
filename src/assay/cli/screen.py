"""`assay screen`: verdicts on LoRA adapters that lie on a disk or on the hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from assay.cli.common import Json, bar, show
from assay.data import TEMPLATES

if TYPE_CHECKING:
    from assay.engines.screen import Screening


def screen(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Adapter folders, folders of many, or hub:owner/name.")
    ],
    base: Annotated[
        str | None, typer.Option(help="Base model (directory, hub id, known name): measures the canary on each.")
    ] = None,
    probe: Annotated[Path | None, typer.Option(help="Probe file of `assay probe fit --benign-adapters ...`.")] = None,
    honest: Annotated[
        list[str] | None, typer.Option(help="Adapters known to be good; they set the limits (may be repeated).")
    ] = None,
    refusals: Annotated[
        Path | None, typer.Option(help="Your harmful prompts with refusals (JSON lines); default: built-in, public.")
    ] = None,
    safe: Annotated[
        Path | None, typer.Option(help="Your safe prompts with answers (JSON lines); default: built-in, public.")
    ] = None,
    template: Annotated[str, typer.Option(help=f"Prompt template: {', '.join(TEMPLATES)}.")] = "chatml",
    spectral: Annotated[
        bool | None,
        typer.Option(
            "--spectral/--no-spectral",
            help="Compare the adapters with each other (weak). Default: only where nothing else is given.",
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 also for reduced weights (copies, review).")] = False,
    as_json: Json = False,
) -> None:
    """Judge PEFT LoRA adapters before they are merged, served or averaged.

    Exit codes: 0 all admitted, 1 an adapter was refused, 2 bad usage. Without --base, --probe or --honest only form is
    looked at, and the output says so.

    Examples:

        assay screen adapters/                 # form only

        assay screen adapters/ --base ./model --honest known-good/ --probe probe.safetensors

        assay screen hub:owner/name --base smollm2-135m --json
    """
    from assay.engines.screen import screen_adapters

    with bar() as tracker:
        found = screen_adapters(
            paths, base=base, probe=probe, honest=honest or (), refusals=refusals, safe=safe, template=template,
            spectral=spectral, tracker=tracker,
        )  # fmt: skip
    if as_json:
        show(found.as_dict(), True)
    else:
        print_screening(found)
    if found.refused or (strict and found.reduced):
        raise typer.Exit(1)


def print_screening(found: Screening) -> None:
    """A row an adapter, the warnings below it. Strangers' words are shown as text, never as markup."""
    table = Table(box=None, caption=f"screens: {', '.join(found.screens)}")
    for name, options in (
        ("adapter", {"overflow": "fold"}), ("verdict", {"no_wrap": True}), ("reason", {"no_wrap": True}),
        ("why", {"overflow": "fold"}),
    ):  # fmt: skip
        table.add_column(name, **options)
    for verdict in found:
        word = "admitted" if verdict.weight == 1 else "REFUSED" if verdict.weight == 0 else f"x {verdict.weight:.2f}"
        why = "" if verdict.weight == 1 else f"{verdict.screen}: {verdict.sentence}"
        table.add_row(*(Text(_plain(cell)) for cell in (verdict.participant, word, verdict.reason.value, why)))
    Console().print(table)
    for warning in found.warnings:
        print(f"note: {warning}", file=sys.stderr)


def _plain(text: str) -> str:
    """Without control characters: a folder's name may hold an escape sequence for the terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
