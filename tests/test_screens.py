"""Screens and their composition, on small synthetic adapters (no model needed)."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from assay import contribution
from assay.config import ConfigError, Experiment
from assay.contribution import LoraUpdate, Refusal, Round, flatten, tensors_sha256
from assay.federated import aggregators, screens, server_opt
from assay.federated.balance import Balance, Spread
from assay.federated.canary import Canary, CanaryLimits, Gate, Losses, Rise
from assay.federated.claims import Ordered
from assay.federated.defence import LEVELS, Defence
from assay.federated.level_screens import ClientLevel, EvidenceLevel, ShadowLevel, StepLevel
from assay.federated.lora import feature_names, unit_rows
from assay.federated.probe import FitSettings, Probe, fit
from assay.federated.round import ServerState, run_round
from assay.federated.screens import Duplicate, Neighbours, Norm, ProbeFilter, Structure
from assay.federated.spectral import STATISTICS, Spectral, change_svd, statistics
from assay.metrics import auroc, tpr_at_fpr
from assay.verdict import Reason, Screen, State, Verdict, screen_round

SHAPES = {f"model.layers.{i}.q_proj.lora_{ab}.weight": (3, 4) if ab == "A" else (4, 3) for i in (0, 1) for ab in "AB"}
RNG = np.random.default_rng(0)


def tensors(fill: float = 0.0, noise: float = 0.0, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {n: (fill + noise * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}


def update(name: str, values: dict[str, NDArray[np.float32]], **more: object) -> LoraUpdate:
    made = LoraUpdate(participant=name, round=1, base_sha256="b", tensors=values, sha256=tensors_sha256(values))
    return replace(made, **more)  # type: ignore[arg-type]


def a_round(*updates: LoraUpdate, index: int = 1, refused: tuple[Refusal, ...] = ()) -> Round:
    start = tensors()
    return Round(index=index, start=start, initial=start, updates=updates, refused=refused, batch_size=8)


class Fixed:
    """Gives the weights it is told, by participant."""

    def __init__(self, name: str, weights: dict[str, float]) -> None:
        self.name, self.weights = name, weights

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        out = []
        for u in round.updates:
            w = self.weights[u.participant]
            reason = Reason.OK if w == 1 else Reason.NORM
            out.append(
                Verdict(participant=u.participant, contribution=u.sha256, screen=self.name, weight=w, reason=reason)
            )
        return out, {"calls": state.get("calls", 0) + 1}


def test_weights_multiply_and_the_first_zero_names_the_reason() -> None:
    rd = a_round(update("a", tensors(1)), update("b", tensors(2)))
    found = screen_round(rd, [Fixed("one", {"a": 0.5, "b": 0.0}), Fixed("two", {"a": 0.5, "b": 0.0})])
    assert found.weight == {"a": 0.25, "b": 0.0}
    assert found.deciding["b"].screen == "one"
    assert found.mean_weight == 0.125
    assert found.states == {"one": {"calls": 1}, "two": {"calls": 1}}


def test_monitor_records_and_does_not_weigh() -> None:
    rd = a_round(update("a", tensors(1)))
    found = screen_round(rd, [Fixed("one", {"a": 0.0})], monitor=frozenset({"one"}))
    assert found.weight == {"a": 1.0}
    assert [v.mode for v in found.verdicts] == ["monitor"]


def test_a_crashing_screen_fails_closed_and_says_why() -> None:
    rd = a_round(update("a", tensors(1)), update("b", tensors(2)))
    found = screen_round(rd, [Fixed("one", {"a": 1.0})])  # KeyError for b
    assert found.weight == {"a": 0.0, "b": 0.0}
    assert {v.reason for v in found.verdicts} == {Reason.SCREEN_FAILED}
    assert "KeyError" in found.verdicts[0].sentence


def test_a_verdict_about_other_bytes_is_none() -> None:
    class Liar(Fixed):
        def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
            found, state = super().screen(round, state)
            return [replace(v, contribution="0" * 64) for v in found], state

    found = screen_round(a_round(update("a", tensors(1))), [Liar("liar", {"a": 1.0})])
    assert found.weight == {"a": 0.0}
    assert found.deciding["a"].reason is Reason.SCREEN_FAILED


def test_two_messages_of_one_participant_are_the_engines_mistake() -> None:
    refused = Refusal("a", "0" * 64, "malformed", "x")
    with pytest.raises(ValueError, match="more than one message"):
        screen_round(a_round(update("a", tensors(1)), refused=(refused,)), [])


MISFITS = {
    "shape": {**tensors(1.0), "model.layers.0.q_proj.lora_A.weight": np.ones((9, 9), np.float32)},
    "name": {**tensors(1.0), "more": np.ones(1, np.float32)},
    "nan": tensors(np.nan),
}


@pytest.mark.parametrize("how", MISFITS)
def test_an_update_that_does_not_fit_breaks_no_screen_for_the_others(how: str) -> None:
    """Without the wire: deltas of unlike shapes do not stack, and a NaN norm is no weight."""
    honest = [update(f"ok-{i}", tensors(0.1, 1.0, i)) for i in range(4)]
    here = a_round(*honest, update("odd", MISFITS[how]))
    judged = screen_round(here, [Structure(), Norm(lambda r: 8.0), Duplicate(), Spectral(limit=1e6)])
    assert judged.weight == {"odd": 0.0, **{u.participant: 1.0 for u in honest}}
    assert judged.deciding["odd"].reason is Reason.STRUCTURE
    zero = tensors()
    for screens_ in ((Structure(),), ()):
        rules = Defence(level="test", screens=screens_)
        state = ServerState(round=0, adapter=zero, initial=zero, opt={})
        made = server_opt.make("fedavg")
        after = [
            run_round(state, sent, [], rules, aggregators.make("mean"), made, Experiment().aggregation, 8)[0]
            for sent in (here.updates, honest)
        ]
        np.testing.assert_array_equal(*(flatten(s.adapter) for s in after))


@pytest.mark.parametrize("level", ["submitted", "spectral"])
def test_copies_that_are_refused_cost_an_honest_client_nothing(level: str) -> None:
    """Whoever sees an honest update sends it many times, too long to pass: its owner would be one of many copies."""
    honest = [update(f"ok-{i}", tensors(0.1, 1.0, i)) for i in range(5)]
    spoilt = [update(f"bad-{i}", {n: 50 * v for n, v in honest[0].tensors.items()}) for i in range(4)]
    made = {"norm": lambda: Norm(lambda r: 8.0), "structure": Structure, "duplicate": Duplicate}
    order = [made[n]() for n in LEVELS[level] if n in made]
    judged = screen_round(a_round(*honest, *spoilt), order)
    assert judged.weight == {**{u.participant: 1.0 for u in honest}, **{u.participant: 0.0 for u in spoilt}}
    assert judged.deciding["bad-0"].reason is Reason.NORM
    real = [update(f"copy-{i}", honest[0].tensors) for i in range(3)]
    assert screen_round(a_round(*honest, *real), order).weight["ok-0"] == 0.25, "copies that count share one weight"


def test_a_majority_that_sends_nothing_does_not_end_the_round() -> None:
    honest = [update(f"ok-{i}", tensors(0.1, 1.0, i)) for i in range(2)]
    idle = [update(f"idle-{i}", tensors()) for i in range(3)]
    verdicts, _ = Norm(None).screen(a_round(*honest, *idle), {})
    assert [v.weight for v in verdicts] == [0.0, 0.0, 1.0, 1.0, 1.0], "the median is theirs, and is no NaN"


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_verdict_weights_lie_in_the_unit_interval(weight: float) -> None:
    with pytest.raises(ValueError, match="not in"):
        Verdict(participant="a", contribution="c", screen="s", weight=weight, reason=Reason.NORM)


def test_structure_refuses_what_trained_nothing_or_does_not_fit() -> None:
    bad = tensors(1)
    bad["model.layers.0.q_proj.lora_A.weight"] = np.full((4, 3), np.inf, np.float32)
    transposed = {n: v.T for n, v in tensors(1).items()}
    rd = a_round(
        update("good", tensors(1)),
        update("idle", tensors()),
        update("inf", bad),
        update("shape", transposed),
        update("keys", {"x": np.ones(3, np.float32)}),
    )
    weights = {v.participant: v.weight for v in Structure().screen(rd, {})[0]}
    assert weights == {"good": 1.0, "idle": 0.0, "inf": 0.0, "shape": 0.0, "keys": 0.0}


def test_norm_passes_clips_and_refuses() -> None:
    size = math.sqrt(48)  # 4 tensors of 12 ones
    rd = a_round(*(update(f"c{r}", tensors(r)) for r in (1.0, 1.14, 1.3, 1.6)))
    verdicts, _ = Norm(lambda index: size, clip=1.15, refuse=1.5).screen(rd, {})
    assert [round(v.weight, 3) for v in verdicts] == [1.0, 1.0, round(1.15 / 1.3, 3), 0.0]
    # without a rehearsal the round's median is the limit: 1.22 here
    verdicts, _ = Norm(None).screen(rd, {})
    assert [round(v.weight, 3) for v in verdicts] == [1.0, 1.0, 1.0, round(1.15 * 1.22 / 1.6, 3)]


def test_copies_count_once_together() -> None:
    honest = [update(f"h{i}", tensors(noise=1.0, seed=i)) for i in range(4)]
    copies = [update(f"s{i}", tensors(noise=1.0, seed=9)) for i in range(3)]
    verdicts, _ = Duplicate().screen(a_round(*honest, *copies), {})
    assert [v.weight for v in verdicts] == [1.0] * 4 + [1 / 3] * 3


def test_a_cosine_read_in_blocks_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    x_ND, bank_MD = rng.standard_normal((3, 40)), rng.standard_normal((9, 40)).astype(np.float16)
    x_ND[1] = 0.0
    unit_ND, unit_MD = unit_rows(x_ND).astype(np.float64), unit_rows(bank_MD).astype(np.float64)
    distance_NM = 1 - unit_ND @ unit_MD.T
    bad_M = np.arange(9) % 2 == 0
    wanted = [np.sort(d[~bad_M])[:3].mean() / np.sort(d[bad_M])[:3].mean() for d in distance_NM]
    for values in (2**18, 27):
        monkeypatch.setattr(screens, "BLOCK_VALUES", values)
        np.testing.assert_allclose(screens.neighbour_ratio(x_ND, bank_MD, bad_M, 3), wanted, rtol=1e-5)
    here = a_round(*(update(f"c{i}", tensors(0.2, 1.0, i)) for i in range(3)))
    for limit in (2**18, 5):
        monkeypatch.setattr(contribution, "BLOCK_VALUES", limit)
        found_ND = np.zeros_like(here.deltas())
        for columns, block_NB in here.blocks():
            found_ND[:, columns] = block_NB
        np.testing.assert_array_equal(found_ND, here.deltas())


@pytest.mark.parametrize("name", ["structure", "norm", "duplicate", "probe", "neighbours", "balance", "spectral"])
def test_memory_of_a_screen_is_a_quarter_of_the_updates(name: str) -> None:
    """Beyond the updates themselves and the bank: a matrix of all of them in float64 would be twice as much as they."""
    rng, width = np.random.default_rng(0), 4096
    shapes = {
        f"model.layers.{i}.q_proj.lora_{ab}.weight": (8, width) if ab == "A" else (width, 8)
        for i in range(16) for ab in "AB"
    }  # fmt: skip
    start = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
    sent = tuple(
        update(f"c{i:02d}", {n: rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}) for i in range(16)
    )
    half = 16 * 8 * width
    made: dict[str, Callable[[], Screen]] = {
        "structure": Structure,
        "norm": lambda: Norm(lambda index: 1e3),
        "duplicate": Duplicate,
        "probe": lambda: ProbeFilter(Probe(weight_D=np.ones(half, np.float32), bias=0.0, features="all_b"), 1.0),
        "neighbours": lambda: Neighbours(np.ones((64, half), np.float16), np.arange(64) % 2 == 0, 1.2),
        "balance": lambda: Balance(Spread(np.full((1, 17), 0.5, np.float32), np.ones(17, np.float32))),
        "spectral": Spectral,
    }
    screen, here = made[name](), Round(index=1, start=start, initial=start, updates=sent)
    tracemalloc.start()
    try:
        screen.screen(here, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 16 * 2 * half * 4 / 4, f"{peak / (16 * 2 * half * 4):.0%} of the updates"


def labelled(count: int = 40, size: int = 24) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    rng = np.random.default_rng(1)
    y = np.arange(count) % 2 == 1
    direction = np.zeros(size)
    direction[0] = 1
    x = rng.standard_normal((count, size)) * 0.15 + np.where(y, 1.0, -1.0)[:, None] * direction
    return x.astype(np.float32), y


def test_probe_agrees_with_an_independent_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    x, y = labelled(200)
    probe = fit(x[:100], y[:100], "all_b", FitSettings(weight_decay=0.0, epochs=400, clip=100.0))
    theirs = LogisticRegression(C=10.0).fit(unit_rows(x[:100]), y[:100])
    same = (probe.scores(x[100:]) > 0.5) == theirs.predict(unit_rows(x[100:]))
    assert same.mean() >= 0.98


def test_probe_is_blind_to_scale_and_survives_its_file(tmp_path: Path) -> None:
    x, y = labelled()
    probe = fit(x, y, "first_b", base_sha256="abc", meta={"samples": 40})
    assert auroc(probe.scores(x).tolist(), y.tolist()) == 1.0
    np.testing.assert_allclose(probe.scores(x), probe.scores(1000 * x), rtol=1e-5)
    probe.save(tmp_path / "p.safetensors")
    again = Probe.load(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(again.scores(x), probe.scores(x))
    assert (again.features, again.base_sha256, again.meta) == ("first_b", "abc", {"samples": 40})


def test_probe_mistakes_say_what_to_do(tmp_path: Path) -> None:
    x, y = labelled()
    with pytest.raises(ConfigError, match="at least 2 samples of each class"):
        fit(x, np.zeros_like(y), "first_b")
    with pytest.raises(ConfigError, match="assay probe fit"):
        fit(x, y, "first_b").logits(x[:, :5])
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04 not safetensors")
    for name in ("x.safetensors", "absent.safetensors"):
        with pytest.raises(ConfigError, match="probe file"):
            Probe.load(tmp_path / name)


def test_feature_names_follow_layers_not_spelling() -> None:
    names = [f"m.layers.{i}.q.lora_{ab}.weight" for i in (10, 9, 2) for ab in "AB"]
    assert feature_names(names, "first_b") == ("m.layers.2.q.lora_B.weight",)
    assert len(feature_names(names, "all_b")) == 3
    assert len(feature_names(names, "all")) == 6
    with pytest.raises(ConfigError, match="lora_B"):
        feature_names(["m.layers.0.weight"], "all_b")


def test_neighbours_side_with_the_nearer_class() -> None:
    good, bad = tensors(noise=1.0, seed=1), tensors(noise=1.0, seed=2)
    names = feature_names(list(good), "all_b")
    bank = np.stack([np.concatenate([t[n].ravel() for n in names]) for t in (good, bad) for _ in range(3)])
    screen = Neighbours(bank, np.array([False] * 3 + [True] * 3), limit=1.0, k=3)
    verdicts, _ = screen.screen(a_round(update("g", good), update("b", bad)), {})
    assert [v.weight for v in verdicts] == [1.0, 0.0]


def first_layer_probe() -> Probe:
    """Malicious = layer 0's lora_B moves up."""
    return Probe(weight_D=np.full(12, 10.0, np.float32), bias=0.0, features="first_b")


def midway(end: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """A first step towards `end` that is no point of the straight line: as training, unlike interpolation, goes."""
    wobble = tensors(noise=0.2, seed=5)
    return {n: v / 2 + wobble[n] for n, v in end.items()}


def ordered(steps: int) -> Callable[[int], Ordered]:
    return lambda index: Ordered(steps=steps)


def test_step_level_wants_the_whole_chain_and_binds_its_end() -> None:
    good, bad = tensors(-1.0), tensors(1.0)
    half, clean = midway(bad), midway(good)
    rd = a_round(
        update("good", good, steps=(clean, good)),
        update("bad", bad, steps=(half, bad)),
        update("forged", bad, steps=(clean, good)),  # clean evidence beside a poisoned adapter
        update("silent", bad),
        update("short", bad, steps=(bad,)),
        update("line", good, steps=({n: v / 2 for n, v in good.items()}, good)),  # interpolated
    )
    verdicts, state = StepLevel(first_layer_probe(), ordered(2)).screen(rd, {})
    by = {v.participant: v for v in verdicts}
    # Beta(1,1) decayed by .95, then 16 samples: good (.95+16)/(1.9+16), bad .95/17.9
    assert by["good"].weight == pytest.approx(16.95 / 17.9)
    assert by["bad"].weight == pytest.approx(0.95 / 17.9)
    assert by["forged"].reason is Reason.CLAIM_INCONSISTENT
    assert by["silent"].reason is Reason.CLAIM_MISSING
    assert by["line"].reason is Reason.CLAIM_INCONSISTENT
    assert [by[n].weight for n in ("forged", "silent", "short", "line")] == [0.0] * 4
    assert set(state) == {"good", "bad"}


def test_step_level_keeps_its_last_weight_after_the_scored_rounds() -> None:
    good, bad = tensors(-1.0), tensors(1.0)
    screen = StepLevel(first_layer_probe(), ordered(1), score_rounds=1)
    _, state = screen.screen(a_round(update("c", good, steps=(good,))), {})
    later, _ = screen.screen(a_round(update("c", bad, steps=(bad,)), index=2), state)
    assert later[0].weight == pytest.approx(8.95 / 9.9)  # the published hole: nobody looks any more
    always, _ = StepLevel(first_layer_probe(), ordered(1)).screen(
        a_round(update("c", bad, steps=(bad,)), index=2), state
    )
    assert always[0].weight < 0.6


def test_client_and_shadow_levels_follow_their_formulas() -> None:
    good, bad = tensors(-1.0), tensors(1.0)
    verdicts, _ = ClientLevel(first_layer_probe()).screen(a_round(update("g", good), update("b", bad)), {})
    assert verdicts[0].weight > 0.99
    assert verdicts[1].weight < 0.01
    mixed = update(
        "s",
        good,
        shadow=(midway(good), {n: 2 * v + 3 * (n.endswith("0.q_proj.lora_B.weight")) for n, v in good.items()}),
    )
    forged = update("f", good, shadow=(bad, good))  # there and back
    verdicts, _ = ShadowLevel(first_layer_probe(), ordered(2)).screen(a_round(mixed, forged, update("n", good)), {})
    assert verdicts[0].weight == pytest.approx(0.5**7)
    assert [v.reason for v in verdicts[1:]] == [Reason.CLAIM_INCONSISTENT, Reason.CLAIM_MISSING]
    assert [v.weight for v in verdicts[1:]] == [0.0, 0.0]


def evidence(**more: float) -> EvidenceLevel:
    return EvidenceLevel(first_layer_probe(), ordered(2), "secret", **more)  # type: ignore[arg-type]


def shadowed(name: str, sent: dict[str, NDArray[np.float32]], shadow: dict[str, NDArray[np.float32]]) -> LoraUpdate:
    return update(name, sent, shadow=(midway(shadow), shadow))


def test_evidence_reads_the_submission_beside_the_shadow() -> None:
    good, bad = tensors(-1.0), tensors(1.0)
    rd = a_round(
        shadowed("good", good, good), shadowed("bad", bad, bad), shadowed("liar", bad, good), update("silent", good)
    )
    verdicts, state = evidence().screen(rd, {})
    by = {v.participant: v for v in verdicts}
    assert [by[n].weight for n in ("good", "bad", "liar", "silent")] == [1.0, 0.0, 0.0, 0.0]
    assert by["liar"].reason is Reason.LOW_TRUST, "a clean shadow beside a poisoned adapter"
    assert by["silent"].reason is Reason.CLAIM_MISSING
    assert {n for n, s in state.items() if s["barred"]} == {"bad", "liar", "silent"}


def test_evidence_is_resumed_from_its_state_and_wants_no_permanent_verdict() -> None:
    good, bad = tensors(-1.0), tensors(1.0)
    screen, state, weights = evidence(audit=1.0), {}, []
    for index, sent in enumerate([good] * 4 + [bad] + [good] * 4, 1):
        verdicts, state = screen.screen(a_round(shadowed("c", sent, good), index=index), json.loads(json.dumps(state)))
        weights.append(verdicts[0].weight)
    assert weights == [1.0] * 4 + [0.0] * 3 + [1.0] * 2, "caught in its first bad round; back after three clean ones"


def test_spectrum_of_the_change_equals_that_of_the_product() -> None:
    rng = np.random.default_rng(2)
    a, a0 = (rng.standard_normal((3, 20)).astype(np.float32) for _ in range(2))
    b, b0 = (rng.standard_normal((15, 3)).astype(np.float32) for _ in range(2))
    u, s, v = change_svd(a, b, a0, b0)
    product = b.astype(np.float64) @ a - b0.astype(np.float64) @ a0
    whole_u, whole_s, whole_v = np.linalg.svd(product)
    np.testing.assert_allclose(s, whole_s[:6], rtol=1e-10)
    np.testing.assert_allclose(u @ np.diag(s) @ v, product, atol=1e-10)
    assert abs(u[:, 0] @ whole_u[:, 0]) == pytest.approx(1)
    assert abs(v[0] @ whole_v[0]) == pytest.approx(1)


def test_spectral_statistics_by_hand() -> None:
    """B A = diag(3, 4) against a start of zero: norm 5, leading 4, energy shares 9/25 and 16/25."""
    names = "m.0.lora_A.weight", "m.0.lora_B.weight"
    start = {names[0]: np.zeros((2, 2), np.float32), names[1]: np.zeros((2, 2), np.float32)}
    one = {names[0]: np.eye(2, dtype=np.float32), names[1]: np.diag([3, 4]).astype(np.float32)}
    other = {names[0]: np.eye(2, dtype=np.float32), names[1]: np.diag([4, 3]).astype(np.float32)}
    x = statistics([one, one, other, other], start)
    shares = np.array([9, 16]) / 25
    expected = [math.log(5), math.log(4), 16 / 25, -(shares * np.log(shares)).sum()]
    np.testing.assert_allclose(x[0, 0, :4], expected, atol=1e-6)
    # among the others one points the same way (cosine 1), two at right angles: the median is 0
    np.testing.assert_allclose(x[:, 0, 4], 0, atol=1e-6)
    assert len(STATISTICS) == x.shape[2] == 5


def spectral_round(*odd: dict[str, NDArray[np.float32]], honest: int = 8) -> Round:
    """Honest updates share a direction and differ by noise, as clients of one model do."""
    shared = tensors(noise=1.0, seed=50)
    made = [update(f"h{i}", {n: v + tensors(noise=0.2, seed=i)[n] for n, v in shared.items()}) for i in range(honest)]
    return a_round(*made, *(update(f"o{i}", t) for i, t in enumerate(odd)))


def test_spectral_finds_the_odd_one_and_says_that_rescaling_passes() -> None:
    other = tensors(noise=1.0, seed=99)
    shared = tensors(noise=1.0, seed=50)
    borrowed = {n: v + tensors(noise=0.2, seed=77)[n] for n, v in shared.items()}
    verdicts, _ = Spectral().screen(spectral_round({n: 20 * v for n, v in other.items()}, borrowed), {})
    weights = {v.participant: v.weight for v in verdicts}
    assert weights.pop("o0") == 0.0
    assert set(weights.values()) == {1.0}, "honest updates, and an attacker who borrowed their shape"
    assert {v.reason for v in verdicts if v.weight == 0} == {Reason.SPECTRAL}


def test_spectral_fails_closed_where_it_cannot_compare() -> None:
    verdicts, _ = Spectral().screen(spectral_round(honest=3), {})
    assert [v.weight for v in verdicts] == [0.0] * 3
    assert "cannot be compared" in verdicts[0].sentence
    still = [update(f"s{i}", tensors(float(i == 9))) for i in range(5)]  # nobody moves: no direction, no crash
    assert all(np.isfinite(v.score) for v in Spectral().screen(a_round(*still), {})[0])


LIMITS = CanaryLimits(refusal_step=0.02, refusal_anchor=0.1, safe_step=0.02, safe_anchor=0.1)


class Told:
    """A measure with known losses: the mean of the adapter's values is the rise of the refusal loss."""

    def __call__(self, adapters: list[dict[str, NDArray[np.float32]]]) -> list[Losses]:
        return [Losses(1.0 + float(a["model.layers.0.q_proj.lora_A.weight"].mean()), 0.5) for a in adapters]


def test_canary_refuses_what_strips_refusals_now_or_slowly() -> None:
    canary = Canary(Told(), LIMITS)  # type: ignore[arg-type]
    rd = a_round(update("ok", tensors(0.01)), update("bad", tensors(0.03)), update("healer", tensors(-0.3)))
    assert [v.weight for v in canary.screen(rd, {})[0]] == [1.0, 0.0, 1.0]
    # a slow poisoner: each step is small, but the start has already moved 0.095 from the anchor
    slow = Round(index=9, start=tensors(0.095), initial=tensors(), updates=(update("slow", tensors(0.11)),))
    assert canary.screen(slow, {})[0][0].weight == 0.0
    # an honest client who moves back is not punished for where the others went
    back = Round(index=9, start=tensors(0.2), initial=tensors(), updates=(update("back", tensors(0.19)),))
    assert canary.screen(back, {})[0][0].weight == 1.0


OWN = replace(LIMITS, refusal_usual=0.01, safe_usual=0.01)


def test_an_anchor_others_have_spent_is_not_held_against_who_spends_like_the_honest() -> None:
    """The start is 0.095 from an anchor of 0.1, as `anchor_pusher` leaves it; falls save nothing up for later."""

    def at(screen: Canary, state: State, index: int, start: float, **step: float) -> tuple[dict[str, float], State]:
        sent = tuple(update(name, tensors(start + by)) for name, by in sorted(step.items()))
        said, state = screen.screen(Round(index=index, start=tensors(start), initial=tensors(), updates=sent), state)
        return {v.participant: v.weight for v in said}, state

    each, own = Canary(Told(), LIMITS), Canary(Told(), OWN, "own")  # type: ignore[arg-type]
    assert at(each, {}, 9, 0.095, honest=0.008)[0] == {"honest": 0.0}, "what today's rule does"
    state: State = {}
    for index in range(1, 5):  # the pusher goes to just under the limit of a step, the anchor is far
        weights, state = at(own, state, index, 0.0, honest=0.004, pusher=0.019, saver=-0.5)
        assert set(weights.values()) == {1.0}
    assert at(own, state, 5, 0.095, honest=0.008, pusher=0.008)[0] == {"honest": 1.0, "pusher": 0.0}
    assert at(own, state, 5, 0.095, honest=0.021)[0] == {"honest": 0.0}, "a step over its own limit stays one"
    assert at(own, state, 5, 0.095, pusher=-0.001)[0] == {"pusher": 1.0}, "who moves back is never refused"
    slow: State = {}
    for index, start in enumerate([0.0, 0.015, 0.03, 0.045, 0.06, 0.075], 1):
        weights, slow = at(own, slow, index, start, slow=0.015)
        assert weights == {"slow": 1.0}
    assert at(own, slow, 7, 0.09, slow=0.015)[0] == {"slow": 0.0}, "slow poisoning still adds up"
    _, state = at(own, {}, 1, 0.0, saver=-0.5)
    assert state == {"spent": {"saver": [1, 0.0, 0.0]}}
    assert at(own, state, 2, 0.099, new=0.011)[0] == {"new": 0.0}, "who is new has no credit"


def test_the_gate_holds_the_anchor_whoever_spent_it() -> None:
    gate = Gate(Told(), OWN)  # type: ignore[arg-type]
    assert not gate.check(tensors(0.101), tensors(0.095), tensors()).passed
    assert gate.check(tensors(0.099), tensors(0.101), tensors()).passed


def test_own_spending_needs_a_rehearsal_that_knows_the_usual() -> None:
    with pytest.raises(ValueError, match="rehearse again"):
        Canary(Told(), LIMITS, "own")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="anchor must be each or own"):
        Canary(Told(), OWN, "mine")  # type: ignore[arg-type]


def test_gate_rolls_back_an_aggregate_that_strips_refusals() -> None:
    gate = Gate(Told(), LIMITS)  # type: ignore[arg-type]
    assert gate.check(tensors(0.01), tensors(), tensors()).passed
    assert not gate.check(tensors(0.03), tensors(), tensors()).passed


def test_rise_of_safe_answers_goes_to_review_with_a_graded_weight() -> None:
    rise = Rise.of(Losses(1.0, 0.54), Losses(1.0, 0.5), Losses(1.0, 0.5))
    assert rise.harm(LIMITS) <= 1
    assert rise.waste(LIMITS) == pytest.approx(2.0)


def test_make_knows_its_screens() -> None:
    assert screens.make("norm", limit_of_round=lambda index: 1.0).name == "norm"
    with pytest.raises(ConfigError, match="unknown screen 'nrom'; known: structure, norm"):
        screens.make("nrom")


def test_detection_metrics_against_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(3)
    for _ in range(20):
        truth = rng.random(60) < 0.4
        score = np.round(rng.random(60) + 0.4 * truth, 1)  # with ties
        assert auroc(score.tolist(), truth.tolist()) == pytest.approx(roc_auc_score(truth, score))
    assert auroc([1.0, 2.0], [False, False]) is None
    # 100 honest scores 0..99: one of them may lie above the threshold, so 98 is the threshold
    honest, bad = list(range(100)), [98.0, 98.5, 99.5]
    assert tpr_at_fpr([*honest, *bad], [False] * 100 + [True] * 3) == pytest.approx(2 / 3)


def test_where_lora_a_is_frozen_who_moves_it_is_refused() -> None:
    moved = {n: v + 1 for n, v in tensors().items()}
    only_b = {n: v + ("lora_B" in n) for n, v in tensors().items()}
    whisper = {n: v + (np.float32(1e-7) if n == min(SHAPES) else "lora_B" in n) for n, v in tensors().items()}
    rd = a_round(update("all", moved), update("b", only_b), update("whisper", whisper))
    assert [v.weight for v in Structure().screen(rd, {})[0]] == [1, 1, 1]
    frozen = Structure(freeze_a=True).screen(rd, {})[0]
    assert [v.weight for v in frozen] == [0, 1, 0]
    assert {v.reason for v in frozen} == {Reason.STRUCTURE, Reason.OK}
