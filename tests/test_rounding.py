"""What a node sends over many completions and rounds, held against what rounding of engines does by chance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from assay.contribution import Pool, TokenEvidence
from assay.swarm.calibrate import upper_bound, upper_rate
from assay.swarm.screening import judge_pool
from assay.swarm.screens.model import Seeded
from assay.swarm.screens.rounding import BY_CHANCE, Flips, log_chance, remember, remembered
from assay.verdict import Reason, State
from swarm_pools import pool

RATE, GAP, LENGTH = 0.002, 0.1, 40
RULES = Seeded(max_margin=0.75, mean_margin=0.05, max_flips=8, flip_rate=RATE, flip_gap=GAP)


@given(st.integers(0, 400), st.integers(1, 100_000), st.floats(1e-5, 0.05))
def test_the_bound_of_a_count_is_above_its_chance(flips: int, tokens: int, rate: float) -> None:
    bound = log_chance(Flips(tokens, flips, 0.0), rate, GAP)
    assert bound <= 0
    assert bound >= stats.poisson.logsf(flips - 1, rate * tokens) - 1e-9


def test_the_bound_of_the_gaps_is_above_their_share_and_not_far_above() -> None:
    """Sums of a Poisson number of exponential gaps, by simulation: an implementation that knows no bound."""
    rng, expected = np.random.default_rng(0), 8.0
    sums = np.array([rng.exponential(GAP, n).sum() for n in rng.poisson(expected, 200_000)])
    for total in (1.2, 1.6, 2.0):
        share = float((sums >= total).mean())
        bound = float(np.exp(log_chance(Flips(4000, 0, total), expected / 4000, GAP)))
        assert share <= bound <= 20 * share


@given(st.integers(0, 50), st.floats(0, 20), st.integers(1, 5000))
def test_more_flips_or_larger_gaps_or_fewer_tokens_are_never_likelier(flips: int, gaps: float, tokens: int) -> None:
    here = log_chance(Flips(tokens, flips, gaps), RATE, GAP)
    assert log_chance(Flips(tokens, flips + 1, gaps), RATE, GAP) <= here
    assert log_chance(Flips(tokens, flips, gaps + 0.1), RATE, GAP) <= here
    assert log_chance(Flips(tokens + 1, flips, gaps), RATE, GAP) >= here - 1e-9


def test_engines_that_never_differ_explain_no_flip() -> None:
    assert log_chance(Flips(1000, 0, 0.0), 0.0, 0.0) == 0
    assert log_chance(Flips(1000, 1, 0.01), 0.0, 0.0) == -np.inf


def test_the_memory_is_json_and_ends_with_its_window() -> None:
    memory: State = {}
    for round in range(1, 8):
        memory = remember(json.loads(json.dumps(memory)), "a", round, 3, Flips(10, round, 0.5))
    assert remembered(memory, "a", 7, 3) == Flips(30, 5 + 6 + 7, 1.5)
    assert remembered(memory, "a", 9, 3) == Flips(10, 7, 0.5)
    assert remembered(memory, "b", 7, 3) == Flips()
    assert [r[0] for r in memory["a"]] == [5, 6, 7]


def sent(index: int, gaps: Sequence[Sequence[float]], prompts: int = 4) -> Pool:
    """A node's round: `gaps` of each completion's flips, in completions of 40 tokens, in `prompts` groups."""
    group = len(gaps) // prompts
    made = pool({"node": {p: [(f"{p} {i}", 1.0) for i in range(group)] for p in range(prompts)}}, index=index)
    margin = tuple(np.array([*flips, *[0.0] * (LENGTH - len(flips))], np.float32) for flips in gaps)
    flat = tuple(np.zeros(LENGTH, np.float32) for _ in margin)
    return replace(made, evidence=TokenEvidence(logprob=flat, outside=flat, margin=margin))


def rounded(rng: np.random.Generator, count: int = 48) -> list[list[float]]:
    """An honest node's flips of a round."""
    made = [rng.exponential(GAP, rng.binomial(LENGTH, RATE)) for _ in range(count)]
    return [[float(min(g, 0.7)) for g in gaps] for gaps in made]


def test_rounding_is_admitted_for_a_thousand_rounds() -> None:
    rng, states, refused = np.random.default_rng(1), dict[str, State](), 0
    for index in range(1, 1001):
        judged = judge_pool(sent(index, rounded(rng)), [RULES], states)
        states = judged.states
        refused += bool((judged.weight_N == 0).any())
    assert refused <= 1


def test_a_flip_in_every_completion_is_refused_though_each_would_pass_alone() -> None:
    one = sent(1, [[0.05]] * 48)
    alone = [RULES._one(one, row, one.evidence.margin[row]) for row in range(48)] if one.evidence else []
    assert all(v.weight == 1 for v in alone)
    judged = judge_pool(one, [RULES], {})
    assert not judged.weight_N.any()
    assert {v.reason for v in judged.verdicts} == {Reason.SEEDED}
    assert "48 of 1,920 tokens of its node" in judged.verdicts[0].sentence


def test_few_flips_a_round_add_up_over_the_window() -> None:
    """Twice what rounding makes, in every round: below any test of one round, and seen before the window is over."""
    rng, states, weights = np.random.default_rng(2), dict[str, State](), []
    for index in range(1, 31):
        honest = rounded(rng)
        for at in rng.choice(48, 6, replace=False):
            honest[at].append(0.2)
        judged = judge_pool(sent(index, honest), [RULES], states)
        states = judged.states
        weights.append(bool(judged.weight_N.all()))
    assert weights[0]
    assert 0 < sum(weights) < 20
    admitted = sum(r[2] for r in states["seeded"]["nodes"]["node"])
    assert admitted <= 2.5 * RATE * LENGTH * 48 * RULES.window


def test_a_refused_round_is_not_held_against_the_next() -> None:
    states = judge_pool(sent(1, [[0.3]] * 48), [RULES], {}).states
    again = judge_pool(sent(2, [[]] * 48), [RULES], states)
    assert again.weight_N.all()


def test_nodes_are_held_apart() -> None:
    good, bad = sent(1, [[]] * 8), sent(1, [[0.3, 0.3]] * 8)
    both = replace(
        good,
        completions=(*good.completions, *(replace(c, participant="bad") for c in bad.completions)),
        texts=good.texts * 2, questions=good.questions * 2, rewards=good.rewards * 2, ended=good.ended * 2,
        readable=good.readable * 2, asked={"node": good.asked["node"], "bad": good.asked["node"]},
        evidence=TokenEvidence(**{
            k: (*getattr(good.evidence, k), *getattr(bad.evidence, k)) for k in ("logprob", "outside", "margin")
        }),
    )  # fmt: skip
    assert judge_pool(both, [RULES], {}).weight_N.tolist() == [1] * 8 + [0] * 8


@pytest.mark.parametrize(("events", "exposure"), [(0, 100), (3, 1000), (40, 100_000)])
def test_upper_bounds_are_those_of_the_exact_tests(events: int, exposure: int) -> None:
    rate = upper_rate(events, exposure)
    assert stats.poisson.cdf(events, rate * exposure) == pytest.approx(0.05)
    assert stats.binom.cdf(events, exposure, upper_bound(events, exposure)) == pytest.approx(0.05)
    assert upper_bound(5, 5) == 1


def test_the_threshold_is_one_in_ten_thousand() -> None:
    assert np.exp(BY_CHANCE) == pytest.approx(1e-4)
