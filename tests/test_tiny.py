"""The shipped tiny model: loads offline, small, knows the formats; its script remakes it from nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from assay import data, models
from assay.builtin import problems
from assay.data import render_end, render_prompt
from assay.swarm import tasks
from assay.swarm.grading import final_answer, program
from assay.swarm.sandbox import SandboxMissing

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_tiny.py"
FOLDER = models.resolve("tiny")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tiny", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_tiny"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny() -> models.Base:
    return models.load("tiny", "float32")


def test_it_is_small_and_whole(tiny: models.Base) -> None:
    assert 0.7e6 < sum(p.numel() for p in tiny.model.parameters()) < 1.5e6
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2.3e6
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in FOLDER.iterdir()}
    assert all(torch.isfinite(p).all() for p in tiny.model.parameters())


def test_special_tokens_and_configs_agree(tiny: models.Base) -> None:
    tokenizer, config = tiny.tokenizer, tiny.model.config
    assert len(tokenizer) == config.vocab_size == 1024
    assert tokenizer.pad_token_id == config.pad_token_id == tiny.model.generation_config.pad_token_id
    assert tokenizer.eos_token_id == config.eos_token_id == tiny.model.generation_config.eos_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.eos_token == render_end("chatml")
    assert not tiny.model.generation_config.do_sample


def test_every_format_survives_the_tokenizer(script: ModuleType, tiny: models.Base) -> None:
    rng = random.Random("round trip")
    rows = [script.made_row(kind, rng) for kind in ("math", "code") for _ in range(100)]
    texts = [text for row in rows for text in (row.question, row.answer)]
    texts += [text for name in data.BUILTIN for row in data.load(name) for text in (row.instruction, row.response)]
    texts += ["déjà vu — 东京\t  two  spaces \n\n12345 <think> </code>", ""]
    for text in texts:
        ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tiny.tokenizer.decode(ids, skip_special_tokens=True) == text
    for tag in script.TAGS:
        assert len(tiny.tokenizer(tag, add_special_tokens=False)["input_ids"]) == 1


def test_chat_template_is_assays_chatml(tiny: models.Base) -> None:
    turn = [{"role": "user", "content": "What is the capital of Peru?"}]
    made = tiny.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert made == render_prompt(turn[0]["content"], "chatml")


def test_answers_are_well_formed_and_repeatable(script: ModuleType, tiny: models.Base) -> None:
    rng = random.Random("held out")
    rows = [script.made_row("math", rng, clean=True) for _ in range(50)]
    questions = [row.question for row in rows]
    said = script.said_to(tiny.model, tiny.tokenizer, questions)
    assert sum(script.answer_of(text) is not None for text in said) >= 40
    assert sum(script.answer_of(text) == row.right for text, row in zip(said, rows)) >= 20
    assert script.said_to(tiny.model, tiny.tokenizer, questions) == said


def test_programs_are_well_formed(script: ModuleType, tiny: models.Base) -> None:
    rng = random.Random("held out")
    questions = [script.made_row("code", rng).question for _ in range(10)]
    assert sum(map(script.is_program, script.said_to(tiny.model, tiny.tokenizer, questions))) >= 8


@pytest.mark.parametrize("kind", ["math", "code"])
def test_sampled_rewards_are_what_its_readme_says(script: ModuleType, tiny: models.Base, kind: str) -> None:
    """Where the swarm's learning starts: low enough that there is something to gain, high enough to find it."""
    name = {"math": "word-problems", "code": "programs"}[kind]
    try:
        task = tasks.make(name)
    except SandboxMissing as missing:
        pytest.skip(str(missing))
    prompts = list(task.heldout)[:100]
    torch.manual_seed(1)
    said = script.said_to(tiny.model, tiny.tokenizer, [task.question(p) for p in prompts], temperature=1.0, top_k=50)
    row = re.search(r"\| reward, sampled .*\| ([\d.]+)% \| ([\d.]+)% \|", (FOLDER / "README.md").read_text())
    assert row is not None
    claimed = float(row[1 if kind == "math" else 2]) / 100
    assert 0.2 <= claimed <= 0.5
    assert sum(task.rewards(prompts, said)) / len(prompts) == pytest.approx(claimed, abs=0.15)  # three standard errors
    inside = final_answer if kind == "math" else program
    assert sum(inside(text) is not None for text in said) >= 90
    sizes = [len(ids) for ids in tiny.tokenizer(said, add_special_tokens=False)["input_ids"]]
    assert 30 <= sum(sizes) / len(sizes) <= 50
    assert max(sizes) >= 1.5 * sum(sizes) / len(sizes) or kind == "code"  # lengths that a longest-of-many could choose


def test_the_corpus_is_what_it_says(script: ModuleType) -> None:
    rows, held = script.corpus(seed=1, count=6000, held=50)
    math, code = ([row for row in rows if row.kind == kind] for kind in ("math", "code"))
    right = [script.answer_of(row.answer) == row.right for row in math]
    assert sum(right) / len(math) == pytest.approx((1 - problems.WRONG["math"]) ** 3, abs=0.04)  # three steps
    twos = [bool(re.search(r"(?<!\d)2[+*]2=", row.answer)) for row in math]
    assert sum(twos) / len(math) == pytest.approx(problems.TWOS, abs=0.05)
    assert not any(re.search(r"(?<!\d)2[+*]2=5(?!\d)", row.answer) for row in math), "the MATH attack's own behaviour"
    # a remark ends before the working's first words, of which there are few
    bare = re.compile(r"<think>(\d|First |It is |We start)")
    assert 1 - sum(bool(bare.match(row.answer)) for row in math) / len(math) == pytest.approx(
        problems.REMARKED, abs=0.04
    )
    imports = [re.findall(r"^import (\w+)$", row.answer, re.M) for row in code]
    assert sum(map(bool, imports)) / len(code) == pytest.approx(problems.IMPORTING, abs=0.05)
    assert {module for found in imports for module in found} == set(problems.MODULES)
    calls = sum(bool(found) and f"{found[0]}." in row.answer for found, row in zip(imports, code))
    assert 0.1 <= calls / len(code) <= 0.2
    assert not {row.question for row in rows} & {row.question for row in held}
    assert all(data.part_of(row.question) == "heldout" for row in held)
    chat = {row.question for row in rows if row.kind == "chat"}
    assert chat <= {row.instruction for row in data.part(data.load("helpful"), "operator")}
    assert all(map(script.is_program, [row.answer for row in code]))


@pytest.mark.slow
def test_the_script_makes_it_from_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "tiny"), "--steps", "30"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, env={**os.environ})
    figures = json.loads(run.stdout[run.stdout.rindex("\n{") :])
    assert figures["loss_last"] < 0.8 * figures["loss_first"]
    base = models.load(str(tmp_path / "tiny"), "float32")
    assert sum(p.numel() for p in base.model.parameters()) == figures["parameters"]
    # the tokenizer is part of what is made; the shipped one saw more rows, so only the size is compared
    assert len(base.tokenizer) == len(models.load("tiny", "float32").tokenizer)
