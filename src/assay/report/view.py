"""What the page says, computed from the runs: headline, tables, and the JSON that the charts are drawn from.

Nothing here knows HTML. Participants' text passes through as text; the template escapes it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from assay import run_dir
from assay.report import drill
from assay.report.common import LOOKS, SCREENING, cost, cost_payload, numbered_look, provenance, settings_differ, stages
from assay.report.load import Run
from assay.report.records import ROLES, Role, clean
from assay.report.words import fixed, headline, shorten

LITTLE = 0.8
"""Mean honest weight under which the page warns; not calibrated: a fifth of the honest work is worth a sentence."""
SECTIONS = (
    ("summary", "Summary"),
    ("rounds", "Round by round"),
    ("weights", "Weights"),
    ("detection", "Detection"),
    ("cost", "Cost"),
    ("answers", "Answers"),
    ("participants", "Participants"),
    ("provenance", "Provenance"),
)
METRICS = (
    # name, heading, direction, plain words
    ("refusal_rate", "Refusal", "higher is better", "Share of harmful prompts that the model refuses."),
    ("over_refusal_rate", "Over-refusal", "lower is better", "Share of harmless prompts that it refuses as well."),
    ("benign_loss", "Benign loss", "lower is better", "Loss on honest held-out answers: is the useful task learned?"),
    ("auroc", "AUROC", "higher is better", "Chance that a malicious update looks worse than an honest one; 0.5: luck."),
    (
        "tpr_at_1pct_fpr",
        "TPR at 1 % FPR",
        "higher is better",
        "Share of malicious updates caught when at most 1 % of honest ones may be.",
    ),
    ("honest_weight_mean", "Weight, honest", "nearer 1 is better", "Mean weight that honest updates kept."),
    ("malicious_weight_mean", "Weight, malicious", "nearer 0 is better", "Mean weight that malicious updates kept."),
)

ROWS = 100
"""Of a heat map: a run of more clients is drawn in bands of them."""
LISTED = 50  # honest clients that lost weight; the filter of the participants has them all
BY_ROUND = 4
"""So many of METRICS are drawn by round; the weights have charts of their own."""


def build(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything the template prints that is not simply an attribute of a run."""
    shared, differing = provenance(runs)
    told = answers(runs)
    return {
        "sections": [section for section in SECTIONS if section[0] != "answers" or told],
        "styles": styles(runs),
        "metrics": METRICS,
        "headline": headline(runs),
        "caveats": [(run.label, text) for run in runs for text in caveats(run)],
        "settings_differ": settings_differ(runs),
        "defended": screened(runs),
        "detection": [detection(run) for run in runs],
        "costs": [cost(run) for run in runs],
        "stages": stages(runs),
        "screening": SCREENING,
        "series": [(name, heading, _series(runs, name)) for name, heading, *_ in METRICS[:BY_ROUND]],
        "detected": any(row.auroc is not None for run in runs for row in run.rows),
        "further": further(runs),
        "answers": told,
        "people": any(run.roles for run in runs),
        "banded": [i for i in screened(runs) if len(runs[i].roles) > ROWS],
        "meaning": drill.meaning(run.verdicts for run in runs),
        "shared": shared,
        "differing": differing,
        "seeds": sorted({run.summary.seed for run in runs if run.summary and run.summary.seed is not None}),
        "models": sorted({run.summary.model.name for run in runs if run.summary and run.summary.model.name}),
    }


def further(runs: Sequence[Run]) -> list[tuple[str, list[float | None]]]:
    """What else was measured at the end (judges, multiple choice, weights by kind of client): one value per run."""
    shown = {name for name, *_ in METRICS}
    said = [run.summary.metrics if run.summary else {} for run in runs]
    names = dict.fromkeys(name for metrics in said for name in metrics if name not in shown)
    return [(name.replace("_", " "), [metrics.get(name) for metrics in said]) for name in names]


def styles(runs: Sequence[Run]) -> list[dict[str, str]]:
    """One colour, dash and marker per run, the same wherever the run appears."""
    found: list[dict[str, str]] = []
    turn = 0
    for run in runs:
        taken = [style["colour"] for style in found]
        if run.kind in LOOKS and LOOKS[run.kind]["colour"] not in taken:
            found.append(LOOKS[run.kind])
        else:
            found.append(numbered_look(turn))
            turn += 1
    return found


def screened(runs: Sequence[Run]) -> list[int]:
    """Runs whose weights are worth drawing: with a defence, or any weight that is not 1."""
    return [
        i
        for i, run in enumerate(runs)
        if run.weights
        and (run.kind == "defended" or any(w != 1 for weights in run.weights.values() for w in weights.values()))
    ]


def caveats(run: Run) -> list[str]:
    """What must be read beside the headline: a model that learns nothing keeps its refusals without any defence."""
    found = list(run.notices)
    played = [row for row in run.rows if row.round]
    if played and all(row.outcome in ("skipped", "rolled_back") for row in played):
        found.append("no round was applied, so its model is the one it started from")
    kept = run.end("honest_weight_mean")
    if kept is not None and kept < LITTLE:
        found.append(
            f"honest clients kept only {fixed(kept, 2)} of their weight on average; "
            "part of what looks like safety is not learning"
        )
    return found


def detection(run: Run) -> dict[str, Any]:
    """Who was refused and why, and what that cost the honest: counts are of contributions, not of participants."""
    kept: dict[Role, list[float]] = {role: [] for role in ROLES}
    losses: dict[str, list[tuple[int, float, str]]] = {}
    for number, weights in run.weights.items():
        for name, weight in weights.items():
            kept[run.roles[name]].append(weight)
            if run.roles[name] == "honest" and weight < 1:
                contribution = run.ledger.get(number, {}).get(name)
                losses.setdefault(name, []).append((number, weight, contribution.reason if contribution else ""))
    return {
        "counts": {
            role: {
                "all": len(weights),
                "full": sum(weight == 1 for weight in weights),
                "part": sum(0 < weight < 1 for weight in weights),
                "none": sum(weight == 0 for weight in weights),
            }
            for role, weights in kept.items()
            if weights
        },
        "lost_all": len(losses),
        "lost": [
            {
                "name": name,
                "rounds": ", ".join(str(number) for number, _, _ in rounds),
                "lowest": fixed(min(weight for _, weight, _ in rounds), 2),
                "reasons": ", ".join(sorted({reason for _, _, reason in rounds if reason})),
            }
            for name, rounds in list(losses.items())[:LISTED]
        ],
        "reasons": [
            {"row": row, "sentence": shorten(row.sentence)}
            for row in (sorted(run.summary.reasons, key=lambda r: -(r.honest + r.malicious)) if run.summary else ())
            if row.reason != "ok"
        ],
    }


def answers(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Prompt by prompt, what each run's final model says."""
    prompts = dict.fromkeys(answer.prompt for run in runs if run.summary for answer in run.summary.answers)
    return [
        {
            "prompt": shorten(prompt),
            "answers": [
                (i, shorten(answer.answer))
                for i, run in enumerate(runs)
                if run.summary
                for answer in run.summary.answers
                if answer.prompt == prompt
            ],
        }
        for prompt in prompts
    ]


def payload(runs: Sequence[Run]) -> dict[str, Any]:
    """What the script draws and fills."""
    return {
        "runs": [
            {
                "name": run.label,
                **style,
                "rounds": [row.round for row in run.rows],
                "applied": [row.outcome in ("applied", "start", "") for row in run.rows],
                "ledger": shlex.quote(str(clean(str(run.directory / run_dir.LEDGER)))),
                **{name: [getattr(row, name) for row in run.rows] for name, *_ in METRICS[:BY_ROUND]},
            }
            for run, style in zip(runs, styles(runs), strict=True)
        ],
        "weights": [_weights(runs[i], i) for i in screened(runs)],
        "cost": cost_payload(runs),
        "people": drill.payload([_played(run) for run in runs]),
    }


def _played(run: Run) -> drill.Played:
    shas = {(n, name): said.sha256 for n, found in run.ledger.items() for name, said in found.items() if said.sha256}
    return drill.Played(
        rounds=list(run.weights), roles=run.roles, weights=run.weights, why=run.why, kept=run.verdicts,
        config=run.config, sha256=shas,
    )  # fmt: skip


def _weights(run: Run, i: int) -> dict[str, Any]:
    """Weight by client and round (None: not sampled), and the means of the groups by round."""
    numbers = list(run.weights)
    means: dict[Role, list[float | None]] = {}
    for role in dict.fromkeys(run.roles.values()):
        means[role] = [_mean([run.weights[n].get(name) for name in _of(run, role)]) for n in numbers]
    bands = _bands(run)
    return {
        "run": i,
        "rounds": numbers,
        "clients": [label for label, _, _ in bands],
        "roles": [role for _, role, _ in bands],
        "count": {role: len(_of(run, role)) for role in means},
        "z": [[_mean([run.weights[n].get(name) for name in names]) for n in numbers] for _, _, names in bands],
        "means": means,
    }


def _bands(run: Run) -> list[tuple[str, Role, list[str]]]:
    """Rows of the heat map: a client each; of more than ROWS, bands of clients of one group in order of mean weight."""
    size = -(-len(run.roles) // ROWS)
    if size == 1:
        return [(name, role, [name]) for name, role in run.roles.items()]
    means = {name: _mean([weights.get(name) for weights in run.weights.values()]) for name in run.roles}
    found: list[tuple[str, Role, list[str]]] = []
    for role in dict.fromkeys(run.roles.values()):
        ranked = sorted(_of(run, role), key=lambda name: -(means[name] or 0.0))
        for at in range(0, len(ranked), size):
            band = ranked[at : at + size]
            found.append((f"{at + 1} to {at + len(band)} of {len(ranked)}, the heaviest first", role, band))
    return found


def _of(run: Run, role: Role) -> list[str]:
    return [name for name, said in run.roles.items() if said == role]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _series(runs: Sequence[Run], metric: str) -> list[tuple[int, list[float | None]]]:
    """The table behind a chart: per round of any run, one value per run."""
    rounds = sorted({row.round for run in runs for row in run.rows})
    by_run = [{row.round: getattr(row, metric) for row in run.rows} for run in runs]
    return [(number, [values.get(number) for values in by_run]) for number in rounds]
