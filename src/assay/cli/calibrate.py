"""`assay calibrate`: thresholds of the seeded check for a pair of engines."""

from __future__ import annotations

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

    Limits are the honest quantile with headroom. The slack is what an attacker could hide under them, in bits a token.
    """
    found = measure(
        _swarm(config_file, data_root, settings or []), sampling.value, verifying.value, completions, quantile
    )
    lines = ["[defence.params.seeded]", *(f"{k} = {v}" for k, v in found.params().items())]
    if out is not None:
        out.write_text("\n".join(lines) + "\n")
    text = "\n".join(
        [
            *lines,
            "",
            f"{found.completions} honest completions, {found.tokens} tokens; {found.identical:.1%} the same on both",
            f"refused at these limits: {found.false_positive_rate:.2%} (95% sure below {found.upper_95:.2%})",
            f"slack left to an attacker: {found.slack_bits:.4f} bits a token",
        ]
    )
    show(found.as_dict(), as_json, text)


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
    """Load the model twice and calibrate one against the other on prompts of the task."""
    from assay import models
    from assay.swarm.build import make_practice
    from assay.swarm.calibrate import calibrate as run
    from assay.swarm.rollout import Item

    with bar() as tracker:
        one = models.load(experiment.model.name, sampling, tracker.say)
        other = one if sampling == verifying else models.load(experiment.model.name, verifying, tracker.say)
        practice = make_practice(experiment, one, "assay.calibrate")
        ids = practice.task.train
        prompts = [ids[(i // 4) * 7919 % len(ids)] for i in range(completions)]  # four of each, spread over the task
        items = [Item(practice.prompt_ids(p), practice.seed(0, "calibrate", p, i)) for i, p in enumerate(prompts)]
        tracker.say(f"sampling {completions} completions in {sampling}, verifying in {verifying}")
        return run(
            one.model, other.model, items, practice.sampler, max_tokens=practice.max_tokens, eos=practice.eos,
            quantile=quantile,
        )  # fmt: skip
