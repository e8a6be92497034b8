"""Nothing lost: SIGKILL at 75 random moments of tiny runs (both wings, and the federated one on Flower's messages, where
server and nodes die together), each resumed until it ends as the unbroken run did.

A moment is drawn over the whole life of an attempt, from its start-up to its summary: half of them over its seconds,
half over everything that happens to a file of the run (checkpoints, ledger, metrics, updates, summary: milliseconds in
which a kill does most harm). A run that ends before its kill is compared, and another one is begun.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from assay import ledger, run_dir

pytestmark = pytest.mark.slow

FEDERATED = """
name = "killed"
[model]
name = "tiny"
dtype = "float32"
[clients]
total = 4
malicious = 0.25
examples = 8
[attack]
name = "harmful_data"
[training]
rounds = 3
steps = 1
batch_size = 4
lr = 1e-2
[defence]
screens = ["structure", "norm", "client", "duplicate"]
[defence.params.norm]
reference = "round"
[aggregation]
name = "foolsgold"
[server]
opt = "fedadam"
lr = 1e-2
[evaluate]
every = 2
harmful_prompts = 4
benign_prompts = 4
benign_rows = 4
"""
SWARM = """
name = "killed"
wing = "swarm"
[swarm]
nodes = 2
malicious = 0.5
prompts = 2
group = 4
iterations = 3
[attack]
name = "copy"
[evaluate]
prompts = 2
samples = 1
every = 2
"""
KILLS = 25


class Runner:
    """killed_runs.py with one config."""

    def __init__(self, config: Path, flower: bool) -> None:
        self.flower = flower
        script = Path(__file__).with_name("killed_runs.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def __call__(self, directory: Path, **kill: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"directory": str(directory), "flower": self.flower, **kill}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert answer["code"] in (0, -9), "an attempt failed by itself; its traceback stands above"
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(params=[("federated", FEDERATED), ("swarm", SWARM), ("flower", FEDERATED)], ids=lambda p: p[0])
def runner(request: pytest.FixtureRequest, tmp_path: Path, cache: Path) -> Iterator[Runner]:
    config = tmp_path / "killed.toml"
    config.write_text(request.param[1])
    made = Runner(config, request.param[0] == "flower")
    yield made
    made.close()


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a run that must not depend on how often it was killed."""
    # seconds stand in these three; they are compared by what else they say
    timed = (run_dir.METRICS, run_dir.SUMMARY, ".lock")
    checkpoints = {p: b"" for p in directory.rglob("*") if run_dir.CHECKPOINTS in p.parts and p.is_file()}
    found = {
        p: b"" if p.name in timed else p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file()
        if p not in checkpoints
    }
    return {str(p.relative_to(directory)): raw for p, raw in {**checkpoints, **found}.items()}


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("seconds", "finished", "commit")}


def assert_as_unbroken(broken: Path, whole: Path) -> None:
    ours, theirs = run_dir.read_summary(broken), run_dir.read_summary(whole)
    assert ours is not None
    assert theirs is not None
    # byte for byte: the same rounds in the same order, each once, and the same hash of the model after each
    assert (broken / run_dir.LEDGER).read_bytes() == (whole / run_dir.LEDGER).read_bytes()
    found = ledger.verify(broken / run_dir.LEDGER, ours["ledger"]["head"])
    assert found.ok, found.problem
    rows, others = run_dir.read_metrics(broken), run_dir.read_metrics(whole)
    assert [r["round"] for r in rows] == list(range(4)), "no round twice, none missing"
    assert [without_seconds(r) for r in rows] == [without_seconds(r) for r in others]
    assert without_seconds(ours) == without_seconds(theirs)
    # killed between its last checkpoint and the removal of the oldest, a run keeps one checkpoint more
    spare = {f"{run_dir.CHECKPOINTS}/000001.safetensors": b""}
    assert contents(broken) in (contents(whole), contents(whole) | spare), "and no half of a file is left"


def test_killed_at_random_moments_every_run_ends_as_the_unbroken_one(runner: Runner, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    runner(tmp_path / "first")  # fills the caches; the unbroken run finds them as the broken ones do
    unbroken = runner(whole)
    assert unbroken["code"] == 0
    rng, kills, life, seen = random.Random(0), 0, 0, set[str]()
    broken = tmp_path / "broken-0"
    while kills < KILLS:
        by_event = kills % 2 == 0
        kill = (
            {"event": rng.randint(1, unbroken["events"])}
            if by_event
            else {"after": rng.uniform(0, unbroken["seconds"])}
        )
        if runner(broken, **kill)["code"] == 0:
            assert_as_unbroken(broken, whole)
            life += 1
            broken = tmp_path / f"broken-{life}"
        else:
            kills += 1
            entries = (
                len((broken / run_dir.LEDGER).read_bytes().splitlines()) if (broken / run_dir.LEDGER).exists() else 0
            )
            seen.add(f"{entries} entries, summary: {(broken / run_dir.SUMMARY).exists()}")
    assert runner(broken)["code"] == 0
    assert_as_unbroken(broken, whole)
    assert len(seen) >= 4, "kills that all fall into one place show nothing"
    done = subprocess.run(
        [sys.executable, "-m", "assay", "ledger", "verify", str(broken)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
