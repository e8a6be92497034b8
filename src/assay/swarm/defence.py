"""Levels of defence in the swarm: which screens judge a pool, and what they need of the forward pass.

none        schema only: record and trust
logit       the paper's check for equal weights: every token among the model's k most likely
seeded      Assay's default for equal weights: every token the one its public seed gives
text        for nodes whose weights differ: copycat, enrichment, length, arithmetic, imports
judge       the paper's for both settings: a language model reads every rewarded completion
self_judge  the trained model judges itself (the paper found it useless; an ablation)
text_judge  text and judge together
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from assay.config import ConfigError, SwarmExperiment
from assay.contribution import Pool
from assay.swarm import screens
from assay.swarm.evidence import Wanted
from assay.swarm.sampling import Sampler
from assay.swarm.screening import TrustRules
from assay.verdict import AnyScreen

TEXT = ("copycat", "enrichment", "length", "arithmetic", "imports")
LEVELS: dict[str, tuple[str, ...]] = {
    "none": ("schema",),
    "logit": ("schema", "logit"),
    "seeded": ("schema", "seeded"),
    "text": ("schema", *TEXT),
    "judge": ("schema", "judge"),
    "self_judge": ("schema", "self_judge"),
    "text_judge": ("schema", *TEXT, "judge"),
}
BOUNDARY = 0.1  # logits forgiven at the edge of the top k; see `assay calibrate`


@dataclass(frozen=True, slots=True, kw_only=True)
class Defence:
    """`screens` read texts and ids, `model_screens` the evidence of the forward pass (`wanted`).

    Before `from_round` there is `schema` alone; `active(round)` says what there is.
    """

    level: str
    screens: tuple[AnyScreen[Pool], ...]
    model_screens: tuple[AnyScreen[Pool], ...]
    wanted: Wanted | None
    monitor: frozenset[str]
    trust: TrustRules
    from_round: int = 1

    def active(self, round: int) -> Defence:
        """This defence as it stands in `round`."""
        if round >= self.from_round:
            return self
        return replace(
            self, screens=tuple(s for s in self.screens if s.name == "schema"), model_screens=(), wanted=None
        )

    def summary(self) -> dict[str, Any]:
        """What will run, for the ledger and the report."""
        return {
            "level": self.level,
            "screens": [s.name for s in (*self.screens, *self.model_screens)],
            "monitor": sorted(self.monitor),
        }


def names(experiment: SwarmExperiment) -> tuple[str, ...]:
    """The screens of an experiment by name."""
    return experiment.defence.screens or LEVELS[experiment.defence.level]


def make(
    experiment: SwarmExperiment, *, vocabulary: int, eos: int, model: Any = None, tokenizer: Any = None
) -> Defence:
    """The defence an experiment asks for. `model` and `tokenizer` are the node's own (self_judge reads them)."""
    config = experiment.defence
    wanted_names = names(experiment)
    unknown = sorted({*config.params, *config.monitor} - set(wanted_names))
    if unknown:
        raise ConfigError(f"defence: {unknown[0]} is not among the screens {', '.join(wanted_names)}")
    built = []
    for name in wanted_names:
        params: dict[str, Any] = dict(config.params.get(name, {}))
        params.pop("boundary", None)
        if name == "logit":
            params.pop("k", None)
        if name == "schema":
            params = {"vocabulary": vocabulary, "eos": eos, **params}
        if name in ("judge", "self_judge"):
            params = {"model": config.judge, "seed": experiment.seed, **params}
        if name == "self_judge":
            params |= {"model": model, "tokenizer": tokenizer}
        built.append(screens.make(name, **params))
    reading = tuple(s for s in built if getattr(s, "needs_evidence", False))
    sampling = experiment.sampling
    sampler = Sampler(
        temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, noise=sampling.noise
    )
    boundary = float(config.params.get("seeded", {}).get("boundary", BOUNDARY))
    k = int(config.params.get("logit", {}).get("k", sampling.top_k))
    if "logit" in wanted_names and not 0 < k < vocabulary:
        raise ConfigError(
            f"defence: the logit check needs a k between 1 and {vocabulary - 1}, and sampling.top_k = {k} cuts nothing "
            "off: give [defence.params.logit] k"
        )
    wanted = Wanted(sampler=sampler, k=k, seeded="seeded" in wanted_names, boundary=boundary)
    return Defence(
        level=config.level if config.screens is None else "custom",
        screens=tuple(s for s in built if s not in reading),
        model_screens=reading,
        wanted=wanted if reading else None,
        monitor=frozenset(config.monitor),
        trust=TrustRules(
            ban_after=config.ban_after,
            window=config.strike_window,
            share=config.strike_share,
            readmit_after=config.readmit_after,
        ),
        from_round=config.from_round,
    )
