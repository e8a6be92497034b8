"""Defence levels against sequences worked out by hand, trust states, and what is bound of a client's claims."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.contribution import LoraUpdate, Tensors, tensors_sha256
from assay.federated import levels
from assay.trust import Beta, RunningMean

shares = st.floats(0, 1)
unhurried = settings(deadline=None)  # a busy machine is no failure


# --- step level ---------------------------------------------------------------------------------------------------


def test_step_level_over_three_rounds() -> None:
    # 2 steps of 8 samples a round; alpha, beta = 1, 1 at first, both times 0.95, then + good, + bad
    # round 1, none malicious:  .95 + 16 = 16.95;             .95 +  0 =  .95             w = 16.95 / 17.9
    # round 2, both malicious:  .95*16.95 +  0 = 16.1025;     .95*.95 + 16 = 16.9025      w = 16.1025 / 33.005
    # round 3, one malicious:   .95*16.1025 + 8 = 23.297375;  .95*16.9025 + 8 = 24.057375 w = 23.297375 / 47.35475
    trust, found = Beta(), []
    for malicious in (0, 2, 1):
        trust, weight = levels.step_level(trust, malicious, steps=2, batch_size=8)
        found.append((trust.alpha, trust.beta, weight))
    expected = [
        (16.95, 0.95, 16.95 / 17.9),
        (16.1025, 16.9025, 16.1025 / 33.005),
        (23.297375, 24.057375, 23.297375 / 47.35475),
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_step_level_first_round_borders() -> None:
    # 10 steps of 16: (0.95 + 160) / (1.9 + 160), and its mirror image
    assert levels.step_level(Beta(), 0, 10, 16)[1] == pytest.approx(160.95 / 161.9, rel=1e-14)
    assert levels.step_level(Beta(), 10, 10, 16)[1] == pytest.approx(0.95 / 161.9, rel=1e-14)
    assert levels.step_level(Beta(), 5, 10, 16)[1] == 0.5


def test_beta_of_a_constant_client_settles() -> None:
    # alpha tends to n / (1 - 0.95) = 20 n, beta to 0: a clean client's weight tends to 1
    trust = Beta()
    for _ in range(500):
        trust = trust.update(good=16, bad=0)
    assert trust.alpha == pytest.approx(320, rel=1e-6)
    assert trust.weight == pytest.approx(1, abs=1e-9)


@unhurried
@given(alpha=st.floats(0.1, 1e3), beta=st.floats(0.1, 1e3), steps=st.integers(1, 10), batch=st.integers(1, 32))
def test_more_malicious_steps_mean_less_weight(alpha: float, beta: float, steps: int, batch: int) -> None:
    weights = [levels.step_level(Beta(alpha, beta), bad, steps, batch)[1] for bad in range(steps + 1)]
    assert all(0 <= w <= 1 for w in weights)
    assert all(a > b for a, b in pairwise(weights))


@pytest.mark.parametrize(("bad", "steps", "batch"), [(3, 2, 8), (-1, 2, 8), (0, 0, 8), (0, 2, 0)])
def test_step_level_refuses_impossible_counts(bad: int, steps: int, batch: int) -> None:
    with pytest.raises(ValueError, match=r"steps|batch_size"):
        levels.step_level(Beta(), bad, steps, batch)


# --- client level -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "t"),
    [
        (0.0, 0.5 / (1 + math.exp(5))),  #          k (0 - 1/2) = -5
        (0.4, 0.25),  #                             k (0.4/0.8 - 1/2) = 0
        (0.8, 0.5 / (1 + math.exp(-5))),  #         the threshold itself is still the lower branch: k/2 = 5
        (0.9, 0.75),  #                             k ((0.9 - 0.8)/0.2 - 1/2) = 0
        (1.0, 0.5 + 0.5 / (1 + math.exp(-5))),  #   k (1 - 1/2) = 5
    ],
)
def test_suspicion_at_the_borders(score: float, t: float) -> None:
    assert levels.suspicion(score) == pytest.approx(t, abs=1e-12)
    trust, weight = levels.client_level(RunningMean(), score)
    assert weight == trust.value == 1 - levels.suspicion(score)  # first round: nothing left of the starting 1


def test_suspicion_jumps_just_above_the_threshold() -> None:
    # k (0 - 1/2) = -5 on the upper branch: 0.5 + 0.5 sigmoid(-5) = 0.50335 against 0.49665 at the threshold
    assert levels.suspicion(math.nextafter(0.8, 1)) == pytest.approx(0.5 + 0.5 / (1 + math.exp(5)), abs=1e-9)


def test_client_level_over_four_rounds() -> None:
    # 1 - t of the scores 0.4, 0.9, 0.4, 0.9: 0.75, 0.25, 0.75, 0.25; means 0.75, 0.5, 1.75/3, 0.5
    trust, weights = RunningMean(), []
    for score in (0.4, 0.9, 0.4, 0.9):
        trust, weight = levels.client_level(trust, score)
        weights.append(weight)
    np.testing.assert_allclose(weights, [0.75, 0.5, 1.75 / 3, 0.5], rtol=1e-12)
    assert trust.count == 4


def test_threshold_moves_the_curve() -> None:
    # threshold 0.5, k 4: s 0.25 -> sigmoid(0)/2; s 0.75 -> 1/2 + sigmoid(0)/2; s 0.5 -> sigmoid(2)/2
    assert levels.suspicion(0.25, 0.5, 4) == 0.25
    assert levels.suspicion(0.75, 0.5, 4) == 0.75
    assert levels.suspicion(0.5, 0.5, 4) == pytest.approx(0.5 / (1 + math.exp(-2)), abs=1e-12)
    assert levels.suspicion(1.0, 1.0) < 0.5  # nothing lies above a threshold of 1
    assert levels.suspicion(0.3, 0.5, 1e6) == pytest.approx(0.5)  # a cliff, not an overflow


@unhurried
@given(a=shares, b=shares, threshold=st.floats(0.01, 1), k=st.floats(0.1, 100))
def test_suspicion_rises_with_the_score(a: float, b: float, threshold: float, k: float) -> None:
    low, high = sorted((a, b))
    assert 0 <= levels.suspicion(low, threshold, k) <= levels.suspicion(high, threshold, k) <= 1


@unhurried
@given(scores=st.lists(shares, min_size=1, max_size=30))
def test_client_weight_is_the_mean_and_stays_in_bounds(scores: list[float]) -> None:
    trust = RunningMean()
    for score in scores:
        trust, weight = levels.client_level(trust, score)
        assert 0 <= weight <= 1
    assert weight == pytest.approx(np.mean([1 - levels.suspicion(s) for s in scores]), rel=1e-9)


@pytest.mark.parametrize(
    ("score", "threshold", "k"),
    [(-0.1, 0.8, 10), (1.1, 0.8, 10), (math.nan, 0.8, 10), (0.5, 0, 10), (0.5, 1.1, 10), (0.5, 0.8, 0)],
)
def test_client_level_refuses_what_is_no_probability(score: float, threshold: float, k: float) -> None:
    with pytest.raises(ValueError, match=r"score|threshold|k must"):
        levels.client_level(RunningMean(), score, threshold, k)


# --- shadow level and the round -----------------------------------------------------------------------------------


def test_shadow_level_by_hand() -> None:
    assert levels.shadow_level(0, 10) == 1.0  # r = 0
    assert levels.shadow_level(10, 10) == 0.0  # r = 1
    assert levels.shadow_level(1, 2) == 2**-7
    assert levels.shadow_level(1, 10) == pytest.approx(0.4782969)  # 0.9^7
    assert levels.shadow_level(1, 4, power=2) == 0.5625


@unhurried
@given(steps=st.integers(1, 20), power=st.floats(0.5, 10))
def test_shadow_weight_falls_with_malicious_steps(steps: int, power: float) -> None:
    weights = [levels.shadow_level(bad, steps, power) for bad in range(steps + 1)]
    assert weights[0] == 1
    assert weights[-1] == 0
    assert all(a > b for a, b in pairwise(weights))


def test_round_is_skipped_below_the_minimum_only() -> None:
    assert not levels.skip_round(0.2)
    assert levels.skip_round(0.19999)
    assert levels.skip_round(math.nan)
    assert not levels.skip_round(0.0, minimum=0.0)
    assert levels.skip_round(0.4, minimum=0.5)


# --- trust states -------------------------------------------------------------------------------------------------


@unhurried
@given(good=st.floats(0, 1e6), bad=st.floats(1e-6, 1e6), x=st.floats(-1e6, 1e6))
def test_trust_survives_json_exactly(good: float, bad: float, x: float) -> None:
    beta, mean = Beta().update(good, bad), RunningMean().update(x).update(0.1)
    assert Beta.from_json(json.loads(json.dumps(beta.to_json()))) == beta
    back = RunningMean.from_json(json.loads(json.dumps(mean.to_json())))
    assert back == mean
    assert isinstance(back.count, int)


def test_running_mean_starts_at_one_with_zero_rounds() -> None:
    assert RunningMean().value == 1.0
    assert RunningMean().update(0.1).value == 0.1  # exactly: the 1 counts as no round


@pytest.mark.parametrize(
    "state",
    [{}, {"alpha": 1, "beta": 1}, {"alpha": 1, "beta": 1, "decay": 0.95, "gamma": 1}, None]
    + [{"alpha": bad, "beta": 1, "decay": 0.95} for bad in ("1", None, True, math.nan, math.inf, -1)],
)
def test_damaged_beta_is_refused(state: object) -> None:
    with pytest.raises(ValueError, match=r"Beta|alpha"):
        Beta.from_json(state)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "state", [{}, {"value": 0.5, "count": 1.5}, {"value": math.nan, "count": 1}, {"value": 1, "count": -1}]
)
def test_damaged_running_mean_is_refused(state: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"RunningMean|running mean"):
        RunningMean.from_json(state)


def test_trust_refuses_impossible_updates() -> None:
    for good, bad in ((-1, 2), (math.nan, 1), (0, 0), (math.inf, 0)):
        with pytest.raises(ValueError, match="counts"):
            Beta().update(good, bad)
    with pytest.raises(ValueError, match="finite"):
        RunningMean().update(math.nan)
    with pytest.raises(ValueError, match="decay"):
        Beta(decay=0)


# --- claims -------------------------------------------------------------------------------------------------------

START: Tensors = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)}


def moved(by: float, start: Tensors = START) -> dict[str, np.ndarray]:
    """`start` with every one of its 10 values moved: a step of norm by * sqrt(10)."""
    return {name: value + np.float32(by) for name, value in start.items()}


def update_of(*steps: Tensors, sent: Tensors | None = None) -> LoraUpdate:
    tensors = sent if sent is not None else steps[-1] if steps else moved(0.5)
    return LoraUpdate(
        participant="p", round=1, base_sha256="", tensors=tensors, sha256=tensors_sha256(tensors), steps=steps
    )


def test_last_step_must_be_the_submission_exactly() -> None:
    chain = moved(0.25), moved(0.5)
    assert levels.last_step_matches(update_of(*chain))
    poisoned = moved(0.5)
    poisoned["b"][3] = np.nextafter(poisoned["b"][3], np.float32(2))
    assert not levels.last_step_matches(update_of(*chain, sent=poisoned))
    assert levels.last_step_matches(update_of(*chain, sent=poisoned), tolerance=1e-6)
    assert not levels.last_step_matches(update_of(*chain, sent=moved(0.6)), tolerance=0.05)
    assert not levels.last_step_matches(update_of())


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_malformed_last_steps_do_not_match_and_do_not_raise(tolerance: float) -> None:
    sent = moved(0.5)
    nan = {**sent, "b": np.full(4, np.nan, np.float32)}
    for last in (
        {"a": sent["a"]},
        {**sent, "c": sent["b"]},
        {**sent, "b": sent["b"][:1]},
        {**sent, "a": sent["a"].T},
        nan,
    ):
        assert not levels.last_step_matches(update_of(last, sent=sent), tolerance)
    assert not levels.last_step_matches(update_of(nan, sent=nan), tolerance)
    with pytest.raises(ValueError, match="tolerance"):
        levels.last_step_matches(update_of(sent), tolerance=-1)


def test_plausible_chains_pass() -> None:
    update = update_of(moved(0.25), moved(0.5))
    assert levels.plausible_chain(update, START, None, 2) == ""
    assert levels.plausible_chain(update, START, 0.25 * math.sqrt(10) + 1e-6, 2) == ""


@pytest.mark.parametrize(
    ("steps", "bound", "sentence"),
    [
        ((), None, "0 steps claimed, expected 2"),
        ((moved(0.1),), None, "1 steps claimed, expected 2"),
        ((moved(0.1), moved(0.2), moved(0.3)), None, "3 steps claimed, expected 2"),
        ((moved(0.0), moved(0.2)), None, "step 1 does not move"),
        ((moved(0.2), moved(0.2)), None, "step 2 does not move"),
        ((moved(0.2), moved(1.2)), 1.0, "step 2 moves by 3.16, more than 1"),
        ((moved(0.2), moved(math.nan)), None, "step 2 is not finite"),
        ((moved(math.inf), moved(0.2)), None, "step 1 is not finite"),
        (({"a": START["a"]}, moved(0.2)), None, "step 1: tensor names differ from the adapter's"),
        ((moved(0.2), {**START, "b": np.ones(1, np.float32)}), None, "step 2: b has shape (1,), expected (4,)"),
    ],
)
def test_implausible_chains_say_why(steps: tuple[Tensors, ...], bound: float | None, sentence: str) -> None:
    assert levels.plausible_chain(update_of(*steps), START, bound, 2) == sentence


def test_steps_of_a_chain_do_not_overflow() -> None:
    huge = moved(3e38)
    assert "moves by" in levels.plausible_chain(update_of(huge, moved(0.1)), START, 1.0, 2)
    assert levels.plausible_chain(replace(update_of(huge), steps=(huge,)), START, None, 1) == ""


def test_operators_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="max_step_norm"):
        levels.plausible_chain(update_of(), START, 0.0, 2)
    with pytest.raises(ValueError, match="steps"):
        levels.plausible_chain(update_of(), START, None, 0)
