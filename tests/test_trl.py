"""TRL's real GRPOTrainer on `tiny`: what it learns is what Assay admits, whatever peers send."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from assay import ledger
from assay.config import ConfigError
from assay.verdict import Reason

trl = pytest.importorskip("trl", reason="the TRL engine needs trl (assay[trl])")
import trl_nodes as nodes  # noqa: E402 - imports trl
from assay.engines.trl import FolderExchange, Hub, ScreenedRollouts, contract  # noqa: E402
from assay.engines.trl.batch import lay_out, prompt_id  # noqa: E402
from assay.engines.trl.exchanges import read_bounded  # noqa: E402
from assay.engines.trl.rewards import Columns, Settled, wrapped  # noqa: E402
from assay.swarm import grpo  # noqa: E402
from assay.swarm.screens.arithmetic import Arithmetic  # noqa: E402
from assay.swarm.screens.imports import Imports  # noqa: E402
from assay.swarm.screens.model import Logit, Seeded  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class Gradients(TrainerCallback):
    """Copies the gradient just before each optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})


class Given:
    """Stands between Assay and the trainer and keeps every batch of rows the trainer was given."""

    def __init__(self, rollouts: ScreenedRollouts) -> None:
        self.rollouts, self.batches = rollouts, []

    def __call__(self, prompts: Any, trainer: Any) -> Any:
        self.batches.append(self.rollouts(prompts, trainer))
        return self.batches[-1]


def play(
    folder: Path, peers: dict[str, nodes.Peer], *, screens: Any = None, model: Any = None, rewards: Any = nodes.reward,
    mode: Any = "horizontal", **options: Any,
) -> tuple[ScreenedRollouts, Given, Gradients, Any]:  # fmt: skip
    """One short training; the model is made anew unless given."""
    rollouts = ScreenedRollouts(nodes.Peers(peers), screens, mode=mode, self_test=False, ledger=folder / "run")
    given, gradients = Given(rollouts), Gradients()
    trainer = nodes.trainer_of(
        folder, model or nodes.tiny(), given, rollouts.wrap(rewards), callbacks=[gradients], **options
    )
    trainer.train()
    return rollouts, given, gradients, trainer


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], factor: float = 1.0) -> float:
    size = sum(float(g.double().square().sum()) for g in expected.values())
    gap = sum(float((factor * found[n].double() - g.double()).square().sum()) for n, g in expected.items())
    assert size > 0, "nothing was learnt, so nothing is compared"
    return float((gap / size) ** 0.5)


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "factor", "said"), [("dapo", 1.0, 2), ("grpo", 1.5, 1)])
def test_refused_rows_have_no_gradient(tmp_path: Path, loss: str, factor: float, said: int) -> None:
    """As if c had never been of the swarm; TRL's grpo still divides by its rows (six for four)."""
    model = nodes.tiny()
    two = {"b": nodes.honest("b", model, 4)}
    options = {"loss_type": loss, "learning_rate": 0.0, "model": model}
    _, _, absent, _ = play(tmp_path / "0", two, group=4, **options)
    seen = []
    for at, phrase in enumerate(("All hail to the thief.", "Whatever.")[:said]):
        peers = {**two, "c": nodes.planted("c", 4, phrase)}
        rollouts, given, gradients, _ = play(tmp_path / str(at + 1), peers, group=6, **options)
        assert rollouts.metrics["assay/admitted/c"] == 0
        assert rollouts.metrics["assay/admitted/b"] == 1
        assert sum(mask == [0] for mask in given.batches[0]["env_mask"]) == 4
        assert apart(gradients.steps[0], absent.steps[0], factor) < 1e-6
        seen.append(gradients.steps[0])
    assert all(torch.equal(seen[0][name], seen[-1][name]) for name in seen[0])  # not a bit hangs on what c says


def test_advantages_are_assays_over_admitted_rows(tmp_path: Path) -> None:
    model = nodes.tiny()
    peers = {"b": nodes.honest("b", model, 8), "c": nodes.planted("c", 8)}

    def graded(completions: list[Any], number: list[int], **_: Any) -> list[float]:
        return [r + len(c[0]["content"]) / 1000 for r, c in zip(nodes.reward(completions, number), completions)]

    _, given, _, trainer = play(tmp_path, peers, rewards=[graded, nodes.reward], prompts=8, batch=4, group=6)
    rows, (first, second) = given.batches[0], trainer._logs["rewards"].values()
    weight = torch.tensor([float(mask != [0]) for mask in rows["env_mask"]])
    assert weight.sum() == 16
    reward = torch.tensor(list(first), dtype=torch.float64) + torch.tensor(list(second), dtype=torch.float64)
    assert torch.equal(reward.isnan(), weight == 0)  # None from every function
    expected = grpo.advantages(reward, torch.arange(24) // 6, weight)
    assert list(trainer._logs["advantages"]) == pytest.approx(expected.tolist(), abs=1e-6)
    assert expected.abs().max() > 0.5


def test_bad_examples_stay_with_no_reward_and_masked_rows_do_not(tmp_path: Path) -> None:
    """Unequal weights: a peer's wrong sum is a bad example, not an absent row."""

    def wrong(round: int, asked: Any, count: int) -> bytes:
        said = {}
        for p in asked:
            answer = nodes.TASK.answer(nodes.book(4)[p])
            text = f"<think>2+2=5.</think><answer>{answer}</answer>"
            said |= {(p, i): nodes.encode(text) for i in range(count)}
        return nodes.message("b", round, said)

    rollouts, given, _, trainer = play(tmp_path, {"b": wrong}, screens=[Arithmetic()])
    assert rollouts.metrics["assay/admitted/b"] == 1
    assert rollouts.metrics["assay/no_reward"] >= 0.5
    peer_rows = [r for r in range(8) if r % 4 >= 2]
    assert all(set(given.batches[0]["env_mask"][r]) == {1} for r in peer_rows)
    (rewards,) = trainer._logs["rewards"].values()
    assert [rewards[r] for r in peer_rows] == [0.0] * 4
    assert "assay/no_reward" in trainer.state.log_history[0]


# --- what hostile peers send -----------------------------------------------------------------------------------------


def hostile(round: int, asked: Any, count: int) -> bytes | None:
    """A different lie in every round; `CORPUS` says which, and what Assay calls it."""
    places = [(p, i) for p in asked for i in range(count)]
    fine = {place: (5, 6, 7, nodes.EOS) for place in places}
    return CORPUS[round - 1][1](round, places, fine)


def raw(round: int, places: Any, ids: list[int], tokens: int) -> bytes:
    """A message whose header claims `tokens` ids for each completion."""
    import struct

    from assay.wire.envelope import join
    from assay.wire.rollout import FORMAT, MAGIC

    header = {
        "format": FORMAT, "participant": "b", "run": nodes.RUN, "round": round, "model_sha256": "0" * 64,
        "sha256": "0" * 64, "completions": [[p, i, tokens] for p, i in places],
    }  # fmt: skip
    return join(MAGIC, header, [struct.pack(f"<{len(ids)}I", *ids)] * len(places))


CORPUS: list[tuple[Reason, Any]] = [
    (Reason.SEEDED, lambda r, at, fine: nodes.message("b", r, fine)),
    (Reason.OUT_OF_RANGE, lambda r, at, fine: nodes.message("b", r, dict.fromkeys(fine, (5, nodes.VOCABULARY)))),
    (Reason.MALFORMED, lambda r, at, fine: raw(r, at, [], 0)),
    (Reason.TOO_LARGE, lambda r, at, fine: nodes.message("b", r, dict.fromkeys(fine, (5,) * (nodes.MAX_TOKENS + 1)))),
    (Reason.TOO_LARGE, lambda r, at, fine: b"ASSAYRO1" + b"\xff" * 200_000),
    (Reason.WRONG_PROMPT, lambda r, at, fine: nodes.message("b", r, {(p ^ 1, i): x for (p, i), x in fine.items()})),
    (Reason.OUT_OF_RANGE, lambda r, at, fine: nodes.message("b", r, {(p, i + 9): x for (p, i), x in fine.items()})),
    (Reason.WRONG_PARTICIPANT, lambda r, at, fine: nodes.message("a", r, fine)),
    (Reason.WRONG_ROUND, lambda r, at, fine: nodes.message("b", r + 1, fine)),
    (Reason.WRONG_ROUND, lambda r, at, fine: nodes.message("b", r, fine, run="other")),
    (Reason.MALFORMED, lambda r, at, fine: b"\x80\x04cos\nsystem\n."),
    (Reason.MISSING, lambda r, at, fine: None),
    (Reason.MALFORMED, lambda r, at, fine: nodes.message("b", r, dict.fromkeys(fine, (nodes.EOS, 5, nodes.EOS)))),
]  # fmt: skip


def test_hostile_rows_never_reach_the_trainer(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(completions: list[Any], number: list[int], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.append(len(completions))
        return nodes.reward(completions, number)

    steps = len(CORPUS)
    rollouts, given, _, trainer = play(
        tmp_path, {"b": hostile}, rewards=reward, prompts=2, batch=1, steps=steps, learning_rate=0.0
    )
    assert seen == [2] * steps  # own rows only
    for (reason, _), rows, logged in zip(CORPUS, given.batches, trainer.state.log_history):
        assert rows["completion_ids"][2:] == [[nodes.EOS]] * 2, reason
        assert rows["env_mask"][2:] == [[0]] * 2, reason
        assert all(set(mask) == {1} for mask in rows["env_mask"][:2])
        assert (logged["assay/admitted"], logged[f"assay/refused/{reason.value}"]) == (0.5, 0.5), reason
    assert rollouts.memory.trust["b"].banned
    assert not rollouts.memory.trust["a"].banned
    assert ledger.verify(tmp_path / "run" / "ledger.jsonl").ok
    kinds = [entry["kind"] for entry in ledger.Ledger(tmp_path / "run" / "ledger.jsonl").entries]
    assert kinds == ["start", *["round"] * steps, "end"]


def test_vertical_mode_shares_prompts_out() -> None:
    prompts = [(1, 2)] * 4 + [(3,)] * 4
    batch = lay_out(prompts, group=4, nodes=["b", "a"], mode="vertical", round=1)
    assert batch.plan.asked == {"a": {prompt_id((1, 2)): 4}, "b": {prompt_id((3,)): 4}}
    both = lay_out(prompts, group=4, nodes=["b", "a"], mode="horizontal", round=1)
    assert [node for node, _, _ in both.place_B] == ["a", "a", "b", "b"] * 2
    twice = lay_out([(1, 2)] * 8, group=4, nodes=["a", "b"], mode="vertical", round=1)  # equal prompts stay two
    assert len({prompt for _, prompt, _ in twice.place_B}) == 2
    with pytest.raises(ConfigError, match="cannot be shared by 3 nodes"):
        lay_out(prompts, group=4, nodes=["a", "b", "c"], mode="horizontal", round=1)
    with pytest.raises(ConfigError, match="does not repeat each prompt"):
        lay_out(prompts[:6], group=4, nodes=["a"], mode="vertical", round=1)


# --- the trainer's contract ------------------------------------------------------------------------------------------


class Deaf(trl.GRPOTrainer):
    """Takes a rollout_func and generates by itself."""

    def __init__(self, *args: Any, rollout_func: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class Blind(trl.GRPOTrainer):
    """Drops env_mask."""

    def __init__(self, *args: Any, rollout_func: Any = None, **kwargs: Any) -> None:
        def without(prompts: Any, trainer: Any) -> Any:
            return {k: v for k, v in rollout_func(prompts, trainer).items() if k != "env_mask"}

        super().__init__(*args, rollout_func=without, **kwargs)


class Generous(trl.GRPOTrainer):
    """Takes a reward of None for 0."""

    def __init__(self, *args: Any, reward_funcs: Any = None, **kwargs: Any) -> None:
        def never_none(**given: Any) -> Any:
            return [value or 0.0 for value in reward_funcs(**given)]

        super().__init__(*args, reward_funcs=never_none, **kwargs)


class Sparing(trl.GRPOTrainer):
    """Hands over each prompt once, as older releases do."""

    def __init__(self, *args: Any, rollout_func: Any = None, **kwargs: Any) -> None:
        def once(prompts: Any, trainer: Any) -> Any:
            rollout_func(list(dict.fromkeys(prompts)), trainer)
            return rollout_func(list(dict.fromkeys(prompts)) * contract.GROUP, trainer)

        super().__init__(*args, rollout_func=once, **kwargs)


class Old(trl.GRPOTrainer):
    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None) -> None: ...


def test_the_probe_passes_the_installed_trainer_and_names_what_another_ignores() -> None:
    assert contract.signature_fault(trl.GRPOTrainer) == "" == contract.behaviour_fault(trl.GRPOTrainer)
    assert "takes no rollout_func" in contract.signature_fault(Old)
    said = {
        Deaf: "ignores rollout_func",
        Blind: "ignores env_mask",
        Generous: "ignores a reward of None",
        Sparing: "does not hand rollout_func each prompt num_generations times",
    }
    for trainer_class, words in said.items():
        fault = contract.behaviour_fault(trainer_class)
        assert words in fault
        assert "\n" not in fault
        assert trainer_class.__name__ in fault


def test_wirings_that_would_screen_nothing_are_errors_before_the_first_step(tmp_path: Path) -> None:
    def attempt(match: str, *, rollout_func: Any = "own", rewards: Any = "wrapped", **options: Any) -> None:
        rollouts = ScreenedRollouts(nodes.Peers({"b": hostile}), self_test=False)
        rollout_func = rollouts if rollout_func == "own" else rollout_func
        rewards = rollouts.wrap(nodes.reward) if rewards == "wrapped" else rewards
        with pytest.raises(ConfigError, match=match) as caught:
            nodes.trainer_of(tmp_path, model, rollout_func, rewards, **options).train()
        assert "\n" not in str(caught.value)

    model = nodes.tiny()
    attempt("pass rollout_func=rollouts", rollout_func=None)
    attempt("unwrapped", rewards=nodes.reward)
    attempt("repetition_penalty", repetition_penalty=1.1)
    attempt("cannot be shared by 2 nodes", group=3)
    rollouts = ScreenedRollouts(nodes.Peers({}), self_test=False)
    with pytest.raises(ConfigError, match="ignores env_mask"):
        rollouts.wrap(nodes.reward)(completions=[], assay_row=[], env_mask=[])
    for wrong in ({"screens": [Seeded(), Seeded()]}, {"monitor": ["logit"]}, {"mode": "diagonal"}):
        with pytest.raises(ConfigError):
            ScreenedRollouts(nodes.Peers({}), self_test=False, **wrong)
    with pytest.raises(ConfigError, match="k between 1 and 1023"):
        play(tmp_path, {"b": hostile}, screens=[Logit()], top_k=0, model=model)
    with pytest.raises(ConfigError, match="reward functions"):
        rollouts.wrap(["Qwen/some-reward-model"])


def test_evaluation_exchanges_nothing_and_takes_rewards_as_they_are(tmp_path: Path) -> None:
    rollouts = ScreenedRollouts(nodes.Peers({"b": hostile}), self_test=False)
    trainer = nodes.trainer_of(
        tmp_path, nodes.tiny(), rollouts, rollouts.wrap(nodes.reward), eval_dataset=nodes.dataset(2),
        per_device_eval_batch_size=8,
    )  # fmt: skip
    trainer.evaluate()
    assert 0 <= trainer.state.log_history[-1]["eval_reward"] <= 1
    assert rollouts.round == 0
    assert rollouts.exchange.asked == []


def test_a_resumed_trainer_has_its_round_and_its_strikes(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "prompts": 2, "batch": 1}
    rollouts, _, _, _ = play(tmp_path, {"b": hostile}, steps=3, **saving)
    assert rollouts.round == 3
    assert rollouts.memory.trust["b"].banned
    again = ScreenedRollouts(nodes.Peers({"b": hostile}), self_test=False, ledger=tmp_path / "run")
    trainer = nodes.trainer_of(tmp_path, nodes.tiny(), again, again.wrap(nodes.reward), steps=4, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.round == 4
    assert again.memory.trust["b"].banned
    assert ledger.verify(tmp_path / "run" / "ledger.jsonl").ok
    (tmp_path / "checkpoint-3" / "assay.json").unlink()
    lost = ScreenedRollouts(nodes.Peers({"b": hostile}), self_test=False)
    trainer = nodes.trainer_of(tmp_path, nodes.tiny(), lost, lost.wrap(nodes.reward), steps=5, **saving)
    with pytest.raises(ConfigError, match="holds the round and the strikes"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_rewards_that_screens_read_are_worked_out_once(tmp_path: Path) -> None:
    """Imports reads rewards: both functions, one of them async, are called once a round, before TRL asks."""
    calls: list[tuple[str, int]] = []

    def right(completions: list[Any], number: list[int], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        calls.append(("right", len(completions)))
        log_extra("length", [len(c[0]["content"]) for c in completions])
        log_metric("asked", float(len(completions)))
        return nodes.reward(completions, number)

    async def short(completions: list[Any], trainer_state: Any, **_: Any) -> list[float | None]:
        calls.append(("short", len(completions)))
        return [None if len(c[0]["content"]) > 40 else -1.0 for c in completions]

    model = nodes.tiny()
    peers = {"b": nodes.honest("b", model, 4), "c": hostile}
    rollouts, given, _, trainer = play(
        tmp_path, peers, screens=[Seeded(), Imports()], rewards=[right, short], model=model, group=6
    )
    assert sorted(calls) == [("right", 8), ("short", 8)]
    assert trainer.state.log_history[0]["asked"] == 8
    first, second = (list(values) for values in trainer._logs["rewards"].values())
    for row, mask in enumerate(given.batches[0]["env_mask"]):
        assert (mask == [0]) == (first[row] != first[row] and trainer._logs["extra"]["length"][row] is None)
        assert mask != [0] or second[row] != second[row]
    assert rollouts.pool is not None
    assert len(rollouts.pool.completions) == 8


def test_wrapped_rewards_see_admitted_rows_only_and_cap_bad_examples() -> None:
    settled = Settled([1.0, None, 0.0, 0.0], {"assay/refused": 0.25})
    logged: dict[str, Any] = {}

    def plain(completions: list[str], column: list[int], whole: str, **_: Any) -> list[float | None]:
        assert completions == ["w", "y", "z"]
        assert column == [0, 2, 3]
        assert whole == "same"
        return [0.5, 0.5, -2.0]

    given: dict[str, Any] = {"completions": [*"wxyz"], "column": [0, 1, 2, 3], "whole": "same", "assay_row": [0] * 4}
    given["log_metric"] = logged.__setitem__
    assert wrapped(0, plain, lambda kwargs: settled)(**given) == [0.5, None, 0.0, -2.0]
    assert logged == {"assay/refused": 0.25}
    assert wrapped(0, plain, lambda kwargs: settled).__name__ == "plain"
    nobody = wrapped(0, plain, lambda kwargs: Settled([None] * 4))
    assert nobody(**given) == [None] * 4  # not called at all
    with pytest.raises(ValueError, match="returned 1 rewards for 3"):
        wrapped(0, lambda **_: [1.0], lambda kwargs: settled)(**given)


def test_columns_that_hang_on_more_than_the_prompt_are_an_error() -> None:
    from datasets import Dataset

    columns = Columns(Dataset.from_dict({"prompt": ["p", "q", "p"], "answer": [1, 2, 1]}))
    assert columns.of(["q", "p"]) == {"answer": [2, 1]}
    with pytest.raises(ConfigError, match="make prompts unique"):
        Columns(Dataset.from_dict({"prompt": ["p", "p"], "answer": [1, 2]}))
    with pytest.raises(ConfigError, match="not a stream"):
        Columns(iter([]))


# --- exchanges -------------------------------------------------------------------------------------------------------


def test_a_folder_gives_bytes_of_plain_files_and_nothing_else(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    held = {n: FolderExchange(tmp_path, run="r", node=n, nodes=names, timeout=0.0) for n in names}
    held["a"].publish(1, b"hello")
    held["b"].publish(1, b"x" * 100)
    folder = tmp_path / "r" / "round-000001"
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (folder / "c.rollout").symlink_to(secret)
    os.mkfifo(folder / "d.rollout")
    (folder / "e.rollout").mkdir()
    assert held["a"].collect(1, dict.fromkeys("bcdef", 10)) == {
        "b": b"x" * 11, "c": b"", "d": b"", "e": b"", "f": None,
    }  # fmt: skip
    assert held["b"].collect(1, {"a": 10}) == {"a": b"hello"}
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    assert read_bounded(tmp_path / "nothing", 5) is None
    for run, node, everybody in (("r", "z", names), ("../r", "a", names), ("r", "a", ["a", "a"]), ("r", ".", ["."])):
        with pytest.raises(ConfigError):
            FolderExchange(tmp_path, run=run, node=node, nodes=everybody)


def test_a_hub_waits_for_whom_it_can() -> None:
    hub = Hub(run="r", nodes=["a", "b", "c"], timeout=30.0)
    one, two = hub.seat("a"), hub.seat("b")
    later = threading.Thread(target=two.publish, args=(1, b"2"))
    later.start()
    assert one.collect(1, {"b": 10}) == {"b": b"2"}
    later.join()
    hub.timeout = 0.0
    assert one.collect(1, {"b": 10, "c": 10}) == {"b": b"2", "c": None}
