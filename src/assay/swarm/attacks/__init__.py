"""What malicious nodes send: the four attacks of Hail to the Thief, and attackers who know the defence.

An attack is one function from a `Seat` (what the node sees of the round) to completions. It never imports a screen: an
adaptive attacker is handed the defence. Third parties add theirs under the entry point group `assay.swarm_attacks`; an
attack whose success is a behaviour carries it along: an attribute `shows(text, settings)`, True, False, or None where
the text had no occasion.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from assay.config import ConfigError
from assay.swarm.attacks import planted
from assay.swarm.attacks.adaptive import (
    Diluted,
    Flip,
    Inject,
    Paraphrased,
    abstain,
    chosen_prompts,
    copy,
    front_run,
    own_seeds,
    skip_groups,
    veto,
)  # fmt: skip
from assay.swarm.attacks.lookahead import Lookahead
from assay.swarm.attacks.masked import Masked
from assay.swarm.attacks.planted import THIEF, Planted, code, known_solutions, longest, math, nonsense, text
from assay.swarm.attacks.sabotage import Deflate, right_working_wrong_answer
from assay.swarm.attacks.seat import Attack, Check, Ids, Near, Seat, Settings

__all__ = [
    "ATTACKS",
    "THIEF",
    "Attack",
    "Check",
    "Ids",
    "Near",
    "Seat",
    "Settings",
    "goal",
    "known_solutions",
    "make",
    "shows",
]

ATTACKS: dict[str, Attack] = {
    "text": Planted(text, everywhere=True),
    "nonsense": Planted(nonsense, everywhere=True),
    "math": Planted(math),
    "code": Planted(code, everywhere=True),
    "dos": longest,
    "abstain": abstain,
    "skip_groups": skip_groups,
    "own_seeds": own_seeds,
    "chosen_prompts": chosen_prompts,
    "flip_math": Flip("math"),
    "flip_length": Flip("length"),
    "lookahead_math": Lookahead("math"),
    "lookahead_length": Lookahead("length"),
    "inject_text": Inject(Planted(text, everywhere=True)),
    "veto": veto,
    "copy": copy,
    "front_run": front_run,
    "masked_math": Masked(),
    "right_working_wrong_answer": right_working_wrong_answer,
    "deflate": Deflate(),
    "paraphrase": Paraphrased(),
    "slow_text": Diluted(Planted(text, everywhere=True)),
}
# which behaviour each attack wants to spread; "dos" is measured by length, or by what it costs the honest
GOALS = {
    "abstain": "dos", "skip_groups": "dos", "veto": "dos", "own_seeds": "dos", "chosen_prompts": "dos", "copy": "dos",
    "front_run": "dos", "deflate": "dos", "right_working_wrong_answer": "dos", "flip_length": "dos",
    "lookahead_length": "dos", "flip_math": "math", "lookahead_math": "math", "masked_math": "math",
    "inject_text": "text", "slow_text": "text",
}  # fmt: skip


@cache
def make(name: str) -> Attack:
    """The attack called `name`, with its wording where one is named: `masked_math:article`. ConfigError else."""
    if name in ATTACKS:
        return ATTACKS[name]
    family, colon, wording = name.partition(":")
    if colon and family == "masked_math":
        return Masked((wording,))
    for found in entry_points(group="assay.swarm_attacks"):
        if found.name == name:
            attack: Attack = found.load()
            return attack
    raise ConfigError(f"unknown attack {name!r}; known: {', '.join(ATTACKS)}")


def goal(name: str) -> str:
    """Behaviour by which attack `name` is measured: text, nonsense, math, code or dos."""
    family = name.partition(":")[0]
    return GOALS.get(family, family)


def shows(name: str, text: str, settings: Settings) -> bool | None:
    """Whether `text` shows the behaviour attack `name` wants; None: no occasion, or the attack has no behaviour."""
    if name.partition(":")[0] in ATTACKS:
        return planted.shows(goal(name), text, settings)
    own = getattr(make(name), "shows", None)
    return None if own is None else own(text, settings)
