"""The `assay` command. Exit codes: 0 done, 1 a check failed (ledger broken), 2 bad usage or configuration."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from assay import __version__
from assay.config import ConfigError, Experiment

app = typer.Typer(
    help="Screens what untrusted participants contribute to the training of a language model, before it learns.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
ledger_app = typer.Typer(help="The hash-chained record of a run.", no_args_is_help=True)
model_app = typer.Typer(help="Base models Assay knows by name.", no_args_is_help=True)
probe_app = typer.Typer(help="Probes on LoRA updates.", no_args_is_help=True)
bench_app = typer.Typer(help="Measured proof: suites of attacks and defences.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(ledger_app, name="ledger")
app.add_typer(model_app, name="model")
app.add_typer(probe_app, name="probe")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout and nothing else.")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder that relative data paths of the config start from.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Change one key: --set defence.level=step (may be repeated).")
]


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
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def show(value: Any, as_json: bool, text: str = "") -> None:
    """JSON on stdout, or the text form."""
    print(json.dumps(value, indent=2) if as_json else text)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the run directories and report.html go.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    model: Annotated[
        str, typer.Option(help="Base model: smollm2-135m, tiny, a directory or a hub id.")
    ] = "smollm2-135m",
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete earlier demo runs in --out first.")] = False,
    as_json: Json = False,
) -> None:
    """Poison a small model through half of its clients, then defend it; ends with report.html.

    Four runs of 10 clients and 6 rounds: honest only; attacked; attacked with `submitted`; with the paper's step level.
    Interrupted, it goes on where it stopped.
    """
    from assay.bench.federated import variants
    from assay.config import parse

    experiments = variants(parse({"seed": seed, "model": {"name": model}}))
    if fresh:
        for experiment in experiments:
            if (out / experiment.name / "resolved.json").exists():
                shutil.rmtree(out / experiment.name)
    summaries = _run_all(experiments, out)
    page = _write_report([out / e.name for e in experiments], out / "report.html")
    show({"runs": summaries, "report": str(page)}, as_json)
    if not as_json:
        _print_table(list(summaries.values()))
        print(f"report: {page}")


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="Experiment in TOML.")],
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<name>.")] = None,
    data_root: DataRoot = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Run one experiment; resumes where it stopped."""
    experiment = _experiment(file, data_root, settings)
    directory = out or Path("runs") / experiment.name
    summary = _run_all([experiment], directory.parent, {experiment.name: directory}, given=file.read_text())
    _write_report([directory], directory / "report.html")
    show(summary[experiment.name], as_json)
    if not as_json:
        _print_table(list(summary.values()))
        print(f"run: {directory}\nreport: {directory / 'report.html'}")


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="Run directories, or one folder of them.")],
    out: Annotated[Path | None, typer.Option(help="The page to write; default report.html in the first one.")] = None,
    as_json: Json = False,
) -> None:
    """Write report.html for one run or for several side by side."""
    found = [d for given in directories for d in _runs_in(given)]
    page = _write_report(found, out or directories[0] / "report.html")
    show({"report": str(page), "runs": [str(d) for d in found]}, as_json, str(page))


@bench_app.command("federated")
def bench_federated(
    config_file: Annotated[Path | None, typer.Option("--config", help="Base experiment; default: the demo's.")] = None,
    levels: Annotated[str, typer.Option(help="Levels to try, separated by commas.")] = "submitted,step,client,shadow",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0",
    out: Annotated[Path, typer.Option(help="Folder of the run directories.")] = Path("runs/bench"),
    results: Annotated[Path | None, typer.Option(help="JSON file to write the rows to.")] = None,
    data_root: DataRoot = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Honest only, undefended and every level, for every seed: rows of attack, defence, share, seed and metrics."""
    from assay.bench import federated
    from assay.checkpoint import write_json

    base = _experiment(config_file, data_root, settings)
    wanted = [level.strip() for level in levels.split(",") if level.strip()]
    if not (numbers := [s.strip() for s in seeds.split(",")]) or not all(n.isdigit() for n in numbers):
        raise ConfigError(f"--seeds: {seeds!r} is not a list of whole numbers such as 0,1,2")
    experiments = federated.suite(base, wanted, [int(n) for n in numbers])
    summaries = _run_all(experiments, out)
    found = federated.results(shlex.join(["assay", *sys.argv[1:]]), base, experiments, summaries)
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
        write_json(results, found)
    page = _write_report([out / e.name for e in experiments], out / "report.html")
    show(found, as_json)
    if not as_json:
        _print_table(list(summaries.values()))
        print(f"report: {page}")


@ledger_app.command("verify")
def ledger_verify(
    directory: Annotated[Path, typer.Argument(help="Run directory or ledger file.")],
    head: Annotated[str | None, typer.Option(help="Expected last hash; default: the one in summary.json.")] = None,
    as_json: Json = False,
) -> None:
    """Check the hash chain; names the first broken entry. Exit code 1 if there is one."""
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
    """Models known by name, and whether they are on this machine."""
    from assay import models

    rows = [{"name": n, "description": d, "cached": models.is_cached(n)} for n, d in models.KNOWN.items()]
    text = "\n".join(f"{r['name']:<14} {'here' if r['cached'] else 'to fetch':<9} {r['description']}" for r in rows)
    show(rows, as_json, text)


@model_app.command("fetch")
def model_fetch(name: str, as_json: Json = False) -> None:
    """Fetch a model into the cache and print where it lies."""
    from assay import models

    with _bar() as tracker:
        path = models.resolve(name, tracker.say)
    show({"name": name, "path": str(path), "sha256": models.weights_sha256(path)}, as_json, str(path))


@probe_app.command("fit")
def probe_fit(
    out: Annotated[Path, typer.Argument(help="Probe file to write (safetensors).")],
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Experiment whose model, data and training it is for.")
    ] = None,
    benign: Annotated[int, typer.Option(help="Benign trajectories.")] = 12,
    malicious: Annotated[int, typer.Option(help="Malicious trajectories.")] = 12,
    data_root: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Collect labelled updates on the operator's part of the data and fit the paper's probe."""
    from assay.federated.collect import CollectSettings
    from assay.federated.population import load_sources
    from assay.federated.preparation import make_probe

    experiment = _experiment(config_file, data_root)
    with _bar() as tracker, _prepared(experiment, tracker) as (prepared, compute):
        counts = CollectSettings(benign=benign, malicious=malicious)
        sources = load_sources(experiment)
        probe = make_probe(experiment, prepared, compute, sources, compute.initial(), tracker, counts)
    probe.save(out)
    show({"probe": str(out), **probe.meta}, as_json, f"{out}: {json.dumps(probe.meta)}")


@probe_app.command("eval")
def probe_eval(
    probe_file: Annotated[Path, typer.Argument(help="Probe file.")],
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Experiment whose clients it is tried on.")
    ] = None,
    data_root: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Score a probe on fresh first-round updates of the experiment's own clients (rows the probe has not seen)."""
    from assay.federated.collect import evaluate_probe
    from assay.federated.compute import TrainJob
    from assay.federated.population import load_sources, make_attack, make_clients, seed_of
    from assay.federated.preparation import client_settings
    from assay.federated.probe import Probe, feature_deltas

    probe = Probe.load(probe_file)
    experiment = _experiment(config_file, data_root)
    clients, attack = make_clients(experiment, load_sources(experiment)), make_attack(experiment)
    with _bar() as tracker, _prepared(experiment, tracker) as (prepared, compute):
        if probe.base_sha256 and probe.base_sha256 != prepared.base_sha256:
            raise ConfigError(f"{probe_file}: fitted on another base model; fit one with `assay probe fit`")
        initial, settings = compute.initial(), client_settings(experiment, 1)
        tracker.add(float(len(clients)))
        rows = [c.rows(attack, experiment.attack.from_round, seed_of(experiment.seed, c.name)) for c in clients]
        made = compute.train([TrainJob(initial, r, settings) for r in rows], lambda n: tracker.tick(n))
    delta_ND = feature_deltas([m.tensors for m in made], initial, probe.features)
    quality = evaluate_probe(probe, delta_ND, [c.malicious for c in clients], probe.threshold)
    show({"probe": str(probe_file), "clients": len(clients), **quality}, as_json, json.dumps(quality))


def _experiment(file: Path | None, data_root: Path | None, settings: list[str] | None = None) -> Experiment:
    """The experiment of a file (default: the demo's setting) with `--set` changes applied."""
    from assay import config

    experiment = config.load(file, data_root=data_root) if file else config.Experiment()
    for setting in settings or []:
        experiment = config.assign(experiment, setting)
    return experiment


@contextmanager
def _bar() -> Iterator[Any]:
    from assay.progress import Bar

    with Bar() as bar:
        yield bar


@contextmanager
def _prepared(experiment: Experiment, tracker: Any) -> Iterator[tuple[Any, Any]]:
    """The base and the worker pool of an experiment."""
    from assay.engines.pool import Pool
    from assay.federated.preparation import prepare

    prepared = prepare(experiment, tracker)
    with Pool(str(prepared.path), prepared.dtype, experiment.lora, experiment.workers) as pool:
        yield prepared, pool


def _run_all(
    experiments: list[Experiment], out: Path, where: dict[str, Path] | None = None, given: str = ""
) -> dict[str, dict[str, Any]]:
    """Run experiments that share model and LoRA settings on one pool, under one progress bar."""
    from assay import run_dir
    from assay.engines import local

    where = where or {}
    command = shlex.join(["assay", *sys.argv[1:]])
    summaries: dict[str, dict[str, Any]] = {}
    with _bar() as tracker:
        for experiment in experiments:
            if run_dir.read_summary(where.get(experiment.name, out / experiment.name)) is None:
                tracker.add(local.units(experiment))
        with _prepared(experiments[0], tracker) as (prepared, pool):
            for experiment in experiments:
                directory = where.get(experiment.name, out / experiment.name)
                tracker.say(experiment.name)
                summaries[experiment.name] = local.run(
                    experiment, directory, prepared, pool, given=given, command=command, tracker=tracker
                )
    return summaries


def _runs_in(path: Path) -> list[Path]:
    """The directory itself if it is a run, else the runs in it."""
    if (path / "resolved.json").exists():
        return [path]
    found = sorted(d for d in path.glob("*") if (d / "resolved.json").exists()) if path.is_dir() else []
    if not found:
        raise ConfigError(f"{path}: no run there; give a run directory or a folder of them")
    return found


def _write_report(directories: list[Path], out: Path) -> Path:
    from assay.report import write

    return write(directories, out)


def _print_table(summaries: list[dict[str, Any]]) -> None:
    table = Table(caption="over = over-refusal; w = mean weight given to honest and to malicious clients", box=None)
    columns = {
        "run": None,
        "refusal": "refusal_rate",
        "over": "over_refusal_rate",
        "loss": "benign_loss",
        "AUROC": "auroc",
        "TPR@1%": "tpr_at_1pct_fpr",
        "w honest": "honest_weight_mean",
        "w malic.": "malicious_weight_mean",
    }
    for name in columns:
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    table.add_column("s", justify="right")
    for summary in summaries:
        values = [summary["metrics"].get(key) for key in list(columns.values())[1:]]
        cells = ["-" if v is None else f"{v:.3f}" for v in values]
        table.add_row(summary["name"], *cells, f"{summary['seconds']['total']:.0f}")
    Console().print(table)
