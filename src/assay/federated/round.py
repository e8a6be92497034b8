"""One round as a pure function: (state, contributions, rules) -> (state, outcome).

process(pre, aggregate, post): screens weigh the updates, an aggregator merges what is left, a server optimiser moves
the adapter, the gate may send it back. Bad data never raises out of here; a mistake of the operator does.
Legend: N participants, D flattened adapter.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from assay.config import AggregationConfig
from assay.contribution import LoraUpdate, Refusal, Round, Tensors, flatten, tensors_sha256, unflatten
from assay.federated import scaffold
from assay.federated.aggregators import Aggregator, Memory, ToleranceError
from assay.federated.aggregators.product import Truncation
from assay.federated.canary import GateResult
from assay.federated.defence import Defence
from assay.federated.merge import claimed_weight, merge, rows
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
    memory: Memory = field(default_factory=dict)
    """What the aggregator remembers of participants."""
    controls: scaffold.Controls = field(default_factory=dict)


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
    truncation: Truncation | None = None
    """Where products were averaged: what their rank could not hold."""

    def ledger_body(self) -> dict[str, Any]:
        """The round's ledger entry: who sent which bytes, every verdict, the weights, the model before and after."""
        truncation = {} if self.truncation is None else {"truncation": self.truncation.as_dict()}
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
                    **({"longest": self.screened.longest[name]} if name in self.screened.longest else {}),
                }
                for name in sorted(weight)
            ],
            # without the seconds: a resumed run must write the very same entry
            "verdicts": [{k: x for k, x in v.as_dict().items() if k != "seconds"} for v in self.screened.verdicts],
            "gate": None if self.gate is None else {"passed": self.gate.passed, "why": self.gate.sentence, **self.gate.evidence},
            **truncation,
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
    controls_rule: scaffold.Rule | None = None,
) -> tuple[ServerState, Outcome]:
    """Screen, aggregate, step, gate. The new state always has `round` one higher, whatever became of the round.

    `controls_rule` is SCAFFOLD's; without it control variates stay as they are. A round that is not applied leaves
    optimiser and control variates alone.
    """
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
        stage = "canary" if verdict.screen in ("canary", "crowd") else "screen"
        seconds[stage] = seconds.get(stage, 0.0) + verdict.seconds
    at = time.perf_counter()
    after, result, why = state.adapter, "applied", ""
    opt_state, controls, memory, truncation = state.opt, state.controls, state.memory, None
    weight_N = effective_weights(round, screened, aggregation)
    if screened.mean_weight < defence.min_mean_weight:
        result, why = "skipped", f"mean weight {screened.mean_weight:.2f} is below {defence.min_mean_weight:.2f}"
    elif not weight_N.any():
        result, why = "skipped", "no contribution was admitted"
    else:
        try:
            # only who counts is read: what a screen refused may not even have the adapter's shape
            left = replace(round, updates=tuple(u for u, w in zip(round.updates, weight_N) if w > 0))
            sent, names = [u.tensors for u in left.updates], [u.participant for u in left.updates]
            weight_N = weight_N[weight_N > 0]
            longest_N = longest(left, screened)
            merged = merge(sent, names, round.start, weight_N, aggregate, aggregation, state.memory, longest_N)
            absent = {*(u.participant for u in round.updates), *(r.participant for r in round.refused)} - {*names}
            varied = _controls(left, weight_N, longest_N, absent, state.controls, controls_rule, merged.used)
            params_D, opt_state = opt.update(merged.delta_D, state.opt, flatten(state.adapter))
            after, memory, controls = unflatten(params_D, state.adapter), merged.memory, varied
            truncation, why = merged.truncation, merged.note
        except ToleranceError as error:  # peers decide how many remain: that is data, not a mistake of the operator
            result, why = "skipped", _too_few(error, screened)
    seconds["aggregate"] = time.perf_counter() - at
    gate, at = None, time.perf_counter()
    if defence.gate is not None and result == "applied":
        gate = defence.gate.check(after, state.adapter, state.initial)
        if not gate.passed:
            result, why, after = "rolled_back", gate.sentence, state.adapter
            opt_state, controls = state.opt, state.controls
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
        truncation=truncation,
    )
    # a round sent back by the gate is remembered all the same: who sent what is evidence, whatever became of it
    new = replace(
        state, round=round.index, adapter=after, opt=opt_state, screens=screened.states, memory=memory, controls=controls
    )  # fmt: skip
    return new, outcome


def _controls(
    left: Round,
    weight_N: NDArray[np.float64],
    longest_N: NDArray[np.float64] | None,
    absent: Collection[str],
    controls: scaffold.Controls,
    rule: scaffold.Rule | None,
    aggregate: Aggregator,
) -> scaffold.Controls:
    if rule is None:
        return controls
    delta_ND = rows([u.tensors for u in left.updates], left.start, longest_N)
    names = [u.participant for u in left.updates]
    return scaffold.update(controls, names, delta_ND, weight_N, rule, aggregate, absent)


def _too_few(error: ToleranceError, screened: Screened) -> str:
    """Why a rule with a quorum left the round out, with who is missing."""
    refused = sum(w == 0 for w in screened.weight.values())
    return f"{error}; {len(screened.weight)} sent something, {refused} of them refused"


def longest(round: Round, screened: Screened) -> NDArray[np.float64] | None:
    """longest_N of the round's updates, infinite where nothing bounds one; None where nothing bounds any."""
    if not screened.longest:
        return None
    return np.array([screened.longest.get(u.participant, np.inf) for u in round.updates])


def effective_weights(round: Round, screened: Screened, aggregation: AggregationConfig) -> NDArray[np.float64]:
    """weight_N of the round's updates; claimed counts only where the operator asks for them, and capped."""
    return np.array(
        [claimed_weight(screened.weight[u.participant], u.num_examples, aggregation) for u in round.updates]
    )
