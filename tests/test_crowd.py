"""The screen `crowd`: who is left out when the mean of the admitted costs more than honest clients cost together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.contribution import LoraUpdate, Round, Tensors, tensors_sha256
from assay.federated.canary import CanaryLimits, Losses, Rise
from assay.federated.crowd import Crowd, mean
from assay.federated.say import say
from assay.verdict import Reason, screen_round

LIMITS = CanaryLimits(
    refusal_step=0.3, refusal_anchor=0.4, safe_step=9.0, safe_anchor=9.0, crowd_step=0.05, crowd_anchor=0.08
)
START = {"a": np.zeros(2, np.float32)}


def measure(adapters: Sequence[Tensors]) -> list[Losses]:
    """A model whose refusal loss is the first value of the adapter."""
    return [Losses(refusal=1.0 + float(a["a"][0]), safe=1.0) for a in adapters]


def update(name: str, rise: float, start: Tensors = START) -> LoraUpdate:
    tensors = {"a": np.array([start["a"][0] + rise, hash(name) % 97], np.float32)}
    return LoraUpdate(
        participant=name, round=1, base_sha256="", num_examples=1, tensors=tensors, sha256=tensors_sha256(tensors)
    )


def judged(rises: Sequence[float], start: float = 0.0) -> dict[str, float]:
    begun = {"a": np.array([start, 0], np.float32)}
    updates = tuple(update(f"c{i}", rise, begun) for i, rise in enumerate(rises))
    round = Round(index=1, start=begun, initial=START, updates=updates, refused=(), batch_size=8)
    return screen_round(round, [Crowd(measure, LIMITS)]).weight  # type: ignore[arg-type]


def test_the_costliest_are_left_out_and_no_more_than_it_takes() -> None:
    assert set(judged([0.04, -0.02, 0.01]).values()) == {1.0}
    assert set(judged([0.2, -0.1, 0.01]).values()) == {1.0}, "one noisy client is no crowd"
    # the mean is .073 with all, and .048 without the costliest
    assert judged([0.1, 0.0, 0.2, 0.0, 0.14, 0.0]) == {"c0": 1, "c1": 1, "c2": 0, "c3": 1, "c4": 1, "c5": 1}
    assert judged([0.29] * 7 + [0.0, -0.01, 0.01]) == {f"c{i}": float(i >= 7) for i in range(10)}


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_left_out_first(lost: float) -> None:
    """The adapter is finite, the model with it is not."""

    def breaks(adapters: Sequence[Tensors]) -> list[Losses]:
        return [Losses(lost, 1.0) if a["a"][0] > 0.5 else one for a, one in zip(adapters, measure(adapters))]

    updates = tuple(update(f"c{i}", rise) for i, rise in enumerate([0.01, 3.0, 0.2]))
    round = Round(index=1, start=START, initial=START, updates=updates, refused=(), batch_size=8)
    assert screen_round(round, [Crowd(breaks, LIMITS)]).weight == {"c0": 1, "c1": 0, "c2": 0}  # type: ignore[arg-type]


def test_since_round_0_it_adds_up_and_healing_is_never_left_out() -> None:
    assert set(judged([0.03, 0.03, 0.03]).values()) == {1.0}
    assert judged([0.04, 0.03, 0.02, -0.02], start=0.075) == {"c0": 0, "c1": 0, "c2": 1, "c3": 1}
    assert set(judged([-0.01, -0.02], start=0.5).values()) == {1.0}


@given(
    st.lists(st.integers(-16, 32).map(lambda k: k / 64), min_size=1, max_size=12),  # which float32 holds as they are
    st.integers(-8, 16).map(lambda k: k / 64),
)
def test_what_is_left_keeps_to_the_limits_or_to_those_of_each(rises: list[float], start: float) -> None:
    crowd, weight = Crowd(measure, LIMITS), judged(rises, start)  # type: ignore[arg-type]

    def harm(rise: float) -> float:
        return crowd.harm(Rise(rise, float(np.float32(start)) + rise, 0.0, 0.0))

    out = [rise for i, rise in enumerate(rises) if not weight[f"c{i}"]]
    kept = [rise for i, rise in enumerate(rises) if weight[f"c{i}"]]
    assert all(harm(rise) > 1 - 1e-4 for rise in out), "never one that keeps to the limits of the crowd"
    if out and kept:
        assert max(harm(rise) for rise in kept) <= min(harm(rise) for rise in out) + 1e-4, "the costliest first"
    if kept and any(harm(rise) > 1 + 1e-4 for rise in kept):
        assert harm(float(np.mean(kept))) <= 1 + 1e-3, "offenders stay only where the mean keeps to the limits"


def test_a_verdict_says_what_the_crowd_did() -> None:
    round = Round(
        index=1, start=START, initial=START, updates=tuple(update(n, 0.2) for n in "ab"), refused=(), batch_size=8
    )
    verdicts, _ = Crowd(measure, LIMITS).screen(round, {})  # type: ignore[arg-type]
    assert [v.reason for v in verdicts] == [Reason.CANARY] * 2
    assert "together the round's updates cost refusals +0.200 nats" in verdicts[0].sentence
    assert verdicts[0].evidence["crowd_rise_limit"] == 0.05
    assert verdicts[0].score == pytest.approx(4.0)


def test_it_sees_admitted_updates_only_and_wants_its_own_limits() -> None:
    class First:
        name = "first"

        def screen(self, round: Round, state: dict) -> tuple[list, dict]:  # type: ignore[type-arg]
            return [say(u, "first", float(u.participant != "c0"), Reason.NORM, "no") for u in round.updates], state

    updates = (update("c0", 0.6), update("c1", 0.06), update("c2", 0.0))
    round = Round(index=1, start=START, initial=START, updates=updates, refused=(), batch_size=8)
    found = screen_round(round, [First(), Crowd(measure, LIMITS)])  # type: ignore[list-item, arg-type]
    assert found.weight == {"c0": 0.0, "c1": 1.0, "c2": 1.0}
    with pytest.raises(ValueError, match="rehearse again"):
        Crowd(measure, replace(LIMITS, crowd_step=None))  # type: ignore[arg-type]
    np.testing.assert_allclose(mean(updates)["a"][0], 0.22, rtol=1e-6)
