"""The `assay` command. Exit codes: 0 done, 1 a check failed (ledger broken, adapter refused), 2 bad usage or configuration."""

from __future__ import annotations

import os
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from assay import __version__
from assay.cli.bench import bench_app
from assay.cli.calibrate import calibrate
from assay.cli.common import (
    DataRoot,
    Json,
    Set,
    experiment,
    on_flower,
    print_table,
    run_all,
    runs_in,
    show,
    write_report,
)
from assay.cli.deploy import deploy_app
from assay.cli.excise import excise
from assay.cli.files import ledger_app, model_app
from assay.cli.probe import probe_app
from assay.cli.screen import screen
from assay.cli.watch import watch
from assay.config import AnyExperiment, ConfigError
from assay.progress import PROGRESS

app = typer.Typer(
    help="Screens what untrusted participants contribute to the training of a language model, before it learns.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(bench_app, name="bench")
app.command()(calibrate)
app.add_typer(deploy_app, name="deploy")
app.command()(excise)
app.command()(screen)
app.command()(watch)
app.add_typer(ledger_app, name="ledger")
app.add_typer(model_app, name="model")
app.add_typer(probe_app, name="probe")


def main() -> None:
    """Entry point: mistakes of the operator become one line on stderr and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are the parallelism
    try:
        app()
    except (ConfigError, ValueError) as error:
        # ConfigError, DataError, LedgerError, ReportError, ToleranceError: all say what to do
        if type(error) is ValueError:
            raise
        print(f"assay: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; results and errors only.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Progress as lines for a log, not as a bar.")] = False,
) -> None:
    if quiet or plain:
        os.environ[PROGRESS] = "quiet" if quiet else "plain"
    if version:
        print(__version__)
        raise typer.Exit


class Engine(StrEnum):
    """What trains the clients of a federated experiment."""

    LOCAL = "local"
    FLOWER = "flower"


class Wing(StrEnum):
    """What a demo shows."""

    BOTH = "both"
    FEDERATED = "federated"
    SWARM = "swarm"


@app.command()
def demo(
    wing: Annotated[Wing, typer.Argument(help="federated, swarm or both.")] = Wing.BOTH,
    out: Annotated[Path, typer.Option(help="Where the run directories and report.html go.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    model: Annotated[
        str, typer.Option(help="Base model of the federated wing: smollm2-135m, tiny, a directory or a hub id.")
    ] = "smollm2-135m",
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete earlier demo runs in --out first.")] = False,
    as_json: Json = False,
) -> None:
    """Poison small models, then defend them; ends with report.html.

    Federated: four runs of 10 clients and 6 rounds: honest only; attacked; attacked with `submitted`; with the paper's
    step level. Swarm: four runs of 4 nodes: honest only; one node teaches that 2+2=5; the same with the paper's logit
    check; with the seeded check. Interrupted, it goes on where it stopped.

    Examples:

        assay demo                    # both wings, about 20 minutes on two cores

        assay demo swarm              # a few minutes

        assay demo federated --model tiny --out runs/tiny
    """
    from assay.bench import federated, swarm
    from assay.config import parse

    experiments: list[AnyExperiment] = []
    if wing is not Wing.FEDERATED:
        experiments += swarm.demo(seed)
    if wing is not Wing.SWARM:
        experiments += federated.variants(parse({"seed": seed, "model": {"name": model}}))
    if fresh:
        for one in experiments:
            if (out / one.name / "resolved.json").exists():
                shutil.rmtree(out / one.name)
    summaries = run_all(experiments, out)
    page = write_report([out / e.name for e in experiments], out / "report.html")
    show({"runs": summaries, "report": str(page)}, as_json)
    if not as_json:
        print_table(list(summaries.values()))
        print(f"report: {page}")


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="Experiment in TOML, of either wing.")],
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME.")] = None,
    data_root: DataRoot = None,
    settings: Set = None,
    engine: Annotated[
        Engine,
        typer.Option(
            help="local: worker processes. flower: Flower's simulation, a node for each client or peer; same result."
        ),
    ] = Engine.LOCAL,
    as_json: Json = False,
) -> None:
    """Run one experiment; resumes where it stopped.

    Examples:

        assay run examples/federated.toml

        assay run mine.toml --out runs/mine --set defence.level=step

        assay --quiet run mine.toml --json > summary.json
    """
    one = experiment(file, data_root, settings or [])
    directory = out or Path("runs") / one.name
    run_one = on_flower if engine is Engine.FLOWER else run_all
    summary = run_one([one], directory.parent, {one.name: directory}, given=file.read_text())
    write_report([directory], directory / "report.html")
    show(summary[one.name], as_json)
    if not as_json:
        print_table(list(summary.values()))
        print(f"run: {directory}\nreport: {directory / 'report.html'}")


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="Run directories, or one folder of them.")],
    out: Annotated[Path | None, typer.Option(help="The page to write; default report.html in the first one.")] = None,
    as_json: Json = False,
) -> None:
    """Write report.html for one run or for several side by side. While a run goes on: `assay watch`.

    Examples:

        assay report runs/mine

        assay report runs/mine runs/other --out compared.html

        assay report runs/demo        # every run in the folder
    """
    found = [d for given in directories for d in runs_in(given)]
    page = write_report(found, out or directories[0] / "report.html")
    show({"report": str(page), "runs": [str(d) for d in found]}, as_json, str(page))
