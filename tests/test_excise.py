"""Excision: a kept run replays to its own models, and without a client it is what a hand-made mean says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from typer.testing import CliRunner

from assay import run_dir
from assay.bench import federated
from assay.cli import app
from assay.config import ConfigError, Experiment
from assay.contribution import tensors_sha256
from assay.engines import local
from assay.engines.excise import excise_run
from assay.engines.pool import Pool
from assay.federated import excise, store
from assay.federated.preparation import Prepared
from assay.progress import Silent

TOML = """
name = "kept"
workers = 1
[model]
name = "tiny"
dtype = "float32"
[clients]
total = 5
malicious = 0.2
examples = 24
[training]
rounds = 3
steps = 2
lr = 1e-2
[defence]
level = "none"
[evaluate]
every = 3
harmful_prompts = 6
benign_prompts = 6
benign_rows = 6
new_tokens = 8
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, small: Experiment, prepared: Prepared, pool: Pool) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "kept"
    local.run(small, directory, prepared, pool)
    return directory


def copy_of(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    return folder


def flat(tensors: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    return np.concatenate([tensors[n].ravel() for n in sorted(tensors)]).astype(np.float64)


def ledger_rounds(run: Path) -> list[dict[str, object]]:
    entries = [json.loads(line) for line in (run / run_dir.LEDGER).read_text().splitlines()]
    return [e["body"] for e in entries if e["kind"] == "round"]


def by_hand(run: Path, without: set[str]) -> NDArray[np.float64]:
    """The mean of the kept updates in float64, straight from the files; learning rate 1, no other rule."""
    start = json.loads((run / run_dir.LEDGER).read_text().splitlines()[0])["body"]["model"]
    ours = theirs = flat(load_file(run / "updates" / f"{start}.safetensors"))
    for body in ledger_rounds(run):
        rows = [c for c in body["contributions"] if c["weight"] > 0]  # type: ignore[attr-defined]
        delta = {
            c["participant"]: flat(load_file(run / "updates" / f"{c['sha256']}.safetensors")) - theirs for c in rows
        }
        weight = {c["participant"]: c["weight"] for c in rows}
        left = [n for n in delta if n not in without]
        if left:
            ours = ours + sum(weight[n] * delta[n] for n in left) / sum(weight[n] for n in left)
        theirs = theirs + sum(weight[n] * delta[n] for n in delta) / sum(weight.values())
    return ours


def test_every_accepted_update_is_kept_under_its_hash(kept: Path, small: Experiment) -> None:
    files = list((kept / "updates").iterdir())
    for file in files:
        assert tensors_sha256(load_file(file)) == file.stem
    wanted = {c["sha256"] for b in ledger_rounds(kept) for c in b["contributions"]}  # type: ignore[attr-defined]
    assert {f.stem for f in files} >= wanted
    assert len(files) == 1 + 5 * 3
    summary = run_dir.read_summary(kept)
    assert summary is not None
    assert summary["updates"] == {"files": 16, "bytes": sum(f.stat().st_size for f in files)}
    adapter = load_file(kept / run_dir.ADAPTER / "adapter_model.safetensors")
    assert summary["updates"]["bytes"] <= 1.05 * store.most_bytes(small, adapter)


def test_without_a_client_the_run_is_the_mean_of_the_others(kept: Path) -> None:
    script = excise.read(kept)
    assert excise.check_store(script) == 16
    for gone in (["client-01"], ["client-00", "client-04"]):
        found = excise.excise(script, gone)
        np.testing.assert_allclose(flat(dict(found.adapter)), by_hand(kept, set(gone)), atol=1e-6)
        assert tensors_sha256(found.original) == script.rounds[-1].after
        assert [c.share for c in found.changes] == pytest.approx([len(gone) / 5] * 3)
        assert 0 < (found.relative or 0) < 1.5
        assert found.changes[-1].distance == pytest.approx(found.distance)


def test_removing_everybody_leaves_the_model_where_it_started(kept: Path) -> None:
    script = excise.read(kept)
    found = excise.excise(script, script.clients)
    assert tensors_sha256(found.adapter) == script.initial
    assert found.relative == pytest.approx(1.0)
    assert {c.outcome for c in found.changes} == {"skipped: nobody is left"}


@pytest.mark.parametrize(
    ("aggregator", "params", "left"),
    [("median", {}, "applied"), ("krum", {"f": 1}, "skipped: krum bears f attackers only among at least 2f+3")],
)
def test_other_aggregators_replay_and_say_what_they_cannot_bear(
    aggregator: str,
    params: dict[str, int],
    left: str,
    tmp_path: Path,
    small: Experiment,
    prepared: Prepared,
    pool: Pool,
) -> None:
    changed = small.changed(
        name=aggregator, aggregation__name=aggregator, aggregation__params=params, training__rounds=1
    )
    local.run(changed, tmp_path / aggregator, prepared, pool)
    found = excise.excise(excise.read(tmp_path / aggregator), ["client-02"])
    assert found.changes[0].was == "applied"
    assert found.changes[0].outcome.startswith(left)


def test_the_command_writes_adapter_and_report(kept: Path, tmp_path: Path, cache: Path) -> None:
    result = CliRunner().invoke(app, ["excise", str(kept), "--client", "client-03", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    folder = kept / "excised" / "client-03"
    assert said == json.loads((folder / "excise.json").read_text())
    assert said["excised"] == ["client-03"]
    assert said["rounds_changed"] == [1, 2, 3]
    assert "not a retraining" in said["caveat"]
    written = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert tensors_sha256(written) == said["model_after"] != said["model_before"]
    np.testing.assert_allclose(flat(written), by_hand(kept, {"client-03"}), atol=1e-6)
    row = run_dir.read_metrics(kept)[-1]
    for name in ("refusal_rate", "over_refusal_rate", "benign_loss"):
        assert said["behaviour"]["before"][name] == pytest.approx(row[name]), "measured as the run measured it"
        assert name in said["behaviour"]["after"]
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
    assert excise.read(kept).head == run_dir.read_summary(kept)["ledger"]["head"], "the run itself is untouched"  # type: ignore[index]


def test_without_the_model_the_numbers_of_the_parameters_remain(kept: Path, tmp_path: Path) -> None:
    run = copy_of(kept, tmp_path / "run")
    resolved = json.loads((run / run_dir.RESOLVED).read_text())
    resolved["experiment"]["model"]["name"] = str(tmp_path / "gone")
    (run / run_dir.RESOLVED).write_text(json.dumps(resolved))
    said = excise_run(run, ["client-00"], tmp_path / "out", Silent())
    assert "is not on this machine" in said["behaviour"]["why_not"]
    assert said["distance"] > 0
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_a_changed_or_missing_update_is_found_first(kept: Path, tmp_path: Path) -> None:
    for number, damage in enumerate(("bit", "other", "cut", "gone")):
        run = copy_of(kept, tmp_path / str(number))
        sha = next(iter(excise.read(run).rounds[1].sha256.values()))
        file = run / "updates" / f"{sha}.safetensors"
        if damage == "bit":
            data = bytearray(file.read_bytes())
            data[-2] ^= 1
            file.write_bytes(data)
        elif damage == "other":
            shutil.copy(next(f for f in (run / "updates").iterdir() if f.stem != sha), file)
        elif damage == "cut":
            file.write_bytes(file.read_bytes()[:100])
        else:
            file.unlink()
        with pytest.raises(
            ConfigError, match=rf"{sha}\.safetensors: (its content does not|is damaged|this update was not kept)"
        ):
            excise_run(run, ["client-00"], tmp_path / "out", Silent(), measure=False)
    assert not (tmp_path / "out").exists()


def test_an_edited_ledger_is_refused(kept: Path, tmp_path: Path) -> None:
    run = copy_of(kept, tmp_path / "run")
    ledger = run / run_dir.LEDGER
    ledger.write_text(ledger.read_text().replace('"weight":1.0', '"weight":0.5', 1))
    with pytest.raises(ConfigError, match="ledger is broken"):
        excise.read(run)


def test_a_replay_that_would_not_be_the_run_is_an_error(kept: Path, tmp_path: Path) -> None:
    run = copy_of(kept, tmp_path / "run")
    resolved = json.loads((run / run_dir.RESOLVED).read_text())
    resolved["experiment"]["aggregation"]["name"] = "median"
    (run / run_dir.RESOLVED).write_text(json.dumps(resolved))
    with pytest.raises(ConfigError, match="replaying round 1 with everybody does not give the model"):
        excise.excise(excise.read(run), ["client-00"])


def test_operators_mistakes_are_one_line(
    kept: Path, tmp_path: Path, small: Experiment, prepared: Prepared, pool: Pool
) -> None:
    with pytest.raises(ConfigError, match=r"no accepted update of 'client-99'; accepted were client-00, client-01"):
        excise.excise(excise.read(kept), ["client-99"])
    with pytest.raises(ConfigError, match="no run there"):
        excise.read(tmp_path)
    with pytest.raises(ConfigError, match="is the run itself"):
        excise_run(kept, ["client-00"], kept, Silent())
    (tmp_path / "swarm").mkdir()
    (tmp_path / "swarm" / run_dir.RESOLVED).write_text('{"experiment": {"wing": "swarm"}}')
    (tmp_path / "swarm" / run_dir.LEDGER).write_text("")
    with pytest.raises(ConfigError, match="is a run of the swarm"):
        excise.read(tmp_path / "swarm")
    bare = small.changed(name="bare", keep_updates=False, training__rounds=1)
    local.run(bare, tmp_path / "bare", prepared, pool)
    assert not (tmp_path / "bare" / "updates").exists()
    with pytest.raises(ConfigError, match="this update was not kept; runs with keep_updates = true keep them"):
        excise_run(tmp_path / "bare", ["client-00"], None, Silent(), measure=False)


def test_a_run_that_could_outgrow_its_bound_does_not_start(
    tmp_path: Path, small: Experiment, prepared: Prepared, pool: Pool
) -> None:
    tight = small.changed(name="tight", keep_updates_gb=1e-6)
    with pytest.raises(ConfigError, match=r"may keep .* GB of updates and keep_updates_gb is 1e-06; raise it, or set"):
        local.run(tight, tmp_path / "tight", prepared, pool)
    assert not (tmp_path / "tight" / "updates").exists()


def test_names_of_clients_cannot_leave_the_run(tmp_path: Path) -> None:
    from assay.engines.excise import _folder

    assert _folder(["client-01"]) == "client-01"
    assert _folder(["b", "a"]) == "a+b"
    for hostile in ("../../etc", "a/b", ".", "..", "", "a" * 300, "x\ny", "\ud800"):
        assert len(_folder([hostile])) == 16
        assert _folder([hostile]).isalnum()


@pytest.mark.slow
def test_a_bench_has_a_row_of_what_is_left_without_the_malicious(
    tmp_path: Path, small: Experiment, prepared: Prepared, pool: Pool
) -> None:
    """Where some of theirs was accepted another model is measured; where none was, the run's own figures stand."""
    base = small.changed(attack__name="backdoor", clients__malicious=0.4, defence__level="submitted")
    accepted = base.changed(name="federated.backdoor.40pct.submitted", defence__screens=["structure"])
    refused = base.changed(
        name="federated.other.40pct.submitted", attack__name="backdoor+scaling", attack__params={"scaling": {"factor": 50.0}},
        defence__screens=["structure", "norm"], defence__params={"norm": {"reference": "round"}},
    )  # fmt: skip
    runs = [accepted, refused]
    summaries = {e.name: local.run(e, tmp_path / e.name, prepared, pool) for e in runs}
    assert summaries[refused.name]["metrics"]["malicious_weight_mean"] == 0
    rows = federated.excised(runs, summaries, tmp_path, Silent())
    assert [r["defence"] for r in rows] == ["custom + excised"] * 2
    report = json.loads(next((tmp_path / accepted.name).glob("excised/*/excise.json")).read_text())
    bad = [p for p, what in summaries[accepted.name]["participants"].items() if what == "malicious"]
    assert report["excised"] == sorted(bad)
    assert rows[0]["benign_loss"] == report["behaviour"]["after"]["benign_loss"]
    assert rows[0]["benign_loss"] != summaries[accepted.name]["metrics"]["benign_loss"]
    assert rows[1]["benign_loss"] == summaries[refused.name]["metrics"]["benign_loss"]
    assert not (tmp_path / refused.name / "excised").exists()
