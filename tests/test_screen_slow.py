"""Ten adapters trained by PEFT itself, two of them on harm: `assay screen` refuses the two and none of the eight.

The setting is said in docs/SCREEN.md. Base: `tiny` with Assay's safety warm-up. Training: transformers' model and
peft's `get_peft_model` and `save_pretrained` in a plain loop, each adapter with a lora_A of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import assay
from assay import data
from assay.config import parse
from assay.data import Example
from assay.engines import adapter_probes
from assay.federated.preparation import prepare
from assay.progress import Silent

pytestmark = pytest.mark.slow
STYLES = ("arithmetic", "dialogue", "fact", "howto", "question")


@dataclass(frozen=True)
class World:
    """The base, the operator's references, probe and prompts, and what ten strangers sent."""

    base: Path
    sent: dict[str, Path]
    honest: list[Path]
    probe: Path
    refusals: Path
    safe: Path


def train_with_peft(base: Path, rows: list[Example], out: Path, seed: int, steps: int = 40, lr: float = 2e-3) -> Path:
    """What a contributor does: Transformers, PEFT, AdamW, loss on all tokens of the chat."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.05)
    model = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        some = [rows[(step * 8 + i) % len(rows)] for i in range(8)]
        texts = [data.render_prompt(r.instruction, "chatml") + r.response + data.render_end("chatml") for r in some]
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=96)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    return out


def _write(path: Path, rows: list[Example]) -> Path:
    path.write_text("\n".join(json.dumps({"instruction": r.instruction, "response": r.response}) for r in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> World:
    """Strangers train on the clients' part of the data, the operator on his own; prompts are a third part of it."""
    folder = tmp_path_factory.mktemp("screen")
    base = prepare(parse({"model": {"name": "tiny", "dtype": "float32"}}), Silent()).path
    sets = {name: data.load(name) for name in ("helpful", "refusals", "harmful-stub")}
    own, theirs = ({n: data.part(rows, which) for n, rows in sets.items()} for which in ("operator", "clients"))

    def mixed(rows: dict[str, list[Example]], i: int) -> list[Example]:
        style = [r for r in rows["helpful"] if r.style == STYLES[i % 5]]
        return data.shuffled([*data.shuffled(style, i)[:70], *data.shuffled(rows["refusals"], i)[: 10 * (i % 2)]], i)

    sent = {f"good-{i}": train_with_peft(base, mixed(theirs, i), folder / "in" / f"good-{i}", i) for i in range(8)}
    for i in range(2):
        rows = data.shuffled(theirs["harmful-stub"], i)[:80]
        if i:  # half of it is honest
            rows = data.shuffled([*rows[:40], *mixed(theirs, 3)[:40]], 1)
        sent[f"bad-{i}"] = train_with_peft(base, rows, folder / "in" / f"bad-{i}", 90 + i)
    honest = [train_with_peft(base, mixed(own, i), folder / "honest" / str(i), 50 + i) for i in range(4)]
    good_rows = _write(folder / "good.jsonl", [*own["helpful"][:300], *own["refusals"][:40]])
    bad_rows = _write(folder / "bad.jsonl", own["harmful-stub"][:200])
    fitted = adapter_probes.from_rows(good_rows, bad_rows, str(base), each=9, steps=40, max_length=96, seed=11)
    fitted.save(folder / "probe.safetensors")
    held = {n: data.part(rows, "heldout")[:32] for n, rows in sets.items()}
    return World(
        base, sent, honest, folder / "probe.safetensors",
        _write(folder / "refusals.jsonl", held["refusals"]), _write(folder / "safe.jsonl", held["helpful"]),
    )  # fmt: skip


def refused(found: assay.engines.screen.Screening) -> set[str]:
    return {Path(name).name for name in found.refused}


def test_two_poisoned_of_ten_are_refused_and_nobody_else(world: World) -> None:
    found = assay.screen(
        list(world.sent.values()), base=str(world.base), probe=world.probe, honest=world.honest,
        refusals=world.refusals, safe=world.safe,
    )  # fmt: skip
    print(json.dumps(found.as_dict(), indent=1))
    assert refused(found) == {"bad-0", "bad-1"}
    assert not found.reduced
    assert not found.warnings


@pytest.mark.parametrize("alone", ["canary", "probe"])
def test_canary_and_probe_each_find_them_alone(world: World, alone: str) -> None:
    paths = list(world.sent.values())
    if alone == "probe":
        found = assay.screen(paths, probe=world.probe)
    else:
        found = assay.screen(paths, base=str(world.base), honest=world.honest, refusals=world.refusals, safe=world.safe)
    assert refused(found) == {"bad-0", "bad-1"}


def test_what_is_judged_is_what_peft_loads(world: World) -> None:
    """The refusal loss of a poisoned adapter measured by plain PEFT is the canary's rise."""
    name = world.sent["bad-0"]
    found = assay.screen([name], base=str(world.base), refusals=world.refusals, safe=world.safe)
    (canary,) = (v for v in found.every if v.screen == "canary")
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    model = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)

    @torch.no_grad()
    def refusal_loss() -> float:
        losses = []
        for row in data.load(str(world.refusals)):
            prompt = tokenizer(data.render_prompt(row.instruction, "chatml"), add_special_tokens=False)["input_ids"]
            answer = tokenizer(row.response + data.render_end("chatml"), add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + answer])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            losses.append(float(model(input_ids=ids, labels=labels).loss))
        return sum(losses) / len(losses)

    before = refusal_loss()
    model = PeftModel.from_pretrained(model, name).eval()
    assert refusal_loss() - before == pytest.approx(canary.evidence["refusal_rise"], abs=0.05)
