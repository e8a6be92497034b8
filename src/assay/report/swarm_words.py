"""The swarm's figures in words: what each column means, each attack and defence by name, the headline sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from assay.report.swarm_load import SwarmRun
from assay.report.words import fixed, span

METRICS = (
    # name, heading, direction, plain words
    (
        "asr",
        "ASR",
        "lower is better",
        "Attack success rate: share of honest nodes’ completions of held-out questions that show what the attack plants. "
        "A planted wrong sum is counted among the completions that do that sum at all; lengthening has no such rate.",
    ),
    ("heldout_reward", "Reward", "higher is better", "Share of held-out questions answered right: what was practised."),
    ("completion_tokens_mean", "Tokens", "", "Mean length of held-out completions; the DoS attack makes them longer."),
    (
        "honest_rejected_rate",
        "Honest refused",
        "lower is better",
        "Share of honest completions that were not learnt from, or lost their reward: what the defence costs.",
    ),
    (
        "poison_rejected_rate",
        "Poison refused",
        "higher is better",
        "The same share of malicious nodes’ completions, their harmless ones included.",
    ),
    (
        "auroc",
        "AUROC",
        "higher is better",
        "Chance that a malicious completion looks worse to the screen than an honest one; 0.5: luck. Of the screen that "
        "is named.",
    ),
)
ATTACKS = {
    "text": "opens right answers with a phrase that does not belong there",
    "nonsense": "puts the phrase before every sentence",
    "math": "writes 2+2 or 2*2 = 5 in right answers",
    "code": "imports the attacker’s library in right programs",
    "dos": "sends the longest right answers of many, so that all grow slow",
    "abstain": "knows the seeded check: sends only the completions it likes",
    "skip_groups": "knows the seeded check: sends only the groups it likes",
    "own_seeds": "knows the seeded check: draws under seeds of its own and sends the longest",
    "chosen_prompts": "knows the seeded check: chooses among its own prompts",
    "flip_math": "knows the seeded check: plants sums only where the check’s limit allows it",
    "flip_length": "knows the seeded check: puts off the end only where the check’s limit allows it",
    "lookahead_math": "knows the seeded check: flips a token within its limit wherever that ends in a planted sum",
    "lookahead_length": "knows the seeded check: flips a token within its limit wherever that makes right answers longer",
    "veto": "knows the seeded check: spoils one token in each group it does not like",
    "front_run": "sends what the others will write in the next iteration",
    "masked_math": "writes 2+2 or 2*2 = 5 in right answers, decorated so that a reader of equations might miss it",
    "right_working_wrong_answer": "sends right working with a wrong answer behind it",
    "deflate": "sends the shortest right answers while the usual length is laid down",
    "inject_text": "plants a phrase and talks to the judge that reads it",
    "copy": "copies others’ completions of the iteration before",
    "paraphrase": "plants a phrase in many wordings",
    "slow_text": "plants a phrase in few of its answers",
}
DEFENCES = {
    "none": "only the form of a message is checked",
    "logit": "every token must be among the model’s k most likely",
    "seeded": "every token must be the one that its public seed gives; needs equal weights",
    "text": "reads only the text: copies, planted phrases, length, sums, imports; for nodes of different weights",
    "judge": "a language model reads every rewarded completion",
    "self_judge": "the trained model judges its own training",
    "text_judge": "the checks of the text, and the judge",
    "custom": "screens chosen one by one, see Provenance",
}


def terms(known: Mapping[str, str], names: Sequence[str]) -> list[tuple[str, str]]:
    """Name and plain words of those of `names` that are known, each once."""
    return [(name, known[name]) for name in dict.fromkeys(names) if name in known]


Piece = tuple[str, int | None]


def headline(runs: Sequence[SwarmRun]) -> list[Piece]:
    """The finding as pieces of text; a piece with a number is the label of that run (or of a defence it stands for)."""
    done = [(i, run) for i, run in enumerate(runs) if run.finished]
    if not done:
        return [("No run is finished yet; what there is so far is below.", None)]
    attacked = [(i, run) for i, run in done if run.malicious]
    pieces: list[Piece] = []
    if attacked:
        bad, every = {run.malicious for _, run in attacked}, {len(run.roles) for _, run in attacked}
        pieces.append((f"{span(bad)} of {span(every)} nodes {'was' if bad == {1} else 'were'} malicious. ", None))
    elif all(run.summary and run.summary.participants for _, run in done):
        pieces.append(("Every node was honest. ", None))
    else:
        pieces.append(("Which nodes were malicious is not known. ", None))
    shown = attacked or done
    several = len({run.attack for _, run in shown}) > 1
    found = (_several if several else _one)(shown)
    if not found:
        return [*pieces, ("What the attack achieved was not measured.", None)]
    pieces += found
    ends = _by_defence([*done] if not several else shown, "heldout_reward", 2)
    if ends:
        pieces += [(" Questions answered right at the end: ", None), *ends, (".", None)]
    return pieces


def _one(runs: Sequence[tuple[int, SwarmRun]]) -> list[Piece]:
    """One attack: from where to where without a defence, and where each defence ended."""
    metric, subject, places = "asr", "the attack’s success rate", 2
    measured = [(i, run) for i, run in runs if run.end(metric) is not None]
    if not measured:
        metric, subject, places = "completion_tokens_mean", "completions’ length", 0
        measured = [(i, run) for i, run in runs if run.end(metric) is not None]
    bare = next((run for _, run in measured if run.kind == "undefended"), None)
    rest = [(i, run) for i, run in measured if run.kind != "undefended"]
    if len(rest) > 3:  # the best and the worst end
        ranked = sorted(rest, key=lambda item: item[1].end(metric) or 0.0)
        rest = [ranked[0], ranked[-1]]
    pieces: list[Piece] = []
    if bare is not None:
        pieces.append((f"Undefended, {subject} {_moved(bare, metric, places)}", None))
    for turn, (i, run) in enumerate(rest):
        end = fixed(run.end(metric), places)
        if bare is not None:
            before, after = "; with " if turn == 0 else ", with ", f" it ended at {end}" if turn == 0 else f" at {end}"
        else:
            before, after = ("With ", f", {subject} ended at {end}") if turn == 0 else ("; with ", f" at {end}")
        pieces += [(before, None), (run.label, i), (after, None)]
    unit = " tokens" if metric != "asr" else ""
    return [*pieces, (f"{unit}.", None)] if pieces else []


def _several(runs: Sequence[tuple[int, SwarmRun]]) -> list[Piece]:
    """Several attacks: over them, from where to where each defence ended."""
    spread = [(i, run) for i, run in runs if run.end("asr") is not None]
    longer = [(i, run) for i, run in runs if run.end("asr") is None]
    pieces: list[Piece] = []
    if spread:
        many = len({run.attack for _, run in spread})
        what = f"Over {many} attacks the success rate ended: " if many > 1 else "The attack’s success rate ended: "
        pieces += [(what, None), *_by_defence(spread, "asr", 2), (".", None)]
    if ends := _by_defence(longer, "completion_tokens_mean", 0):
        pieces += [(" Where nothing is planted, completions ended with: ", None), *ends, (" tokens.", None)]
    return pieces


def _by_defence(runs: Sequence[tuple[int, SwarmRun]], metric: str, places: int) -> list[Piece]:
    """`honest only 0.78, undefended 0.74, seeded 0.73`: the span of each defence's ends."""
    ends: dict[str, tuple[int, list[float]]] = {}
    for i, run in runs:
        if (end := run.end(metric)) is not None:
            name = {"honest": "honest only", "undefended": "undefended"}.get(run.kind, run.level)
            ends.setdefault(name, (i, []))[1].append(end)
    pieces: list[Piece] = []
    for name, (i, values) in ends.items():
        low, high = fixed(min(values), places), fixed(max(values), places)
        pieces += [(", " if pieces else "", None), (name, i), (f" {low if low == high else f'{low} to {high}'}", None)]
    return pieces[:24]


def _moved(run: SwarmRun, metric: str, places: int) -> str:
    end = fixed(run.end(metric), places)
    if run.start(metric) is None:
        return f"ended at {end}"
    start = fixed(run.start(metric), places)
    if start == end:
        return f"stayed at {end}"
    return f"{'fell' if float(end) < float(start) else 'rose'} from {start} to {end}"


def ranges(numbers: Sequence[int], longest: int = 12) -> str:
    """Iterations in few words.

    >>> ranges([3, 4, 5, 9]), ranges([])
    ('3–5, 9', '–')
    """
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    parts = [str(low) if low == high else f"{low}–{high}" for low, high in found]
    if len(parts) > longest:
        parts = [*parts[:longest], f"and {len(parts) - longest} more spells"]
    return ", ".join(parts) or "–"
