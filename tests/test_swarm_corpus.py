"""Hostile messages in a swarm's pool: always the expected reason, and the honest ones of the round unharmed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from assay.bench.swarm_corpus import HOSTILE, Theatre, experiment
from assay.bench.swarm_hostile import CORPUS, DRAWN, IDENTITY
from assay.bench.swarm_messages import Hostile, honest
from assay.bench.swarm_plain import Plain

RESULTS = Path(__file__).parents[1] / "results" / "swarm-corpus.json"
READ = [case for case in CORPUS if case not in DRAWN]
SOME = [case for case in DRAWN if case.name in ("too-few", "end-missing", "token-edited", "seeds-own")]
"""Each costs a round of learning; all of them are in the results."""


@pytest.fixture(scope="module")
def theatre() -> Theatre:
    return Theatre()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_what_is_wrong_with_the_bytes_is_refused_before_the_screens(theatre: Theatre, case: Hostile) -> None:
    found = theatre.hear({HOSTILE: case.make(theatre.stage)}).gathered(theatre.rules)
    assert found.completions == theatre.hear({}).gathered(theatre.rules).completions
    [refusal] = found.refused
    assert (refusal.participant, refusal.reason) == (HOSTILE, case.reason)
    assert refusal.proven is (case not in IDENTITY)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_what_is_wrong_with_the_completions_is_refused_by_the_screens(theatre: Theatre, case: Hostile) -> None:
    seen = theatre.judge(case)
    assert (seen.outcome, seen.reason) == ("survived", case.reason), seen
    assert seen.strike


@pytest.mark.usefixtures("one_thread")
def test_a_node_without_checks_crashes_or_learns(theatre: Theatre) -> None:
    """The contrast tells the corpus apart from noise: what is refused here does something where nobody looks."""
    plain = Plain(experiment(), theatre.hear({}).gathered(theatre.rules).completions)
    cases = {case.name: case for case in CORPUS}
    assert plain.judge(cases["garbage"], theatre.stage)[0] == "crashed"
    assert plain.judge(cases["signature-zero"], theatre.stage) == ("learnt unaltered", "")
    assert plain.judge(cases["token-edited"], theatre.stage) == ("learnt", "")
    assert plain.judge(cases["entries-none"], theatre.stage) == ("nothing in it", "")


def test_an_honest_message_is_learnt_from(theatre: Theatre) -> None:
    seen = theatre.judge(Hostile("honest", "as it should be", honest, "ok"))
    assert (seen.outcome, seen.reason, seen.weights, seen.strike) == ("harmed", "ok", "other", False), (
        "it has an effect"
    )


def test_the_table_of_the_docs_is_of_this_corpus() -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    assert [(r["name"], r["what"], r["expected"]) for r in rows] == [(c.name, c.what, c.reason) for c in CORPUS]
    assert all(r["assay"] == "survived" and r["reason"] == r["expected"] for r in rows)
    assert len({c.name for c in CORPUS}) == len(CORPUS) >= 40
