"""The page of a swarm that was really run: rows, summary and ledger are what the loader expects."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from assay.config import SwarmExperiment
from assay.engines import local_swarm
from assay.report import write
from test_report import Page


def test_page_of_a_real_swarm(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    experiment = SwarmExperiment().changed(
        name="swarm.seeded", swarm__prompts=4, swarm__group=8, swarm__iterations=3, swarm__assigned=False,
        evaluate__prompts=4, evaluate__samples=1, evaluate__every=2, attack__name="math", defence__level="seeded",
    )  # fmt: skip
    try:
        summary = local_swarm.run_swarm(experiment, tmp_path / "swarm.seeded", command="assay run")
    finally:
        torch.set_num_threads(threads)
    page = Page(write([tmp_path / "swarm.seeded"], tmp_path / "report.html"))
    assert "1 of 4 nodes was malicious." in page.text
    assert f"{summary['ledger']['entries']} entries, chain holds" in page.text
    for warning in ("disagree", "broken", "torn", "there is no ledger"):
        assert warning not in page.text
    (row,) = (row for row in page.rows if len(row) == 10 and row[0] == "seeded")
    assert row[1:3] == ["math", "seeded"]
    assert row[8] == f"{summary['detection']['seeded']['auroc']:.3f} seeded"
    (bad,) = (name for name, role in summary["participants"].items() if role == "malicious")
    (struck,) = (row for row in page.rows if row[0] == bad)
    assert struck[3:] == ["1–3", "3"]
    (grid,) = page.data["swarm"]["grids"]
    assert grid["rounds"] == [1, 2, 3]
    honest, malicious = page.data["swarm"]["margins"]["series"]
    assert sum(honest["counts"]) == 3 * 24
    assert sum(malicious["counts"]) == 3 * 8
    assert len(re.findall(r'<mark title="gap [0-9.]+">', page.source)) >= 1
    assert {key for chart in page.data["swarm"]["charts"] for key in [chart["key"]]} == {"asr", "reward"}
