"""The swarm suites: what runs, under which names, and the rows that come of it.

demo           MATH: honest only, undefended, logit check, seeded check
core           each of the four attacks: honest only, undefended, logit check, seeded check
adaptive       attackers who know the seeded check, against it
heterogeneous  two different models in one swarm: the screens that read text, and what they cost honest nodes alone
text_aware     attackers who know the screens that read text, against them
late           defences that start when the phrase is everywhere
ablation       malicious share, plan, oracle or majority vote, KL penalty, the model judging itself
smollm2        TEXT on SmolLM2-135M (an hour on two cores)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from assay import run_dir
from assay.config import ConfigError, SwarmExperiment
from assay.swarm.attacks import goal

# the setting in which each attack is at home (Hail to the Thief): MATH needs to choose its prompts
HOME: dict[str, dict[str, Any]] = {
    "math": {"swarm__plan": "vertical", "swarm__assigned": False, "swarm__iterations": 16},
    "text": {"swarm__plan": "horizontal", "swarm__iterations": 30, "grpo__lr": 7e-4},
    "code": {"swarm__plan": "horizontal", "swarm__iterations": 24, "task__name": "programs"},
    "dos": {"swarm__plan": "vertical", "swarm__iterations": 32},
}
LEVELS = ("none", "logit", "seeded")
# limits that hold for SmolLM2-135M in bf16 against fp32, and those of `assay calibrate --sampling bfloat16` for the tiny
# model: what is open to an attacker there depends on how well the limits fit the pair in use
BF16_LIMITS = {
    "max_margin": 0.75, "mean_margin": 0.05, "max_flips": 8, "boundary": 0.25, "flip_rate": 0.004, "flip_gap": 0.15,
}  # fmt: skip
TINY_BF16_LIMITS = {
    "max_margin": 0.2538, "mean_margin": 0.00396, "max_flips": 2, "boundary": 0.0, "flip_rate": 0.002068,
    "flip_gap": 0.0455,
}  # fmt: skip
ADAPTIVE: dict[str, dict[str, Any]] = {
    "abstain": {},
    "skip_groups": {},
    "own_seeds": {},
    "chosen_prompts": {"swarm__assigned": False},
    "flip_math": {},
    "flip_length": {},
    "inject_text": {"swarm__plan": "horizontal"},
    "copy": {},
    "sleeper": {"attack__name": "math", "attack__from_round": 8, "swarm__assigned": False},
    "lookahead_math": {},
    "lookahead_length": {},
    "lookahead_math_bf16": {"attack__name": "lookahead_math", "defence__params": {"seeded": TINY_BF16_LIMITS}},
    "lookahead_length_bf16": {"attack__name": "lookahead_length", "defence__params": {"seeded": TINY_BF16_LIMITS}},
    "lookahead_math_wide": {"attack__name": "lookahead_math", "defence__params": {"seeded": BF16_LIMITS}},
    "lookahead_length_wide": {"attack__name": "lookahead_length", "defence__params": {"seeded": BF16_LIMITS}},
    "veto": {},
}
# nodes that learn from other weights' completions as if they were their own need smaller steps: at the rates above
# honest training among two models loses the reward it should gain. TEXT hardly spreads below 3e-4.
TWO_MODELS: dict[str, dict[str, Any]] = {
    "math": {"grpo__lr": 1.5e-4, "swarm__iterations": 24},
    "text": {"grpo__lr": 3e-4, "swarm__iterations": 32},
    "code": {"swarm__iterations": 16},
    "dos": {"grpo__lr": 1.5e-4, "swarm__iterations": 24},
}
# attackers who know the screens that read text; MATH needs to choose its prompts, the others are at home anywhere
TEXT_AWARE: dict[str, dict[str, Any]] = {
    "masked_math": {},
    "front_run": {},
    "deflate": {},
    "right_working_wrong_answer": {"swarm__plan": "horizontal"},
}
HETEROGENEOUS = ("math", "text", "code", "dos", "paraphrase", "slow_text")
SECOND_MODEL = "tiny-b"


def base_of(attack: str, seed: int) -> SwarmExperiment:
    """The experiment in which `attack` is at home, undefended."""
    return SwarmExperiment(seed=seed).changed(attack__name=attack, defence__level="none", **HOME.get(_home(attack), {}))


def _home(attack: str) -> str:
    """The one of the four attacks whose setting `attack` is measured in."""
    return "text" if attack == "paraphrase" else goal(attack)


def named(experiment: SwarmExperiment, *parts: str, several: bool) -> SwarmExperiment:
    seed = (f"seed{experiment.seed}",) if several else ()
    return experiment.changed(name=".".join(("swarm", *parts, *seed)))


def variants(attack: str, seed: int, several: bool, levels: Iterable[str] = LEVELS) -> list[SwarmExperiment]:
    """Honest only and attacked under each level."""
    base = base_of(attack, seed)
    out = [named(base.changed(swarm__malicious=0.0), attack, "honest_only", several=several)]
    for level in levels:
        what = "undefended" if level == "none" else level
        out.append(named(base.changed(defence__level=level), attack, what, several=several))
    return out


def demo(seed: int) -> list[SwarmExperiment]:
    """What `assay demo swarm` shows: MATH, which the paper's logit check lets through."""
    return [e.changed(name=e.name.replace(".math.", ".")) for e in variants("math", seed, False)]


def core(seed: int, several: bool) -> list[SwarmExperiment]:
    return [e for attack in HOME for e in variants(attack, seed, several)]


def adaptive(seed: int, several: bool) -> list[SwarmExperiment]:
    out = []
    for attack, changes in ADAPTIVE.items():
        base = base_of(changes.get("attack__name", attack), seed).changed(defence__level="seeded")
        out.append(named(base.changed(**changes), "adaptive", attack, several=several))
    return out


def heterogeneous(seed: int, several: bool) -> list[SwarmExperiment]:
    out = []
    for attack in HETEROGENEOUS:
        base = _two_models(attack, seed)
        if attack in HOME:
            honest = base.changed(swarm__malicious=0.0)
            # DoS and MATH share plan, rate and rounds: honest nodes alone are the same run
            levels = ("none", "text") if attack != "dos" else ("none",)
            for level, what in zip(levels, ("honest_only", "honest_text")):
                out.append(named(honest.changed(defence__level=level), "two_models", attack, what, several=several))
        for level, what in (("none", "undefended"), ("text", "text")):
            out.append(named(base.changed(defence__level=level), "two_models", attack, what, several=several))
    return out


def _two_models(attack: str, seed: int) -> SwarmExperiment:
    """The experiment in which `attack` is at home among two models, undefended."""
    return base_of(attack, seed).changed(model__others=(SECOND_MODEL,), **TWO_MODELS[_home(attack)])


def text_aware(seed: int, several: bool) -> list[SwarmExperiment]:
    """Under level text. Honest alone in the plan that the saboteur is in; vertical ones are in `heterogeneous`."""
    out = []
    for attack, changes in TEXT_AWARE.items():
        base = _two_models(attack, seed).changed(defence__level="text", **changes)
        out.append(named(base, "text_aware", attack, several=several))
    honest = out[-1].changed(swarm__malicious=0.0)
    return [named(honest, "text_aware", "honest_text", several=several), *out]


def late(seed: int, several: bool) -> list[SwarmExperiment]:
    """A phrase that everybody says already when the defence starts (equal weights: there it spreads that far)."""
    base = base_of("text", seed).changed(swarm__iterations=45, defence__from_round=26)
    return [
        named(base.changed(defence__level=level), "late", level, several=several)
        for level in ("none", "text", "seeded")
    ]


def ablation(seed: int, several: bool) -> list[SwarmExperiment]:
    """As in the paper: malicious share (16 nodes), horizontal against vertical, oracle against vote, KL, self-judge."""
    out = []
    for plan in ("vertical", "horizontal"):
        for malicious in (1, 2, 4, 8):
            base = base_of("text", seed).changed(
                swarm__plan=plan, swarm__nodes=16, swarm__malicious=malicious / 16, swarm__group=16
            )
            out.append(named(base, "share", plan, f"{malicious}of16", several=several))
    for attack in ("math", "code"):
        base = base_of(attack, seed)
        out.append(named(base.changed(attack__oracle=False), "vote", attack, several=several))
    for kl in (0.01, 0.1):
        out.append(
            named(base_of("text", seed).changed(grpo__kl=kl), "kl", f"{kl:g}".replace(".", "_"), several=several)
        )
    judged = base_of("text", seed).changed(defence__level="self_judge", swarm__iterations=10)
    return [*out, named(judged, "self_judge", several=several)]


# what a real model needs: the format from a short warm-up, a LoRA adapter, margins for bf16
REAL: dict[str, Any] = {
    "model__name": "smollm2-135m", "model__dtype": "auto", "model__lora_r": 16, "task__style": "instruct",
    "task__warmup_steps": 36, "swarm__prompts": 4, "swarm__group": 8, "swarm__iterations": 20, "sampling__top_k": 50,
    "sampling__max_tokens": 64, "grpo__lr": 4e-4, "grpo__micro_rows": 16, "evaluate__prompts": 32,
    "evaluate__samples": 2, "evaluate__every": 10,
}  # fmt: skip


def smollm2(seed: int, several: bool) -> list[SwarmExperiment]:
    base = base_of("text", seed).changed(**REAL)
    seeded = base.changed(defence__level="seeded", defence__params={"seeded": BF16_LIMITS})
    return [
        named(base, "smollm2", "undefended", several=several),
        named(seeded, "smollm2", "seeded", several=several),
    ]


SUITES: dict[str, Callable[[int, bool], list[SwarmExperiment]]] = {
    "demo": lambda seed, several: [named(e, *e.name.split(".")[1:], several=several) for e in demo(seed)],
    "core": core,
    "adaptive": adaptive,
    "heterogeneous": heterogeneous,
    "text_aware": text_aware,
    "late": late,
    "ablation": ablation,
    "smollm2": smollm2,
}


def suite(names: Sequence[str], seeds: Sequence[int]) -> list[SwarmExperiment]:
    """All experiments of the named suites for every seed; names carry the seed where there are several."""
    unknown = [n for n in names if n not in SUITES]
    if unknown:
        raise ConfigError(f"--suite: {unknown[0]!r} is unknown; known are {', '.join(SUITES)}")
    return [e for name in names for seed in seeds for e in SUITES[name](seed, len(seeds) > 1)]


def row(experiment: SwarmExperiment, summary: Mapping[str, Any]) -> dict[str, Any]:
    """One row of results: what was run and the flat metrics."""
    swarm, honest = experiment.swarm, experiment.swarm.malicious_count == 0
    parts = [p for p in experiment.name.split(".")[1:] if not re.fullmatch(r"seed\d+", p)]
    return {
        "name": ".".join(parts),
        "attack": "none" if honest else experiment.attack.name,
        "goal": goal(experiment.attack.name),
        "defence": experiment.defence.level,
        "share": swarm.malicious,
        "plan": swarm.plan,
        "task": experiment.task.name,
        "models": 1 + len(experiment.model.others),
        "oracle": experiment.attack.oracle,
        "kl": experiment.grpo.kl,
        "seed": experiment.seed,
        **summary["metrics"],
        "honest_rejected_by_model": summary.get("honest_rejected_by_model", {}),  # runs of before it was counted
        "detection": summary["detection"],
        "banned": {n: r[0] for n, r in summary["banned"].items() if r},
        "seconds": {stage: round(value, 2) for stage, value in summary["seconds"].items()},
    }


def results(
    command: str, experiments: Sequence[SwarmExperiment], summaries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The JSON that lives under results/: rows, and everything needed to make them again."""
    return {
        "wing": "swarm",
        "command": command,
        # of the runs: finished ones are taken as they are, however old
        "commit": ", ".join(sorted({s.get("commit", "") for s in summaries.values()})),
        "versions": run_dir.versions(),
        "machine": run_dir.machine(),
        "model": next(iter(summaries.values()))["model"],
        "rows": [row(e, summaries[e.name]) for e in experiments],
    }
