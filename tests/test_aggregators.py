"""One conformance suite over every aggregator, then each against numbers worked out elsewhere.

Legend: N participants, D values of a flattened adapter. Matrices of whole numbers are exact in float32, so that moving
or scaling them changes nothing but what is asked about.
"""

import tracemalloc
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from assay.config import ConfigError
from assay.federated import aggregators, server_opt
from assay.federated.aggregators import (
    AGGREGATORS,
    EXCEPTIONS,
    PRE_STEPS,
    Aggregator,
    Remembering,
    ToleranceError,
    chain,
    common,
    make,
)


@dataclass(frozen=True)
class Case:
    """An aggregator with parameters, and which properties it must not be expected to have (see EXCEPTIONS)."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    pre: dict[str, dict[str, Any]] = field(default_factory=dict)
    but: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = [*(f"{n}-{p}" for n, p in self.pre.items()), self.name, *(f"{k}={v}" for k, v in self.params.items())]
        return "-".join(words)

    def made(self, f: int | None = None) -> Aggregator:
        """`f`: another number of attackers than the case's own, wherever it has one."""

        def changed(params: dict[str, Any]) -> dict[str, Any]:
            return params | ({"f": f} if f is not None and params.get("f", "estimate") != "estimate" else {})

        last = make(self.name, **changed(self.params))
        return chain(*(PRE_STEPS[n](**changed(p)) for n, p in self.pre.items()), last) if self.pre else last

    def __call__(self, delta_ND: np.ndarray, weight_N: Any) -> np.ndarray:
        """NaN where it says that the attackers are too many (an estimate may, for any data): then it must say so
        for the same data in any order, moved or scaled."""
        try:
            return self.made()(delta_ND, weight_N)
        except ToleranceError:
            return np.full(delta_ND.shape[1], np.nan, np.float32)


HEADS, ROUNDS = ("repeats",), ("blocks",)
CASES = [
    Case("mean"),
    Case("median"),
    Case("trimmed_mean", {"f": 0}),
    Case("trimmed_mean", {"f": 2}),
    Case("trimmed_mean", {"f": "estimate"}, but=HEADS),
    Case("krum", {"f": 0}, but=HEADS),
    Case("krum", {"f": 1}, but=HEADS),
    Case("krum", {"f": 1, "m": 2}, but=HEADS),
    Case("krum", {"f": 2, "variant": "byzfl"}, but=HEADS),
    Case("krum", {"f": 2, "variant": "safe-fedllm"}, but=HEADS),
    Case("krum", {"f": "estimate"}, but=HEADS),
    Case("multi_krum", {"f": 1}, but=HEADS),
    Case("multi_krum", {"f": 2, "variant": "byzfl"}, but=HEADS),
    Case("multi_krum", {"f": 2, "m": 3, "variant": "safe-fedllm"}, but=HEADS),
    Case("bulyan", {"f": 0}, but=HEADS),
    Case("bulyan", {"f": 1}, but=HEADS),
    Case("norm_clipped_mean", but=("moves", "range", *ROUNDS)),
    Case("norm_clipped_mean", {"bound": 20.0}, but=("moves", "range", "scales", "alone", *ROUNDS)),
    Case("geometric_median", but=ROUNDS),
    Case("centred_clipping", but=ROUNDS),
    Case("centred_clipping", {"start": "zero"}, but=("moves", "range", *ROUNDS)),
    Case("centred_clipping", {"start": "zero", "tau": 20.0}, but=("moves", "range", "scales", "alone", *ROUNDS)),
    Case("foolsgold", but=("moves", "repeats", "range", *ROUNDS)),
    Case("residual", but=("repeats", "range", *ROUNDS)),
    Case("dnc", {"f": 2}, but=HEADS),
    Case("dnc", {"f": 1, "iterations": 2, "subset": 3}, but=HEADS),
    Case("flame", but=("moves", "repeats", "range", *ROUNDS)),
    Case("lasa", {"sparsity": 0.5}, but=("moves", "range", "alone", *ROUNDS)),
    Case("median", pre={"nnm": {"f": 2}}, but=ROUNDS),
    Case("krum", {"f": 1}, pre={"nnm": {"f": 2}}, but=(*HEADS, *ROUNDS)),
    Case("trimmed_mean", {"f": 1}, pre={"bucketing": {"s": 2}}, but=("moves", "scales", "repeats", *ROUNDS)),
    Case("mean", pre={"bucketing": {"s": 3}, "nnm": {"f": 1}}, but=("moves", "scales", "repeats", *ROUNDS)),
]
LEAST = 7  # present participants every case above can work with
every_case = pytest.mark.parametrize("case", CASES, ids=str)
examples = settings(max_examples=25, deadline=None)

shapes = st.tuples(st.integers(LEAST, 10), st.integers(1, 8))
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
whole = shapes.flatmap(lambda s: hnp.arrays(np.float32, s, elements=st.integers(-50, 50).map(np.float32)))
anything = shapes.flatmap(lambda s: hnp.arrays(np.float32, s, elements=finite))
positive = st.floats(2**-20, 2**20)


def having(what: str) -> pytest.MarkDecorator:
    """Cases that must have a property; each of the others has a counter-example, below."""
    return pytest.mark.parametrize("case", [c for c in CASES if what not in c.but], ids=str)


def weights_for(delta_ND: np.ndarray, data: st.DataObject, elements: st.SearchStrategy[float] = positive) -> np.ndarray:
    return np.array(data.draw(st.lists(elements, min_size=len(delta_ND), max_size=len(delta_ND))))


def naive_krum(delta_ND: np.ndarray, f: int) -> tuple[int, np.ndarray]:
    """From the text of Blanchard et al. 2017: s(i) = sum over the n-f-2 closest vectors of |V_i - V_j|^2; float64."""
    vectors = [row.astype(np.float64) for row in delta_ND]
    score = []
    for i, mine in enumerate(vectors):
        others = sorted(float(((mine - other) ** 2).sum()) for j, other in enumerate(vectors) if j != i)
        score.append(sum(others[: len(vectors) - f - 2]))
    return int(np.argmin(score)), np.array(score)


def test_every_aggregator_is_in_the_suite() -> None:
    assert {case.name for case in CASES} == set(AGGREGATORS)
    assert {name for case in CASES for name in case.pre} == set(PRE_STEPS)


def test_what_does_not_hold_is_in_the_registry_with_a_reason() -> None:
    named = {(name, what) for case in CASES for what in case.but for name in (case.name, *case.pre)}
    written = {(name, what) for name, whats in EXCEPTIONS.items() for what in whats}
    assert written <= named, "an exception that no case shows"
    for case in CASES:
        for what in case.but:
            reasons = [EXCEPTIONS.get(name, {}).get(what, "") for name in (case.name, *case.pre)]
            estimated = what == "repeats" and "estimate" in case.params.values()  # an estimate counts heads
            assert any(len(reason.split()) >= 5 for reason in reasons) or estimated, (str(case), what)


# --- conformance --------------------------------------------------------------------------------------------------


@every_case
@examples
@given(data=st.data())
def test_order_of_rows_does_not_matter_bit_for_bit(case: Case, data: st.DataObject) -> None:
    delta_ND = data.draw(anything)
    weight_N = weights_for(delta_ND, data)
    order_N = np.array(data.draw(st.permutations(range(len(delta_ND)))))
    there, here = case(delta_ND, weight_N), case(delta_ND[order_N], weight_N[order_N])
    assert there.tobytes() == here.tobytes()
    assert there.dtype == np.float32


def moves(case: Case, delta_ND: np.ndarray, weight_N: np.ndarray, move_D: np.ndarray) -> None:
    np.testing.assert_allclose(
        case(delta_ND + move_D, weight_N), case(delta_ND, weight_N) + move_D, rtol=1e-6, atol=2e-5
    )


def scales(case: Case, delta_ND: np.ndarray, weight_N: np.ndarray, power: int) -> None:
    scale = np.float32(2.0**power)  # powers of two are exact
    np.testing.assert_array_equal(case(delta_ND * scale, weight_N), case(delta_ND, weight_N) * scale)
    tripled_D = case(delta_ND * np.float32(3), weight_N)
    np.testing.assert_allclose(tripled_D, case(delta_ND, weight_N) * np.float32(3), rtol=1e-6, atol=1e-5)


def alone(case: Case, row: np.ndarray, w: float) -> None:
    np.testing.assert_array_equal(case.made(f=0)(row[None], [w]), row)


def within(case: Case, delta_ND: np.ndarray, weight_N: np.ndarray) -> None:
    out_D = case(delta_ND, weight_N)
    assert np.isnan(out_D).all() or ((out_D >= delta_ND.min(axis=0)) & (out_D <= delta_ND.max(axis=0))).all()


def repeats(case: Case, delta_ND: np.ndarray, weight_N: np.ndarray, f: int) -> None:
    times = int(weight_N.sum()) // len(delta_ND)
    repeated_MD = np.repeat(delta_ND, weight_N, axis=0)
    once_D = case.made(f=f)(delta_ND, weight_N)
    again_D = case.made(f=f * times)(repeated_MD, np.ones(len(repeated_MD)))
    np.testing.assert_allclose(once_D, again_D, rtol=1e-6, atol=2e-5)


@having("moves")
@examples
@given(data=st.data())
def test_moving_all_rows_moves_the_result(case: Case, data: st.DataObject) -> None:
    delta_ND = data.draw(whole)
    move_D = data.draw(hnp.arrays(np.float32, delta_ND.shape[1], elements=st.integers(-50, 50).map(np.float32)))
    moves(case, delta_ND, weights_for(delta_ND, data), move_D)


@having("scales")
@examples
@given(data=st.data(), power=st.integers(-60, 80))
def test_scaling_all_rows_scales_the_result(case: Case, data: st.DataObject, power: int) -> None:
    delta_ND = data.draw(whole)
    scales(case, delta_ND, weights_for(delta_ND, data), power)


@every_case
@examples
@given(data=st.data(), power=st.integers(-10, 10))
def test_only_proportions_of_weights_matter(case: Case, data: st.DataObject, power: int) -> None:
    delta_ND = data.draw(whole)
    weight_N = weights_for(delta_ND, data)
    np.testing.assert_array_equal(case(delta_ND, weight_N * 2.0**power), case(delta_ND, weight_N))


@every_case
@examples
@given(data=st.data())
def test_weight_zero_is_absence(case: Case, data: st.DataObject) -> None:
    delta_ND = data.draw(anything)
    weight_N = weights_for(delta_ND, data)
    n, d = delta_ND.shape
    ghosts_MD = np.array([[1e38], [np.nan], [-np.inf]], np.float32) * np.ones((1, d), np.float32)
    with_MD, with_M = np.concatenate([ghosts_MD, delta_ND]), np.concatenate([np.zeros(3), weight_N])
    order_M = np.array(data.draw(st.permutations(range(n + 3))))
    assert case(with_MD[order_M], with_M[order_M]).tobytes() == case(delta_ND, weight_N).tobytes()


@every_case
def test_weights_act(case: Case) -> None:
    """Fault 1 of the published code: trust changes nothing but in plain averages. Here every rule is moved by it."""
    rng, told_apart = np.random.default_rng(0), 0
    for _ in range(10):
        delta_ND = (1 + 0.3 * rng.standard_normal((9, 12))).astype(np.float32)
        told_apart += not np.array_equal(case(delta_ND, np.ones(9)), case(delta_ND, rng.uniform(0.05, 1, 9)))
    assert told_apart >= 3  # a choice of one row among nine may well stay the same


@every_case
def test_the_sign_of_zero_does_not_betray_the_order(case: Case) -> None:
    delta_ND = np.array([[0.0], [-0.0], [-0.0], [0.0], [0.0], [-0.0], [0.0]], np.float32)
    assert {case(np.roll(delta_ND, roll, axis=0), np.ones(7)).tobytes() for roll in range(7)} == {bytes(4)}


@every_case
def test_nobody_present_changes_nothing(case: Case) -> None:
    delta_ND = np.full((6, 3), np.nan, np.float32)
    np.testing.assert_array_equal(case(delta_ND, np.zeros(6)), np.zeros(3, np.float32))
    np.testing.assert_array_equal(case(delta_ND[:0], np.zeros(0)), np.zeros(3, np.float32))


@having("alone")
@examples
@given(row=hnp.arrays(np.float32, 5, elements=finite), w=positive)
def test_one_participant_alone_gets_his_delta_back(case: Case, row: np.ndarray, w: float) -> None:
    if "m" not in case.params:  # nobody can be the two best
        alone(case, row, w)


@having("repeats")
@examples
@given(data=st.data())
def test_whole_weights_are_repeated_rows(case: Case, data: st.DataObject) -> None:
    delta_ND = data.draw(whole)
    n = len(delta_ND)
    weight_N = weights_for(delta_ND, data, st.integers(1, 4)).astype(int)
    weight_N[-1] = n - int(weight_N[:-1].sum()) % n  # the sum is a multiple of n, so that f scales to a whole number
    repeats(case, delta_ND, weight_N, data.draw(st.integers(0, (n - 1) // 2)))


@having("range")
@examples
@given(data=st.data())
def test_result_lies_within_the_present_rows(case: Case, data: st.DataObject) -> None:
    delta_ND = data.draw(anything)
    within(case, delta_ND, weights_for(delta_ND, data))


SHOWN = [(case, what) for case in CASES for what in case.but if what not in ROUNDS]


@pytest.mark.parametrize(("case", "what"), SHOWN, ids=[f"{case}-{what}" for case, what in SHOWN])
def test_what_is_excepted_does_not_hold(case: Case, what: str) -> None:
    """An exception that nothing contradicts would be a property given away for nothing."""
    rng = np.random.default_rng(0)
    for attempt in range(200):
        rows, weight_N = rng.standard_normal((8, 4)) * 30, rng.integers(1, 4, 8)
        weight_N[-1] = 8 - int(weight_N[:-1].sum()) % 8
        if attempt % 4 == 1:  # copies
            rows = np.repeat(rows[:4], 2, axis=0)
        elif attempt % 4 == 2:  # lengths differ, and one coordinate is the same in all
            rows = 90 + rows * rng.exponential(1, (8, 1))
            rows[:, 0] = 90
        elif attempt % 4 == 3:  # stairs that end in a landing, in another order in each column; very unequal weights
            rows = np.stack([np.roll(np.minimum(np.arange(8) * 10.0, 40.0), 2 * column) for column in range(4)], axis=1)
            weight_N = 8 ** rng.integers(0, 4, 8) if what != "repeats" else weight_N
        delta_ND = rows.astype(np.float32)
        try:
            if what == "moves":
                moves(case, delta_ND, weight_N, np.full(4, 20, np.float32))
            elif what == "scales":
                scales(case, delta_ND, weight_N, 4)
            elif what == "alone":
                alone(case, delta_ND[0], 1.0)
            elif what == "repeats":
                repeats(case, delta_ND, weight_N, 1)
            else:
                within(case, delta_ND, weight_N)
        except ToleranceError:
            continue
        except AssertionError:
            return
    pytest.fail(f"{case} always {what}: take it out of EXCEPTIONS")


@every_case
@pytest.mark.parametrize("values", [1, 23, 1000])
@pytest.mark.parametrize("equal", [True, False])
def test_borders_of_blocks_do_not_show(case: Case, values: int, equal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    delta_ND = rng.standard_normal((7, 301)).astype(np.float32)
    weight_N = np.ones(7) if equal else rng.uniform(0.1, 1, 7)
    whole_D = case(delta_ND, weight_N)
    monkeypatch.setattr(common, "BLOCK_VALUES", values)
    if "blocks" in case.but:  # to a rounding or two of float32
        np.testing.assert_allclose(case(delta_ND, weight_N), whole_D, rtol=2**-21, atol=1e-7)
    else:
        np.testing.assert_array_equal(case(delta_ND, weight_N), whole_D)


@every_case
def test_inputs_are_left_alone(case: Case) -> None:
    rng = np.random.default_rng(1)
    delta_ND, weight_N = rng.standard_normal((8, 9)).astype(np.float32), rng.uniform(0.1, 1, 8)
    before_ND, before_N = delta_ND.copy(), weight_N.copy()
    delta_ND.flags.writeable = False
    out_D = case(delta_ND, weight_N)
    out_D[:] = 0  # the caller's own copy
    np.testing.assert_array_equal(delta_ND, before_ND)
    np.testing.assert_array_equal(weight_N, before_N)


@every_case
def test_memory_beyond_the_input_is_a_quarter_of_it(case: Case) -> None:
    """The result included. What a rule remembers is one more row for each participant, which it returns."""
    d = 2**18 if case.name == "residual" else 2**20  # its blocks are small and its time is not
    rng = np.random.default_rng(0)
    delta_ND = rng.standard_normal((16, d), np.float32)
    weight_N, aggregate = rng.uniform(0.5, 1, 16), case.made()
    case(delta_ND[:, :64], weight_N)  # imports are not the rule's memory
    tracemalloc.start()
    try:
        aggregate(delta_ND, weight_N)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    kept = delta_ND.nbytes if isinstance(aggregate, Remembering) else 0
    assert peak <= kept + delta_ND.nbytes / 4, f"{peak / delta_ND.nbytes:.0%} of the input"


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("median", {}),
        ("trimmed_mean", {"f": 3}),
        ("trimmed_mean", {"f": "estimate"}),
        ("krum", {"f": 3}),
        ("krum", {"f": 3, "m": 4}),
        ("krum", {"f": 3, "variant": "byzfl"}),
        ("krum", {"f": 3, "variant": "safe-fedllm"}),
        ("krum", {"f": "estimate"}),
        ("multi_krum", {"f": 3}),
        ("multi_krum", {"f": 3, "variant": "byzfl"}),
        ("multi_krum", {"f": 3, "variant": "safe-fedllm"}),
    ],
)
@pytest.mark.parametrize("where", [1e6, -1e6, 1e30])
@examples
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(1e-3, 1.0))
def test_f_attackers_cannot_leave_the_honest_range(
    name: str, params: dict[str, Any], where: float, seed: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    _check_range(name, params, where * (1 + spread * rng.random(3)), rng)


@pytest.mark.parametrize("where", [1e6, -1e6, 1e30])
@examples
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(1e-3, 0.6))
def test_dnc_keeps_the_honest_range_while_attackers_stay_together(where: float, seed: int, spread: float) -> None:
    """3 of 9 at 1, 1+s, 1+s put the centre at (3+2s)/9: farther from the honest than from the nearest attacker only
    where s > 0.75. Beyond that DnC does not hold, next test."""
    rng = np.random.default_rng(seed)
    _check_range("dnc", {"f": 3}, where * (1 + spread * rng.random(3)), rng)


def test_dnc_keeps_an_attacker_whom_the_others_drag_the_centre_to() -> None:
    """What the docstring warns of: centre at 5/9 of the way, the first attacker 4/9 from it, the honest 5/9."""
    where = 1e6 * np.array([1.0, 2.0, 2.0])
    with pytest.raises(AssertionError):
        _check_range("dnc", {"f": 3}, where, np.random.default_rng(0))
    _check_range("median", {}, where, np.random.default_rng(0))


def _check_range(name: str, params: dict[str, Any], where_3: np.ndarray, rng: np.random.Generator) -> None:
    delta_ND = rng.standard_normal((9, 11)).astype(np.float32)
    bad = rng.choice(9, size=3, replace=False)
    delta_ND[bad] = where_3[:, None]
    honest_ND = np.delete(delta_ND, bad, axis=0)
    try:
        out_D = make(name, **params)(delta_ND, np.ones(9))
    except ToleranceError:  # an estimate may count an honest stranger as well, and then say that it is too many
        if "estimate" not in params.values():
            raise
        reject()
    assert (out_D >= honest_ND.min(axis=0)).all()
    assert (out_D <= honest_ND.max(axis=0)).all()


@every_case
@pytest.mark.parametrize(
    ("delta_ND", "weight_N", "message"),
    [
        (np.zeros((8, 2), np.float32), [1, 1, 1, 1, -1, 1, 1, 1], "weight -1.0 of row 4"),
        (np.zeros((8, 2), np.float32), [1, np.nan, 1, 1, 1, 1, 1, 1], "weight nan of row 1"),
        (np.zeros((8, 2), np.float32), [1, 1, np.inf, 1, 1, 1, 1, 1], "weight inf of row 2"),
        (np.zeros((8, 2), np.float32), [1, 1], "does not fit 8 rows"),
        (np.zeros((8, 2), np.float32), np.ones((8, 1)), "does not fit 8 rows"),
        (np.zeros(8, np.float32), np.ones(8), "float32 matrix"),
        (np.zeros((8, 2)), np.ones(8), "float64 of shape"),
        (np.full((8, 2), np.nan, np.float32), np.ones(8), "NaN or infinity"),
        (np.full((8, 2), np.inf, np.float32), np.ones(8), "NaN or infinity"),
    ],
)
def test_mistakes_of_the_operator_raise(case: Case, delta_ND: np.ndarray, weight_N: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case.made()(delta_ND, weight_N)


# --- golden numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [5, 6, 20])
def test_equal_weights_are_the_classical_rules(n: int) -> None:
    delta_ND = np.random.default_rng(n).standard_normal((n, 400)).astype(np.float32)
    exact_ND = delta_ND.astype(np.float64)
    for w in (1.0, 0.1, 7.3):  # 0.1 is no binary number: sums of it must not tip the median
        weight_N = np.full(n, w)
        close = {"rtol": 2**-23, "atol": 1e-9}
        np.testing.assert_allclose(make("mean")(delta_ND, weight_N), exact_ND.mean(axis=0), **close)
        np.testing.assert_array_equal(
            make("median")(delta_ND, weight_N), np.median(exact_ND, axis=0).astype(np.float32)
        )
        for f in range((n - 1) // 2 + 1):
            golden_D = stats.trim_mean(exact_ND, (f + 0.5) / n, axis=0)  # scipy cuts int(share * n): aim at the middle
            np.testing.assert_allclose(make("trimmed_mean", f=f)(delta_ND, weight_N), golden_D, **close)


def test_weighted_mean_against_numpy() -> None:
    rng = np.random.default_rng(3)
    delta_ND, weight_N = rng.standard_normal((8, 100)).astype(np.float32), rng.uniform(0, 1, 8)
    golden_D = np.average(delta_ND.astype(np.float64), axis=0, weights=weight_N)
    np.testing.assert_allclose(make("mean")(delta_ND, weight_N), golden_D, rtol=2**-23, atol=1e-9)


def test_weighted_median_by_hand() -> None:
    column = np.array([[1], [2], [3]], np.float32)
    assert make("median")(column, [0.1, 0.2, 0.3]) == [2.5]  # half of 0.6 lies up to 2, half from 3: the midpoint
    assert make("median")(column, [0.1, 0.2, 0.31]) == [3]
    assert make("median")(column, [0.1, 0.21, 0.3]) == [2]


def test_weighted_trimmed_mean_by_hand() -> None:
    # n 3, f 1, weights 1 2 3: a third of 6, that is 2, goes from each end. Left: one half of the row of 10 (weight 2
    # less 1) and 1 of the row of 20 (weight 3 less 2): (10 + 20) / 2.
    column = np.array([[0], [10], [20]], np.float32)
    np.testing.assert_array_equal(make("trimmed_mean", f=1)(column, [1, 2, 3]), [15])


def test_rounding_of_weights_lets_no_trimmed_row_back_in() -> None:
    # n 5, f 1: a fifth of 1.0 is the 0.1 + 0.1 of the low rows, which comes out 6e-17 too large relative to the 0.5:
    # that much of -1e30 must not stay. From the top 0.1 of the 3 and half of the 2 go: (0.5 * 1 + 0.1 * 2) / 0.6.
    column = np.array([[-1e30], [-1e30], [1], [2], [3]], np.float32)
    out_D = make("trimmed_mean", f=1)(column, [0.1, 0.1, 0.5, 0.2, 0.1])
    np.testing.assert_allclose(out_D, [0.7 / 0.6], rtol=1e-6)


@pytest.mark.parametrize(("n", "f"), [(5, 1), (7, 2), (11, 4), (12, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_krum_chooses_as_the_paper_does(n: int, f: int, seed: int) -> None:
    delta_ND = np.random.default_rng(seed).standard_normal((n, 50)).astype(np.float32)
    winner, score_N = naive_krum(delta_ND, f)
    np.testing.assert_array_equal(make("krum", f=f)(delta_ND, np.ones(n)), delta_ND[winner])
    m = n - f - 2
    best = np.argsort(score_N)[:m]
    np.testing.assert_allclose(
        make("krum", f=f, m=m)(delta_ND, np.ones(n)),
        delta_ND[best].astype(np.float64).mean(axis=0),
        rtol=1e-6,
        atol=1e-9,
    )


def test_krum_by_hand() -> None:
    # n 5, f 1: 2 neighbours. Scores of 0 1 3 4 9: 1+9, 1+4, 1+4, 1+9, 25+36. A tie of 1 and 3: the smaller comes first.
    column = np.array([[9], [4], [3], [1], [0]], np.float32)
    np.testing.assert_array_equal(make("krum", f=1)(column, np.ones(5)), [1])
    np.testing.assert_array_equal(make("krum", f=1, m=2)(column, np.ones(5)), [2])


def test_krum_weighs_centrality_by_trust() -> None:
    # scores as above; the row of 1 (score 5) trusted by less than half loses to 0 (score 10) only after 3 does
    column = np.array([[0], [1], [3], [4], [9]], np.float32)
    np.testing.assert_array_equal(make("krum", f=1)(column, [1, 0.9, 1, 1, 1]), [3])
    np.testing.assert_array_equal(make("krum", f=1)(column, [1, 0.4, 0.4, 0.9, 1]), [0])
    np.testing.assert_array_equal(make("krum", f=1)(column, [0.1, 1e-300, 0.1, 0.1, 0.1]), [3])


def test_krum_on_a_large_common_offset_chooses_as_float64() -> None:
    rng = np.random.default_rng(0)
    delta_ND = (100 + 1e-3 * rng.standard_normal((20, 20_000))).astype(np.float32)
    winner, _ = naive_krum(delta_ND, 4)
    np.testing.assert_array_equal(make("krum", f=4)(delta_ND, np.ones(20)), delta_ND[winner])
    # the trap: distances from a float32 Gram matrix of the rows as they stand are far off
    gram_NN = delta_ND @ delta_ND.T
    square = float(((delta_ND[0].astype(np.float64) - delta_ND[1]) ** 2).sum())
    assert abs(float(gram_NN[0, 0] + gram_NN[1, 1] - 2 * gram_NN[0, 1]) / square - 1) > 0.5


@pytest.mark.parametrize("where", [1e9, -1e30])
def test_krum_cannot_be_blinded_by_far_rows(where: float) -> None:
    # a mean as centre would move by 1e8 and more and leave nothing of distances of 1e-3 in float64
    rng = np.random.default_rng(1)
    delta_ND = (1e-3 * rng.standard_normal((11, 500))).astype(np.float32)
    delta_ND[[2, 5, 7, 10]] = where
    winner, _ = naive_krum(delta_ND, 4)
    np.testing.assert_array_equal(make("krum", f=4)(delta_ND, np.ones(11)), delta_ND[winner])


@pytest.mark.parametrize("seed", range(8))
def test_krum_ties_hold_against_rounding(seed: int) -> None:
    # five shifts of every group of five columns: distances depend on the shift only, so all scores are equal, but for
    # the rounding of their sums over 1,000 columns
    values = np.random.default_rng(seed).standard_normal((200, 5))
    circulant = np.stack([np.roll(values, shift, axis=1).ravel() for shift in range(5)]).astype(np.float32)
    np.testing.assert_array_equal(make("krum", f=1)(circulant, np.ones(5)), circulant[circulant[:, 0].argmin()])


def test_krum_breaks_ties_by_content() -> None:
    corners = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)  # all alike
    for roll in range(4):
        np.testing.assert_array_equal(make("krum", f=0)(np.roll(corners, roll, axis=0), np.ones(4)), [-1, 0])


# --- what a rule can bear -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "present", "message"),
    [
        (
            "krum",
            {"f": 4},
            10,
            "krum bears f attackers only among at least 2f+3 present participants: f=4 needs 11, 10",
        ),
        ("krum", {"f": 1}, 4, "f=1 needs 5, 4 present"),
        ("krum", {"f": 1, "m": 3}, 5, "at most n-f-2 of n participants: f=1, m=3 needs 6, 5 present"),
        ("trimmed_mean", {"f": 5}, 10, "trimmed_mean bears f attackers only among at least 2f[+]1 .* f=5 needs 11, 10"),
    ],
)
def test_too_many_attackers_for_those_present(name: str, params: dict[str, Any], present: int, message: str) -> None:
    delta_ND = np.zeros((present + 2, 3), np.float32)
    weight_N = np.array([1.0] * present + [0.0, 0.0])  # absent participants do not count
    with pytest.raises(ToleranceError, match=message.replace("2f+3", "2f[+]3")):
        make(name, **params)(delta_ND, weight_N)
    one_more = params | ({"f": params["f"] - 1} if "m" not in params else {"m": params["m"] - 1})
    make(name, **one_more)(delta_ND, weight_N)


# --- make ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("meen", {}, "unknown aggregator 'meen'; known: mean, median, trimmed_mean, krum, multi_krum"),
        ("mean", {"f": 1}, "mean has no parameter 'f'; known: none"),
        ("krum", {"f": 1, "g": 1}, "krum has no parameter 'g'; known: f, m, variant"),
        ("krum", {}, "krum needs parameter 'f'; known: f, m, variant"),
        ("trimmed_mean", {}, "trimmed_mean needs parameter 'f'"),
        ("krum", {"f": -1}, "f must be a whole number of at least 0, got -1"),
        ("krum", {"f": 1.5}, "f must be a whole number"),
        ("krum", {"f": True}, "f must be a whole number"),
        ("krum", {"f": 1, "m": 0}, "m must be a whole number of at least 1"),
        ("trimmed_mean", {"f": "2"}, "f must be a whole number"),
    ],
)
def test_unknown_names_and_parameters_list_the_known(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, **params)


def test_any_function_is_an_aggregator_and_sees_present_rows_only() -> None:
    def shrunken(delta_ND: np.ndarray, weight_N: np.ndarray, by: float = 2.0) -> np.ndarray:
        assert np.isfinite(delta_ND).all()
        return (weight_N @ delta_ND) / weight_N.sum() / by

    delta_ND = np.array([[4, 8], [np.nan, np.nan], [0, 0]], np.float32)
    out_D = make(shrunken, by=4)(delta_ND, [1, 0, 1])
    np.testing.assert_array_equal(out_D, [0.5, 1])
    assert out_D.dtype == np.float32
    np.testing.assert_array_equal(make(shrunken)(delta_ND, [0, 0, 0]), [0, 0])
    for wrong in (lambda delta_ND, _: delta_ND, lambda delta_ND, _: np.full(2, np.nan)):
        with pytest.raises(ValueError, match="must return 2 finite values"):
            make(wrong)(delta_ND, [1, 0, 1])


def test_entry_points_are_factories_looked_up_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def factory(row: int = 0) -> Any:
        return lambda delta_ND, weight_N: delta_ND[row]

    def entry_points(group: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="pick", load=lambda: factory)] if group == "assay.aggregators" else []

    monkeypatch.setattr(aggregators, "entry_points", entry_points)
    delta_ND = np.array([[9], [1], [2]], np.float32)
    np.testing.assert_array_equal(make("pick", row=1)(delta_ND, [0, 1, 1]), [2])
    with pytest.raises(ConfigError, match="pick has no parameter 'line'; known: row"):
        make("pick", line=1)
    with pytest.raises(ConfigError, match=r"known: mean, median, .*, lasa, pick"):
        make("pikc")


# --- server optimiser ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(server_opt.SERVER_OPTS))
def test_server_optimisers_are_pure_and_stand_still_on_zero(name: str) -> None:
    init, update = server_opt.make(name)
    params_D = np.array([1.5, -2.0, 0.1], np.float32)
    before_D = params_D.copy()
    state = init(params_D)
    assert all(isinstance(value, np.ndarray) for value in state.values())
    new_D, _ = update(np.zeros(3, np.float32), state, params_D)
    assert new_D.dtype == np.float32
    np.testing.assert_array_equal(new_D, before_D)
    new_D[:] = 0
    np.testing.assert_array_equal(params_D, before_D)
    with pytest.raises(ValueError, match="does not fit"):
        update(np.zeros(2, np.float32), state, params_D)


def test_fedavg_adds_the_delta() -> None:
    params_D, delta_D = np.array([1, 2], np.float32), np.array([0.5, -4], np.float32)
    for lr, expected in ((1.0, [1.5, -2.0]), (0.25, [1.125, 1.0])):
        init, update = server_opt.make("fedavg", lr=lr)
        new_D, state = update(delta_D, init(params_D), params_D)
        np.testing.assert_array_equal(new_D, np.array(expected, np.float32))
        assert state == {}


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("fedadam?", {}, "unknown server optimiser 'fedadam[?]'; known: fedavg"),
        ("fedavg", {"beta": 1}, "fedavg has no parameter 'beta'; known: lr"),
        ("fedavg", {"lr": 0.0}, "lr must be a positive number"),
        ("fedavg", {"lr": float("nan")}, "lr must be a positive number"),
    ],
)
def test_server_optimiser_mistakes(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        server_opt.make(name, **params)
