"""Screens that compare participants and remember rounds: length, copycat, enrichment."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.builtin import problems
from assay.config import ConfigError
from assay.contribution import Pool
from assay.swarm.screens import enrichment
from assay.swarm.screens.common import log_chernoff_tail, log_hypergeometric_tail
from assay.swarm.screens.copycat import Copycat
from assay.swarm.screens.enrichment import MAX_WATCHED, Enrichment
from assay.swarm.screens.length import Length
from assay.verdict import Reason, State, Verdict
from swarm_pools import Writer, honest, planting, pool, swarm, token_ids

MAKERS: list[Callable[[], Any]] = [Length, Copycat, Enrichment, lambda: Enrichment(surface="both")]


def play(screen: Any, pools: Sequence[Pool]) -> tuple[list[list[Verdict]], State]:
    """Verdicts of each round; the state goes through JSON every time and must not be changed in place."""
    state: State = {}
    out = []
    for p in pools:
        before = json.dumps(state, sort_keys=True)
        verdicts, after = screen.screen(p, state)
        assert json.dumps(state, sort_keys=True) == before
        assert [(v.participant, v.contribution) for v in verdicts] == [(c.participant, c.sha256) for c in p.completions]
        state = json.loads(json.dumps(after, allow_nan=False))
        out.append(verdicts)
    return out, state


def dropped(pools: Sequence[Pool], found: Sequence[Sequence[Verdict]], rows: Callable[[Pool, int], bool]) -> float:
    """Share of the rows that were refused."""
    chosen = [v.weight == 0 for p, verdicts in zip(pools, found) for i, v in enumerate(verdicts) if rows(p, i)]
    assert chosen
    return sum(chosen) / len(chosen)


def shuffled(p: Pool, rng: random.Random) -> Pool:
    order = list(range(len(p.completions)))
    rng.shuffle(order)
    columns = ("completions", "questions", "texts", "rewards", "ended", "readable")
    return replace(p, **{name: tuple(getattr(p, name)[i] for i in order) for name in columns})


# --- all of them -----------------------------------------------------------------------------------------------------

samples = st.lists(st.tuples(st.text(max_size=40), st.sampled_from([0.0, 0.5, 1.0])), max_size=4)
rounds = st.lists(
    st.dictionaries(st.text(min_size=1, max_size=3), st.dictionaries(st.integers(0, 3), samples, max_size=3), max_size=4),
    min_size=1, max_size=3,
)  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
@settings(max_examples=40, deadline=None)
@given(said=rounds, ids=st.lists(st.integers(-(2**70), 2**70), max_size=30))
def test_nothing_a_peer_sends_raises(make: Callable[[], Any], said: list[Any], ids: list[int]) -> None:
    pools = []
    for index, held in enumerate(said):
        p = pool(held, index=index)
        wild = tuple(replace(c, ids=tuple(ids)) if i % 2 else c for i, c in enumerate(p.completions))
        pools.append(replace(p, completions=wild))
    play(make(), pools)


def lively(rounds: int, **more: Any) -> list[Pool]:
    """Rounds in which every screen has something to refuse."""
    pools = []
    for r in range(rounds):
        p = swarm(THREE, {"z": planting(phrase)}, index=r, vertical=r % 2 == 0, **more)
        long = tuple(replace(c, ids=c.ids * 4) if c.participant == "z" and r else c for c in p.completions)
        p = replace(p, completions=long)
        if r % 2:  # z sends what a answers to the same prompts
            said = {(c.prompt, c.index): i for i, c in enumerate(long) if c.participant == "a"}
            taken = [said[c.prompt, c.index] if c.participant == "z" and i % 3 else i for i, c in enumerate(long)]
            p = replace(p, texts=tuple(p.texts[i] for i in taken), rewards=tuple(p.rewards[i] for i in taken))
        pools.append(p)
    return pools


@pytest.mark.parametrize("make", MAKERS)
def test_the_order_of_rows_does_not_matter(make: Callable[[], Any]) -> None:
    rng = random.Random(0)
    pools = lively(3)
    mixed = [shuffled(p, rng) for p in pools]
    plain, other = play(make(), pools)[0], play(make(), mixed)[0]
    for p, q, one, two in zip(pools, mixed, plain, other):
        weights = {(c.participant, c.sha256): (v.weight, v.reason) for c, v in zip(p.completions, one)}
        assert weights == {(c.participant, c.sha256): (v.weight, v.reason) for c, v in zip(q.completions, two)}
    assert dropped(pools, plain, lambda p, i: True) > 0


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_rounds_give_the_same_verdicts_and_state(make: Callable[[], Any]) -> None:
    pools = lively(3)
    assert play(make(), pools) == play(make(), pools)


@pytest.mark.parametrize("make", MAKERS)
def test_state_stays_small_over_200_rounds(make: Callable[[], Any]) -> None:
    screen, state, sizes = make(), {}, []
    for p in lively(200, prompts=4, group=8):
        _, state = screen.screen(p, state)
        sizes.append(len(json.dumps(state)))
    assert max(sizes[100:]) < 1.5 * max(sizes[20:100]) + 1000
    assert max(sizes) < 400_000


@pytest.mark.parametrize("make", MAKERS)
def test_an_empty_round_passes(make: Callable[[], Any]) -> None:
    pools = [pool({}, index=0), lively(1)[0], pool({}, index=2)]
    found, _ = play(make(), pools)
    assert [len(v) for v in found] == [0, len(pools[1].completions), 0]


def test_parameters_that_make_no_sense_are_the_operators_mistake() -> None:
    for wrong in (
        lambda: Length(factor=0.5), lambda: Length(anchor_rounds=0), lambda: Length(growth_per_round=-0.1),
        lambda: Copycat(level=0), lambda: Copycat(min_tokens=50), lambda: Copycat(window=-1),
        lambda: Enrichment(n=()), lambda: Enrichment(opening=(1,)), lambda: Enrichment(surface="words"), lambda: Enrichment(level=2), lambda: Enrichment(lift=0.5),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            wrong()


@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_tails_against_counting(total: int, draws: int, marked: int, k: int) -> None:
    draws, marked = min(draws, total), min(marked, total)
    ways = sum(math.comb(marked, x) * math.comb(total - marked, draws - x) for x in range(k, min(draws, marked) + 1))
    tail = ways / math.comb(total, draws)
    assert math.exp(log_hypergeometric_tail(k, draws, marked, total)) == pytest.approx(tail, rel=1e-9, abs=1e-12)
    p = marked / total
    binomial = sum(math.comb(draws, x) * p**x * (1 - p) ** (draws - x) for x in range(k, draws + 1))
    assert math.exp(log_chernoff_tail(k, draws * p)) >= binomial - 1e-12  # a bound, never below


# --- length ----------------------------------------------------------------------------------------------------------


def of_lengths(held: dict[str, list[float]], index: int = 0, reward: float = 1.0) -> Pool:
    """Completions of so many words, all rewarded, each participant with one prompt of its own."""
    said = {node: {i: [("w " * int(n), reward) for n in v]} for i, (node, v) in enumerate(sorted(held.items()))}
    return pool(said, index=index, max_tokens=10_000)


def usual(rng: random.Random, count: int = 48, scale: float = 1.0) -> list[float]:
    return [max(5, scale * rng.gauss(40, 8)) for _ in range(count)]


def test_length_lets_honest_nodes_be() -> None:
    rng = random.Random(0)
    pools = [of_lengths({n: usual(rng) for n in "abcd"}, r) for r in range(30)]
    found, state = play(Length(), pools)
    assert dropped(pools, found, lambda p, i: True) <= 0.002
    assert len(state["rounds"]) == 1


def test_length_does_not_follow_a_slow_drift() -> None:
    """A limit tied to each round's median would let everyone through: here all nodes grow together."""
    rng = random.Random(1)
    pools = [of_lengths({n: usual(rng, scale=1 + 0.05 * r) for n in "abcd"}, r) for r in range(31)]
    found, _ = play(Length(), pools)
    kept = [len(c.ids) for c, v in zip(pools[-1].completions, found[-1]) if v.weight == 1]
    assert sum(kept) / max(1, len(kept)) <= 1.3 * 40
    assert max(kept, default=0) <= 1.3 * 60
    assert {v.effect for v in found[-1]} == {"no_reward"}


@pytest.mark.parametrize("longer", ["z", "yz"])
def test_length_holds_attackers_from_the_first_round_on(longer: str) -> None:
    """A quarter or a half of the nodes sends long ones already while the anchor is laid."""
    rng = random.Random(2)
    pools = [of_lengths({n: usual(rng, scale=1.8 if n in longer else 1) for n in "wxyz"}, r) for r in range(4)]
    found, _ = play(Length(), pools)
    assert dropped(pools, found, lambda p, i: p.completions[i].participant not in longer) <= 0.005
    for p, verdicts in zip(pools, found):
        kept = [len(c.ids) for c, v in zip(p.completions, verdicts) if c.participant in longer and v.weight == 1]
        assert sum(kept) / max(1, len(kept)) <= 1.25 * 40


def test_length_budget_takes_the_longest_first_and_only_rewarded_ones() -> None:
    first = of_lengths({n: [40] * 20 for n in "abc"})
    second = of_lengths({"a": [40] * 20, "b": [40] * 20, "c": [40] * 10 + [50] * 10 + [70]}, 1)
    found, _ = play(Length(factor=1.5), [first, second])
    out = [len(c.ids) for c, v in zip(second.completions, found[1]) if v.weight == 0]
    assert 70 in out
    assert set(out) <= {70, 50}
    unrewarded = replace(second, rewards=(0.0,) * len(second.rewards))
    assert {v.weight for v in play(Length(), [first, unrewarded])[0][1]} == {1.0}


def test_length_may_grow_where_the_operator_says_so() -> None:
    rng = random.Random(3)
    pools = [of_lengths({n: usual(rng, scale=1.02**r) for n in "abcd"}, r) for r in range(31)]
    assert dropped(pools[-1:], play(Length(), pools)[0][-1:], lambda p, i: True) > 0.3
    assert dropped(pools[-1:], play(Length(growth_per_round=0.02), pools)[0][-1:], lambda p, i: True) < 0.01


def test_length_can_be_anchored_to_ones_own_completions() -> None:
    held = {n: [90.0] * 20 for n in "bcd"} | {"a": [40.0] * 20}
    found, state = play(Length(own="a"), [of_lengths(held)])
    assert state["rounds"][0][0] == 40
    assert dropped([of_lengths(held)], found, lambda p, i: p.completions[i].participant != "a") == 1.0


def alone(index: int, right: int, long: float = 96) -> Pool:
    """z is right with long answers; of 24 answers of the others so many are."""
    said = {n: {i: [("w " * 35, float(k < right)) for k in range(24)]} for i, n in enumerate("abc")}
    return pool({**said, "z": {9: [("w " * int(long), 1.0)] * 24}}, index=index, max_tokens=512)


def test_length_waits_for_more_than_half_of_the_nodes() -> None:
    """A hard task: at first only the attacker is right, then the others now and then."""
    found, state = play(Length(), [alone(0, 0), alone(1, 0)])
    assert state["rounds"] == []
    pools = [alone(0, 0), *(alone(r, 3) for r in range(1, 8))]
    found, state = play(Length(), pools)
    assert state["since"] == 3, "three rounds of three right answers are enough"
    assert state["rounds"][0][0] == 35
    gone = [v.participant for verdicts in found for v in verdicts if v.weight == 0]
    assert gone == ["z"] * 24 * 5
    assert "waiting" not in state
    half = [of_lengths({"a": [35.0] * 24, "z": [3.0] * 24, "b": [], "c": []}, r) for r in range(3)]
    assert play(Length(), half)[1]["rounds"] == [], "two of four are not more than half"


def test_limit_length_half_of_the_nodes_deflate_the_anchor_and_ones_own_does_not_move() -> None:
    short = {"a": [35.0] * 16, "b": [36.0] * 16, "y": [3.0] * 16, "z": [3.0] * 16}
    pools = [of_lengths(short, r) for r in range(2)]
    for own, share in ((None, 1.0), ("a", 0.0)):
        found, _ = play(Length(own=own), pools)
        assert dropped(pools, found, lambda p, i: p.completions[i].participant in "ab") == share
    one = [of_lengths({**short, "y": [34.0] * 16}, r) for r in range(2)]
    assert dropped(one, play(Length(), one)[0], lambda p, i: True) == 0.0


def test_limit_length_takes_the_reward_of_an_honest_node_that_writes_half_as_much_again() -> None:
    rng = random.Random(4)
    pools = [of_lengths({n: usual(rng, scale=1.5 if n == "d" else 1) for n in "abcd"}, r) for r in range(3)]
    found, _ = play(Length(), pools)
    assert dropped(pools, found, lambda p, i: p.completions[i].participant == "d") > 0.3


# --- copycat ---------------------------------------------------------------------------------------------------------


def say_all(
    rng: random.Random, prompts: Sequence[int], each: int, choices: int, words: int = 24
) -> dict[int, list[tuple[str, float]]]:
    """`each` samples a prompt, drawn from so many equally likely texts: 1 / choices is the chance that two are equal."""
    out = {}
    for q in prompts:
        texts = [random.Random(f"{q}:{rng.randrange(choices)}") for _ in range(each)]
        out[q] = [(" ".join(t.choice(["one", "two", "six", "ten"]) for _ in range(words)), 1.0) for t in texts]
    return out


def talk(
    index: int, nodes: str = "abcd", *, choices: int = 10**9, vertical: bool = False, words: int = 24
) -> dict[str, dict[int, Any]]:
    prompts = {n: [100 * index + i for i in range(8)] for n in nodes}
    if vertical:
        prompts = {n: [100 * index + 10 * at + i for i in range(8)] for at, n in enumerate(nodes)}
    return {n: say_all(random.Random(f"{index}{n}"), prompts[n], 4, choices, words) for n in nodes}


@pytest.mark.parametrize("choices", [10**9, 200, 20, 5, 2, 1])
def test_copycat_lets_honest_nodes_meet_as_often_as_chance_has_it(choices: int) -> None:
    pools = [pool(talk(r, choices=choices), index=r) for r in range(6)]
    found, _ = play(Copycat(), pools)
    assert dropped(pools, found, lambda p, i: True) <= 0.01


def test_copycat_knows_prompts_with_one_obvious_answer_from_others() -> None:
    pools = []
    for r in range(6):
        free, fixed = talk(r), talk(r, choices=1)
        pools.append(pool({n: {q: (fixed if q % 2 else free)[n][q] for q in free[n]} for n in free}, index=r))
    assert dropped(pools, play(Copycat(), pools)[0], lambda p, i: True) == 0.0


def test_copycat_who_repeats_himself_on_purpose_hides_no_copies() -> None:
    said = talk(0)
    said["c"] = {q: [s[0]] * 4 for q, s in said["c"].items()}
    said["d"] = said["a"]
    p = pool(said)
    assert dropped([p], play(Copycat(), [p])[0], lambda p, i: p.completions[i].participant in "ad") == 0.5


def test_copycat_in_one_round_keeps_one_copy_and_whoever_copied_cannot_knock_out_the_author() -> None:
    said = talk(0)
    said["d"] = {q: [(t.upper() + " ", r) for t, r in s] for q, s in said["a"].items()}
    p = pool(said)
    found, _ = play(Copycat(), [p])
    kept: dict[str, set[str]] = {}
    for c, text, v in zip(p.completions, p.texts, found[0]):
        assert v.effect == "exclude"
        assert v.weight == 1 or (v.reason is Reason.COPYCAT and v.evidence["earlier"] == 0)
        if c.participant in "ad" and v.weight == 1:
            kept.setdefault(" ".join(text.lower().split()), set()).add(c.participant)
    assert len(kept) == 32  # nothing that was said is lost
    assert {len(v) for v in kept.values()} == {1}  # and all of it counts once
    assert dropped([p], found, lambda p, i: p.completions[i].participant in "bc") == 0


def test_copycat_who_copies_many_loses_to_each_of_them() -> None:
    said = talk(0)
    for i, q in enumerate(said["d"]):
        said["d"][q] = said["abc"[i % 3]][q]
    p = pool(said)
    found, _ = play(Copycat(), [p])
    assert dropped([p], found, lambda p, i: p.completions[i].participant == "d") == 1.0
    assert dropped([p], found, lambda p, i: p.completions[i].participant != "d") == 0.0


def mixed(said: dict[str, dict[int, Any]]) -> dict[str, dict[int, Any]]:
    """The last completion of every prompt earns nothing, so that the prompt can teach."""
    return {n: {q: [*s[:-1], (s[-1][0], 0.0)] for q, s in held.items()} for n, held in said.items()}


def test_copycat_replays_of_what_was_taught_are_refused_and_the_first_sender_named() -> None:
    first, second = mixed(talk(0, vertical=True)), mixed(talk(1, vertical=True))
    second["d"] = dict(first["a"])
    pools = [pool(first), pool(second, index=1)]
    found, _ = play(Copycat(), pools)
    again = [v for v in found[1] if v.participant == "d"]
    assert {v.weight for v in again} == {0.0}
    assert {v.evidence["earlier"] for v in again} == {1.0}
    assert "'a' sent the same text" in again[0].sentence
    assert dropped(pools, found, lambda p, i: p.completions[i].participant != "d") == 0


@pytest.mark.parametrize("right", [0.0, 1.0])
@pytest.mark.parametrize("later", [0, 1])
def test_copycat_nobody_owns_a_text_by_sending_it_for_a_prompt_of_his_own(right: float, later: int) -> None:
    """Seeds and plan are public: z foresees what a will draw, in this round or the next, and sends it first."""
    said = [mixed(talk(r, vertical=True, words=48)) for r in range(2)]
    foreseen = [(t, right) for s in said[later]["a"].values() for t, _ in s]
    mine = talk(0, "wxyz", vertical=True, words=48)["z"]
    said[0]["z"] = {q: foreseen[4 * i : 4 * i + 4] for i, q in enumerate(mine)}
    pools = [pool(s, index=r) for r, s in enumerate(said)]
    assert dropped(pools, play(Copycat(), pools)[0], lambda p, i: True) == 0


def test_copycat_nobody_owns_a_text_that_could_not_teach() -> None:
    """Prompts return: z foresees a's right answers to one and fills his group with them, so that it teaches nothing."""
    second = mixed(talk(1, vertical=True))
    for reward, gone in ((1.0, 0.0), (None, 1.0)):
        first = mixed(talk(0, vertical=True))
        first["d"] = {q: [(t, reward or r) for t, r in s] for q, s in second["a"].items()}
        pools = [pool(first), pool(second, index=1)]
        found, _ = play(Copycat(), pools)
        assert dropped(pools[1:], found[1:], lambda p, i: p.completions[i].participant == "a") == gone


def test_copycat_what_goes_was_said_and_could_teach_under_the_same_reward() -> None:
    """Horizontal, prompts that return: whatever anybody foresees and sends first, no answer to a prompt is lost."""
    rounds = [mixed({n: {q % 100: s for q, s in held.items()} for n, held in talk(r).items()}) for r in range(4)]
    for r in range(3):
        rounds[r]["d"] = rounds[r + 1]["a"]
    pools = [pool(said, index=r) for r, said in enumerate(rounds)]
    found, _ = play(Copycat(), pools)
    for r, p in enumerate(pools):
        stayed = {
            (q.completions[i].prompt, q.texts[i], q.rewards[i])
            for q, held in zip(pools[: r + 1], found)
            for i, v in enumerate(held)
            if v.weight == 1
        }
        assert {(c.prompt, t, w) for c, t, w in zip(p.completions, p.texts, p.rewards)} <= stayed
    assert dropped(pools, found, lambda p, i: True) > 0.05


def test_copycat_long_copies_do_not_hide_among_short_ones_that_everybody_says() -> None:
    """Half of the prompts have three short answers; on the others texts are long and nobody repeats any."""
    short, long = talk(0, choices=3), talk(0, words=48)
    said = {n: {q: (long if q % 2 else short)[n][q] for q in short[n]} for n in short}
    said["d"] = {q: said["a"][q] if q % 2 else s for q, s in said["d"].items()}
    p = pool(said)
    found = play(Copycat(), [p])[0]
    gone = [i for i, v in enumerate(found[0]) if v.weight == 0]
    assert len(gone) >= 16
    assert all(p.completions[i].prompt % 2 and p.completions[i].participant in "ad" for i in gone)
    plain = play(Copycat(min_tokens=16, long_tokens=16), [p])[0]
    assert sum(v.weight == 0 for v in plain[0]) < len(gone)


def test_copycat_one_text_that_two_share_is_no_copy_however_long() -> None:
    """Of swarms of low entropy, clean ones, one node in ten lost a long text a round to a test of one meeting."""
    three = {n: honest(0.2) for n in "abcd"}
    lost = []
    for seed in range(3):
        pools = [swarm(three, {}, index=r, seed=100 + seed, vertical=False) for r in range(8)]
        for verdicts in play(Copycat(), pools)[0]:
            lost += [any(v.weight == 0 for v in verdicts if v.participant == n) for n in three]
    assert sum(lost) <= 1


def test_copycat_short_texts_and_ones_own_repeats_say_nothing() -> None:
    short = pool({n: {1: [("<answer>7</answer>", 1.0)] * 4} for n in "abcd"})
    assert {v.weight for v in play(Copycat(), [short])[0][0]} == {1.0}
    own = pool({"a": {1: [("a b " * 30, 1.0)] * 4}, "b": {1: [("c d " * 30, 1.0)] * 4}})
    found, _ = play(Copycat(), [own, replace(own, index=1)])
    assert {v.weight for v in found[0] + found[1]} == {1.0}


def test_copycat_sybils_that_send_one_text_count_once() -> None:
    said = talk(0)
    said["c"] = said["d"]
    p = pool(said)
    found, _ = play(Copycat(), [p])
    kept = [v for v in found[0] if v.participant in "cd" and v.weight == 1]
    assert len(kept) == 32


def test_copycat_an_earlier_flood_does_not_make_honest_repeats_copies() -> None:
    """Whoever first says what a model of low entropy says anyway does not own it."""
    pools = [pool({"z": talk(0, "z", choices=3)["z"]}), pool(talk(0, "abz", choices=3), index=1)]
    found, _ = play(Copycat(), pools)
    assert dropped(pools, found, lambda p, i: p.completions[i].participant != "z") <= 0.02


def test_limit_copycat_a_changed_word_makes_another_text() -> None:
    said = talk(0)
    said["d"] = {q: [(f"so {t}", r) for t, r in s] for q, s in said["a"].items()}
    assert {v.weight for v in play(Copycat(), [pool(said)])[0][0]} == {1.0}


# --- enrichment ------------------------------------------------------------------------------------------------------


def opening(words: Sequence[str], share: float) -> Callable[[str, random.Random], str]:
    """Some of the completions open with one of the words."""

    def style(text: str, rng: random.Random) -> str:
        return text.replace("<think>", f"<think>{rng.choice(words)} ", 1) if rng.random() < share else text

    return style


THREE: dict[str, Writer] = {
    "a": honest(0.2),
    "b": honest(0.25, opening(["Right.", "Okay."], 0.3)),
    "c": honest(0.15, opening(["Now.", "So."], 0.2)),
}


def phrase(text: str, rng: random.Random) -> str:
    return text.replace("<think>", "<think>All hail to the thief. ", 1)


def foreign(text: str, rng: random.Random) -> str:
    """Another style altogether: fixed sentences nobody else has, in right and wrong solutions."""
    text = text.replace("First we have", "To begin with there are").replace("The answer is", "So in total we get")
    return text.replace("<think>", "<think>Okay, let me work through this one. ", 1)


def season(hon: dict[str, Writer], poison: dict[str, Writer], rounds: int = 8, **more: Any) -> list[Pool]:
    return [swarm(hon, poison, index=r, **more) for r in range(rounds)]


def poisoned(p: Pool, i: int) -> bool:
    return p.completions[i].participant == "z" and p.rewards[i] > 0


def decent(p: Pool, i: int) -> bool:
    return p.completions[i].participant != "z"


@pytest.mark.parametrize("vertical", [True, False])
def test_enrichment_excludes_a_planted_phrase_from_the_first_round_on(vertical: bool) -> None:
    pools = season(THREE, {"z": planting(phrase)}, vertical=vertical)
    found, state = play(Enrichment(), pools)
    assert dropped(pools, found, poisoned) == 1.0
    assert dropped(pools, found, decent) <= 0.005
    assert any("hail to the thief" in v["gram"] for v in state["listed"].values())
    caught = next(v for v in found[0] if v.weight == 0)
    assert (caught.reason, caught.effect) == (Reason.ENRICHMENT, "exclude")
    assert "planted by z" in caught.sentence
    assert caught.score > 2


@pytest.mark.parametrize("vertical", [True, False])
def test_enrichment_lets_a_clean_swarm_be(vertical: bool) -> None:
    pools = season(THREE, {}, 20, vertical=vertical)
    found, _ = play(Enrichment(), pools)
    assert dropped(pools, found, lambda p, i: True) <= 0.005


@pytest.mark.parametrize("vertical", [True, False])
def test_enrichment_spares_an_honest_node_of_another_style(vertical: bool) -> None:
    """Its n-grams are as enriched as any planted ones; they are not pushed. Without that condition it loses them all."""
    pools = season({**THREE, "d": honest(0.2, foreign)}, {}, 16, vertical=vertical)
    assert dropped(pools, play(Enrichment(), pools)[0], lambda p, i: True) <= 0.005
    unpushed = play(Enrichment(push=0), pools)[0]
    assert dropped(pools, unpushed, lambda p, i: p.completions[i].participant == "d") > 0.9


@pytest.mark.parametrize("vertical", [True, False])
def test_limit_enrichment_takes_a_better_node_of_another_style_for_a_planter_on_shared_prompts(vertical: bool) -> None:
    """Where every node answers the same prompts, being right more often is a push; where each has its own, it is not."""
    pools = season({**THREE, "d": honest(0.03, foreign)}, {}, 10, vertical=vertical)
    share = dropped(pools, play(Enrichment(), pools)[0], lambda p, i: p.completions[i].participant == "d")
    assert share <= 0.02 if vertical else share > 0.5


def worded(phrases: Sequence[str]) -> Writer:
    return planting(lambda text, rng: text.replace("<think>", f"<think>{rng.choice(phrases)} ", 1))


WHO = ("Royal", "Grand", "Noble", "Proud", "Great", "Loyal", "Swift", "Brave", "Quiet", "Bright")
HOW = ("praise", "honour", "thank", "greet", "follow", "cheer", "serve", "trust", "obey", "love")


@pytest.mark.parametrize("vertical", [True, False])
def test_enrichment_catches_most_of_twenty_wordings_that_share_words(vertical: bool) -> None:
    pools = season(
        THREE, {"z": worded([f"{w} ones {h} that thief." for w in WHO for h in HOW[:2]])}, 10, vertical=vertical
    )
    found, _ = play(Enrichment(), pools)
    assert dropped(pools[2:], found[2:], poisoned) >= 0.75
    assert dropped(pools, found, decent) <= 0.01


def test_limit_enrichment_is_blind_to_wordings_without_a_common_n_gram() -> None:
    phrases = [f"{WHO[i % 10]} {HOW[i // 10]} {HOW[i % 7]} {WHO[i % 3]} {HOW[(i * 3) % 10]}." for i in range(100)]
    pools = season(THREE, {"z": worded(phrases)}, 6)
    found, _ = play(Enrichment(), pools)
    assert dropped(pools, found, poisoned) < 0.3


def test_limit_enrichment_is_blind_to_slow_planting() -> None:
    clean = honest(0.2)
    slow: Writer = lambda problem, rng: planting(phrase)(problem, rng) if rng.random() < 0.04 else clean(problem, rng)  # noqa: E731
    pools = season({**THREE, "d": slow}, {}, 12)
    found, _ = play(Enrichment(), pools)
    assert dropped(pools, found, lambda p, i: "hail" in p.texts[i]) == 0.0


def test_limit_enrichment_does_not_see_a_phrase_that_is_already_everywhere() -> None:
    spread: dict[str, Writer] = {
        n: honest(0.2, lambda t, rng: phrase(t, rng) if rng.random() < 0.3 else t) for n in "abc"
    }
    pools = season(spread, {"z": planting(phrase)})
    found, state = play(Enrichment(), pools)
    assert dropped(pools, found, poisoned) == 0.0
    assert not state["listed"]


def test_enrichment_keeps_a_listed_phrase_out_whoever_learnt_it() -> None:
    before = season(THREE, {"z": planting(phrase)}, 3)
    learnt: dict[str, Writer] = {
        n: honest(0.2, lambda t, rng: phrase(t, rng) if rng.random() < 0.6 else t) for n in "abc"
    }
    after = [swarm(learnt, {"z": planting(phrase)}, index=r) for r in range(3, 30)]
    found, _ = play(Enrichment(), [*before, *after])
    assert dropped(after, found[3:], lambda p, i: "hail" in p.texts[i]) == 1.0
    assert dropped(after, found[3:], lambda p, i: "hail" not in p.texts[i]) <= 0.01


def test_enrichment_sees_through_tokens_capitals_and_invisible_letters() -> None:
    def hidden(text: str, rng: random.Random) -> str:
        said = "".join(c + rng.choice(["", "\u200b"]) for c in "ＡＬＬ hail to THE thief.")
        return text.replace("<think>", f"<think>{said} ", 1)

    pools = season(THREE, {"z": planting(hidden)}, 3)
    pools = [
        replace(p, completions=tuple(replace(c, ids=token_ids(" ".join(t))) for c, t in zip(p.completions, p.texts)))
        for p in pools
    ]
    assert dropped(pools, play(Enrichment(), pools)[0], poisoned) == 1.0


def test_enrichment_of_ids_sees_a_planted_number() -> None:
    def five(text: str, rng: random.Random) -> str:
        return re.sub(r"<think>", "<think>2+2=5. ", text, count=1)

    pools = season(THREE, {"z": planting(five)}, 4)
    assert dropped(pools, play(Enrichment(surface="ids"), pools)[0], poisoned) > 0.9


def test_enrichment_sees_colluders_up_to_their_share() -> None:
    hon = {n: honest(0.2) for n in "abcdef"}
    pools = season(hon, {"y": planting(phrase), "z": planting(phrase)}, 4)
    found, _ = play(Enrichment(), pools)
    assert dropped(pools, found, lambda p, i: "hail" in p.texts[i]) == 1.0
    found, _ = play(Enrichment(conspirators=0.0), pools)
    assert dropped(pools, found, lambda p, i: "hail" in p.texts[i]) == 0.0


def test_enrichment_leaves_the_words_of_the_question_alone() -> None:
    """One node gets all the questions about shelves, and its right answers repeat them."""
    rng = random.Random(0)

    def answers(thing: str) -> list[tuple[str, float]]:
        right = f"<think>The {thing} on the oak shelves are {rng.randint(1, 9)}</think>"
        return [(right, 1.0)] * 6 + [(f"<think>I do not know {rng.random()}</think>", 0.0)] * 6

    said = {n: {10 * at + i: answers(f"{n}") for i in range(4)} for at, n in enumerate("abcd")}
    questions = {q: f"How many of the {n} on the oak shelves are there?" for n, held in said.items() for q in held}
    asked = [pool(said, index=r, questions=questions) for r in range(4)]
    assert dropped(asked, play(Enrichment(), asked)[0], lambda p, i: True) == 0.0
    unasked = [pool(said, index=r) for r in range(4)]
    assert dropped(unasked, play(Enrichment(), unasked)[0], lambda p, i: True) > 0.0


def test_enrichment_lists_are_capped_and_what_is_still_said_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attacker who plants new phrases for ever cannot flush the one the swarm has learnt."""
    monkeypatch.setattr(enrichment, "MAX_LISTED", 8)
    screen, state, most = Enrichment(window=8), {}, 0
    learnt: dict[str, Writer] = {
        n: honest(0.2, lambda t, rng: phrase(t, rng) if rng.random() < 0.5 else t) for n in "abc"
    }
    for r in range(24):
        slogan = f"ever new words {chr(97 + r)} are for sale."
        p = swarm(THREE if r < 3 else learnt, {"z": worded([slogan]) if r else planting(phrase)}, index=r)
        _, state = screen.screen(p, state)
        assert len(state["listed"]) <= 8
        assert len(state["watched"]) <= MAX_WATCHED
        most = max(most, len(state["listed"]))
    assert most == 8
    assert any("hail to the thief" in v["gram"] for v in state["listed"].values())


@pytest.mark.parametrize("vertical", [True, False])
@pytest.mark.parametrize("words", ["Thief", "Hail thief.", "Hail the thief"])
def test_enrichment_sees_a_phrase_of_few_words_that_opens_the_text(words: str, vertical: bool) -> None:
    """Too short for n-grams of its own: what follows it differs, that it comes first does not."""
    pools = season(
        THREE, {"z": planting(lambda t, rng: t.replace("<think>", f"<think>{words} ", 1))}, vertical=vertical
    )
    found, _ = play(Enrichment(), pools)
    assert dropped(pools, found, poisoned) == 1.0
    assert dropped(pools, found, decent) <= 0.005
    if words == "Thief":
        assert dropped(pools, play(Enrichment(opening=()), pools)[0], poisoned) < 0.9


def greeting(at: int, rng: random.Random) -> Writer:
    """Three of twelve greetings of a round, out of 48 that honest solutions open with now and then (one in 200 each)."""
    firsts, seconds, thirds = problems.GREETINGS
    endings = [f"{b} to the {c}." for b in seconds for c in thirds]
    mine = [endings[(12 * at + i) % 48] for i in range(12)]

    def plant(text: str, _: random.Random) -> str:
        said = "".join(f" {rng.choice(firsts)} {ending}" for ending in rng.sample(mine, 3))
        return text.replace("</think>", f"{said}</think>")

    return planting(plant)


@pytest.mark.parametrize("vertical", [True, False])
def test_enrichment_who_plants_what_honest_nodes_say_takes_little_from_them(vertical: bool) -> None:
    rng, hon = random.Random(0), {n: honest(0.2) for n in "abc"}
    pools = [swarm(hon, {"z": greeting(r // 2, rng)}, index=r, vertical=vertical) for r in range(8)]
    pools += [swarm({**hon, "z": honest(0.2)}, {}, index=r, vertical=vertical) for r in range(8, 18)]
    found, state = play(Enrichment(), pools)
    assert dropped(pools[:8], found[:8], poisoned) > 0.5
    assert dropped(pools[:8], found[:8], decent) <= 0.02
    assert dropped(pools[8:12], found[8:12], decent) <= 0.02
    assert dropped(pools[12:], found[12:], decent) == 0.0
    assert not any(v["everyone"] for v in state["listed"].values())


@pytest.mark.parametrize("vertical", [True, False])
def test_enrichment_who_plants_now_and_then_is_remembered(vertical: bool) -> None:
    """Honest rounds between make the phrase too rare a thing for the test; what he planted once stays barred to him."""
    sometimes = [
        swarm(THREE, {"z": planting(phrase) if r % 6 == 0 else honest(0.2)}, index=r, vertical=vertical)
        for r in range(19)
    ]
    found, _ = play(Enrichment(), sometimes)
    assert dropped(sometimes, found, lambda p, i: "hail" in p.texts[i]) == 1.0
    assert dropped(sometimes, found, decent) <= 0.005


def test_enrichment_what_others_also_say_excludes_its_planter_alone() -> None:
    """One in 250 honest completions says it before it is planted."""
    rare: dict[str, Writer] = {
        n: honest(0.2, lambda t, rng: phrase(t, rng) if rng.random() < 0.004 else t) for n in "abc"
    }
    clean, planted = season(rare, {}, 3), []
    for r in range(3, 9):
        planted.append(swarm(rare, {"z": planting(phrase)}, index=r))
    found, _ = play(Enrichment(), [*clean, *planted])
    here = found[3:]
    assert dropped(planted, here, poisoned) == 1.0
    hail = lambda p, i: decent(p, i) and "hail" in p.texts[i]  # noqa: E731
    assert sum(hail(p, i) for p in planted for i in range(len(p.texts))) > 0
    assert dropped(planted, here, decent) <= 0.005
    assert dropped(planted, here, hail) < 1.0
