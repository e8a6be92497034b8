"""Adapters on a disk: the same round to the last bit, in memory that the updates do not decide."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from assay import contribution, spool
from assay.config import AggregationConfig
from assay.contribution import LoraUpdate, Round, Tensors, differences, tensors_sha256
from assay.federated import aggregators, scaffold, screens, server_opt
from assay.federated.aggregators import AGGREGATORS, PRE_STEPS, Remembering, common
from assay.federated.defence import Defence
from assay.federated.level_screens import ClientLevel
from assay.federated.probe import Probe
from assay.federated.round import Outcome, ServerState, run_round
from assay.federated.spectral import Spectral
from assay.spool import Deltas, Spool, SpoolError, Stored
from assay.verdict import Screen

SHAPES = {
    f"model.layers.{i}.q_proj.lora_{ab}.weight": (4, 48) if ab == "A" else (40, 4) for i in range(2) for ab in "AB"
}
B_VALUES = 2 * 40 * 4
NAMES = tuple(f"c{i:02d}" for i in range(11))


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Spool]:
    with Spool(tmp_path, tensors(0)) as made:
        yield made


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Borders of blocks and panels everywhere, none where a tensor ends."""
    for module in (contribution, common, screens):
        monkeypatch.setattr(module, "BLOCK_VALUES", 7 * 11)
    monkeypatch.setattr(contribution, "PANEL_VALUES", 3 * 7 * 11 + 5)


def tensors(seed: int, scale: float = 1.0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}


def update(name: str, adapter: Tensors, **more: Any) -> LoraUpdate:
    made = LoraUpdate(participant=name, round=1, base_sha256="b", tensors=adapter, sha256=tensors_sha256(adapter))
    return replace(made, **more)


def sent() -> list[LoraUpdate]:
    """Honest ones, two copies, one far too long, one that trained nothing."""
    made = [update(name, tensors(i + 1)) for i, name in enumerate(NAMES)]
    made[3] = update(NAMES[3], tensors(3))
    made[5] = update(NAMES[5], tensors(6, 40.0))
    made[7] = update(NAMES[7], tensors(0))
    return made


def probe(features: Any = "all_b") -> Probe:
    size = B_VALUES // 2 if features == "first_b" else B_VALUES
    return Probe(
        weight_D=np.random.default_rng(9).standard_normal(size).astype(np.float32), bias=0.1, features=features
    )


def bank() -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
    rng = np.random.default_rng(4)
    return rng.standard_normal((14, B_VALUES)).astype(np.float16), np.arange(14) % 2 == 0


SCREENS: dict[str, Callable[[], Screen]] = {
    "structure": screens.Structure,
    "norm": lambda: screens.Norm(None),
    "probe": lambda: screens.ProbeFilter(probe(), 0.4),
    "neighbours": lambda: screens.Neighbours(*bank(), limit=1.0),
    "spectral": lambda: Spectral(limit=3.0),
    "client": lambda: ClientLevel(probe("first_b")),
    "duplicate": screens.Duplicate,
}
PARAMS: dict[str, dict[str, Any]] = {
    "trimmed_mean": {"f": 2}, "krum": {"f": 2}, "multi_krum": {"f": 2}, "bulyan": {"f": 1}, "dnc": {"f": 2, "subset": 50},
    "flame": {"noise": 0.01}, "lasa": {"layers": tuple(int(np.prod(SHAPES[n])) for n in sorted(SHAPES))},
}  # fmt: skip


def play(
    updates: list[LoraUpdate], made: tuple[Screen, ...], aggregate: aggregators.Aggregator, **more: Any
) -> tuple[ServerState, Outcome]:
    start = tensors(0)
    opt = server_opt.make("fedavg")
    state = ServerState(round=0, adapter=start, initial=start, opt={}, **more)
    rule = scaffold.Rule(scale=0.1, limit=50.0) if "controls" in more else None
    return run_round(
        state, updates, [], Defence(level="x", screens=made), aggregate, opt, AggregationConfig(), 8, rule
    )  # fmt: skip


def assert_same(one: tuple[ServerState, Outcome], other: tuple[ServerState, Outcome]) -> None:
    assert one[1].ledger_body() == other[1].ledger_body()
    assert one[1].result == "applied"
    for a, b in (
        (one[0].adapter, other[0].adapter),
        (one[0].memory, other[0].memory),
        (one[0].controls, other[0].controls),
    ):
        assert {n: v.tobytes() for n, v in a.items()} == {n: v.tobytes() for n, v in b.items()}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", SCREENS)
def test_a_screen_says_the_same_of_adapters_on_a_disk(name: str, held: Spool) -> None:
    there, here = sent(), [held.keep(u) for u in sent()]
    assert all(isinstance(u.tensors, Stored) for u in here)
    made = SCREENS[name](), SCREENS[name]()
    assert_same(play(there, made[:1], aggregators.make("mean")), play(here, made[1:], aggregators.make("mean")))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("pre", [(), ("nnm",), ("bucketing", "nnm")], ids="-".join)
@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_rule_makes_the_same_of_adapters_on_a_disk(name: str, pre: tuple[str, ...], held: Spool) -> None:
    def made() -> aggregators.Aggregator:
        last = aggregators.make(name, **PARAMS.get(name, {}))
        steps = [PRE_STEPS[p](**({"f": 1} if p == "nnm" else {"s": 1})) for p in pre]
        return aggregators.chain(*steps, last) if pre else last

    if pre and isinstance(aggregators.make(name, **PARAMS.get(name, {})), Remembering):
        pytest.skip("rules that remember take no pre-steps")
    guards = (SCREENS["structure"](), SCREENS["duplicate"]())
    here = [held.keep(u) for u in sent()]
    assert_same(play(sent(), guards, made()), play(here, guards, made()))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["mean", "median", "krum"])
def test_rows_cut_to_a_length_are_cut_the_same_on_a_disk(name: str, held: Spool) -> None:
    made = (screens.Norm(None, acts="length"),)
    here, there, uncut = (
        play(updates, judges, aggregators.make(name, **PARAMS.get(name, {})))
        for updates, judges in ((sent(), made), ([held.keep(u) for u in sent()], made), (sent(), ()))
    )
    assert_same(here, there)
    assert name == "krum" or tensors_sha256(here[0].adapter) != tensors_sha256(uncut[0].adapter), "something was cut"


def test_every_rule_and_pre_step_is_among_those_compared() -> None:
    assert set(PARAMS) <= set(AGGREGATORS)
    assert set(PRE_STEPS) == {"nnm", "bucketing"}


@pytest.mark.usefixtures("small")
def test_control_variates_products_and_foreign_rules_are_the_same(held: Spool) -> None:
    here = [held.keep(u) for u in sent()]
    controls: dict[str, Any] = {"controls": {}}
    assert_same(
        play(sent(), (), aggregators.make("median"), **controls), play(here, (), aggregators.make("median"), **controls)
    )

    def largest(delta_ND: NDArray[np.float32], weight_N: NDArray[np.float64]) -> NDArray[np.float32]:
        assert type(delta_ND) is np.ndarray
        return delta_ND.max(axis=0)

    guard = (SCREENS["norm"](),)
    assert_same(
        play(sent(), guard, aggregators.make(largest)),
        play(here, guard, aggregators.make(largest)),  # type: ignore[arg-type]
    )
    config, start = AggregationConfig(average="product"), tensors(0)
    opt, defence = server_opt.make("fedavg"), Defence(level="x", screens=())
    ends = [
        run_round(ServerState(round=0, adapter=start, initial=start, opt={}), updates, [], defence, aggregators.make("mean"), opt, config, 8)
        for updates in (sent(), here)
    ]  # fmt: skip
    assert_same(ends[0], ends[1])


def test_what_is_stored_is_what_was_sent(held: Spool) -> None:
    adapter = {n: np.asfortranarray(v) for n, v in tensors(1).items()}
    claims = (tensors(2), adapter)
    kept = held.keep(update("a", adapter, steps=claims, shadow=claims[:1]))
    assert kept.sha256 == tensors_sha256(kept.tensors) == tensors_sha256(adapter)
    assert [tensors_sha256(t) for t in (*kept.steps, *kept.shadow)] == [tensors_sha256(t) for t in (*claims, claims[0])]
    assert held.bytes == 4 * 4 * sum(v.size for v in adapter.values())
    name = sorted(adapter)[1]
    assert {**kept.tensors}.keys() == adapter.keys()
    np.testing.assert_array_equal(contribution.part(kept.tensors, name, 5, 9), adapter[name].ravel()[5:9])
    np.testing.assert_array_equal(contribution.part(kept.tensors, name, 150, 10**6), adapter[name].ravel()[150:])
    with pytest.raises(ValueError, match="read-only"):
        kept.tensors[name][0] = 1
    there = pickle.loads(pickle.dumps(kept.tensors))  # as to a worker process of our own
    assert type(there) is dict
    assert tensors_sha256(there) == kept.sha256


def test_an_adapter_of_another_form_stays_where_it_is_and_is_refused(held: Spool) -> None:
    odd = {**tensors(1), sorted(SHAPES)[0]: np.ones((2, 2), np.float32)}
    with pytest.raises(ValueError, match="one form"):
        held.put(odd)
    kept = held.keep(update("odd", odd))
    assert kept.tensors is odd
    _, outcome = play([held.keep(u) for u in sent()] + [kept], (), aggregators.make("mean"))
    assert outcome.screened.weight["odd"] == 0
    assert outcome.result == "applied"


def test_after_its_round_nothing_is_left_and_reading_says_so(tmp_path: Path) -> None:
    with Spool(tmp_path, tensors(0)) as held:
        stored = held.put(tensors(1))
        assert not list(tmp_path.iterdir()), "the file has no name"
    with pytest.raises(SpoolError, match="closed"):
        stored[sorted(SHAPES)[0]]


KILLED = """
import sys, time, numpy as np
from assay.spool import Spool
held = Spool(sys.argv[1], {"a": np.zeros(1000, np.float32)})
held.put({"a": np.ones(1000, np.float32)})
print("there", flush=True)
time.sleep(60)
"""


def test_a_kill_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"there\n"
        os.kill(child.pid, signal.SIGKILL)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_named_before_the_round(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match=r"needs 4\d+\.\d GB of disk and .* are free"):
        spool.check_room(tmp_path, 10**5, 10**6 + 10**5)
    spool.check_room(tmp_path / "new", 1, 1)


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_of(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


SLOW = {"residual": pytest.mark.slow}  # small blocks, and four passes over pairs
RULES = [pytest.param(name, (), marks=SLOW.get(name, ())) for name in AGGREGATORS] + [
    ("median", ("nnm",)),
    ("mean", ("bucketing",)),
    ("krum", ("nnm",)),
]


@pytest.mark.parametrize(("name", "pre"), RULES, ids=lambda x: "-".join(x) if isinstance(x, tuple) else x)
def test_a_rule_needs_a_quarter_of_adapters_on_a_disk(name: str, pre: tuple[str, ...], tmp_path: Path) -> None:
    """The adapters themselves lie on the disk, so a quarter of them is all the memory there is to need; FoolsGold, which
    returns a history as large as they are, needs that beside it."""
    width = 2**11 if name == "residual" else 2**13
    shapes = {f"x.{i}.lora_A.weight": (8, width) for i in range(16)}
    start = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
    rng, size = np.random.default_rng(0), 16 * 16 * 8 * width * 4
    params = {k: v for k, v in PARAMS.get(name, {}).items() if k not in ("layers", "subset")}
    aggregate = aggregators.make(name, **params)
    if pre:
        aggregate = aggregators.chain(*(PRE_STEPS[p](**({"f": 2} if p == "nnm" else {"s": 2})) for p in pre), aggregate)
    few = np.random.default_rng(1).standard_normal((16, 64), np.float32)
    aggregate(few, np.ones(16))  # imports are not the rule's memory
    with Spool(tmp_path, start) as held:
        stored = [held.put({n: rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}) for _ in range(16)]
        delta_ND = Deltas(stored, start)
        assert delta_ND.nbytes == size
        peak = peak_of(lambda: aggregate(delta_ND, np.ones(16)))
    kept = size if name == "foolsgold" else 0
    assert peak <= kept + size / 4, f"{(peak - kept) / size:.0%} of the adapters"


@pytest.mark.parametrize("name", [n for n in SCREENS if n != "client"])
def test_a_screen_needs_a_quarter_of_adapters_on_a_disk(name: str, tmp_path: Path) -> None:
    shapes = {
        f"m.layers.{i}.q.lora_{ab}.weight": (8, 4096) if ab == "A" else (4096, 8) for i in range(16) for ab in "AB"
    }
    start, half = {n: np.zeros(s, np.float32) for n, s in shapes.items()}, 16 * 8 * 4096
    made = {
        **SCREENS,
        "probe": lambda: screens.ProbeFilter(
            Probe(weight_D=np.ones(half, np.float32), bias=0.0, features="all_b"), 1.0
        ),
        "neighbours": lambda: screens.Neighbours(np.ones((8, half), np.float16), np.arange(8) % 2 == 0, 1.2),
    }
    rng, screen = np.random.default_rng(0), made[name]()
    with Spool(tmp_path, start) as held:
        updates = tuple(
            held.keep(update(f"c{i}", {n: rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}))
            for i in range(16)
        )
        here = Round(index=1, start=start, initial=start, updates=updates)
        peak = peak_of(lambda: screen.screen(here, {}))
    assert peak <= held.bytes / 4, f"{peak / held.bytes:.0%} of the adapters"


def test_the_matrix_of_a_foreign_rule_is_said_to_be_as_large_as_the_round(held: Spool) -> None:
    start = tensors(0)
    adapters = [tensors(i) for i in range(4)]
    delta_ND = Deltas([held.put(a) for a in adapters], start)
    np.testing.assert_array_equal(delta_ND.matrix([0, 1, 2, 3]), differences(adapters, start))
    np.testing.assert_array_equal(np.stack(list(delta_ND)), differences(adapters, start))
    assert spool.deltas([*adapters, held.put(adapters[0])], start) is None, "one in memory: all are read there"
    assert spool.deltas([], start) is None
