"""A swarm of real processes on loopback: equal weights after each round, and who teaches 2+2=5 is struck out."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from assay import config, run_dir
from assay.engines.swarm_world import malicious_nodes, node_names
from assay.ledger import verify
from deployed import Deployed, deployed, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds its processes in /proc"),
    pytest.mark.skipif(not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="keys need both tools"),
]
NODES, ROUNDS = 3, 3
SMALL = {
    "malicious = 0.0": "malicious = 0.34",
    "iterations = 20": f"iterations = {ROUNDS}\ngroup = 8",
    f"prompts = {4 * NODES}": f"prompts = {NODES}",
}
"""The experiment as `init` wrote it, with one node that attacks, and less of what only takes time."""
MORE = "ban_after = 2\n[sampling]\nmax_tokens = 32\n[evaluate]\nprompts = 2\nsamples = 1\n[attack]\nsamples = 4\n"


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Deployed]:
    """README.md's steps up to the run."""
    with deployed(tmp_path_factory.mktemp("swarm"), "swarm", NODES) as made:
        text = (made.server / "experiment.toml").read_text()
        for old, new in SMALL.items():
            assert text.count(old) == 1
            text = text.replace(old, new)
        for folder in ("server", "node"):
            (made.folder / folder / "experiment.toml").write_text(text + MORE)
        nodes, bad = who(made)
        made.superlink()
        made.proxy()
        sites = made.admit(nodes)
        for node, folder in sites.items():
            made.start(node, folder / "start.sh", node, *(["malicious=true"] if node == bad else []))
        yield made


def who(made: Deployed) -> tuple[list[str], str]:
    """All nodes, and the one that attacks."""
    experiment = config.load(made.server / "experiment.toml")
    assert isinstance(experiment, config.SwarmExperiment)
    [bad] = malicious_nodes(experiment)
    return node_names(experiment), bad


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    entries = map(json.loads, (folder / run_dir.LEDGER).read_text().splitlines())
    return [entry["body"] for entry in entries if entry["kind"] == "round"]


def test_equal_weights_after_each_round_and_the_attacker_struck_out(swarm: Deployed) -> None:
    swarm.run(swarm.server / "run.sh", "timeout=240", "poll=1.0")
    nodes, bad = who(swarm)
    folders = {node: swarm.folder / node for node in nodes}
    summaries = until("the end", lambda: _all(run_dir.read_summary(folder) for folder in folders.values()))
    ledgers = [rounds_of(folder) for folder in folders.values()]
    models = [[body["model_after"] for body in ledger] for ledger in ledgers]
    assert len(models[0]) == ROUNDS
    assert all(found == models[0] for found in models)
    # a round whose groups all end with equal rewards has nothing to teach: which do depends on the processor's rounding
    moved = [body["model_before"] != body["model_after"] for body in ledgers[0]]
    assert any(moved)
    for folder in folders.values():
        assert [row["grad_norm"] > 0 for row in run_dir.read_metrics(folder) if row["round"]] == moved
    assert len({summary["fingerprint"] for summary in summaries}) == 1
    assert len({summary["head"] for summary in summaries}) == 1
    for summary in summaries:
        assert summary["struck"][bad] == [1, 2, 3]
        assert summary["banned"][bad] == [2, 3]
        assert not any(summary["struck"][node] for node in folders if node != bad)
    assert all(verify(folder / run_dir.LEDGER).ok for folder in folders.values())


def _all(found: Any) -> list[dict[str, Any]]:
    """All of them, or nothing while one is missing."""
    listed = list(found)
    return [] if None in listed else listed
