"""Defence levels against sequences worked out by hand, and trust states."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.federated import levels
from assay.trust import Audited, Beta, Frozen, RunningMean

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


# --- evidence level -----------------------------------------------------------------------------------------------


def follow(*rounds: tuple[float, bool, bool], agree: int = 3, readmit: int = 2) -> list[float]:
    """Weights of a client whose rounds are (weight, clean, audited)."""
    trust, found = Audited(), []
    for weight, clean, looked in rounds:
        trust, w = levels.evidence_level(trust, weight, clean, audited=looked, agree=agree, readmit=readmit)
        found.append(w)
    return found


def test_evidence_level_earns_spends_and_regains_trust() -> None:
    good, bad = (0.9, True, True), (0.5, False, True)
    unseen = (0.0, False, False)  # what it did there nobody looked at
    # three clean audits, then an unseen round gets their mean; a bad audit 0; the first clean round after it still 0
    assert follow(good, (0.6, True, True), good, unseen, bad, good, good, good) == [
        0.9, 0.6, 0.9, pytest.approx(0.8), 0.0, 0.0, 0.9, 0.9,
    ]  # fmt: skip
    # the oscillator that is bad in every second audited round never gets back in
    assert follow(bad, good, bad, good, bad, good) == [0.0] * 6


def test_only_the_last_agreeing_audits_are_remembered() -> None:
    rounds = [(w, True, True) for w in (0.1, 0.2, 0.3, 0.4)]
    assert follow(*rounds, (0.0, True, False), agree=2)[-1] == pytest.approx(0.35)


def test_who_is_not_trusted_yet_must_be_audited() -> None:
    with pytest.raises(ValueError, match="must be audited"):
        levels.evidence_level(Audited(), 1.0, True, audited=False)
    with pytest.raises(ValueError, match="weight must lie"):
        levels.evidence_level(Audited(), math.nan, True, audited=True)


@unhurried
@given(rounds=st.lists(st.tuples(shares, st.booleans(), st.booleans()), max_size=40))
def test_an_audited_bad_round_never_counts_and_nobody_is_lost_for_ever(rounds: list[tuple[float, bool, bool]]) -> None:
    trust = Audited()
    for weight, clean, wanted in rounds:
        looked = wanted or not trust.trusted(3)
        trust, w = levels.evidence_level(trust, weight, clean, audited=looked)
        assert 0 <= w <= 1
        assert clean or not looked or w == 0
        assert Audited.from_json(json.loads(json.dumps(trust.to_json()))) == trust
    for _ in range(3):
        trust, w = levels.evidence_level(trust, 1.0, True, audited=True)
    assert w == 1


def test_audits_are_drawn_at_their_share_and_differ_by_secret_client_and_round() -> None:
    drawn = {(s, c, r): levels.audited(s, c, r, 0.3) for s in "ab" for c in ("x", "y") for r in range(2000)}
    assert sum(drawn.values()) / len(drawn) == pytest.approx(0.3, abs=0.03)  # 8,000 draws: 6 standard deviations
    for one, other in ((("a", "x"), ("b", "x")), (("a", "x"), ("a", "y"))):
        both = sum(drawn[(*one, r)] and drawn[(*other, r)] for r in range(2000)) / 2000
        assert both == pytest.approx(0.09, abs=0.04), "independent: 0.3 x 0.3"


def test_published_evidence_freezes_and_audits_every_fifth_round() -> None:
    trust, weights = Frozen(), []
    verdicts = [False] * 3 + [True] * 6  # clean until frozen, then poison
    for malicious in verdicts:
        trust, w = levels.published_evidence_level(trust, 0.0 if malicious else 0.9, malicious)
        weights.append(w)
    # frozen in round 3; rounds 4-7 unseen at the frozen mean; round 8 is the fifth: caught, back to collecting
    assert weights == pytest.approx([0.9] * 7 + [0.0, 0.0])
    assert trust.verdict == ""


def test_published_evidence_condemns_for_good_and_forgets_what_disagrees() -> None:
    trust = Frozen()
    for malicious in (True, True, True):
        trust, w = levels.published_evidence_level(trust, 0.3, malicious)
    for _ in range(50):
        trust, w = levels.published_evidence_level(trust, 1.0, False)
        assert w == 0
    trust = Frozen()
    for malicious in (True, False, True):
        trust, w = levels.published_evidence_level(trust, 0.3, malicious)
        assert w == 0.3
    assert trust == Frozen()
    assert Frozen.from_json(json.loads(json.dumps(Frozen("benign", 0.5, 2, ((0.1, True),)).to_json()))) == Frozen(
        "benign", 0.5, 2, ((0.1, True),)
    )


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (Audited, {}),
        (Audited, {"weights": [2.0], "barred": False, "clean": 0}),
        (Audited, {"weights": [0.5], "barred": 0, "clean": 0}),
        (Audited, {"weights": 0.5, "barred": False, "clean": 0}),
        (Frozen, {"verdict": "nice", "weight": 0.5, "since": 0, "rounds": []}),
        (Frozen, {"verdict": "", "weight": 0.5, "since": 0.5, "rounds": []}),
        (Frozen, {"verdict": "", "weight": 0.5, "since": 0, "rounds": [[0.5, 1]]}),
    ],
)
def test_damaged_evidence_states_are_refused(kind: type[Audited] | type[Frozen], state: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"Audited|Frozen|frozen|audited"):
        kind.from_json(state)
