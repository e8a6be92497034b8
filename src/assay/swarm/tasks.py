"""What the swarm practises: prompts, the receiver's own answers, and the reward of a completion (1 or 0).

`make` knows `word-problems` and `programs` (built in, written by rule), `reasoning-gym:<dataset>`, `gsm8k` and
`openmath` (from the hub, or `gsm8k:rows.jsonl` in the set's own schema). Every node makes the same task from the same
name and seed, so a prompt travels as its id. Training and held-out prompts never share a question: a question's own
hash (`data.part_of`) says where it belongs, wherever a set does not bring its own test split.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

from assay import data
from assay.builtin import problems
from assay.config import ConfigError
from assay.swarm import task_sets
from assay.swarm.grading import final_answer, program, same
from assay.swarm.sandbox import Sandbox
from assay.swarm.task_sets import Problem

__all__ = ["Problem", "Task", "final_answer", "kind_of", "make", "program", "prompt_ids"]

Kind = Literal["math", "code"]
Style = Literal["plain", "instruct"]
ASK: Mapping[Kind, str] = {
    "math": "\nThink inside <think> and </think>, then write only the final answer inside <answer> and </answer>.",
    "code": "\nWrite a Python program inside <code> and </code>; the last line it prints must be the answer.",
}

KINDS: Mapping[type, str] = {int: "a whole number", str: "the path of a file"}


class Task(Protocol):
    """Prompts by id, and what a completion of one is worth.

    An id outside `train` and `heldout` is a KeyError: whoever takes ids from a peer asks `prompt in task.train` first.
    `solution` is for attackers with an oracle; nothing else may use it.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def train(self) -> range: ...
    @property
    def heldout(self) -> range: ...
    def question(self, prompt: int) -> str: ...
    def answer(self, prompt: int) -> str: ...
    def solution(self, prompt: int) -> str: ...
    def rewards(self, prompts: Sequence[int], texts: Sequence[str]) -> list[float]:
        """1.0 for each text that answers its prompt rightly in the format, else 0.0; never raises on a text."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemTask:
    """A task over problems by id. With a `sandbox` it is a code task: programs run there, one batch a call.

    `judge` (prompt, answer text) replaces the comparison of answers where a set brings its own.
    """

    name: str
    train: range
    heldout: range
    problem: Callable[[int], Problem]
    sandbox: Sandbox | None = None
    judge: Callable[[int, str], bool] | None = None

    @property
    def kind(self) -> Kind:
        return "math" if self.sandbox is None else "code"

    def question(self, prompt: int) -> str:
        return self._of(prompt).question

    def answer(self, prompt: int) -> str:
        return self._of(prompt).answer

    def solution(self, prompt: int) -> str:
        return self._of(prompt).solution

    def rewards(self, prompts: Sequence[int], texts: Sequence[str]) -> list[float]:
        given = self._printed(texts) if self.sandbox else [final_answer(text) for text in texts]
        right = self.judge or (lambda prompt, answer: same(answer, self.answer(prompt)))
        return [float(a is not None and right(p, a)) for p, a in zip(prompts, given, strict=True)]

    def _printed(self, texts: Sequence[str]) -> list[str | None]:
        """The last line that each program prints; None where there is no program or it fails."""
        assert self.sandbox is not None
        programs = [program(text) for text in texts]
        outcomes = iter(self.sandbox.run([p for p in programs if p is not None]))
        ran = [None if p is None else next(outcomes) for p in programs]
        return [out.last_line if out is not None and out.status == "ok" else None for out in ran]

    def _of(self, prompt: int) -> Problem:
        if prompt not in self.train and prompt not in self.heldout:
            raise KeyError(f"{self.name} has no prompt {prompt}")
        return self.problem(prompt)


def kind_of(name: str) -> Kind:
    """What a task of this name is; ConfigError for an unknown one."""
    return _maker(name)[0]


def make(
    name: str,
    *,
    root: Path | str = ".",
    seed: int = 0,
    sandbox: Sandbox | None = None,
    params: Mapping[str, Any] | None = None,
    **more: Any,
) -> Task:
    """The task called `name`; relative paths in it start at `root`. Code tasks run programs in `sandbox` (default:
    `Sandbox()`, which raises SandboxMissing where bubblewrap cannot be had).

    `params` (or keywords): `train`, `heldout` (numbers of prompts) of the built-in ones; `limit` (rows) and, for gsm8k,
    `heldout` (a file of test rows) of sets; `size` and the dataset's own parameters of reasoning-gym. ConfigError that
    names the known ones for any other, and for a value of another kind.
    """
    kind, maker, known = _maker(name)
    given = {**(params or {}), **more}
    if known is None:
        known = task_sets.gym_params(name)
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"task {name}: unknown parameter {key!r}; known: {', '.join(known)}")
        wanted = known[key]
        if wanted is not None and not (isinstance(value, wanted) and not isinstance(value, bool)):
            raise ConfigError(f"task {name}: {key} must be {KINDS[wanted]}, not {value!r}")
    if kind == "code":
        sandbox = sandbox or Sandbox()
    elif sandbox is not None:
        raise ConfigError(f"task {name}: is not a code task and runs nothing; leave sandbox out")
    made = maker(name, Path(root), seed, **given)
    return ProblemTask(name=name, sandbox=sandbox, **made)


def _maker(name: str) -> tuple[Kind, Callable[..., dict[str, Any]], Mapping[str, Any] | None]:
    """Kind, maker and known parameters with what they must be (None: the dataset says which)."""
    family, _, rest = name.partition(":")
    families: dict[str, tuple[Kind, Callable[..., dict[str, Any]], Mapping[str, Any] | None]] = {
        "word-problems": ("math", _builtin, {"train": int, "heldout": int}),
        "programs": ("code", _builtin, {"train": int, "heldout": int}),
        "reasoning-gym": ("math", task_sets.reasoning_gym, None),
        "gsm8k": ("math", task_sets.gsm8k, {"limit": int, "heldout": str}),
        "openmath": ("code", task_sets.openmath, {"limit": int}),
    }
    plain = family in ("word-problems", "programs")
    if family not in families or (plain and rest) or (family == "reasoning-gym" and not rest):
        raise ConfigError(
            f"unknown task {name!r}; one of word-problems, programs, gsm8k, gsm8k:FILE.jsonl, openmath, "
            "openmath:FILE.jsonl, reasoning-gym:DATASET"
        )
    return families[family]


def _builtin(name: str, root: Path, seed: int, train: int = 1_000_000, heldout: int = 1000) -> dict[str, Any]:
    """Problems written by rule from the prompt's id, each when it is first asked for."""
    if train < 1 or heldout < 1:
        raise ConfigError(f"task {name}: train and heldout must be at least 1")
    pose, solve = (
        (problems.word_problem, problems.worked)
        if name == "word-problems"
        else (problems.code_problem, problems.programmed)
    )

    @lru_cache(maxsize=16_384)
    def problem(prompt: int) -> Problem:
        rng = random.Random(f"assay.{name}.{seed}.{prompt}")
        while True:
            posed = pose(rng)
            if (data.part_of(posed.question) == "heldout") == (prompt >= train):
                return Problem(posed.question, posed.answer, solve(posed, rng))

    return {"problem": problem, "train": range(train), "heldout": range(train, train + heldout)}


def prompt_text(task: Task, prompt: int, *, style: Style = "plain") -> str:
    """The user's turn: the question; `instruct` asks for the format, for models that were not trained on it."""
    if style not in ("plain", "instruct"):
        raise ConfigError(f"unknown prompt style {style!r}; one of plain, instruct")
    return task.question(prompt) + (ASK[task.kind] if style == "instruct" else "")


def prompt_ids(
    task: Task, tokenizer: Any, prompt: int, *, style: Style = "plain", template: str = "chatml"
) -> list[int]:
    """Token ids of the whole prompt, up to where the answer begins."""
    text = data.render_prompt(prompt_text(task, prompt, style=style), template)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
