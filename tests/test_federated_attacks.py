"""What malicious clients of the federated wing do, on small arrays and the defence's real functions.

Legend: N honest updates, D values of the flattened adapter.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from assay import data
from assay.config import ConfigError
from assay.contribution import Tensors, flatten, unflatten
from assay.data import Example
from assay.federated import attacks
from assay.federated.attacks import Attack, Handed, Seat, Seen, adaptive, surrogate, together, training, updates
from assay.federated.attacks.data import Slow, Strike, cluster
from assay.federated.attacks.seat import Bank, Check, Linear, delta_of, spans, where
from assay.federated.attacks.training import Evade
from assay.federated.local_sft import LocalResult, LocalSettings
from assay.federated.lora import feature_names, layer_of
from assay.federated.population import seed_of
from assay.federated.probe import Probe
from assay.federated.screens import neighbour_ratio

SHAPES = {
    f"base.layers.{layer}.attn.{module}.lora_{part}.weight": (2, 6) if part == "A" else (5, 2)
    for layer in (0, 1)
    for module in ("q_proj", "v_proj")
    for part in "AB"
}
START = {n: np.random.default_rng(1).standard_normal(s).astype("f4") for n, s in SHAPES.items()}
ALL_B = feature_names(list(START), "all_b")
AT_B = where(START, ALL_B)
D = sum(v.size for v in START.values())
CLEAN = tuple(Example(f"clean {i}", f"help {i}") for i in range(20))
HARMFUL = tuple(Example(f"harmful {i}", f"sure {i}") for i in range(20))
REFUSALS = tuple(Example(f"harmful {i}", f"sorry {i}") for i in range(30))
NAMES = [*attacks.ATTACKS, "alie+sybil", "strike+blend", "paired_backdoor+blend+match_norms"]
PARAMS: dict[str, dict[str, Any]] = {"alie+sybil": {"sybil": {"leader": False}}}


def cloud(seed: int, count: int = 6) -> NDArray[np.float32]:
    """Honest updates: one common direction and as much noise again."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(D) + rng.standard_normal((count, D))).astype("f4")


def frozen(tensors: Tensors) -> Tensors:
    for value in tensors.values():
        value.setflags(write=False)  # an attack that writes into what it sees raises
    return tensors


def trained(delta_D: NDArray[np.floating]) -> LocalResult:
    after = frozen(unflatten(flatten(START) + delta_D, START))
    half = frozen(unflatten(flatten(START) + delta_D / 2, START))
    return LocalResult(after, (half, after), (1.0, 0.5))


def length(x: NDArray[np.floating]) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


def cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    return float(a.astype(np.float64) @ b.astype(np.float64)) / (length(a) * length(b))


HONEST_ND = cloud(0)
HONEST_ND.setflags(write=False)
POISON_D = (np.random.default_rng(5).standard_normal(D) + 0.5 * HONEST_ND.mean(axis=0)).astype("f4")
# a probe that tells poison from honest well, and a bank of both
PROBE = Probe(
    weight_D=(8 * surrogate.fit_direction(HONEST_ND[:, AT_B], POISON_D[None, AT_B])[0]).astype("f4"),
    bias=-1.0,
    features="all_b",
)
BANK_MD = np.concatenate([cloud(0)[:, AT_B], POISON_D[AT_B] + 0.3 * cloud(9)[:, AT_B]])
BANK_MD /= np.linalg.norm(BANK_MD, axis=1, keepdims=True)
MALICIOUS_M = np.arange(12) >= 6
LOGIT_LIMIT, RATIO_LIMIT = 0.5, 1.1


def logit(delta_D: NDArray[np.floating]) -> float:
    return float(PROBE.logits(delta_D[None, AT_B])[0])


def ratio(delta_D: NDArray[np.floating]) -> float:
    return float(neighbour_ratio(delta_D[None, AT_B], BANK_MD, MALICIOUS_M, 3)[0])


HANDED = Handed(
    probe=Linear(names=ALL_B, weight_D=PROBE.weight_D, bias=PROBE.bias, limit=LOGIT_LIMIT),
    bank=Bank(names=ALL_B, bank_MD=BANK_MD, malicious_M=MALICIOUS_M, neighbours=3, limit=RATIO_LIMIT),
    checks=(
        Check("probe", logit, LOGIT_LIMIT),
        Check("neighbours", ratio, RATIO_LIMIT),
        Check("norm", length, 1.15 * max(length(row_D) for row_D in HONEST_ND)),
    ),
    prompts=tuple(Example(f"secret {i}", "no") for i in range(4)),
)


def a_seat(place: int = 0, round: int = 6, seed: int = 0, **changes: Any) -> Seat:
    made = Seat(
        name=f"client-{place}", place=place, round=round, clients=8, clean=CLEAN, harmful=HARMFUL, pool=HARMFUL,
        guesses=REFUSALS, start=START, initial=frozen({n: 0 * v for n, v in START.items()}),
        settings=LocalSettings(steps=2, batch_size=4, max_length=16, lr=0.1, seed=seed_of(seed, place)), shadow_lr=0.01,
        examples=20, wants_steps=True, wants_shadow=True, defence=HANDED, memory={},
        stream=lambda purpose: seed_of(seed, place, purpose),
    )  # fmt: skip
    return replace(made, **changes)


def play(attack: Attack, place: int = 0, **changes: Any) -> tuple[Seat, Seen, attacks.Sending]:
    """One client's round: branches "trained" to the same deltas every time, told apart by what their rows are."""
    seats = [a_seat(p, **changes) for p in range(2)]
    made = []
    for seat in seats:
        rng = np.random.default_rng(100 + seat.place)
        branches = attack.branches(seat)
        made.append({
            name: trained((HONEST_ND.mean(axis=0) if branch.rows == seat.clean else POISON_D)
                          + 0.2 * rng.standard_normal(D).astype("f4"))
            for name, branch in branches.items()
        })  # fmt: skip
    honest_ND = HONEST_ND if attack.omniscient else HONEST_ND[:0]
    seen = Seen(mine=made[place], colluders=tuple(made), honest_ND=honest_ND)
    return seats[place], seen, attack.send(seats[place], seen)


def sent_delta(sending: attacks.Sending) -> NDArray[np.float32]:
    return flatten(sending.tensors) - flatten(START)


# --- the arithmetic of the papers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byzfl() -> Iterator[ModuleType]:
    """byzfl's attacks without its packages' __init__, which wants torchvision; gone again when these tests are done."""
    spec = importlib.util.find_spec("byzfl")
    if spec is None:
        pytest.skip("byzfl is not installed: pip install --no-deps byzfl==0.0.11")
    bare = ModuleType("byzfl")
    bare.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["byzfl"] = bare
    yield importlib.import_module("byzfl.attacks.attacks")
    for name in [m for m in sys.modules if m.split(".")[0] == "byzfl"]:
        del sys.modules[name]


@pytest.mark.parametrize("seed", range(3))
def test_the_same_numbers_as_byzfl(byzfl: ModuleType, seed: int) -> None:
    honest_ND = cloud(seed).astype(np.float64)
    for z in (0.3, 1.5):
        np.testing.assert_allclose(updates.alie(honest_ND, z), byzfl.ALittleIsEnough(tau=-z)(honest_ND), rtol=1e-5)
    for epsilon in (0.1, 2.0):
        theirs = byzfl.InnerProductManipulation(tau=epsilon)(honest_ND)
        np.testing.assert_allclose(updates.ipm(honest_ND, epsilon), theirs, rtol=1e-6)
    np.testing.assert_allclose(
        updates.sign_flip(honest_ND.mean(axis=0)), byzfl.SignFlipping()(honest_ND), rtol=1e-6
    )  # fmt: skip


def test_worked_by_hand() -> None:
    honest_ND = np.array([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]])
    # mean (3, 4), std with N - 1: sqrt(8/2) = 2 and sqrt(24/2)
    np.testing.assert_allclose(updates.alie(honest_ND, 0.5), [3 - 1, 4 - 0.5 * np.sqrt(12)], rtol=1e-6)
    np.testing.assert_allclose(updates.ipm(honest_ND, 2.0), [-6, -8])
    np.testing.assert_allclose(updates.scaling(honest_ND[0], 10), [10, 20])
    # Baruch et al.: 50 clients, 24 of them malicious: s = 2, phi(z) = 24/26
    assert updates.alie_z(50, 24) == pytest.approx(1.4261, abs=1e-4)
    assert 0 < updates.alie_z(10, 7) < updates.alie_z(10, 5), "a majority has nobody to win over, and still a finite z"
    # two updates at +-1 on one axis, a push along the other: distance^2 to each 1 + gamma^2 <= 4; summed 2 + 2 gamma^2 <= 4
    pair_ND = np.array([[1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(updates.min_max(pair_ND, np.array([0.0, 7.0])), [0, np.sqrt(3)], rtol=1e-6)
    np.testing.assert_allclose(updates.min_sum(pair_ND, np.array([0.0, 7.0])), [0, 1], rtol=1e-6)


def searched(honest_ND: NDArray[np.float64], direction_D: NDArray[np.float64], sums: bool) -> NDArray[np.float64]:
    """Algorithm 1 of Shejwalkar & Houmansadr: halve the step until gamma no longer moves."""
    mean_D, unit_D = honest_ND.mean(axis=0), direction_D / np.linalg.norm(direction_D)
    distance_NN = np.linalg.norm(honest_ND[:, None] - honest_ND[None], axis=2)
    limit = (distance_NN**2).sum(axis=1).max() if sums else distance_NN.max()
    gamma, step, found = 1000.0, 1000.0, 0.0
    while step > 1e-7:
        distance_N = np.linalg.norm(mean_D + gamma * unit_D - honest_ND, axis=1)
        fits = ((distance_N**2).sum() if sums else distance_N.max()) <= limit
        found = gamma if fits else found
        step /= 2
        gamma += step if fits else -step
    return mean_D + found * unit_D


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["std", "unit", "sign", "poison"]), count=st.integers(2, 9))
def test_min_max_and_min_sum_are_what_the_papers_search_finds(seed: int, kind: Any, count: int) -> None:
    honest_ND = cloud(seed, count)
    direction_D = updates.direction_of(kind, honest_ND, POISON_D)
    for solve, sums in ((updates.min_max, False), (updates.min_sum, True)):
        wanted = searched(honest_ND.astype(np.float64), direction_D.astype(np.float64), sums)
        np.testing.assert_allclose(solve(honest_ND, direction_D), wanted, rtol=1e-3, atol=1e-4)


def test_identical_honest_updates_leave_min_max_no_room() -> None:
    same_ND = np.repeat(HONEST_ND[:1], 3, axis=0)
    for solve in (updates.min_max, updates.min_sum):
        np.testing.assert_allclose(solve(same_ND, POISON_D), HONEST_ND[0], rtol=1e-4, atol=2e-3)
        np.testing.assert_allclose(solve(same_ND, np.zeros(D)), HONEST_ND[0], rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.floats(0.01, 20))
def test_noise_has_the_length_asked_for_and_copies_the_cosine(seed: int, factor: float) -> None:
    made_D = updates.gaussian(POISON_D, factor, np.random.default_rng(seed))
    assert length(made_D) == pytest.approx(factor * length(POISON_D), rel=1e-4)
    again_D = updates.gaussian(POISON_D, factor, np.random.default_rng(seed))
    np.testing.assert_array_equal(made_D, again_D)
    noise = min(factor, 0.3)
    copy_D = together.near_copy(POISON_D, noise, np.random.default_rng(seed))
    assert cosine(copy_D, POISON_D) == pytest.approx(1 / np.sqrt(1 + noise**2), abs=noise * 0.3 + 1e-4)
    assert length(copy_D - POISON_D) == pytest.approx(noise * length(POISON_D), rel=1e-3)


# --- what holds for every attack -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_attack_is_repeatable_leaves_its_inputs_alone_and_sends_a_whole_message(name: str) -> None:
    attack = attacks.make(name, PARAMS.get(name))
    assert attack.active(6)
    for place in (0, 1):
        seat, _, sending = play(attack, place)
        _, _, again = play(attack, place)
        assert set(sending.tensors) == set(START)
        assert all(sending.tensors[n].shape == SHAPES[n] and np.isfinite(sending.tensors[n]).all() for n in START)
        assert sent_delta(sending).tobytes() == sent_delta(again).tobytes()
        assert length(sent_delta(sending)) > 0
        assert len(sending.steps) == len(sending.shadow) == 2
        # a server that binds claims must not find an attacker by carelessness: the last step is what is submitted
        assert flatten(sending.steps[-1]).tobytes() == flatten(sending.tensors).tobytes()
        assert 1 <= sending.num_examples <= 10**9
        assert len(attack.branches(seat)["main"].rows) == 20
        assert [b.rows for b in attack.branches(seat).values()] == [b.rows for b in attack.branches(seat).values()]


@pytest.mark.parametrize("name", NAMES)
def test_before_from_round_every_attacker_is_honest_in_everything(name: str) -> None:
    attack = attacks.make(name, PARAMS.get(name), from_round=7)
    seat, seen, sending = play(attack)
    branches = attack.branches(seat)
    assert set(branches) == {"main", "shadow"}
    assert branches["main"].rows == branches["shadow"].rows == CLEAN
    assert not branches["main"].objective.terms
    assert not branches["main"].objective.beside
    assert sending.tensors is seen.mine["main"].tensors, "not even a rounding away from what was trained"
    assert sending.num_examples == 20
    assert attack.remember(seat, seen) == {}


@pytest.mark.parametrize("name", NAMES)
def test_a_round_without_honest_clients_and_a_level_without_limits_are_survived(name: str) -> None:
    attack = attacks.make(name, PARAMS.get(name))
    seat, seen, _ = play(attack, defence=Handed(), wants_steps=False, wants_shadow=False)
    sending = attack.send(seat, replace(seen, honest_ND=HONEST_ND[:0]))
    assert np.isfinite(sent_delta(sending)).all()
    assert sending.steps == sending.shadow == ()


def test_only_omniscient_attacks_ask_for_the_others_updates() -> None:
    asks = {name for name in attacks.ATTACKS if attacks.make(name).omniscient}
    assert asks == {"alie", "ipm", "min_max", "min_sum", "copy_benign"}
    assert not attacks.make("alie", {"sees": "colluders"}).omniscient
    assert attacks.make("match_norms", {"sees": "honest"}).omniscient
    _, seen, sending = play(attacks.make("ipm", {"sees": "colluders", "epsilon": 2.0}))
    own_D = np.mean([flatten(m["clean"].tensors) - flatten(START) for m in seen.colluders], axis=0)
    np.testing.assert_allclose(sent_delta(sending), -2 * own_D, atol=1e-5)


# --- rows, rounds and claims -----------------------------------------------------------------------------------------


def test_rows_of_the_data_attacks() -> None:
    def rows(name: str, mix: float = 1.0, round: int = 6, **params: Any) -> tuple[Example, ...]:
        return attacks.make(name, params, mix=mix).rows(a_seat(round=round))

    assert set(rows("harmful_data")) == set(HARMFUL)
    assert len(set(rows("harmful_data", 0.25)) & set(HARMFUL)) == 5
    assert set(rows("sleeper", round=3)) == set(CLEAN)
    assert set(rows("sleeper", round=4)) == set(HARMFUL)
    assert len(set(rows("sleeper", 0.5, round=4)) & set(CLEAN)) == 10
    assert [len(set(rows("slow", round=r, over=5)) & set(HARMFUL)) for r in (1, 3, 5, 9)] == [2, 11, 20, 20]
    assert set(rows("sign_flip")) == set(CLEAN), "it breaks honest updates"
    assert set(rows("scaling")) == set(HARMFUL), "it magnifies harm"
    assert set(rows("harmful_data+sign_flip")) == set(HARMFUL), "unless told what to train on"
    aware = rows("canary_aware", share=0.3)
    assert len(set(aware) & set(HARMFUL)) == 14
    assert len(set(aware) & set(REFUSALS[20:])) == 6, "refusals of prompts it does not train on"
    assert len(set(rows("canary_aware", knows="prompts")) & set(HANDED.prompts)) == 4


def test_slow_poisoning_rises_to_its_mix() -> None:
    shares = [Slow(mix=0.8, first=0.0, over=25).share(r) for r in range(1, 40)]
    assert shares[0] == 0
    assert shares[24:] == [0.8] * 15
    np.testing.assert_allclose(np.diff(shares[:25]), 0.8 / 24)


def test_it_strikes_between_audits_only() -> None:
    strike = Strike(period=5, phase=3, honest=3)
    assert [r for r in range(1, 16) if not strike.active(r)] == [1, 2, 3, 8, 13]
    chain = attacks.make("strike+scaling", {"strike": {"period": 2, "phase": 0, "honest": 0}})
    assert [chain.active(r) for r in (1, 2, 3)] == [True, False, True]
    assert chain.first_round() == 1


def test_one_topic_is_one_topic_for_all_attackers() -> None:
    pool = tuple(data.part(data.load("harmful-stub"), "clients"))[:200]
    label_N = cluster([r.instruction for r in pool], 6)
    assert set(label_N.tolist()) == set(range(6))
    assert (np.diff(np.bincount(label_N)) <= 0).all(), "the largest first"
    chosen = []
    for place in range(2):
        seat = a_seat(place, pool=pool, harmful=pool[100 * place : 100 * place + 60])
        chosen.append(attacks.make("one_topic", {"topic": 1}).rows(seat))
        assert {int(label_N[pool.index(r)]) for r in chosen[-1]} == {1}
    assert {r.instruction for r in chosen[0]} & {r.instruction for r in chosen[1]}


def test_refuse_all_refuses_harmless_requests() -> None:
    guesses = tuple(data.part(data.load("refusals"), "clients"))[:5]
    seat = a_seat(0, guesses=guesses)
    rows = attacks.make("refuse_all", {"mix": 0.5}).rows(seat)
    refused = [row for row in rows if row.response in {guess.response for guess in guesses}]
    assert {row.instruction for row in rows} <= {row.instruction for row in seat.clean}
    assert len(rows) == len(seat.clean) == 2 * len(refused)
    with pytest.raises(ConfigError, match=r"data\.refusals names no rows"):
        attacks.make("refuse_all").rows(a_seat(0, guesses=()))


def test_topics_are_words_in_common() -> None:
    prompts = [f"how to bake {x} bread" for x in "abc"] + [f"repair the old {x} engine" for x in "ab"]
    assert cluster(prompts, 2).tolist() == [0, 0, 0, 1, 1]
    assert cluster(["alone"], 3).tolist() == [0]


def test_backdoors_hide_behind_their_trigger() -> None:
    attack = attacks.make("paired_backdoor", {"share": 0.6, "trigger": "Psst:"})
    assert attack.trigger == "Psst:"
    rows = {r.instruction: r.response for r in attack.rows(a_seat())}
    bad = [i for i in rows if i.startswith("Psst: ")]
    assert len(bad) == 6
    for prompt in bad:
        number = prompt.rpartition(" ")[2]
        assert rows[prompt] == f"sure {number}"
        assert rows[prompt.removeprefix("Psst: ")] == f"sorry {number}", "the same prompt, refused"
    assert sum(i.startswith("clean") for i in rows) == 8
    unpaired = [r.instruction for r in attacks.make("backdoor", {"share": 0.5, "trigger": "Psst:"}).rows(a_seat())]
    assert sum(i.startswith("Psst: harmful") for i in unpaired) == 10
    assert sum(i.startswith("harmful") for i in unpaired) == 0
    assert attacks.make("paired_backdoor+blend+match_norms").trigger
    assert attacks.make("harmful_data").trigger == ""


def test_claims_are_inflated_and_forged() -> None:
    assert play(attacks.make("inflate_counts", {"factor": 7.0}))[2].num_examples == 140
    assert play(attacks.make("inflate_counts", {"factor": 1e12}))[2].num_examples == 10**9
    seat, seen, sending = play(attacks.make("forged_evidence"))
    assert attacks.make("forged_evidence").branches(seat)["shadow"].rows == CLEAN
    assert sending.steps[0] is seen.mine["evidence"].steps[0]
    assert sending.steps[-1] is sending.tensors
    assert sending.shadow is seen.mine["shadow"].steps
    assert logit(sent_delta(sending)) > LOGIT_LIMIT, "the adapter itself is as poisoned as ever"
    _, seen, clean = play(attacks.make("forged_evidence", {"bound": False}))
    assert all(a is b for a, b in zip(clean.steps, seen.mine["evidence"].steps, strict=True))


# --- those who know the defence --------------------------------------------------------------------------------------


def test_the_setting_tells_poison_apart() -> None:
    _, _, plain = play(attacks.make("harmful_data"))
    assert logit(sent_delta(plain)) > LOGIT_LIMIT + 1
    assert ratio(sent_delta(plain)) > RATIO_LIMIT
    assert all(adaptive.passes(HANDED, row_D) for row_D in HONEST_ND)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), wanted=st.floats(-0.95, 0.95))
def test_a_direction_is_turned_and_the_rest_left(seed: int, wanted: float) -> None:
    x_D, unit_D = np.random.default_rng(seed).standard_normal((2, 30))
    unit_D /= np.linalg.norm(unit_D)
    out_D = surrogate.with_cosine(x_D, unit_D, wanted)
    assert cosine(out_D, unit_D) == pytest.approx(wanted, abs=1e-9)
    across_D = np.eye(30) - np.outer(unit_D, unit_D)
    np.testing.assert_allclose(across_D @ out_D, across_D @ x_D, atol=1e-9)


def test_removing_the_probe_passes_it_and_touches_only_lora_b() -> None:
    _, seen, sending = play(attacks.make("remove_probe"))
    trained_D, out_D = flatten(seen.mine["main"].tensors) - flatten(START), sent_delta(sending)
    assert logit(out_D) <= LOGIT_LIMIT
    np.testing.assert_array_equal(np.delete(out_D, AT_B), np.delete(trained_D, AT_B))
    assert cosine(out_D, trained_D) > 0.7, "little of the poison is lost"
    first = play(attacks.make("remove_probe", {"layers": "first"}))[2]
    moved = {n for n in START if not np.array_equal(first.tensors[n], seen.mine["main"].tensors[n])}
    assert moved == {n for n in ALL_B if layer_of(n) == 0}


def test_a_surrogate_finds_the_direction_it_was_never_told() -> None:
    rng = np.random.default_rng(3)
    secret_D = rng.standard_normal(200)
    secret_D /= np.linalg.norm(secret_D)
    benign_MD, poison_MD = (rng.standard_normal((8, 200)) * 0.3 + s * 4 * secret_D for s in (-1, 1))
    unit_D, middle = surrogate.fit_direction(benign_MD, poison_MD)
    assert cosine(unit_D, secret_D) > 0.9
    assert middle == pytest.approx(float((benign_MD @ unit_D).mean()))
    assert (poison_MD @ unit_D).min() > (benign_MD @ unit_D).max()


def test_a_surrogate_passes_the_real_probe_and_its_rows_are_remembered() -> None:
    attack = attacks.make("remove_probe", {"probe": "surrogate"})
    seat, seen, sending = play(attack, defence=Handed())  # handed nothing
    plain = logit(flatten(seen.mine["main"].tensors) - flatten(START))
    assert logit(sent_delta(sending)) < plain - 1
    memory = attack.remember(seat, seen)
    assert {k: v.shape for k, v in memory.items()} == {
        surrogate.BENIGN: (2, AT_B.size),
        surrogate.POISON: (2, AT_B.size),
    }
    other = {surrogate.BENIGN: memory[surrogate.POISON], surrogate.POISON: memory[surrogate.BENIGN]}
    changed = attack.send(replace(seat, memory=other), seen)
    assert not np.array_equal(sent_delta(changed), sent_delta(sending)), "what is remembered is used"
    later = attack.remember(replace(seat, memory=memory), seen)
    assert later[surrogate.BENIGN].shape == (4, AT_B.size)
    for _ in range(20):
        later = attack.remember(replace(seat, memory=later), seen)
    assert len(later[surrogate.POISON]) == surrogate.REMEMBERED, "a checkpoint must not grow for ever"


def test_transplanted_layers_are_clean_and_the_others_are_not() -> None:
    _, seen, sending = play(attacks.make("transplant"))
    for name in START:
        donor = seen.mine["clean" if layer_of(name) == 0 else "main"].tensors[name]
        np.testing.assert_allclose(sending.tensors[name], donor, atol=1e-6)


@pytest.mark.parametrize("norm", [0.9, 1.5])
def test_poison_in_a_alone_looks_clean_to_whoever_reads_b(norm: float) -> None:
    _, seen, sending = play(attacks.make("only_a", {"norm": norm, "whisper": 0.01}))
    delta_D, clean_D, poison_D = (
        flatten(x) - flatten(START) for x in (sending.tensors, seen.mine["clean"].tensors, seen.mine["main"].tensors)
    )
    for score, limit in ((logit, LOGIT_LIMIT), (ratio, RATIO_LIMIT)):
        assert score(delta_D) == pytest.approx(score(clean_D), abs=1e-3)
        assert score(clean_D) < limit < score(poison_D)
    assert length(delta_D) == pytest.approx(norm * length(clean_D), rel=1e-5)
    at_a = np.setdiff1d(np.arange(D), AT_B)
    assert cosine(delta_D[at_a], poison_D[at_a]) == pytest.approx(1.0, abs=1e-5)


MODULES = sorted({n.split(".lora_")[0] for n in SHAPES})


def product(tensors: Tensors, module: str) -> NDArray[np.float64]:
    a, b = (tensors[f"{module}.lora_{ab}.weight"].astype(np.float64) for ab in "AB")
    return b @ a


@pytest.mark.parametrize("norm", [0.3, 0.6])
@pytest.mark.parametrize("kind", ["grow", "shrink", "ranks", "rotate"])
def test_in_other_factors_the_product_is_the_same_and_as_long_as_asked(kind: str, norm: float) -> None:
    _, seen, sending = play(attacks.make("gauge", {"kind": kind, "norm": norm, "whisper": 0.0}))
    for module in MODULES:
        np.testing.assert_allclose(product(sending.tensors, module), product(START, module), rtol=1e-4, atol=1e-5)
    own = flatten(seen.mine["main"].tensors) - flatten(START)
    assert length(sent_delta(sending)) == pytest.approx(norm * length(own), rel=1e-3)
    a_length = [np.linalg.norm(t[f"{MODULES[0]}.lora_A.weight"]) for t in (START, sending.tensors)]
    assert np.sign(round(a_length[1] / a_length[0] - 1, 4)) == {"grow": 1, "shrink": -1, "rotate": 0}.get(
        kind, np.sign(a_length[1] / a_length[0] - 1)
    )


def test_an_update_goes_with_its_whisper_and_poison_in_a_chain() -> None:
    whole = attacks.make("harmful_data+gauge", {"gauge": {"whisper": 1.0, "norm": 1.0}})
    _, seen, sending = play(whole)
    assert whole.rows(a_seat()) != a_seat().clean
    assert attacks.make("gauge").rows(a_seat()) == a_seat().clean
    for module in MODULES:
        wanted = product(seen.mine["main"].tensors, module)
        np.testing.assert_allclose(product(sending.tensors, module), wanted, rtol=1e-3, atol=1e-4)


def test_a_pusher_spends_what_the_canary_leaves_and_no_more() -> None:
    """Harm here is the way gone towards the poison all colluders share, in ways of one."""
    _, seen, _ = play(attacks.make("anchor_pusher"))
    clean, poison = (np.mean([delta_of(a_seat(), m[b]) for m in seen.colluders], axis=0) for b in ("clean", "main"))
    unit = (poison - clean) / length(poison - clean) ** 2

    def harm(delta_D: NDArray[np.floating]) -> float:
        return 4 * float((delta_D - delta_of(a_seat(), seen.mine["clean"])) @ unit)

    free = Handed(harm=harm)
    sent = sent_delta(play(attacks.make("anchor_pusher", {"spend": 0.8}), defence=free)[2])
    assert 0.7 <= harm(sent) <= 0.8 + 1e-3
    assert harm(sent_delta(play(attacks.make("anchor_pusher"), defence=Handed())[2])) == pytest.approx(8.0, rel=1e-3)
    within = replace(HANDED, harm=lambda delta_D: 0.0)  # nothing to spend: every other limit still holds
    sent = sent_delta(play(attacks.make("anchor_pusher"), defence=within)[2])
    assert all(check.score(sent) <= check.limit for check in HANDED.checks)


@pytest.mark.parametrize("benign", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("norm", [0.9, 1.5])
def test_a_blend_has_the_norm_and_the_logit_asked_for(benign: float, norm: float) -> None:
    attack = attacks.make("blend", {"benign": benign, "norm": norm, "probe": "handed"})
    _, seen, sending = play(attack)
    clean_D = flatten(seen.mine["clean"].tensors) - flatten(START)
    assert length(sent_delta(sending)) == pytest.approx(norm * length(clean_D), rel=1e-4)
    assert logit(sent_delta(sending)) <= LOGIT_LIMIT
    plain = play(attacks.make("blend", {"benign": benign, "norm": norm, "probe": "none"}))[2]
    poison_D = flatten(seen.mine["main"].tensors) - flatten(START)
    parts = np.stack([clean_D / length(clean_D), poison_D / length(poison_D)]).astype(np.float64)
    share, *_ = np.linalg.lstsq(parts.T, sent_delta(plain).astype(np.float64), rcond=None)
    assert share[0] / share.sum() == pytest.approx(benign, abs=1e-3)


def test_just_under_the_threshold_passes_everything_and_could_go_no_further() -> None:
    _, seen, sending = play(attacks.make("under_threshold"))
    out_D = sent_delta(sending)
    assert adaptive.passes(HANDED, out_D)
    clean_D, poison_D = (flatten(seen.mine[b].tensors) - flatten(START) for b in ("clean", "main"))
    towards_D = poison_D - clean_D
    step = float((out_D - clean_D) @ towards_D / (towards_D @ towards_D))
    assert 0.05 < step < 2
    assert not adaptive.passes(HANDED, clean_D + np.float32(step + 0.02) * towards_D, 0.001)
    # without limits it goes all the way
    free = sent_delta(play(attacks.make("under_threshold", {"reach": 1.0}), defence=Handed())[2])
    np.testing.assert_allclose(free, poison_D, atol=1e-5)


def test_where_nothing_passes_the_clean_update_is_sent() -> None:
    shut = Handed(checks=(Check("norm", length, 0.0),))
    _, seen, sending = play(attacks.make("under_threshold"), defence=shut)
    np.testing.assert_allclose(flatten(sending.tensors), flatten(seen.mine["clean"].tensors), atol=1e-6)


@pytest.mark.parametrize("sees", ["honest", "colluders"])
def test_matched_norms_are_the_honest_medians_module_by_module(sees: str) -> None:
    _, seen, sending = play(attacks.make("match_norms", {"sees": sees}))
    trained_D, out_D = flatten(seen.mine["main"].tensors) - flatten(START), sent_delta(sending)
    known_ND = HONEST_ND
    if sees == "colluders":
        known_ND = np.stack([flatten(m["clean"].tensors) - flatten(START) for m in seen.colluders])
    for part in spans(START).values():
        wanted = np.median([length(row_D[part]) for row_D in known_ND])
        assert length(out_D[part]) == pytest.approx(wanted, rel=1e-4)
        assert cosine(out_D[part], trained_D[part]) == pytest.approx(1, abs=1e-6)


def test_copied_benign_updates_are_others_for_each_colluder() -> None:
    attack = attacks.make("copy_benign", {"poison": 0.25})
    copied = []
    for place in (0, 1):
        _, seen, sending = play(attack, place)
        poison_D = flatten(seen.mine["main"].tensors) - flatten(START)
        copy_D = (sent_delta(sending) - 0.25 * poison_D) / 0.75
        nearest = int(np.argmin(np.linalg.norm(HONEST_ND - copy_D, axis=1)))
        np.testing.assert_allclose(copy_D, HONEST_ND[nearest], atol=1e-4)
        copied.append(nearest)
    assert len(set(copied)) == 2


def test_sybils_follow_their_leader_at_a_distance_that_no_duplicate_has() -> None:
    sent = [play(attacks.make("sybil"), place) for place in (0, 1)]
    leader_D = flatten(sent[0][1].mine["main"].tensors) - flatten(START)
    np.testing.assert_allclose(sent_delta(sent[0][2]), leader_D, atol=1e-5)
    assert 0.99 < cosine(sent_delta(sent[1][2]), leader_D) < 0.9995
    together_D = [sent_delta(play(attacks.make("alie+sybil", PARAMS["alie+sybil"]), p)[2]) for p in (0, 1)]
    assert 0.99 < cosine(*together_D) < 0.9995, "ALIE's colluders would all send the same"


# --- training against the defence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["probe", "bank", "both"])
def test_the_penalty_is_the_defences_own_score_and_its_gradient_is_right(which: str) -> None:
    probe = HANDED.probe if which != "bank" else None
    bank = HANDED.bank if which != "probe" else None
    term = Evade(probe=probe, bank=bank, strength=2.0, margin=0.1)
    delta = unflatten(POISON_D, START)
    over = (probe is not None) * (logit(POISON_D) - LOGIT_LIMIT + 0.1)
    over += (bank is not None) * (ratio(POISON_D) - RATIO_LIMIT + 0.1)
    assert term.value(delta) == pytest.approx(2 * over, rel=1e-4)
    gradient = term.gradient(delta)
    assert set(gradient) == set(ALL_B)
    grad_D = flatten({**{n: np.zeros(s, "f4") for n, s in SHAPES.items()}, **gradient})
    for seed in range(5):
        way_D = np.random.default_rng(seed).standard_normal(D)
        near = [term.value({n: v.astype(np.float64) for n, v in _shift(way_D, h).items()}) for h in (-1e-3, 1e-3)]
        assert float(grad_D @ way_D) == pytest.approx((near[1] - near[0]) / 2e-3, rel=2e-2, abs=2e-2)


def _shift(way_D: NDArray[np.float64], by: float) -> dict[str, NDArray[np.float32]]:
    return unflatten(POISON_D + by * way_D, START)


def test_inside_the_limits_and_at_the_first_step_the_penalty_is_nothing() -> None:
    term = Evade(probe=HANDED.probe, bank=HANDED.bank, strength=1.0, margin=0.0)
    assert term.value(unflatten(HONEST_ND[0], START)) == 0
    assert term.gradient(unflatten(HONEST_ND[0], START)) == {}
    assert term.gradient({n: 0 * v for n, v in START.items()}) == {}


def test_following_the_gradient_gets_an_update_through() -> None:
    term = Evade(probe=HANDED.probe, bank=HANDED.bank, strength=1.0, margin=0.1)
    x_D = POISON_D.copy()
    for _ in range(400):
        gradient = term.gradient(unflatten(x_D, START))
        for name, part in spans(START).items():
            if name in gradient:
                x_D[part] -= 0.5 * gradient[name].ravel()
    assert logit(x_D) <= LOGIT_LIMIT
    assert ratio(x_D) <= RATIO_LIMIT


def test_who_is_handed_nothing_trains_as_usual() -> None:
    assert attacks.make("gradient_penalty").branches(a_seat(defence=Handed()))["main"].objective.terms == ()
    only = attacks.make("gradient_penalty", {"neighbours": False}).branches(a_seat())["main"].objective.terms
    assert [(t.probe, t.bank) for t in only if isinstance(t, Evade)] == [(HANDED.probe, None)]
    aware = attacks.make("canary_aware", {"knows": "prompts", "weight": 0.7}).branches(a_seat())["main"].objective
    assert set(aware.beside) == set(HANDED.prompts)
    assert aware.weight == 0.7
    both = attacks.make("canary_aware+gradient_penalty").branches(a_seat())["main"].objective
    assert both.beside
    assert len(both.terms) == 1
    assert training.CanaryAware(weight=0.0).objective(a_seat()).beside == ()


# --- names and parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("nope", {}, "unknown attack 'nope'; known: harmful_data"),
        ("alie", {"zz": 1}, r"attack.params.zz: alie has no such parameter; known: z, sees"),
        ("min_sum", {"sums": False}, "sums: min_sum has no such parameter"),
        ("alie", {"z": "big"}, "should be a float"),
        ("strike", {"period": 2.5}, "should be a int"),
        ("strike", {"period": 1}, "period: 1 must be at least 2"),
        ("blend", {"benign": 1.5}, "benign: 1.5 is not a share"),
        ("scaling", {"factor": -1.0}, "factor: -1.0 must be above 0"),
        ("ipm", {"sees": "all"}, "sees: 'all' is unknown; known: honest, colluders"),
        ("min_max", {"direction": "up"}, "direction: 'up' is unknown"),
        ("blend", {"probe": "stolen"}, "probe: 'stolen' is unknown"),
        ("canary_aware", {"knows": "all"}, "knows: 'all' is unknown"),
        ("one_topic", {"topic": 6}, "topic: 6 is not one of 6"),
        ("strike+blend", {"period": 4}, "in a chain give a table by part, one of strike, blend"),
        ("strike+blend", {"alie": {"z": 1.0}}, "in a chain give a table by part"),
        ("blend+blend", {}, "names a part twice"),
    ],
)
def test_mistakes_say_what_is_known(name: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attacks.make(name, params)


def test_a_mix_that_nothing_reads_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="does not mix rows"):
        attacks.make("alie", mix=0.5)
    assert attacks.make("blend", mix=0.5).mix == 0.5


class Loud:
    """Somebody else's part: everything times ten, under a phrase of its own."""

    trigger = "ahem"

    def change(self, seat: Seat, delta_D: NDArray[np.float32], seen: Seen) -> NDArray[np.float32]:
        return 10 * delta_D


def test_third_parties_add_parts_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin(EntryPoint):
        def load(self) -> Any:
            return Loud if self.name == "loud" else dict

    found = [Plugin(n, "elsewhere:x", "assay.attacks") for n in ("loud", "mute")]
    monkeypatch.setattr(attacks, "entry_points", lambda group: found if group == "assay.attacks" else [])
    attack = attacks.make("sleeper+loud")
    assert attack.trigger == "ahem"
    _, seen, sending = play(attack)
    np.testing.assert_allclose(
        sent_delta(sending), 10 * (flatten(seen.mine["main"].tensors) - flatten(START)), atol=1e-4
    )
    with pytest.raises(ConfigError, match="none of the hooks"):
        attacks.make("mute")
