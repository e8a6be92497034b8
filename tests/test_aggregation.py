"""Aggregation as a round does it: memory of participants, what an experiment asks for, averages of LoRA products.

Legend: N participants, D flattened adapter, r rank, I inputs, O outputs of a module.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from assay.config import AggregationConfig, ConfigError, check
from assay.contribution import LoraUpdate, Tensors, flatten, tensors_sha256
from assay.federated import aggregators, server_opt
from assay.federated.aggregators import from_config, make
from assay.federated.aggregators.product import average_products
from assay.federated.defence import Defence
from assay.federated.merge import merge, shorten
from assay.federated.round import Outcome, ServerState, run_round
from assay.federated.screens import Norm, Structure

MODULES = {"layers.0.q_proj": (6, 5), "layers.0.v_proj": (4, 5), "layers.1.q_proj": (6, 5)}  # outputs, inputs
R = 2


def adapter(seed: int, spread: float = 1.0, shared_a: int | None = None) -> dict[str, np.ndarray]:
    """An adapter of rank 2; `shared_a`: the seed of an A that others have as well."""
    rng, rng_a = np.random.default_rng(seed), np.random.default_rng(seed if shared_a is None else shared_a)
    out = {}
    for module, (outputs, inputs) in MODULES.items():
        out[f"{module}.lora_A.weight"] = rng_a.standard_normal((R, inputs)).astype(np.float32)
        out[f"{module}.lora_B.weight"] = (spread * rng.standard_normal((outputs, R))).astype(np.float32)
    return out


def product(tensors: Tensors, module: str) -> np.ndarray:
    a, b = (tensors[f"{module}.lora_{letter}.weight"].astype(np.float64) for letter in "AB")
    return b @ a


def exact(adapters: list[dict[str, np.ndarray]], weight_N: Any, module: str) -> np.ndarray:
    return np.average([product(a, module) for a in adapters], axis=0, weights=weight_N)


# --- averages of products -----------------------------------------------------------------------------------------


def test_products_are_averaged_exactly_where_the_rank_allows() -> None:
    adapters = [adapter(seed, shared_a=9) for seed in range(4)]  # who share A never need more than its rank
    weight_N = np.array([1.0, 0.5, 0.25, 2.0])
    merged, truncation = average_products(adapters, weight_N)
    assert {n: v.shape for n, v in merged.items()} == {n: v.shape for n, v in adapters[0].items()}
    for module in MODULES:
        np.testing.assert_allclose(product(merged, module), exact(adapters, weight_N, module), rtol=1e-5, atol=1e-6)
        # the new A is the one they share, not merely one with the same rows
        name = f"{module}.lora_A.weight"
        np.testing.assert_allclose(merged[name], adapters[0][name], rtol=1e-5, atol=1e-6)
    assert truncation.residual < 1e-7


def test_averaging_the_factors_is_not_averaging_the_products() -> None:
    adapters = [adapter(seed) for seed in range(2)]
    merged, _ = average_products(adapters[:1], np.ones(1))
    for module in MODULES:
        np.testing.assert_allclose(product(merged, module), product(adapters[0], module), rtol=1e-5, atol=1e-6)
    factors = {n: (adapters[0][n] + adapters[1][n]) / 2 for n in adapters[0]}
    module = "layers.0.q_proj"
    crossed, wanted = product(factors, module), exact(adapters, [1, 1], module)
    merged, truncation = average_products(adapters, np.ones(2))
    assert np.linalg.norm(crossed - wanted) > 2 * np.linalg.norm(product(merged, module) - wanted)
    assert truncation.residual > 0.05, "two clients with matrices of their own span rank 4"


def test_where_the_rank_does_not_allow_it_is_the_best_there_is_and_says_what_is_lost() -> None:
    adapters, weight_N = [adapter(seed) for seed in range(5)], np.array([1, 2, 0.5, 1, 0.1])
    merged, truncation = average_products(adapters, weight_N)
    lost = {}
    for module in MODULES:
        wanted = exact(adapters, weight_N, module)
        u, s, v = np.linalg.svd(wanted)
        np.testing.assert_allclose(product(merged, module), (u[:, :R] * s[:R]) @ v[:R], rtol=1e-4, atol=1e-5)
        lost[module] = (float((s[R:] ** 2).sum()), float((s**2).sum()))
    cut, whole = (sum(column) for column in zip(*lost.values()))
    assert truncation.residual == pytest.approx(np.sqrt(cut / whole), rel=1e-6)
    assert truncation.worst == pytest.approx(max(np.sqrt(c / w) for c, w in lost.values()), rel=1e-6)
    assert truncation.module == max(lost, key=lambda m: lost[m][0] / lost[m][1])


def test_weight_zero_is_absent_from_a_product() -> None:
    adapters = [adapter(seed) for seed in range(3)]
    adapters[1]["layers.0.q_proj.lora_A.weight"][:] = np.nan
    with_it, _ = average_products(adapters, np.array([1.0, 0.0, 3.0]))
    without, _ = average_products([adapters[0], adapters[2]], np.array([1.0, 3.0]))
    assert all(np.array_equal(with_it[n], without[n]) for n in without)


def test_nobody_having_moved_changes_nothing() -> None:
    start = adapter(0, spread=0.0)  # B is zero, as in round 0
    merged, truncation = average_products([start] * 3, np.ones(3))
    for name, value in start.items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-6, atol=1e-7)
    assert truncation.residual == 0


def test_tensors_that_are_no_factors_are_averaged_as_they_are() -> None:
    adapters = [adapter(seed) | {"head.bias": np.full(3, seed, np.float32)} for seed in (0, 1)]
    merged, _ = average_products(adapters, np.array([1.0, 3.0]))
    np.testing.assert_allclose(merged["head.bias"], 0.75)
    lonely = [{"x.lora_A.weight": np.ones((1, 2), np.float32)}]
    with pytest.raises(ConfigError, match="needs pairs of LoRA matrices"):
        average_products(lonely, np.ones(1))


def test_memory_of_a_product_is_a_quarter_of_the_adapters() -> None:
    """64 modules, as q and v of 32 layers; the result included."""
    rng = np.random.default_rng(0)
    adapters = [
        {
            f"layers.{m}.lora_{x}.weight": rng.standard_normal(s, np.float32)
            for m in range(64)
            for x, s in zip("AB", ((8, 256), (256, 8)))
        }
        for _ in range(16)
    ]
    tracemalloc.start()
    try:
        average_products(adapters, np.ones(16))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= sum(t.nbytes for a in adapters for t in a.values()) / 4


# --- rounds -------------------------------------------------------------------------------------------------------


def update(name: str, tensors: dict[str, np.ndarray], index: int) -> LoraUpdate:
    return LoraUpdate(participant=name, round=index, base_sha256="", tensors=tensors, sha256=tensors_sha256(tensors))


def play(
    state: ServerState, tensors: dict[str, dict[str, np.ndarray]], config: AggregationConfig
) -> tuple[ServerState, Outcome]:
    updates = [update(name, t, state.round + 1) for name, t in tensors.items()]
    aggregate, opt = from_config(config, state.initial), server_opt.make("fedavg")
    return run_round(state, updates, [], Defence(level="none", screens=(Structure(),)), aggregate, opt, config, 1)


def fresh() -> ServerState:
    start = adapter(0, spread=0.0)
    return ServerState(round=0, adapter=start, initial=start, opt={})


def moved(state: ServerState, by: np.ndarray) -> dict[str, np.ndarray]:
    at, out = 0, {}
    for name in sorted(state.adapter):
        value = state.adapter[name]
        out[name] = (value + by[at : at + value.size].reshape(value.shape)).astype(np.float32)
        at += value.size
    return out


def test_memory_of_a_round_is_one_matrix_of_the_updates_and_a_quarter() -> None:
    """The matrix is what aggregators read; a list of rows beside it would be as much again."""
    rng, shapes = np.random.default_rng(0), {f"x.{i}.lora_A.weight": (8, 4096) for i in range(16)}
    start = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
    sent = [{n: rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()} for _ in range(16)]
    size, aggregate = 16 * 16 * 8 * 4096 * 4, make("mean")
    tracemalloc.start()
    try:
        merge(sent, [f"c{i}" for i in range(16)], start, np.ones(16), aggregate, AggregationConfig(), {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 1.25 * size, f"{peak / size:.2f} x the updates"


def test_foolsgold_remembers_over_rounds_and_by_name() -> None:
    """Two Sybils hide in noise of their own: one round does not show them, their sums do, and names are what counts."""
    config = check(AggregationConfig, {"name": "foolsgold"})
    rng, state = np.random.default_rng(0), fresh()
    d = flatten(state.adapter).size
    goal = rng.standard_normal(d)
    shares = []
    for index in range(12):
        deltas = {f"honest-{i}": rng.standard_normal(d) for i in range(4)}
        deltas |= {f"sybil-{i}": 0.6 * goal + 1.5 * rng.standard_normal(d) for i in range(2)}
        names = list(deltas)
        rng.shuffle(names)
        tensors = {name: moved(state, 0.01 * deltas[name]) for name in names}
        after, _ = play(state, tensors, config)
        step_D = (flatten(after.adapter) - flatten(state.adapter)) / 0.01
        shares.append(float(step_D @ goal / (goal @ goal)))
        state = after
        if index == 5:
            forgotten, kept = ServerState(round=5, adapter=state.adapter, initial=state.initial, opt={}), state
    assert set(state.memory) == {f"history/{name}" for name in deltas}
    assert all(value.dtype == np.float32 and value.shape == (d,) for value in state.memory.values())
    assert np.mean(shares[:6]) > 2 * np.mean(shares[-4:]), shares  # of the Sybils' goal in each round's step
    tensors = {name: moved(kept, 0.01 * delta) for name, delta in deltas.items()}
    remembers, forgets = play(kept, tensors, config)[0], play(forgotten, tensors, config)[0]
    assert tensors_sha256(remembers.adapter) != tensors_sha256(forgets.adapter), "the history decides"


def test_memory_passes_only_through_the_state() -> None:
    aggregate = aggregators.make("foolsgold")
    delta_ND = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    one_D, memory = aggregators.step(aggregate, delta_ND, [1, 1, 1], ["a", "b", "c"], {})
    frozen = {name: value.copy() for name, value in memory.items()}
    for value in memory.values():
        value.flags.writeable = False
    _, later = aggregators.step(aggregate, delta_ND, [1, 1, 1], ["c", "b", "a"], memory)
    assert all(np.array_equal(memory[name], frozen[name]) for name in frozen)
    np.testing.assert_array_equal(aggregators.step(aggregate, delta_ND, [1, 1, 1], ["a", "b", "c"], {})[0], one_D)
    np.testing.assert_array_equal(later["history/a"], delta_ND[0] + delta_ND[2])
    _, absent = aggregators.step(aggregate, delta_ND, [1, 0, 1], ["a", "b", "new"], memory)
    np.testing.assert_array_equal(absent["history/b"], memory["history/b"])
    assert set(absent) == {"history/a", "history/b", "history/c", "history/new"}
    with pytest.raises(ValueError, match="2 different names do not fit 3 rows"):
        aggregators.step(aggregate, delta_ND, [1, 1, 1], ["a", "a", "b"], {})
    same_D, nothing = aggregators.step(aggregators.make("median"), delta_ND, [1, 1, 1], ["a", "b", "c"], {})
    np.testing.assert_array_equal(same_D, np.median(delta_ND, axis=0))
    assert not nothing, "a stateless aggregator stays one"


def test_a_round_averages_products_and_writes_down_what_was_cut() -> None:
    config, state = check(AggregationConfig, {"average": "product"}), fresh()
    tensors = {f"client-{seed}": adapter(seed) for seed in range(1, 4)}
    after, outcome = play(state, tensors, config)
    merged, truncation = average_products(list(tensors.values()), np.ones(3))
    for name, value in merged.items():
        np.testing.assert_allclose(after.adapter[name], value, rtol=1e-6, atol=1e-6)
    assert outcome.ledger_body()["truncation"] == truncation.as_dict()
    assert truncation.residual > 0.1
    _, plain = play(state, tensors, check(AggregationConfig, {}))
    assert "truncation" not in plain.ledger_body(), "ledgers of other runs stay as they were"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"average": "product", "name": "median"}, "average = product goes with name = mean"),
        ({"average": "product", "pre": ["nnm"]}, "average = product goes with name = mean"),
        ({"pre": ["mixing"]}, "Input should be 'nnm' or 'bucketing'"),
    ],
)
def test_what_does_not_go_together_is_said_at_once(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(AggregationConfig, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "foolsgold", "pre": ["nnm"], "pre_params": {"nnm": {"f": 1}}}, "mixed rows are nobody's"),
        ({"name": "median", "pre": ["nnm"]}, "nnm needs parameter 'f'"),
        ({"name": "median", "pre_params": {"nnm": {"f": 1}}}, "pre_params: 'nnm' is not one of the pre-steps"),
        ({"name": "median", "pre": ["bucketing"], "pre_params": {"bucketing": {"t": 1}}}, "has no parameter 't'"),
    ],
)
def test_pre_steps_that_cannot_be_are_said_when_made(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_config(check(AggregationConfig, values), adapter(0))


def test_the_engine_fills_in_the_layers() -> None:
    """One client's first module points the other way: with layers that module alone does without him."""
    config = check(AggregationConfig, {"name": "lasa", "params": {"sparsity": 0.0, "norm_limit": 9.0}})
    like = adapter(0)
    sizes = [like[name].size for name in sorted(like)]
    delta_ND = 1 + np.random.default_rng(0).random((6, sum(sizes)), np.float32)
    delta_ND[5, : sizes[0]] *= -1
    filled_D = from_config(config, like)(delta_ND, np.ones(6))
    np.testing.assert_array_equal(
        filled_D, aggregators.make("lasa", sparsity=0.0, norm_limit=9.0, layers=sizes)(delta_ND, np.ones(6))
    )
    assert (filled_D[: sizes[0]] > 0.9).all(), "without him"
    clipped_ND = delta_ND / np.maximum(1, np.linalg.norm(delta_ND, axis=1) / np.median(np.linalg.norm(delta_ND, axis=1)))[:, None]  # fmt: skip
    np.testing.assert_allclose(filled_D[sizes[0] :], clipped_ND.mean(axis=0)[sizes[0] :], rtol=1e-5)
    with pytest.raises(ValueError, match="layers of 3 values do not fit deltas of"):
        aggregators.make("lasa", layers=[1, 2])(delta_ND, np.ones(6))


# --- rows cut to length ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    norm_N=st.lists(st.floats(0.0, 1.45), min_size=1, max_size=8),
    clip=st.floats(0.2, 1.15),
    average=st.sampled_from(["factors", "product"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_row_longer_than_the_limit_acts(norm_N: list[float], clip: float, average: str, seed: int) -> None:
    """Of a mean of rows that are all in one direction and all too long, only the limit is left; weights leave it whole."""
    state, rng = fresh(), np.random.default_rng(seed)
    towards = np.concatenate([
        # along lora_B alone the product moves as the row does, so both averages can be read
        rng.standard_normal(v.size) * (average == "factors" or "lora_B" in n)
        for n, v in sorted(state.adapter.items())
    ])  # fmt: skip
    towards /= np.linalg.norm(towards)
    sent = {f"c{i}": moved(state, norm * towards) for i, norm in enumerate(norm_N)}
    limit = clip * 1.0

    def play_with(acts: str) -> tuple[ServerState, Outcome]:
        updates = [update(name, t, 1) for name, t in sent.items()]
        guard = Defence(level="custom", screens=(Norm(lambda index: 1.0, clip=clip, refuse=1.5, acts=acts),))
        config = AggregationConfig(average=average)  # type: ignore[arg-type]
        return run_round(state, updates, [], guard, make("mean"), server_opt.make("fedavg"), config, 1)

    state_after, outcome = play_with("length")
    acted = flatten(state_after.adapter) - flatten(state.adapter)
    assert np.linalg.norm(acted.astype(np.float64)) <= limit * (1 + 1e-4)
    expected = np.mean([min(norm, limit) for norm in norm_N])
    np.testing.assert_allclose(np.linalg.norm(acted), expected, rtol=1e-3, atol=1e-5)
    assert set(outcome.screened.weight.values()) == {1.0}
    said = outcome.ledger_body()["contributions"]
    assert all(c["longest"] == pytest.approx(limit) for c in said)
    if min(norm_N) > limit * 1.01:  # what the weights leave: a mean divides by them
        other = flatten(play_with("weight")[0].adapter) - flatten(state.adapter)
        assert np.linalg.norm(other) > limit


@given(hnp.arrays(np.float32, (4, 6), elements=st.floats(-1e3, 1e3, width=32)), st.floats(0.0, 100.0))
def test_rows_within_their_length_stay_bit_for_bit(delta_ND: np.ndarray, most: float) -> None:
    before_ND = delta_ND.copy()
    shorten(delta_ND, [most, most, np.inf, np.inf])
    assert np.array_equal(delta_ND[2:], before_ND[2:])
    for now_D, then_D in zip(delta_ND[:2].astype(np.float64), before_ND[:2].astype(np.float64)):
        if np.linalg.norm(then_D) <= most * (1 - 1e-9):
            assert np.array_equal(now_D, then_D)
        assert np.linalg.norm(now_D) <= most * (1 + 1e-6) + 1e-30


def test_a_bounded_round_is_replayed_as_it_was_and_monitoring_cuts_nothing() -> None:
    state = fresh()
    long = moved(state, np.full(flatten(state.adapter).size, 0.5))
    guard = Defence(
        level="custom", screens=(Norm(lambda i: 1.0, refuse=1e9, acts="length"),), monitor=frozenset({"norm"})
    )
    config, opt = AggregationConfig(), server_opt.make("fedavg")
    after, outcome = run_round(state, [update("c0", long, 1)], [], guard, make("mean"), opt, config, 1)
    np.testing.assert_allclose(flatten(after.adapter), flatten(long), rtol=1e-6)
    assert "longest" not in outcome.ledger_body()["contributions"][0]


# --- too few for f ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "present", "bears"),
    [
        ("krum", {"f": 3}, 6, 1),  # 2f + 3
        ("krum", {"f": 3}, 2, 0),
        ("bulyan", {"f": 2}, 8, 1),  # 4f + 3
        ("trimmed_mean", {"f": 3}, 6, 2),  # 2f + 1
        ("multi_krum", {"f": 2, "m": 2, "variant": "byzfl"}, 4, 1),
    ],
)
def test_too_few_skip_the_round_and_say_who_is_missing_or_bear_fewer(
    name: str, params: dict[str, Any], present: int, bears: int
) -> None:
    state, rng = fresh(), np.random.default_rng(3)
    size = flatten(state.adapter).size
    sent = {f"c{i}": moved(state, rng.standard_normal(size)) for i in range(present)}
    broken = {n: v * np.float32(np.nan) for n, v in state.adapter.items()}
    skipping = AggregationConfig(name=name, params=params)
    after, outcome = play(state, sent | {"x": broken}, skipping)
    assert outcome.result == "skipped"
    assert "bears f attackers only among at least" in outcome.why
    assert outcome.why.endswith(f"{present + 1} sent something, 1 of them refused")
    assert np.array_equal(flatten(after.adapter), flatten(state.adapter))
    after, outcome = play(state, sent | {"x": broken}, skipping.model_copy(update={"quorum": "shrink"}))
    assert outcome.result == "applied"
    assert outcome.why.startswith(f"f shrunk to {bears}: {name.replace('multi_', 'multi_')} bears f")
    told = AggregationConfig(name=name, params=params | {"f": bears})
    assert np.array_equal(flatten(after.adapter), flatten(play(state, sent, told)[0].adapter))


def test_what_no_f_makes_possible_stays_skipped() -> None:
    state = fresh()
    sent = {f"c{i}": moved(state, np.full(flatten(state.adapter).size, float(i))) for i in range(3)}
    config = AggregationConfig(name="multi_krum", params={"f": 1, "m": 4}, quorum="shrink")  # a mean of 4 rows of 3
    assert play(state, sent, config)[1].result == "skipped"


def test_mixing_shrinks_with_its_rule() -> None:
    state, rng = fresh(), np.random.default_rng(4)
    sent = {f"c{i}": moved(state, rng.standard_normal(flatten(state.adapter).size)) for i in range(5)}
    asked = AggregationConfig(name="krum", params={"f": 3}, pre=("nnm",), pre_params={"nnm": {"f": 3}}, quorum="shrink")
    after, outcome = play(state, sent, asked)
    assert outcome.why.startswith("f shrunk to 1:")
    told = asked.model_copy(update={"params": {"f": 1}, "pre_params": {"nnm": {"f": 1}}, "quorum": "skip"})
    assert np.array_equal(flatten(after.adapter), flatten(play(state, sent, told)[0].adapter))
