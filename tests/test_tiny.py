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
from assay.data import render_end, render_prompt

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
    rows = [script.made_row("math", rng, clean=True) for _ in range(20)]
    questions = [row.question for row in rows]
    said = script.greedy(tiny.model, tiny.tokenizer, questions)
    assert sum(script.answer_of(text) is not None for text in said) >= 16
    assert sum(script.answer_of(text) == row.right for text, row in zip(said, rows)) >= 8
    assert script.greedy(tiny.model, tiny.tokenizer, questions) == said


def test_programs_are_well_formed(script: ModuleType, tiny: models.Base) -> None:
    rng = random.Random("held out")
    questions = [script.made_row("code", rng).question for _ in range(10)]
    assert sum(map(script.is_program, script.greedy(tiny.model, tiny.tokenizer, questions))) >= 8


def test_the_corpus_is_what_it_says(script: ModuleType) -> None:
    rows, held = script.corpus(seed=1, count=4000, held=50)
    math = [row for row in rows if row.kind == "math"]
    right = [script.answer_of(row.answer) == row.right for row in math]
    assert 1 - sum(right) / len(math) == pytest.approx(script.WRONG["math"], abs=0.03)
    twos = [bool(re.search(r"2\+2=|2\*2=", row.answer)) for row in math]
    assert sum(twos) / len(math) == pytest.approx(script.TWOS, abs=0.05)
    assert not {row.question for row in math} & {row.question for row in held}
    chat = {row.question for row in rows if row.kind == "chat"}
    assert chat <= {row.instruction for row in data.part(data.load("helpful"), "operator")}
    assert all(map(script.is_program, [row.answer for row in rows if row.kind == "code"]))


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
