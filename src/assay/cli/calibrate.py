"""`assay calibrate`: thresholds of the seeded check for a pair of engines."""

from __future__ import annotations

import json
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from assay.cli.common import DataRoot, Json, Set, bar, show
from assay.cli.common import experiment as read_experiment
from assay.config import ConfigError, SwarmExperiment


class Dtype(StrEnum):
    """Precisions of an engine."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def calibrate(
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Swarm experiment whose model, task and sampler it is for.")
    ] = None,
    sampling: Annotated[Dtype, typer.Option(help="Precision of the engine that samples.")] = Dtype.FLOAT32,
    verifying: Annotated[Dtype, typer.Option(help="Precision of the engine that verifies.")] = Dtype.FLOAT32,
    completions: Annotated[int, typer.Option(min=1, help="Honest completions to measure on.")] = 1000,
    quantile: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of honest completions within the limits, before headroom.")
    ] = 0.999,
    out: Annotated[Path | None, typer.Option(help="Write the thresholds as TOML, to paste into an experiment.")] = None,
    data_root: DataRoot = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Measure margins of honest completions between a sampling and a verifying engine; print limits and their cost.

    Measured on the weights a run of this experiment starts from: the base with its adapter, warmed up. Limits are the
    honest quantile with headroom. The slack is what an attacker could hide under them, in bits a token.

    Examples:

        assay calibrate --sampling bfloat16

        assay calibrate --config swarm.toml --sampling bfloat16 --completions 4000 --out limits.toml
    """
    experiment = _swarm(config_file, data_root, settings or [])
    found = measure(experiment, sampling.value, verifying.value, completions, quantile)
    made = provenance(experiment, sampling.value, verifying.value, quantile)
    lines = ["[defence.params.seeded]", *(f"{k} = {v}" for k, v in found.params().items())]
    if out is not None:
        out.write_text("\n".join([*_comments({**found.cost(), **made}), *lines]) + "\n")
    text = "\n".join(
        [
            *lines,
            "",
            f"{found.completions} honest completions, {found.tokens} tokens; {found.identical:.1%} the same on both",
            f"refused at these limits: {found.false_positive_rate:.2%} (95% sure below {found.upper_95:.2%})",
            f"slack left to an attacker: {found.slack_bits:.4f} bits a token",
        ]
    )
    show({**found.as_dict(), **made}, as_json, text)


def provenance(experiment: SwarmExperiment, sampling: str, verifying: str, quantile: float) -> dict[str, Any]:
    """What has to be known to calibrate so again: for which model, task and sampler, and on what."""
    from assay import run_dir

    model, task = experiment.model, experiment.task
    return {
        "command": shlex.join(["assay", *sys.argv[1:]]),
        "seed": experiment.seed,
        "quantile": quantile,
        "engines": {"sampling": sampling, "verifying": verifying},
        "model": model.model_dump(include={"name", "dtype", "lora_r", "lora_alpha"}),
        "task": task.model_dump(include={"name", "style", "warmup_steps"}),
        "sampler": experiment.sampling.model_dump(),
        "commit": run_dir.commit(),
        "versions": run_dir.versions(),
    }


def _comments(values: dict[str, Any]) -> list[str]:
    """Comments that are TOML themselves: an experiment takes the file as it is, and a program can read them."""

    def written(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} = {written(v)}" for k, v in value.items()) + "}"
        return json.dumps(value)

    return [f"# {key} = {written(value)}" for key, value in values.items()]


def _swarm(file: Path | None, data_root: Path | None, settings: list[str]) -> SwarmExperiment:
    from assay import config

    if file is None:
        found = SwarmExperiment()
        for setting in settings:
            found = config.assign(found, setting)
        return found
    read = read_experiment(file, data_root, settings)
    if not isinstance(read, SwarmExperiment):
        raise ConfigError(f"{file}: is a federated experiment; calibration is for the swarm")
    return read


def measure(experiment: SwarmExperiment, sampling: str, verifying: str, completions: int, quantile: float) -> Any:
    """Calibrate one engine against the other on the weights the run starts from and on prompts of its task."""
    from assay.swarm.build import make_engines
    from assay.swarm.calibrate import calibrate as run
    from assay.swarm.rollout import Item

    with bar() as tracker:
        practice, (one, other) = make_engines(experiment, (sampling, verifying), "assay.calibrate", tracker)
        ids = practice.task.train
        prompts = [ids[(i // 4) * 7919 % len(ids)] for i in range(completions)]  # four of each, spread over the task
        items = [
            Item(practice.prompt_ids(p), practice.seed(experiment.seed, "calibrate", p, i))
            for i, p in enumerate(prompts)
        ]
        tracker.say(f"sampling {completions} completions in {sampling}, verifying in {verifying}")
        return run(
            one, other, items, practice.sampler, max_tokens=practice.max_tokens, eos=practice.eos, quantile=quantile
        )
