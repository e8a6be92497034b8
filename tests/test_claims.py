"""What is bound of a client's claims: real AdamW chains pass, forged ones say why not, nothing a peer sends raises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from assay.contribution import LoraUpdate, Tensors, tensors_sha256
from assay.federated.claims import Ordered, adamw_bound, chain_problem, last_step_matches

unhurried = settings(deadline=None)  # a busy machine is no failure

# --- the last step -------------------------------------------------------------------------------------------------------

START: Tensors = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)}


def moved(by: float, start: Tensors = START) -> dict[str, np.ndarray]:
    """`start` with every one of its 10 values moved: a step of norm by * sqrt(10)."""
    return {name: value + np.float32(by) for name, value in start.items()}


def update_of(*steps: Tensors, sent: Tensors | None = None) -> LoraUpdate:
    tensors = sent if sent is not None else steps[-1] if steps else moved(0.5)
    return LoraUpdate(
        participant="p", round=1, base_sha256="", tensors=tensors, sha256=tensors_sha256(tensors), steps=steps
    )


def test_last_step_must_be_the_submission_exactly() -> None:
    chain = moved(0.25), moved(0.5)
    assert last_step_matches(update_of(*chain))
    poisoned = moved(0.5)
    poisoned["b"][3] = np.nextafter(poisoned["b"][3], np.float32(2))
    assert not last_step_matches(update_of(*chain, sent=poisoned))
    assert last_step_matches(update_of(*chain, sent=poisoned), tolerance=1e-6)
    assert not last_step_matches(update_of(*chain, sent=moved(0.6)), tolerance=0.05)
    assert not last_step_matches(update_of())


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_malformed_last_steps_do_not_match_and_do_not_raise(tolerance: float) -> None:
    sent = moved(0.5)
    nan = {**sent, "b": np.full(4, np.nan, np.float32)}
    for last in (
        {"a": sent["a"]},
        {**sent, "c": sent["b"]},
        {**sent, "b": sent["b"][:1]},
        {**sent, "a": sent["a"].T},
        nan,
    ):
        assert not last_step_matches(update_of(last, sent=sent), tolerance)
    assert not last_step_matches(update_of(nan, sent=nan), tolerance)
    with pytest.raises(ValueError, match="tolerance"):
        last_step_matches(update_of(sent), tolerance=-1)


# --- chains ---------------------------------------------------------------------------------------------------------

RATE = 1e-3


def trained(
    steps: int, seed: int = 0, lr: float = RATE, scale: float = 1.0, clip: float = 1.0
) -> tuple[dict[str, NDArray[np.float32]], list[dict[str, NDArray[np.float32]]]]:
    """A chain by torch's own AdamW on gradients of one drifting direction and noise, as batches give."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"m.0.lora_A.weight": (4, 16), "m.0.lora_B.weight": (16, 4)}
    weights = {n: torch.nn.Parameter(0.2 * torch.randn(s, generator=rng)) for n, s in shapes.items()}
    start = {n: w.detach().numpy().copy() for n, w in weights.items()}
    drift = {n: torch.randn(s, generator=rng) for n, s in shapes.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, weight_decay=0.0)
    chain = []
    for _ in range(steps):
        for n, w in weights.items():
            w.grad = scale * (drift[n] + 0.7 * torch.randn(w.shape, generator=rng))
        torch.nn.utils.clip_grad_norm_(weights.values(), clip)
        optimizer.step()
        chain.append({n: w.detach().numpy().copy() for n, w in weights.items()})
    return start, chain


def between(start: Tensors, end: Tensors, shares: list[float]) -> list[dict[str, NDArray[np.float32]]]:
    """A forged chain on the straight line from start to end."""
    return [{n: (start[n] + np.float32(s) * (end[n] - start[n])).astype(np.float32) for n in start} for s in shares]


@unhurried
@given(st.integers(1, 10), st.integers(0, 1000), st.sampled_from([5e-5, 1e-3, 1e-2]), st.sampled_from([1e-4, 1.0, 1e4]))
def test_chains_of_real_adamw_pass(steps: int, seed: int, lr: float, scale: float) -> None:
    start, chain = trained(steps, seed, lr, scale)
    assert chain_problem(chain, start, Ordered(steps=steps, lr=lr)) == ""


def test_the_bound_is_what_adamw_can_do_and_no_more() -> None:
    """Search for the gradients that move one coordinate furthest in step t: the bound is reached and never passed."""
    for t in (1, 2, 5, 10):
        ratio = 0.9 / 0.999  # Cauchy-Schwarz: equality at g_i ~ (beta1 / beta2)^(t - i)
        best = 0.0
        for powers in (ratio ** np.arange(t)[::-1], np.ones(t), np.arange(1, t + 1) ** 3.0):
            weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
            optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0, eps=1e-30)
            for g in powers:
                before = weight.item()
                weight.grad = torch.full((1,), float(g), dtype=torch.float64)
                optimizer.step()
            best = max(best, abs(weight.item() - before))
        assert best <= adamw_bound(t) * (1 + 1e-9)
        assert best >= adamw_bound(t) * (1 - 1e-6)
    assert adamw_bound(1) == 1.0


def test_a_poisoned_end_with_steps_made_up_between_is_found() -> None:
    """The published code believes such a chain: it only ever scores it."""
    start, chain = trained(4)
    rng = np.random.default_rng(1)
    poison = {n: (v + 3 * RATE * rng.standard_normal(v.shape)).astype(np.float32) for n, v in start.items()}
    ordered = Ordered(steps=4, lr=RATE)
    for shares in ([0.25, 0.5, 0.75, 1.0], [0.1, 0.3, 0.9, 1.0]):
        assert "step 1 moves" in chain_problem(between(start, poison, shares), start, ordered)
        assert "the same move" in chain_problem(between(start, poison, shares), start, Ordered(steps=4))
    jump = [*chain[:3], poison]
    assert "step 4 moves a value by" in chain_problem(jump, start, ordered)
    # a true chain of one training with the poison put on top at the end
    assert "AdamW moves it by at most" in chain_problem(
        [*chain[:3], {n: v + np.float32(RATE) for n, v in chain[3].items()}], start, ordered
    )


def test_each_rule_says_which_step() -> None:
    start, chain = trained(3)
    ordered = Ordered(steps=3, lr=RATE)
    nan = {n: np.full_like(v, np.nan) for n, v in start.items()}
    name = next(iter(start))
    reshaped = {**chain[1], name: chain[1][name].T}
    back = {n: 2 * chain[0][n] - chain[1][n] for n in start}  # as far the other way
    cases: list[tuple[list[dict[str, NDArray[np.float32]]], str]] = [
        ([], "0 steps claimed, expected 3"),
        (chain[:2], "2 steps claimed, expected 3"),
        ([start, *chain[:2]], "step 1 does not move"),
        ([chain[0], chain[0], chain[1]], "step 2 does not move"),
        ([chain[0], nan, chain[2]], "step 2 is not finite"),
        ([chain[0], {name: chain[1][name]}, chain[2]], "step 2: tensor names differ from the adapter's"),
        ([chain[0], reshaped, chain[2]], f"step 2: {name} has shape (16, 4), expected (4, 16)"),
        ([chain[0], back, chain[2]], "step 2 turns back"),
        ([chain[0], chain[0] | between(chain[0], start, [-1.0])[0], chain[2]], "steps 1 and 2 are the same move"),
    ]
    for claimed, sentence in cases:
        assert chain_problem(claimed, start, ordered).startswith(sentence), sentence
    # unlike a rate ten times the ordered one
    start, hot = trained(3, lr=10 * RATE)
    assert "step 1 moves a value by 10 x the rate" in chain_problem(hot, start, ordered)
    assert chain_problem(hot, start, Ordered(steps=3)) == "", "optimizer = any: no bound from the rate"
    # and unlike one of a tenth: no sign step
    start, cold = trained(3, lr=0.1 * RATE)
    assert "step 1 moves 0% of its values by the rate" in chain_problem(cold, start, ordered)


def test_a_chain_that_starts_elsewhere_is_found() -> None:
    start, chain = trained(3)
    elsewhere = {n: v + np.float32(0.1) for n, v in start.items()}
    assert chain_problem(chain, elsewhere, Ordered(steps=3, lr=RATE)).startswith("step 1 moves")


@unhurried
@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=2, max_size=2), max_size=4),
    st.integers(1, 3),
)
def test_no_chain_of_numbers_raises(values: list[list[float]], steps: int) -> None:
    start = {"a": np.zeros(2, np.float32)}
    chain = [{"a": np.array(v, np.float32)} for v in values]
    for lr in (None, RATE):
        assert isinstance(chain_problem(chain, start, Ordered(steps=steps, lr=lr)), str)


def test_operators_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="steps"):
        Ordered(steps=0)
    for lr in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="lr"):
            Ordered(steps=1, lr=lr)
