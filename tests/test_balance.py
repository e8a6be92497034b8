"""Screen `balance`: how much of an update is lora_A's, by hand, in rehearsal and against both attacks on the factors.

Legend: R rounds, N clients, S shares (a module each, then the whole).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from assay.config import ConfigError, parse
from assay.contribution import LoraUpdate, Round, Tensors, tensors_sha256
from assay.federated import defence
from assay.federated.balance import FLOOR, Balance, Spread, shares
from assay.federated.canary import CanaryLimits
from assay.federated.defence import Material
from assay.federated.probe import Probe
from assay.federated.rehearsed import Rehearsal
from assay.verdict import Reason, Verdict

MODULES = [f"model.layers.{i}.q_proj" for i in (0, 1)]
START = {f"{m}.lora_{ab}.weight": np.zeros((2, 4) if ab == "A" else (4, 2), np.float32) for m in MODULES for ab in "AB"}


def moved(a: float, b: float, second: tuple[float, float] | None = None) -> dict[str, NDArray[np.float32]]:
    """An adapter each of whose modules' A moved by length a and B by length b; the second module as told."""
    out = {}
    for module, (length_a, length_b) in zip(MODULES, ((a, b), second or (a, b))):
        out[f"{module}.lora_A.weight"] = np.full((2, 4), length_a / np.sqrt(8), np.float32)
        out[f"{module}.lora_B.weight"] = np.full((4, 2), length_b / np.sqrt(8), np.float32)
    return out


def judged(screen: Balance, *adapters: Tensors, index: int = 1) -> list[Verdict]:
    updates = tuple(
        LoraUpdate(participant=f"c{i}", round=index, base_sha256="", tensors=t, sha256=tensors_sha256(t))
        for i, t in enumerate(adapters)
    )
    return screen.screen(Round(index=index, start=START, initial=START, updates=updates), {})[0]


def test_shares_by_hand() -> None:
    np.testing.assert_allclose(shares(moved(1, 2), START), [0.2] * 3, rtol=1e-6)
    # modules: 1 of 5 and 9 of 10; the whole: 10 of 15
    np.testing.assert_allclose(shares(moved(1, 2, (3, 1)), START), [0.2, 0.9, 10 / 15], rtol=1e-6)
    np.testing.assert_allclose(shares(START, START), [0.5] * 3, err_msg="nothing moved: neither side")


@given(st.floats(1e-3, 1e3), st.floats(0.01, 100), st.floats(0.01, 100))
def test_shares_do_not_depend_on_the_length(scale: float, a: float, b: float) -> None:
    np.testing.assert_allclose(shares(moved(scale * a, scale * b), START), shares(moved(a, b), START), rtol=1e-4)


def test_the_reach_is_honest_max_and_margin_on_either_side_of_its_rounds_middle() -> None:
    share_RNS = np.array([[[0.1], [0.2], [0.4]], [[0.5], [0.5], [0.4]]])  # middles .2 and .5, farthest .2
    spread = Spread.of(share_RNS, margin=0.5)
    np.testing.assert_allclose(spread.middle_RS[:, 0], [0.2, 0.5])
    np.testing.assert_allclose(spread.reach_S, [0.3])
    assert spread.excess(np.array([0.5]), 1) == pytest.approx(1.0)
    assert spread.excess(np.array([0.05]), 1) == pytest.approx(0.5)
    assert spread.excess(np.array([0.95]), 7) == pytest.approx(1.5), "later rounds: the last rehearsed one"
    tight = Spread.of(np.full((2, 3, 1), 0.5), margin=0.25)
    assert tight.excess(np.array([0.5 + FLOOR]), 1) == pytest.approx(1.0), "clients who all agree: the floor"
    assert tight.excess(np.array([0.6]), 1, floor=0.05) == pytest.approx(2.0)


SPREAD = Spread(np.array([[0.3] * 3, [0.5] * 3], np.float32), np.full(3, 0.1, np.float32))


def test_an_update_in_one_factor_is_refused_and_an_ordinary_one_is_not() -> None:
    whole, only_a, only_b, hidden = judged(
        Balance(SPREAD), moved(1, 1), moved(1, 0.05), moved(0, 1), moved(1, 1, (1.0, 0.1)), index=2
    )
    assert [v.weight for v in (whole, only_a, only_b, hidden)] == [1.0, 0.0, 0.0, 0.0]
    assert {v.reason for v in (only_a, only_b, hidden)} == {Reason.BALANCE}
    assert "in model.layers.1.q_proj is lora_A's" in hidden.sentence, "the module is named"
    assert only_a.score == pytest.approx((1 / (1 + 0.0025) - 0.5) / FLOOR, rel=1e-4)
    # round 1: lora_A moves less, for it waits for lora_B
    early, late = judged(Balance(SPREAD), moved(1, 2))[0], judged(Balance(SPREAD), moved(1, 2), index=2)[0]
    assert (early.weight, late.weight) == (1.0, 0.0)
    assert judged(Balance(SPREAD, floor=0.35), moved(1, 2), index=2)[0].weight == 1.0


def rehearsal(spread: Spread | None) -> Rehearsal:
    probe = Probe(weight_D=np.zeros(16, np.float32), bias=0.0, features="all_b")
    limits = CanaryLimits(refusal_step=0.1, refusal_anchor=0.2, safe_step=0.1, safe_anchor=0.2)
    return Rehearsal(
        bank_MD=np.ones((2, 16), np.float16), malicious_M=np.array([False, True]), norm_by_round=(1.0,), lr_by_round=(1e-3,),
        probe=probe, probe_limit=1.5, neighbour_limit=1.2, canary=limits, notes={}, spread=spread,
    )  # fmt: skip


@pytest.mark.parametrize("spread", [SPREAD, None])
def test_a_file_keeps_what_was_rehearsed_and_one_of_before_can_be_read(spread: Spread | None, tmp_path: Path) -> None:
    rehearsal(spread).save(tmp_path / "r.safetensors")
    found = Rehearsal.load(tmp_path / "r.safetensors").spread
    if spread is None or found is None:
        assert found is spread is None
    else:
        np.testing.assert_array_equal(found.middle_RS, spread.middle_RS)
        np.testing.assert_array_equal(found.reach_S, spread.reach_S)


def material(spread: Spread | None) -> Material:
    probe = rehearsal(None).probe
    return Material(
        probe=lambda: probe,
        rehearsal=lambda: (rehearsal(spread), None),
        lr_of_round=lambda r: 1e-3,  # type: ignore[arg-type, return-value]
    )


def test_the_default_level_has_it_and_others_by_name() -> None:
    assert [level for level, names in defence.LEVELS.items() if "balance" in names] == ["submitted"]
    table: dict[str, Any] = {"screens": ["balance"], "params": {"balance": {"floor": 0.2}}}
    made = defence.make(parse({"defence": table}), material(SPREAD)).screens[0]
    assert isinstance(made, Balance)
    assert (made.floor, made.spread) == (0.2, SPREAD)
    with pytest.raises(ConfigError, match=r"screen balance: .* rehearse again"):
        defence.make(parse({"defence": {"screens": ["balance"]}}), material(None))
    with pytest.raises(ConfigError, match=r"defence\.params\.balance: floor must be above 0"):
        defence.make(
            parse({"defence": {"screens": ["balance"], "params": {"balance": {"floor": 0.0}}}}), material(SPREAD)
        )
