"""`assay probe`: fit and try the paper's probe on LoRA updates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from assay.cli.common import DataRoot, Json, bar, federated, prepared, show
from assay.config import ConfigError

probe_app = typer.Typer(help="Probes on LoRA updates.", no_args_is_help=True)


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

    experiment = federated(config_file, data_root)
    with bar() as tracker, prepared(experiment, tracker) as (base, compute):
        counts = CollectSettings(benign=benign, malicious=malicious)
        sources = load_sources(experiment)
        probe = make_probe(experiment, base, compute, sources, compute.initial(), tracker, counts)
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
    """Score a probe on fresh updates of the experiment's own clients, from round 0's adapter, in the first round in
    which the malicious are malicious (rows the probe has not seen)."""
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
