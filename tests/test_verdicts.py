"""What a verdict says for itself: reasons of other people's screens, and the limits that numbers were held against."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay import ledger
from assay.contribution import Pool, Round, TokenEvidence
from assay.federated.balance import Balance, Spread
from assay.federated.canary import Canary, CanaryLimits, Gate
from assay.federated.probe import Probe
from assay.federated.screens import Neighbours, Norm, ProbeFilter
from assay.federated.spectral import Spectral
from assay.federated.summary import reasons
from assay.report import limits, write
from assay.report.verdicts import Kept
from assay.swarm import screening
from assay.swarm.screens.arithmetic import Arithmetic
from assay.swarm.screens.model import Logit, Seeded
from assay.verdict import AnyReason, OwnReason, Reason, State, Verdict, run_screen, screen_round
from swarm_pools import pool
from test_report import Page, make_run
from test_screens import LIMITS, Told, a_round, labelled, spectral_round, tensors, update

PLUGIN = Path(__file__).parents[1] / "examples" / "plugin"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of `examples/plugin`, as it stands."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    yield importlib.import_module("assay_example")
    sys.modules.pop("assay_example", None)


# --- reasons of others ------------------------------------------------------------------------------------------------


def test_a_reason_of_ones_own_is_never_one_of_assays() -> None:
    own = OwnReason("my-package.screens:too_loud")
    assert (own.value, str(own), f"{own}") == ("my-package.screens:too_loud",) * 3
    assert own not in set(Reason)
    assert not [reason for reason in Reason if ":" in reason.value]
    with pytest.raises(ValueError, match="is not a valid Reason"):
        Reason(own.value)


@pytest.mark.parametrize(
    "value",
    ["ok", "norm", "", ":", "a:", ":b", "a:b:c", "A:b", "a:B", "a b:c", "a:1", "a:b\n", "a:<b>", "ä:b", "assay:ok", f"a:{'b' * 63}", 7],
)  # fmt: skip
def test_other_forms_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"package"):
        OwnReason(value)


class Says:
    """A screen that refuses everything for a reason of its own."""

    name = "says"

    def __init__(self, reason: Any) -> None:
        self.reason = reason

    def screen(self, seen: Any, state: State) -> tuple[list[Verdict], State]:
        rows = seen.updates if isinstance(seen, Round) else seen.completions
        return [
            Verdict(participant=c.participant, contribution=c.sha256, screen=self.name, weight=0.0, reason=self.reason)
            for c in rows
        ], state


@pytest.mark.parametrize("reason", ["norm", "my-package:loud", None, 3])
def test_a_reason_that_is_neither_fails_closed_and_says_what_to_write(reason: Any) -> None:
    here = a_round(update("a", tensors(1)))
    (verdict,), _ = run_screen(Says(reason), here, here.updates, {})
    assert (verdict.weight, verdict.reason) == (0.0, Reason.SCREEN_FAILED)
    assert "OwnReason('package:name')" in verdict.sentence


def test_a_plugins_reason_and_limit_go_through_ledger_summary_and_report(tmp_path: Path, plugin: Any) -> None:
    """The example plugin's screen on real updates; what it says is read back from each place by its own name."""
    own, against = "assay-example-plugin:against", plugin.Against()
    run = make_run(tmp_path / "run", clients=4, malicious=1, rounds=1)
    names = [f"client-{i:02d}" for i in range(4)]
    shared = tensors(noise=1.0, seed=5)
    sent = [
        update(name, {n: (-v if i == 0 else v) + tensors(noise=0.2, seed=i)[n] for n, v in shared.items()})
        for i, name in enumerate(names)
    ]
    screened = screen_round(a_round(*sent), [against])
    assert screened.weight == {name: float(i > 0) for i, name in enumerate(names)}
    deciding = screened.deciding[names[0]]
    assert str(deciding).split()[1:4] == ["DROP", "against:", own]
    body = {
        "round": 1, "outcome": "applied", "why": "", "gate": None,
        "verdicts": [v.as_dict() for v in screened.verdicts],
        "contributions": [
            {"participant": v.participant, "sha256": v.contribution, "num_examples": 1, "weight": v.weight,
             "screen": v.screen, "reason": v.reason.value, "sentence": v.sentence}
            for v in screened.verdicts
        ],
    }  # fmt: skip
    (run / "ledger.jsonl").unlink()
    written = ledger.Ledger(run / "ledger.jsonl")
    written.append("start", {"level": "custom"})
    written.append("round", body)
    assert ledger.verify(run / "ledger.jsonl", written.head).ok
    read = [json.loads(line)["body"] for line in (run / "ledger.jsonl").read_text().splitlines()][-1]
    (row,) = reasons([read], {name: i == 0 for i, name in enumerate(names)})
    assert (row["screen"], row["reason"], row["honest"], row["malicious"]) == ("against", own, 0, 1)
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"reasons": [row], "ledger": {"entries": 2, "head": written.head}}
    (run / "summary.json").write_text(json.dumps(summary))

    page = Page(write([run], tmp_path / "report.html"))
    assert ("code", own) in page.texts, "the table of what was screened out and why"
    people = page.data["people"]
    texts, (found,) = people["texts"], people["runs"]
    at = found["who"].index(people["names"].index(names[0]))
    ((_, screen, reason, _),) = found["why"][at]
    assert (texts[screen], texts[reason]) == ("against", own)
    ((_, (form, reason, weight, _, _, limit, _, *numbers)),) = found["said"][at]
    assert [texts[at] for at in people["forms"][form]] == ["against", "enforce", "cosine"]
    assert (texts[reason], weight, texts[limit]) == (own, 0, "cosine at least 0")
    assert numbers[0] < 0


def test_in_a_swarm_a_reason_of_ones_own_refuses_and_is_no_strike() -> None:
    here = pool({"a": {0: [("one", 1.0), ("two", 0.0)]}, "b": {1: [("three", 1.0), ("four", 0.0)]}})
    refused: dict[str, float] = {}
    for reason in (OwnReason("my-package:loud"), Reason.SEEDED):
        judged = screening.judge_pool(here, [Says(reason)], {})
        assert [v.reason for v in judged.verdicts] == [reason] * 4
        assert {v.weight for v in judged.verdicts} == {0.0}
        refused[reason.value] = max(screening.forged_share(here, judged.verdicts).values())
    assert refused == {"my-package:loud": 0.0, "seeded": 1.0}


# --- limits -----------------------------------------------------------------------------------------------------------


def within(evidence: Mapping[str, float], score: float) -> bool:
    """Whether every number of the evidence keeps to the limit beside it. KeyError for a limit of nothing."""
    numbers, fine = {**evidence, "score": score}, []
    for name, value in evidence.items():
        what, _, kind = name.rpartition("_")
        if kind == "limit":
            fine.append(numbers[what] <= value)
        elif kind == "floor":
            fine.append(numbers[what] >= value)
        elif kind == "below":
            fine.append(numbers[what] < value)
    assert fine, f"no limit in {dict(evidence)}"
    return all(fine)


def clean_and_odd() -> Round:
    good = [update(f"g{i}", tensors(noise=0.1, seed=i)) for i in range(5)]
    odd = {n: (3 if "lora_B" in n else 0.01) * v for n, v in tensors(noise=0.1, seed=8).items()}
    return a_round(*good, update("odd", odd))


def federated_screens() -> dict[str, tuple[Any, Round]]:
    bank_MD, malicious_M = labelled(40, 24)
    start = tensors()
    probe = Probe(weight_D=np.linspace(-1, 1, 24).astype(np.float32), bias=0.0, features="all_b")
    logits = [v.evidence["logit"] for v in ProbeFilter(probe, 0.0).screen(clean_and_odd(), {})[0]]
    ratios = [v.evidence["ratio"] for v in Neighbours(bank_MD, malicious_M, 1.0).screen(clean_and_odd(), {})[0]]
    count = len([n for n in start if "lora_A" in n]) + 1
    spread = Spread(np.full((1, count), 0.5, np.float32), np.full(count, 0.3, np.float32))
    told = a_round(update("up", tensors(0.05)), update("down", tensors(-0.05)), update("far", tensors(0.015)))
    return {
        "norm": (Norm(lambda index: 0.7), clean_and_odd()),
        "probe": (ProbeFilter(probe, float(np.median(logits))), clean_and_odd()),
        "probe_a": (ProbeFilter(probe, float(np.median(logits)), name="probe_a"), clean_and_odd()),
        "neighbours": (Neighbours(bank_MD, malicious_M, float(np.median(ratios))), clean_and_odd()),
        "balance": (Balance(spread), clean_and_odd()),
        "spectral": (Spectral(), spectral_round({n: 20 * v for n, v in tensors(noise=1.0, seed=99).items()})),
        "canary": (Canary(Told(), LIMITS), told),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("name", ["norm", "probe", "probe_a", "neighbours", "balance", "spectral", "canary"])
def test_a_verdict_is_what_its_own_numbers_and_limits_say(name: str) -> None:
    """Passed and refused ones both: a reader of the ledger needs nothing else to follow the decision."""
    screen, here = federated_screens()[name]
    verdicts, _ = screen.screen(here, {})
    assert {v.weight == 1 for v in verdicts} == {True, False}
    for verdict in verdicts:
        assert within(verdict.evidence, verdict.score) == (verdict.weight == 1), verdict
        said = limits.limit(name, verdict.evidence, verdict.score, {})
        assert said.count(" at ") == sum(map(limits.is_limit, verdict.evidence)) - (name == "norm")


def test_the_gate_and_an_anchor_of_ones_own_say_their_limits() -> None:
    gate = Gate(Told(), LIMITS).check(tensors(0.01), tensors(), tensors())  # type: ignore[arg-type]
    assert gate.passed
    assert gate.evidence["refusal_rise_limit"] == LIMITS.refusal_step
    own = CanaryLimits(**{**{k: getattr(LIMITS, k) for k in ("refusal_step", "refusal_anchor", "safe_step", "safe_anchor")},
                          "refusal_usual": 0.004, "safe_usual": 0.004})  # fmt: skip
    canary, state = Canary(Told(), own, "own"), {}  # type: ignore[arg-type]
    for rise in (0.006, 0.012):
        (verdict,), state = canary.screen(a_round(update("a", tensors(rise))), state)
    assert verdict.evidence["refusal_mean"] == pytest.approx(0.009, abs=1e-6)
    assert verdict.evidence["refusal_mean_limit"] == 0.004


def swarm_pool(values: Mapping[str, list[float]]) -> Pool:
    """Two rows: one whose evidence is spotless, one with these values."""
    made = pool({"n": {0: [("1 + 1 = 2", 1.0), ("1 + 1 = 3", 1.0)]}})
    spotless = {"logprob": [-1.0] * 3, "outside": [0.0] * 3, "margin": [0.0] * 3}
    arrays = {
        name: (np.array(zero, np.float32), np.array(values.get(name, zero), np.float32))
        for name, zero in spotless.items()
    }
    return replace(made, evidence=TokenEvidence(**arrays))


@pytest.mark.parametrize(
    ("screen", "values"),
    [
        (Seeded(whole_groups=False, flip_rate=0.5, flip_gap=9.0), {"margin": [0.0, 0.3, 0.0]}),
        (Seeded(whole_groups=False, flip_rate=0.5, flip_gap=9.0), {"margin": [0.04, 0.04, 0.04]}),
        (Logit(), {"outside": [0.0, 0.2, 0.0]}),
        (Logit(floor=0.01), {"logprob": [-1.0, -9.0, -1.0]}),
        (Arithmetic(), {}),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_so_is_one_on_a_completion(screen: Any, values: dict[str, list[float]]) -> None:
    verdicts, _ = screen.screen(swarm_pool(values), {})
    assert [v.weight for v in verdicts] == [1.0, 0.0]
    for verdict in verdicts:
        assert within(verdict.evidence, verdict.score) == (verdict.weight == 1), verdict


def test_limits_are_words_on_the_page_and_the_other_numbers_stay_numbers() -> None:
    """A ledger from before limits were in the evidence still shows them; so does a plug-in's of which nothing is known."""
    kept = Kept(10)
    kept.add(
        1,
        [
            {
                "participant": "a",
                "screen": "x",
                "weight": 1.0,
                "evidence": {"hum": 2.0, "hum_limit": 2.5, "gone_limit": None},
            }
        ],
    )
    (said,) = kept.cells[1, "a"]
    assert limits.limit("x", said.evidence, None, {}) == "hum at most 2.5"
    assert [name for name in said.evidence if not limits.is_limit(name)] == ["hum"]
    assert limits.limit("neighbours", {"ratio": 1.25}, 0.05, {}) == "ratio at most 1.200"
    norm = {"norm": 1.0, "ratio": 1.0, "ratio_limit": 1.15, "refused_above": 1.5}
    assert limits.limit("norm", norm, 1.0, {}) == "ratio at most 1.15, refused above 1.5"


def test_a_reason_of_either_kind_fits_the_type() -> None:
    known: list[AnyReason] = [Reason.OK, OwnReason("a:b")]
    assert [isinstance(reason, AnyReason) for reason in known] == [True, True]
