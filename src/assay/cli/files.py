"""`assay ledger` and `assay model`: what lies on this disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.common import Json, bar, show
from assay.config import ConfigError

ledger_app = typer.Typer(help="The hash-chained record of a run.", rich_markup_mode="markdown", no_args_is_help=True)
model_app = typer.Typer(help="Base models Assay knows by name.", rich_markup_mode="markdown", no_args_is_help=True)


@ledger_app.command("verify")
def ledger_verify(
    directory: Annotated[Path, typer.Argument(help="Run directory or ledger file.")],
    head: Annotated[str | None, typer.Option(help="Expected last hash; default: the one in summary.json.")] = None,
    as_json: Json = False,
) -> None:
    """Check the hash chain; names the first broken entry. Exit code 1 if there is one.

    Examples:

        assay ledger verify runs/mine

        assay ledger verify runs/mine --head 0b6da92e...   # the last hash as you wrote it down elsewhere
    """
    from assay import ledger, run_dir

    path = directory / run_dir.LEDGER if directory.is_dir() else directory
    if not path.exists():
        raise ConfigError(f"{path}: no ledger there; give a run directory")
    summary = run_dir.read_summary(path.parent)
    found = ledger.verify(path, head or (summary or {}).get("ledger", {}).get("head"))
    value = {
        "ok": found.ok,
        "entries": found.entries,
        "head": found.head,
        "first_broken": found.first_broken,
        "problem": found.problem,
    }
    text = f"ok: {found.entries} entries, head {found.head}" if found.ok else f"BROKEN: {found.problem}"
    show(value, as_json, text)
    if not found.ok:
        raise typer.Exit(1)


@model_app.command("list")
def model_list(as_json: Json = False) -> None:
    """Models known by name, and whether they are on this machine.

    Example:

        assay model list
    """
    from assay import models

    rows = [{"name": n, "description": d, "cached": models.is_cached(n)} for n, d in models.KNOWN.items()]
    text = "\n".join(f"{r['name']:<14} {'here' if r['cached'] else 'to fetch':<9} {r['description']}" for r in rows)
    show(rows, as_json, text)


@model_app.command("fetch")
def model_fetch(
    name: Annotated[str, typer.Argument(help="A name of `assay model list`, a directory or a hub id.")],
    as_json: Json = False,
) -> None:
    """Fetch a model into the cache and print where it lies.

    Example:

        assay model fetch smollm2-135m
    """
    from assay import models

    with bar() as tracker:
        path = models.resolve(name, tracker.say)
    show({"name": name, "path": str(path), "sha256": models.weights_sha256(path)}, as_json, str(path))
