"""What the bench of costs compares is the same work: same tokens, same losses, same gradients; shares are of what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from assay.bench import cost_local, cost_screens, cost_swarm, cost_verdict, costs, table_costs, tables, turns
from assay.bench.cost_settings import Settings
from assay.config import ConfigError
from assay.contribution import flatten
from assay.federated import defence

SMALL = Settings(
    model="tiny", dtype="float32", repeats=1, clients=2, paper_steps=1, paper_batch=2, local_steps=2, prompts=2,
    group=4, max_tokens=12, lora_r=2, layers=1, bank=11,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def quiet(text: str) -> None:
    """Nobody watches."""


def test_fastest_turn_counts_and_a_share_is_of_its_own_pair() -> None:
    a, b = turns.Side([turns.Turn(2.0, 5), turns.Turn(4.0, 9)]), turns.Side([turns.Turn(8.0, 0), turns.Turn(10.0, 0)])
    found = turns.ratio("a / b", a, b, 0.3)
    assert (found["value"], found["spread"], found["met"]) == (0.25, [0.25, 0.4], True)
    assert turns.ratio("a / b", a, b, 0.3, least=True)["met"] is False
    assert turns.ratio("a / 10 b", a, b, part=0.1)["value"] == pytest.approx(0.025)
    assert a.memory_bytes == 9


def test_a_call_that_measures_itself_is_believed_and_the_first_turn_is_not_counted() -> None:
    calls: list[str] = []
    sides = turns.take({"own": lambda: turns.Turn(7.0, 3), "plain": lambda: calls.append("x")}, 2, quiet)
    assert [turn.seconds for turn in sides["own"].turns] == [7.0, 7.0]
    assert len(calls) == 3
    assert len(sides["plain"].turns) == 2


def test_flops_of_a_step_are_six_a_trained_parameter_and_token() -> None:
    from assay import models

    model = models.load("tiny", "float32").model
    head = model.get_output_embeddings().weight
    inner = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and p is not head and "embed" not in n)
    frozen = turns.model_flops(model, 10, 3, 0)
    assert frozen == 4 * inner * 10 + 4 * head.numel() * 3
    model.requires_grad_(True)
    assert turns.model_flops(model, 10, 3, 0) == pytest.approx(1.5 * frozen)
    config = model.config
    attention = 12 * config.num_hidden_layers * config.hidden_size * 7
    assert turns.model_flops(model, 0, 0, 7) == pytest.approx(attention)
    assert turns.matmul_peak(torch.float32, size=64, seconds=0.0) > 0


def test_both_local_trainings_see_the_same_tokens_and_end_at_the_same_adapter() -> None:
    both = cost_local.setting(SMALL)
    mine = both.ours()
    trainer = both.theirs()
    for attention in ("eager", "sdpa"):
        turn = trainer.run(attention)
        assert turn.seconds > 0
        assert trainer.losses == pytest.approx(mine.losses, rel=1e-4)
        theirs = both.carrier.get()
        moved = np.linalg.norm(flatten(mine.tensors) - flatten(both.start))
        assert np.linalg.norm(flatten(theirs) - flatten(mine.tensors)) < 0.02 * moved
    assert trainer.tokens == sum(len(row.ids) for rows in both.batches() for row in rows)
    assert both.ours().losses == mine.losses, "the Trainer must leave the model as it was"


def test_both_grpo_steps_take_the_same_gradient_of_the_same_tokens() -> None:
    pytest.importorskip("trl")
    from assay.bench import peers

    bench = cost_swarm.make(SMALL)
    learner, trainer = bench.learner(), cost_swarm.rival(bench)
    start = {n: p.detach().clone() for n, p in learner.parameters.items()}
    _, learnt = learner.learn(bench.gathered, cost_swarm.Memory())
    assert list(learnt.judged.weight_N) == [1.0] * len(bench.ids)
    assert list(learnt.pool.rewards) == bench.rewards
    trainer.step("eager")
    assert trainer.tokens == sum(map(len, bench.ids))
    mine, theirs = peers.momentum(learner.model, learner.optimizer), trainer.gradient()
    assert mine.keys() == theirs.keys() == start.keys()
    apart = sum(float((mine[n] - theirs[n]).square().sum()) for n in mine)
    size = sum(float(mine[n].square().sum()) for n in mine)
    assert (apart / size) ** 0.5 < 1e-4
    assert size > 0


def test_checks_of_the_bench_are_those_of_the_learner() -> None:
    bench = cost_swarm.make(SMALL)
    checked = bench.learner(("seeded", "logit"))
    assert {s.name for s in checked.defence.model_screens} == {"seeded", "logit"}
    judged = cost_swarm.look(bench, checked, cost_swarm.scored(bench, checked), bench.practice.pool(bench.gathered))
    assert list(judged.weight_N) == [1.0] * len(bench.ids), "the model's own completions pass"
    assert len(judged.verdicts) == 2 * len(bench.ids)
    _, learnt = checked.learn(bench.gathered, cost_swarm.Memory())
    assert [v.evidence for v in judged.verdicts] == [v.evidence for v in learnt.judged.verdicts if v.screen != "schema"]


@pytest.mark.slow
def test_shares_of_a_round_are_of_its_stages(cache: Path) -> None:
    found = cost_screens.screening(SMALL, quiet)
    seconds = {row["name"]: row["seconds"] for row in found["rows"]}
    training = next(s for name, s in seconds.items() if name.startswith("training, 2 clients"))
    stages = {name: s for name, s in seconds.items() if not name.startswith("training")}
    assert set(stages) == set(defence.LEVELS["submitted"])
    shares = [one["value"] for one in found["ratios"]]
    assert shares[0] == pytest.approx(sum(stages[name] for name in cost_screens.FILTERS) / training)
    assert shares[1] == pytest.approx((stages["canary"] + stages["gate"]) / training)
    assert shares[2] == pytest.approx(sum(stages.values()) / training)


def test_rollouts_of_both_are_the_same_tokens_where_nothing_is_drawn() -> None:
    bench = cost_swarm.make(SMALL)
    mine = cost_swarm.draw(bench, top_k=1)
    assert {len(ids) for ids in mine} == {SMALL.max_tokens}
    assert cost_swarm.transformers_draw(bench, "eager", top_k=1) == mine
    drawn = cost_swarm.transformers_draw(bench, "sdpa")
    assert {len(ids) for ids in drawn} == {SMALL.max_tokens}


def test_a_verdict_on_a_folder_is_a_verdict_of_every_screen() -> None:
    found = cost_verdict.verdict(Settings(repeats=1, layers=1, lora_r=2, bank=11), quiet)
    names = {row["name"] for row in found["rows"]}
    for name in ("norm", "probe", "neighbours"):
        assert f"screen, float32: {name}" in names
        assert f"federated: {name}" in names
    assert found["values"] == 2 * sum(sum(shape) for shape in cost_verdict.MODULES.values())
    assert all(len(row["all_seconds"]) == 1 for row in found["rows"])


def test_parts_are_kept_and_stand_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "costs.json"
    calls: list[str] = []

    def counted(name: str) -> costs.Part:
        def measure(settings: Settings, say: turns.Say) -> dict[str, object]:
            calls.append(name)
            row = turns.Side([turns.Turn(1.0, 10**6)]).row(name)
            return {"rows": [row], "ratios": [turns.told(f"{name} ratio", 0.5, 1.0)]}

        return costs.Part(name, measure)

    monkeypatch.setattr(costs, "PARTS", {name: counted(name) for name in costs.PARTS})
    costs.run(SMALL, ["verdict"], path, "assay bench costs", quiet)
    found = costs.run(SMALL, [], path, "assay bench costs", quiet)
    assert sorted(calls) == sorted(costs.PARTS), "the part that was there is not measured again"
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    text = tables.table(found)
    assert all(f"{name} ratio" in text for name in costs.PARTS)
    with pytest.raises(ConfigError, match="other settings"):
        costs.run(Settings(), ["grpo"], path, "assay bench costs", quiet)
    monkeypatch.setattr(costs.run_dir, "commit", lambda: "another")
    again = costs.run(SMALL, ["grpo"], path, "assay bench costs", quiet)
    assert (calls.count("grpo"), calls.count("local")) == (2, 1), "of another commit only what is asked for is measured"
    assert again["parts"].keys() == found["parts"].keys()
    with pytest.raises(ConfigError, match="--only"):
        costs.run(SMALL, ["nope"], path, "", quiet)
    path.write_text('{"wing": "soak"}')
    with pytest.raises(ConfigError, match="other results"):
        costs.run(SMALL, [], path, "", quiet)


def test_the_table_says_what_is_missed() -> None:
    part = {
        "commit": "abc", "threads": 2, "told": "x", "wall_seconds": 1.0, "rows": [],
        "ratios": [turns.told("slow", 2.0, 1.0, spread=[1.5, 2.5]), turns.told("no target", 0.1234)],
    }  # fmt: skip
    text = table_costs.costs(costs.results(SMALL, {"grpo": part}, "assay bench costs"))
    (slow,) = [line for line in text.splitlines() if line.startswith("| grpo | slow |")]
    assert "no" in slow.split("|")[-2]
    assert "not measured yet: screening" in text
