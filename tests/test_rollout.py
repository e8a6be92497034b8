"""Sampling and scoring on the real `tiny`: the same seed gives the same completion, and the shared prompt pass is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from assay import models
from assay.data import render_prompt
from assay.swarm.calibrate import calibrate, slack_bits, upper_bound, verify
from assay.swarm.rollout import Item, generate, score
from assay.swarm.sampling import Sampler, seed_of

QUESTIONS = (
    "Tom has 2 apples and buys 2 more. Each is sold for 3 coins. How many coins does Tom get?",
    "Write a program that prints 3 times 4 plus 5.",
    "What is rain?",
    "Anna reads 3 pages and Ben reads 2 pages every day. How many pages do both read in 4 days? Say it in one line.",
)
SAMPLER = Sampler(top_k=20)
LIMIT = 40


@pytest.fixture(scope="module")
def tiny() -> Any:
    return models.load("tiny", "float32")


@pytest.fixture(scope="module")
def items(tiny: Any) -> list[Item]:
    prompts = [
        tuple(tiny.tokenizer(render_prompt(q, "chatml"), add_special_tokens=False)["input_ids"]) for q in QUESTIONS
    ]
    return [Item(prompts[i % 4], seed_of("test", 1, "n", i % 4, i)) for i in range(48)]


@pytest.fixture(scope="module")
def made(tiny: Any, items: list[Item]) -> list[tuple[int, ...]]:
    return generate(tiny.model, items, SAMPLER, max_tokens=LIMIT, eos=tiny.tokenizer.eos_token_id)


@pytest.mark.parametrize("rows", [1, 7, 48])
def test_a_completion_does_not_depend_on_its_batch(
    tiny: Any, items: list[Item], made: list[tuple[int, ...]], rows: int
) -> None:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(rows)).tolist()
    again = generate(
        tiny.model, [items[i] for i in order], SAMPLER, max_tokens=LIMIT, eos=tiny.tokenizer.eos_token_id, rows=rows
    )
    assert again == [made[i] for i in order]


def test_completions_end_once_and_stay_within_the_limit(tiny: Any, made: list[tuple[int, ...]]) -> None:
    eos = tiny.tokenizer.eos_token_id
    for ids in made:
        assert 1 <= len(ids) <= LIMIT
        assert eos not in ids[:-1]
        assert ids[-1] == eos or len(ids) == LIMIT
    assert len(set(made)) > len(made) // 2, "different seeds must give different completions"


def test_other_seeds_give_other_completions(tiny: Any, items: list[Item], made: list[tuple[int, ...]]) -> None:
    others = [Item(i.prompt, i.seed ^ 1) for i in items]
    again = generate(tiny.model, others, SAMPLER, max_tokens=LIMIT, eos=tiny.tokenizer.eos_token_id)
    assert sum(a == b for a, b in zip(again, made)) < len(made) // 4


def plain_logprobs(model: Any, item: Item, ids: tuple[int, ...]) -> torch.Tensor:
    """One row, no cache, no padding."""
    full = torch.tensor([[*item.prompt, *ids]])
    logits = model(input_ids=full).logits[0, len(item.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, full[0, len(item.prompt) :, None])[:, 0]


def test_scores_and_gradients_are_those_of_a_plain_forward_pass(
    tiny: Any, items: list[Item], made: list[tuple[int, ...]]
) -> None:
    model = models.load("tiny", "float32").model.requires_grad_(True)
    weight = torch.rand(len(made), generator=torch.Generator().manual_seed(0))
    total = torch.zeros(())
    found: dict[int, torch.Tensor] = {}
    for scored in score(model, [i.prompt for i in items], made, micro_rows=10):
        logprob_NT = scored.logits_NTV.log_softmax(-1).gather(-1, scored.token_NT[..., None])[..., 0]
        for at, row in enumerate(scored.rows):
            found[row] = logprob_NT[at][scored.mask_NT[at]]
            assert tuple(scored.token_NT[at][scored.mask_NT[at]].tolist()) == made[row]
            total = total + weight[row] * found[row].sum()
    total.backward()
    shared = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = torch.zeros(())
    for row, item in enumerate(items):
        expected = plain_logprobs(model, item, made[row])
        assert torch.allclose(found[row], expected, atol=2e-4)
        plain = plain + weight[row] * expected.sum()
    plain.backward()
    for p, grad in zip(model.parameters(), shared):
        assert float((p.grad - grad).norm() / p.grad.norm()) < 1e-4


def test_a_prompt_needs_a_token_and_the_model_eval_mode(tiny: Any) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(tiny.model, [Item((), 1)], SAMPLER, max_tokens=4, eos=2)
    tiny.model.train()
    try:
        with pytest.raises(ValueError, match="eval mode"):
            generate(tiny.model, [Item((1,), 1)], SAMPLER, max_tokens=4, eos=2)
    finally:
        tiny.model.eval()


def test_margins_of_honest_completions_are_nothing_and_of_edited_ones_something(
    tiny: Any, items: list[Item], made: list[tuple[int, ...]]
) -> None:
    honest = verify(tiny.model, items, made, SAMPLER, 0.1)
    assert max(float(g.max()) for g in honest) < 1e-3
    edited = [(*ids[:-2], (ids[-2] + 1) % 1000, ids[-1]) for ids in made]
    assert min(float(g.max()) for g in verify(tiny.model, items, edited, SAMPLER, 0.1)) > 0.01
    others = [*made[4:], *made[:4]]  # right prompts, another's seeds; short answers may well coincide
    swapped = verify(tiny.model, items, others, SAMPLER, 0.1)
    caught = [float(g.max()) > 0.05 for g, own, other in zip(swapped, made, others) if own != other]
    assert len(caught) > 35
    assert sum(caught) > 0.95 * len(caught)


def test_calibration_of_equal_engines_leaves_nothing(tiny: Any, items: list[Item]) -> None:
    found = calibrate(tiny.model, tiny.model, items, SAMPLER, max_tokens=LIMIT, eos=tiny.tokenizer.eos_token_id)
    assert found.false_positive_rate == 0
    assert found.identical == 1
    assert found.boundary == 0
    assert found.max_margin == 0.01
    assert 0 <= found.slack_bits < 0.02
    assert 0.05 < found.upper_95 < 0.07  # the rule of three for 48 completions


def test_calibration_of_bf16_against_fp32_widens_the_limits_and_says_what_that_costs(
    tiny: Any, items: list[Item]
) -> None:
    half = models.load("tiny", "bfloat16")
    found = calibrate(half.model, tiny.model, items, SAMPLER, max_tokens=LIMIT, eos=tiny.tokenizer.eos_token_id)
    assert found.max_margin > 0.01
    assert found.false_positive_rate <= 1 / 48
    made = generate(half.model, items, SAMPLER, max_tokens=LIMIT, eos=tiny.tokenizer.eos_token_id)
    bits = [slack_bits(tiny.model, items, made, SAMPLER, limit) for limit in (0.0, 0.1, 1.0, 100.0)]
    assert bits == sorted(bits)
    assert bits[0] == 0
    assert abs(bits[-1] - 4.32) < 0.01  # all 20 candidates: log2(20)


@pytest.mark.parametrize(
    ("bad", "count", "bound"), [(0, 100, 0.0295), (5, 100, 0.1023), (1, 20, 0.2161), (20, 20, 1.0)]
)
def test_upper_bound_is_clopper_pearson(bad: int, count: int, bound: float) -> None:
    assert abs(upper_bound(bad, count) - bound) < 1e-4


def test_too_few_completions_to_calibrate(tiny: Any, items: list[Item]) -> None:
    with pytest.raises(ValueError, match="say nothing of a rate"):
        calibrate(tiny.model, tiny.model, items[:5], SAMPLER, max_tokens=4, eos=2)
