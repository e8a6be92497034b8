"""Attackers who make the most of what each check forgives: each does what it says, on real rollouts of `tiny`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from assay.bench.swarm import BF16_LIMITS
from assay.config import ConfigError
from assay.contribution import Completion
from assay.engines import local_swarm
from assay.swarm import attacks
from assay.swarm.attacks import Seat
from assay.swarm.attacks.masked import WORDINGS
from assay.swarm.learner import Learnt, Memory
from assay.swarm.sandbox import Sandbox, SandboxMissing
from assay.swarm.seats import make_seat
from assay.verdict import Reason
from test_swarm import gathered_of, small, world_of

pytestmark = pytest.mark.usefixtures("one_thread")


def seat_of(name: str, round: int = 1, **changes: Any) -> tuple[local_swarm.World, Seat]:
    """A world and the seat of its malicious node, before anybody has learnt anything."""
    world = world_of(small(**{"attack__name": name, "defence__level": "seeded", **changes}))
    (bad,) = world.malicious
    (learner,) = world.learners.values()
    seat = make_seat(
        bad, learner, local_swarm.plan_of(world, round), world.settings, seed=0, prompts=world.rules.ids,
        ahead=local_swarm.plan_of(world, round + 1),
    )  # fmt: skip
    return world, seat


def judged(world: local_swarm.World, index: int = 1) -> Learnt:
    """A whole round with the attack in it."""
    (learner,) = world.learners.values()
    return learner.learn(gathered_of(world, index), Memory())[1]


def honest_at(seat: Seat, made: list[Completion]) -> list[tuple[int, ...]]:
    """What an honest node would have sent in each completion's place."""
    return seat.draw([c.prompt for c in made], [seat.seed(c.prompt, c.index) for c in made])


def changed(seat: Seat, made: list[Completion]) -> float:
    return sum(c.ids != ids for c, ids in zip(made, honest_at(seat, made))) / len(made)


def covariance(values: list[float], rewards: list[float]) -> float:
    middle, mean = sum(values) / len(values), sum(rewards) / len(rewards)
    return sum((v - middle) * (r - mean) for v, r in zip(values, rewards)) / len(values)


# --- under the margin ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lookahead_math", "lookahead_length"])
@pytest.mark.parametrize(
    ("limits", "least", "most"),
    [({}, 0.0, 0.1), (BF16_LIMITS, 0.1, 0.22), (BF16_LIMITS | {"flip_rate": 1.0, "flip_gap": 10.0}, 0.2, 1.0)],
    ids=["fp32", "bf16", "bf16 without the node's limit"],
)
def test_looking_ahead_stays_under_the_limits(name: str, limits: dict[str, float], least: float, most: float) -> None:
    """He holds himself to all limits, of a completion and of a node; the node's leave him some of them."""
    world, seat = seat_of(name, swarm__prompts=8, swarm__group=12, defence__params={"seeded": limits})
    made = attacks.make(name)(seat)
    rate = changed(seat, made)
    learnt = judged(world)
    assert all(learnt.judged.weight_N == 1), "the honest and the attacker alike"
    rows = [r for r, c in enumerate(learnt.pool.completions) if c.participant in world.malicious]
    assert [learnt.pool.completions[r].ids for r in rows] == [
        c.ids for c in sorted(made, key=lambda c: (c.prompt, c.index))
    ]
    assert least <= rate <= most


def test_looking_ahead_gets_right_answers_long_and_wrong_ones_short() -> None:
    world, seat = seat_of(
        "lookahead_length", swarm__prompts=8, swarm__group=12, defence__params={"seeded": BF16_LIMITS}
    )
    made = attacks.make("lookahead_length")(seat)
    assert world.malicious == {seat.name}
    prompts, before = [c.prompt for c in made], honest_at(seat, made)
    found = []
    for drawn in (before, [c.ids for c in made]):
        found.append(covariance([float(len(ids)) for ids in drawn], seat.rewards(prompts, drawn)))
    assert found[1] > found[0] + 0.5


def test_looking_ahead_chooses_prompts_where_it_may() -> None:
    _, seat = seat_of("lookahead_math", swarm__assigned=False)
    made = attacks.make("lookahead_math")(seat)
    assert {c.prompt for c in made}.isdisjoint(seat.asked)
    assert all(attacks.shows("math", seat.task.solution(c.prompt), seat.settings) is False for c in made)


def test_without_a_seeded_check_there_is_nothing_to_look_ahead_for() -> None:
    _, seat = seat_of("lookahead_length", defence__level="none")
    assert seat.check is None
    assert attacks.make("lookahead_length")(seat) == seat.honest()


def test_drawing_on_after_a_prefix_gives_what_drawing_at_once_gives() -> None:
    _, seat = seat_of("lookahead_length", defence__params={"seeded": BF16_LIMITS})
    assert seat.check is not None
    prompts, seeds = [p for p, _ in seat.places()], [seat.seed(p, i) for p, i in seat.places()]
    whole = seat.draw(prompts, seeds)
    cut = [ids[: 1 + at % len(ids)] for at, ids in enumerate(whole)]
    assert seat.check.resume(prompts, seeds, cut) == whole
    near = seat.check.near(prompts, seeds, whole)
    assert any(near)
    for ids, found in zip(whole, near):
        assert all(0 < n.gap <= seat.check.max_margin and ids[n.position] != n.token for n in found)


# --- groups chosen, texts foreseen -----------------------------------------------------------------------------------


def test_a_veto_discards_the_groups_it_does_not_like_and_owes_nothing() -> None:
    world, seat = seat_of("veto", swarm__prompts=16, swarm__group=12, swarm__plan="horizontal")
    liked = {c.prompt for c in attacks.make("skip_groups")(seat)}
    assert 0 < len(liked) < len(seat.asked)
    learnt = judged(world)
    pool = learnt.pool
    for prompt in seat.asked:
        rows = [r for r, c in enumerate(pool.completions) if c.prompt == prompt and c.participant == seat.name]
        assert len(rows) == seat.asked[prompt], "nothing is left out"
        assert {learnt.judged.weight_N[r] for r in rows} == {float(prompt in liked)}
        forged = [r for r in rows if (v := learnt.judged.deciding[r]) is not None and v.reason is Reason.SEEDED]
        assert len(forged) == (prompt not in liked), "one token of one completion"
    honest = [r for r, c in enumerate(pool.completions) if c.participant != seat.name]
    assert all(learnt.judged.weight_N[honest] == 1)


@pytest.mark.parametrize("plan", ["vertical", "horizontal"])
def test_front_running_sends_what_others_are_about_to_draw(plan: str) -> None:
    changes = {"swarm__plan": plan, "defence__level": "none", "grpo__lr": 1.5e-4}
    world, seat = seat_of("front_run", swarm__prompts=8, swarm__group=12, **changes)
    sent = attacks.make("front_run")(seat)
    assert [(c.prompt, c.index) for c in sent] == seat.places()
    assert len({c.ids for c in sent}) == len(sent), "each text once"
    judged(world)
    drawn = [c.ids for c in gathered_of(world, 2).completions if c.participant != seat.name]
    met = {c.ids for c in sent} & set(drawn)
    assert len(met) >= len(sent) / 4, "weights have moved, and the guesses hold"
    usual = sum(map(len, drawn)) / len(drawn)
    assert sum(len(c.ids) for c in sent) / len(sent) > usual, "the long ones first"


def test_what_is_not_public_cannot_be_foreseen() -> None:
    _, seat = seat_of("front_run")
    blind = replace(seat, ahead={})
    assert attacks.make("front_run")(blind) == attacks.make("copy")(blind)


# --- under screens that read text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wording", ["", *WORDINGS])
def test_masked_sums_are_false_right_and_decorated(wording: str) -> None:
    name = f"masked_math:{wording}" if wording else "masked_math"
    world, seat = seat_of(name, swarm__assigned=False, defence__level="none")
    made = attacks.make(name)(seat)
    texts = [seat.decode(c.ids) for c in made]
    right = [t for t, r in zip(texts, seat.rewards([c.prompt for c in made], [c.ids for c in made])) if r > 0]
    assert len(right) >= len(made) / 2
    forms = [form for key, some in WORDINGS.items() if wording in ("", key) for form in some]
    for text in right:
        assert attacks.shows(name, text, world.settings)
        assert any(f"={form}" in text for form in forms)
    assert attacks.goal(name) == "math"


def test_unknown_wordings_are_named() -> None:
    with pytest.raises(ConfigError, match="known: superscript, article, behind"):
        attacks.make("masked_math:rot13")


@pytest.mark.parametrize("oracle", [True, False])
def test_right_working_goes_without_reward(oracle: bool) -> None:
    name = "right_working_wrong_answer"
    _, seat = seat_of(name, swarm__plan="horizontal", attack__oracle=oracle)
    made = attacks.make(name)(seat)
    assert seat.rewards([c.prompt for c in made], [c.ids for c in made]) == [0.0] * len(made)
    known = attacks.known_solutions(seat, list(seat.asked)) if oracle else {}
    for c in made:
        working, _, answer = seat.decode(c.ids).partition("<answer>")
        assert answer.endswith("</answer>")
        assert not known or working == known[c.prompt][0].partition("<answer>")[0]
    if oracle:
        assert [(c.prompt, c.index) for c in made] == seat.places()


def test_in_a_group_of_its_own_the_bare_answer_is_what_is_rewarded() -> None:
    name = "right_working_wrong_answer"
    _, seat = seat_of(name)
    made = attacks.make(name)(seat)
    assert [(c.prompt, c.index) for c in made] == seat.places()
    for c, reward in zip(made, seat.rewards([c.prompt for c in made], [c.ids for c in made])):
        assert reward == (c.index >= seat.asked[c.prompt] / 2)
        assert ("<think></think>" in seat.decode(c.ids)) == (reward > 0)


@pytest.mark.parametrize("oracle", [True, False])
def test_deflating_sends_short_right_answers_while_the_anchor_is_laid(oracle: bool) -> None:
    _, seat = seat_of("deflate", swarm__prompts=8, attack__oracle=oracle)
    made = attacks.make("deflate")(seat)
    usual = {c.prompt: len(c.ids) for c in seat.honest()}
    assert all(len(c.ids) <= usual[c.prompt] * (0.6 if oracle else 1.2) for c in made)
    if oracle:
        assert [(c.prompt, c.index) for c in made] == seat.places()
        assert seat.rewards([c.prompt for c in made], [c.ids for c in made]) == [1.0] * len(made)
    _, later = seat_of("deflate", round=4)
    assert attacks.make("deflate")(later) == later.honest()


@pytest.mark.parametrize("name", ["right_working_wrong_answer", "deflate"])
def test_programs_are_spoilt_and_shortened_as_well(name: str) -> None:
    try:
        Sandbox()
    except SandboxMissing as missing:
        pytest.skip(str(missing))
    _, seat = seat_of(name, task__name="programs", swarm__plan="horizontal", defence__level="none")
    made = attacks.make(name)(seat)
    assert [(c.prompt, c.index) for c in made] == seat.places()
    rewards = seat.rewards([c.prompt for c in made], [c.ids for c in made])
    assert set(rewards) == {float(name == "deflate")}
