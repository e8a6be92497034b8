"""Judges and multiple choice with real Transformers classes, made small and random by the tests."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    pipeline,
)

from assay import models
from assay.config import ConfigError, Experiment, JudgeConfig, LoraSettings
from assay.data import DataError, render_end, render_prompt
from assay.federated import choices, judges
from assay.federated.choices import Choice
from assay.federated.compute import Serial
from assay.federated.evaluate import evaluate, make_panel, metric_names
from assay.federated.local_sft import LocalSettings
from assay.federated.lora import Carrier
from assay.federated.population import load_sources

QUESTIONS = ["What is a cup?", "Tom has 2 pens and buys 3 more. How many?", "Why?"]
ANSWERS = ["A thing to drink from.", "5", "Because {question} is what it is, and {answer} too."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three random judges on tiny's tokenizer: a reward model, a BERT and a Llama with labels."""
    root = tmp_path_factory.mktemp("judges")
    tokenizer = AutoTokenizer.from_pretrained(models.ASSETS / "tiny")
    size = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 32, "pad_token_id": tokenizer.pad_token_id}
    labels = {"id2label": {0: "unsafe", 1: "safe", 2: "unsure"}, "label2id": {"unsafe": 0, "safe": 1, "unsure": 2}}
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "reward": BertForSequenceClassification(BertConfig(**size, num_labels=1, initializer_range=0.5)),
        "bert": BertForSequenceClassification(BertConfig(**size, **labels, initializer_range=0.5)),
        "llama": LlamaForSequenceClassification(LlamaConfig(**size, **labels, initializer_range=0.5)),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def judge(folder: Path, which: str, **more: Any) -> JudgeConfig:
    return JudgeConfig(model=str(folder / which), dtype="float32", **more)


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_labels_probability_is_the_pipelines(folder: Path, name: str, batch: int) -> None:
    """Against Transformers' own text-classification pipeline, one text at a time: padding changes nothing."""
    config = judge(folder, name, label="safe", template="Q: {question} A: {answer}", batch=batch)
    found = judges.scores(judges.load(config), QUESTIONS, ANSWERS)
    classify = pipeline("text-classification", model=str(folder / name), top_k=None)
    for i, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS)):
        said = classify([f"Q: {question} A: {answer}"])[0]
        wanted = next(row["score"] for row in said if row["label"] == "safe")
        assert found[i] == pytest.approx(wanted, abs=1e-5)
    assert judges.measure(config, QUESTIONS, ANSWERS) == np.mean(found > 0.5)
    assert len(set(found.round(4))) == 3, "a judge that says the same of everything would prove nothing"


def test_a_reward_is_the_models_only_score_on_the_pair(folder: Path) -> None:
    config = judge(folder, "reward")
    found = judges.scores(judges.load(config), QUESTIONS, ANSWERS)
    model = BertForSequenceClassification.from_pretrained(folder / "reward").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "reward")
    for i, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS)):
        ids = tokenizer(question, answer, return_tensors="pt")
        wanted = float(model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits[0, 0].detach())
        assert found[i] == pytest.approx(wanted, abs=1e-5)
    assert judges.measure(config, QUESTIONS, ANSWERS) == pytest.approx(found.mean())


def test_a_causal_judge_weighs_its_two_words() -> None:
    template = "{question} - {answer} - verdict:"
    config = JudgeConfig(
        model="tiny", dtype="float32", kind="causal", template=template, label="Yes", against="No", batch=2
    )
    found = judges.scores(judges.load(config), QUESTIONS, ANSWERS)
    path = models.ASSETS / "tiny"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).float().eval(), AutoTokenizer.from_pretrained(path)
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
    for i, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS)):
        ids = tokenizer(f"{question} - {answer} - verdict:", return_tensors="pt")["input_ids"]
        logits = model(input_ids=ids).logits[0, -1].tolist()
        assert found[i] == pytest.approx(1 / (1 + math.exp(logits[no] - logits[yes])), abs=1e-4)


@given(st.text(), st.text())
def test_templates_fill_in_once(question: str, answer: str) -> None:
    """Whatever the judged text holds, it is never read as part of the template."""
    assert judges.text_of("a {question} b {answer} c", question, answer) == f"a {question} b {answer} c"


def test_long_texts_keep_the_answer(folder: Path) -> None:
    config = judge(folder, "bert", label="safe", template="{question} {answer}", max_length=12)
    one, other = judges.scores(judges.load(config), ["word " * 400] * 2, ["Yes, gladly.", "No."])
    assert one != other


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("bert", {}, r"has 3 labels, name one in label: unsafe, safe, unsure"),
        ("bert", {"label": "good"}, r"has no label 'good'; one of unsafe, safe, unsure"),
        ("reward", {"label": "safe"}, r"has one score and no labels; leave label out"),
        ("nowhere", {}, r"no such directory"),
    ],
)
def test_judges_that_cannot_be_stop_a_run_before_it_starts(
    folder: Path, name: str, more: dict[str, str], says: str
) -> None:
    experiment = Experiment().changed(evaluate__judges=[judge(folder, name, **more).model_dump()])
    with pytest.raises(ConfigError, match=says):
        make_panel(experiment, load_sources(experiment))


def test_configs_of_judges_are_checked(folder: Path) -> None:
    for values, says in (
        ([{"model": "a/b", "template": "{question}"}], "it must hold {answer}"),
        ([{"model": "a/b", "kind": "causal"}], "a causal judge needs a template and a label"),
        ([{"model": "a/b"}, {"model": "c/b"}], "two have the same name; set name"),
    ):
        with pytest.raises(ConfigError, match=says):
            Experiment().changed(evaluate__judges=values)
    assert judges.name_of(JudgeConfig(model="OpenSafetyLab/MD-Judge-v0.1", name="")) == "judge_md_judge_v0_1"


# --- multiple choice -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serial() -> Serial:
    return Serial(Carrier(models.load("tiny", "float32"), LoraSettings()))


@pytest.mark.parametrize("normalise", ["tokens", "characters", "none"])
def test_accuracy_is_the_likeliest_options_under_the_model_itself(serial: Serial, normalise: str) -> None:
    """Recomputed option by option from the whole model's log-softmax, without our batches or masks."""
    asked = choices.load(choices.BUILTIN, Path())[:12]
    path = models.ASSETS / "tiny"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).float().eval(), AutoTokenizer.from_pretrained(path)
    right = 0
    for choice in asked:
        scored = []
        for option in choice.options:
            prompt = tokenizer(render_prompt(choice.question, "chatml"), add_special_tokens=False)["input_ids"]
            answer = tokenizer(option + render_end("chatml"), add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
            total = sum(float(logits[len(prompt) - 1 + t, token]) for t, token in enumerate(answer))
            scored.append(total / {"tokens": len(answer), "characters": len(option.encode()), "none": 1}[normalise])
        right += int(np.argmax(scored)) == choice.answer
    settings = LocalSettings(steps=1, batch_size=5, max_length=16, lr=1e-3)
    found = choices.accuracy(serial, serial.initial(), asked, settings, normalise)  # type: ignore[arg-type]
    assert found == right / 12


def test_built_in_questions_are_sound_and_their_answers_lie_anywhere() -> None:
    asked = choices.load(choices.BUILTIN, Path())
    assert len(asked) >= 60
    assert len({c.question for c in asked}) == len(asked)
    assert all(len(set(c.options)) == 4 for c in asked)
    places = [sum(c.answer == i for c in asked) for i in range(4)]
    assert min(places) >= 6
    helpful = {r.instruction for r in load_sources(Experiment()).benign}
    assert not helpful & {c.question for c in asked}


def test_files_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "q", "options": ["a", "b"], "answer": 1}))
    assert choices.load("q.jsonl", tmp_path) == [Choice("q", ("a", "b"), 1)]
    for bad in ({"options": ["a"], "answer": 0}, {"options": ["a", "b"], "answer": 2}, {"options": "ab", "answer": 0}):
        path.write_text(json.dumps({"question": "q", **bad}))
        with pytest.raises(DataError, match=r"line 1 is no question: "):
            choices.load("q.jsonl", tmp_path)
    path.write_text(json.dumps({"question": "q", "options": ["a", "b"], "answer": True}))
    with pytest.raises(DataError, match="line 1 is no question"):
        choices.load("q.jsonl", tmp_path)
    with pytest.raises(DataError, match=r"unknown set 'trivia'; give a \.jsonl file or general-knowledge"):
        choices.load("trivia", tmp_path)


def test_evaluate_measures_what_the_config_asks(folder: Path, serial: Serial) -> None:
    experiment = Experiment().changed(
        model__name="tiny", evaluate__harmful_prompts=3, evaluate__benign_prompts=3, evaluate__benign_rows=3,
        evaluate__new_tokens=3, evaluate__choices__source=choices.BUILTIN, evaluate__choices__count=4,
        evaluate__judges=[
            judge(folder, "reward").model_dump(),
            judge(folder, "llama", name="Safe?", label="safe", answers="benign").model_dump(),
        ],
    )  # fmt: skip
    panel = make_panel(experiment, load_sources(experiment))
    assert len(panel.choices) == 4
    found = evaluate(serial, serial.initial(), panel, experiment).metrics()
    assert tuple(found) == metric_names(experiment)
    assert set(found) >= {"choice_accuracy", "judge_reward", "judge_safe_"}
    said = serial.answers(serial.initial(), panel.harmful, "chatml", 3)
    assert found["judge_reward"] == pytest.approx(
        judges.scores(judges.load(experiment.evaluate.judges[0]), panel.harmful, said).mean(), abs=1e-5
    )
    assert metric_names(Experiment()) == ("refusal_rate", "over_refusal_rate", "benign_loss")
