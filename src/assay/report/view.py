"""What the page says, computed from the runs: headline, tables, and the JSON that the charts are drawn from.

Nothing here knows HTML. Participants' text passes through as text; the template escapes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from assay.report.load import ROLES, Contribution, Role, Run, clean, natural

SCREENING = ("screen", "screens", "probe", "canary", "rehearse", "rehearsal", "gate")
"""Stages counted as the cost of the defence."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")
COLOURS = 5  # --c-0 .. --c-4 in style.css, beside --c-ref (honest only) and --c-bare (undefended)
LONGEST = 600  # characters of an answer or a sentence that are shown
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


def build(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything the template prints that is not simply an attribute of a run."""
    shared, differing = provenance(runs)
    return {
        "styles": styles(runs),
        "metrics": METRICS,
        "headline": headline(runs),
        "settings_differ": settings_differ(runs),
        "defended": screened(runs),
        "detection": [detection(run) for run in runs],
        "costs": [cost(run) for run in runs],
        "stages": stages(runs),
        "screening": SCREENING,
        "series": [(name, heading, _series(runs, name)) for name, heading, *_ in METRICS[:3]],
        "answers": answers(runs),
        "clients": clients(runs),
        "shared": shared,
        "differing": differing,
        "seeds": sorted({run.summary.seed for run in runs if run.summary and run.summary.seed is not None}),
        "models": sorted({run.summary.model.name for run in runs if run.summary and run.summary.model.name}),
    }


def styles(runs: Sequence[Run]) -> list[dict[str, str]]:
    """One colour, dash and marker per run, the same wherever the run appears."""
    found: list[dict[str, str]] = []
    plain = 0
    for run in runs:
        taken = [style["colour"] for style in found]
        if run.kind == "honest" and "ref" not in taken:
            found.append({"colour": "ref", "dash": "dot", "symbol": "diamond"})
        elif run.kind == "undefended" and "bare" not in taken:
            found.append({"colour": "bare", "dash": "dash", "symbol": "x"})
        else:
            turn = plain // COLOURS  # past the palette the dash tells two runs of a colour apart
            symbol = SYMBOLS[plain % len(SYMBOLS)]
            found.append({"colour": str(plain % COLOURS), "dash": DASHES[turn % len(DASHES)], "symbol": symbol})
            plain += 1
    return found


def headline(runs: Sequence[Run]) -> list[tuple[str, int | None]]:
    """The finding in one or two sentences, as pieces of text; a piece with a number is the label of that run."""
    done = [(i, run) for i, run in enumerate(runs) if run.finished]
    if not done:
        return [("No run is finished yet; what there is so far is below.", None)]
    attacked = [(i, run) for i, run in done if run.malicious]
    pieces: list[tuple[str, int | None]] = []
    if attacked:
        bad, every = ({count(run) for _, run in attacked} for count in (_malicious, _total))
        pieces.append((f"{_span(bad)} of {_span(every)} clients {'was' if bad == {1} else 'were'} malicious. ", None))
    elif all(role == "honest" for _, run in done for role in run.roles.values()):
        pieces.append(("Every client was honest. ", None))
    else:
        pieces.append(("Which clients were malicious is not known. ", None))
    measured = [(i, r) for i, r in attacked or done if None not in (r.start("refusal_rate"), r.end("refusal_rate"))]
    if not measured:
        return [*pieces, ("Refusal of harmful prompts was not measured.", None)]
    subject = "the model’s refusal of harmful prompts"
    bare = next((run for _, run in measured if run.kind == "undefended"), None)
    rest = [(i, run) for i, run in measured if run.kind != "undefended"]
    if len(rest) > 3:  # the best and the worst end
        ranked = sorted(rest, key=lambda item: -(item[1].end("refusal_rate") or 0.0))
        rest = [ranked[0], ranked[-1]]
    if bare is not None:
        pieces.append((f"Undefended, {subject} {_moved(bare)}", None))
    for turn, (i, run) in enumerate(rest):
        if bare is not None:
            before = "; with " if turn == 0 else ", with "
            after = f"{' it ended' if turn == 0 else ''} at {fixed(run.end('refusal_rate'), 2)}"
        else:
            before, after = ("With ", f", {subject} ") if turn == 0 else ("; with ", " it ")
            after += _moved(run)
        pieces += [(before, None), (run.label, i), (after, None)]
    return [*pieces, (".", None)]


def _moved(run: Run) -> str:
    start, end = fixed(run.start("refusal_rate"), 2), fixed(run.end("refusal_rate"), 2)
    if start == end:
        return f"stayed at {end}"
    return f"{'fell' if float(end) < float(start) else 'rose'} from {start} to {end}"


def _malicious(run: Run) -> int:
    return run.malicious


def _total(run: Run) -> int:
    return len(run.roles)


def _span(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def screened(runs: Sequence[Run]) -> list[int]:
    """Runs whose weights are worth drawing: with a defence, or any weight that is not 1."""
    return [
        i
        for i, run in enumerate(runs)
        if run.weights
        and (run.kind == "defended" or any(w != 1 for weights in run.weights.values() for w in weights.values()))
    ]


def settings_differ(runs: Sequence[Run]) -> list[str]:
    """What else than attack, level and share of malicious clients differs: such runs are not like for like."""
    done = [run for run in runs if run.summary]
    rows = [
        {key: _plain(value) for key, value in run.setting.items() if key not in ("level", "attack", "mix", "malicious")}
        | {"seed": _plain(run.summary.seed), "commit": run.summary.commit, "model": run.summary.model.sha256}
        for run in done
        if run.summary
    ]
    found = []
    for key in dict.fromkeys(key for row in rows for key in row):
        values = list(dict.fromkeys(row.get(key, "–")[:24] for row in rows))
        if len(values) > 1:
            found.append(f"{key} ({' / '.join(values)})")
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
        "lost": [
            {
                "name": name,
                "rounds": ", ".join(str(number) for number, _, _ in rounds),
                "lowest": fixed(min(weight for _, weight, _ in rounds), 2),
                "reasons": ", ".join(sorted({reason for _, _, reason in rounds if reason})),
            }
            for name, rounds in losses.items()
        ],
        "reasons": [
            {"row": row, "sentence": shorten(row.sentence)}
            for row in (sorted(run.summary.reasons, key=lambda r: -(r.honest + r.malicious)) if run.summary else ())
            if row.reason != "ok"
        ],
    }


def stages(runs: Sequence[Run]) -> list[str]:
    """Stages in order of first appearance, screening first, `other` last."""
    found = dict.fromkeys(stage for run in runs for stage in run.seconds)
    return sorted(found, key=lambda stage: (stage not in SCREENING, stage == "other"))


def cost(run: Run) -> dict[str, Any]:
    """Seconds by stage, their sum, and the share that screening took."""
    spent = run.seconds
    total = sum(spent.values())
    share = sum(value for stage, value in spent.items() if stage in SCREENING) / total if total else None
    return {"stages": spent, "total": total or None, "share": share}


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


def clients(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every participant with its role in each run and its mean weight; the rounds are in the payload."""
    names = dict.fromkeys(name for run in runs for name in run.roles)
    found = []
    for name in names:
        roles = {run.roles[name] for run in runs if name in run.roles}
        means = []
        for i, run in enumerate(runs):
            weights = [weights[name] for weights in run.weights.values() if name in weights]
            if weights:
                means.append((i, sum(weights) / len(weights)))
        role = next(iter(roles)) if len(roles) == 1 else "malicious" if "malicious" in roles else "unknown"
        found.append({"name": name, "role": role, "mixed": len(roles - {"unknown"}) > 1, "means": means})
    return sorted(found, key=lambda client: (ROLES.index(client["role"]), natural(client["name"])))


def provenance(runs: Sequence[Run]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Facts that all runs share, and per fact the values where they differ."""
    rows = []
    for run in runs:
        row = {"directory": str(clean(str(run.directory))), "state": "finished" if run.finished else "unfinished"}
        if (s := run.summary) is not None:
            row |= {"command": s.command, "started": s.started, "finished": s.finished, "seed": _plain(s.seed)}
            row |= {"assay": s.assay, "commit": s.commit, "machine": _plain(s.machine)}
            row |= {"model": s.model.name, "model sha256": s.model.sha256, "dtype": s.model.dtype}
            row |= {"alignment": s.model.alignment}
            row |= {f"version: {name}": _plain(value) for name, value in s.versions.items()}
            row |= {f"setting: {name}": _plain(value) for name, value in s.setting.items()}
        if run.chain:
            row |= {"ledger": f"{run.chain.entries} entries, chain {'holds' if run.chain.ok else 'BROKEN'}"}
            row |= {"ledger head": run.chain.head}
        rows.append({key: value for key, value in row.items() if value})
    shared: dict[str, str] = {}
    differing: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [shorten(row.get(key, "")) or "–" for row in rows]
        if len(set(values)) == 1:
            shared[key] = values[0]
        else:
            differing[key] = values
    return shared, differing


def payload(runs: Sequence[Run]) -> dict[str, Any]:
    """What page.js draws. Texts of the drill-down are listed once and referred to by their index."""
    texts: dict[str, int] = {}

    def index(text: str) -> int:
        return texts.setdefault(text, len(texts))

    order = [client["name"] for client in clients(runs)]
    names = stages(runs)
    drill: list[list[list[Any]]] = []
    for name in order:
        rows: list[list[Any]] = []
        for i, run in enumerate(runs):
            for number, weights in run.weights.items():
                if name in weights:
                    said = run.ledger.get(number, {}).get(name) or Contribution(participant=name)
                    what = (said.screen, said.reason, shorten(said.sentence, 240), said.sha256[:12])
                    rows.append([i, number, round(weights[name], 4), *map(index, what)])
        drill.append(rows)
    return {
        "runs": [
            {
                "name": run.label,
                **style,
                "rounds": [row.round for row in run.rows],
                "applied": [row.outcome in ("applied", "start", "") for row in run.rows],
                **{name: [getattr(row, name) for row in run.rows] for name, *_ in METRICS[:3]},
            }
            for run, style in zip(runs, styles(runs), strict=True)
        ],
        "weights": [_weights(runs[i], i) for i in screened(runs)],
        "cost": {
            "stages": names,
            "screening": [stage in SCREENING for stage in names],
            "seconds": [[round(run.seconds.get(stage, 0.0), 3) for run in runs] for stage in names],
        },
        "clients": drill,
        "texts": list(texts),
    }


def _weights(run: Run, i: int) -> dict[str, Any]:
    """Weight by client and round (None: not sampled), and the means of the groups by round."""
    numbers = list(run.weights)
    means: dict[str, list[float | None]] = {}
    for role in dict.fromkeys(run.roles.values()):
        means[role] = []
        for number in numbers:
            kept = [weight for name, weight in run.weights[number].items() if run.roles[name] == role]
            means[role].append(sum(kept) / len(kept) if kept else None)
    return {
        "run": i,
        "rounds": numbers,
        "clients": list(run.roles),
        "roles": list(run.roles.values()),
        "z": [[run.weights[number].get(name) for number in numbers] for name in run.roles],
        "means": means,
    }


def _series(runs: Sequence[Run], metric: str) -> list[tuple[int, list[float | None]]]:
    """The table behind a chart: per round of any run, one value per run."""
    rounds = sorted({row.round for run in runs for row in run.rows})
    by_run = [{row.round: getattr(row, metric) for row in run.rows} for run in runs]
    return [(number, [values.get(number) for values in by_run]) for number in rounds]


def fixed(value: float | None, places: int) -> str:
    """Rounded half up, as a reader would: 0.975 is 0.98 although the float is a hair below. None is an en dash.

    >>> fixed(0.975, 2), fixed(None, 2), fixed(-0.001, 2)
    ('0.98', '–', '0.00')
    """
    if value is None:
        return "–"
    if abs(value) >= 1e9:
        return f"{value:.2e}"
    rounded = Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP)
    return str(abs(rounded) if rounded == 0 else rounded)


def seconds(value: float | None) -> str:
    """Seconds without false precision.

    >>> seconds(3.21), seconds(1234.5), seconds(None)
    ('3.2', '1,235', '–')
    """
    return "–" if value is None else f"{value:.1f}" if value < 10 else f"{Decimal(repr(value)):,.0f}"


def shorten(text: str, longest: int = LONGEST) -> str:
    """At most `longest` characters, with a mark where something was cut."""
    text = text.strip()
    return text if len(text) <= longest else f"{text[:longest].rstrip()} …"


def _plain(value: object) -> str:
    """A JSON value in a line of text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return "–" if value is None else re.sub(r"\s+", " ", str(value).lower() if isinstance(value, bool) else str(value))
