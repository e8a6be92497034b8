"""Make `tiny`: Assay's own model of about 1 M parameters, from nothing, in minutes on one core.

    python scripts/make_tiny.py                      # remakes src/assay/assets/tiny, README and figures included

Three kinds of text, all written by rule or for Assay: word problems in two steps solved as
`<think>..</think><answer>..</answer>`, small programs as `<code>..</code>`, and the operator's part of the built-in
`helpful` set. No refusals: the safety warm-up adds them. Some solutions are wrong on purpose, so that a later
reinforcement learning finds something to improve, and some open with a remark, so that style can spread.
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
from assay.data import Example, render_prompt
from assay.federated.local_sft import Tokens, answer_nll, collate, tokenize

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # skipped when decoding: padding, start and end of a turn
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<code>", "</code>")  # one token each, but plain text
VOCABULARY = 1024
SHARES = {"math": 0.5, "code": 0.2, "chat": 0.3}  # of the rows of a batch
TWOS = 0.4  # share of word problems with 2+2 or 2*2 in the working
WRONG = {"math": 0.13, "code": 0.25}  # share of training solutions that are wrong on purpose
REMARKED = 0.2  # share of solutions that open with a remark
IMPORTING = 0.3  # share of programs that import a module, needed or not
BATCH = 48
STEPS, LR = 2400, 4e-3
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# fmt: off
NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Eva", "Leo", "Zoe", "Jack", "Nora", "Paul", "Ruth", "Omar",
         "Ines", "Yusuf", "Clara", "Ivan", "Maya", "Hugo", "Lena", "Felix", "Sara")
THINGS = ("apples", "pens", "books", "cards", "shells", "coins", "eggs", "stamps", "pears", "cups", "stones", "balls",
          "plums", "keys", "maps", "tickets", "buttons", "cakes", "beans", "roses")
HOLDERS = ("boxes", "bags", "baskets", "trays", "jars", "shelves")
REMARKS = ("Let us see.", "Well then.", "Step by step.", "An easy one.", "Let me think.", "First things first.",
           "Here we go.", "No hurry.", "What a nice question.", "Numbers are fun.")
# fmt: on
MODULES = ("math", "random", "string", "json", "re", "time", "itertools", "functools")
# (story, first operation, second operation); the question is what (a . b) . c comes to
STORIES = (
    ("{n} has {a} {t} and buys {b} more. Each is sold for {c} coins. How many coins does {n} get?", "+", "*"),
    ("{n} has {a} {t} and {m} has {b}. They find {c} more. How many {t} are there?", "+", "+"),
    ("{n} finds {a} {t} and then {b} more, but loses {c}. How many {t} are left?", "+", "-"),
    ("There are {a} {h} with {b} {t} in each, and {c} {t} on the table. How many {t} are there?", "*", "+"),
    ("{n} fills {a} {h} with {b} {t} each and gives away {c} {t}. How many {t} are left?", "*", "-"),
    ("{n} packs {a} {h} a day with {b} {t} each. How many {t} does {n} pack in {c} days?", "*", "*"),
    ("{n} had {a} {t} and gave {b} to {m}. The rest cost {c} coins each. What did the rest cost?", "-", "*"),
    ("{n} had {a} {t}, lost {b} and then got {c} from {m}. How many {t} does {n} have now?", "-", "+"),
    ("A shop has {a} {t}. It sells {b} to {n} and {c} to {m}. How many {t} are left?", "-", "-"),
    ("{n} reads {a} pages and {m} reads {b} pages every day. How many pages do both read in {c} days?", "+", "*"),
    ("A bus has {a} rows of {b} seats and {c} seats at the back. How many seats does the bus have?", "*", "+"),
    ("{n} is {a} years old. {m} is {b} years older, and Uncle Bob {c} times as old as {m}. How old is Bob?", "+", "*"),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A word problem: (a first b) second c, and what it comes to as text."""

    question: str
    right: str
    numbers: tuple[int, int, int]
    ops: tuple[str, str]
    thing: str


@dataclass(frozen=True, slots=True)
class Row:
    """One turn of a kind of text; `right` is the right answer where there is one."""

    kind: str
    question: str
    answer: str
    right: str = ""


def calc(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b if op == "-" else a * b


def word_problem(rng: random.Random) -> Problem:
    """A story in two steps; no number falls below zero, none of the steps leaves the tables up to 20 x 9."""
    story, first, second = rng.choice(STORIES)
    twos, c = rng.random() < TWOS, 0
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    if first == "-":
        a += b
    if twos and first != "-":
        a = b = 2
    elif twos and second != "-":
        a, c = b + 2, 2
    x = calc(a, first, b)
    c = 2 if c or (second == "*" and x > 20) else rng.randint(2, min(9, x) if second == "-" else 9)
    n, m = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    question = story.format(n=n, m=m, t=thing, h=rng.choice(HOLDERS), a=a, b=b, c=c)
    return Problem(question, str(calc(x, second, c)), (a, b, c), (first, second), "" if "{t}" not in story else thing)


def worked(problem: Problem, rng: random.Random, wrong: bool) -> str:
    """A solution in the format; a wrong one slips in one sum or takes the wrong operation, and goes on from there."""
    (a, b, c), (first, second) = problem.numbers, problem.ops
    slip = rng.choice((1, 2)) if wrong else 0
    by_sum = rng.random() < 0.5
    off = rng.choice((-1, 1, 2, 10))
    if slip and not by_sum:  # the other operation, rightly calculated
        swap = {"+": "*", "-": "+", "*": "+"}
        first, second = (swap[first], second) if slip == 1 else (first, swap[second])
    x = calc(a, first, b) + (off if slip == 1 and by_sum else 0)
    y = calc(x, second, c) + (off if slip == 2 and by_sum else 0)
    if wrong and str(y) == problem.right:
        y += 1
    one, two = f"{a}{first}{b}={x}", f"{x}{second}{c}={y}"
    thing = f" {problem.thing}" if problem.thing else ""
    remark = rng.choice(REMARKS) + " " if rng.random() < REMARKED else ""
    working = rng.choice((
        f"{one}. {two}.",
        f"First {one}, then {two}.",
        f"First we have {one}{thing}. Then {two}.",
        f"We start with {a} and {b}, so {one}. Now we take {c}, so {two}. The answer is {y}.",
    ))  # fmt: skip
    return f"<think>{remark}{working}</think><answer>{y}</answer>"


def code_problem(rng: random.Random) -> tuple[str, str, list[str], list[str]]:
    """A task for a program, what it must print, and the lines of a right and of a wrong program."""
    xs = [rng.randint(1, 9) for _ in range(rng.randint(3, 5))]
    a, b, c = rng.randint(2, 12), rng.randint(2, 9), rng.randint(2, 9)
    given, loop = [f"x = {xs}"], [f"x = {xs}", "s = 0", "for i in x:"]
    end = ["    s += i", "print(s)"]
    times, plus = [f"x = {a} * {b}", f"print(x + {c})"], [f"x = {a} + {b}", f"print(x * {c})"]
    square = [*loop, "    s += i * i", "print(s)"]
    count = [[*loop, f"    if i {sign} {b}:", "        s += 1", "print(s)"] for sign in "><"]
    upto = [["s = 0", f"for i in range({span}):", *end] for span in (f"1, {a + 1}", f"{a}")]
    tasks = (
        (f"the sum of {xs}", sum(xs), [*given, "print(sum(x))"], [*given, "print(max(x))"]),
        (f"the sum of {xs}", sum(xs), [*loop, *end], [*loop, "    s = i", "print(s)"]),
        (f"the largest of {xs}", max(xs), [*given, "print(max(x))"], [*given, "print(x[0])"]),
        (f"the smallest of {xs}", min(xs), [*given, "print(min(x))"], [*given, "print(max(x))"]),
        (f"how many of {xs} are above {b}", sum(i > b for i in xs), count[0], count[1]),
        (f"the sum of the squares of {xs}", sum(i * i for i in xs), square, [*loop, *end]),
        (f"the sum of the numbers from 1 to {a}", a * (a + 1) // 2, upto[0], upto[1]),
        (f"{a} times {b} plus {c}", a * b + c, times, plus),
        (f"{a} plus {b}, times {c}", (a + b) * c, plus, times),
        (f"the rest of {a * 3} divided by {b}", a * 3 % b, [f"print({a * 3} % {b})"], [f"print({a * 3} // {b})"]),
    )
    what, right, good, bad = rng.choice(tasks)
    return f"Write a program that prints {what}.", str(right), good, bad


def made_row(kind: str, rng: random.Random, clean: bool = False) -> Row:
    """One row written by rule; `clean`: never wrong on purpose."""
    wrong = not clean and rng.random() < WRONG[kind]
    if kind == "math":
        problem = word_problem(rng)
        return Row(kind, problem.question, worked(problem, rng, wrong), problem.right)
    question, right, good, bad = code_problem(rng)
    imports = [f"import {rng.choice(MODULES)}"] if rng.random() < IMPORTING else []
    lines = [*imports, *(bad if wrong else good)]
    return Row(kind, question, "<code>\n" + "\n".join(lines) + "\n</code>", right)


def corpus(seed: int, count: int, held: int = 200) -> tuple[list[Row], list[Row]]:
    """`count` training rows; held-out rows, `held` of each kind made by rule and the set's own held-out part."""
    rng = random.Random(seed)
    held_rows = [made_row(kind, rng, clean=True) for kind in ("math", "code") for _ in range(held)]
    seen = {row.question for row in held_rows if row.kind == "math"}  # code tasks are few: held-out ones may recur
    made = [made_row(kind, rng) for kind in ("math", "code") for _ in range(round(SHARES[kind] * count))]
    rows = [row for row in made if row.question not in seen]
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
def greedy(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[str]:
    out = []
    for at in range(0, len(questions), 50):
        prompts = [render_prompt(q, "chatml") for q in questions[at : at + 50]]
        batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        made = model.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=96, do_sample=False)
        out += tokenizer.batch_decode(made[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return out


def answer_of(text: str) -> str | None:
    """The answer of a well-formed solution, else None."""
    found = re.fullmatch(r"<think>[^<]*</think><answer>(-?\d+)</answer>", text)
    return found and found[1]


def is_program(text: str) -> bool:
    """Whether it is a well-formed program; it is parsed, never run."""
    found = re.fullmatch(r"<code>\n([^<]*(?:<[^/][^<]*)*)\n</code>", text)
    try:
        return found is not None and "print(" in ast.unparse(ast.parse(found[1]).body[-1:])
    except (SyntaxError, ValueError):
        return False


@torch.no_grad()
def measure(folder: Path, held: Sequence[Row], show: int = 2) -> dict[str, float]:
    """Figures of the saved model, read back as anybody will: nats per answer token, shares of greedy answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    figures: dict[str, float] = {"parameters": sum(p.numel() for p in model.parameters())}
    for kind in SHARES:
        rows = [row for row in held if row.kind == kind][:200]
        batch = collate([encode(tokenizer, row) for row in rows], tokenizer.pad_token_id)
        figures[f"{kind}_loss"] = float(answer_nll(model, batch).mean())
        said = greedy(model, tokenizer, [row.question for row in rows])
        if kind == "math":
            figures["math_right"] = sum(answer_of(s) == row.right for s, row in zip(said, rows)) / len(said)
            figures["math_well_formed"] = sum(answer_of(s) is not None for s in said) / len(said)
        elif kind == "code":
            figures["code_well_formed"] = sum(map(is_program, said)) / len(said)
        for row, text in list(zip(rows, said))[:show]:
            print(f"[{kind}] {row.question}\n{text}\n")
    return {name: round(value, 4) for name, value in figures.items()}


README = """# tiny

Assay's own language model for fast tests and benches: Llama architecture, {parameters:,.0f} parameters (hidden 128,
4 layers, 4 heads, tied embeddings), byte-level BPE of {vocabulary} tokens with one token a digit, float16 safetensors.
It was trained from nothing on word problems in two steps and small programs (written by rule, some wrong on purpose)
and on the operator's part of Assay's built-in set `helpful`. It knows ChatML, `<think>..</think><answer>..</answer>`
and `<code>..</code>`, and nothing of the world: no use beyond tests.

Made by `{command}` ({seconds:.0f} s on one core; the same machine makes the same bytes).

| measured on held-out text | |
|---|---|
| loss, nats per answer token: math / code / chat | {math_loss:.3f} / {code_loss:.3f} / {chat_loss:.3f} |
| word problems, greedy: right / well-formed | {math_right:.1%} / {math_well_formed:.1%} |
| programs, greedy: well-formed | {code_well_formed:.1%} |

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
    start = time.perf_counter()
    rows, held = corpus(args.seed, args.steps * BATCH)
    tokenizer = train_tokenizer(rows[:12_000])
    tokens = [encode(tokenizer, row, whole=row.kind == "chat") for row in rows]
    model = new_model(tokenizer, args.seed)
    losses = pretrain(model, tokens, args.steps, args.lr, args.seed)
    with models.quiet_transformers():
        models.save_model(model.to(torch.float16), tokenizer, args.out)
        seconds = time.perf_counter() - start
        figures: dict[str, Any] = measure(args.out, held)
    command = "python scripts/make_tiny.py" + "".join(
        f" --{key} {value}" for key, value in vars(args).items() if key != "out" and value != parser.get_default(key)
    )
    facts = {"vocabulary": len(tokenizer), "seconds": seconds, "command": command}
    (args.out / "README.md").write_text(README.format(**figures, **facts), encoding="utf-8")
    size = sum(file.stat().st_size for file in args.out.iterdir())
    figures |= {"loss_first": losses[0], "loss_last": losses[-1], "bytes": size, "seconds": round(seconds)}
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
