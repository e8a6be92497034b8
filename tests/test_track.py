"""Experiment trackers: what they are given, whatever befalls the run or them, read back by other readers than their own."""

from __future__ import annotations

import importlib.util
import json
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from assay import checkpoint, run_dir, track
from assay.config import ConfigError, Experiment, SwarmExperiment, load
from assay.engines import journal, local, local_swarm, swarm_world
from assay.engines.pool import Pool
from assay.federated.preparation import prepare
from assay.progress import Silent
from assay.track.values import of_row, of_summary

# Trackers of a user's own, in a module of the user's own: what they are told is written down a line a call.
OWN = """
import json, os, signal, sys, time
from pathlib import Path


class Recorder:
    def __init__(self, run, *, at=None, how=""):
        self.file, self.at, self.how = (run.folder / "calls").open("a"), at, how
        self.write("run", run.name, run.id, run.wing)

    def write(self, *call):
        print(json.dumps(call), file=self.file, flush=True)

    def log(self, round, values):
        if round == self.at:
            if self.how == "raise":
                raise OSError(28, "No space left on device")
            if self.how == "exit":
                sys.exit(0)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            while True:
                time.sleep(60)
        self.write("log", round, values)

    def finish(self, summary, setting):
        self.write("finish", summary, setting)

    def close(self):
        self.write("close")


nothing = 3
"""
RECORDER = "own_tracker:Recorder"


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_tracker.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def row(index: int) -> dict[str, Any]:
    """A row of metrics.jsonl, of a federated run."""
    weights = {"client-0": 1.0, "client-1": 0.0, "client-2": 0.25}
    return {
        "round": index, "refusal_rate": 1 - index / 8, "over_refusal_rate": None, "outcome": "applied" if index else "start",
        "weights": weights if index else {}, "seconds": {"train": 2.0 + index}, "answers": [["a prompt", "an answer"]],
    }  # fmt: skip


SUMMARY = {
    "wing": "federated", "seed": 7, "assay": "0.1.0", "metrics": {"refusal_rate": 0.5, "auroc": None},
    "seconds": {"train": 9.0}, "setting": {"attack": "harmful", "rounds": 3, "data": "a/path.jsonl"},
}  # fmt: skip


def begun(directory: Path, rounds: int) -> Path:
    """A run directory after so many rounds."""
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(directory / run_dir.RESOLVED, {"run_id": "0123456789abcdef"})
    for index in range(rounds + 1):
        add(directory, row(index))
    return directory


def add(directory: Path, one: dict[str, Any]) -> None:
    checkpoint.append_atomic(directory / run_dir.METRICS, json.dumps(one) + "\n")


def tracked(*names: str, **params: dict[str, Any]) -> Experiment:
    return Experiment(name="mine").changed(track={"to": names, "params": {RECORDER: params["own"]} if params else {}})


def calls(directory: Path) -> list[list[Any]]:
    lines = (track.folder_of(directory, RECORDER) / "calls").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps(directory: Path) -> list[int]:
    return [call[1] for call in calls(directory) if call[0] == "log"]


def test_a_tracker_gets_every_round_once_and_the_summary_last(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run", 1)
    with track.following(tracked(RECORDER), directory) as written:
        for index in (2, 3):
            add(directory, row(index))
            written()
        checkpoint.write_json(directory / run_dir.SUMMARY, SUMMARY)
    found = calls(directory)
    assert found[0] == ["run", "mine", "0123456789abcdef", "federated"]
    assert steps(directory) == [0, 1, 2, 3]
    assert found[3][2] == of_row(row(2))
    assert found[-2:] == [["finish", *of_summary(SUMMARY)], ["close"]]
    before = (track.folder_of(directory, RECORDER) / "calls").stat().st_mtime_ns
    with track.following(tracked(RECORDER), directory):
        pass
    assert (track.folder_of(directory, RECORDER) / "calls").stat().st_mtime_ns == before, (
        "it holds all of a finished run"
    )


def test_numbers_alone_are_told_no_participant_no_text_no_path() -> None:
    assert of_row(row(3)) == {
        "refusal_rate": 0.625, "seconds/train": 5.0, "applied": 1.0, "clients/heard": 3.0, "clients/refused": 1.0,
        "clients/reduced": 1.0,
    }  # fmt: skip
    assert of_summary(SUMMARY) == (
        {"refusal_rate": 0.5, "seconds/train": 9.0},
        {"wing": "federated", "assay": "0.1.0", "attack": "harmful", "rounds": 3},
    )
    assert of_row({"round": 1, "loss": float("nan"), "flag": True}) == {}


KILLED = """
import sys, time
from pathlib import Path
from assay import track
from assay.config import load
with track.following(load(sys.argv[1]), Path(sys.argv[2])) as written:
    print("following", flush=True)
    time.sleep(600)
"""


def test_a_killed_run_leaves_no_tracker_behind_and_goes_on_without_a_gap_or_a_round_twice(tmp_path: Path) -> None:
    directory, config = begun(tmp_path / "run", 2), tmp_path / "mine.toml"
    config.write_text(f'[track]\nto = ["{RECORDER}"]\n')
    process = subprocess.Popen([sys.executable, "-c", KILLED, config, directory], stdout=subprocess.PIPE, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == b"following\n"
    file = track.folder_of(directory, RECORDER) / "calls"
    while not file.exists() or len(steps(directory)) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while calls(directory)[-1] != ["close"]:  # the end of its input tells the tracker
        time.sleep(0.05)
    assert calls(directory)[-2][0] == "log", "no summary of a run that broke off"
    with track.following(tracked(RECORDER), directory) as written:
        add(directory, row(3))
        written()
    assert steps(directory) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("how", "says"),
    [("raise", "No space left on device"), ("exit", "code 0"), ("kill", "code -9"), ("hang", "did not end within")],
)
def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on(
    how: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if how == "hang":
        monkeypatch.setattr(track, "PATIENCE", 1.0)
    directory = begun(tmp_path / "run", 1)
    with track.following(tracked(RECORDER, own={"at": 1, "how": how}), directory) as written:
        for index in (2, 3):
            add(directory, row(index))
            written()
        checkpoint.write_json(directory / run_dir.SUMMARY, SUMMARY)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"assay: tracker {RECORDER} is off: ")
    assert says in said
    monkeypatch.setattr(track, "PATIENCE", 60.0)
    with track.following(tracked(RECORDER), directory):
        pass
    assert steps(directory) == [0, 1, 2, 3], "called again, the run is written whole"


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"to": ["nope"]}, "track.to: unknown tracker 'nope'; known: tensorboard, wandb, trackio"),
        ({"to": ["absent_module:Thing"]}, "track.to: absent_module:Thing cannot be imported"),
        ({"to": ["own_tracker:Absent"]}, "track.to: own_tracker:Absent cannot be imported"),
        ({"to": ["own_tracker:nothing"]}, "track.to: own_tracker:nothing is no function"),
        ({"to": [RECORDER], "params": {RECORDER: {"x": 1}}}, "got an unexpected keyword argument 'x'; known: at, how"),
        ({"to": [RECORDER], "params": {"wandb": {}}}, "track.params.wandb: track.to does not name it"),
        ({"to": [RECORDER, RECORDER]}, "one tracker is named twice"),
    ],
)
def test_mistakes_are_one_line_before_the_run(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        track.check(Experiment().changed(track=table).track)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_package_that_is_missing_is_named_with_its_extra_and_claims_no_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as Python itself marks what cannot be imported
    experiment = SwarmExperiment().changed(track={"to": [name]})
    with pytest.raises(ConfigError, match=rf"{name} is not installed; pip install 'assay\[{name}\]'"):
        local_swarm.run_swarm(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_packages_tracker_is_found_by_its_entry_point(tmp_path: Path) -> None:
    info = tmp_path / "own_tracker-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-tracker\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[assay.trackers]\nmine = {RECORDER}\n")
    directory = begun(tmp_path / "run", 1)
    experiment = Experiment().changed(track={"to": ["mine"]})
    track.check(experiment.track)
    with track.following(experiment, directory):
        pass
    lines = (directory / "track" / "mine" / "calls").read_text().splitlines()
    assert [json.loads(line)[1] for line in lines if json.loads(line)[0] == "log"] == [0, 1]


def test_a_tracker_is_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    """Switched on, off and on again between the parts of one swarm run: one id, one ledger, every round once."""
    small = SwarmExperiment().changed(
        swarm__nodes=2, swarm__prompts=2, swarm__group=2, swarm__iterations=2, sampling__max_tokens=8,
        evaluate__prompts=1, evaluate__samples=1, defence__level="text",
    )  # fmt: skip
    whole = local_swarm.run_swarm(small, tmp_path / "whole")
    on = small.changed(track={"to": [RECORDER]})
    world, identity, model = swarm_world.build(on, Silent())
    resolved = {"experiment": identity["experiment"], "model": model}
    directory = tmp_path / "run"
    run_id = journal.claim(directory, identity, resolved, "")
    local_swarm._resume_or_start(world, directory, run_id, 0.0)
    with track.following(on, directory) as written:  # the process ends after one round
        local_swarm.play(world, directory)
        written()
    assert steps(directory) == [0, 1]
    off = local_swarm.run_swarm(small, directory)
    assert steps(directory) == [0, 1]
    assert off["ledger"] == whole["ledger"], "same models, same verdicts, same head"
    again = local_swarm.run_swarm(on, directory)
    assert again == off
    assert steps(directory) == [0, 1, 2]
    assert calls(directory)[0][2] == run_id
    assert "track" not in json.loads((directory / run_dir.RESOLVED).read_text())["experiment"]


# What the packages themselves write, read by somebody else


def written_by(name: str, directory: Path) -> Path:
    """A run of three rounds, begun twice, as the tracker holds it."""
    experiment = tracked(name)
    with track.following(experiment, begun(directory, 1)) as written:
        add(directory, row(2))
        written()
    with track.following(experiment, directory) as written:
        add(directory, row(3))
        written()
        checkpoint.write_json(directory / run_dir.SUMMARY, SUMMARY)
    assert (directory / "track" / f"{name}.done").exists(), (directory / "track" / f"{name}.log").read_text()
    return directory / "track" / name


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"pip install 'assay[{name}]'")


@needs("tensorboard")
def test_tensorboard_reads_every_round_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = written_by("tensorboard", tmp_path / "run")
    read = EventAccumulator(str(folder))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("refusal_rate")] == [(0, 1), (1, 0.875), (2, 0.75), (3, 0.625)]
    assert [e.step for e in read.Scalars("clients/refused")] == [1, 2, 3]
    assert [(e.step, e.value) for e in read.Scalars("summary/refusal_rate")] == [(3, 0.5)]
    assert len(list(folder.iterdir())) == 1
    assert "assay:" not in capfd.readouterr().err


@pytest.mark.slow
@needs("wandb")
def test_wandb_writes_offline_and_every_round_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = written_by("wandb", tmp_path / "run")
    (file,) = folder.glob("wandb/offline-run-*/run-0123456789abcdef.wandb")
    found = [record for record in wandb_records(file) if record.HasField("history")]
    history = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in found]
    assert [one["_step"] for one in history] == [0, 1, 2, 3]
    assert [one["refusal_rate"] for one in history] == [1, 0.875, 0.75, 0.625]
    assert "assay:" not in capfd.readouterr().err


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB log (blocks of 32 KiB; crc, length and kind before each part)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@pytest.mark.slow
@needs("trackio")
def test_trackio_writes_locally_and_every_round_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = written_by("trackio", tmp_path / "run")
    with sqlite3.connect(folder / "assay.db") as database:
        found = database.execute("select step, metrics from metrics order by id").fetchall()
    assert [step for step, _ in found] == [0, 1, 2, 3, 3]
    assert [json.loads(text).get("refusal_rate") for _, text in found] == [1, 0.875, 0.75, 0.625, None]
    assert json.loads(found[-1][1])["summary/refusal_rate"] == 0.5
    assert "assay:" not in capfd.readouterr().err


FEDERATED = """
name = "small"
workers = 1
keep_updates = false
[model]
name = "tiny"
dtype = "float32"
[clients]
total = 2
malicious = 0.5
examples = 16
[training]
rounds = 2
steps = 2
[defence]
level = "none"
[evaluate]
harmful_prompts = 2
benign_prompts = 2
benign_rows = 2
"""


@pytest.mark.slow
def test_a_federated_run_is_the_same_with_a_tracker_that_fails(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "mine.toml").write_text(FEDERATED)
    plain = load(tmp_path / "mine.toml")
    assert isinstance(plain, Experiment)
    followed = plain.changed(track={"to": [RECORDER], "params": {RECORDER: {"at": 1, "how": "raise"}}})
    ready = prepare(plain, Silent())
    heads = {}
    with Pool(str(ready.path), ready.dtype, plain.lora, plain.workers) as pool:
        for name, experiment in (("plain", plain), ("followed", followed)):
            heads[name] = local.run(experiment, tmp_path / name, ready, pool)["ledger"]["head"]
        assert steps(tmp_path / "followed") == [0]
        local.run(plain.changed(track={"to": [RECORDER]}), tmp_path / "followed", ready, pool)
    assert heads["plain"] == heads["followed"]
    assert steps(tmp_path / "followed") == [0, 1, 2]
