"""Which rows the screens of texts see in a node's round: on the real `tiny`, with the screens that read logits beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from assay.contribution import Completion, Pool, completion_sha256
from assay.engines import local_swarm
from assay.progress import Silent
from assay.swarm.exchange import Gathered
from assay.swarm.learner import Learner, Memory
from assay.swarm.screens.common import say
from assay.trust import Strikes
from assay.verdict import Reason, State, Verdict
from test_swarm import gathered_of, small

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Census:
    """Counts whose completions it is shown, over rounds."""

    name: str = "census"

    def screen(self, pool: Pool, state: State) -> tuple[list[Verdict], State]:
        counts = dict(state)
        for c in pool.completions:
            counts[c.participant] = counts.get(c.participant, 0) + 1
        return [say(c, self.name) for c in pool.completions], counts


def honest_world(*screens: str, **changes: Any) -> tuple[local_swarm.World, Learner]:
    """Nodes without an attacker, at a rate so low that a round's weights still draw the next one's completions."""
    values = {"swarm__malicious": 0.0, "swarm__plan": "horizontal", "grpo__lr": 1e-12, **changes}
    world = local_swarm.build(small(defence__screens=list(screens), **values), Silent())[0]
    (learner,) = world.learners.values()
    return world, learner


def sends(gathered: Gathered, node: str, ids: Mapping[tuple[int, int], tuple[int, ...]]) -> Gathered:
    """The same round, in which `node` sends these ids at these places (prompt, index)."""

    def one(c: Completion) -> Completion:
        if c.participant != node or (c.prompt, c.index) not in ids:
            return c
        said = ids[c.prompt, c.index]
        return replace(c, ids=said, sha256=completion_sha256(c.round, c.prompt, c.index, said))

    return replace(gathered, completions=tuple(one(c) for c in gathered.completions))


def ids_of(gathered: Gathered, node: str) -> dict[tuple[int, int], tuple[int, ...]]:
    return {(c.prompt, c.index): c.ids for c in gathered.completions if c.participant == node}


@pytest.mark.parametrize("check", ["seeded", "logit"])
def test_what_the_model_screens_refuse_moves_no_statistics(check: str) -> None:
    world, learner = honest_world("schema", check)
    learner.defence = replace(learner.defence, screens=(*learner.defence.screens, Census()))
    first = gathered_of(world)
    *others, bad = world.nodes
    low = min(range(world.rules.vocabulary), key=lambda i: i == world.practice.eos)
    junk = {place: (low,) * 9 + ids[-1:] for place, ids in ids_of(first, bad).items()}
    memory, learnt = learner.learn(sends(first, bad, junk), Memory())
    shown = memory.screens["census"]
    if check == "seeded":
        assert bad not in shown
    else:  # a group does not fall together here
        refused = [v for v in learnt.judged.verdicts if v.screen == "logit" and v.participant == bad and v.weight == 0]
        assert refused
        assert shown.get(bad, 0) == len(junk) - len(refused)
    assert {n: shown[n] for n in others} == {n: len(ids_of(first, n)) for n in others}
    by_screen = [v for v in learnt.judged.verdicts if v.screen == check]
    assert len(by_screen) == len(first.completions), "each row is judged once, whoever sees it afterwards"


def test_a_banned_node_moves_no_statistics_and_is_still_audited() -> None:
    for screens in (("schema",), ("schema", "seeded")):
        world, learner = honest_world(*screens)
        learner.defence = replace(learner.defence, screens=(*learner.defence.screens, Census()))
        *others, bad = world.nodes
        memory = Memory(trust={bad: Strikes(rounds=(0,), banned=True)})
        after, learnt = learner.learn(gathered_of(world), memory)
        assert sorted(after.screens["census"]) == others
        assert {v.reason for v in learnt.judged.deciding if v is not None} == {Reason.BANNED}
        assert after.trust[bad].clean == 1


def test_looking_first_learns_what_judging_on_the_way_learns() -> None:
    """A screen of texts that refuses nothing moves the order of the judging, and not one weight."""
    ends = []
    for extra in ((), (Census(),)):
        world, learner = honest_world("schema", "seeded", grpo__lr=1e-3, swarm__malicious=0.25, attack__name="text")
        learner.defence = replace(learner.defence, screens=(*learner.defence.screens, *extra))
        _, learnt = learner.learn(gathered_of(world), Memory())
        ends.append(learnt)
    assert ends[0].judged.weight_N.tolist() == ends[1].judged.weight_N.tolist()
    assert 0 in ends[0].judged.weight_N
    assert ends[1].grad_norm == pytest.approx(ends[0].grad_norm, rel=1e-5) != 0
    assert ends[1].loss == pytest.approx(ends[0].loss, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("when", ["this round", "the round before"])
def test_who_foresees_what_others_draw_takes_none_of_it_away(when: str) -> None:
    """He has the weights, the plan and the seeds, and sends a node's own completions before or beside it."""
    world, learner = honest_world("schema", "seeded", "copycat", swarm__group=16)
    first, second = gathered_of(world), gathered_of(world, 2)
    robbed, *_, bad = world.nodes
    if when == "this round":
        rounds = [sends(first, bad, ids_of(first, robbed))]
    else:
        rounds = [sends(first, bad, dict(zip(ids_of(first, bad), ids_of(second, robbed).values()))), second]
    memory = Memory()
    for gathered in rounds:
        memory, learnt = learner.learn(gathered, memory)
        kept = {c.participant for c, w in zip(gathered.completions, learnt.judged.weight_N) if w == 1}
        assert set(world.nodes) - {bad} <= kept
        assert all(w == 1 for c, w in zip(gathered.completions, learnt.judged.weight_N) if c.participant != bad)
    honest = [v for v in learnt.judged.verdicts if v.screen == "copycat"]
    assert honest
    assert {v.mode for v in honest} == {"monitor"}


def test_copycat_decides_where_no_seeds_do() -> None:
    world, learner = honest_world("schema", "logit", "copycat", swarm__prompts=12, swarm__group=16)
    first = gathered_of(world)
    robbed, *_, bad = world.nodes
    _, learnt = learner.learn(sends(first, bad, ids_of(first, robbed)), Memory())
    found = [v for v in learnt.judged.verdicts if v.screen == "copycat"]
    assert {v.mode for v in found} == {"enforce"}
    out = [v for v in found if v.weight == 0]
    assert {v.participant for v in out} <= {robbed, bad}
    assert len(out) >= 24
