"""`assay bench`: suites of attacks and defences, measured."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from assay.cli.common import DataRoot, Json, Set, bar, federated, lines, print_table, run_all, show, write_report
from assay.config import AnyExperiment, ConfigError
from assay.spool import SpoolError

bench_app = typer.Typer(
    help="Measured proof: suites of attacks and defences.", rich_markup_mode="markdown", no_args_is_help=True
)
Seeds = Annotated[str, typer.Option(help="Seeds, separated by commas.")]
LEVELS = ("submitted", "step", "client", "shadow")
Only = Annotated[
    str,
    typer.Option(
        help="Run only experiments whose name holds one of these texts, separated by commas, and none of those that begin "
        "with a minus: --only=50pct,-noise."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the run directories.")]
Results = Annotated[Path | None, typer.Option(help="JSON file to write the rows to.")]


@bench_app.command("federated")
def bench_federated(
    config_file: Annotated[Path | None, typer.Option("--config", help="Base experiment; default: the demo's.")] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="small, real, backdoors, triggers, levels, factors, crowd, aggregators or full: a grid of attacks, shares and levels."
        ),
    ] = "",
    levels: Annotated[
        str,
        typer.Option(
            help="Levels to try, separated by commas; in a grid also `none`. [default: the preset's, or "
            "submitted,step,client,shadow]"
        ),
    ] = "",
    attacks: Annotated[
        str, typer.Option(help="Attacks to try, separated by commas: a grid, or fewer of the preset's.")
    ] = "",
    shares: Annotated[
        str, typer.Option(help="In a grid: shares of malicious clients. [default: the preset's, or 0.2,0.5,0.7]")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas. [default: the preset's, or 0]")] = "",
    only: Only = "",
    out: Out = Path("runs/bench"),
    results: Results = None,
    data_root: DataRoot = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Honest only, undefended and every level, for every seed: rows of attack, defence, share, seed and metrics.

    Examples:

        assay bench federated --seeds 0,1,2

        assay bench federated --attacks blend,alie --shares 0.2,0.5 --levels none,submitted

        assay bench federated --preset small --only=50pct,-noise --results rows.json
    """
    from assay import config
    from assay.bench import federated as suite
    from assay.bench.presets import PRESETS

    base = federated(config_file, data_root, settings or [])
    named, wanted, chosen = _words(attacks), _words(levels), _numbers(seeds) if seeds else []
    if preset:
        if preset not in PRESETS:
            raise ConfigError(f"--preset: {preset!r} is unknown; known are {', '.join(PRESETS)}")
        base = base.changed(**PRESETS[preset].settings)
        for setting in settings or []:  # what is set by hand stands over the preset's setting
            base = config.assign(base, setting)
        parts = _shares(shares) if shares else []
        experiments = suite.of_preset(base, PRESETS[preset], chosen, named, parts, wanted)
    elif named:
        experiments = suite.grid(base, named, _shares(shares or "0.2,0.5,0.7"), wanted or LEVELS, chosen or [0])
    else:
        experiments = suite.suite(base, wanted or LEVELS, chosen or [0])
    experiments = _only(experiments, only)
    in_grid = bool(preset or named)
    summaries = run_all(experiments, out, shared=in_grid)
    more = []
    if preset and PRESETS[preset].excise:
        with bar() as tracker:
            more = suite.excised(experiments, summaries, out, tracker)
    found = suite.results(_command(), base, experiments, summaries, shared=in_grid, more=more)
    _finish(found, experiments, summaries, out, results, as_json)


@bench_app.command("swarm")
def bench_swarm(
    suite: Annotated[
        str,
        typer.Option(
            help="demo, core, adaptive, heterogeneous, text_aware, late, ablation, smollm2 or a list of them."
        ),
    ] = "core",
    seeds: Seeds = "0,1,2",
    only: Only = "",
    out: Out = Path("runs/bench-swarm"),
    results: Results = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Attacks on decentralised GRPO against every defence: rows of attack, defence, share, plan, seed and metrics.

    Examples:

        assay bench swarm

        assay bench swarm --suite core,adaptive --seeds 0 --results rows.json
    """
    from assay import config
    from assay.bench import swarm

    experiments = swarm.suite([s.strip() for s in suite.split(",")], _numbers(seeds))
    for setting in settings or []:
        experiments = [config.assign(e, setting) for e in experiments]
    experiments = _only(experiments, only)
    summaries = run_all(experiments, out)
    found = swarm.results(_command(), experiments, summaries)
    _finish(found, experiments, summaries, out, results, as_json)


@bench_app.command("soak")
def bench_soak(
    clients: Annotated[int, typer.Option(help="Simulated clients, all of them heard in every round.")] = 1000,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 20,
    values: Annotated[int, typer.Option(help="About so many float32 values in an adapter.")] = 3_400_000,
    malicious: Annotated[float, typer.Option(help="Share of malicious clients, of five kinds.")] = 0.1,
    screens: Annotated[
        str, typer.Option(help="Screens, separated by commas; also `duplicate`, which compares all pairs.")
    ] = "structure,norm,probe,neighbours",
    aggregator: Annotated[str, typer.Option(help="Aggregator by name, with its defaults.")] = "mean",
    seed: Annotated[int, typer.Option(help="Seed of the clients.")] = 0,
    out: Annotated[Path, typer.Option(help="Run directory; holds a round's adapters while it lasts.")] = Path(
        "runs/soak"
    ),
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Memory, seconds and disk of a server with many clients; no model is trained. 13.6 GB of disk at the defaults. Goes on
    where it stopped.

    Examples:

        assay bench soak --clients 100 --rounds 5        # 1.4 GB of disk

        assay bench soak --aggregator median --results soak.json
    """
    from assay import run_dir
    from assay.bench import soak

    settings = soak.Settings(
        clients=clients, rounds=rounds, values=values, malicious=malicious, screens=tuple(_words(screens)),
        aggregator=aggregator, seed=seed,
    )  # fmt: skip
    try:
        with bar() as tracker:
            tracker.add(rounds - max(0, len(run_dir.read_metrics(out)) - 1))  # row 0 is the start

            def say(text: str) -> None:
                tracker.say(text)
                tracker.tick(1)

            found = soak.run(settings, out, results, _command(), say)
    except SpoolError as error:
        raise ConfigError(f"--out: {error}") from None
    highest = max((row["peak_bytes"] - row["before_bytes"] for row in found["rows"]), default=0)
    told = f"at most {highest / 1e6:.0f} MB beyond the process's own; the bound is {found['bound_bytes'] / 1e6:.0f} MB"
    show(found, as_json, told)


@bench_app.command("aggregators")
def bench_aggregators(
    clients: Annotated[int, typer.Option(help="Rows of the matrix.")] = 20,
    values: Annotated[int, typer.Option(help="About so many float32 values in a row.")] = 3_400_000,
    f: Annotated[int, typer.Option("--f", help="Attackers the rules are told to bear.")] = 4,
    repeats: Annotated[int, typer.Option(help="Turns; of each rule the fastest counts.")] = 3,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Seconds and memory of Assay's aggregators beside byzfl's, Flower's and the published ones, on the same matrix.

    Examples:

        assay bench aggregators --clients 10 --values 100000

        assay bench aggregators --results speed.json
    """
    from assay.bench import speed, table_corpora
    from assay.checkpoint import write_json

    settings = speed.Settings(clients=clients, values=values, f=f, repeats=repeats)
    rows = speed.measure(settings, lines)  # no bar: what draws it would be measured too
    found = speed.results(_command(), settings, rows)
    if results is not None:
        write_json(results, found)
    show(found, as_json, table_corpora.speed(found))


@bench_app.command("costs")
def bench_costs(
    only: Annotated[
        str, typer.Option(help="Parts, separated by commas: screening, verdict, checks, grpo, local, rollouts.")
    ] = "",
    model: Annotated[
        str, typer.Option(help="Base model: smollm2-135m, tiny, a directory or a hub id.")
    ] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Measured turns of every call; the fastest counts.")] = 5,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """What screening costs beside training, and learning beside TRL, PEFT's Trainer and `generate`: ratios in one run.

    On an idle machine: seconds are compared. With --results it goes on with the parts that are left.

    assay bench costs --results results/costs.json

    assay bench costs --only screening,verdict --repeats 3
    """
    from assay.bench import costs, table_costs
    from assay.bench.cost_settings import Settings

    settings = Settings(model=model, dtype=dtype, repeats=repeats)
    found = costs.run(
        settings, _words(only), results, _command(), lambda text: print(text, file=sys.stderr, flush=True)
    )
    show(found, as_json, table_costs.costs(found))


def _only(experiments: list[Any], only: str) -> list[Any]:
    texts = only.split(",")
    without = [text[1:] for text in texts if text.startswith("-")]
    wanted = [text for text in texts if not text.startswith("-")] or [""]
    kept = [e for e in experiments if any(t in e.name for t in wanted) and not any(t in e.name for t in without)]
    if not kept:
        raise ConfigError(f"--only {only!r}: no experiment of this suite has that in its name")
    return kept


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    if not (found := [s.strip() for s in text.split(",")]) or not all(n.isdigit() for n in found):
        raise ConfigError(f"--seeds: {text!r} is not a list of whole numbers such as 0,1,2")
    return [int(n) for n in found]


def _shares(text: str) -> list[float]:
    try:
        found = [float(s) for s in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= share < 1 for share in found):
        raise ConfigError(f"--shares: {text!r} is not a list of shares from 0 to below 1, such as 0.2,0.5")
    return found


def _command() -> str:
    return shlex.join(["assay", *sys.argv[1:]])


def _finish(
    found: dict[str, Any], experiments: list[Any], summaries: dict[str, dict[str, Any]], out: Path,
    results: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Write the rows, the report, and say what came out."""
    from assay.checkpoint import write_json

    made: list[AnyExperiment] = experiments
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
        write_json(results, found)
    page = write_report([out / e.name for e in made], out / "report.html")
    show(found, as_json)
    if not as_json:
        print_table(list(summaries.values()))
        print(f"report: {page}")
