"""SCAFFOLD on quadratics whose optimum is known, and trust weights in every algorithm, with the code's own functions.

Client i has f_i(w) = a_i/2 * (w - b_i)^2, coordinate by coordinate: its gradient is a_i * (w - b_i), the optimum of the
weighted sum is sum(t_i a_i b_i) / sum(t_i a_i). K local steps of rate s take a client from x to
b_i + (1 - s a_i)^K * (x - b_i), so FedAvg's fixed point weighs client i with 1 - (1 - s a_i)^K instead of a_i: biased.
Legend: N clients, D coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from assay.config import AggregationConfig, ConfigError, Experiment, ServerConfig
from assay.contribution import LoraUpdate, Refusal, Round, tensors_sha256
from assay.federated import aggregators, scaffold, server_opt
from assay.federated.canary import GateResult
from assay.federated.defence import Defence
from assay.federated.local_sft import LocalSettings, Terms, make_optimizer, take_step
from assay.federated.round import Outcome, ServerState, run_round
from assay.verdict import Reason, State, Verdict

SGD = LocalSettings(steps=2, batch_size=1, max_length=8, lr=0.25, clip=1e6, optimizer="sgd")


@dataclass(frozen=True)
class Quadratic:
    name: str
    a_D: tuple[float, ...]
    b_D: tuple[float, ...]
    trust: float = 1.0
    obeys: bool = True
    """Adds the server's correction to its gradients."""

    def trained(self, x_D: np.ndarray, correction_D: np.ndarray | None, settings: LocalSettings) -> np.ndarray:
        weight = torch.nn.Parameter(torch.from_numpy(x_D.copy()))
        a, b = torch.tensor(self.a_D), torch.tensor(self.b_D)
        corrections = () if correction_D is None or not self.obeys else (torch.from_numpy(correction_D),)
        terms = Terms(settings.clip, settings.prox_mu, (torch.from_numpy(x_D),), corrections)
        optimizer = make_optimizer([weight], settings)
        for _ in range(settings.steps):
            take_step(optimizer, [weight], (a / 2 * (weight - b) ** 2).sum(), terms)
        return weight.detach().numpy()


ONE, TWO = Quadratic("one", (1.0,), (0.0,)), Quadratic("two", (3.0,), (4.0,))
OPTIMUM, BIASED = 3.0, 30 / 11
"""(1*0 + 3*4) / 4; with K = 2, s = 1/4 FedAvg weighs 7/16 and 15/16 instead: (15/16 * 4) / (22/16)."""


@dataclass(frozen=True)
class Given:
    """A screen whose verdicts are what the test says."""

    trust: Mapping[str, float]
    name: str = "given"

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        return [
            Verdict(
                participant=u.participant, contribution=u.sha256, screen=self.name, weight=self.trust[u.participant],
                reason=Reason.REVIEW,
            )
            for u in round.updates
        ], state  # fmt: skip


@dataclass(frozen=True)
class Closed:
    """A gate that lets nothing through."""

    def check(self, *adapters: Any) -> GateResult:
        return GateResult(False, "closed", {})


@dataclass(frozen=True)
class Algorithm:
    settings: LocalSettings = SGD
    server: ServerConfig = ServerConfig()  # noqa: RUF009 - frozen
    scaffold: bool = False
    aggregator: aggregators.Aggregator = aggregators.mean()  # noqa: RUF009 - a pure function


def start_of(algorithm: Algorithm, dims: int = 1) -> ServerState:
    adapter = {"x": np.zeros(dims, np.float32)}
    return ServerState(
        round=0, adapter=adapter, initial=adapter, opt=server_opt.of(algorithm.server).init(adapter["x"])
    )


def one_round(
    state: ServerState,
    clients: Sequence[Quadratic],
    algorithm: Algorithm,
    refused: Sequence[Refusal] = (),
    gate: Any = None,
) -> tuple[ServerState, Outcome]:
    updates = []
    for client in clients:
        correction_D = scaffold.correction(state.controls, client.name)
        tensors = {"x": client.trained(state.adapter["x"], correction_D, algorithm.settings)}
        updates.append(
            LoraUpdate(
                participant=client.name,
                round=state.round + 1,
                base_sha256="",
                tensors=tensors,
                sha256=tensors_sha256(tensors),
            )
        )
    defence = Defence(level="none", screens=(Given({c.name: c.trust for c in clients}),), gate=gate)
    rule = scaffold.Rule.of(algorithm.settings) if algorithm.scaffold else None
    opt = server_opt.of(algorithm.server)
    return run_round(state, updates, refused, defence, algorithm.aggregator, opt, AggregationConfig(), 1, rule)


def played(clients: Sequence[Quadratic], algorithm: Algorithm, rounds: int, dims: int = 1) -> ServerState:
    state = start_of(algorithm, dims)
    for _ in range(rounds):
        state, outcome = one_round(state, clients, algorithm)
        assert outcome.result == "applied"
    return state


# --- SCAFFOLD -----------------------------------------------------------------------------------------------------


def test_two_rounds_by_hand() -> None:
    """Round 1 from x = 0: y = 0 and 15/4, so c_i = 0 and -15/2, c = -15/4, x = 15/8.

    Round 2: corrections -15/4 and 15/4; `one` sees gradients 15/8 and 75/32, `two` -51/8 and -141/32: c_i are their
    means, 135/64 and -345/64, both clients end at 345/128. All of these are exact in float32.
    """
    algorithm = Algorithm(scaffold=True)
    first, _ = one_round(start_of(algorithm), [ONE, TWO], algorithm)
    assert first.adapter["x"] == 15 / 8
    assert {k: v.tolist() for k, v in first.controls.items()} == {
        "mean": [-15 / 4], "weight": [1, 1], "of/one": [0], "of/two": [-15 / 2],
    }  # fmt: skip
    second, _ = one_round(first, [ONE, TWO], algorithm)
    assert second.adapter["x"] == 345 / 128
    assert second.controls["of/one"] == 135 / 64
    assert second.controls["of/two"] == -345 / 64
    assert second.controls["mean"] == (135 - 345) / 128


def test_scaffold_finds_the_optimum_where_fedavg_is_biased() -> None:
    assert played([ONE, TWO], Algorithm(), 60).adapter["x"] == pytest.approx(BIASED, abs=1e-5)
    assert played([ONE, TWO], Algorithm(scaffold=True), 60).adapter["x"] == pytest.approx(OPTIMUM, abs=1e-5)


def test_scaffold_finds_the_optimum_of_the_weighted_clients() -> None:
    """Trust 1 and 1/2: (1/2 * 3 * 4) / (1 + 3/2) = 2.4."""
    clients = [ONE, replace(TWO, trust=0.5)]
    assert played(clients, Algorithm(scaffold=True), 80).adapter["x"] == pytest.approx(2.4, abs=1e-5)


def test_scaffold_finds_the_optimum_when_a_different_half_takes_part_each_round() -> None:
    rng = np.random.default_rng(0)
    a_N, b_N = rng.uniform(0.5, 3, 8), rng.uniform(-5, 5, 8)
    clients = [Quadratic(f"c{i}", (a,), (b,)) for i, (a, b) in enumerate(zip(a_N.tolist(), b_N.tolist()))]
    optimum = (a_N * b_N).sum() / a_N.sum()
    algorithm = Algorithm(scaffold=True)
    state = start_of(algorithm)
    for _ in range(120):
        state, _ = one_round(state, [clients[i] for i in rng.choice(8, 4, replace=False)], algorithm)
    assert state.adapter["x"] == pytest.approx(optimum, abs=1e-3)


def test_what_a_refused_client_once_put_in_is_taken_out() -> None:
    """Adding up differences, as published, would leave c off by his share and the run at another point for good."""
    algorithm, bad = Algorithm(scaffold=True), Quadratic("bad", (2.0,), (-50.0,))
    state = start_of(algorithm)
    for round in range(80):
        state, _ = one_round(state, [ONE, TWO, bad if round < 3 else replace(bad, trust=0.0)], algorithm)
    assert state.adapter["x"] == pytest.approx(OPTIMUM, abs=1e-5)
    assert set(state.controls) == {"mean", "weight", "of/one", "of/two"}


def test_a_message_refused_at_the_wire_is_a_refusal_too() -> None:
    algorithm = Algorithm(scaffold=True)
    state = played([ONE, TWO], algorithm, 2)
    state, _ = one_round(state, [ONE], algorithm, [Refusal("two", "", Reason.MALFORMED.value, "not safetensors")])
    assert set(state.controls) == {"mean", "weight", "of/one"}
    np.testing.assert_array_equal(state.controls["mean"], state.controls["of/one"])


def test_an_absent_client_keeps_its_control_variate() -> None:
    algorithm = Algorithm(scaffold=True)
    before = played([ONE, TWO], algorithm, 2)
    after, _ = one_round(before, [ONE], algorithm)
    np.testing.assert_array_equal(after.controls["of/two"], before.controls["of/two"])


def test_a_client_who_ignores_his_correction_cannot_grow_without_end() -> None:
    """He is credited with the correction each round; what is credited is never longer than an honest gradient."""
    algorithm = Algorithm(LocalSettings(steps=2, batch_size=1, max_length=8, lr=0.05, clip=1.0, optimizer="sgd"))
    algorithm = Algorithm(algorithm.settings, scaffold=True)
    deaf = Quadratic("deaf", (0.04, 0.02), (-9.0, 9.0), obeys=False)
    honest = [Quadratic("h1", (1.0, 2.0), (0.3, -0.2)), Quadratic("h2", (2.0, 1.0), (-0.1, 0.4))]
    state = start_of(algorithm, 2)
    for _ in range(60):
        state, _ = one_round(state, [*honest, deaf], algorithm)
        assert all(np.linalg.norm(v) <= 1 + 1e-6 for k, v in state.controls.items() if k.startswith("of/"))
    assert np.linalg.norm(state.controls["of/deaf"]) > 0.9, "and he does drive it to the limit"


def test_control_variates_go_through_the_same_aggregator() -> None:
    """A median keeps the giant out of the adapter; a mean of control variates beside it would let him in."""
    clients = [Quadratic(f"c{i}", (1.0,), (float(i),)) for i in range(4)]
    giant = Quadratic("giant", (1.0,), (1e5,))
    state = played([*clients, giant], Algorithm(scaffold=True, aggregator=aggregators.make("median")), 30)
    assert abs(state.controls["mean"]) <= 4
    assert -1 <= state.adapter["x"] <= 4


@pytest.mark.parametrize("why", ["skipped", "rolled_back"])
def test_a_round_that_is_not_applied_moves_no_memory(why: str) -> None:
    algorithm = Algorithm(server=ServerConfig(opt="fedadam"), scaffold=True)
    before = played([ONE, TWO], algorithm, 2)
    clients = [replace(c, trust=0.0) for c in (ONE, TWO)] if why == "skipped" else [ONE, TWO]
    after, outcome = one_round(before, clients, algorithm, gate=Closed() if why == "rolled_back" else None)
    assert outcome.result == why
    for there, here in ((before.controls, after.controls), (before.opt, after.opt), (before.adapter, after.adapter)):
        assert all(np.array_equal(there[key], here[key]) for key in there)
        assert set(there) == set(here)


def test_scaffold_asks_for_sgd() -> None:
    with pytest.raises(ConfigError, match=r"scaffold needs training\.optimizer = 'sgd'"):
        Experiment().changed(training__scaffold=True)
    assert Experiment().changed(training__optimizer="sgd").changed(training__scaffold=True).training.scaffold


# --- the trust weights act in every algorithm -----------------------------------------------------------------------
# Faults 1 and 2 of the published code: weights act in FedAvg, FedAvgM and SCAFFOLD only, SCAFFOLD collects nothing, and
# FedAdagrad cannot be reached.

ADAMW = LocalSettings(steps=2, batch_size=1, max_length=8, lr=0.05)
ALGORITHMS = {
    "fedavg": Algorithm(ADAMW),
    "fedprox": Algorithm(LocalSettings(steps=2, batch_size=1, max_length=8, lr=0.05, prox_mu=0.5)),
    "scaffold": Algorithm(scaffold=True),
    **{name: Algorithm(ADAMW, ServerConfig(opt=name)) for name in server_opt.SERVER_OPTS if name != "fedavg"},
}
HONEST = [Quadratic("h1", (1.0, 2.0), (1.0, -2.0)), Quadratic("h2", (2.0, 1.0), (-1.0, 3.0))]
every_algorithm = pytest.mark.parametrize("name", list(ALGORITHMS))


def bad(trust: float) -> Quadratic:
    return Quadratic("bad", (1.5, 0.7), (30.0, -30.0), trust)


def test_the_algorithms_of_the_paper_are_all_here() -> None:
    assert set(ALGORITHMS) == {"fedavg", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam"}


@every_algorithm
def test_a_client_of_weight_zero_changes_nothing(name: str) -> None:
    with_him, without = (played(c, ALGORITHMS[name], 6, 2) for c in ([*HONEST, bad(0.0)], HONEST))
    assert with_him.adapter["x"].tobytes() == without.adapter["x"].tobytes()
    for there, here in ((with_him.opt, without.opt), (with_him.controls, without.controls)):
        assert {k: v.tobytes() for k, v in there.items()} == {k: v.tobytes() for k, v in here.items()}
    assert without.adapter["x"].any(), "the others did move it"


@every_algorithm
def test_a_smaller_weight_means_less(name: str) -> None:
    without_D = played(HONEST, ALGORITHMS[name], 1, 2).adapter["x"]
    moved = [
        np.abs(played([*HONEST, bad(trust)], ALGORITHMS[name], 1, 2).adapter["x"] - without_D)
        for trust in (0.1, 0.5, 1.0)
    ]
    assert (moved[0] > 0).all()
    assert (moved[0] < moved[1]).all()
    assert (moved[1] < moved[2]).all()
    later = [played([*HONEST, bad(trust)], ALGORITHMS[name], 6, 2) for trust in (0.5, 1.0)]
    assert (later[0].adapter["x"] != later[1].adapter["x"]).all()


def test_every_algorithm_goes_its_own_way() -> None:
    """A name that silently runs another algorithm would be two equal rows here."""
    ends = {tuple(played(HONEST, algorithm, 3, 2).adapter["x"].tolist()) for algorithm in ALGORITHMS.values()}
    assert len(ends) == len(ALGORITHMS)
