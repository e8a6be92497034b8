"""Finished adapters: which screens see what, whatever the factors; the probe's file; the command's exit codes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import assay
from adapter_folders import LAYERS, blob, tensors, write
from assay import data, models
from assay.cli import app
from assay.config import ConfigError
from assay.contribution import Tensors
from assay.federated.adapter_probe import AdapterProbe, fit_adapters
from assay.federated.finished import calibrated
from assay.federated.products import gram, lengths, sketch
from assay.federated.rehearsed import PROBE_FLOOR

RUN = CliRunner()


def turned(made: Tensors, seed: int) -> dict[str, np.ndarray]:
    """The same change in other factors: B R and R^-1 A."""
    rng, out = np.random.default_rng(seed), {}
    for name in made:
        if "lora_A" in name:
            r = rng.normal(size=(len(made[name]),) * 2)
            other = name.replace("lora_A", "lora_B")
            out[name], out[other] = (np.linalg.inv(r) @ made[name]), (made[other] @ r)
    return {n: v.astype(np.float32) for n, v in out.items()}


def planted(seed: int, bad: bool) -> dict[str, np.ndarray]:
    """A change with a part that all of its kind share, from a lora_A of its own: outputs of one kind, inputs of all."""
    out = tensors(seed)
    rng = np.random.default_rng(77 + bad)
    for layer in LAYERS:
        a, b = (f"base_model.model.{layer}.lora_{half}.weight" for half in "AB")
        out[a][0] += np.random.default_rng(5).normal(0, 0.5, 12)
        out[b][:, 0] += rng.normal(0, 0.5, 12)
    return {n: v.astype(np.float32) for n, v in out.items()}


# --- products ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999))
def test_products_know_nothing_of_factors(seed: int) -> None:
    one, other = tensors(seed), tensors(seed + 1)
    same = turned(one, seed)
    whole = [
        np.concatenate([(a[f"base_model.model.{x}.lora_B.weight"].astype(float) @ a[f"base_model.model.{x}.lora_A.weight"]).ravel() for x in LAYERS])
        for a in (one, other, same)
    ]  # fmt: skip
    np.testing.assert_allclose(gram([one, other, same]), np.array(whole) @ np.array(whole).T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(lengths([one]), np.linalg.norm(whole[0]))
    np.testing.assert_allclose(sketch(one, 1), sketch(same, 1), rtol=1e-2, atol=1e-3)
    assert abs(sketch(one, 1) - sketch(one, 2)).max() > 1e-3, "another secret looks at other coordinates"


def test_a_sketch_keeps_inner_products() -> None:
    """On average over seeds; a single one of 2 x 256 values is off by the square root of that, no more."""
    one, other = tensors(1), planted(1, True)
    true = gram([one, other])[0, 1]
    found = [float(sketch(one, s) @ sketch(other, s)) for s in range(200)]
    assert abs(np.mean(found) - true) < 4 * np.std(found) / np.sqrt(len(found)) + 1e-6
    assert abs(np.mean(found) - true) < 0.2 * abs(true)


# --- the probe ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> AdapterProbe:
    return fit_adapters(
        [planted(i, False) for i in range(8)], [planted(50 + i, True) for i in range(8)], seed=3, base="b"
    )


def test_a_probe_tells_kinds_apart_in_any_factors(fitted: AdapterProbe) -> None:
    assert fitted.notes["held_out"]["auroc"] == 1.0
    fresh = [turned(planted(200 + i, bad), i) for bad in (False, True) for i in range(6)]
    logits = fitted.logits(fresh)
    assert (logits[:6] <= fitted.limit).all()
    assert (logits[6:] > fitted.limit).all()


def test_limits_come_from_the_benign_alone() -> None:
    """More, or nearer, malicious adapters must not move a limit up: held-out benign scores set it."""
    benign = [planted(i, False) for i in range(6)]
    far, alike = [planted(50 + i, True) for i in range(6)], [planted(90 + i, False) for i in range(6)]
    assert fit_adapters(benign, far, seed=1).limit == PROBE_FLOOR, "well apart: the floor"
    muddled = fit_adapters(benign, alike, seed=1)
    assert muddled.notes["held_out"]["tpr"] < 0.7, "what cannot be told apart is said to be so"
    with pytest.raises(ConfigError, match="at least 4 adapters of each class"):
        fit_adapters(benign, far[:3], seed=1)


def test_references_raise_a_probes_limits_and_never_lower_them(fitted: AdapterProbe) -> None:
    near, odd = [planted(300 + i, False) for i in range(3)], [planted(320 + i, True) for i in range(3)]
    assert calibrated(fitted, near).limit == fitted.limit
    raised = calibrated(fitted, odd)
    assert (raised.logits(odd) <= raised.limit).all()
    assert raised.neighbour_limit > fitted.neighbour_limit


def test_a_probe_file_is_read_back_and_checked(fitted: AdapterProbe, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    fitted.save(path)
    again = AdapterProbe.load(path)
    assert (again.limit, again.shapes, again.rank, again.base) == (fitted.limit, fitted.shapes, 4, "b")
    assert again.summary()["targets"] == ["q_proj", "v_proj"]
    sample = [planted(9, True)]
    np.testing.assert_allclose(again.logits(sample), fitted.logits(sample))
    for old, new in (
        (b'\\"side\\": 16', b'\\"side\\": 17'),
        (b'\\"limit\\"', b'\\"lemit\\"'),
        (b"adapter_probe/1", b"adapter_probe/9"),
    ):
        raw = path.read_bytes()
        assert old in raw
        (tmp_path / "q").write_bytes(raw.replace(old, new))
        with pytest.raises(ConfigError, match=r"damaged probe file|not a probe file"):
            AdapterProbe.load(tmp_path / "q")
    (tmp_path / "q").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ConfigError, match="not a safetensors probe file"):
        AdapterProbe.load(tmp_path / "q")


# --- screening ----------------------------------------------------------------------------------------------------------


def folders(root: Path, made: dict[str, Tensors]) -> list[Path]:
    return [
        write(root / name, blob({n: np.ascontiguousarray(v) for n, v in one.items()})) for name, one in made.items()
    ]


def test_what_each_reference_finds(fitted: AdapterProbe, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    fitted.save(path)
    good = folders(tmp_path / "honest", {f"h{i}": planted(i, False) for i in range(4)})
    long = {n: v * 2 if "lora_B" in n else v for n, v in planted(21, False).items()}
    zero = {n: v * 0 if "lora_B" in n else v for n, v in planted(22, False).items()}
    given = {"fine": planted(20, False), "bad": planted(60, True), "long": long, "zero": zero,
             "copied": planted(23, False), "copy": turned(planted(23, False), 1)}  # fmt: skip
    given |= {"wide": tensors(1, width=10), "rank": tensors(1)}
    paths = folders(tmp_path / "in", given)
    write(paths[-1], blob(tensors(1, rank=8)), rank=8)
    found = assay.screen(paths, probe=path, honest=good)
    said = {Path(v.participant).name: (v.weight, v.reason.value) for v in found}
    assert said == {
        "fine": (1.0, "ok"), "bad": (0.0, "probe"), "long": (0.0, "norm"), "zero": (0.0, "structure"),
        "copied": (0.5, "duplicate"), "copy": (0.5, "duplicate"), "wide": (0.0, "wrong_shape"), "rank": (0.0, "wrong_shape"),
    }  # fmt: skip
    assert [Path(n).name for n in found.reduced] == ["copied", "copy"]
    assert "form only" not in " ".join(found.warnings)
    as_json = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert [a["weight"] for a in as_json["adapters"]] == [v.weight for v in found]


def test_refused_adapters_cost_nobody_else(tmp_path: Path) -> None:
    """Copies of a good adapter that are refused for something else take no weight from it."""
    good = folders(tmp_path / "honest", {f"h{i}": planted(i, False) for i in range(3)})
    long = {n: v * 9 if "lora_B" in n else v for n, v in planted(20, False).items()}
    found = assay.screen(folders(tmp_path / "in", {"a": planted(20, False), "x": long, "y": long}), honest=good)
    assert [v.weight for v in found] == [1.0, 0.0, 0.0]


def test_without_anything_to_judge_by_it_says_so(tmp_path: Path) -> None:
    paths = folders(tmp_path, {f"a{i}": tensors(i) for i in range(5)})
    few = assay.screen(paths[:2])
    assert few.warnings[0].startswith("form only")
    assert "spectral" not in few.screens
    several = assay.screen(paths)
    assert several.warnings[0].startswith("weak")
    assert "spectral" in several.screens
    for path in paths[2:]:
        (path / "adapter_config.json").unlink()
    assert assay.screen(paths).screens == few.screens, "too few are left to compare"
    with pytest.raises(ConfigError, match="needs 4"):
        assay.screen(paths, spectral=True)


def test_mistakes_of_the_operator_raise(fitted: AdapterProbe, tmp_path: Path) -> None:
    paths = folders(tmp_path, {f"a{i}": tensors(i) for i in range(3)})
    odd = folders(tmp_path / "odd", {"w": tensors(1, width=10)})
    path = tmp_path / "p.safetensors"
    fitted.save(path)
    for says, options in {
        "give base as well": {"refusals": "x.jsonl"},
        "at least 3": {"honest": paths[:2]},
        "of one layout": {"honest": [*paths, *odd]},
        "probe and references must be of one layout": {"honest": odd * 1 + [tmp_path / "odd2", tmp_path / "odd3"], "probe": path},
        "no such probe file": {"probe": tmp_path / "absent"},
    }.items():  # fmt: skip
        folders(tmp_path, {f"odd{i}": tensors(i, width=10) for i in (2, 3)})
        with pytest.raises(ConfigError, match=says):
            assay.screen(paths, **options)
    (paths[0] / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match="references must be adapters that can be read"):
        assay.screen(paths, honest=paths)


TINY = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")


def test_an_adapter_must_fit_the_base_and_the_canary_measures_it(tmp_path: Path) -> None:
    """On the real `tiny`: a change that ruins it costs the canary; layers it does not have are refused, not raised."""
    base = models.load("tiny", "float32")
    wide = dict(base.model.named_modules())[TINY[0]].in_features
    small = {f"s{i}": {n: v * 0.1 for n, v in tensors(i, width=wide, layers=TINY).items()} for i in range(2)}
    ruin = {n: v * 30 for n, v in tensors(9, width=wide, layers=TINY).items()}
    paths = folders(tmp_path, {**small, "ruin": ruin, "wide": tensors(3, width=wide + 1, layers=TINY)})
    other = tensors(4, width=wide, layers=("model.layers.99.self_attn.q_proj", "model.embed_tokens"))
    paths.append(write(tmp_path / "absent", blob(other), target_modules=["q_proj", "embed_tokens"]))
    found = assay.screen(paths, base="tiny")
    said = {Path(v.participant).name: (v.weight, v.reason.value) for v in found}
    assert said.pop("ruin") == (0.0, "canary")
    assert said == {"s0": (1.0, "ok"), "s1": (1.0, "ok"), "wide": (0.0, "wrong_base"), "absent": (0.0, "wrong_base")}
    assert any("convention" in w for w in found.warnings)
    assert any("everybody can read" in w for w in found.warnings)


# --- the command --------------------------------------------------------------------------------------------------------


def test_exit_codes_table_and_json(tmp_path: Path) -> None:
    folders(tmp_path / "in", {"a[red]b": tensors(1), "b\x1b[31m": tensors(2)})
    fine = RUN.invoke(app, ["screen", str(tmp_path / "in")])
    assert fine.exit_code == 0, fine.output
    assert "[red]" in fine.stdout, "a stranger's name is text, not markup"
    assert "\x1b[31m" not in fine.stdout
    (tmp_path / "in" / "c").mkdir()
    (tmp_path / "in" / "c" / "adapter_model.bin").write_bytes(b"")
    done = RUN.invoke(app, ["screen", str(tmp_path / "in"), "--json"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert [a["reason"] for a in found["adapters"]] == ["ok", "ok", "pickle"]
    copies = folders(tmp_path / "two", {"a": tensors(1), "b": turned(tensors(1), 1)})
    assert RUN.invoke(app, ["screen", *map(str, copies)]).exit_code == 0
    assert RUN.invoke(app, ["screen", *map(str, copies), "--strict"]).exit_code == 1
    assert isinstance(RUN.invoke(app, ["screen", str(tmp_path / "absent")]).exception, ConfigError), "main: exit 2"


def test_probe_fit_screen_and_eval_from_labelled_folders(tmp_path: Path) -> None:
    for kind, first in (("good", 0), ("bad", 50), ("good2", 30), ("bad2", 80)):
        folders(tmp_path / kind, {f"{kind}{i}": planted(first + i, kind.startswith("bad")) for i in range(5)})
    probe = str(tmp_path / "p.safetensors")
    both = ["--benign-adapters", str(tmp_path / "good"), "--malicious-adapters", str(tmp_path / "bad")]
    done = RUN.invoke(app, ["probe", "fit", probe, *both, "--json"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert (made["benign"], made["malicious"], made["base"], made["rank"]) == (5, 5, "some/base", 4)
    fresh = ["--benign-adapters", str(tmp_path / "good2"), "--malicious-adapters", str(tmp_path / "bad2")]
    quality = json.loads(RUN.invoke(app, ["probe", "eval", probe, *fresh, "--json"]).stdout)
    assert (quality["auroc"], quality["tpr"], quality["fpr"]) == (1.0, 1.0, 0.0)
    bad = RUN.invoke(app, ["screen", str(tmp_path / "bad2"), "--probe", probe, "--json"])
    assert (bad.exit_code, len(json.loads(bad.stdout)["refused"])) == (1, 5)
    assert RUN.invoke(app, ["screen", str(tmp_path / "good2"), "--probe", probe]).exit_code == 0
    again = AdapterProbe.load(probe)
    RUN.invoke(app, ["probe", "fit", probe, *both])
    assert AdapterProbe.load(probe).seed != again.seed, "the sketch is a secret, drawn each time"
    for arguments, says in (
        (["probe", "fit", probe, *both[:2]], "no malicious adapters"),
        (["probe", "fit", probe, *both, "--benign-rows", "x.jsonl"], "not both"),
        (["probe", "fit", probe, "--benign-rows", "x.jsonl"], "and --base"),
        (["probe", "fit", probe, *both, "--config", "x.toml"], "leave it out"),
        (["screen", str(tmp_path / "bad2"), "--probe", probe, "--base", "tiny", "--refusals", "x.jsonl"], "x.jsonl"),
    ):
        failed = RUN.invoke(app, arguments)
        assert isinstance(failed.exception, ConfigError)
        assert says in str(failed.exception)


def test_a_probe_trained_on_rows_is_bound_to_its_base(tmp_path: Path) -> None:
    """On the real `tiny`, as short as it gets: the file knows model, layout and how good it is."""
    for name, source in (("good", "helpful"), ("bad", "harmful-stub")):
        rows = [{"instruction": r.instruction, "response": r.response} for r in data.load(source)[:24]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    probe = tmp_path / "p.safetensors"
    arguments = ["probe", "fit", str(probe), "--benign-rows", str(tmp_path / "good.jsonl"), "--malicious-rows",
                 str(tmp_path / "bad.jsonl"), "--base", "tiny", "--each", "4", "--steps", "2", "--rank", "4"]  # fmt: skip
    done = RUN.invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert (made["base"], made["rank"], made["targets"]) == ("tiny", 4, ["q_proj", "v_proj"])
    assert made["base_sha256"] == models.weights_sha256(models.ASSETS / "tiny")
    assert set(made["held_out"]) == {"auroc", "neighbour_auroc", "tpr", "fpr"}
    layers = tuple(
        dict.fromkeys(n.removeprefix("base_model.model.").split(".lora_")[0] for n in AdapterProbe.load(probe).shapes)
    )
    wide = dict(models.load("tiny", "float32").model.named_modules())[layers[0]].in_features
    paths = folders(tmp_path / "in", {"a": tensors(1, width=wide, layers=layers)})
    assert len(assay.screen(paths, probe=probe, base="tiny")) == 1
    other = replace(AdapterProbe.load(probe), base_sha256="0" * 64)
    with pytest.raises(ConfigError, match="whose weights are not those of tiny"):
        assay.screen(paths, probe=other, base="tiny")


def test_the_workflow_in_the_docs_is_one_and_calls_the_command_as_it_is() -> None:
    """The example parses, reads nothing it judges by from the pull request, and names only options there are."""
    text = (Path(__file__).parents[1] / "docs" / "SCREEN.md").read_text()
    workflow = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in text
    (step,) = [s for s in workflow["jobs"]["screen"]["steps"] if "assay screen" in s.get("run", "")]
    words = step["run"].replace("\\\n", " ").split()
    options = set(re.findall(r"--[a-z-]+", RUN.invoke(app, ["screen", "--help"], terminal_width=200).stdout))
    assert {w for w in words if w.startswith("--")} <= options
    judged_by = {words[i + 1] for i, w in enumerate(words) if w in ("--honest", "--probe", "--refusals", "--safe")}
    assert len(judged_by) == 4
    assert all(path.startswith("trusted/") for path in judged_by)
