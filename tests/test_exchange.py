"""Plans from public randomness, and one pool for all."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.contribution import Completion, Rollout, completion_sha256, pool_sha256
from assay.swarm.exchange import Plan, Rules, agreement, gather, make_plan
from assay.verdict import Reason
from assay.wire import encode_rollout

SHA = "a" * 64


def rules(**changes: object) -> Rules:
    values: dict[str, object] = {"run": "r", "vocabulary": 50, "max_tokens": 8, "ids": range(1000), "model_sha256": SHA}
    return Rules(**{**values, **changes})  # type: ignore[arg-type]


def completion(node: str, round: int, prompt: int, index: int, ids: tuple[int, ...]) -> Completion:
    return Completion(
        participant=node, round=round, prompt=prompt, index=index, ids=ids,
        sha256=completion_sha256(round, prompt, index, ids),
    )  # fmt: skip


def rollout(node: str, plan: Plan, rng: random.Random, skip: int = 0) -> Rollout:
    made = [
        completion(node, plan.round, prompt, i, tuple(rng.randrange(50) for _ in range(rng.randint(1, 8))))
        for prompt, count in plan.asked[node].items()
        for i in range(count)
    ]
    return Rollout(participant=node, round=plan.round, model_sha256=SHA, completions=tuple(made[skip:]))


@given(
    run=st.text(max_size=8),
    round=st.integers(1, 10**6),
    m=st.integers(1, 6),
    each=st.integers(1, 5),
    g=st.integers(1, 4),
)
def test_vertical_plans_share_out_prompts_of_ones_own(run: str, round: int, m: int, each: int, g: int) -> None:
    nodes = [f"n{i}" for i in range(m)]
    plan = make_plan(run, round, nodes, mode="vertical", prompts=m * each, group=g, ids=range(200))
    assert plan == make_plan(run, round, nodes[::-1], mode="vertical", prompts=m * each, group=g, ids=range(200))
    prompts = [p for asked in plan.asked.values() for p in asked]
    assert len(prompts) == len(set(prompts)) == m * each
    assert set(prompts) <= set(range(200))
    assert {c for asked in plan.asked.values() for c in asked.values()} == {g}


@given(round=st.integers(1, 10**6), m=st.integers(1, 6), b=st.integers(1, 8), share=st.integers(1, 4))
def test_horizontal_plans_ask_the_same_of_everybody(round: int, m: int, b: int, share: int) -> None:
    nodes = [f"n{i}" for i in range(m)]
    plan = make_plan("r", round, nodes, mode="horizontal", prompts=b, group=m * share, ids=range(50, 90))
    assert len({tuple(asked.items()) for asked in plan.asked.values()}) == 1
    assert plan.owed == m * b * share
    assert all(50 <= p < 90 for p in plan.asked["n0"])


def test_rounds_and_runs_have_plans_of_their_own() -> None:
    def prompts(run: str, round: int) -> tuple[int, ...]:
        return tuple(make_plan(run, round, ["a"], mode="vertical", prompts=8, group=1, ids=range(10**6)).asked["a"])

    seen = {prompts(run, round) for run in ("a", "b", "a1") for round in range(1, 21)}
    assert len(seen) == 60


def test_prompts_are_drawn_evenly() -> None:
    counts = dict.fromkeys(range(20), 0)
    for round in range(1, 2001):
        for prompt in make_plan("r", round, ["a", "b"], mode="vertical", prompts=4, group=1, ids=range(20)).asked["a"]:
            counts[prompt] += 1
    assert all(abs(c - 200) < 5 * (200 * 0.9) ** 0.5 for c in counts.values()), counts


@pytest.mark.parametrize(("mode", "prompts", "group"), [("vertical", 5, 4), ("horizontal", 4, 5)])
def test_numbers_that_do_not_divide_are_the_operators_mistake(mode: str, prompts: int, group: int) -> None:
    with pytest.raises(ValueError, match="cannot be shared"):
        make_plan("r", 1, ["a", "b"], mode=mode, prompts=prompts, group=group, ids=range(99))  # type: ignore[arg-type]


def test_more_prompts_than_the_task_has() -> None:
    with pytest.raises(ValueError, match="the task has 3 prompts"):
        make_plan("r", 1, ["a"], mode="vertical", prompts=4, group=1, ids=range(3))


def test_everybody_gathers_the_same_pool_whatever_the_order_of_arrival() -> None:
    plan = make_plan("r", 3, ["a", "b", "c"], mode="vertical", prompts=6, group=3, ids=range(100))
    rng = random.Random(0)
    messages = {n: encode_rollout(rollout(n, plan, rng), run="r") for n in plan.asked}
    one = gather(messages, plan, rules())
    other = gather(dict(reversed(messages.items())), plan, rules())
    assert one == other
    assert one.sha256 == other.sha256 == pool_sha256(one.completions[::-1])
    assert len(one.completions) == plan.owed
    assert not one.refused


def test_the_late_the_silent_and_the_uninvited() -> None:
    plan = make_plan("r", 3, ["a", "b", "c"], mode="vertical", prompts=3, group=2, ids=range(100))
    rng = random.Random(1)
    late = make_plan("r", 2, ["a", "b", "c"], mode="vertical", prompts=3, group=2, ids=range(100))
    messages: dict[str, bytes | None] = {
        "a": encode_rollout(rollout("a", plan, rng), run="r"),
        "b": encode_rollout(rollout("b", late, rng), run="r"),
        "x": encode_rollout(rollout("a", plan, rng), run="r"),
    }
    found = gather(messages, plan, rules())
    assert {c.participant for c in found.completions} == {"a"}
    assert {r.participant: r.reason for r in found.refused} == {"b": Reason.WRONG_ROUND, "c": Reason.MISSING}


def test_a_short_message_keeps_what_it_holds_and_the_plan_still_says_what_is_owed() -> None:
    plan = make_plan("r", 1, ["a"], mode="vertical", prompts=1, group=4, ids=range(9))
    found = gather({"a": encode_rollout(rollout("a", plan, random.Random(2), skip=1), run="r")}, plan, rules())
    assert len(found.completions) == 3
    assert list(found.plan.asked["a"].values()) == [4]


def test_other_weights_are_refused_where_weights_must_be_equal() -> None:
    plan = make_plan("r", 1, ["a"], mode="vertical", prompts=1, group=2, ids=range(9))
    message = encode_rollout(rollout("a", plan, random.Random(2)), run="r")
    assert gather({"a": message}, plan, rules(model_sha256="b" * 64)).refused[0].reason == Reason.WRONG_BASE
    assert not gather({"a": message}, plan, rules(model_sha256=None)).refused


def test_free_choice_takes_any_prompt_of_the_task_and_no_more_of_them() -> None:
    plan = make_plan("r", 1, ["a"], mode="vertical", prompts=2, group=1, ids=range(9), assigned=False)
    own = [completion("a", 1, p, 0, (1, 2)) for p in (500, 600)]
    message = encode_rollout(Rollout(participant="a", round=1, model_sha256=SHA, completions=tuple(own)), run="r")
    found = gather({"a": message}, plan, rules())
    assert sorted(found.plan.asked["a"]) == [500, 600]
    outside = [completion("a", 1, p, 0, (1, 2)) for p in (500, 1600)]
    message = encode_rollout(Rollout(participant="a", round=1, model_sha256=SHA, completions=tuple(outside)), run="r")
    assert gather({"a": message}, plan, rules()).refused[0].reason == Reason.WRONG_PROMPT


def test_a_relay_that_tells_two_stories_is_found_out() -> None:
    assert agreement({"a": "1", "b": "1", "c": "2"}) == ("1", ("c",))
    assert agreement({"a": "2", "b": "1"}) == ("1", ("a",))
