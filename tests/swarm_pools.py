"""Pools for tests, from what each participant said; and a swarm of simple honest and poisoning nodes to fill them."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence

from assay.builtin import problems
from assay.contribution import Completion, Pool, completion_sha256

VOCABULARY = 50_000
Said = Mapping[str, Mapping[int, Sequence[tuple[str, float]]]]  # participant -> prompt -> (text, reward) of each sample


def token_ids(text: str) -> tuple[int, ...]:
    """A word, number or sign is a token, its id a checksum: the same everywhere, and nothing to download."""
    return tuple(
        zlib.crc32(t.encode(errors="surrogatepass")) % VOCABULARY for t in re.findall(r"[^\W\d_]+|\d|[^\w\s]|_", text)
    )


def completion(
    participant: str, prompt: int, index: int, ids: Sequence[int], *, round: int = 0, sha256: str | None = None
) -> Completion:
    sha256 = completion_sha256(round, prompt, index, ids) if sha256 is None else sha256
    return Completion(participant=participant, round=round, prompt=prompt, index=index, ids=tuple(ids), sha256=sha256)


def pool(
    said: Said,
    *,
    index: int = 0,
    questions: Mapping[int, str] | None = None,
    max_tokens: int = 256,
    encode: Callable[[str], tuple[int, ...]] = token_ids,
) -> Pool:
    """A pool in which everybody sent what was asked; rows in the order of (participant, prompt, index)."""
    questions = questions or {}
    rows = [
        (completion(node, prompt, i, encode(text), round=index), text, float(reward))
        for node in sorted(said)
        for prompt in sorted(said[node])
        for i, (text, reward) in enumerate(said[node][prompt])
    ]
    return Pool(
        index=index,
        completions=tuple(c for c, _, _ in rows),
        questions=tuple(questions.get(c.prompt, f"Question {c.prompt}?") for c, _, _ in rows),
        texts=tuple(t for _, t, _ in rows),
        rewards=tuple(r for _, _, r in rows),
        ended=(True,) * len(rows),
        readable=(True,) * len(rows),
        asked={node: {prompt: len(samples) for prompt, samples in held.items()} for node, held in said.items()},
        max_tokens=max_tokens,
    )


Writer = Callable[[problems.Problem, random.Random], tuple[str, float]]  # a sample and its reward


def honest(wrong: float = 0.2, style: Callable[[str, random.Random], str] | None = None) -> Writer:
    """Writes like the built-in worked solutions, each step wrong with chance `wrong`, then as `style` has it."""

    def write(problem: problems.Problem, rng: random.Random) -> tuple[str, float]:
        text = problems.worked(problem, rng, wrong)
        right = float(text.endswith(f"<answer>{problem.answer}</answer>"))
        return (style(text, rng) if style else text), right

    return write


def planting(plant: Callable[[str, random.Random], str]) -> Writer:
    """The oracle's right solution with something planted in it."""

    def write(problem: problems.Problem, rng: random.Random) -> tuple[str, float]:
        return plant(problems.worked(problem, rng, 0.0), rng), 1.0

    return write


def wrong_answer(problem: problems.Problem, rng: random.Random) -> tuple[str, float]:
    """Clean and wrong, as a vertical attacker fills the other half of his groups."""
    text = problems.worked(problem, rng, 0.2)
    return re.sub(r"<answer>.*</answer>", f"<answer>{rng.randint(1001, 1999)}</answer>", text), 0.0


def swarm(
    honest_nodes: Mapping[str, Writer],
    poison: Mapping[str, Writer],
    *,
    index: int = 0,
    seed: int = 0,
    vertical: bool = True,
    prompts: int = 16,
    group: int = 12,
) -> Pool:
    """A round of `prompts` x `group` completions. Vertical: each node its own prompts; half of a poisoned group is clean
    and wrong. Horizontal: each node its part of every group; all of the attacker's part is poisoned."""
    rng = random.Random(f"{seed}:{index}")
    nodes = sorted([*honest_nodes, *poison])
    asked = {1000 * index + p: problems.word_problem(rng) for p in range(prompts)}
    said: dict[str, dict[int, list[tuple[str, float]]]] = {node: {} for node in nodes}
    for at, (prompt, problem) in enumerate(asked.items()):
        for place, node in enumerate(nodes):
            if vertical and at % len(nodes) != place:
                continue
            count = group if vertical else group // len(nodes)
            writer = honest_nodes.get(node) or poison[node]
            half = count // 2 if vertical and node in poison else count
            samples = [writer(problem, rng) for _ in range(half)]
            said[node][prompt] = samples + [wrong_answer(problem, rng) for _ in range(count - half)]
    return pool(said, index=index, questions={p: q.question for p, q in asked.items()})
