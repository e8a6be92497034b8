"""Aggregators against other people's code (byzfl 0.0.11, Flower 1.41) where they have the same variant, else against
plain float64 restatements of the papers' formulas, row by row, without blocks, weights or Gram matrices.

Legend: N participants, D values of a flattened adapter.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.config import ConfigError
from assay.federated import aggregators
from assay.federated.aggregators import ToleranceError, bucketing, chain, geometry, make, nnm
from assay.federated.aggregators.common import Present

close = {"rtol": 2e-6, "atol": 1e-7}


def rows(seed: int, n: int, d: int = 60, far: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    delta_ND = rng.standard_normal((n, d)) + 0.5
    delta_ND[:far] += 30 * rng.standard_normal(d)
    return rng.permutation(delta_ND).astype(np.float32)


# --- byzfl --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byzfl() -> Iterator[types.SimpleNamespace]:
    """Its aggregators alone: the package's own `__init__` imports torchvision, which they have no use for."""
    # another test's bare module of that name has no spec, and find_spec takes what is there
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "byzfl"}
    spec = importlib.util.find_spec("byzfl")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("byzfl is not installed: pip install --no-deps byzfl==0.0.11 (make install does)")
    for name, folder in (("byzfl", ""), ("byzfl.aggregators", "aggregators"), ("byzfl.utils", "utils")):
        bare = types.ModuleType(name)
        bare.__path__ = [str(Path(next(iter(spec.submodule_search_locations))) / folder)]
        sys.modules[name] = bare
    try:
        yield types.SimpleNamespace(
            rule=importlib.import_module("byzfl.aggregators.aggregators"),
            pre=importlib.import_module("byzfl.aggregators.preaggregators"),
        )
    finally:
        for name in [m for m in sys.modules if m.split(".")[0] == "byzfl"]:
            del sys.modules[name]
        sys.modules.update(before)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "f"), [(9, 2), (12, 3), (20, 4)])
def test_byzfl_agrees(byzfl: types.SimpleNamespace, n: int, f: int, seed: int) -> None:
    delta_ND = rows(seed, n, far=f)
    exact_ND, ones = delta_ND.astype(np.float64), np.ones(n)
    for ours, theirs in [
        (make("mean"), byzfl.rule.Average()),
        (make("median"), byzfl.rule.Median()),
        (make("trimmed_mean", f=f), byzfl.rule.TrMean(f=f)),
        (make("krum", f=f, variant="byzfl"), byzfl.rule.Krum(f=f)),
        (make("multi_krum", f=f, variant="byzfl"), byzfl.rule.MultiKrum(f=f)),
        (make("centred_clipping", start="zero", tau=4.0, iterations=3), byzfl.rule.CenteredClipping(L=3, tau=4.0)),
    ]:
        np.testing.assert_allclose(ours(delta_ND, ones), theirs(exact_ND), **close)
    # its default of 3 iterations is half way; at 2,000 both are at the same point
    np.testing.assert_allclose(
        make("geometric_median")(delta_ND, ones), byzfl.rule.GeometricMedian(nu=1e-7, T=2000)(exact_ND), atol=1e-5
    )
    mixed_ND = byzfl.pre.NNM(f=f)(exact_ND)
    for ours, theirs in [(make("median"), byzfl.rule.Median()), (make("trimmed_mean", f=f), byzfl.rule.TrMean(f=f))]:
        np.testing.assert_allclose(chain(nnm(f), ours)(delta_ND, ones), theirs(mixed_ND), **close)


# --- Flower -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_flower_agrees(seed: int) -> None:
    flower: Any = importlib.import_module("flwr.server.strategy.aggregate")
    n, f = 15, 3  # with f 2 Bulyan's last choices go by one neighbour, and any two nearest to each other are a tie
    delta_ND = rows(seed, n, far=f)
    results, ones = [([row.astype(np.float64)], 1) for row in delta_ND], np.ones(n)
    for ours, theirs in [
        (make("median"), flower.aggregate_median(results)),
        (make("trimmed_mean", f=f), flower.aggregate_trimmed_avg(results, 3.5 / n)),
        (make("krum", f=f), flower.aggregate_krum(results, f, 0)),
        (make("multi_krum", f=f, m=5), flower.aggregate_krum(results, f, 5)),
        (make("bulyan", f=f), flower.aggregate_bulyan(list(results), f, flower.aggregate_krum, to_keep=0)),
    ]:
        np.testing.assert_allclose(ours(delta_ND, ones), theirs[0], **close)


# --- restated -----------------------------------------------------------------------------------------------------


def restated_bulyan(x: np.ndarray, f: int) -> np.ndarray:
    """El Mhamdi et al. 2018, section 4: Krum again and again, then the beta values next to each median."""
    left, chosen = [row for row in x.astype(np.float64)], []
    theta = len(left) - 2 * f
    while len(chosen) < theta:
        near = max(1, len(left) - f - 2)
        score = [sum(sorted(((a - b) ** 2).sum() for b in left if b is not a)[:near]) for a in left]
        chosen.append(left.pop(int(np.argmin(score))))
    out = []
    for column in np.stack(chosen).T:
        middle = np.median(column)
        out.append(np.mean(sorted(column, key=lambda value: abs(value - middle))[: theta - 2 * f]))
    return np.array(out)


def restated_foolsgold(history: np.ndarray) -> np.ndarray:
    """Fung et al. 2020, algorithm 1, as it is written, for one round's histories."""
    n = len(history)
    unit = history / np.linalg.norm(history, axis=1, keepdims=True)
    cs = np.array([[-1.0 if i == j else unit[i] @ unit[j] for j in range(n)] for i in range(n)])
    v = np.maximum(cs.max(axis=1), 0)
    for i in range(n):
        for j in range(n):
            if v[j] > v[i]:
                cs[i, j] *= v[i] / v[j]
    alpha = np.clip(1 - cs.max(axis=1), 0, 1)
    alpha = alpha / alpha.max()
    alpha[alpha >= 0.99] = 0.99
    with np.errstate(divide="ignore"):
        return np.clip(np.log(alpha / (1 - alpha)) + 0.5, 0, 1)


def restated_residual(x: np.ndarray, width: float, threshold: float) -> np.ndarray:
    """Fu et al. 2019, section 4, a coordinate at a time."""
    n = len(x)
    total, kept = np.zeros(n), np.empty(x.shape)
    for d, y in enumerate(x.astype(np.float64).T):
        order = np.argsort(y, kind="stable")
        ys = y[order]
        slopes = [np.median([(ys[j] - ys[i]) / (j - i) for j in range(n) if j != i]) for i in range(n)]
        slope = np.median(slopes)
        intercept = np.median(ys) - slope * (n - 1) / 2
        design = np.stack([np.ones(n), np.arange(n)], axis=1)
        leverage = np.diag(design @ np.linalg.inv(design.T @ design) @ design.T)
        line = intercept + slope * np.arange(n)
        r = ys - line
        tau = 1.4826 * (1 + 5 / (n - 1)) * np.median(sorted(np.abs(r))[1:])
        e, k = r / tau / np.sqrt(1 - leverage), width * np.sqrt(2 / n)
        confidence = np.array([1.0 if value == 0 else np.clip(value, -k, k) / value for value in e])
        total[order] += confidence * confidence.std(ddof=1)
        kept[order, d] = np.where(confidence >= threshold, ys, line)
    weight = (total / total.max()) ** 2
    return weight @ kept / weight.sum()


def restated_lasa(x: np.ndarray, sparsity: float, limits: tuple[float, float], layers: list[int]) -> np.ndarray:
    """Xu et al. 2025, algorithm 1."""
    x = x.astype(np.float64)
    norm = np.linalg.norm(x, axis=1)
    x = x * np.minimum(1, np.median(norm) / norm)[:, None]
    keep = x.shape[1] - int(sparsity * x.shape[1])
    for row in x:
        row[np.argsort(np.abs(row))[:-keep]] = 0
    out, at = [], 0
    for size in layers:
        part = x[:, at : at + size]
        layer_norm = np.linalg.norm(part, axis=1)
        purity = 0.5 * (1 + np.sign(part).sum(axis=1) / np.abs(np.sign(part)).sum(axis=1))
        good = np.ones(len(x), bool)
        for value, limit in zip((layer_norm, purity), limits):
            good &= np.abs(value - np.median(value)) / value.std() < limit
        out.append(part[good].mean(axis=0))
        at += size
    return np.concatenate(out)


def restated_dnc(x: np.ndarray, drop: int) -> np.ndarray:
    """Shejwalkar and Houmansadr 2021, algorithm 2, with every coordinate in the subset."""
    centred = x.astype(np.float64) - x.astype(np.float64).mean(axis=0)
    direction = np.linalg.svd(centred)[2][0]
    good = np.argsort((centred @ direction) ** 2)[: len(x) - drop]
    return x[good].astype(np.float64).mean(axis=0)


@pytest.mark.parametrize("seed", range(4))
def test_restatements_agree(seed: int) -> None:
    delta_ND, ones = rows(seed, 15, far=3), np.ones(15)
    np.testing.assert_allclose(make("bulyan", f=3)(delta_ND, ones), restated_bulyan(delta_ND, 3), **close)
    np.testing.assert_allclose(make("dnc", f=3)(delta_ND, ones), restated_dnc(delta_ND, 3), **close)
    np.testing.assert_allclose(make("dnc", f=2, removed=1.5)(delta_ND, ones), restated_dnc(delta_ND, 3), **close)
    residual_D = make("residual", threshold=0.3)(delta_ND, ones)
    np.testing.assert_allclose(residual_D, restated_residual(delta_ND, 2.0, 0.3), **close)
    layers = [10, 25, 5, 20]
    lasa_D = make("lasa", sparsity=0.3, norm_limit=2.0, layers=layers)(delta_ND, ones)
    np.testing.assert_allclose(lasa_D, restated_lasa(delta_ND, 0.3, (2.0, 1.0), layers), **close)


@pytest.mark.parametrize("seed", range(4))
def test_safe_fedllms_krum_is_a_mean_of_n_minus_f_rows(seed: int) -> None:
    delta_ND = rows(seed, 9)
    distance = [np.array([np.linalg.norm(a.astype(np.float64) - b) for b in delta_ND]) for a in delta_ND]
    winner = min(range(9), key=lambda i: np.sort(distance[i])[:7].sum())  # f 2: itself at 0 and six others
    golden_D = delta_ND[np.argsort(distance[winner])[:7]].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(make("krum", f=2, variant="safe-fedllm")(delta_ND, np.ones(9)), golden_D, **close)


def test_krums_variants_differ_where_their_neighbours_do() -> None:
    # n 6, f 1. Squared distances, nearest first: of 1: 1 4 9 25; of 3: 1 4 9 9; of 4: 1 4 9 16. Three neighbours: a tie
    # of all three, the smallest comes first; four: 39, 23, 30. Plain distances, four: 11, 9, 10, and five rows' mean.
    column = np.array([[0], [1], [3], [4], [6], [60]], np.float32)
    assert make("krum", f=1)(column, np.ones(6)) == [1]
    assert make("krum", f=1, variant="byzfl")(column, np.ones(6)) == [3]
    assert make("krum", f=1, variant="safe-fedllm")(column, np.ones(6)) == np.float32((0 + 1 + 3 + 4 + 6) / 5)


def test_multi_krums_variants_take_the_best_rows_or_the_winners_neighbours() -> None:
    # n 6, f 1. Four nearest, plain: of 0: 13, of 1: 10, of 2: 9, of 4: 11, of 6: 17; squared: 57, 36, 25, 33, 81.
    # 2 wins both. Nearest to it is 1, but the second best score is that of 4. paper, three nearest, squared: 21, 11, 9,
    # 17, 45: the second best is 1.
    column = np.array([[0], [1], [2], [4], [6], [60]], np.float32)
    for variant, golden in (("safe-fedllm", (1 + 2) / 2), ("byzfl", (2 + 4) / 2), ("paper", (1 + 2) / 2)):
        assert make("multi_krum", f=1, m=2, variant=variant)(column, np.ones(6)) == np.float32(golden)
    # 0 and 4 are equally near to 2: the one that comes first by content. With m open all n-f = 5, which is its Krum.
    assert make("multi_krum", f=1, m=3, variant="safe-fedllm")(column, np.ones(6)) == np.float32((0 + 1 + 2) / 3)
    whole = make("multi_krum", f=1, variant="safe-fedllm")(column, np.ones(6))
    assert whole == make("krum", f=1, variant="safe-fedllm")(column, np.ones(6)) == np.float32(13 / 5)


@pytest.mark.parametrize("seed", range(3))
def test_foolsgold_over_rounds(seed: int) -> None:
    aggregate, rng = make("foolsgold"), np.random.default_rng(seed)
    names, history_ND, memory = list("abcdef"), np.zeros((6, 40)), {}
    for _ in range(4):
        delta_ND = rng.standard_normal((6, 40)).astype(np.float32)
        delta_ND[4:] += 1.5
        history_ND = history_ND + delta_ND
        alpha_N = restated_foolsgold(history_ND)
        out_D, memory = aggregators.step(aggregate, delta_ND, np.ones(6), names, memory)
        np.testing.assert_allclose(out_D, alpha_N @ delta_ND / alpha_N.sum(), rtol=1e-4, atol=1e-5)
    assert alpha_N[4:].max() < 0.5 < alpha_N[:4].max()


# --- by hand, and what each is for --------------------------------------------------------------------------------


def test_norm_clipping_by_hand() -> None:
    delta_ND = np.array([[3, 4], [0, 1], [30, 40]], np.float32)  # norms 5, 1, 50: the median is 5
    np.testing.assert_allclose(make("norm_clipped_mean")(delta_ND, [1, 1, 1]), [2, 3], rtol=1e-6)
    np.testing.assert_allclose(make("norm_clipped_mean", bound=1.0)(delta_ND, [1, 2, 1]), [0.3, 0.9], rtol=1e-6)
    # weight 3 of 5 at norm 50: now it is the median
    np.testing.assert_allclose(make("norm_clipped_mean")(delta_ND, [1, 1, 3]), [93 / 5, 125 / 5], rtol=1e-6)


def test_flame_by_hand() -> None:
    """Five rows about (1, 0), two elsewhere: those two are out, the one of length 10 is cut to the median norm."""
    angle = np.array([0.00, 0.02, -0.02, 0.04, -0.04])
    honest = np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.array([[1], [1], [1], [1], [10]])
    delta_ND = np.concatenate([honest, [[0, 1], [-1, 0]]]).astype(np.float32)
    expected_D = (honest / np.linalg.norm(honest, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(make("flame")(delta_ND, np.ones(7)), expected_D, atol=1e-6)
    noisy = [make("flame", noise=0.1, seed=seed)(delta_ND, np.ones(7)) for seed in (0, 0, 1)]
    assert noisy[0].tobytes() == noisy[1].tobytes()
    assert noisy[0].tobytes() != noisy[2].tobytes()
    wide_ND = np.tile(delta_ND, (1, 20_000))  # median norm sqrt(20,000)
    moved_D = make("flame", noise=0.1)(wide_ND, np.ones(7)) - make("flame")(wide_ND, np.ones(7))
    assert moved_D.std() == pytest.approx(0.1 * np.sqrt(20_000), rel=0.02)


def test_flame_takes_two_minds_for_a_majority_where_no_single_one_is() -> None:
    """Three camps of three: whichever two come together first are the majority. It needs more than half honest."""
    three = np.repeat(np.eye(3, dtype=np.float32), 3, axis=0) + 1e-3 * np.arange(9, dtype=np.float32)[:, None]
    np.testing.assert_allclose(np.sort(make("flame")(three, np.ones(9))), [0, 0.5, 0.5], atol=0.01)


def test_lasas_thresholds_are_exact_for_any_floats() -> None:
    from assay.federated.aggregators.lasa import _thresholds

    rng = np.random.default_rng(0)
    delta_ND = (rng.standard_normal((3, 999)) * 10.0 ** rng.uniform(-44, 37, (3, 999))).astype(np.float32)
    present = Present(delta_ND, np.arange(3), np.ones(3))
    for keep in (1, 2, 300, 998, 999):
        golden_N = np.sort(np.abs(delta_ND), axis=1)[:, -keep]
        np.testing.assert_array_equal(_thresholds(present, keep).view(np.float32), golden_N)


def test_buckets_keep_the_mean_and_cannot_be_chosen() -> None:
    delta_ND = rows(0, 11)
    weight_N = np.random.default_rng(0).uniform(0.1, 1, 11)
    mean_D = make("mean")(delta_ND, weight_N)
    for s in (1, 2, 3, 11, 50):
        np.testing.assert_allclose(
            chain(bucketing(s=s), make("mean"))(delta_ND, weight_N), mean_D, rtol=1e-5, atol=1e-6
        )
    both = [chain(bucketing(s=2, seed=seed), make("median"))(delta_ND, weight_N) for seed in (0, 0, 1)]
    assert both[0].tobytes() == both[1].tobytes()
    assert both[0].tobytes() != both[2].tobytes()
    nudged_ND = delta_ND.copy()
    nudged_ND[3, 5] += 1e-3  # one value of one row: another shuffle, not a nudge of the result
    assert np.abs(chain(bucketing(s=2), make("median"))(nudged_ND, weight_N) - both[0]).max() > 1e-2


@pytest.mark.parametrize("name", ["geometric_median", "centred_clipping", "median"])
def test_far_rows_below_half_of_the_weight_move_a_centre_by_little(name: str) -> None:
    honest_ND = rows(0, 7)
    bad_ND = np.full((6, 60), 1e20, np.float32)
    delta_ND = np.concatenate([honest_ND, bad_ND])
    out_D = make(name)(delta_ND, np.ones(13))
    radius = np.linalg.norm(honest_ND - honest_ND.mean(axis=0), axis=1).max()
    assert np.linalg.norm(out_D - honest_ND.mean(axis=0)) < 4 * radius
    weighted_D = make(name)(delta_ND, [1.0] * 7 + [0.01] * 6)
    assert np.linalg.norm(weighted_D - honest_ND.mean(axis=0)) < 0.5 * radius


# --- the number of attackers --------------------------------------------------------------------------------------


def present(delta_ND: np.ndarray) -> Present:
    return Present(delta_ND, np.arange(len(delta_ND)), np.ones(len(delta_ND)))


@pytest.mark.parametrize("n", [7, 10, 20])
@pytest.mark.parametrize("seed", range(5))
def test_an_estimate_counts_the_loud_and_nobody_else(n: int, seed: int) -> None:
    for far in range((n - 1) // 3):
        assert geometry.attackers(present(rows(seed, n, far=far)), "estimate") == far


def test_an_estimate_is_blind_to_who_stays_near_and_can_be_turned_on_the_honest() -> None:
    """What its documentation says an attacker can do."""
    honest_ND = rows(0, 14, d=200)
    middle_D = np.median(honest_ND, axis=0)
    shifted_ND = honest_ND[:4] * np.float32(0.5) + np.float32(0.5) * middle_D + np.float32(0.3)
    assert geometry.attackers(present(np.concatenate([honest_ND, shifted_ND])), "estimate") == 0
    on_the_median = np.tile(middle_D, (15, 1)).astype(np.float32)
    assert geometry.attackers(present(np.concatenate([honest_ND, on_the_median])), "estimate") == 14
    with pytest.raises(ToleranceError, match=r"trimmed_mean bears .* 2f\+1 .* f=14 needs 29, 28 present"):
        make("trimmed_mean", f="estimate")(
            np.concatenate([honest_ND, on_the_median[1:]]), np.r_[np.ones(13), 1e-9, np.ones(14)]
        )


@pytest.mark.parametrize(
    ("name", "params", "n", "message"),
    [
        ("krum", {"f": 3, "variant": "byzfl"}, 6, r"krum bears f .* at least 2f\+1 .* f=3 needs 7, 6 present"),
        ("krum", {"f": 3, "variant": "safe-fedllm"}, 6, r"at least 2f\+1 .* f=3 needs 7, 6 present"),
        ("multi_krum", {"f": 2}, 6, r"multi_krum bears f .* at least 2f\+3 .* f=2 needs 7, 6 present"),
        ("multi_krum", {"f": 1, "m": 6, "variant": "byzfl"}, 6, r"at most n-f of n .* needs 7, 6 present"),
        ("multi_krum", {"f": 1, "m": 6, "variant": "safe-fedllm"}, 6, r"at most n-f of n .* needs 7, 6 present"),
        ("bulyan", {"f": 2}, 10, r"bulyan bears f .* at least 4f\+3 .* f=2 needs 11, 10 present"),
        ("dnc", {"f": 3}, 6, r"dnc bears f .* at least 2f\+1 .* f=3 needs 7, 6 present"),
        ("dnc", {"f": 2, "iterations": 4}, 8, r"at least iterations\*removed\*f\+1 .* f=2 needs 9, 8 present"),
    ],
)
def test_too_many_attackers_name_the_bound(name: str, params: dict[str, Any], n: int, message: str) -> None:
    with pytest.raises(ToleranceError, match=message):
        make(name, **params)(rows(0, n), np.ones(n))
    assert np.isfinite(make(name, **params)(rows(0, n + 1), np.ones(n + 1))).all(), "one more is enough"


def test_mixing_bears_less_than_half() -> None:
    with pytest.raises(ToleranceError, match=r"nnm bears f .* at least 2f\+1 .* f=3 needs 7, 6 present"):
        chain(nnm(f=3), make("mean"))(rows(0, 6), np.ones(6))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("krum", {"f": "guess"}, 'f must be a whole number of at least 0, got .guess.; f = "estimate" counts'),
        ("krum", {"f": 1, "variant": "flower"}, "variant must be one of paper, byzfl, safe-fedllm; got 'flower'"),
        ("krum", {"f": 1, "m": 2, "variant": "safe-fedllm"}, "m of safe-fedllm must be one of 1; got '2'"),
        ("multi_krum", {"f": 1, "variant": "flower"}, "variant must be one of paper, byzfl, safe-fedllm; got"),
        ("norm_clipped_mean", {"bound": 0.0}, "bound must be a number above 0, got 0.0"),
        ("norm_clipped_mean", {"bound": float("nan")}, "bound must be a number above 0, got nan"),
        ("geometric_median", {"iterations": 0}, "iterations must be a whole number of at least 1"),
        ("centred_clipping", {"start": "mean"}, "start must be one of median, zero; got 'mean'"),
        ("foolsgold", {"confidence": True}, "confidence must be a number above 0, got True"),
        ("residual", {"threshold": -0.1}, "threshold must be a number of at least 0"),
        ("dnc", {"f": 1, "subset": 0}, "subset must be a whole number of at least 1"),
        ("flame", {"noise": "a bit"}, "noise must be a number of at least 0, got 'a bit'"),
        ("lasa", {"sparsity": 1.0}, "sparsity must be below 1"),
    ],
)
def test_parameters_that_cannot_be_are_said_when_made(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, **params)
