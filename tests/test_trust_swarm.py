"""Strikes in the swarm: whom they must reach, and whom never."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import stats

from assay.config import ConfigError, SwarmExperiment
from assay.contribution import Completion, Pool, Rollout, TokenEvidence, completion_sha256, tensors_sha256
from assay.engines import local_swarm, swarm_world
from assay.swarm import defence, screening
from assay.swarm.exchange import gather, make_plan
from assay.swarm.grpo import advantages
from assay.swarm.learner import Memory
from assay.swarm.screening import HONEST_REFUSED, TrustRules, judge_pool, update_trust
from assay.swarm.screens.common import say
from assay.swarm.screens.model import Seeded
from assay.trust import Strikes, by_chance
from assay.verdict import Reason, State, Verdict
from assay.wire import encode_rollout
from swarm_pools import pool
from test_swarm import gathered_of, small, world_of

RULES = TrustRules(ban_after=3, window=10, share=0.1, readmit_after=5)


def drawn(index: int, spoilt: set[int], prompts: int = 4, group: int = 12) -> Pool:
    """One node's completions, all as its seeds gave them but for one token in the first of each spoilt group."""
    made = pool({"node": {p: [(f"{p} {i}", 1.0) for i in range(group)] for p in range(prompts)}}, index=index)
    margin = tuple(
        np.array([0.0, 9.0 if c.prompt in spoilt and c.index == 0 else 0.0], np.float32) for c in made.completions
    )
    flat = tuple(np.zeros(2, np.float32) for _ in margin)
    return replace(made, evidence=TokenEvidence(logprob=flat, outside=flat, margin=margin))


def after(rounds: list[Pool], trust: dict[str, Strikes] | None = None) -> dict[str, Strikes]:
    trust = dict(trust or {})
    for one in rounds:
        trust = update_trust(trust, one, judge_pool(one, [Seeded()], {}).verdicts, RULES)
    return trust


def test_chance_is_the_binomial_tail() -> None:
    for k, n, p in ((0, 4, 0.01), (1, 40, 0.012), (7, 40, 0.1), (40, 40, 0.5)):
        assert by_chance([(k, n)], p) == pytest.approx(stats.binom.sf(k - 1, n, p), rel=1e-9)
    assert by_chance([(1, 4), (2, 4)], 0.1) == by_chance([(3, 8)], 0.1)
    assert by_chance([], 0.1) == 1


@pytest.mark.parametrize("spoilt", [{0}, {0, 1}, {0, 1, 2, 3}])
def test_who_vetoes_groups_by_spoiling_one_member_of_each_is_banned(spoilt: set[int]) -> None:
    """A twelfth of his completions is forged, below the share that costs a strike; the choice is his all the same."""
    assert after([drawn(r, spoilt) for r in range(1, 11)])["node"].banned


def test_honest_nodes_whose_completions_are_refused_by_chance_keep_their_place() -> None:
    """At the rate that calibration allows, one group of 80 is lost; 200 nodes over 40 rounds."""
    rng, banned = np.random.default_rng(0), 0
    for _ in range(200):
        trust: dict[str, Strikes] = {}
        for index in range(1, 41):
            lost = int(rng.binomial(4, 1 - (1 - HONEST_REFUSED) ** 12))
            state = trust.get("node", Strikes()).update(
                index, forged=False, ban_after=3, window=10, readmit_after=5, groups=(lost, 4),
                chance=1 - (1 - HONEST_REFUSED) ** 12,
            )  # fmt: skip
            trust["node"] = state
            banned += state.banned
    assert banned == 0


def test_a_single_lost_group_is_no_strike_and_old_ones_fade() -> None:
    trust = after([drawn(1, {0})])
    assert trust["node"].rounds == ()
    trust = after([drawn(r, set()) for r in range(2, 12)], trust)
    assert not any(lost for _, lost, _ in trust["node"].lost)
    assert Strikes.from_json(trust["node"].to_json()) == trust["node"]


@pytest.mark.parametrize("what", ["late", "other weights"])
def test_a_message_that_came_late_or_from_other_weights_is_no_strike(what: str) -> None:
    """Both happen to honest nodes; whoever obeyed the pool's hash and skipped a round has other weights."""
    experiment = small()
    world = world_of(experiment)
    trust: dict[str, Strikes] = {}
    for index in range(2, 8):
        plan = make_plan("r", index, ["a", "b"], mode="vertical", prompts=2, group=2, ids=range(100))
        owed = plan if what != "late" else make_plan(
            "r", index - 1, ["a", "b"], mode="vertical", prompts=2, group=2, ids=range(100)
        )  # fmt: skip
        rules = replace(world.rules, run="r", vocabulary=10, max_tokens=5, ids=range(100), model_sha256="a" * 64)
        rows = tuple(
            Completion(participant="a", round=owed.round, prompt=p, index=i, ids=(1, 2),
                       sha256=completion_sha256(owed.round, p, i, (1, 2)))
            for p, n in owed.asked["a"].items() for i in range(n)
        )  # fmt: skip
        sent = Rollout(
            participant="a", round=owed.round, model_sha256=("b" if what != "late" else "a") * 64, completions=rows
        )
        found = gather({"a": encode_rollout(sent, run="r")}, plan, rules)
        assert {r.participant: r.reason for r in found.refused}["a"] in screening.LATE
        seen = replace(pool({}, index=index), asked=plan.asked, refused=found.refused)
        trust = update_trust(trust, seen, [], RULES)
    assert not any(s.rounds for s in trust.values())


def test_garbage_is_a_strike() -> None:
    plan = make_plan("r", 1, ["a", "b"], mode="vertical", prompts=2, group=2, ids=range(100))
    rules = replace(world_of(small()).rules, run="r")
    found = gather({"a": b"\x00" * 64, "b": None}, plan, rules)
    seen = replace(pool({}, index=1), asked=plan.asked, refused=found.refused)
    trust = update_trust({}, seen, [], RULES)
    assert trust["a"].rounds == (1,)
    assert "b" not in trust, "silence is no crime"


def broken(rollout: Rollout, message: bytes, run: str) -> dict[str, bytes | None]:
    """One node's message as no honest node sends it."""

    def sent(rows: tuple[Completion, ...], **other: object) -> bytes:
        return encode_rollout(replace(rollout, completions=rows, **other), run=run)  # type: ignore[arg-type]

    def again(one: Completion, **changes: object) -> Completion:
        made = replace(one, **changes)  # type: ignore[arg-type]
        return replace(made, sha256=completion_sha256(made.round, made.prompt, made.index, made.ids))

    first, *rest = rollout.completions
    return {
        "nothing": b"",
        "noise": np.random.default_rng(0).bytes(5000),
        "cut short": message[: len(message) // 2],
        "ten megabytes": message + bytes(10 * 2**20),
        "out of vocabulary": sent((again(first, ids=(10**6,)), *rest)),
        "too long": sent((again(first, ids=(5,) * 5000), *rest)),
        "wrong prompt": sent((again(first, prompt=first.prompt + 7), *rest)),
        "round of its own": sent(
            tuple(again(c, round=c.round + 3) for c in rollout.completions), round=rollout.round + 3
        ),
        "of the round before": sent(
            tuple(again(c, round=c.round - 1) for c in rollout.completions), round=rollout.round - 1
        ),
        "another's run": encode_rollout(rollout, run="another"),
    }


def test_among_broken_messages_of_every_kind_the_others_learn_as_if_nothing_had_come() -> None:
    torch.set_num_threads(1)  # several threads add up in an order of their own: other last bits in every run
    world = world_of(small(swarm__malicious=0.0, defence__level="none"))
    sha256 = swarm_world.model_sha256(world)
    plan = local_swarm.plan_of(world, 1)
    rollouts = local_swarm.answer(world, plan, sha256)
    rules = replace(world.rules, model_sha256=sha256)
    messages: dict[str, bytes | None] = {n: encode_rollout(r, run=rules.run) for n, r in rollouts.items()}
    bad = sorted(messages)[0]
    (learner,) = world.learners.values()
    before = learner.tensors()
    ends = {}
    for what, message in {"silent": None, **broken(rollouts[bad], messages[bad] or b"", rules.run)}.items():
        learner.load(before)
        learner.optimizer.state.clear()
        found = gather({**messages, bad: message}, plan, rules)
        _, learnt = learner.learn(found, Memory())
        assert [r.participant for r in found.refused] == [bad], what
        assert len(learnt.pool.completions) == len(found.completions) > 0
        ends[what] = tensors_sha256({n: v for n, v in learner.tensors().items() if n.startswith("weight/")})
    assert ends["silent"] != tensors_sha256({n: v for n, v in before.items() if n.startswith("weight/")})
    assert set(ends.values()) == {ends["silent"]}


# --- what the learner hands to screens and losses ------------------------------------------------------------------------


@dataclass(frozen=True)
class Counting:
    """A model screen with a memory: how many rows it has seen."""

    name: str = "counting"
    needs_evidence: bool = True

    def screen(self, pool: Pool, state: State) -> tuple[list[Verdict], State]:
        seen = int(state.get("seen", 0)) + len(pool.completions)
        return [say(c, self.name, Reason.OK, "") for c in pool.completions], {"seen": seen}


def test_a_model_screen_keeps_its_memory_over_chunks_and_rounds() -> None:
    world = world_of(small(swarm__malicious=0.0, defence__level="seeded", grpo__chunk_rows=8))
    (learner,) = world.learners.values()
    learner.defence = replace(learner.defence, model_screens=(*learner.defence.model_screens, Counting()))
    memory, owed = Memory(), 0
    for index in (1, 2):
        found = gathered_of(world, index)
        owed += len(found.completions)
        memory, _ = learner.learn(found, memory)
    assert memory.screens["counting"] == {"seen": owed}


def test_nodes_that_chose_one_prompt_in_vertical_mode_are_two_groups() -> None:
    """Else an all-right group of the attacker's gains from the honest ones' mistakes on the prompt he took from them."""
    world = world_of(small(swarm__malicious=0.0, defence__level="none"))
    (learner,) = world.learners.values()
    found = gathered_of(world)
    one, other = sorted(found.plan.asked)[:2]
    mine, theirs = sorted(found.plan.asked[one])[0], sorted(found.plan.asked[other])[0]
    moved = tuple(
        replace(c, prompt=mine, sha256=completion_sha256(c.round, mine, c.index, c.ids))
        if c.participant == other and c.prompt == theirs else c
        for c in found.completions
    )  # fmt: skip
    _, learnt = learner.learn(replace(found, completions=moved), Memory())
    keys = [(c.participant, c.prompt) for c in moved]
    assert learner.group_of(learnt) == [sorted(set(keys)).index(k) for k in keys]
    flat = replace(found, completions=moved, plan=replace(found.plan, mode="horizontal"))
    _, learnt = learner.learn(flat, Memory())
    prompts = [c.prompt for c in moved]
    assert learner.group_of(learnt) == [sorted(set(prompts)).index(p) for p in prompts]


def test_advantages_of_a_group_do_not_see_another() -> None:
    right, mixed = torch.ones(4), torch.tensor([0.0, 0.0, 1.0, 0.0])
    together = advantages(torch.cat([right, mixed]), torch.tensor([0] * 4 + [1] * 4), torch.ones(8))
    assert together[:4].abs().max() == 0


def test_a_logit_check_that_cuts_nothing_off_is_a_mistake() -> None:
    open_ended = SwarmExperiment().changed(defence__level="logit", sampling__top_k=0)
    with pytest.raises(ConfigError, match=r"give \[defence.params.logit\] k"):
        defence.make(open_ended, vocabulary=1024, eos=2)
    given = open_ended.changed(defence__params={"logit": {"k": 30}})
    made = defence.make(given, vocabulary=1024, eos=2)
    assert made.wanted is not None
    assert made.wanted.k == 30
