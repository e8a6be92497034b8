"""`assay excise`: remove a client from a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from assay.cli.common import DataRoot, Json, bar, show


def excise(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a federated run.")],
    client: Annotated[list[str], typer.Option(help="Client to remove (may be repeated).")],
    out: Annotated[
        Path | None, typer.Option(help="Where adapter/ and excise.json go; default RUN/excised/CLIENT.")
    ] = None,
    evaluate: Annotated[bool, typer.Option(help="Measure both models where the base model is on this machine.")] = True,
    data_root: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Aggregate a run again without a client that was exposed later, and report the difference.

    Every kept update is checked against the ledger, and the run is replayed with everybody first: it must give the
    recorded models. A re-aggregation, not a retraining: the others' later updates had seen the client's.

    Examples:

        assay excise runs/mine --client client-03

        assay excise runs/mine --client client-03 --client client-07 --no-evaluate
    """
    from assay.engines.excise import excise_run

    with bar() as tracker:
        found = excise_run(directory, sorted(set(client)), out, tracker, measure=evaluate, data_root=data_root)
    show(found, as_json, _text(found))


def _text(found: dict[str, Any]) -> str:
    relative = found["distance_relative_to_the_run"]
    moved = "the run itself did not move" if relative is None else f"{relative:.1%} of how far the run moved"
    rounds = ", ".join(map(str, found["rounds_changed"])) or "none"
    lines = [
        f"removed: {', '.join(found['excised'])}; {found['updates_checked']} kept updates checked against the ledger",
        f"rounds it had weight in: {rounds}",
        f"distance to the run's adapter: {found['distance']:.4g}, {moved}",
    ]
    lines += [
        f"round {r['round']}: {r['outcome']} (was {r['was']})" for r in found["rounds"] if r["outcome"] != r["was"]
    ]
    behaviour = found["behaviour"]
    if "after" in behaviour:
        lines += [
            f"{name}: {behaviour['before'][name]:.3f} -> {value:.3f}" for name, value in behaviour["after"].items()
        ]
    else:
        lines.append(f"behaviour not measured: {behaviour['why_not']}")
    return "\n".join([*lines, f"adapter: {found['adapter']}", found["caveat"]])
