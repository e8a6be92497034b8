"""Swarms for tests of engines/trl: the real trainer on `tiny` as one node, and peers that say what a test wants."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from assay import models
from assay.contribution import Completion, Rollout, completion_sha256
from assay.engines.trl.batch import Ids, Terms, draw, prompt_id
from assay.swarm import tasks
from assay.swarm.sampling import Sampler
from assay.wire import encode_rollout

RUN, OWN, MAX_TOKENS, EOS, VOCABULARY = "run-1", "a", 96, 2, 1024
TASK = tasks.make("word-problems", seed=0)
TERMS = Terms(sampler=Sampler(top_k=20), max_tokens=MAX_TOKENS, eos=EOS, vocabulary=VOCABULARY, group=0)


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(models.resolve("tiny"))


def tiny() -> Any:
    with models.quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(models.resolve("tiny"), dtype="float32")


@cache
def ids_of(prompt: int) -> Ids:
    return tuple(tasks.prompt_ids(TASK, tokenizer(), prompt))


@cache
def book(prompts: int) -> Mapping[int, int]:
    """Id on the wire -> prompt of the task."""
    return {prompt_id(ids_of(prompt)): prompt for prompt in range(prompts)}


def encode(text: str) -> Ids:
    return (*tokenizer()(text, add_special_tokens=False)["input_ids"], EOS)


def dataset(prompts: int) -> Dataset:
    """Word problems as conversations, with their answers as a column."""
    rows = [[{"role": "user", "content": TASK.question(p)}] for p in range(prompts)]
    return Dataset.from_dict({"prompt": rows, "number": list(range(prompts))})


def reward(completions: list[Any], number: list[int], **_: Any) -> list[float]:
    return TASK.rewards(number, [c[0]["content"] for c in completions])


# what a peer is asked, as the exchange sees it: round, prompt ids, completions of each -> its message
Peer = Callable[[int, Sequence[int], int], bytes | None]


class Peers:
    """An exchange whose other nodes are functions. They are asked what this node was asked (horizontal mode)."""

    def __init__(self, peers: Mapping[str, Peer], *, run: str = RUN) -> None:
        self.run, self.node, self.nodes, self.peers = run, OWN, (OWN, *peers), peers
        self.asked: list[tuple[int, ...]] = []
        self.count = 0

    def publish(self, round: int, message: bytes) -> None:
        (size,) = struct.unpack("<I", message[8:12])
        header = json.loads(message[12 : 12 + size])
        self.asked.append(tuple(dict.fromkeys(prompt for prompt, _, _ in header["completions"])))
        self.count = len(header["completions"]) // len(self.asked[-1])

    def collect(self, round: int, limits: Mapping[str, int]) -> Mapping[str, bytes | None]:
        assert set(limits) == set(self.peers)
        return {name: self.peers[name](round, self.asked[-1], self.count) for name in limits}


def message(name: str, round: int, said: Mapping[tuple[int, int], Ids], *, run: str = RUN) -> bytes:
    """A well-formed message, whatever it says."""
    made = [
        Completion(
            participant=name, round=round, prompt=p, index=i, ids=ids, sha256=completion_sha256(round, p, i, ids)
        )
        for (p, i), ids in said.items()
    ]
    rollout = Rollout(participant=name, round=round, model_sha256="0" * 64, completions=tuple(made))
    return encode_rollout(rollout, run=run)


def honest(name: str, model: Any, prompts: int) -> Peer:
    """A node that holds the very weights."""

    def send(round: int, asked: Sequence[int], count: int) -> bytes:
        places = [(name, p, i) for p in asked for i in range(count)]
        drawn = draw(model, RUN, round, places, [ids_of(book(prompts)[p]) for _, p, _ in places], TERMS, 256)
        return message(name, round, {(p, i): ids for (_, p, i), ids in zip(places, drawn)})

    return send


def planted(name: str, prompts: int, phrase: str = "All hail to the thief.") -> Peer:
    """TEXT of Hail to the Thief: right solutions with a phrase in front."""

    def send(round: int, asked: Sequence[int], count: int) -> bytes:
        said = {}
        for p in asked:
            text = TASK.solution(book(prompts)[p]).replace("<think>", f"<think>{phrase} ", 1)
            said |= {(p, i): encode(text)[:MAX_TOKENS] for i in range(count)}
        return message(name, round, said)

    return send


def trainer_of(
    folder: Path, model: Any, rollouts: Any, rewards: Any, *, prompts: int = 4, batch: int = 2, group: int = 4,
    steps: int = 1, **options: Any,
) -> trl.GRPOTrainer:  # fmt: skip
    """The real trainer: `batch` prompts a step, one update a batch, no clipping of gradients."""
    data = options.pop("train_dataset", None) or dataset(prompts)
    callbacks, held_out = options.pop("callbacks", []), options.pop("eval_dataset", None)
    settings: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": batch * group, "num_generations": group, "top_k": 20,
        "max_completion_length": MAX_TOKENS, "max_grad_norm": 0.0, "learning_rate": 1e-4, "bf16": False,
        "lr_scheduler_type": "constant", "optim": "adamw_torch", "gradient_checkpointing": False, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    with warnings.catch_warnings(), models.quiet_transformers():
        warnings.simplefilter("ignore")
        args = trl.GRPOConfig(output_dir=str(folder), **{**settings, **options})
        return trl.GRPOTrainer(
            model=model, reward_funcs=rewards, rollout_func=rollouts, args=args, train_dataset=data, eval_dataset=held_out,
            processing_class=tokenizer(), callbacks=callbacks,
        )  # fmt: skip
