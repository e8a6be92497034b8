"""Attackers who make the most of what each check forgives: each does what it says, on real rollouts of `tiny`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from assay.bench.swarm import BF16_LIMITS
from assay.contribution import Completion
from assay.engines import local_swarm
from assay.swarm import attacks
from assay.swarm.attacks import Seat
from assay.swarm.learner import Learnt, Memory
from assay.swarm.seats import make_seat
from test_swarm import gathered_of, small, world_of


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
@pytest.mark.parametrize("limits", [{}, BF16_LIMITS], ids=["fp32", "bf16"])
def test_looking_ahead_stays_under_the_limits(name: str, limits: dict[str, float]) -> None:
    world, seat = seat_of(name, swarm__prompts=8, swarm__group=12, defence__params={"seeded": limits})
    made = attacks.make(name)(seat)
    rate = changed(seat, made)
    learnt = judged(world)
    assert all(learnt.judged.weight_N == 1), "the honest and the attacker alike"
    rows = [r for r, c in enumerate(learnt.pool.completions) if c.participant in world.malicious]
    assert [learnt.pool.completions[r].ids for r in rows] == [
        c.ids for c in sorted(made, key=lambda c: (c.prompt, c.index))
    ]
    assert (rate > 0.2) if limits else (rate < 0.2)


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
