"""The federated apps on Flower's own simulation, in real processes: as `local`, also when the server is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from assay import checkpoint, run_dir

pytestmark = pytest.mark.slow
TOML = """
name = "small"
workers = 2
[model]
name = "tiny"
dtype = "float32"
[clients]
total = 4
malicious = 0.5
examples = 16
[training]
rounds = 3
steps = 2
lr = 1e-2
[attack]
name = "remove_probe+sybil"
params = { remove_probe = { probe = "surrogate" } }
[defence.rehearsal]
rounds = 1
examples = 16
[defence.canary]
refusals = 8
safe = 4
floor = 0.2
anchor_floor = 0.3
safe_floor = 0.2
safe_anchor_floor = 0.3
[evaluate]
every = 3
harmful_prompts = 2
benign_prompts = 2
benign_rows = 4
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    path = tmp_path_factory.mktemp("toml") / "small.toml"
    path.write_text(TOML)
    return path


def start(file: Path, out: Path, engine: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "assay", "run", str(file), "--out", str(out), "--engine", engine, "--json"]
    # a group of its own: Ray's processes go with it
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    stdout, stderr = process.communicate(timeout=540)
    assert process.returncode == 0, stderr[-3000:]
    found: dict[str, Any] = json.loads(stdout)
    return found


@pytest.fixture(scope="module")
def unbroken(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on the `local` engine."""
    out = tmp_path_factory.mktemp("local") / "run"
    finish(start(file, out, "local"))
    return out


def test_the_same_run_as_local(file: Path, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = finish(start(file, out, "flower"))
    assert (out / run_dir.LEDGER).read_bytes() == (unbroken / run_dir.LEDGER).read_bytes()
    theirs = run_dir.read_summary(unbroken)
    assert theirs is not None
    assert summary["metrics"] == theirs["metrics"]
    assert (out / run_dir.REPORT).exists()


def test_a_server_that_was_killed_loses_no_round_and_plays_none_twice(
    file: Path, unbroken: Path, tmp_path: Path
) -> None:
    """SIGKILL as soon as a round is whole, then again in the next one."""
    out = tmp_path / "run"
    for round in (1, 2):
        process, until = start(file, out, "flower"), time.monotonic() + 400
        while not (out / run_dir.CHECKPOINTS / f"{round:06d}.safetensors").exists():
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < until
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found = checkpoint.load_latest(out / run_dir.CHECKPOINTS)
        assert found is not None
        assert found.step < 3, "the run was over before it could be killed"
    finish(start(file, out, "flower"))
    assert (out / run_dir.LEDGER).read_bytes() == (unbroken / run_dir.LEDGER).read_bytes()
    assert [row["round"] for row in run_dir.read_metrics(out)] == [0, 1, 2, 3]
