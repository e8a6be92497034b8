"""The faults of Safe-FedLLM's published code, one test each, that Assay must not have.

Where the published behaviour is kept for comparison (federated/published.py, `defence.faithful`) the same test shows
the fault there. Faults 1, 2 and 5 are tested over the registries, so that every new aggregator and server algorithm
stands before them too.
"""

from __future__ import annotations

import ast
import inspect
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from assay import checkpoint, data
from assay.config import ConfigError, Experiment, parse
from assay.contribution import LoraUpdate, Refusal, Round, Template, flatten, tensors_sha256
from assay.federated import aggregators, collect, defence, server_opt, store
from assay.federated.aggregators import AGGREGATORS, Aggregator
from assay.federated.claims import Ordered
from assay.federated.compute import TrainJob
from assay.federated.defence import Defence, Material
from assay.federated.level_screens import ClientLevel, EvidenceLevel, ShadowLevel, StepLevel
from assay.federated.local_sft import LocalResult, LocalSettings
from assay.federated.population import load_sources, make_clients
from assay.federated.probe import Probe, feature_deltas
from assay.federated.published import Published
from assay.federated.rehearsal import cast
from assay.federated.rehearsed import Rehearsal
from assay.federated.round import Outcome, ServerState, run_round
from assay.federated.server_opt import SERVER_OPTS
from assay.verdict import Reason, Screen, State, Verdict
from assay.wire import decode_update

SHAPES = {f"model.layers.{i}.q_proj.lora_{ab}.weight": (3, 4) if ab == "A" else (4, 3) for i in (0, 1) for ab in "AB"}
Named = dict[str, NDArray[np.float32]]
PROBE = Probe(weight_D=np.full(12, 10.0, np.float32), bias=0.0, features="first_b")  # malicious = layer 0's B goes up
STEPS = 2


def tensors(fill: float = 0.0, noise: float = 0.0, seed: int = 0) -> Named:
    rng = np.random.default_rng(seed)
    return {n: (fill + noise * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}


def update(name: str, values: Named, **more: Any) -> LoraUpdate:
    made = LoraUpdate(participant=name, round=1, base_sha256="b", tensors=values, sha256=tensors_sha256(values))
    return replace(made, **more)


def chain(end: Named) -> tuple[Named, Named]:
    """Two steps to `end` that are no straight line."""
    wobble = tensors(noise=0.2, seed=5)
    return {n: v / 2 + wobble[n] for n, v in end.items()}, end


def claiming(name: str, sent: Named, shown: Named) -> LoraUpdate:
    """Submits `sent` and shows steps and a shadow that end in `shown`."""
    return update(name, sent, steps=chain(shown), shadow=chain(shown))


def ordered(index: int) -> Ordered:
    return Ordered(steps=STEPS)


GOOD, BAD = tensors(-1.0), tensors(1.0)


def assays(level: str, **more: Any) -> Screen:
    made: dict[str, Callable[[], Screen]] = {
        "step": lambda: StepLevel(PROBE, ordered),
        "client": lambda: ClientLevel(PROBE),
        "shadow": lambda: ShadowLevel(PROBE, ordered),
        "evidence": lambda: EvidenceLevel(PROBE, ordered, more.pop("secret", "secret"), **more),
    }
    return made[level]()


def published(level: str) -> Screen:
    return Published(level, PROBE, STEPS)  # type: ignore[arg-type]


def play(screen: Screen, *rounds: LoraUpdate) -> list[Verdict]:
    """One client's verdicts over rounds that all start from zero."""
    state: State = {}
    out = []
    for index, sent in enumerate(rounds, 1):
        zero = tensors()
        here = Round(index=index, start=zero, initial=zero, updates=(sent,), batch_size=8)
        verdicts, state = screen.screen(here, state)
        out += verdicts
    return out


def weights(screen: Screen, *rounds: LoraUpdate) -> list[float]:
    return [v.weight for v in play(screen, *rounds)]


# --- 1: weights that change nothing ---------------------------------------------------------------------------------


class Told:
    """Weight 0 for everybody whose name begins with `bad`."""

    name = "told"

    def screen(self, round: Round, state: State) -> tuple[list[Verdict], State]:
        return [
            Verdict(
                participant=u.participant, contribution=u.sha256, screen=self.name,
                weight=float(not u.participant.startswith("bad")), reason=Reason.PROBE,
            )
            for u in round.updates
        ], state  # fmt: skip


def aggregator(name: str) -> Aggregator:
    """With the smallest parameters its factory takes; f = 1 where a number of attackers is asked for."""
    wanted = inspect.signature(AGGREGATORS[name]).parameters.values()
    return aggregators.make(name, **{p.name: 1 for p in wanted if p.default is inspect.Parameter.empty})


def crowd(honest: int = 9, bad: int = 3) -> list[LoraUpdate]:
    """Honest updates around a shared direction, poisoned ones around its opposite."""
    shared, other = tensors(noise=1.0, seed=50), tensors(noise=1.0, seed=60)
    made = [update(f"ok-{i}", {n: v + tensors(noise=0.3, seed=i)[n] for n, v in shared.items()}) for i in range(honest)]
    return made + [
        update(f"bad-{i}", {n: 2 * other[n] - v + tensors(noise=0.3, seed=90 + i)[n] for n, v in shared.items()})
        for i in range(bad)
    ]


def one_round(
    updates: list[LoraUpdate], rules: Defence, aggregate: Aggregator, opt: str
) -> tuple[NDArray[np.float32], Outcome]:
    start = tensors()
    made = server_opt.make(opt, lr=1.0)
    state = ServerState(round=0, adapter=start, initial=start, opt=made.init(flatten(start)))
    state, outcome = run_round(state, updates, [], rules, aggregate, made, Experiment().aggregation, 8)
    return flatten(state.adapter), outcome


@pytest.mark.parametrize("opt", SERVER_OPTS)
@pytest.mark.parametrize("name", AGGREGATORS)
def test_fault_1_weights_act_under_every_aggregator_and_server_algorithm(name: str, opt: str) -> None:
    updates = crowd()
    heeded = Defence(level="test", screens=(Told(),))
    with_zero, outcome = one_round(updates, heeded, aggregator(name), opt)
    without, _ = one_round([u for u in updates if u.participant.startswith("ok")], heeded, aggregator(name), opt)
    assert outcome.result == "applied"
    assert with_zero.any()
    np.testing.assert_array_equal(with_zero, without, err_msg="weight 0 is absence, bit for bit")
    # and absence is no matter of course here: unscreened, the poison reaches the model under most rules
    if name in ("mean", "median", "trimmed_mean"):
        assert not np.array_equal(
            one_round(updates, Defence(level="none", screens=()), aggregator(name), opt)[0], without
        )


def test_fault_1_the_published_rules_ignore_the_weights() -> None:
    bad = [claiming(f"bad-{i}", {n: v + tensors(noise=0.1, seed=i)[n] for n, v in BAD.items()}, BAD) for i in range(3)]
    good = [
        claiming(f"ok-{i}", {n: v + tensors(noise=0.1, seed=9 + i)[n] for n, v in GOOD.items()}, GOOD) for i in range(2)
    ]

    def rules(faithful: bool, rule: str) -> Defence:
        material = Material(
            probe=lambda: PROBE, rehearsal=lambda: pytest.fail("not needed"), lr_of_round=lambda r: 1e-3
        )
        table = {"level": "shadow", "faithful": faithful, "claims": {"optimizer": "any"}}
        return defence.make(parse({"defence": table, "aggregation": {"name": rule}}), material)

    for rule, reaches in (("mean", False), ("median", True)):
        after, _ = one_round([*bad, *good], rules(True, rule), aggregator(rule), "fedavg")
        assert (after.mean() > 0) == reaches, f"published, {rule}"
        after, _ = one_round([*bad, *good], rules(False, rule), aggregator(rule), "fedavg")
        assert after.mean() < 0, f"Assay's, {rule}"


# --- 2: algorithms that cannot be reached or do not collect -------------------------------------------------------------


@pytest.mark.parametrize("opt", SERVER_OPTS)
def test_fault_2_every_server_algorithm_is_reached_by_its_name_and_learns_from_the_clients(opt: str) -> None:
    experiment = parse({"server": {"opt": opt}})
    assert experiment.server.opt == opt
    updates, rules = crowd(bad=0), Defence(level="test", screens=())
    after, outcome = one_round(updates, rules, aggregator("mean"), opt)
    step_D = np.mean([flatten(u.tensors) for u in updates], axis=0)
    assert outcome.result == "applied"
    assert after @ step_D > 0, "towards what the clients have learned"
    # other clients, another model: published SCAFFOLD aggregated adapters it had never been sent
    other, _ = one_round(
        [replace(u, tensors={n: -v for n, v in u.tensors.items()}) for u in updates], rules, aggregator("mean"), opt
    )
    assert other @ step_D < 0


def test_fault_2_a_name_that_is_unknown_is_an_error_and_not_another_algorithm() -> None:
    with pytest.raises(ConfigError, match=r"unknown server optimiser 'fedadagard'; known: fedavg"):
        server_opt.make("fedadagard", lr=1.0)


# --- 3: evidence that is not bound ------------------------------------------------------------------------------------

LEVELS = ("step", "client", "shadow", "evidence")


@pytest.mark.parametrize("level", ["step", "client", "evidence"])
def test_fault_3_clean_evidence_beside_a_poisoned_adapter(level: str) -> None:
    forged = claiming("forger", BAD, shown=GOOD)
    assert weights(published(level), forged)[0] > 0.9
    assert weights(assays(level), forged)[0] < 0.1


def test_fault_3_what_shadow_alone_cannot_bind() -> None:
    """Stated, not hidden: a clean shadow beside a poisoned adapter passes the paper's shadow level. Evidence reads the
    submission as well, and `submitted` nothing else."""
    assert weights(assays("shadow"), claiming("forger", BAD, shown=GOOD)) == [1.0]
    assert weights(assays("evidence"), claiming("forger", BAD, shown=GOOD)) == [0.0]


@pytest.mark.parametrize("level", ["step", "shadow", "evidence"])
def test_fault_3_missing_or_made_up_evidence_is_weight_0(level: str) -> None:
    silent = update("silent", BAD)
    straight = {n: v / 2 for n, v in GOOD.items()}
    line = update("line", GOOD, steps=(straight, GOOD), shadow=(straight, GOOD))
    short = update("short", GOOD, steps=(GOOD,), shadow=(GOOD,))
    nan = {n: np.full_like(v, np.nan) for n, v in GOOD.items()}
    broken = update("nan", GOOD, steps=(nan, GOOD), shadow=(nan, GOOD))
    turned = {n: v.T for n, v in GOOD.items()}
    shaped = update("shaped", GOOD, steps=(turned, GOOD), shadow=(turned, GOOD))
    assert weights(published(level), silent)[0] > 0.9, "published: missing evidence counts as benign"
    for claimed in (silent, line, short, broken, shaped):
        verdict = play(assays(level), claimed)[0]
        assert verdict.weight == 0
        assert verdict.reason in (Reason.CLAIM_MISSING, Reason.CLAIM_INCONSISTENT)
        assert verdict.sentence


@pytest.mark.parametrize("level", LEVELS)
def test_fault_3_a_classifier_that_fails_trusts_nobody(level: str) -> None:
    other_model = Probe(weight_D=np.zeros(7, np.float32), bias=0.0, features="first_b")
    zero = tensors()
    here = Round(index=1, start=zero, initial=zero, updates=(claiming("c", GOOD, GOOD),), batch_size=8)
    outcomes = []
    for screen in (Published(level, other_model, STEPS), replace(assays(level), probe=other_model)):  # type: ignore[arg-type, type-var]
        rules = Defence(level="test", screens=(screen,))  # type: ignore[arg-type]
        made = server_opt.make("fedavg", lr=1.0)
        state = ServerState(round=0, adapter=zero, initial=zero, opt=made.init(flatten(zero)))
        outcomes.append(
            run_round(state, here.updates, [], rules, aggregator("mean"), made, Experiment().aggregation, 8)[1]
        )
    trusting, closed = outcomes
    assert trusting.screened.weight == {"c": 1.0}
    assert closed.screened.weight == {"c": 0.0}
    assert closed.screened.deciding["c"].reason is Reason.SCREEN_FAILED
    assert closed.result == "skipped"


# --- 4: sleepers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["step", "client"])
def test_fault_4_somebody_still_looks_after_round_20(level: str) -> None:
    rounds = [claiming("sleeper", GOOD, GOOD)] * 20 + [claiming("sleeper", BAD, BAD)] * 5
    asleep, awake = weights(published(level), *rounds), weights(assays(level), *rounds)
    assert asleep[20:] == [asleep[19]] * 5
    assert asleep[19] > 0.98, "published: five rounds of poison at full weight"
    assert all(a > b for a, b in pairwise(awake[19:])), "Assay's: every one of them costs trust"
    assert awake[24] < 0.85


def test_fault_4_evidence_catches_a_sleeper_in_its_first_audited_bad_round() -> None:
    """Published: frozen benign after 3 rounds, audited in every 5th; the attacker counts and strikes in between."""
    good, bad = claiming("s", GOOD, GOOD), claiming("s", BAD, BAD)
    rounds = [good] * 3 + [good if (i - 3) % 5 == 4 else bad for i in range(3, 28)]
    unseen = weights(published("evidence"), *rounds)
    assert sum(unseen[i] for i, sent in enumerate(rounds) if sent is bad) == pytest.approx(20.0), "20 rounds of poison"
    for secret in map(str, range(8)):
        verdicts = play(assays("evidence", secret=secret, audit=0.5), *rounds)
        looked = [i for i, v in enumerate(verdicts) if v.evidence["audited"] and rounds[i] is bad]
        assert looked, "half of 20 rounds are looked at: none is a chance of 1e-6"
        assert all(verdicts[i].weight == 0 for i in looked), "memoryless: the past buys nothing"
        got_through = sum(v.weight for v, sent in zip(verdicts, rounds) if sent is bad)
        assert got_through <= 8, "a strike or so until the draw; then barred"
    assert weights(assays("evidence", audit=1.0), *rounds)[3:] == [0.0] * 25, "and at once where all is looked at"


def test_fault_4_audits_cannot_be_counted_and_no_verdict_is_for_ever() -> None:
    good, bad = claiming("s", GOOD, GOOD), claiming("s", BAD, BAD)
    plans = {
        tuple(bool(v.evidence["audited"]) for v in play(assays("evidence", secret=s), *[good] * 30))
        for s in map(str, range(8))
    }
    assert len(plans) == 8, "another secret, another plan"
    assert weights(published("evidence"), *[bad] * 3, *[good] * 20)[3:] == [0.0] * 20
    assert weights(assays("evidence"), *[bad] * 3, *[good] * 20)[5:] == [1.0] * 18


# --- 5: rules that are told ----------------------------------------------------------------------------------------------


def test_fault_5_no_rule_is_told_who_or_how_many_attack() -> None:
    """Aggregators and server algorithms see a matrix and weights: none of them can even name the experiment's truth."""
    folder = Path(aggregators.__file__)
    files = sorted(folder.parent.rglob("*.py")) if folder.name == "__init__.py" else [folder]
    for path in [*files, Path(server_opt.__file__)]:
        tree = ast.parse(path.read_text())
        named = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
            n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
        }
        assert not {"malicious", "malicious_count", "Experiment", "clients", "ClientsConfig"} & named, path


@pytest.mark.parametrize("name", [n for n in AGGREGATORS if "f" in inspect.signature(AGGREGATORS[n]).parameters])
def test_fault_5_the_number_borne_is_a_parameter_that_is_heeded(name: str) -> None:
    """Published: Krum and DnC read the true number, trimmed mean always trims 1."""
    honest = np.linspace(-0.1, 0.1, 12)[:, None] * np.ones((12, 12))  # enough for the most demanding, 4f+3
    far = np.full((2, 12), 1e3)
    delta_ND = np.concatenate([honest, far]).astype(np.float32)
    rest = {
        p.name: 1 for p in inspect.signature(AGGREGATORS[name]).parameters.values()
        if p.default is inspect.Parameter.empty and p.name != "f"
    }  # fmt: skip
    borne = aggregators.make(name, f=2, **rest)(delta_ND, np.ones(14))
    assert np.abs(borne).max() <= 0.2, "two borne, two attackers"
    with pytest.raises(aggregators.ToleranceError, match="f=50"):
        aggregators.make(name, f=50, **rest)(delta_ND, np.ones(14))


@pytest.mark.skipif("trimmed_mean" not in AGGREGATORS, reason="registered under another name")
def test_fault_5_trimming_one_lets_the_second_attacker_in() -> None:
    delta_ND = np.array([[0.0], [0.0], [0.0], [0.0], [0.0], [9.0], [9.0]], np.float32)
    assert aggregators.make("trimmed_mean", f=1)(delta_ND, np.ones(7))[0] > 1
    assert aggregators.make("trimmed_mean", f=2)(delta_ND, np.ones(7))[0] == 0


# --- 6: a probe fitted on the rows of the attack ---------------------------------------------------------------------------


class Rows:
    """A compute that notes which rows it was handed."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def train(self, jobs: list[TrainJob], tick: object = None) -> list[LocalResult]:
        out = []
        for number, job in enumerate(jobs):
            self.seen |= {f"{r.instruction}\n{r.response}" for r in job.rows}
            moved = {n: v + np.float32(0.01 * number) for n, v in job.start.items()}
            out.append(LocalResult(moved, (moved,), (0.0,)))
        return out


def test_fault_6_the_probe_never_sees_a_row_that_a_client_trains_on() -> None:
    experiment = Experiment()
    sources = load_sources(experiment)
    clients = {
        f"{r.instruction}\n{r.response}" for c in make_clients(experiment, sources) for r in (*c.clean, *c.harmful)
    }
    compute = Rows()
    settings = LocalSettings(steps=1, batch_size=8, max_length=48, lr=1e-3)
    collect.collect(compute, tensors(), sources, experiment, settings)  # type: ignore[arg-type]
    rehearsed = {f"{r.instruction}\n{r.response}" for a in cast(experiment, sources) for r in a.rows}
    held = {f"{r.instruction}\n{r.response}" for r in data.part(sources.benign, "heldout")}
    assert len(compute.seen) > 100
    assert len(clients) > 100
    assert not compute.seen & clients
    assert not rehearsed & clients
    assert not (compute.seen | rehearsed) & held
    # the published default hands the attack's own corpora to the probe
    whole = {f"{r.instruction}\n{r.response}" for r in sources.malicious}
    assert whole & clients


def test_fault_6_recall_is_measured_and_not_precision_alone() -> None:
    """A probe that finds one of two attackers and never cries wolf: precision 1, and Assay says 0.5."""
    x = np.zeros((4, 12), np.float32)
    x[0], x[1], x[2:] = 1.0, -1.0, -1.0
    found = collect.evaluate_probe(PROBE, x, [True, True, False, False], 0.8)
    assert (found["tpr"], found["fpr"]) == (0.5, 0.0)
    assert found["auroc"] == pytest.approx(0.75)
    assert found["tpr_at_1pct_fpr"] is not None
    assert feature_deltas([BAD], tensors(), "first_b").shape == (1, 12)


# --- 7: pickles ------------------------------------------------------------------------------------------------------------

RAN: list[str] = []


def fire(where: str) -> Named:
    RAN.append(where)
    return tensors(1.0)


class Bomb:
    """Calls `fire` when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], Named], tuple[str]]:
        return fire, ("pickle",)


def test_fault_7_nothing_a_peer_or_a_file_holds_is_unpickled(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(Bomb(), buffer)
    # what the published code does with its probe and its deltas runs what the file says
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert RAN == ["pickle"]
    RAN.clear()
    for raw in (pickle.dumps(Bomb()), buffer.getvalue()):
        file = tmp_path / "x.safetensors"
        file.write_bytes(raw)
        template = Template(shapes=SHAPES, base_sha256="b", round=1)
        found = decode_update(raw, template=template, run="r", participant="c")
        assert isinstance(found, Refusal)
        with pytest.raises(ConfigError, match="probe file"):
            Probe.load(file)
        with pytest.raises(Exception, match=r"(?i)header|safetensor|json|invalid"):
            Rehearsal.load(file)
        name = "0" * 64
        (tmp_path / f"{name}.safetensors").write_bytes(raw)
        with pytest.raises(ConfigError, match="is damaged"):
            store.get(tmp_path, name)
        folder = tmp_path / "checkpoints"
        folder.mkdir(exist_ok=True)
        (folder / "000001.safetensors").write_bytes(raw)
        with pytest.raises(checkpoint.CheckpointError), pytest.warns(RuntimeWarning, match="is damaged"):
            checkpoint.load_latest(folder)
        assert not RAN
