"""What the speed bench compares is the same computation: restated rules agree with Assay's, peers where they are installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from assay.bench import speed, table_corpora
from assay.bench.restated import rules

SMALL = speed.Settings(clients=12, values=4_000, f=2, repeats=1)


def test_restated_rules_are_the_rules() -> None:
    delta_ND, layers = speed.matrix(SMALL)
    mine, ones_N = speed.ours(SMALL, layers), np.ones(len(delta_ND))
    scale = float(np.abs(delta_ND).max())
    for name, theirs in rules(SMALL.f, layers).items():
        got_D, want_D = mine[name](delta_ND, ones_N), theirs(torch.from_numpy(delta_ND.copy())).numpy()
        if name == "median":  # torch's is the lower of the two middle values
            want_D = np.sort(delta_ND, axis=0)[len(delta_ND) // 2 - 1 : len(delta_ND) // 2 + 1].mean(axis=0)
        if name == "foolsgold":  # in one round its weights are near 0 or 1; sums in float32
            np.testing.assert_allclose(got_D, want_D, atol=1e-4 * scale)
            continue
        np.testing.assert_allclose(got_D, want_D, atol=1e-5 * scale, err_msg=name)


def test_every_rule_is_measured_and_stands_in_the_table() -> None:
    rows = speed.measure(SMALL, lambda text: None)
    by = {(row["rule"], row["by"]): row for row in rows}
    assert {rule for rule, who in by if who == "assay"} == set(speed.ours(SMALL, [1]))
    assert all(row["seconds"] > 0 and row["reads"] > 0 and row["memory_bytes"] >= 0 for row in rows)
    assert {who for _, who in by} >= {"assay", "restated"}
    text = table_corpora.speed(speed.results("assay bench aggregators", SMALL, rows))
    assert all(f"| `{rule}` |" in text for rule, who in by if who == "assay")


def test_peers_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    delta_ND, layers = speed.matrix(SMALL)
    mine, ones_N = speed.ours(SMALL, layers), np.ones(len(delta_ND))
    made = speed.calls(SMALL, delta_ND, layers)
    scale = float(np.abs(delta_ND).max())
    peers = [
        (rule, who) for rule, who in made if who in ("byzfl", "flower") and rule in ("mean", "median", "trimmed_mean")
    ]
    assert peers
    for rule, who in peers:
        found = made[rule, who]()
        found_D = np.asarray(found[0] if isinstance(found, list) else found)
        np.testing.assert_allclose(mine[rule](delta_ND, ones_N), found_D, atol=1e-5 * scale, err_msg=f"{rule} of {who}")
