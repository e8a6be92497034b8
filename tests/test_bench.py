from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from assay.bench import tables
from assay.bench.federated import ALL_LEVELS, suite, variants
from assay.config import Experiment

ROOT = Path(__file__).parents[1]


def test_variants_differ_from_the_base_in_one_thing_each() -> None:
    base = Experiment()
    runs = {e.name: e for e in variants(base, ALL_LEVELS)}
    assert list(runs) == [
        f"federated.{n}" for n in ("honest_only", "undefended", "submitted", "step", "client", "shadow")
    ]
    for name, run in runs.items():
        changed = {k for k, v in run.model_dump().items() if v != base.model_dump()[k]} - {"name"}
        assert changed <= {"clients", "defence"}, name
    assert [e.seed for e in suite(base, ["step"], [3, 4])] == [3, 3, 3, 4, 4, 4]


def fake(rows: list[dict[str, object]]) -> dict[str, object]:
    return {
        "command": "assay bench", "commit": "abc", "versions": {"torch": "2", "transformers": "5"}, "rows": rows,
        "machine": {"cpu": "X", "cores": 2}, "model": {"name": "m", "dtype": "float32"},
    }  # fmt: skip


def row(seed: int, refusal: float | None, defence: str = "step", attack: str = "harmful_data") -> dict[str, object]:
    metrics = {k: refusal if k == "refusal_rate" else None for k in tables.COLUMNS.values()}
    return {
        "attack": attack, "defence": defence, "share": 0.5, "seed": seed, "aggregator": "mean", **metrics,
        "seconds": {"total": 10.0 * (seed + 1)},
    }  # fmt: skip


def test_table_groups_seeds_and_shows_their_spread() -> None:
    text = tables.table(fake([row(0, 0.9), row(1, 1.0), row(0, 0.5, "none", "none")]))  # type: ignore[arg-type]
    assert "| `step`, 50% malicious | 0.950 (0.900–1.000) | – |" in text
    assert "| 15 (10–20) |" in text
    assert "| honest only | 0.500 |" in text
    assert "seeds 0, 1" in text


def test_only_marked_sections_change(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(fake([row(0, 0.25)])))
    text = "before\n<!-- results:x -->\nold\n<!-- /results:x -->\nkeep\n<!-- results:y -->\nz\n<!-- /results:y -->\n"
    filled = tables.fill(text, tmp_path)
    assert filled.startswith("before\n<!-- results:x -->\n| run |")
    assert "old" not in filled
    assert filled.endswith("keep\n<!-- results:y -->\nz\n<!-- /results:y -->\n")
    assert tables.fill(filled, tmp_path) == filled


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_tables_in_the_docs_agree_with_the_results(path: Path) -> None:
    text = path.read_text()
    assert tables.fill(text, ROOT / "results") == text, "run python -m assay.bench.tables"


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda p: p.name)
def test_results_say_how_they_were_made(path: Path) -> None:
    found = json.loads(path.read_text())
    assert found["command"].startswith("assay bench")
    assert re.fullmatch(r"[0-9a-f]{12}", found["commit"])
    assert {"torch", "transformers", "peft", "assay"} <= set(found["versions"])
    for r in found["rows"]:
        assert {"attack", "defence", "share", "seed", *tables.COLUMNS.values()} <= set(r)
    assert "/" not in found["experiment"]["model"]["name"]
