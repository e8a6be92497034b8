"""Excision on one machine: check the store, aggregate again, write the adapter and the report, measure both models."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from assay import checkpoint, run_dir
from assay.config import ConfigError
from assay.contribution import Tensors
from assay.engines.pool import Pool
from assay.federated import excise
from assay.federated.evaluate import evaluate, make_panel
from assay.federated.excise import Excised, Script
from assay.federated.lora import write_peft
from assay.federated.population import load_sources
from assay.federated.preparation import at_hand, prepare
from assay.progress import Tracker

REPORT = "excise.json"


def excise_run(
    directory: Path, clients: Sequence[str], out: Path | None, tracker: Tracker, *,
    measure: bool = True, data_root: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Remove `clients` from the run in `directory`; writes `out`/adapter and `out`/excise.json, returns the report.

    `out` defaults to excised/<clients> in the run directory. The behaviour of both models is measured where the base
    model is on this machine; otherwise the report says why not.
    """
    script = excise.read(directory)
    out = out or directory / "excised" / _folder(clients)
    if out.resolve() == directory.resolve():
        raise ConfigError(f"{out}: is the run itself; give another directory (--out)")
    tracker.say("checking every kept update against the ledger")
    checked = excise.check_store(script)
    tracker.say(f"aggregating {len(script.rounds)} rounds again without {', '.join(sorted(clients))}")
    found = excise.excise(script, clients)
    said = excise.report(script, clients, found, checked)
    said["behaviour"] = _behaviour(script, found, data_root, tracker) if measure else {"why_not": "not asked for"}
    base = str(said["behaviour"].pop("base", script.experiment.model.name))
    write_peft(out / run_dir.ADAPTER, found.adapter, script.experiment.lora, base)
    said["adapter"] = str(out / run_dir.ADAPTER)
    checkpoint.write_json(out / REPORT, said)
    return said


def _folder(clients: Sequence[str]) -> str:
    """Names are the participants' own words: what is no plain file name becomes a hash."""
    name = "+".join(sorted(clients))
    plain = re.fullmatch(r"\w[\w.+-]{0,99}", name, re.ASCII)
    return name if plain else hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _behaviour(script: Script, found: Excised, data_root: Path | None, tracker: Tracker) -> dict[str, Any]:
    """Refusal, over-refusal and benign loss of the run's model and of the one without the clients."""
    experiment = script.experiment
    if data_root is not None:
        experiment = experiment.changed(data__root=str(data_root.resolve()))
    try:
        if not at_hand(experiment):
            return {"why_not": f"the base model {experiment.model.name} is not on this machine"}
        prepared = prepare(experiment, tracker)
        panel = make_panel(experiment, load_sources(experiment))
    except ValueError as error:  # data or model of the run are elsewhere: the aggregation stands without them
        return {"why_not": str(error)}
    if prepared.base_sha256 != script.base_sha256:
        return {"why_not": "the base model on this machine is not the one of the run", "base": prepared.path}
    tracker.say("measuring both models")
    with Pool(str(prepared.path), prepared.dtype, experiment.lora, 1) as compute:

        def measured(adapter: Tensors) -> dict[str, float]:
            return evaluate(compute, adapter, panel, experiment).metrics()

        return {"before": measured(found.original), "after": measured(found.adapter), "base": prepared.path}
