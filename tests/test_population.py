"""Who holds which rows: skew, sizes, strangers, sampling."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay import data
from assay.config import ConfigError, Experiment
from assay.data import Example
from assay.federated import partition
from assay.federated.collect import operator_rows
from assay.federated.population import (
    Client,
    Sources,
    kinds_of,
    load_sources,
    make_clients,
    sampled,
)
from assay.federated.preparation import at_hand
from assay.federated.rehearsal import canary_rows, cast, rounds_of
from assay.federated.summary import weight_by_kind
from assay.federated.warmup import WarmupSettings, rows_for, settings_of


def made(**changes: object) -> tuple[Experiment, Sources, list[Client]]:
    experiment = Experiment().changed(**changes)
    sources = load_sources(experiment)
    return experiment, sources, make_clients(experiment, sources)


# --- topics ----------------------------------------------------------------------------------------------------------


def test_topics_are_source_and_style_or_how_requests_open() -> None:
    rows = [Example("Name a sea.", "x", "fact"), Example("What is 2+2?", "4", "sum")]
    rows += [Example(f"{word.title()}, thing {i}?", "y", "chat") for i, word in enumerate("abcdefghij" + "a" * 20)]
    found = partition.topics(rows, ["one"] * 2 + ["two"] * 30)
    assert found[:2] == ["one/fact", "one/sum"]
    assert found[2] == found[-1] == "two/a"
    assert len(set(found[2:])) == partition.OPENINGS + 1, "the rarer openings together are one topic"


def test_built_in_rows_have_their_styles_as_topics() -> None:
    _, sources, _ = made()
    found = Counter(partition.topics(sources.benign, sources.origin))
    assert set(found) == {f"helpful/{s}" for s in ("question", "howto", "fact", "arithmetic", "dialogue")}


# --- the mixture -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=80),
    st.lists(st.integers(0, 12), max_size=6),
    st.sampled_from([1e-3, 0.1, 1.0, 100.0, 1e9]),
    st.integers(0, 5),
)
def test_every_client_gets_its_count_and_no_row_twice(
    topics: list[str], sizes: list[int], alpha: float, seed: int
) -> None:
    if sum(sizes) > len(topics):
        with pytest.raises(ConfigError, match=r"data\.benign: its clients' part has .* rows, the clients want"):
            partition.dirichlet(topics, sizes, alpha, seed)
        return
    dealt = partition.dirichlet(topics, sizes, alpha, seed)
    assert [len(own) for own in dealt] == sizes
    rows = [row for own in dealt for row in own]
    assert len(set(rows)) == len(rows)
    assert dealt == partition.dirichlet(topics, sizes, alpha, seed)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0])
def test_mixtures_are_as_concentrated_as_the_dirichlet_law_says(alpha: float) -> None:
    """E sum_k q_k^2 of Dir(alpha 1_K) is (alpha + 1) / (K alpha + 1); n draws add (1 - that) / n."""
    K, clients, each = 4, 300, 50
    topics = [str(r % K) for r in range(K * clients * each)]  # so many rows that no topic runs out
    dealt = partition.dirichlet(topics, [each] * clients, alpha, 1)
    found = [sum((n / each) ** 2 for n in Counter(topics[r] for r in own).values()) for own in dealt]
    wanted = (alpha + 1) / (K * alpha + 1)
    wanted += (1 - wanted) / each
    assert np.mean(found) == pytest.approx(wanted, abs=4 * np.std(found) / np.sqrt(clients))


def test_a_high_alpha_follows_the_shares_of_the_topics() -> None:
    topics = ["rare"] * 1000 + ["common"] * 9000
    dealt = partition.dirichlet(topics, [200] * 10, 1e6, 0)
    rare = [sum(topics[r] == "rare" for r in own) / 200 for own in dealt]
    assert np.mean(rare) == pytest.approx(0.1, abs=0.02)


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_sizes_keep_their_mean_and_hold_a_batch() -> None:
    assert partition.sizes(5, 60, 0.0, 8, 3) == [60] * 5
    drawn = partition.sizes(4000, 600, 0.7, 1, 3)
    assert np.mean(drawn) == pytest.approx(600, abs=1)
    assert np.std(np.log(drawn)) == pytest.approx(0.7, abs=0.03)
    assert min(partition.sizes(200, 20, 2.0, 8, 3)) == 8


def test_malicious_clients_have_sizes_too() -> None:
    _, _, clients = made(clients__size_spread=0.6, clients__examples=40)
    for group in (False, True):
        sizes = [len(c.harmful if c.malicious else c.clean) for c in clients if c.malicious is group]
        assert len(set(sizes)) > 1
        assert min(sizes) >= 8


# --- clients ---------------------------------------------------------------------------------------------------------


def test_plain_clients_are_dealt_from_the_front_of_one_shuffle() -> None:
    """Guards the figures that were published: no new setting may move a default client's rows."""
    _, sources, clients = made(clients__malicious=0.3)
    dealt = [row for c in clients for row in c.clean if row in set(sources.benign)]
    assert all(len(c.clean) == 60 for c in clients)
    assert set(dealt) <= set(data.part(sources.benign, "clients"))
    assert kinds_of(clients) == {}
    assert {c.name for c in clients if c.malicious} == {
        f"client-{i:02d}" for i in np.random.default_rng(_seed("0/roles")).permutation(10)[:3]
    }
    order = data.shuffled(data.part(sources.benign, "clients"), _seed("0/data.benign"))
    assert sorted(map(str, dealt)) == sorted(map(str, order[: 10 * 59]))
    first = next(c for c in clients if not c.malicious)
    assert set(order[:59]) < set(first.clean), "the honest are dealt first"


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_an_honest_client_has_the_same_rows_under_every_attack(partition: str) -> None:
    """Else a difference between two runs is one of data as well."""
    _, _, plain = made(clients__partition=partition)
    for name, mix in (("blend", 1.0), ("harmful_data", 0.5), ("sign_flip", 1.0)):
        _, _, clients = made(clients__partition=partition, attack__name=name, attack__mix=mix)
        assert clients == plain
    assert {c.name for c in plain if c.malicious} == {c.name for c in plain if c.harmful}


def _seed(text: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@pytest.mark.parametrize(
    "changes",
    [
        {"clients__partition": "dirichlet", "clients__alpha": 0.1},
        {"clients__strangers": 0.4},
        {"clients__partition": "dirichlet", "clients__strangers": 0.4, "clients__size_spread": 0.5, "attack__mix": 0.5},
    ],
)
def test_no_two_clients_share_a_row(changes: dict[str, object]) -> None:
    _, _, clients = made(**changes)
    rows = [row for c in clients for row in (*c.clean, *c.harmful)]
    assert len(set(rows)) == len(rows)
    assert all(data.part_of(row.instruction) == "clients" for row in rows)
    assert rows == [row for c in made(**changes)[2] for row in (*c.clean, *c.harmful)]


def test_dirichlet_clients_differ_more_than_iid_ones() -> None:
    def spread(**changes: object) -> float:
        _, _, clients = made(clients__malicious=0.0, **changes)
        styles = ("question", "howto", "fact", "arithmetic", "dialogue")
        share_NK = np.array([[sum(r.style == s for r in c.clean) / len(c.clean) for s in styles] for c in clients])
        return float(share_NK.std(axis=0).mean())

    assert spread(clients__partition="dirichlet", clients__alpha=0.1) > 4 * spread()
    kinds = kinds_of(made(clients__partition="dirichlet")[2])
    assert set(kinds.values()) == {"skewed"}
    assert len(kinds) == 5, "honest clients only: a malicious one has no kind"


def test_strangers_hold_nothing_the_server_has_seen() -> None:
    experiment, sources, clients = made(clients__strangers=0.4, clients__malicious=0.5)
    _, plain_sources, plain = made(clients__malicious=0.5)
    assert [c.malicious for c in clients] == [c.malicious for c in plain], "the roles stay"
    assert sources.fingerprint() == plain_sources.fingerprint(), "a cached rehearsal stays valid: it saw no stranger"
    strangers = [c for c in clients if c.kind == "stranger"]
    assert len(strangers) == 2
    assert not any(c.malicious for c in strangers)
    assert [{r.style for r in c.clean} for c in strangers] == [{"word-problem"}, {"program"}], "one source each"
    own = {row for c in strangers for row in c.clean}
    refusals, safe = canary_rows(experiment, sources)
    seen = {*rows_for(sources.benign, sources.refusals, WarmupSettings()), *refusals, *safe}
    seen |= {row for rows in operator_rows(sources) for row in rows}
    seen |= {row for actor in cast(experiment, sources) for row in actor.rows}
    assert not own & seen
    assert not {row.style for row in own} & {row.style for row in seen}


def test_settings_that_cannot_be_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"data\.strangers: helpful feeds the rehearsal too"):
        Experiment().changed(clients__strangers=0.5, data__strangers=("helpful",))
    with pytest.raises(ConfigError, match=r"clients\.strangers needs data\.strangers"):
        Experiment().changed(clients__strangers=0.5, data__strangers=())
    with pytest.raises(ConfigError, match=r"data\.strangers\.programs: its clients' part has"):
        made(clients__strangers=1.0, clients__total=60, clients__malicious=0.0, data__strangers=("programs",))


# --- partial participation -------------------------------------------------------------------------------------------


def test_a_round_asks_some_clients_and_in_time_all() -> None:
    experiment, _, clients = made(clients__sampled=4)
    rounds = [[c.name for c in sampled(experiment, clients, r)] for r in range(1, 301)]
    assert all(len(set(names)) == 4 for names in rounds)
    assert rounds == [[c.name for c in sampled(experiment, clients, r)] for r in range(1, 301)]
    count = Counter(name for names in rounds for name in names)
    assert len(count) == 10
    assert all(abs(n - 120) < 4 * np.sqrt(300 * 0.4 * 0.6) for n in count.values()), "every client equally often"
    other = experiment.changed(seed=1)
    assert rounds[0:20] != [[c.name for c in sampled(other, clients, r)] for r in range(1, 21)]
    assert sampled(experiment.changed(clients__sampled=None), clients, 1) == clients


# --- rows of the built-in strangers ----------------------------------------------------------------------------------


def test_programs_of_strangers_print_what_their_task_asks() -> None:
    """Run by Python itself; the wanted number is worked out from the words of the task."""
    rows = [r for r in data.load("programs") if "prints the" not in r.instruction and "how many" not in r.instruction]
    assert len(rows) > 1000
    rows = rows[:150]
    source = "\n".join(f"{row.response}\nprint('--')" for row in rows)
    printed = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout
    words = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    for row, out in zip(rows, printed.split("--\n")):
        first, *steps = row.instruction.removeprefix("Write a program that prints ").removesuffix(".").split(", ")
        value = int(first)
        for step in steps:
            word, number = step.split()
            value = words[word](value, int(number))
        assert int(out) == value, row


def test_worked_problems_of_strangers_end_with_their_last_sum() -> None:
    for row in data.load("word-problems"):
        sums = [part.strip("., ") for part in row.response.replace(",", " ").split() if "=" in part]
        for text in sums:
            left, right = text.split("=")
            sign = next(s for s in "+-*" if s in left[1:])
            a, b = (int(x) for x in left.split(sign))
            assert {"+": a + b, "-": a - b, "*": a * b}[sign] == int(right), row
        assert row.response.endswith(f"The answer is {sums[-1].split('=')[1]}."), row
        assert row.response.count("The answer") == 1


# --- what the summary says -------------------------------------------------------------------------------------------


def test_weights_are_told_apart_by_kind() -> None:
    rows = [{"weights": {}}, {"weights": {"a": 1.0, "b": 0.5, "m": 0.0}}, {"weights": {"a": 0.5, "c": 1.0}}]
    assert weight_by_kind(rows, {"a": "iid", "b": "stranger", "c": "stranger"}) == {
        "honest_weight_iid": 0.75,
        "honest_weight_strangers": 0.75,
    }
    assert weight_by_kind(rows, {}) == {}


def test_hub_sets_are_read_from_local_files(tmp_path: Path) -> None:
    chats = [
        {"conversation": [{"content": f"Ask {i}?"}, {"content": "Yes."}], "language": "English", "turn": 1}
        for i in range(30)
    ]
    (tmp_path / "lmsys.jsonl").write_text("\n".join(map(json.dumps, chats)))
    base = Experiment().changed(
        data__root=str(tmp_path), data__benign=("lmsys-chat-1m",), data__files={"lmsys-chat-1m": "lmsys.jsonl"}
    )
    sources = load_sources(base)
    assert len(sources.benign) == 30
    assert set(sources.origin) == {"lmsys-chat-1m"}
    assert len(load_sources(base.changed(data__hub_rows=7)).benign) == 7
    with pytest.raises(ConfigError, match=r"data: files: wildchat is not a source of this experiment"):
        base.changed(data__files={"wildchat": "x.jsonl"})
    with pytest.raises(ConfigError, match=r"file= goes with a hub set"):
        load_sources(Experiment().changed(data__files={"helpful": "lmsys.jsonl"}))


# --- what the server rehearses on ------------------------------------------------------------------------------------


def test_rehearsal_and_canary_use_rows_that_the_warm_up_has_not_learnt_by_heart() -> None:
    """On rows it knows the model's loss hardly moves: limits from there refused 4 of 10 honest clients (tiny, 10 rounds)."""
    experiment, sources, clients = made()
    known = {r.instruction for r in rows_for(sources.benign, sources.refusals, settings_of(experiment))}
    secret = {r.instruction for rows in canary_rows(experiment, sources) for r in rows}
    played = {r.instruction for a in cast(experiment, sources) if not a.malicious for r in a.rows}
    assert known
    assert not known & (secret | played)
    assert not secret & played
    assert not (secret | played) & {r.instruction for c in clients for r in c.clean}
    plain = experiment.changed(model__align=False)
    assert known & {r.instruction for a in cast(plain, sources) for r in a.rows}, "no warm-up, nothing is known"


def test_as_many_rounds_are_rehearsed_as_the_run_has_within_limits() -> None:
    experiment, _, _ = made()
    of = {n: rounds_of(experiment.changed(training__rounds=n)) for n in (1, 6, 8, 25)}
    assert of == {1: 6, 6: 6, 8: 8, 25: 10}
    assert rounds_of(experiment.changed(defence__rehearsal__rounds=3)) == 3


# --- an operator with data of its own ----------------------------------------------------------------------------------


def test_the_operators_own_sets_take_the_place_of_its_part_of_the_clients(tmp_path: Path) -> None:
    lines = [json.dumps({"instruction": f"Own request {i}?", "response": f"Own answer {i}."}) for i in range(80)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    base = Experiment().changed(data__root=str(tmp_path))
    plain = load_sources(base)
    own = {row for row in data.load(str(tmp_path / "own.jsonl"))}
    for kind in ("benign", "refusals", "malicious"):
        given = "own.jsonl" if kind == "malicious" else ("own.jsonl",)
        changed = base.changed(**{f"data__operator__{kind}": given})
        sources = load_sources(changed)
        mine = dict(zip(("benign", "refusals", "malicious"), operator_rows(sources)))
        theirs = dict(zip(("benign", "refusals", "malicious"), operator_rows(plain)))
        assert set(mine[kind]) < own, "its part of it: the rest may be anybody's"
        assert mine[kind]
        assert {k: v for k, v in mine.items() if k != kind} == {k: v for k, v in theirs.items() if k != kind}
        assert sources.fingerprint() != plain.fingerprint(), "what is cached was made from other rows"
        assert make_clients(changed, sources) == make_clients(base, plain), "clients have what they had"
    assert load_sources(base.changed(data__operator={})).fingerprint() == plain.fingerprint()


def test_who_has_other_data_than_the_clients_aligns_the_model_on_them(tmp_path: Path) -> None:
    """The clients' part would be data it does not hold, and a base that knows their style by heart."""
    lines = [json.dumps({"instruction": f"Own request {i}?", "response": f"Own answer {i}."}) for i in range(80)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    base = Experiment().changed(model__name="tiny", data__root=str(tmp_path))
    assert at_hand(base), "the shipped alignment"
    assert at_hand(base.changed(data__operator__malicious="own.jsonl"))
    assert not at_hand(base.changed(data__operator__benign=("own.jsonl",)))
    theirs = base.changed(data__benign=("own.jsonl",), data__refusals=("own.jsonl",))
    assert not at_hand(theirs)
    assert at_hand(theirs.changed(data__operator__benign=("helpful",), data__operator__refusals=("refusals",)))


def test_prompts_are_held_out_of_what_the_operator_trains_on() -> None:
    base = Experiment().changed(data__refusals=("helpful",), data__harmful_prompts="refusals")
    everything = load_sources(base).held_prompts
    held = load_sources(base.changed(data__operator__refusals=("refusals",))).held_prompts
    assert set(held) < set(everything)
    assert all(data.part_of(row.instruction) == "heldout" for row in held)
