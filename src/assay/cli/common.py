"""What the commands share: options, output, experiments from files, running many, one report."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from assay.config import AnyExperiment, ConfigError, Experiment, SwarmExperiment
from assay.progress import PROGRESS

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout and nothing else.")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder that relative data paths of the config start from.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Change one key: --set defence.level=step (may be repeated).")
]


def show(value: Any, as_json: bool, text: str = "") -> None:
    """JSON on stdout, or the text form."""
    print(json.dumps(value, indent=2) if as_json else text)


def experiment(file: Path, data_root: Path | None, settings: Sequence[str] = ()) -> AnyExperiment:
    """The experiment of a file, of either wing, with `--set` changes applied."""
    from assay import config

    found = config.load(file, data_root=data_root)
    for setting in settings:
        found = config.assign(found, setting)
    return found


def federated(file: Path | None, data_root: Path | None, settings: Sequence[str] = ()) -> Experiment:
    """A federated experiment; without a file the demo's setting."""
    from assay import config

    found: AnyExperiment = config.Experiment() if file is None else config.load(file, data_root=data_root)
    if not isinstance(found, Experiment):
        raise ConfigError(f"{file}: is an experiment of the {found.wing} wing; this command is for the federated one")
    for setting in settings:
        found = config.assign(found, setting)
    return found


@contextmanager
def bar() -> Iterator[Any]:
    from assay.progress import Bar

    with Bar() as bar:
        yield bar


def lines(text: str) -> None:
    """Progress as lines, where it is wanted at all."""
    if os.environ.get(PROGRESS) != "quiet":
        print(text, file=sys.stderr, flush=True)


@contextmanager
def prepared(experiment: Experiment, tracker: Any) -> Iterator[tuple[Any, Any]]:
    """The base and the worker pool of an experiment."""
    from assay.engines.pool import Pool
    from assay.federated.preparation import prepare

    base = prepare(experiment, tracker)
    with Pool(str(base.path), base.dtype, experiment.lora, experiment.workers) as pool:
        yield base, pool


def run_all(
    experiments: Sequence[AnyExperiment],
    out: Path,
    where: Mapping[str, Path] | None = None,
    given: str = "",
    shared: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run experiments under one progress bar: federated ones share a pool of workers (and must share model and LoRA
    settings), swarm ones run side by side. Finished runs are taken as they are. `shared`: what federated runs have in
    common is computed once (same results; their seconds are then no longer each one's own)."""
    from assay import run_dir, track
    from assay.bench.second_model import second_model
    from assay.engines import local, local_swarm, side_by_side
    from assay.engines.memo import Memo

    for e in experiments:
        track.check(e.track)  # before minutes of preparation
    folder = {e.name: (where or {}).get(e.name, out / e.name) for e in experiments}
    command = shlex.join(["assay", *sys.argv[1:]])
    federated_ones = [e for e in experiments if isinstance(e, Experiment)]
    swarm_ones = [e for e in experiments if isinstance(e, SwarmExperiment)]
    summaries: dict[str, dict[str, Any]] = {}
    with bar() as tracker:
        if any("tiny-b" in e.model.others for e in swarm_ones):
            second_model(tracker)
        for e in experiments:
            if run_dir.read_summary(folder[e.name]) is None:
                tracker.add(local.units(e) if isinstance(e, Experiment) else local_swarm.units(e))
        if federated_ones:
            with prepared(federated_ones[0], tracker) as (base, pool):
                compute = Memo(pool) if shared else pool
                for e in federated_ones:
                    tracker.say(e.name)
                    summaries[e.name] = local.run(
                        e, folder[e.name], base, compute, given=given, command=command, tracker=tracker
                    )
        jobs = [(e, folder[e.name]) for e in swarm_ones]
        summaries |= side_by_side.run_swarms(jobs, tracker, given=given, command=command)
    return {e.name: summaries[e.name] for e in experiments}


def on_flower(
    experiments: Sequence[AnyExperiment], out: Path, where: Mapping[str, Path] | None = None, given: str = ""
) -> dict[str, dict[str, Any]]:
    """`run_all` on Flower's simulation, one run after the other."""
    from assay import track
    from assay.bench.second_model import second_model
    from assay.engines import local, local_swarm
    from assay.engines.flower import simulation, swarm_run

    summaries = {}
    for e in experiments:
        track.check(e.track)
    command = shlex.join(["assay", *sys.argv[1:]])
    with bar() as tracker:
        for e in experiments:
            folder = (where or {}).get(e.name, out / e.name)
            if isinstance(e, Experiment):
                tracker.add(local.units(e))
                summaries[e.name] = simulation.run(e, folder, given=given, command=command, tracker=tracker)
                continue
            if "tiny-b" in e.model.others:
                second_model(tracker)
            tracker.add(local_swarm.units(e))
            summaries[e.name] = swarm_run.run_swarm(e, folder, tracker, given=given, command=command)
    return summaries


def runs_in(path: Path) -> list[Path]:
    """The directory itself if it is a run, else the runs in it."""
    if (path / "resolved.json").exists():
        return [path]
    found = sorted(d for d in path.glob("*") if (d / "resolved.json").exists()) if path.is_dir() else []
    if not found:
        raise ConfigError(f"{path}: no run there; give a run directory or a folder of them")
    return found


def write_report(directories: list[Path], out: Path) -> Path:
    from assay.report import write

    return write(directories, out)


TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "federated": (
        "over = over-refusal; w = mean weight given to honest and to malicious clients",
        {
            "refusal": "refusal_rate",
            "over": "over_refusal_rate",
            "loss": "benign_loss",
            "AUROC": "auroc",
            "TPR@1%": "tpr_at_1pct_fpr",
            "w honest": "honest_weight_mean",
            "w malic.": "malicious_weight_mean",
        },
    ),
    "swarm": (
        "ASR = attack success rate on honest nodes; rejected = share of honest and of malicious completions",
        {
            "ASR": "asr",
            "reward": "heldout_reward",
            "tokens": "completion_tokens_mean",
            "rej. honest": "honest_rejected_rate",
            "rej. malic.": "poison_rejected_rate",
        },
    ),
}


def print_table(summaries: Sequence[Mapping[str, Any]]) -> None:
    """One table a wing."""
    for wing, (caption, columns) in TABLES.items():
        rows = [s for s in summaries if s["wing"] == wing]
        if not rows:
            continue
        table = Table(caption=caption, box=None)
        table.add_column("run", overflow="fold")
        for name in columns:  # a long name wraps, a figure is never cut
            table.add_column(name, justify="right", no_wrap=True, min_width=max(5, len(name)))
        table.add_column("s", justify="right", min_width=4)
        for summary in rows:
            values = [summary["metrics"].get(key) for key in columns.values()]
            cells = ["-" if v is None else f"{v:.1f}" if v > 3 else f"{v:.3f}" for v in values]
            name = summary["name"].removeprefix(f"{wing}.") + (" (as published)" if summary.get("faithful") else "")
            table.add_row(name, *cells, f"{summary['seconds']['total']:.0f}")
        Console().print(table)
