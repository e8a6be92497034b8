"""Whole swarms on the real `tiny`: one update stands for all, weight 0 is absence, attacks and the seeded check, resume."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from assay import config, ledger, models, run_dir
from assay.config import ConfigError, SwarmExperiment
from assay.contribution import Completion, Pool, Rollout, TokenEvidence, completion_sha256, tensors_sha256
from assay.engines import local_swarm, swarm_world
from assay.progress import Silent
from assay.swarm import attacks, build, screening
from assay.swarm.exchange import Gathered, Rules, gather
from assay.swarm.learner import Learner, Memory
from assay.swarm.screens.common import say
from assay.swarm.screens.model import Logit, Seeded, TokenMask
from assay.swarm.seats import make_seat
from assay.swarm.summary import round_row
from assay.trust import Strikes
from assay.verdict import Reason, State, Verdict
from assay.wire import encode_rollout


def small(**changes: Any) -> SwarmExperiment:
    values: dict[str, Any] = {
        "name": "small", "swarm__prompts": 4, "swarm__group": 8, "swarm__iterations": 3, "evaluate__prompts": 8,
        "evaluate__samples": 1, "evaluate__every": 2, "attack__samples": 12,
    }  # fmt: skip
    return SwarmExperiment().changed(**{**values, **changes})


def world_of(experiment: SwarmExperiment) -> local_swarm.World:
    return local_swarm.build(experiment, Silent())[0]


def gathered_of(world: local_swarm.World, index: int = 1) -> Gathered:
    """One round's messages through the wire."""
    sha256 = swarm_world.model_sha256(world)
    plan = local_swarm.plan_of(world, index)
    rollouts = local_swarm.answer(world, plan, sha256)
    messages = {n: encode_rollout(r, run=world.rules.run) for n, r in rollouts.items()}
    rules = Rules(
        run=world.rules.run, vocabulary=world.rules.vocabulary, max_tokens=world.rules.max_tokens, ids=world.rules.ids,
        model_sha256=sha256,
    )  # fmt: skip
    return gather(messages, plan, rules)


def weights(learner: Learner) -> str:
    return tensors_sha256({n: p.detach().numpy() for n, p in learner.parameters.items()})


pytestmark = pytest.mark.usefixtures("one_thread")


# --- learning --------------------------------------------------------------------------------------------------------


def test_one_update_stands_for_all_honest_nodes() -> None:
    """Three nodes run apart, each reading the messages itself, end where the one shared learner ends."""
    experiment = small(attack__name="text", swarm__plan="horizontal", defence__level="seeded")
    apart = [world_of(experiment) for _ in range(3)]
    shared = world_of(experiment)
    for index in (1, 2):
        found = gathered_of(shared, index)
        (kind,) = shared.learners
        shared.memory[kind], _ = shared.learners[kind].learn(found, shared.memory[kind])
        hashes = {}
        for at, world in enumerate(apart):
            own = gathered_of(world, index)
            hashes[str(at)] = own.sha256
            world.memory[kind], _ = world.learners[kind].learn(own, world.memory[kind])
        assert set(hashes.values()) == {found.sha256}
        assert {weights(w.learners[kind]) for w in apart} == {weights(shared.learners[kind])}
        assert all(w.memory[kind] == shared.memory[kind] for w in apart)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_excluded_completions_are_absent(loss: str) -> None:
    """What the seeded check refuses changes the update no more than if it had never been sent."""
    experiment = small(attack__name="math", swarm__assigned=False, defence__level="seeded", grpo__loss=loss)
    world, bare = world_of(experiment), world_of(experiment)
    (kind,) = world.learners
    found = gathered_of(world)
    kept = tuple(c for c in found.completions if c.participant not in world.malicious)
    assert 0 < len(kept) < len(found.completions)
    _, learnt = world.learners[kind].learn(found, Memory())
    without = Gathered(plan=found.plan, completions=kept, refused=found.refused)
    bare.learners[kind].learn(without, Memory())
    assert {learnt.judged.weight_N[i] for i, c in enumerate(found.completions) if c.participant in world.malicious} == {
        0
    }
    for (name, p), q in zip(world.learners[kind].parameters.items(), bare.learners[kind].parameters.values()):
        assert torch.allclose(p, q, atol=2e-6), name


def test_chunks_and_micro_batches_change_nothing_but_last_bits() -> None:
    found, grads = None, []
    for chunk, micro in ((1024, 48), (8, 3), (1, 1)):
        world = world_of(
            small(attack__name="text", defence__level="seeded", grpo__chunk_rows=chunk, grpo__micro_rows=micro)
        )
        (kind,) = world.learners
        found = found or gathered_of(world)
        _, learnt = world.learners[kind].learn(found, Memory())
        grads.append((learnt.grad_norm, learnt.loss, learnt.judged.weight_N.tolist()))
    for norm, loss, weight_N in grads[1:]:
        assert weight_N == grads[0][2]
        assert norm == pytest.approx(grads[0][0], rel=1e-3)
        assert loss == pytest.approx(grads[0][1], abs=1e-6)


def test_a_round_in_which_nothing_is_admitted_changes_nothing() -> None:
    world = world_of(small())
    (kind,) = world.learners
    before = weights(world.learners[kind])
    plan = local_swarm.plan_of(world, 1)
    empty = gather({"node-0": b"\xff" * 100}, plan, world.rules)
    assert {r.reason for r in empty.refused} == {"malformed", "missing"}
    memory, learnt = world.learners[kind].learn(empty, Memory())
    assert weights(world.learners[kind]) == before
    assert learnt.pool.completions == ()
    assert memory.trust["node-0"].rounds == (1,)
    assert "node-1" not in memory.trust, "silence is no crime"


def test_several_updates_and_a_penalty_move_the_weights_differently() -> None:
    ends = []
    for changes in ({}, {"grpo__updates": 3, "grpo__clip_ratio": 0.2}, {"grpo__kl": 0.1}, {"grpo__updates": 3}):
        world = world_of(small(swarm__malicious=0.0, **changes))
        (kind,) = world.learners
        found = gathered_of(world)
        memory, _ = world.learners[kind].learn(found, Memory())
        world.learners[kind].learn(gathered_of(world, 2), memory)
        ends.append(weights(world.learners[kind]))
    assert len(set(ends)) == 4


def test_a_lora_adapter_learns_and_the_base_stays() -> None:
    world = world_of(small(model__lora_r=4))
    (learner,) = world.learners.values()
    frozen = {n: p.detach().clone() for n, p in learner.model.named_parameters() if not p.requires_grad}
    before = weights(learner)
    assert 0 < sum(p.numel() for p in learner.parameters.values()) < 200_000
    learner.learn(gathered_of(world), Memory())
    assert weights(learner) != before
    assert all(torch.equal(p, frozen[n]) for n, p in learner.model.named_parameters() if n in frozen)


def test_honest_nodes_learn() -> None:
    """Held-out reward rises: the loss has the right sign, end to end."""
    experiment = small(swarm__malicious=0.0, swarm__prompts=8, swarm__group=12, grpo__lr=3e-4, evaluate__prompts=48,
                       evaluate__samples=2)  # fmt: skip
    world = world_of(experiment)
    (kind,) = world.learners
    before = swarm_world.heldout(world)["reward"]
    for index in range(1, 9):
        world.memory[kind], _ = world.learners[kind].learn(gathered_of(world, index), world.memory[kind])
    assert swarm_world.heldout(world)["reward"] > before + 0.03


# --- attacks and the seeded check ------------------------------------------------------------------------------------


def attacked(name: str, **changes: Any) -> tuple[local_swarm.World, Gathered, Any]:
    home: dict[str, Any] = {"math": {"swarm__assigned": False}, "text": {"swarm__plan": "horizontal"}}.get(name, {})
    world = world_of(small(attack__name=name, defence__level="seeded", **{**home, **changes}))
    found = gathered_of(world)
    (learner,) = world.learners.values()
    _, learnt = learner.learn(found, Memory())
    return world, found, learnt


@pytest.mark.parametrize("name", ["math", "text", "nonsense", "dos", "own_seeds", "abstain", "copy", "inject_text"])
def test_the_seeded_check_admits_the_honest_and_nobody_else(name: str) -> None:
    world, found, learnt = attacked(name)
    for row, completion in enumerate(found.completions):
        bad = completion.participant in world.malicious
        reason = learnt.judged.deciding[row]
        assert learnt.judged.weight_N[row] == (0 if bad and name != "copy" else 1), (completion.participant, reason)


@pytest.mark.parametrize("name", ["math", "text", "nonsense", "dos"])
def test_attacks_are_rewarded_and_show_what_they_plant(name: str) -> None:
    world, _, learnt = attacked(name)
    rows = [r for r, c in enumerate(learnt.pool.completions) if c.participant in world.malicious]
    assert len(rows) == sum(learnt.pool.asked[next(iter(world.malicious))].values())
    rewarded = [r for r in rows if learnt.pool.rewards[r] > 0]
    if name == "dos":
        honest = [len(c.ids) for c in learnt.pool.completions if c.participant not in world.malicious]
        assert max(len(learnt.pool.completions[r].ids) for r in rewarded) >= sum(honest) / len(honest)
        return
    assert len(rewarded) >= len(rows) // 2
    assert all(attacks.shows(name, learnt.pool.texts[r], world.settings) for r in rewarded)
    assert not any(
        attacks.shows(name, t, world.settings)
        for c, t in zip(learnt.pool.completions, learnt.pool.texts)
        if c.participant not in world.malicious
    )


def test_an_incomplete_group_is_discarded_whole_and_strikes() -> None:
    world, found, learnt = attacked("abstain")
    (bad,) = world.malicious
    reasons = {v.reason for v in learnt.judged.deciding if v is not None and v.participant == bad}
    assert reasons == {Reason.INCOMPLETE}
    forged = screening.forged_share(learnt.pool, learnt.judged.verdicts)
    assert forged[bad] > 0.1
    assert all(share == 0 for node, share in forged.items() if node != bad)
    assert len(found.completions) < found.plan.owed


@dataclass(frozen=True)
class Picky:
    """Takes every node's first completion of each prompt out: stands for a text screen that errs on honest rows."""

    name: str = "picky"

    def screen(self, pool: Pool, state: State) -> tuple[list[Verdict], State]:
        return [
            say(c, self.name, Reason.OK if c.index else Reason.ENRICHMENT, "" if c.index else "does not like it")
            for c in pool.completions
        ], state


def test_what_another_screen_takes_leaves_the_rest_of_an_honest_group_alone() -> None:
    world = world_of(small(swarm__malicious=0.0, defence__level="seeded"))
    learner = next(iter(world.learners.values()))
    learner.defence = replace(learner.defence, screens=(*learner.defence.screens, Picky()))
    gathered = gathered_of(world)
    memory, learnt = learner.learn(gathered, Memory())
    assert [w == 0 for w in learnt.judged.weight_N] == [c.index == 0 for c in gathered.completions]
    assert {v.reason for v in learnt.judged.verdicts if v.screen == "seeded"} == {Reason.OK}
    assert len([v for v in learnt.judged.verdicts if v.screen == "seeded"]) == len(gathered.completions)
    assert not any(s.rounds for s in memory.trust.values()), "no strike for what another screen dislikes"


def test_flipping_within_the_margin_needs_a_lax_check() -> None:
    """An attacker who steers under the verifier's limits: strict limits leave him next to nothing to flip."""
    limits = {"max_margin": 30.0, "mean_margin": 5.0, "max_flips": 50, "flip_rate": 1.0, "flip_gap": 10.0}
    strict, lax = attacked("flip_length"), attacked("flip_length", defence__params={"seeded": limits})

    def flips(found: tuple[local_swarm.World, Gathered, Any], malicious: bool) -> float:
        world, _, learnt = found
        return sum(
            float(v.evidence["flips"])
            for v in learnt.judged.verdicts
            if v.screen == "seeded" and (v.participant in world.malicious) is malicious
        )

    assert flips(strict, False) == flips(lax, False) == 0
    assert flips(strict, True) <= 1
    assert flips(lax, True) > 5


def test_without_an_oracle_the_attacker_votes() -> None:
    world = world_of(small(attack__name="text", attack__oracle=False, swarm__plan="horizontal"))
    (bad,) = world.malicious
    plan = local_swarm.plan_of(world, 1)
    seat = make_seat(bad, world.learners["tiny"], plan, world.settings, seed=0)
    solutions = attacks.known_solutions(seat, list(plan.asked[bad]))
    assert any(solutions.values())
    made = attacks.make("text")(seat)
    assert all(attacks.shows("text", seat.decode(c.ids), world.settings) for c in made if c.prompt in solutions)


def test_a_sleeper_is_caught_in_its_first_bad_round(tmp_path: Path) -> None:
    experiment = small(attack__name="text", attack__from_round=3, swarm__plan="horizontal", defence__level="seeded")
    local_swarm.run_swarm(experiment, tmp_path / "run")
    rows = run_dir.read_metrics(tmp_path / "run")
    assert [row["poison_rejected_rate"] for row in rows[1:]] == [0, 0, 1]
    assert rows[3]["struck"]


def test_a_late_defence_looks_from_its_round_on() -> None:
    world = world_of(
        small(attack__name="text", swarm__plan="horizontal", defence__level="seeded", defence__from_round=2)
    )
    learner = next(iter(world.learners.values()))
    memory, before = learner.learn(gathered_of(world), Memory())
    assert {v.screen for v in before.judged.verdicts} == {"schema"}
    assert not before.collected.margin
    assert all(before.judged.weight_N == 1)
    assert not any(s.rounds for s in memory.trust.values())
    _, after = learner.learn(gathered_of(world, 2), memory)
    bad = [c.participant in world.malicious for c in after.pool.completions]
    assert [w == 0 for w in after.judged.weight_N] == bad


def test_strikes_ban_and_audits_bring_back() -> None:
    kw: dict[str, Any] = {"ban_after": 2, "window": 5, "readmit_after": 3}
    state = Strikes()
    for round, forged in enumerate([True, False, True], 1):
        state = state.update(round, forged=forged, **kw)
    assert state.banned
    for round in (4, 5):
        state = state.update(round, forged=False, **kw)
    assert state.update(6, forged=True, **kw).clean == 0
    assert state.update(6, forged=False, **kw) == Strikes()
    assert not Strikes().update(1, forged=True, **kw).update(7, forged=True, **kw).banned, "old strikes fade"
    assert Strikes.from_json(state.to_json()) == state


# --- screens that read evidence --------------------------------------------------------------------------------------


def pool_with(evidence: dict[str, list[list[float]]], ended: list[bool], owed: int = 2) -> Pool:
    import numpy as np

    rows = len(ended)
    sizes = [len(v) for v in next(iter(evidence.values()))]
    made = tuple(
        Completion(participant="n", round=1, prompt=7, index=i, ids=tuple(range(size)),
                   sha256=completion_sha256(1, 7, i, tuple(range(size))))
        for i, size in enumerate(sizes)
    )  # fmt: skip
    arrays = {k: tuple(np.array(x, np.float32) for x in v) for k, v in evidence.items()}
    full = {"logprob": tuple(np.full(s, -1.0, np.float32) for s in sizes),
            "outside": tuple(np.zeros(s, np.float32) for s in sizes)} | arrays  # fmt: skip
    return Pool(
        index=1, completions=made, questions=("q",) * rows, texts=("t",) * rows, rewards=(1.0,) * rows,
        ended=tuple(ended), readable=(True,) * rows, asked={"n": {7: owed}}, max_tokens=5,
        evidence=TokenEvidence(**full),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("margin", "ended", "reason"),
    [
        ([0.0, 0.0, 0.0], True, Reason.OK),
        ([0.0, 0.04, 0.0] * 8, True, Reason.SEEDED),  # many flips, and their mean
        ([0.0, 0.2, 0.0], True, Reason.SEEDED),
        ([0.0, float("inf"), 0.0], True, Reason.SEEDED),
        ([0.0, float("nan"), 0.0], True, Reason.SEEDED),  # what cannot be compared is not admitted
        ([0.0, 0.0, 0.0], False, Reason.NOT_ENDED),
        ([0.0] * 5, False, Reason.OK),  # cut off by the limit
    ],
)
def test_what_the_seeded_check_refuses(margin: list[float], ended: bool, reason: Reason) -> None:
    pool = pool_with({"margin": [margin, [0.0, 0.0]]}, [ended, True])
    verdicts, _ = Seeded().screen(pool, {})
    assert verdicts[0].reason is reason
    assert verdicts[1].reason is (Reason.OK if reason is Reason.OK else Reason.GROUP)
    alone, _ = Seeded(whole_groups=False).screen(pool, {})
    assert alone[1].weight == 1


def test_what_the_logit_check_refuses() -> None:
    pool = pool_with({"outside": [[0.0, 0.0], [0.0, 0.5]], "logprob": [[-1.0, -9.0], [-1.0, -2.0]]}, [True, True])
    assert [v.weight for v in Logit().screen(pool, {})[0]] == [1, 0]
    assert [v.weight for v in Logit(slack=0.6).screen(pool, {})[0]] == [1, 1]
    assert [v.weight for v in Logit(slack=0.6, floor=1e-3).screen(pool, {})[0]] == [0, 1]
    nan = float("nan")
    odd = pool_with({"outside": [[0.0, nan], [0.0, 0.0]], "logprob": [[-1.0, -1.0], [-1.0, nan]]}, [True, True])
    assert [v.weight for v in Logit().screen(odd, {})[0]] == [0, 0]


def test_the_token_mask_leaves_out_tokens_and_keeps_the_row() -> None:
    pool = pool_with({"outside": [[0.0, 0.0], [0.0, 0.5]], "logprob": [[-1.0, -9.0], [-1.0, -2.0]]}, [True, True])
    verdicts, _ = TokenMask().screen(pool, {})
    assert [v.masked for v in verdicts] == [(1,), (1,)]
    judged = screening.judge_pool(pool, [TokenMask()], {})
    assert judged.weight_N.tolist() == [1, 1]
    assert judged.masked == [frozenset({1}), frozenset({1})]


def test_a_screen_that_needs_evidence_fails_closed_without_it() -> None:
    pool = replace(pool_with({"margin": [[0.0], [0.0]]}, [True, True]), evidence=None)
    judged = screening.judge_pool(pool, [Seeded()], {})
    assert judged.weight_N.tolist() == [0, 0]
    assert {v.reason for v in judged.verdicts} == {Reason.SCREEN_FAILED}


def test_exclusion_outranks_a_lost_reward_and_monitors_only_watch() -> None:
    pool = pool_with({"margin": [[0.0], [9.0]]}, [True, True])
    judged = screening.judge_pool(pool, [Seeded(whole_groups=False)], {}, monitor=frozenset({"seeded"}))
    assert judged.weight_N.tolist() == [1, 1]
    assert [v.weight for v in judged.verdicts] == [1, 0]


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_writes_what_a_stranger_needs(tmp_path: Path) -> None:
    experiment = small(attack__name="math", swarm__assigned=False)
    summary = local_swarm.run_swarm(experiment, tmp_path / "run", command="test")
    assert summary["wing"] == "swarm"
    wanted = {"asr", "completion_tokens_mean", "heldout_reward", "honest_rejected_rate", "poison_rejected_rate"}
    assert wanted <= summary["metrics"].keys()
    assert summary["metrics"]["honest_rejected_rate"] == 0
    assert summary["metrics"]["poison_rejected_rate"] == 1
    assert list(summary["participants"].values()).count("malicious") == 1
    assert ledger.verify(tmp_path / "run" / run_dir.LEDGER, summary["ledger"]["head"]).ok
    again = local_swarm.run_swarm(experiment, tmp_path / "run")
    assert again == summary, "a finished run is returned as it is"
    with pytest.raises(ConfigError, match="another experiment"):
        local_swarm.run_swarm(experiment.changed(seed=1), tmp_path / "run")
    json.dumps(run_dir.read_metrics(tmp_path / "run"), allow_nan=False)


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from assay.config import load
from assay.engines.local_swarm import run_swarm
run_swarm(load(sys.argv[1]), sys.argv[2])
"""
TOML = """
name = "killed"
wing = "swarm"
[swarm]
prompts = 4
group = 8
iterations = 5
plan = "horizontal"
[attack]
name = "copy"
[evaluate]
prompts = 4
samples = 1
every = 2
"""


@pytest.mark.slow
def test_kill_and_resume_ends_where_the_unbroken_run_ends(tmp_path: Path) -> None:
    config = tmp_path / "killed.toml"
    config.write_text(TOML)
    command = [sys.executable, "-c", SCRIPT, str(config)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment)
    broken, rng, kills = tmp_path / "broken", random.Random(0), 0
    for wanted in (1, 3):
        process = subprocess.Popen([*command, str(broken)], env=environment)
        while process.poll() is None and len(run_dir.read_metrics(broken)) <= wanted:
            time.sleep(0.02)
        time.sleep(rng.random())
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    subprocess.run([*command, str(broken)], check=True, env=environment)
    whole, found = ((tmp_path / d / run_dir.LEDGER).read_bytes() for d in ("whole", "broken"))
    assert whole == found
    one, other = (run_dir.read_summary(tmp_path / d) for d in ("whole", "broken"))
    assert one is not None
    assert other is not None
    assert one["metrics"] == other["metrics"]
    assert [r["round"] for r in run_dir.read_metrics(broken)] == list(range(6))


def other_architecture(folder: Path) -> Path:
    """An untrained model of another size and family with tiny's tokenizer."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(models.ASSETS / "tiny")
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    models.save_model(model, tokenizer, folder)
    return folder


def test_two_architectures_in_one_swarm(tmp_path: Path) -> None:
    other = other_architecture(tmp_path / "other")
    experiment = small(
        model__others=[str(other)], defence__level="text", attack__name="text", swarm__plan="horizontal",
        swarm__iterations=2,
    )  # fmt: skip
    summary = local_swarm.run_swarm(experiment, tmp_path / "run")
    assert summary["model"]["name"] == f"tiny, {other}"
    rows = run_dir.read_metrics(tmp_path / "run")
    assert rows[-1]["round"] == 2
    assert all(row["honest_rejected_rate"] is not None for row in rows[1:])
    by_model = summary["honest_rejected_by_model"]
    assert set(by_model) == {"tiny", str(other)}
    assert summary["metrics"]["honest_rejected_worst_model"] == max(by_model.values())


@dataclass(frozen=True)
class Partial:
    """Refuses all that some nodes send: stands for a screen that errs on differently trained peers."""

    against: frozenset[str]
    name: str = "partial"

    def screen(self, pool: Pool, state: State) -> tuple[list[Verdict], State]:
        return [
            say(c, self.name, Reason.ENRICHMENT, "is of another kind") if c.participant in self.against
            else say(c, self.name)
            for c in pool.completions
        ], state  # fmt: skip


def test_refusals_are_counted_by_the_model_of_who_was_refused(tmp_path: Path) -> None:
    """The mean over all honest nodes hides what a differently trained peer loses."""
    other = str(other_architecture(tmp_path / "other"))
    world = world_of(small(model__others=[other], defence__level="none"))
    found = gathered_of(world)
    strangers = frozenset(n for n, kind in world.kind_of.items() if kind == other)
    learnt = {}
    for kind, learner in world.learners.items():  # each refuses the other's
        against = strangers if kind == "tiny" else frozenset()
        learner.defence = replace(learner.defence, screens=(Partial(against),))
        _, learnt[kind] = learner.learn(found, Memory())
    row = round_row(1, "math", world.settings, learnt, world.malicious, world.memory, world.kind_of)
    assert row["honest_rejected_by_model"] == {"tiny": 0.0, other: 1.0}
    assert 0 < row["honest_rejected_rate"] < 0.5
    alone = {"tiny": learnt["tiny"]}
    same = dict.fromkeys(world.nodes, "tiny")
    one = round_row(1, "math", world.settings, alone, world.malicious, world.memory, same)
    assert one["honest_rejected_by_model"] == {"tiny": one["honest_rejected_rate"]}


def test_equal_weights_are_needed_where_margins_are_compared() -> None:
    with pytest.raises(ConfigError, match="needs equal weights"):
        small(model__others=["tiny"], defence__level="seeded")
    with pytest.raises(ConfigError, match="logit needs equal weights"):
        small(model__others=["tiny"], defence__screens=["schema", "logit"])


def test_no_screens_at_all_is_said_by_level_none() -> None:
    with pytest.raises(ConfigError, match="level = none"):
        small(defence__screens=[])


def test_unknown_screens_and_parameters_are_named() -> None:
    base = models.load("tiny", "float32")
    for changes, message in (
        ({"defence__screens": ["nope"]}, "unknown screen 'nope'"),
        ({"defence__params": {"seeded": {"nope": 1}}}, "nope"),
        ({"defence__params": {"logit": {}}}, "is not among the screens"),
    ):
        experiment = small(**changes)
        practice = build.make_practice(experiment, base, "r")
        with pytest.raises(ConfigError, match=message):
            build.make_learner(experiment, base, practice)


def test_parameters_of_a_task_come_from_the_configuration(tmp_path: Path) -> None:
    plain = SwarmExperiment()
    assert "params" not in plain.task.model_dump(), "runs of before they could be set keep their name"
    (tmp_path / "x.toml").write_text('wing = "swarm"\n[task.params]\ntrain = 50\nheldout = 7\n')
    loaded = config.load(tmp_path / "x.toml")
    assert isinstance(loaded, SwarmExperiment)
    assert config.parse_any(json.loads(loaded.model_dump_json())) == loaded != plain
    base = models.load("tiny", "float32")
    task = build.make_practice(loaded, base, "r").task
    assert (len(task.train), len(task.heldout)) == (50, 7)
    for setting, says in (("task.params.rows=3", "known: train, heldout"), ("task.params.train='x'", "whole number")):
        with pytest.raises(ConfigError, match=says):
            build.make_task(config.assign(plain, setting))


def test_rollouts_of_other_rounds_and_runs_do_not_count() -> None:
    world = world_of(small())
    found = gathered_of(world)
    one = found.completions[0]
    plan = local_swarm.plan_of(world, 2)
    sha256 = swarm_world.model_sha256(world)
    replayed = Rollout(participant=one.participant, round=1, model_sha256=sha256, completions=found.completions[:1])
    other_run = encode_rollout(replayed, run="another")
    for message in (encode_rollout(replayed, run=world.rules.run), other_run):
        refused = gather({one.participant: message}, plan, world.rules).refused
        assert {r.reason for r in refused if r.participant == one.participant} == {Reason.WRONG_ROUND}
