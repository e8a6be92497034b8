"""Client training on the real `tiny` model: parity with Transformers and PEFT, repeatability, what the loss covers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from assay import data, models
from assay.config import ConfigError, LoraSettings
from assay.data import Example
from assay.federated.compute import answers
from assay.federated.local_sft import LocalSettings, answer_nll, collate, row_nll, tokenize, train
from assay.federated.lora import Carrier

SETTINGS = LocalSettings(steps=3, batch_size=4, max_length=48, lr=3e-3, seed=5)


@pytest.fixture(scope="module")
def carrier() -> Iterator[Carrier]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Carrier(models.load("tiny", "float32"), LoraSettings())
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return data.load("helpful", limit=24)


def test_loss_is_transformers_own_on_answer_tokens(carrier: Carrier, rows: list[Example]) -> None:
    tokens = [tokenize(carrier.base.tokenizer, r, "chatml", 48) for r in rows[:6]]
    batch = collate(tokens, carrier.base.tokenizer.pad_token_id)
    labels = batch.ids_BT.clone()
    for b, row in enumerate(tokens):
        labels[b, : row.prompt] = -100
        labels[b, len(row.ids) :] = -100
    theirs = carrier.model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, labels=labels).loss
    assert answer_nll(carrier.model, batch).mean().item() == pytest.approx(theirs.item(), rel=1e-5)


def test_training_is_repeatable_bit_for_bit_and_reports_its_steps(carrier: Carrier, rows: list[Example]) -> None:
    start = carrier.initial()
    one, two = train(carrier, start, rows, SETTINGS), train(carrier, start, rows, SETTINGS)
    for name in start:
        np.testing.assert_array_equal(one.tensors[name], two.tensors[name])
        np.testing.assert_array_equal(one.steps[-1][name], one.tensors[name])
    assert len(one.steps) == len(one.losses) == 3
    assert not np.array_equal(one.steps[0][name], one.steps[1][name])


def test_training_equals_a_plain_peft_loop(carrier: Carrier, rows: list[Example]) -> None:
    """The same steps written down with nothing of ours but the batches."""
    settings = LocalSettings(steps=2, batch_size=24, max_length=48, lr=1e-3, seed=1)
    ours = train(carrier, carrier.initial(), rows, settings).tensors
    carrier.set(carrier.initial())
    weights = [p.requires_grad_(True) for n, p in carrier.model.named_parameters() if "lora_" in n]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
    tokens = [tokenize(carrier.base.tokenizer, r, "chatml", 48) for r in rows]
    batch = collate(tokens, carrier.base.tokenizer.pad_token_id)
    labels = batch.ids_BT.clone()
    for b, row in enumerate(tokens):
        labels[b, : row.prompt] = -100
        labels[b, len(row.ids) :] = -100
    for _ in range(2):  # one batch holds all rows, so the order of rows does not matter
        optimizer.zero_grad()
        carrier.model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    for name, value in carrier.get().items():
        np.testing.assert_allclose(ours[name], value, atol=2e-5)


def test_training_lowers_the_loss_on_its_rows(carrier: Carrier, rows: list[Example]) -> None:
    start = carrier.initial()
    before = row_nll(carrier, start, rows, SETTINGS).mean()
    made = train(carrier, start, rows, LocalSettings(steps=20, batch_size=8, max_length=48, lr=5e-3))
    assert row_nll(carrier, made.tensors, rows, SETTINGS).mean() < before


def test_row_losses_do_not_depend_on_their_batch_beyond_rounding(carrier: Carrier, rows: list[Example]) -> None:
    start = carrier.initial()
    together = row_nll(carrier, start, rows, SETTINGS)
    alone = np.concatenate([row_nll(carrier, start, [r], SETTINGS) for r in rows])
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_long_prompts_leave_room_for_the_answer(carrier: Carrier) -> None:
    row = Example("word " * 500, "the answer")
    tokens = tokenize(carrier.base.tokenizer, row, "chatml", 32)
    assert len(tokens.ids) == 32
    assert tokens.prompt < 32
    assert np.isfinite(row_nll(carrier, carrier.initial(), [row], SETTINGS)).all()


def test_alpaca_rows_end_with_the_end_of_text(carrier: Carrier) -> None:
    tokens = tokenize(carrier.base.tokenizer, Example("q", "a"), "alpaca", 200)
    assert tokens.ids[-1] == carrier.base.tokenizer.eos_token_id


def test_initial_adapter_changes_nothing_and_is_fixed_by_its_seed(carrier: Carrier) -> None:
    first, again = carrier.initial(), carrier.initial()
    assert all(np.array_equal(first[n], again[n]) for n in first)
    assert all(not v.any() for n, v in first.items() if "lora_B" in n)
    other = Carrier.__new__(Carrier)
    other.__dict__ = {**carrier.__dict__, "settings": LoraSettings(seed=1)}
    assert any(not np.array_equal(first[n], v) for n, v in other.initial().items())


def test_adapter_survives_set_and_get(carrier: Carrier) -> None:
    rng = np.random.default_rng(0)
    adapter = {n: rng.standard_normal(v.shape).astype(np.float32) for n, v in carrier.initial().items()}
    carrier.set(adapter)
    for name, value in carrier.get().items():
        np.testing.assert_array_equal(value, adapter[name])
    carrier.set(carrier.initial())


def test_answers_stop_at_the_end_of_turn(carrier: Carrier, rows: list[Example]) -> None:
    out = answers(carrier, carrier.initial(), [r.instruction for r in rows[:22]], "chatml", 12)
    assert len(out) == 22
    assert not any("<|im_end|>" in text for text in out)


def test_targets_that_are_not_there_say_so() -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        Carrier(models.load("tiny", "float32"), LoraSettings(targets=("no_such_layer",)))


def test_models_that_cannot_be_had_say_what_to_do(tmp_path: object) -> None:
    for name, says in (("nonsense", "known models"), (str(tmp_path), "no config.json"), ("no/such-model", "cannot be")):
        with pytest.raises(ConfigError, match=says):
            models.load(name)


def test_weights_hash_ignores_the_file_layout(tmp_path: object) -> None:
    from pathlib import Path

    from safetensors.torch import save_file

    one, two = Path(str(tmp_path)) / "one", Path(str(tmp_path)) / "two"
    one.mkdir()
    two.mkdir()
    a, b = torch.arange(4.0), torch.ones(2, 2)
    save_file({"a": a, "b": b}, one / "model.safetensors", {"format": "pt"})
    save_file({"b": b}, two / "model-2.safetensors")
    save_file({"a": a}, two / "model-1.safetensors")
    assert models.weights_sha256(one) == models.weights_sha256(two)
    save_file({"a": a + 1}, two / "model-1.safetensors")
    assert models.weights_sha256(one) != models.weights_sha256(two)
