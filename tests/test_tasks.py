"""Tasks of the swarm: right answers are rewarded, everything else is not, and held-out questions stay held out."""

from __future__ import annotations

import json
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay import models
from assay.builtin import problems
from assay.config import ConfigError
from assay.data import DataError, render_prompt
from assay.swarm import tasks
from assay.swarm.grading import final_answer, number, program, same
from assay.swarm.sandbox import Sandbox, SandboxMissing

SHARED = Path(__file__).parents[2] / "shared" / "data"
MATH = tasks.make("word-problems")
EITHER = st.integers(0, 1_000_999)  # training and held-out prompts of the built-in tasks


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox()
    except SandboxMissing as missing:
        pytest.skip(str(missing))


def answered(answer: str) -> str:
    return f"<think>because</think><answer>{answer}</answer>"


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- numbers -------------------------------------------------------------------------------------------------------


@given(st.integers(-(10**30), 10**30))
def test_a_whole_number_is_itself_however_it_is_written(value: int) -> None:
    written = (
        f"{value}",
        f"{value:,}",
        f"{value}.0",
        f"${value:,}",
        f" {value}.00 ",
        f"{value}%",
        f"{value}e0",
        f"{value}/1",
    )
    assert all(same(text, str(value)) for text in written)
    assert all(same(str(value), text) for text in written)
    assert not any(same(str(value + off), str(value)) for off in (-1, 1))


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6))
def test_a_fraction_equals_its_decimals(up: int, down: int) -> None:
    found = number(f"{up}/{down}")
    assert found == (Fraction(up, down), True)
    assert same(repr(up / down), f"{up}/{down}")
    if up > 0:
        assert same(f"\\frac{{{up}}}{{{down}}}", f"{up}/{down}")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_is_what_python_prints(value: float) -> None:
    found = number(repr(value))
    assert found is not None
    assert found[0] == Fraction(repr(value))
    assert same(repr(value), repr(value))
    if abs(value) > 1e-8:  # below, the absolute tolerance for a program's rounding decides
        assert not same(repr(value * 1.001), repr(value))


@pytest.mark.parametrize(
    ("given_", "wanted", "right"),
    [
        ("1,200", "$1200.0", True), ("1.2e3", "1,200", True), (".5", "1/2", True), ("42.", "42", True),
        ("0.30000000000000004", "0.3", True), ("-$5", "-5", True), ("$-5", "-5", True), ("50%", "50", True),
        ("1000000001", "1000000000", False), ("1,20", "120", False), ("1,2,3", "123", False), ("--5", "5", False),
        ("-$-5", "5", False), ("1/0", "1", False), ("1 2", "12", False), ("1_200", "1200", False), ("0x10", "16", False),
        ("nan", "nan", True), ("nan", "0", False), ("inf", "1e999", False), ("-", "-5", False), ("", "0", False),
        ("", "", False), ("Two  Dogs", "two dogs", True), ("two", "2", False), ("2", "two", False), ("1e9999", "1", False),
        ("4 apples", "4", False), ("2+2", "4", False),
        # digits of other scripts and look-alikes are text: never the number
        ("٤٢", "42", False), ("４２", "42", False), ("𝟜𝟚", "42", False), ("²", "2", False), ("−5", "-5", False), ("½", "1/2", False),
    ],
)  # fmt: skip
def test_answers_compare_as_decided(given_: str, wanted: str, right: bool) -> None:
    assert same(given_, wanted) is right


@pytest.mark.parametrize("digit", ["9", "1,", "9/", "٩", " ", "<", "-", "e9"])
def test_huge_answers_are_wrong_and_cost_nothing(digit: str) -> None:
    huge = digit * 1_000_000  # int() of it would raise, or take minutes
    assert number(huge) is None
    assert not same(huge, "42")
    assert MATH.rewards([0], [answered(huge)]) == [0.0]


# --- format --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "", "42", "<answer>42</answer>", "<think>a</think>42", "<think>a</think><answer>42", "<think>a<answer>42</answer>",
        "<think>a</think><answer>42</answer><answer>42</answer>", "<answer>42</answer><think>a</think>",
        "<think>a</think><think>b</think><answer>42</answer>", "<think><think>a</think></think><answer>42</answer>",
        "<think>a</think><answer><answer>42</answer></answer>", "<think><answer>42</answer></think>",
        "<think>a</think><answer>42</answer> and more", "hail <think>a</think><answer>42</answer>",
        "<think>a</think> so <answer>42</answer>", "<think>a</think><answer>42</answer></answer>",
        "<think>a</think><answer>41 <think>42</answer>", "<THINK>a</THINK><ANSWER>42</ANSWER>",
        "<think>a</think><code>print(42)</code>", "<think>a</think><answer>42<code></code></answer>",
        "<answer>41</answer>" * 100_000, "<think>" * 100_000,
    ],
)  # fmt: skip
def test_anything_but_the_format_has_no_answer(text: str) -> None:
    assert final_answer(text) is None


PIECES = [*"ab 1<>/\n", "<think>", "</think>", "<answer>", "</answer>", "<code>", "</code>"]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_no_text_raises_and_an_answer_holds_no_tag(text: str) -> None:
    for inner in (final_answer(text), program(text), final_answer(answered(text)), program(f"<code>{text}</code>")):
        assert inner is None or not any(
            tag in inner for tag in ("<answer>", "</answer>", "<code>", "</code>", "<think>")
        )
    if "<" not in text:
        assert final_answer(f"<think>{text}</think>\n<answer>{text}</answer>\n") == text.strip()
        assert (
            program(f"<think>{text}</think> <code>\n{text}\n</code>") == program(f"<code>{text}</code>") == text.strip()
        )


@pytest.mark.parametrize(
    "text",
    ["print(1)", "<code>print(1)", "<code>print(1)</code><code>print(1)</code>", "<code><code>print(1)</code></code>",
     "<code>print(1)</code> done", "<code>print(1)</code><think>a</think>", "<think>a</think><answer>1</answer><code>1</code>"],
)  # fmt: skip
def test_anything_but_the_format_has_no_program(text: str) -> None:
    assert program(text) is None


# --- built-in tasks ------------------------------------------------------------------------------------------------


@given(st.lists(EITHER, min_size=1, max_size=20), st.integers(0, 3))
def test_word_problems_reward_the_right_and_only_the_right(prompts: list[int], seed: int) -> None:
    task = tasks.make("word-problems", seed=seed)
    assert task.rewards(prompts, [task.solution(p) for p in prompts]) == [1.0] * len(prompts)
    assert task.rewards(prompts, [answered(f"{int(task.answer(p)):,}.0") for p in prompts]) == [1.0] * len(prompts)
    assert task.rewards(prompts, [answered(str(int(task.answer(p)) + 1)) for p in prompts]) == [0.0] * len(prompts)
    assert task.rewards(prompts, [task.answer(p) for p in prompts]) == [0.0] * len(prompts)
    again = tasks.make("word-problems", seed=seed)
    assert [again.question(p) for p in reversed(prompts)] == [task.question(p) for p in reversed(prompts)]


def test_a_wrong_step_on_purpose_is_not_rewarded() -> None:
    """The generator's own noise is what the reward must see through; two slips may rarely cancel."""
    rng = random.Random(0)
    posed = [problems.word_problem(rng) for _ in range(500)]
    right = [same(final_answer(problems.worked(p, rng, wrong=1.0)), p.answer) for p in posed]
    assert sum(right) <= 15
    assert all(same(final_answer(problems.worked(p, rng)), p.answer) for p in posed)


def test_another_seed_is_another_task() -> None:
    other = tasks.make("word-problems", seed=1)
    assert sum(other.question(p) == MATH.question(p) for p in range(200)) < 20


@pytest.mark.parametrize("name", ["word-problems", "programs"])
def test_held_out_questions_are_not_among_the_training_ones(name: str, request: pytest.FixtureRequest) -> None:
    sandbox = request.getfixturevalue("sandbox") if name == "programs" else None
    task = tasks.make(name, sandbox=sandbox, train=5000, heldout=500)
    assert (task.train, task.heldout) == (range(5000), range(5000, 5500))
    held = {task.question(p) for p in task.heldout}
    assert len(held) > 450
    assert not held & {task.question(p) for p in task.train}
    for prompt in (-1, 5500, 10**30):
        with pytest.raises(KeyError, match="has no prompt"):
            task.question(prompt)


def test_programs_reward_what_they_print(sandbox: Sandbox) -> None:
    task = tasks.make("programs", sandbox=sandbox)
    prompts = [*range(150), *range(task.heldout.start, task.heldout.start + 50)]
    assert task.kind == "code"
    assert task.rewards(prompts, [task.solution(p) for p in prompts]) == [1.0] * len(prompts)
    wrong = [f"<code>\nprint({int(task.answer(p)) + 1})\n</code>" for p in prompts]
    assert task.rewards(prompts, wrong) == [0.0] * len(prompts)


def test_programs_of_strangers_get_nothing(sandbox: Sandbox) -> None:
    """Each beside a right one: the outcomes of a batch stay with their own prompts."""
    task = tasks.make("programs", sandbox=sandbox)
    right, answer = task.solution(7), task.answer(7)
    bodies = [f"print({answer})\nprint('no')", f"print({answer})\n1/0", f"print({answer}, end='x')", f"import thief\nprint({answer})",
              "print(", "", f"x = {answer}", f"print('{answer} apples')", "import sys\nsys.exit(3)"]  # fmt: skip
    texts = [f"<code>\n{body}\n</code>" for body in bodies]
    texts += [f"<code>\nprint({answer})\n</code>" * 2, f"print({answer})", answered(answer), "", "\0\ud800"]
    mixed = [text for hostile in texts for text in (hostile, right)]
    assert task.rewards([7] * len(mixed), mixed) == [0.0, 1.0] * len(texts)
    assert task.rewards([], []) == []


def test_the_code_task_refuses_to_start_without_bubblewrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxMissing):
        tasks.make("programs")
    assert tasks.make("word-problems").kind == "math"


def test_every_prompt_needs_its_text() -> None:
    with pytest.raises(ValueError, match="zip"):
        MATH.rewards([0, 1], ["one"])


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("sums", {}, "one of word-problems"), ("", {}, "one of word-problems"), ("programs:x", {}, "one of word-problems"),
        ("reasoning-gym", {}, "reasoning-gym:DATASET"), ("word-problems", {"size": 3}, "known: train, heldout"),
        ("word-problems", {"train": 0}, "at least 1"), ("gsm8k", {"heldout": "x"}, "heldout= goes with a file"),
        ("gsm8k:absent.jsonl", {}, "no such file"), ("gsm8k", {"limit": "ten"}, "limit must be a whole number"),
        ("gsm8k", {"limit": True}, "limit must be a whole number"), ("openmath", {"limit": 0}, "at least 1"),
        ("openmath", {"rows": 3}, "known: limit"), ("gsm8k:x.jsonl", {"heldout": 5}, "must be the path of a file"),
        ("word-problems", {"params": {"root": "/"}}, "unknown parameter 'root'; known: train, heldout"),
    ],
)  # fmt: skip
def test_operators_mistakes_are_one_line(name: str, params: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        tasks.make(name, **params)
    assert "\n" not in str(caught.value)


# --- prompts -------------------------------------------------------------------------------------------------------


def test_prompts_are_what_tiny_was_trained_on() -> None:
    tokenizer = models.load("tiny", "float32").tokenizer
    for prompt in (0, 1, MATH.heldout[0]):
        plain = tokenizer.decode(tasks.prompt_ids(MATH, tokenizer, prompt))
        assert plain == render_prompt(MATH.question(prompt), "chatml")
        told = tokenizer.decode(tasks.prompt_ids(MATH, tokenizer, prompt, style="instruct"))
        assert MATH.question(prompt) in told
        assert "<think>" in told
        assert "<answer>" in told
    with pytest.raises(ConfigError, match="plain, instruct"):
        tasks.prompt_ids(MATH, tokenizer, 0, style="loud")  # type: ignore[arg-type]


# --- sets ----------------------------------------------------------------------------------------------------------


def gsm8k_rows(count: int, start: int = 0) -> list[dict[str, object]]:
    return [
        {"question": f"A box holds {n} pens. How many do {n + 2} boxes hold?",
         "answer": f"Take {n}*{n + 2}=<<{n}*{n + 2}={n * (n + 2)}>>{n * (n + 2)} pens.\n#### {n * (n + 2):,}"}
        for n in range(start, start + count)
    ]  # fmt: skip


def test_gsm8k_rows_from_a_file(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", gsm8k_rows(100))
    task = tasks.make("gsm8k:rows.jsonl", root=tmp_path)
    ids = [*task.train, *task.heldout]
    assert task.kind == "math"
    assert len(ids) == len(set(ids)) == 100
    assert len(task.heldout) > 2
    assert task.rewards(ids, [task.solution(p) for p in ids]) == [1.0] * 100
    assert task.rewards(ids, [answered(task.answer(p) + "1") for p in ids]) == [0.0] * 100
    assert not any("<<" in task.solution(p) or "####" in task.solution(p) for p in ids)
    assert "50*52=2600 pens." in next(task.solution(p) for p in ids if "holds 50 pens" in task.question(p))
    assert len(tasks.make("gsm8k:rows.jsonl", root=tmp_path, limit=40).train) < 40


def test_gsm8k_with_its_own_test_file_drops_the_overlap(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", gsm8k_rows(30))
    overlap = [{**row, "question": f"  {str(row['question']).upper()} "} for row in gsm8k_rows(5, start=28)]
    write(tmp_path / "test.jsonl", overlap)
    task = tasks.make("gsm8k:train.jsonl", root=tmp_path, heldout="test.jsonl")
    assert (len(task.train), len(task.heldout)) == (28, 5)


@pytest.mark.parametrize(
    "row",
    [{"question": "q"}, {"question": "q", "answer": 4}, {"question": "q", "answer": "no mark"},
     {"question": "q", "answer": "x #### many"}, {"question": "q", "answer": "<answer>3</answer> #### 4"}],
)  # fmt: skip
def test_a_row_of_another_schema_is_named(row: dict[str, object], tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [*gsm8k_rows(2), row])
    with pytest.raises(DataError, match="line 3"):
        tasks.make("gsm8k:rows.jsonl", root=tmp_path)


def openmath_row(question: str, code: str, answer: str, right: bool = True) -> dict[str, object]:
    solution = f"Let us compute.\n<llm-code>\n{code}\n</llm-code>\n<llm-code-output>\n{answer}\n</llm-code-output>\nSo \\boxed{{{answer}}}."
    return {
        "question": question,
        "expected_answer": answer,
        "generated_solution": solution,
        "is_correct": right,
        "dataset": "gsm8k",
    }


def test_openmath_rows_become_programs(tmp_path: Path, sandbox: Sandbox) -> None:
    forms = ("x = {n}\nx + 1", "print({n} + 1)", "x = [\n    {n},\n    1,\n]\nsum(\n    x\n)", "({n} + 1) / 1")
    rows = [openmath_row(f"What is one more than {n}?", forms[n % 4].format(n=n), str(n + 1)) for n in range(80)]
    good = len(rows)
    rows += [
        rows[3],  # a second solution to a question that has one
        openmath_row("wrong", "1", "2", right=False),
        openmath_row("no number", "'pi'", "\\pi"),
        openmath_row("no output", "x = 3", "3"),
        openmath_row("no program", "x = = 3", "3"),
        {
            **openmath_row("two blocks", "3", "3"),
            "generated_solution": "<llm-code>\nx = 3\n</llm-code><llm-code>\nx\n</llm-code>",
        },
    ]
    write(tmp_path / "rows.jsonl", rows)
    task = tasks.make("openmath:rows.jsonl", root=tmp_path, sandbox=sandbox)
    ids = [*task.train, *task.heldout]
    assert task.kind == "code"
    assert len(ids) == good
    assert task.rewards(ids, [task.solution(p) for p in ids]) == [1.0] * good
    assert task.rewards(ids, [f"<code>\nprint({task.answer(p)} + 1)\n</code>" for p in ids]) == [0.0] * good
    write(tmp_path / "other.jsonl", [{"question": "q", "expected_answer": "1"}])
    with pytest.raises(DataError, match=r"line 1 is not a row of OpenMathInstruct-1"):
        tasks.make("openmath:other.jsonl", root=tmp_path, sandbox=sandbox)


def test_math_tasks_take_no_sandbox(sandbox: Sandbox) -> None:
    with pytest.raises(ConfigError, match="leave sandbox out"):
        tasks.make("word-problems", sandbox=sandbox)


@pytest.mark.parametrize("name", ["basic_arithmetic", "chain_sum"])  # the base class's scorer, and one of its own
def test_reasoning_gym(name: str) -> None:
    pytest.importorskip("reasoning_gym", reason="the gym extra is not installed")
    task = tasks.make(f"reasoning-gym:{name}", size=200, seed=3)
    ids = [*task.train, *task.heldout]
    assert {task.question(p) for p in task.train}.isdisjoint(task.question(p) for p in task.heldout)
    assert task.rewards(ids, [task.solution(p) for p in ids]) == [1.0] * len(ids)
    assert task.rewards(ids, [answered(f"{task.answer(p)}1") for p in ids]) == [0.0] * len(ids)
    with pytest.raises(ConfigError, match="not registered"):
        tasks.make("reasoning-gym:no_such_dataset")


def test_parameters_of_reasoning_gym_are_its_datasets_own() -> None:
    pytest.importorskip("reasoning_gym", reason="the gym extra is not installed")
    name = "reasoning-gym:chain_sum"
    for params, says in (
        ({"terms": 3}, "unknown parameter 'terms'; known: size, min_terms, max_terms"),
        ({"seed": 3}, "unknown parameter 'seed'"), ({"size": 0}, "at least 1"), ({"size": "9"}, "whole number"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            tasks.make(name, params=params)
    task = tasks.make(name, params={"size": 60, "min_terms": 3, "max_terms": 3})
    assert len(task.train) + len(task.heldout) <= 60
    assert all(len(re.findall("[+-]", task.question(p))) >= 2 for p in task.train)


@pytest.mark.parametrize("name", ["countdown", "polynomial_multiplication", "n_queens"])
def test_scorers_that_would_evaluate_a_peers_answer_are_refused(name: str) -> None:
    pytest.importorskip("reasoning_gym", reason="the gym extra is not installed")
    with pytest.raises(ConfigError, match="evaluates the answer as Python"):
        tasks.make(f"reasoning-gym:{name}", size=4)


@pytest.mark.data
@pytest.mark.skipif(not SHARED.exists(), reason=f"no research data at {SHARED.name}/ beside the checkout")
def test_real_gsm8k_rows() -> None:
    task = tasks.make("gsm8k:gsm8k_train.jsonl", root=SHARED, heldout="gsm8k_test.jsonl")
    ids = [*task.train, *task.heldout]
    unrewarded = [p for p, r in zip(ids, task.rewards(ids, [task.solution(p) for p in ids])) if r != 1.0]
    assert unrewarded == []
    assert len(task.train) > 2000
    assert len(task.heldout) > 200
    assert sum(task.rewards(ids, [answered(f"{task.answer(p)}1") for p in ids])) == 0
    assert not any("<<" in task.solution(p) for p in ids)
