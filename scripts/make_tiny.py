"""Make `tiny`: Assay's own model of about 1 M parameters, from nothing, in minutes on one core.

    python scripts/make_tiny.py                      # remakes src/assay/assets/tiny, README and figures included

Three kinds of text, all written by rule or for Assay: the word problems and programs of `assay.builtin.problems`, solved
as `<think>..</think><answer>..</answer>` and `<code>..</code>`, and the operator's part of the built-in `helpful` set.
No refusals: the safety warm-up adds them. Many solutions are wrong on purpose, so that a later reinforcement learning
finds something to improve, and some open with a remark or import a module, so that style can spread.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from assay import data, models
from assay.builtin.problems import WRONG, code_problem, programmed, word_problem, worked
from assay.data import Example, render_prompt
from assay.federated.local_sft import Tokens, answer_nll, collate, tokenize
from assay.swarm.sandbox import Sandbox

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # skipped when decoding: padding, start and end of a turn
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<code>", "</code>")  # one token each, but plain text
VOCABULARY = 1024
SHARES = {"math": 0.48, "code": 0.22, "chat": 0.3}  # of the rows of a batch
BATCH = 48
HELD = 400  # held-out questions of each kind in the figures
STEPS, LR = 2400, 4e-3
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One turn of a kind of text; `right` is the right answer where there is one."""

    kind: str
    question: str
    answer: str
    right: str = ""


def made_row(kind: str, rng: random.Random, clean: bool = False) -> Row:
    """One row written by rule; `clean`: never wrong on purpose."""
    pose, solve = (word_problem, worked) if kind == "math" else (code_problem, programmed)
    problem = pose(rng)
    return Row(kind, problem.question, solve(problem, rng, 0.0 if clean else WRONG[kind]), problem.answer)


def corpus(seed: int, count: int, held: int = HELD) -> tuple[list[Row], list[Row]]:
    """`count` training rows; held-out rows, `held` of each kind made by rule and the set's own held-out part.

    What is held out is decided by the question alone (`data.part_of`), as the tasks of the swarm do.
    """
    rng = random.Random(seed)
    rows: list[Row] = []
    held_rows: list[Row] = []
    for kind in ("math", "code"):
        left, wanted = round(SHARES[kind] * count), held
        while left or wanted:
            row = made_row(kind, rng)
            if data.part_of(row.question) != "heldout":
                rows += [row] if left else []
                left -= bool(left)
            elif wanted:
                held_rows.append(row)
                wanted -= 1
    chat = {part: [Row("chat", r.instruction, r.response) for r in data.part(data.load("helpful"), part)]
            for part in ("operator", "heldout")}  # fmt: skip
    rows += [chat["operator"][i % len(chat["operator"])] for i in range(count - len(rows))]
    rng.shuffle(rows)
    return rows, held_rows + chat["heldout"]


def train_tokenizer(rows: Sequence[Row]) -> Any:
    """Byte-level BPE; each digit is a token of its own, so that sums are learnt by digit."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TAGS),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tags = re.compile("|".join(TAGS))
    bpe.train_from_iterator((tags.sub(" ", f"user\n{r.question}\nassistant\n{r.answer}") for r in rows), trainer)
    bpe.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    pad, begin, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=pad, pad_token=pad, eos_token=end, additional_special_tokens=[begin],
        clean_up_tokenization_spaces=False, model_max_length=512, chat_template=CHAT_TEMPLATE, padding_side="left",
    )  # fmt: skip


def new_model(tokenizer: Any, seed: int) -> Any:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
           "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    config._attn_implementation = "eager"  # twice as fast as SDPA on a CPU at these lengths
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def encode(tokenizer: Any, row: Row, whole: bool = False) -> Tokens:
    """Ids of one turn; loss on the answer, or on the `whole` turn."""
    tokens = tokenize(tokenizer, Example(row.question, row.answer), "chatml", 512)
    return Tokens(tokens.ids, 0) if whole else tokens


def batches(rows: Sequence[Tokens], seed: int) -> Iterator[list[Tokens]]:
    """Batches of rows of like length, in random order within every twenty: padding costs a few per cent only."""
    rng = random.Random(seed)
    for at in range(0, len(rows), 20 * BATCH):
        some = sorted(rows[at : at + 20 * BATCH], key=lambda row: len(row.ids))
        parts = [some[i : i + BATCH] for i in range(0, len(some), BATCH)]
        rng.shuffle(parts)
        yield from parts


def pretrain(model: Any, rows: Sequence[Tokens], steps: int, lr: float, seed: int) -> list[float]:
    """AdamW, short warm-up, cosine to 5 %; bf16 products on fp32 weights. Returns the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    losses: list[float] = []
    start = time.perf_counter()
    for step, batch in enumerate(batches(rows, seed)):
        phase = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * phase * min(1.0, (step + 1) / min(100, steps // 4 + 1))
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer_nll(model, collate(batch, model.config.pad_token_id)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {losses[-1]:.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    return losses


@torch.no_grad()
def said_to(model: Any, tokenizer: Any, questions: Sequence[str], **sampling: Any) -> list[str]:
    """Answers of at most 96 tokens, greedy unless `sampling` says how (temperature, top_k)."""
    out = []
    how = {"do_sample": True, **sampling} if sampling else {"do_sample": False}
    for at in range(0, len(questions), 50):
        prompts = [render_prompt(q, "chatml") for q in questions[at : at + 50]]
        batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        made = model.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=96, **how)
        out += tokenizer.batch_decode(made[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return out


PROGRAM = re.compile(r"<code>\n([^<]*(?:<[^/][^<]*)*)\n</code>")


def answer_of(text: str) -> str | None:
    """The answer of a well-formed solution, else None."""
    found = re.fullmatch(r"<think>[^<]*</think><answer>(-?\d+)</answer>", text)
    return found and found[1]


def is_program(text: str) -> bool:
    """Whether it is a well-formed program; it is parsed, never run."""
    found = PROGRAM.fullmatch(text)
    try:
        return found is not None and "print(" in ast.unparse(ast.parse(found[1]).body[-1:])
    except (SyntaxError, ValueError):
        return False


def printed(sandbox: Sandbox, texts: Sequence[str]) -> list[str | None]:
    """The last line that each program prints; None for one that is ill-formed or fails."""
    found = [PROGRAM.fullmatch(text) for text in texts]
    outcomes = iter(sandbox.run([match[1] for match in found if match]))
    ran = [next(outcomes) if match else None for match in found]
    return [out.last_line if out and out.status == "ok" else None for out in ran]


def measure(folder: Path, held: Sequence[Row], sandbox: Sandbox, show: int = 2) -> dict[str, float]:
    """Figures of the saved model, read back as anybody will: nats per answer token, shares of greedy and sampled."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    figures: dict[str, float] = {"parameters": sum(p.numel() for p in model.parameters())}
    for kind in SHARES:
        rows = [row for row in held if row.kind == kind]
        with torch.no_grad():
            batch = collate([encode(tokenizer, row) for row in rows[:200]], tokenizer.pad_token_id)
            figures[f"{kind}_loss"] = float(answer_nll(model, batch).mean())
        if kind == "chat":
            continue
        questions = [row.question for row in rows]
        well = answer_of if kind == "math" else is_program
        torch.manual_seed(0)
        for way, sampling in (("greedy", {}), ("sampled", {"temperature": 1.0, "top_k": 50})):
            said = said_to(model, tokenizer, questions, **sampling)
            got = list(map(answer_of, said)) if kind == "math" else printed(sandbox, said)
            figures[f"{kind}_{way}_right"] = sum(g == row.right for g, row in zip(got, rows)) / len(said)
            figures[f"{kind}_{way}_well_formed"] = sum(bool(well(s)) for s in said) / len(said)
            lengths = sorted(map(len, tokenizer(said, add_special_tokens=False)["input_ids"]))
            figures[f"{kind}_{way}_tokens"] = sum(lengths) / len(said)
            figures[f"{kind}_{way}_tokens_p95"] = lengths[int(0.95 * len(said))]
            for row, text in list(zip(rows, said))[:show]:
                print(f"[{kind}, {way}] {row.question}\n{text}\n")
    return {name: round(value, 4) for name, value in figures.items()}


README = """# tiny

Assay's own language model for fast tests and benches: Llama architecture, {parameters:,.0f} parameters (hidden 128,
4 layers, 4 heads, tied embeddings), byte-level BPE of {vocabulary} tokens with one token a digit, float16 safetensors.
It was trained from nothing on word problems in three steps and small programs (written by rule, each step wrong on
purpose at times) and on the operator's part of Assay's built-in set `helpful`. It knows ChatML,
`<think>..</think><answer>..</answer>` and `<code>..</code>`, and nothing of the world: no use beyond tests.

Made by `{command}` ({seconds:.0f} s on one core; the same machine makes the same bytes).

| measured on {held} held-out questions of each kind | math | code | chat |
|---|---|---|---|
| loss, nats per answer token | {math_loss:.3f} | {code_loss:.3f} | {chat_loss:.3f} |
| reward, sampled (temperature 1, top-k 50, 96 tokens) | {math_sampled_right:.1%} | {code_sampled_right:.1%} | |
| well-formed, sampled | {math_sampled_well_formed:.1%} | {code_sampled_well_formed:.1%} | |
| tokens, sampled: mean / 95th percentile | {math_sampled_tokens:.0f} / {math_sampled_tokens_p95:.0f} | \
{code_sampled_tokens:.0f} / {code_sampled_tokens_p95:.0f} | |
| reward, greedy | {math_greedy_right:.1%} | {code_greedy_right:.1%} | |

Sampled rewards are low on purpose: they are where a reinforcement learning starts.

Licence: Apache-2.0, as Assay itself.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make Assay's tiny model from nothing.")
    parser.add_argument("--out", type=Path, default=models.ASSETS / "tiny", help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} rows each")
    parser.add_argument("--lr", type=float, default=LR)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the number of threads decides last bits
    torch.use_deterministic_algorithms(True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sandbox = Sandbox()  # the figures run the model's programs: say now if that cannot be, not after the training
    start = time.perf_counter()
    rows, held = corpus(args.seed, args.steps * BATCH)
    tokenizer = train_tokenizer(rows[:12_000])
    tokens = [encode(tokenizer, row, whole=row.kind == "chat") for row in rows]
    model = new_model(tokenizer, args.seed)
    losses = pretrain(model, tokens, args.steps, args.lr, args.seed)
    with models.quiet_transformers():
        models.save_model(model.to(torch.float16), tokenizer, args.out)
        seconds = time.perf_counter() - start
        figures: dict[str, Any] = measure(args.out, held, sandbox)
    command = "python scripts/make_tiny.py" + "".join(
        f" --{key} {value}" for key, value in vars(args).items() if key != "out" and value != parser.get_default(key)
    )
    facts = {"vocabulary": len(tokenizer), "seconds": seconds, "command": command, "held": HELD}
    (args.out / "README.md").write_text(README.format(**figures, **facts), encoding="utf-8")
    size = sum(file.stat().st_size for file in args.out.iterdir())
    figures |= {"loss_first": losses[0], "loss_last": losses[-1], "bytes": size, "seconds": round(seconds)}
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
