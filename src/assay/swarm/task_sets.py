"""Sets of problems behind `tasks.make`: GSM8K, OpenMathInstruct-1 and reasoning-gym's datasets."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from assay import data
from assay.config import ConfigError
from assay.data import DataError
from assay.swarm.grading import LONGEST, final_answer, number, program

Placed = Iterable[tuple[str, data.Row]]
GSM8K = "openai/gsm8k"
OPENMATH = "nvidia/OpenMathInstruct-1"
MARKS = re.compile(r"<<[^<>\n]*>>")  # GSM8K's calculator annotations
LLM_CODE = re.compile(r"<llm-code>\n?(.*?)\n?</llm-code>", re.DOTALL)
# scorers of reasoning-gym that hand a peer's answer to Python: eval("__import__('os')...") would run here
EVALUATES = re.compile(r"\b(?:eval|exec|compile|parse_expr|sympify)\(")


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its right answer, and a right solution in the format of the task."""

    question: str
    answer: str
    solution: str


def gsm8k(
    name: str, root: Path, seed: int, limit: int | None = None, heldout: str | Path | None = None
) -> dict[str, Any]:
    """GSM8K, its own test split held out; of a single file, the held-out part by `data.part_of`."""
    path = name.partition(":")[2]
    _limited(name, limit)
    if heldout is not None and not path:
        raise ConfigError(f"task {name}: heldout= goes with a file, the hub brings its own test split")
    rows = _rows(path, root, GSM8K, "train", "main")
    train = list(islice(_worded(rows), limit))
    if path and heldout is None:
        return _split(name, train)
    test = list(_worded(_rows(str(heldout) if path else "", root, GSM8K, "test", "main")))
    asked = {_key(p.question) for p in test}
    return _listed(name, [p for p in train if _key(p.question) not in asked], test)


def _limited(name: str, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ConfigError(f"task {name}: limit must be at least 1 row")


def _worded(rows: Placed) -> Iterator[Problem]:
    """Rows with `question` and `answer`, which ends in `#### 42`."""
    for where, row in rows:
        question, answer = row.get("question"), row.get("answer")
        if not (isinstance(question, str) and isinstance(answer, str) and "####" in answer):
            raise DataError(f"{where} is not a row of GSM8K; it needs question and an answer that ends in '#### 42'")
        working, _, final = answer.rpartition("####")
        final = final.strip()
        solution = f"<think>{MARKS.sub('', working).strip()}</think><answer>{final}</answer>"
        if number(final) is None or final_answer(solution) != final:
            raise DataError(f"{where}: what follows '####' is not a number, or a tag of ours stands in the answer")
        yield Problem(question, final, solution)


def openmath(name: str, root: Path, seed: int, limit: int | None = None) -> dict[str, Any]:
    """OpenMathInstruct-1 as a code task: questions whose answer is a number, with the first right program to each."""
    _limited(name, limit)
    rows = _rows(name.partition(":")[2], root, OPENMATH, "train")
    return _split(name, list(islice(_programmed(rows), limit)))


def _programmed(rows: Placed) -> Iterator[Problem]:
    seen: set[str] = set()
    for where, row in rows:
        texts = [row.get(column) for column in ("question", "expected_answer", "generated_solution")]
        if not all(isinstance(text, str) for text in texts) or not isinstance(row.get("is_correct"), bool):
            raise DataError(
                f"{where} is not a row of OpenMathInstruct-1; it needs question, expected_answer, generated_solution "
                "and is_correct"
            )
        question, answer, solution = map(str, texts)
        blocks = LLM_CODE.findall(solution)
        # several blocks share one interpreter and talk in between: what they print last is not one program's answer
        if not row["is_correct"] or len(blocks) != 1 or number(answer) is None or _key(question) in seen:
            continue
        printing = _printing(blocks[0])
        if printing is not None:
            seen.add(_key(question))
            yield Problem(question, answer.strip(), f"<code>\n{printing}\n</code>")


def _printing(code: str) -> str | None:
    """The program with its last expression printed, as the set's own notebook interpreter did; None if it has none."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not body or not isinstance(last := body[-1], ast.Expr):
        return None
    call = last.value
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print"):
        lines = code.split("\n")[: last.lineno - 1]
        code = "\n".join([*lines, f"print({ast.unparse(call)})"])
    return code if program(f"<code>\n{code}\n</code>") else None


def gym_params(name: str) -> dict[str, Any]:
    """Parameters of a reasoning-gym dataset: `size`, and the fields of its configuration; their kinds are its own."""
    registry = _gym(name, "reasoning_gym.factory").DATASETS
    dataset = name.partition(":")[2]
    if dataset not in registry:
        raise ConfigError(f"task {name}: dataset {dataset!r} is not registered in reasoning-gym")
    own = [field.name for field in fields(registry[dataset][1]) if field.name not in ("seed", "size")]
    return {"size": int} | dict.fromkeys(own)


def _gym(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f'task {name}: pip install "assay[gym]"') from None


def reasoning_gym(name: str, root: Path, seed: int, size: int = 2000, **params: Any) -> dict[str, Any]:
    """A dataset of reasoning-gym with its own scorer (right means a score of 1), unless that evaluates answers."""
    gym = _gym(name, "reasoning_gym")
    if size < 1:
        raise ConfigError(f"task {name}: size must be at least 1")
    try:
        made = gym.create_dataset(name.partition(":")[2], size=size, seed=seed, **params)
        own = type(made).score_answer is not gym.dataset.ProceduralDataset.score_answer
        if own and (EVALUATES.search(inspect.getsource(type(made))) or hasattr(made, "datasets")):
            raise ConfigError("its scorer evaluates the answer as Python, which a peer wrote; take another dataset")
        entries = [made[i] for i in range(size)]
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"task {name}: {str(error).splitlines()[0] if str(error) else 'bad parameters'}") from None
    usable = [e for e in entries if isinstance(e["answer"], str)]
    if not usable:
        raise ConfigError(f"task {name}: its entries have no single answer; take another dataset")
    placed = {_problem_of(e): e for e in usable}  # one entry for a question: small datasets repeat themselves
    found = _split(name, list(placed))
    if own:
        found["judge"] = _scorer(made, found["problem"], placed)
    return found


def _problem_of(entry: dict[str, Any]) -> Problem:
    answer = entry["answer"].strip()
    return Problem(entry["question"], answer, f"<think>The answer is {answer}.</think><answer>{answer}</answer>")


def _scorer(
    made: Any, problem: Callable[[int], Problem], entry_of: dict[Problem, dict[str, Any]]
) -> Callable[[int, str], bool]:
    def judge(prompt: int, answer: str) -> bool:
        entry = entry_of[problem(prompt)]
        if len(answer) > len(entry["answer"]) + LONGEST:
            return False
        try:
            return float(made.score_answer(answer, entry)) == 1.0
        except Exception:  # noqa: BLE001 - a scorer that chokes on a peer's text has not found it right
            return False

    return judge


def _rows(path: str, root: Path, hub_id: str, split: str, config: str | None = None) -> Placed:
    return data.read_jsonl(root / Path(path).expanduser()) if path else data.stream(hub_id, split, config)


def _key(question: str) -> str:
    return " ".join(question.casefold().split())


def _split(name: str, problems: Sequence[Problem]) -> dict[str, Any]:
    held = [data.part_of(p.question) == "heldout" for p in problems]
    return _listed(name, [p for p, h in zip(problems, held) if not h], [p for p, h in zip(problems, held) if h])


def _listed(name: str, train: Sequence[Problem], heldout: Sequence[Problem]) -> dict[str, Any]:
    """Ids in the order of the rows, the held-out ones after the others."""
    if not train or not heldout:
        few = "training" if not train else "held-out"
        raise DataError(f"task {name}: no usable {few} rows; give more rows, or rows of the set's own schema")
    both = [*train, *heldout]
    return {
        "problem": both.__getitem__,
        "train": range(len(train)),
        "heldout": range(len(train), len(both)),
    }
