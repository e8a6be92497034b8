"""The soak, small: memory that grows neither with rounds nor, beyond the stated bound, with clients; resumed; told."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from assay import contribution, ledger, run_dir
from assay.bench import soak, tables
from assay.bench.soak_clients import adapter
from assay.config import ConfigError
from assay.contribution import flatten
from assay.federated import screens
from assay.federated.aggregators import common
from assay.spool import SpoolError

SMALL = soak.Settings(clients=20, rounds=3, values=1_000, malicious=0.25)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Python's own allocations, which are the same everywhere; blocks and panels as small as the adapters are."""
    for module in (contribution, common, screens):
        monkeypatch.setattr(module, "BLOCK_VALUES", 2**12)
    monkeypatch.setattr(contribution, "PANEL_VALUES", 2**15)
    tracemalloc.start()
    yield
    tracemalloc.stop()


def peaks(settings: soak.Settings, directory: Path) -> list[int]:
    """Bytes of each round beyond those held before the soak."""
    before = tracemalloc.get_traced_memory()[0]
    return [row["peak_bytes"] - before for row in soak.soak(settings, directory)]


@pytest.mark.usefixtures("counted")
def test_memory_grows_neither_with_rounds_nor_with_clients_beyond_the_bound(tmp_path: Path) -> None:
    few, many = (
        soak.Settings(clients=n, rounds=r, values=40_000, malicious=0.25, screens=("structure", "norm"))
        for n, r in ((8, 5), (32, 1))
    )
    values = flatten(adapter(few.values)).size
    peaks(soak.Settings(clients=8, rounds=1, values=1_000), tmp_path / "warm")  # imports and caches are nobody's memory
    some, more = peaks(few, tmp_path / "some"), peaks(many, tmp_path / "more")
    # from the third round on there is everything a round leaves behind: a model, an older one, verdicts, a checkpoint
    # (Python keeps freed tuples and floats for the next ones: tens of kilobytes in the end, whatever the run)
    assert max(some[3:]) <= some[2] + 40_000, some
    assert max(some) <= soak.bound(8, values)
    assert max(more) <= soak.bound(32, values)
    # 24 clients more cost verdicts and ledger lines, a fifth of their adapters here; 3.4M values would be 13.6 MB each
    assert max(more) - some[0] <= 24 * 32_000


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("aggregator", ["median", "geometric_median"])
def test_the_bound_holds_for_rules_that_compare_pairs(aggregator: str, tmp_path: Path) -> None:
    settings = soak.Settings(
        clients=24, rounds=1, values=4_000, aggregator=aggregator, screens=("structure", "norm", "duplicate")
    )
    peaks(soak.Settings(clients=8, rounds=1, values=1_000, aggregator=aggregator), tmp_path / "warm")
    assert max(peaks(settings, tmp_path / "run")) <= soak.bound(24, 4_000)


def test_every_kind_of_malicious_client_is_refused_for_what_it_did(tmp_path: Path) -> None:
    found = soak.run(SMALL, tmp_path, None, "assay bench soak", print)
    for row in found["rows"]:
        noticed = row["noticed"]
        assert noticed["malicious"] == noticed["refused_rightly"] == 5
        assert noticed["honest_weight_mean"] == 1
        assert {"missing", "norm", "not_finite", "structure"} < set(noticed["reasons"])
        assert row["outcome"] == "applied"


def test_a_soak_goes_on_where_it_stopped_and_ends_the_same(tmp_path: Path) -> None:
    path = tmp_path / "results" / "soak.json"
    whole = soak.run(SMALL, tmp_path / "whole", None, "x", print)
    first = soak.Settings(clients=20, rounds=2, values=1_000, malicious=0.25)
    playing = soak.soak(first, tmp_path / "broken")
    next(playing)
    playing.close()  # one round, and its row is told to nobody: as if the process had ended there
    told = soak.run(SMALL, tmp_path / "broken", path, "assay bench soak", print)
    assert [row["round"] for row in told["rows"]] == [2, 3]
    ends = [tmp_path / name / run_dir.LEDGER for name in ("whole", "broken")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    assert ledger.verify(ends[1]).entries == 5
    assert len(whole["rows"]) == 3
    assert json.loads(path.read_text()) == json.loads(json.dumps(told))
    with pytest.raises(ConfigError, match="holds another experiment"):
        soak.run(soak.Settings(clients=25, rounds=3, values=1_000), tmp_path / "broken", None, "x", print)
    table = tables.table(told)
    assert f"20 clients, {told['settings']['values']:,} values each, 2 of 3 rounds measured" in table
    assert table.count("\n| ") == 3
    assert "5 of 5" in table


def test_what_a_soak_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of a soak's"):
        soak.Settings(screens=("canary",))
    with pytest.raises(ConfigError, match="at least 1"):
        soak.Settings(rounds=0)
    with pytest.raises(SpoolError, match="GB of disk"):
        soak.run(soak.Settings(clients=10**9, rounds=1, values=10_000), tmp_path, None, "x", print)
