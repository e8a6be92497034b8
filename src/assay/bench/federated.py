"""The federated suites: every level against the experiment's attack, or a grid of attacks, malicious shares and levels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from assay import run_dir
from assay.bench.presets import WITH_TRIGGER, WITHOUT_TRIGGER, Preset
from assay.config import ConfigError, Experiment
from assay.engines.excise import excise_run
from assay.federated import excise
from assay.federated.defence import level_name
from assay.progress import Tracker

DEMO_LEVELS = ("submitted", "step")
ALONE = "honest_alone"
AND = "+"
KNOWN = {**WITHOUT_TRIGGER, **WITH_TRIGGER}
ALL_LEVELS = ("submitted", "step", "client", "shadow", "evidence", "spectral")


def variants(base: Experiment, levels: Iterable[str] = DEMO_LEVELS, suffix: str = "") -> list[Experiment]:
    """Runs that differ from `base` in one thing each; their names are what `--json` and reports show."""
    runs = [
        base.changed(name=f"federated.honest_only{suffix}", clients__malicious=0.0, defence__level="none"),
        base.changed(name=f"federated.undefended{suffix}", defence__level="none"),
    ]
    return runs + [base.changed(name=f"federated.{level}{suffix}", defence__level=level) for level in levels]


def suite(base: Experiment, levels: Iterable[str], seeds: Sequence[int]) -> list[Experiment]:
    """The variants for every seed; names carry the seed where there are several (one seed: the demo's own names)."""
    levels = tuple(levels)
    several = len(seeds) > 1
    return [v for seed in seeds for v in variants(base.changed(seed=seed), levels, f".seed{seed}" if several else "")]


def grid(
    base: Experiment,
    attacks: Sequence[str],
    shares: Sequence[float],
    levels: Sequence[str],
    seeds: Sequence[int],
    undefended: Sequence[str] | None = None,
    more: Mapping[str, Mapping[str, Any]] | None = None,
    more_for: Sequence[str] | None = None,
) -> list[Experiment]:
    """For every seed honest clients only, then at every share of malicious clients the honest ones of that share alone
    (what a perfect defence would leave: few clients drift farther) and every attack under every level.

    A share of 0 is no attack: under each level it shows what the defence costs honest clients. Attacks go by their names
    in presets.py or in federated/attacks/; level `none` is run for those in `undefended` (None: for all). Under every
    other level, and under `none` where that is the only one, each attack (`more_for`: only those) also meets each change
    of `more`, by label. Runs with much in common stand beside each other, so that a memory of what was computed helps.
    """
    of_level = {"none": attacks if undefended is None else [a for a in attacks if a in undefended]}
    out = []
    for seed in seeds:
        here, end = base.changed(seed=seed), f".seed{seed}" if len(seeds) > 1 else ""
        out.append(here.changed(name=f"federated.honest_only{end}", clients__malicious=0.0, defence__level="none"))
        for share in shares:
            if share:
                name = f"federated.{ALONE}.{share:.0%}.none{end}".replace("%", "pct")
                left = here.clients.total - round(share * here.clients.total)
                alone = {"clients__total": left, "clients__malicious": 0.0, "defence__level": "none"}
                out.append(here.changed(name=name, **alone))
            for level in levels:
                if share == 0 and level == "none":
                    continue
                for attack in of_level.get(level, attacks) if share else ["no_attack"]:
                    name = f"federated.{attack}.{share:.0%}.{level}{end}".replace("%", "pct")
                    own = {"attack__name": attack, **KNOWN.get(attack, {})} if share else {}
                    run = here.changed(name=name, clients__malicious=share, defence__level=level, **own)
                    out.append(run)
                    plain = level == "none" and len(levels) > 1
                    meets = share and not plain and (more_for is None or attack in more_for)
                    for label, changes in (more or {}).items() if meets else ():
                        out.append(run.changed(name=f"{name}{AND}{label.replace(' ', '-')}", **changes))
    return out


def of_preset(
    base: Experiment,
    preset: Preset,
    seeds: Sequence[int] = (),
    attacks: Sequence[str] = (),
    shares: Sequence[float] = (),
    levels: Sequence[str] = (),
) -> list[Experiment]:
    """The preset's experiments on `base`, which has its settings already; what is given replaces what it names."""
    chosen, wanted = attacks or preset.attacks, levels or ("none", *preset.levels)
    return grid(
        base, chosen, shares or preset.shares, wanted, seeds or preset.seeds, preset.undefended, preset.more,
        preset.more_for or None,
    )  # fmt: skip


def row(experiment: Experiment, summary: Mapping[str, Any]) -> dict[str, Any]:
    """One row of results: what was run and the flat metrics."""
    honest = experiment.clients.malicious == 0
    parts = experiment.name.split(".")
    label, share = experiment.attack.name, experiment.clients.malicious
    if len(parts) > 3:  # of a grid
        label = parts[1]
    if label == ALONE:  # beside the attacks at the share whose honest clients these are
        share = int(parts[2].removesuffix("pct")) / 100
    return {
        "attack": "none" if honest and label != ALONE else label,
        "defence": _defence(experiment),
        "share": share,
        "seed": experiment.seed,
        "aggregator": experiment.aggregation.name,
        **summary["metrics"],
        "honest_weight_min": summary["honest_weight_min"],
        "outcomes": summary["outcomes"],
        "detection": summary["detection"],
        "seconds": {stage: round(value, 2) for stage, value in summary["seconds"].items()},
    }


def _defence(experiment: Experiment) -> str:
    level, _, label = experiment.name.partition(AND)
    if label:  # the level's name, whatever the change made of it
        name = level.removesuffix(f".seed{experiment.seed}").rpartition(".")[2]
        return f"{'undefended' if name == 'none' else name} + {label.replace('-', ' ')}"
    return f"{level_name(experiment)}{' (as published)' if experiment.defence.faithful else ''}"


def excised(
    experiments: Sequence[Experiment], summaries: Mapping[str, Mapping[str, Any]], out: Path, tracker: Tracker
) -> list[dict[str, Any]]:
    """Rows of what is left when the malicious clients of each defended run are named afterwards and taken out; where no
    level is tried, of each undefended one.

    Aggregated again from the kept updates: what honest clients took over from the poisoned rounds stays in theirs.
    """
    found = []
    plain_runs = [e for e in experiments if e.clients.malicious and AND not in e.name]
    for e in [e for e in plain_runs if e.defence.level != "none"] or plain_runs:
        plain, participants = row(e, summaries[e.name]), summaries[e.name]["participants"]
        bad = [name for name in excise.read(out / e.name).clients if participants[name] == "malicious"]
        after = summaries[e.name]["metrics"]  # where none of theirs was accepted there is nothing to take out
        if bad:
            behaviour = excise_run(out / e.name, bad, None, tracker)["behaviour"]
            if "after" not in behaviour:
                raise ConfigError(f"{e.name}: {behaviour['why_not']}")
            after = behaviour["after"]
        known = {k: plain[k] for k in ("attack", "share", "seed", "aggregator", "seconds")}
        measured = {k: after[k] for k in ("refusal_rate", "over_refusal_rate", "benign_loss", "trigger_compliance")}
        before = "undefended" if plain["defence"] == "none" else plain["defence"]
        found.append({**known, "defence": f"{before} + excised", **measured})
    return found


def results(
    command: str,
    base: Experiment,
    experiments: Sequence[Experiment],
    summaries: Mapping[str, Mapping[str, Any]],
    shared: bool = False,
    more: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The JSON that lives under results/: rows (and `more` of them), and everything needed to make them again."""
    return {
        "command": command,
        # of the runs: finished ones are taken as they are, however old
        "commit": ", ".join(sorted({s.get("commit", "") for s in summaries.values()})),
        "versions": run_dir.versions(),
        "machine": run_dir.machine(),
        # of runs that share what they have in common the seconds of each depend on which came first
        "seconds_shared": shared,
        "model": next(iter(summaries.values()))["model"],
        # where the data lies differs from machine to machine and changes no number
        "experiment": base.model_dump(mode="json", exclude={"data": {"root"}, "track": True}),
        "rows": [*(row(e, summaries[e.name]) for e in experiments), *more],
    }
