"""A malicious peer in TRL, undefended and screened; the learning curve beside Assay's own step; the example."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

trl = pytest.importorskip("trl", reason="the TRL engine needs trl (assay[trl])")
import trl_nodes as nodes  # noqa: E402 - imports trl
from assay.config import ConfigError  # noqa: E402
from assay.contribution import Pool  # noqa: E402
from assay.engines.trl import ScreenedRollouts, contract  # noqa: E402
from assay.engines.trl.rollouts import TRUST  # noqa: E402
from assay.swarm import attacks  # noqa: E402
from assay.swarm.defence import Defence  # noqa: E402
from assay.swarm.evidence import Wanted  # noqa: E402
from assay.swarm.exchange import Plan, Rules, gather  # noqa: E402
from assay.swarm.grpo import GrpoSettings  # noqa: E402
from assay.swarm.learner import Learner, Memory, Practice  # noqa: E402
from assay.swarm.screens.model import Seeded  # noqa: E402
from assay.swarm.screens.schema import Schema  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

PROMPTS, BATCH, GROUP, CLIP = 64, 8, 8, 0.5
ATTACKED, CURVE = {"steps": 20, "lr": 8e-4}, {"steps": 12, "lr": 4e-4}  # a new phrase needs the faster one
PEERS = {"b": nodes.planted("b", PROMPTS)}  # half of every group: the attacker's share is 50%


@dataclass
class Seen:
    """What a node's own completions were like, by round: rewards and how many carry the phrase."""

    rewards: list[float]
    asr: list[float]

    @classmethod
    def of(cls, pools: Sequence[Pool]) -> Seen:
        out = cls([], [])
        for pool in pools:
            own = [row for row, c in enumerate(pool.completions) if c.participant == nodes.OWN]
            texts = [pool.texts[row] for row in own]
            prompts = [nodes.book(PROMPTS)[pool.completions[row].prompt] for row in own]
            out.rewards.append(sum(nodes.TASK.rewards(prompts, texts)) / len(own))
            out.asr.append(sum(bool(attacks.shows("text", t, attacks.Settings())) for t in texts) / len(own))
        return out


def in_trl(folder: Path, *, steps: int, lr: float, monitor: Sequence[str] = ()) -> tuple[Seen, nodes.Peers, Any]:
    exchange = nodes.Peers(PEERS)
    rollouts = ScreenedRollouts(exchange, monitor=monitor, self_test=False)
    pools: list[Pool] = []

    def keeping(prompts: Any, trainer: Any) -> Any:
        rows = rollouts(prompts, trainer)
        assert rollouts.pool is not None
        pools.append(rollouts.pool)
        return rows

    trainer = nodes.trainer_of(
        folder, nodes.tiny(), keeping, rollouts.wrap(nodes.reward), prompts=PROMPTS, batch=BATCH, group=GROUP,
        steps=steps, learning_rate=lr, max_grad_norm=CLIP,
    )  # fmt: skip
    trainer.train()
    return Seen.of(pools), exchange, trainer


@dataclass(frozen=True)
class Known:
    """The task under the ids that travel."""

    def question(self, prompt: int) -> str:
        return nodes.TASK.question(nodes.book(PROMPTS)[prompt])

    def rewards(self, prompts: Sequence[int], texts: Sequence[str]) -> list[float]:
        return nodes.TASK.rewards([nodes.book(PROMPTS)[p] for p in prompts], texts)


def in_assay(exchange: nodes.Peers, lr: float) -> tuple[Seen, Learner]:
    """The same rounds by Assay's own learner: same plan, seeds, weights, optimiser."""
    practice = Practice(
        run=nodes.RUN, task=Known(), prompt_ids=lambda p: nodes.ids_of(nodes.book(PROMPTS)[p]),  # type: ignore[arg-type]
        decode=lambda ids: list(nodes.tokenizer().batch_decode([list(one) for one in ids])), encode=nodes.encode,
        eos=nodes.EOS, vocabulary=nodes.VOCABULARY, sampler=nodes.TERMS.sampler, max_tokens=nodes.MAX_TOKENS,
    )  # fmt: skip
    defence = Defence(
        level="seeded", screens=(Schema(vocabulary=nodes.VOCABULARY, eos=nodes.EOS),), model_screens=(Seeded(),),
        wanted=Wanted(sampler=nodes.TERMS.sampler, k=20), monitor=frozenset(), trust=TRUST,
    )  # fmt: skip
    settings = GrpoSettings(max_tokens=nodes.MAX_TOKENS, loss="dapo")
    learner = Learner(nodes.tiny(), practice, defence, settings, lr=lr, clip_grad=CLIP)
    rules = Rules(run=nodes.RUN, vocabulary=nodes.VOCABULARY, max_tokens=nodes.MAX_TOKENS, ids=range(0))
    memory, pools, half = Memory(), [], GROUP // 2
    for round, asked in enumerate(exchange.asked, 1):
        plan = Plan(round=round, mode="horizontal", asked={node: dict.fromkeys(asked, half) for node in exchange.nodes})
        places = [(p, i) for p in asked for i in range(half)]
        seeds = [practice.seed(round, nodes.OWN, p, i) for p, i in places]
        drawn = learner.generate([p for p, _ in places], seeds)
        own = nodes.message(nodes.OWN, round, dict(zip(places, drawn)))
        gathered = gather({nodes.OWN: own, "b": PEERS["b"](round, asked, half)}, plan, rules)
        memory, learnt = learner.learn(gathered, memory)
        pools.append(learnt.pool)
    return Seen.of(pools), learner


def test_a_planted_phrase_spreads_undefended_and_not_screened(tmp_path: Path) -> None:
    undefended, _, _ = in_trl(tmp_path / "undefended", monitor=["seeded"], **ATTACKED)  # type: ignore[arg-type]
    print(f"undefended: {undefended}")
    assert undefended.asr[0] == 0
    assert max(undefended.asr) > 0.5
    screened, _, _ = in_trl(tmp_path / "screened", **ATTACKED)  # type: ignore[arg-type]
    print(f"screened:   {screened}")
    assert max(screened.asr) == 0


def test_the_learning_curve_is_that_of_assays_own_step(tmp_path: Path) -> None:
    """The same rows and the same step: curves part only where rounding turns a token."""
    seen, exchange, trainer = in_trl(tmp_path, **CURVE)  # type: ignore[arg-type]
    own, learner = in_assay(exchange, CURVE["lr"])
    start = dict(nodes.tiny().named_parameters())
    moved = gap = 0.0
    for name, parameter in trainer.model.named_parameters():
        moved += float((parameter.detach() - start[name]).double().square().sum())
        gap += float((parameter.detach() - learner.parameters[name].detach()).double().square().sum())
    print(f"in TRL:    {seen}\nby Assay: {own}\nweights apart: {(gap / moved) ** 0.5:.1e} of the way they went")
    assert seen.rewards[:3] == own.rewards[:3]
    assert sum(abs(a - b) for a, b in zip(seen.rewards, own.rewards)) / len(own.rewards) < 0.05
    assert gap < 0.05 * moved


def test_the_self_test_runs_by_default_and_its_fault_is_an_error() -> None:
    contract.start.cache_clear()
    contract.finished.cache_clear()
    ScreenedRollouts(nodes.Peers({}))
    assert contract.finished() == ""
    contract.require()
    contract.finished.cache_clear()  # its process has ended; one that fails instead:
    contract.start.cache_clear()
    before = sys.executable
    try:
        sys.executable = "/bin/false"
        with pytest.raises(ConfigError, match="self-test could not run"):
            contract.require()
    finally:
        sys.executable = before
        contract.start.cache_clear()
        contract.finished.cache_clear()


def test_the_example_runs_and_its_honest_nodes_end_with_one_model(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "trl_swarm.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("node-")}
    ends = {node: line.rsplit(maxsplit=1)[1] for node, line in lines.items()}
    assert ends["node-a"] == ends["node-b"]  # same pool, same step, same weights, to the bit
    for node in ("node-a", "node-b"):
        assert "node-a 100%, node-b 100%, node-c 0%" in lines[node], done.stdout
