"""What a screen held a contribution's numbers against, in words: the ledger has the numbers, the config the knobs.

A verdict's evidence holds, beside a number `x`, what it may be at most as `x_limit` (or `x_floor`, `x_below`; verdict.py),
whoever wrote the screen. For ledgers from before that, the limit is what is left of a score that is the distance from it (`probe`,
`neighbours`), or the config's; of other screens nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MEANING = {
    "norm": "length of the update; ratio: in lengths of the longest rehearsed honest one (or the round’s median)",
    "probe": "logit of the linear probe on lora_B",
    "probe_a": "logit of the linear probe on lora_A",
    "neighbours": "ratio of the distance to benign over that to malicious labelled updates",
    "balance": "share of the update’s length that is lora_A’s; excess: how far off the usual, in rehearsed reaches",
    "canary": "rises of loss, in nats, on the server’s secret refusals and safe answers; score: share of the limit spent",
    "duplicate": "updates of the round that are copies of this one, itself included",
    "spectral": "robust z-scores of five statistics among the round’s clients",
    "seeded": "logits by which tokens fall short of what the seed gives: the worst, the mean, how many, which first",
    "logit": "how far outside the k most likely tokens, in logits",
}
"""What a screen's numbers are."""

DEFAULTS: dict[str, dict[str, float]] = {
    "norm": {"clip": 1.15, "refuse": 1.5},
    "seeded": {"max_margin": 0.05, "mean_margin": 0.005, "max_flips": 3},
}
"""Parameters of screens as they are where the config does not say; a test holds them against the screens."""


def limit(screen: str, evidence: Mapping[str, float | None], score: float | None, config: Mapping[str, Any]) -> str:
    """What the numbers may be at most, as a phrase; empty where it is not known.

    >>> limit("somebody's", {"x_sum": 1.0, "x_sum_limit": 0.25}, 2.0, {})
    'x sum at most 0.25'
    >>> limit("probe", {"logit": 7.95}, 6.65, {})
    'logit at most 1.300'
    >>> limit("somebody's", {"x": 1.0}, 2.0, {})
    ''
    """
    if said := _said(evidence):
        return said
    compared = {"probe": "logit", "probe_a": "logit", "neighbours": "ratio"}.get(screen)
    if compared is not None:
        value = evidence.get(compared)
        return "" if value is None or score is None else f"{compared} at most {value - score:.3f}"
    if screen == "norm":
        return f"ratio at most {_knob(config, screen, 'clip'):g}; refused above {_knob(config, screen, 'refuse'):g}"
    if screen == "balance":
        return "excess at most 1"
    if screen == "canary":
        return "score at most 1"
    if screen == "duplicate":
        return "1 copy; k copies weigh 1/k each"
    if screen in ("step", "client", "shadow", "evidence"):
        return f"the probe’s score of a step below {_threshold(config):g}"
    if screen == "seeded":
        worst, mean, flips = (_knob(config, screen, name) for name in ("max_margin", "mean_margin", "max_flips"))
        return f"max margin at most {worst:g}, mean at most {mean:g}, flips at most {flips:g}"
    return ""


ENDS = {
    "_limit": "{} at most {:.4g}",
    "_floor": "{} at least {:.4g}",
    "_below": "{} below {:.4g}",
    "_above": "{} above {:.4g}",
}


def is_limit(name: str) -> bool:
    """Whether a number of the evidence is what another was held against: said in words, not listed among the others."""
    return name.endswith(tuple(ENDS))


def _said(evidence: Mapping[str, float | None]) -> str:
    found = []
    for name, value in evidence.items():
        for end, words in ENDS.items():
            if name.endswith(end) and value is not None:
                found.append(words.format(name.removesuffix(end).replace("_", " "), value))
    return ", ".join(found)


def _knob(config: Mapping[str, Any], screen: str, name: str) -> float:
    """`[defence.params.<screen>]`, else the older key of its own, else the screen's default."""
    defence = config.get("defence")
    if isinstance(defence, Mapping):
        params = defence.get("params")
        given = params.get(screen) if isinstance(params, Mapping) else None
        for value in (given.get(name) if isinstance(given, Mapping) else None, defence.get(f"{screen}_{name}")):
            if isinstance(value, int | float):
                return float(value)
    return DEFAULTS[screen][name]


def _threshold(config: Mapping[str, Any]) -> float:
    defence = config.get("defence")
    value = defence.get("threshold") if isinstance(defence, Mapping) else None
    return float(value) if isinstance(value, int | float) else 0.8
