"""`assay probe`: the paper's probe on updates of a round, and probes on finished adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from assay.cli.common import DataRoot, Json, bar, federated, prepared, show
from assay.config import ConfigError

probe_app = typer.Typer(
    help="Probes on LoRA updates and on finished adapters.", rich_markup_mode="markdown", no_args_is_help=True
)
Benign = Annotated[
    list[str] | None, typer.Option(help="Finished adapters known to be good: folders, folders of many (repeatable).")
]
Malicious = Annotated[list[str] | None, typer.Option(help="Finished adapters known to be bad (repeatable).")]


@probe_app.command("fit")
def probe_fit(
    out: Annotated[Path, typer.Argument(help="Probe file to write (safetensors).")],
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Experiment whose model, data and training it is for.")
    ] = None,
    benign: Annotated[int, typer.Option(help="Benign trajectories.")] = 12,
    malicious: Annotated[int, typer.Option(help="Malicious trajectories.")] = 12,
    benign_adapters: Benign = None,
    malicious_adapters: Malicious = None,
    benign_rows: Annotated[
        Path | None, typer.Option(help="JSON lines of good rows: adapters are trained on them here. Needs --base.")
    ] = None,
    malicious_rows: Annotated[Path | None, typer.Option(help="JSON lines of bad rows, likewise.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model of the finished adapters; the file is bound to it.")
    ] = None,
    each: Annotated[int, typer.Option(help="Adapters of each kind to train on the rows.")] = 12,
    rank: Annotated[int, typer.Option(help="Their rank: that of the adapters to be judged.")] = 8,
    targets: Annotated[str, typer.Option(help="Their layers, likewise.")] = "q_proj,v_proj",
    steps: Annotated[int, typer.Option(help="Most steps one is trained; half of them as many.")] = 60,
    lr: Annotated[float, typer.Option(help="Highest rate; half of them at half of it.")] = 2e-3,
    template: Annotated[str, typer.Option(help="Prompt template of the rows.")] = "chatml",
    data_root: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Fit a probe and write it to one file.

    On updates of a round (the paper's; default): collects labelled updates on the operator's part of --config's data.
    On finished adapters, for `assay screen`: from labelled ones (--benign-adapters, --malicious-adapters), or from ones
    trained here on your rows (--benign-rows, --malicious-rows, --base).

    Examples:

        assay probe fit probe.safetensors --config mine.toml

        assay probe fit adapters.safetensors --benign-adapters good/ --malicious-adapters bad/

        assay probe fit adapters.safetensors --benign-rows good.jsonl --malicious-rows bad.jsonl --base ./model
    """
    if benign_adapters or malicious_adapters or benign_rows or malicious_rows:
        from assay.engines import adapter_probes

        if config_file is not None:
            raise ConfigError("--config is for probes on updates of a round; leave it out for finished adapters")
        if (benign_adapters or malicious_adapters) and (benign_rows or malicious_rows):
            raise ConfigError("give adapters or rows, not both")
        with bar() as tracker:
            if benign_rows or malicious_rows:
                if not (benign_rows and malicious_rows and base):
                    raise ConfigError("give --benign-rows, --malicious-rows and --base")
                fitted = adapter_probes.from_rows(
                    benign_rows, malicious_rows, base, each=each, rank=rank, targets=tuple(targets.split(",")),
                    steps=steps, lr=lr, template=template, tracker=tracker,
                )  # fmt: skip
            else:
                fitted = adapter_probes.from_adapters(benign_adapters or (), malicious_adapters or (), base)
        fitted.save(out)
        found: dict[str, Any] = {"probe": str(out), **fitted.summary()}
        show(found, as_json, "\n".join(f"{key}: {json.dumps(value)}" for key, value in found.items()))
        return
    from assay.federated.collect import CollectSettings
    from assay.federated.population import load_sources
    from assay.federated.preparation import make_probe

    experiment = federated(config_file, data_root)
    with bar() as tracker, prepared(experiment, tracker) as (ready, compute):
        counts = CollectSettings(benign=benign, malicious=malicious)
        sources = load_sources(experiment)
        probe = make_probe(experiment, ready, compute, sources, compute.initial(), tracker, counts)
    probe.save(out)
    show({"probe": str(out), **probe.meta}, as_json, f"{out}: {json.dumps(probe.meta)}")


@probe_app.command("eval")
def probe_eval(
    probe_file: Annotated[Path, typer.Argument(help="Probe file.")],
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Experiment whose clients it is tried on.")
    ] = None,
    benign_adapters: Benign = None,
    malicious_adapters: Malicious = None,
    data_root: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Score a probe on fresh updates of the experiment's own clients, from round 0's adapter, in the first round in
    which the malicious are malicious (rows the probe has not seen); or, with --benign-adapters and
    --malicious-adapters, a probe on finished adapters on those (give ones it was not fitted on).

    Examples:

        assay probe eval probe.safetensors --config mine.toml

        assay probe eval adapters.safetensors --benign-adapters good-2/ --malicious-adapters bad-2/
    """
    if benign_adapters or malicious_adapters:
        from assay.engines import adapter_probes
        from assay.federated.adapter_probe import AdapterProbe

        loaded = AdapterProbe.load(probe_file)
        found = adapter_probes.evaluate(loaded, benign_adapters or (), malicious_adapters or ())
        show({"probe": str(probe_file), **found}, as_json, json.dumps(found))
        return
    from assay.federated import seats
    from assay.federated.collect import evaluate_probe
    from assay.federated.defence import Defence
    from assay.federated.population import load_sources, make_clients
    from assay.federated.preparation import client_settings
    from assay.federated.probe import Probe, feature_deltas

    probe = Probe.load(probe_file)
    experiment = federated(config_file, data_root)
    sources = load_sources(experiment)
    clients = make_clients(experiment, sources)
    with bar() as tracker, prepared(experiment, tracker) as (base, compute):
        if probe.base_sha256 and probe.base_sha256 != base.base_sha256:
            raise ConfigError(f"{probe_file}: fitted on another base model; fit one with `assay probe fit`")
        initial, settings = compute.initial(), client_settings(experiment, 1)
        table = seats.make_table(experiment, sources, clients, initial, Defence(level="none", screens=()))
        turns = seats.turns(table, clients, table.attack.first_round(), initial, settings, {}, {})
        jobs = [job for turn in turns for job in turn.jobs.values()]
        tracker.add(float(len(jobs)))
        results = iter(compute.train(jobs, lambda n: tracker.tick(n)))
        made = [{name: next(results) for name in turn.jobs} for turn in turns]
        sent, _ = seats.send(table, turns, made, initial, {})
    delta_ND = feature_deltas([s.tensors for s in sent], initial, probe.features)
    quality = evaluate_probe(probe, delta_ND, [c.malicious for c in clients], probe.threshold)
    show({"probe": str(probe_file), "clients": len(clients), **quality}, as_json, json.dumps(quality))
