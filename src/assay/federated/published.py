"""Safe-FedLLM's levels as its published code runs them, for comparison only: `defence.faithful = true`.

Nothing here is a defence to rely on. Reproduced on purpose (PAPERS: arXiv 2601.07177 and its code): the threshold 0.8;
the probe on the first layer's lora_B; `step` and `client` score rounds 1 to 20 and keep the last weight after that;
evidence is believed as it comes, unbound to the adapter that is aggregated; missing evidence counts as benign (only
`client` takes a missing last step for malicious); evidence verdicts freeze and audits come every 5th round; a
classifier that fails trusts everybody; weights act only with FedAvg, FedAvgM and SCAFFOLD, any other rule ignores them.

Not reproduced: pickled files, the SCAFFOLD and FedAdagrad bugs, aggregators that are told the number of attackers, a
probe fitted on the attack's own rows. The wire and `structure` stay: a message that does not parse is refused.
Where weights do not act the screen only monitors, so the rule that skips a round of low mean weight never fires there.
Legend: K claimed steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from assay.config import ConfigError, Experiment
from assay.contribution import LoraUpdate, Round, Tensors
from assay.federated import levels
from assay.federated.probe import Probe
from assay.federated.say import say
from assay.trust import Beta, Frozen, RunningMean
from assay.verdict import Reason, State, Verdict

Level = Literal["step", "client", "shadow", "evidence"]
LEVELS: tuple[Level, ...] = ("step", "client", "shadow", "evidence")
THRESHOLD, SCORED_ROUNDS, LEAST_MEAN_WEIGHT = 0.8, 20, 0.2
HEEDS_WEIGHTS = ("fedavg", "fedavgm")
"""Server algorithms that multiply by the weights at all; its SCAFFOLD does, but never collects an adapter (fault 2)."""


def check(experiment: Experiment) -> Level:
    """The level to reproduce; ConfigError where the faithful switch meets a level it has no published form of, or a setting it would ignore."""
    config = experiment.defence
    found = [level for level in LEVELS if level == config.level and config.screens is None]
    if not found:
        raise ConfigError(
            f"defence.faithful: reproduces the levels {', '.join(LEVELS)}; set defence.level to one of them"
        )
    for key, fixed in (("threshold", THRESHOLD), ("score_rounds", None), ("min_mean_weight", LEAST_MEAN_WEIGHT)):
        if getattr(config, key) != fixed:
            raise ConfigError(
                f"defence.{key}: the published behaviour has it fixed; drop it or set defence.faithful = false"
            )
    if config.params:
        raise ConfigError(
            "defence.params: the published behaviour takes none; drop them or set defence.faithful = false"
        )
    return found[0]


def weights_act(experiment: Experiment) -> bool:
    """Whether the published code would multiply by the weights under this aggregator and server algorithm."""
    return experiment.aggregation.name == "mean" and experiment.server.opt in HEEDS_WEIGHTS


@dataclass(frozen=True, slots=True)
class Published:
    """One published level as a screen, called `published_<level>` in every record. `steps` are the ordered ones."""

    level: Level
    probe: Probe
    steps: int

    def __post_init__(self) -> None:
        if self.probe.features != "first_b":
            raise ConfigError(
                "defence.probe: the published probe reads the first layer; fit one with `assay probe fit`"
            )

    @property
    def name(self) -> str:
        return f"published_{self.level}"

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        new, out = dict(state), []
        try:
            scored = [(u, self._scores(u, round)) for u in round.updates]
        except Exception as error:  # noqa: BLE001 - the published fault: a classifier that breaks trusts everybody
            told = f"classifier failed and everybody is trusted: {type(error).__name__}"
            return [say(u, self.name, 1.0, Reason.OK, told, classifier_failed=1) for u in round.updates], new
        for update, score_K in scored:
            weight, kept = self._weigh(score_K, round, state.get(update.participant))
            if kept is not None:
                new[update.participant] = kept
            bad = int((score_K >= THRESHOLD).sum())
            sentence = f"{bad} of {self.steps} claimed steps judged malicious; weight {weight:.2f} as published"
            score = float(score_K.max()) if score_K.size else np.nan
            out.append(say(update, self.name, weight, Reason.LOW_TRUST, sentence, score, malicious_steps=bad))
        return out, new

    def _scores(self, update: LoraUpdate, round: Round) -> NDArray[np.float64]:
        """Scores of what the client claims; nobody asks whether it is what it submitted."""
        shadowed = self.level in ("shadow", "evidence")
        claimed: Sequence[Tensors] = update.shadow if shadowed else update.steps
        if not claimed:
            return np.zeros(0)
        return np.nan_to_num(self.probe.score_adapters(claimed, round.initial if shadowed else round.start))

    def _weigh(self, score_K: NDArray[np.float64], round: Round, state: State | None) -> tuple[float, State | None]:
        bad = min(self.steps, int((score_K >= THRESHOLD).sum()))
        last = float(score_K[self.steps - 1]) if score_K.size >= self.steps else None
        if self.level == "step":
            trust = Beta.from_json(state) if state else Beta()
            if round.index > SCORED_ROUNDS:
                return trust.weight, None
            trust, weight = levels.step_level(trust, bad, self.steps, round.batch_size)
            return weight, dict(trust.to_json())
        if self.level == "client":
            mean = RunningMean.from_json(state) if state else RunningMean()
            if round.index > SCORED_ROUNDS:
                return mean.value, None
            mean, weight = levels.client_level(mean, 1.0 if last is None else last, THRESHOLD)
            return weight, dict(mean.to_json())
        weight = levels.shadow_level(bad, self.steps)
        if self.level == "shadow":
            return weight, None
        frozen = Frozen.from_json(state) if state else Frozen()
        malicious = last is not None and last >= THRESHOLD
        frozen, weight = levels.published_evidence_level(frozen, weight, malicious)
        return weight, frozen.to_json()
