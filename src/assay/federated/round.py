"""One round as a pure function: (state, contributions, rules) -> (state, outcome).

process(pre, aggregate, post): screens weigh the updates, an aggregator merges what is left, a server optimiser moves
the adapter, the gate may send it back. Bad data never raises out of here; a mistake of the operator does.
Legend: N participants, D flattened adapter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from assay.config import AggregationConfig
from assay.contribution import LoraUpdate, Refusal, Round, Tensors, flatten, tensors_sha256, unflatten
from assay.federated.aggregators import Aggregator, ToleranceError
from assay.federated.canary import GateResult
from assay.federated.defence import Defence
from assay.federated.server_opt import OptState, ServerOpt
from assay.verdict import Screened, State, screen_round

Result = Literal["applied", "skipped", "rolled_back"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """All the server remembers between rounds. `round` counts finished rounds."""

    round: int
    adapter: Tensors
    initial: Tensors
    opt: OptState
    screens: Mapping[str, State] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a round did and why."""

    round: int
    result: Result
    why: str
    screened: Screened
    model_before: str
    model_after: str
    gate: GateResult | None
    num_examples: Mapping[str, int]
    seconds: Mapping[str, float]

    def ledger_body(self) -> dict[str, Any]:
        """The round's ledger entry: who sent which bytes, every verdict, the weights, the model before and after."""
        weight, deciding = self.screened.weight, self.screened.deciding
        hashes = {v.participant: v.contribution for v in self.screened.verdicts}
        return {
            "round": self.round,
            "outcome": self.result,
            "why": self.why,
            "model_before": self.model_before,
            "model_after": self.model_after,
            "contributions": [
                {
                    "participant": name,
                    "sha256": hashes.get(name, ""),
                    "num_examples": self.num_examples.get(name, 0),
                    "weight": weight[name],
                    "screen": deciding[name].screen if name in deciding else "",
                    "reason": deciding[name].reason.value if name in deciding else "ok",
                    "sentence": deciding[name].sentence if name in deciding else "",
                }
                for name in sorted(weight)
            ],
            # without the seconds: a resumed run must write the very same entry
            "verdicts": [{k: x for k, x in v.as_dict().items() if k != "seconds"} for v in self.screened.verdicts],
            "gate": None if self.gate is None else {"passed": self.gate.passed, "why": self.gate.sentence, **self.gate.evidence},
        }  # fmt: skip


def run_round(
    state: ServerState,
    updates: Sequence[LoraUpdate],
    refused: Sequence[Refusal],
    defence: Defence,
    aggregate: Aggregator,
    opt: ServerOpt,
    aggregation: AggregationConfig,
    batch_size: int,
) -> tuple[ServerState, Outcome]:
    """Screen, aggregate, step, gate. The new state always has `round` one higher, whatever became of the round."""
    round = Round(
        index=state.round + 1,
        start=state.adapter,
        initial=state.initial,
        # sorted: neither the order of arrival nor who answers first may change a result
        updates=tuple(sorted(updates, key=lambda u: u.participant)),
        refused=tuple(sorted(refused, key=lambda r: r.participant)),
        batch_size=batch_size,
    )
    seconds: dict[str, float] = {}
    at = time.perf_counter()
    screened = screen_round(round, defence.screens, state.screens, monitor=defence.monitor)
    for verdict in screened.verdicts:
        stage = "canary" if verdict.screen == "canary" else "screen"
        seconds[stage] = seconds.get(stage, 0.0) + verdict.seconds
    at = time.perf_counter()
    after, result, why = state.adapter, "applied", ""
    opt_state = state.opt
    weight_N = effective_weights(round, screened, aggregation)
    if screened.mean_weight < defence.min_mean_weight:
        result, why = "skipped", f"mean weight {screened.mean_weight:.2f} is below {defence.min_mean_weight:.2f}"
    elif not weight_N.any():
        result, why = "skipped", "no contribution was admitted"
    else:
        try:
            delta_D = aggregate(round.deltas(), weight_N)
            params_D, opt_state = opt.update(delta_D, state.opt, flatten(state.adapter))
            after = unflatten(params_D, state.adapter)
        except ToleranceError as error:  # peers decide how many remain: that is data, not a mistake of the operator
            result, why = "skipped", str(error)
    seconds["aggregate"] = time.perf_counter() - at
    gate, at = None, time.perf_counter()
    if defence.gate is not None and result == "applied":
        gate = defence.gate.check(after, state.adapter, state.initial)
        if not gate.passed:
            result, why, after, opt_state = "rolled_back", gate.sentence, state.adapter, state.opt
        seconds["canary"] = seconds.get("canary", 0.0) + time.perf_counter() - at
    outcome = Outcome(
        round=round.index,
        result=result,  # type: ignore[arg-type]
        why=why,
        screened=screened,
        model_before=tensors_sha256(state.adapter),
        model_after=tensors_sha256(after),
        gate=gate,
        num_examples={u.participant: u.num_examples for u in round.updates},
        seconds=seconds,
    )
    return replace(state, round=round.index, adapter=after, opt=opt_state, screens=screened.states), outcome


def effective_weights(round: Round, screened: Screened, aggregation: AggregationConfig) -> NDArray[np.float64]:
    """weight_N of the round's updates; claimed counts only where the operator asks for them, and capped."""
    return np.array(
        [claimed_weight(screened.weight[u.participant], u.num_examples, aggregation) for u in round.updates]
    )


def claimed_weight(weight: float, num_examples: int, aggregation: AggregationConfig) -> float:
    """One contribution's weight in the aggregate."""
    return weight * min(num_examples, aggregation.max_count) if aggregation.use_counts else weight
