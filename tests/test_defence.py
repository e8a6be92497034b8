"""Which screens a level is made of, free combinations of them, and mistakes that are one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from assay import wire
from assay.config import ConfigError, Experiment, parse
from assay.contribution import LoraUpdate, Refusal, Template, tensors_sha256
from assay.federated import defence, published
from assay.federated.balance import Spread
from assay.federated.canary import CanaryLimits, Losses
from assay.federated.claims import chain_problem
from assay.federated.defence import LEVELS, Defence, Material
from assay.federated.probe import Probe
from assay.federated.rehearsed import Rehearsal
from assay.verdict import Screen

PROBE = Probe(weight_D=np.zeros(12, np.float32), bias=0.0, features="first_b")


def rehearsed() -> tuple[Rehearsal, Any]:
    limits = CanaryLimits(refusal_step=0.1, refusal_anchor=0.2, safe_step=0.1, safe_anchor=0.2)
    made = Rehearsal(
        bank_MD=np.ones((4, 12), np.float16), malicious_M=np.array([False, False, True, True]), norm_by_round=(1.0,),
        lr_by_round=(2e-3,), probe=PROBE, probe_limit=1.5, neighbour_limit=1.2, canary=limits, notes={},
        spread=Spread(np.full((1, 2), 0.5, np.float32), np.full(2, 0.2, np.float32)),
    )  # fmt: skip
    return made, lambda adapters: [Losses(1.0, 1.0) for _ in adapters]


def nothing() -> Any:
    raise AssertionError("this level needs no labelled data")


LABELLED = Material(probe=lambda: PROBE, rehearsal=rehearsed, lr_of_round=lambda round: 2e-3)
UNLABELLED = Material(probe=nothing, rehearsal=nothing, lr_of_round=lambda round: 2e-3)


def made(material: Material = LABELLED, **table: Any) -> Defence:
    return defence.make(parse({"defence": table}), material)


def screen_of(found: Defence, name: str) -> Screen:
    return next(s for s in found.screens if s.name == name)


def test_rehearsed_limits_do_not_fall_below_the_floors_of_either_side() -> None:
    found, _ = rehearsed()
    floors = parse({"defence": {"canary": {
        "floor": 0.05, "anchor_floor": 0.3, "safe_floor": 0.4, "safe_anchor_floor": 0.15,
    }}}).defence.canary  # fmt: skip
    limits = found.canary_limits(floors)
    assert (limits.refusal_step, limits.refusal_anchor, limits.safe_step, limits.safe_anchor) == (0.1, 0.3, 0.4, 0.2)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_made_of_its_screens(level: str) -> None:
    found = made(level=level)
    assert [s.name for s in found.screens] == [n for n in LEVELS[level] if n != "gate"]
    assert (found.gate is not None) == (level == "submitted")
    assert found.wants_steps == (level == "step")
    assert found.wants_shadow == (level in ("shadow", "evidence"))
    assert found.min_mean_weight == (0.2 if level in defence.PAPERS else 0.0)
    assert not found.faithful


@pytest.mark.parametrize("level", LEVELS)
def test_claims_nobody_reads_are_refused_before_they_are_parsed(level: str) -> None:
    shapes = {"x.lora_A.weight": (1, 2), "x.lora_B.weight": (2, 1)}
    values = {n: np.ones(s, np.float32) for n, s in shapes.items()}
    sent = LoraUpdate(
        participant="c", round=1, base_sha256="b", tensors=values, sha256=tensors_sha256(values), steps=(values,) * 20,
    )  # fmt: skip
    template, message = Template(shapes=shapes, base_sha256="b", round=1), wire.encode_update(sent, run="r")
    found = made(level=level)
    read = wire.decode_update(message, template=template, run="r", participant="c", limits=found.limits(20))
    reads_claims = found.wants_steps or found.wants_shadow
    assert isinstance(read, LoraUpdate) if reads_claims else read.reason == "too_large"  # type: ignore[union-attr]
    fewer = wire.decode_update(message, template=template, run="r", participant="c", limits=found.limits(19))
    assert isinstance(fewer, Refusal)


def test_the_config_offers_exactly_the_levels_there_are() -> None:
    offered = type(Experiment().defence).model_fields["level"].annotation
    assert set(offered.__args__) == set(LEVELS)  # type: ignore[union-attr]


def test_levels_without_labelled_data_ask_for_none() -> None:
    assert made(UNLABELLED, level="spectral").gate is None
    made(UNLABELLED, level="none")


def test_screens_combine_in_the_order_given() -> None:
    wanted = ["structure", "norm", "spectral", "client", "step", "canary", "gate"]
    found = made(level="none", screens=wanted, monitor=["step"])
    assert [*(s.name for s in found.screens), "gate"] == wanted
    assert found.level == "custom"
    assert found.gate is not None
    assert found.min_mean_weight == 0.0, "with the gate no majority can stop the training"
    assert found.wants_steps
    assert not found.wants_shadow
    assert "step (monitor)" in found.summary()
    assert made(screens=["structure", "client"]).min_mean_weight == 0.2
    assert made(screens=["canary"]).gate is None, "the gate is a choice of its own"


def test_params_reach_their_screen() -> None:
    table: dict[str, Any] = {
        "screens": ["norm", "neighbours", "spectral", "client", "evidence", "duplicate"],
        "params": {
            "norm": {"clip": 1.3, "reference": "round"}, "neighbours": {"k": 2}, "spectral": {"limit": 4},
            "client": {"score_rounds": 3}, "evidence": {"audit": 1}, "duplicate": {"cosine": 0.9},
        },
    }  # fmt: skip
    found = made(**table)
    norm: Any = screen_of(found, "norm")
    assert (norm.clip, norm.refuse, norm.limit_of_round) == (1.3, 1.5, None)
    for name, key, value in (
        ("neighbours", "k", 2), ("spectral", "limit", 4), ("client", "score_rounds", 3), ("evidence", "audit", 1),
        ("duplicate", "cosine", 0.9),
    ):  # fmt: skip
        assert getattr(screen_of(found, name), key) == value
    assert getattr(screen_of(found, "neighbours"), "limit") == 1.2  # noqa: B009 - a Screen has only a name


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"screens": ["nrom"]}, "unknown screen 'nrom'; known: structure, norm, duplicate, probe"),
        ({"screens": ["norm", "norm"]}, "norm is named twice"),
        ({"screens": ["norm"], "params": {"canary": {}}}, "defence.params.canary: level custom has no such screen; it has norm"),
        ({"params": {"norm": {"clpi": 1.2}}}, "defence.params.norm: no parameter 'clpi'; known: acts, clip, reference, refuse"),
        ({"params": {"norm": {"limit_of_round": 1.0}}}, "no parameter 'limit_of_round'"),
        ({"params": {"norm": {"clip": "a"}}}, "defence.params.norm.clip: must be a finite number, got 'a'"),
        ({"params": {"norm": {"clip": True}}}, "must be a finite number"),
        ({"params": {"norm": {"clip": 9.0}}}, "defence.params.norm: clip must be positive and not above refuse"),
        ({"params": {"norm": {"acts": "me"}}}, "defence.params.norm: acts must be weight or length, got 'me'"),
        ({"params": {"norm": {"reference": "me"}}}, "must be rehearsal or round, got 'me'"),
        ({"params": {"neighbours": {"k": 2.5}}}, "defence.params.neighbours.k: must be a whole number"),
        ({"params": {"neighbours": {"k": 0}}}, "k must be at least 1"),
        ({"params": {"gate": {"limit": 1}}}, "defence.params.gate: no parameter 'limit'; known: none"),
        ({"params": {"canary": {"measure": 1}}}, "no parameter 'measure'; known: anchor"),
        ({"level": "evidence", "params": {"evidence": {"audit": 0}}}, "audit must be in (0, 1]"),
        ({"level": "evidence", "params": {"evidence": {"secret": "x"}}}, "no parameter 'secret'"),
        ({"monitor": ["step"]}, "level submitted has no screen 'step'; it has structure, norm"),
        ({"faithful": True}, "reproduces the levels step, client, shadow, evidence"),
        ({"faithful": True, "level": "none"}, "reproduces the levels"),
        ({"faithful": True, "level": "step", "screens": ["step"]}, "reproduces the levels"),
        ({"faithful": True, "level": "step", "threshold": 0.7}, "defence.threshold: the published behaviour has it fixed"),
        ({"faithful": True, "level": "step", "score_rounds": 5}, "defence.score_rounds: the published behaviour"),
        ({"faithful": True, "level": "client", "params": {"client": {}}}, "the published behaviour takes none"),
    ],
)  # fmt: skip
def test_mistakes_say_what_to_do(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        made(**table)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_no_screens_at_all_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"defence\.screens = \[\] is no defence"):
        parse({"defence": {"screens": []}})


def test_spectral_wants_enough_clients_to_compare() -> None:
    few = parse({"defence": {"level": "spectral"}, "clients": {"total": 3}})
    with pytest.raises(ConfigError, match="compares at least 4 clients"):
        defence.make(few, UNLABELLED)


def test_evidence_secrets_differ_from_run_to_run_and_can_be_set() -> None:
    def secret(**values: Any) -> str:
        one = parse(
            {"defence": {"level": "evidence", "evidence": values.get("evidence", {})}, "seed": values.get("seed", 0)}
        )
        return str(getattr(screen_of(defence.make(one, LABELLED), "evidence"), "secret"))  # noqa: B009

    assert len({secret(), secret(seed=1), secret(evidence={"seed": 0}), secret(evidence={"seed": 1})}) == 4
    assert secret(evidence={"seed": 1}) == secret(evidence={"seed": 1}, seed=5), "a set secret is the operator's own"


def test_orders_follow_the_rate_of_the_round_and_can_be_unbound() -> None:
    falling = Material(probe=lambda: PROBE, rehearsal=rehearsed, lr_of_round=lambda round: 1e-3 / round)
    step: Any = screen_of(made(falling, level="step"), "step")
    assert [step.ordered(r).lr for r in (1, 2)] == [1e-3, 5e-4]
    assert step.ordered(1).steps == 2
    free: Any = screen_of(made(falling, level="step", claims={"optimizer": "any"}), "step")
    assert (free.ordered(1).lr, free.ordered(1).turn) == (None, -1.0)
    told: Any = screen_of(made(falling, level="step", claims={"turn": 0.1}), "step")
    assert (step.ordered(1).turn, told.ordered(1).turn) == (0.0, 0.1)
    shadow: Any = screen_of(made(falling, level="shadow"), "shadow")
    assert shadow.ordered(7).lr == 2e-3, "the shadow's rate is fixed over rounds"


@pytest.mark.parametrize("level", ["step", "shadow", "evidence"])
def test_a_client_whose_batches_disagree_is_no_forger_where_sgd_is_ordered(level: str) -> None:
    """Sgd has no momentum: two honest steps may point apart (27 of 30 honest clients were refused for it on `tiny`)."""
    experiment = parse({"defence": {"level": level}, "training": {"optimizer": "sgd"}})
    ordered = getattr(screen_of(defence.make(experiment, LABELLED), level), "ordered")(1)  # noqa: B009
    start = {"x.lora_A.weight": np.zeros((1, 3), np.float32)}
    chain = [{n: np.array([row], np.float32) for n in start} for row in ([1.0, 0.0, 0.5], [0.5, 1.0, 0.5])]
    assert chain_problem(chain, start, ordered) == ""
    assert chain_problem(chain, start, replace(ordered, turn=0.0)).startswith("step 2 turns back")


# --- the faithful switch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", published.LEVELS)
def test_faithful_is_another_screen_and_says_so(level: str) -> None:
    found = made(level=level, faithful=True)
    assert [s.name for s in found.screens] == ["structure", f"published_{level}"]
    assert found.faithful
    assert found.summary().startswith("AS PUBLISHED")
    assert (found.wants_steps, found.wants_shadow) == (level in ("step", "client"), level in ("shadow", "evidence"))
    assert not found.monitor


@pytest.mark.parametrize("changes", [{"aggregation": {"name": "median"}}, {"server": {"opt": "fedadam"}}])
def test_faithful_weights_act_with_three_algorithms_only(changes: dict[str, Any]) -> None:
    found = defence.make(parse({"defence": {"level": "step", "faithful": True}, **changes}), LABELLED)
    assert found.monitor == {"published_step"}, "it looks on and weighs nothing"


def test_faithful_wants_the_first_layer() -> None:
    other = Material(
        probe=lambda: Probe(weight_D=np.zeros(4, np.float32), bias=0.0, features="all_b"), rehearsal=rehearsed,
        lr_of_round=lambda round: 1e-3,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="reads the first layer"):
        made(other, level="step", faithful=True)
