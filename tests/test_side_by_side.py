"""Swarms side by side, each in a process of its own: the same figures as one after the other, and no mistake lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from assay import run_dir
from assay.config import ConfigError, SwarmExperiment
from assay.engines import local_swarm
from assay.engines.side_by_side import run_swarms
from assay.progress import Silent


def small(name: str, **changes: Any) -> SwarmExperiment:
    values: dict[str, Any] = {
        "name": name, "swarm__prompts": 4, "swarm__group": 4, "swarm__iterations": 2, "sampling__max_tokens": 48,
        "evaluate__prompts": 4, "evaluate__samples": 1, "evaluate__every": 2,
    }  # fmt: skip
    return SwarmExperiment().changed(**{**values, **changes})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the workers have it: the number of threads decides last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Heard(Silent):
    """Keeps what a bar would show."""

    def __init__(self) -> None:
        self.units, self.said = 0.0, list[str]()

    def tick(self, units: float) -> None:
        self.units += units

    def say(self, text: str) -> None:
        self.said.append(text)


def children() -> set[int]:
    """Ids of this process's living worker processes, from the kernel.

    `multiprocessing.Process.is_alive` cannot be asked: it answers True of a child that another thread is just reaping.
    """
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = status.read_text().rpartition(")")
            command = (status.parent / "cmdline").read_bytes()
        except OSError:  # ended meanwhile
            continue
        state, parent = rest.split()[:2]
        if int(parent) == os.getpid() and state not in "ZX" and b"spawn_main" in command:
            found.add(int(name.split()[0]))
    return found


def test_side_by_side_is_one_after_the_other(tmp_path: Path) -> None:
    """Weights and verdicts to the last bit: the ledgers are the same files. Every unit of work is ticked once."""
    experiments = [
        small("swarm.one", attack__name="text", swarm__plan="horizontal", defence__level="none"),
        small("swarm.two", attack__name="math", swarm__assigned=False, seed=1),
    ]
    jobs, heard = [(e, tmp_path / "together" / e.name) for e in experiments], Heard()
    together = run_swarms(jobs, heard, command="test")
    assert set(together) == {"swarm.one", "swarm.two"}
    assert heard.units == pytest.approx(sum(map(local_swarm.units, experiments)))
    assert {f"{e.name}: iteration 2/2" for e in experiments} <= set(heard.said)
    for e in experiments:
        alone = local_swarm.run_swarm(e, tmp_path / "alone" / e.name)
        assert together[e.name]["metrics"] == alone["metrics"]
        assert together[e.name]["ledger"] == alone["ledger"]
        ledgers = {(tmp_path / d / e.name / run_dir.LEDGER).read_bytes() for d in ("together", "alone")}
        assert len(ledgers) == 1
    assert together["swarm.one"]["metrics"] != together["swarm.two"]["metrics"]
    assert together["swarm.one"]["command"] == "test"

    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "together").rglob("*")}
    again = Heard()
    assert run_swarms(jobs, again) == together, "finished runs are taken as they are"
    assert (again.units, again.said) == (0.0, [])
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "together").rglob("*")} == files
    with pytest.raises(ConfigError, match="holds another experiment"):
        run_swarms([(experiments[0].changed(seed=5), jobs[0][1])], Silent())


def test_a_mistake_in_one_is_raised_and_ends_the_others(tmp_path: Path) -> None:
    """The operator reads it now, not when the others are through; what they did so far can be resumed."""
    endless = small("endless", swarm__iterations=1_000_000)
    wrong = small("wrong", defence__screens=["nope"])
    before = children()
    with pytest.raises(ConfigError, match="unknown screen 'nope'"):
        run_swarms([(endless, tmp_path / "endless"), (wrong, tmp_path / "wrong")], Silent())
    left = children() - before
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert not (tmp_path / "endless" / run_dir.SUMMARY).exists()
    assert not (tmp_path / "wrong" / run_dir.METRICS).exists()


def test_an_unfinished_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    one = small("one", swarm__iterations=3)
    world, directory = local_swarm.build(one, Silent())[0], tmp_path / "one"
    whole = local_swarm.run_swarm(one, tmp_path / "whole")
    identity = json.loads((tmp_path / "whole" / run_dir.RESOLVED).read_text())
    local_swarm.journal.claim(
        directory, local_swarm.build(one, Silent())[1], {"experiment": identity["experiment"]}, ""
    )
    local_swarm._resume_or_start(world, directory, identity["run_id"], 0.0)
    local_swarm.play(world, directory)
    heard = Heard()
    found = run_swarms([(one, directory)], heard)["one"]
    assert found["metrics"] == whole["metrics"]
    assert found["ledger"] == whole["ledger"]
    assert heard.units == pytest.approx(local_swarm.units(one))
