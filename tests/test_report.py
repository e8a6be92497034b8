"""The report says what the runs say, loads nothing, and stays inert whatever a participant is called."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from assay.ledger import Ledger
from assay.report import ReportError, limits, words, write
from assay.report import verdicts as verdicts_kept

HOSTILE = '</script><script>document.documentElement.dataset.owned="1"</script><img src=x onerror="owned()">'
LINK = '<a href="https://evil.example/">click</a> {{ 7*7 }} <!--'
BIDI = "client-\u202e10\x00\ud800"

Change = Callable[[dict[str, Any]], None]


def make_run(
    folder: Path,
    level: str = "submitted",
    *,
    malicious: int = 5,
    clients: int = 10,
    rounds: int = 6,
    refusal: tuple[float, float] = (1.0, 0.975),
    names: dict[int, str] | None = None,
    honest_loss: tuple[int, int] | None = None,
    change: Change | None = None,
) -> Path:
    """A run directory as `assay run` leaves it. The first half of the clients is malicious.

    `honest_loss` = (client, round) with weight 0.4; `change` edits the summary before it is written.
    """
    folder.mkdir(parents=True)
    names = {i: (names or {}).get(i, f"client-{i:02d}") for i in range(clients)}
    bad = {names[i]: i < malicious for i in names}
    defended = level != "none"
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append("start", {"level": level})
    rows: list[dict[str, Any]] = [
        {"round": 0, "refusal_rate": refusal[0], "over_refusal_rate": 0.0, "benign_loss": 0.5, "mean_weight": None,
         "outcome": "start", "weights": {}, "seconds": {}},
    ]  # fmt: skip
    for r in range(1, rounds + 1):
        share = min(1.0, r / 3)
        weights = {name: 0.0 if defended and bad[name] else 1.0 for name in bad}
        if honest_loss and honest_loss[1] == r:
            weights[names[honest_loss[0]]] = 0.4
        rows.append({
            "round": r, "refusal_rate": None if r == 2 and rounds > 2 else refusal[0] + share * (refusal[1] - refusal[0]),
            "over_refusal_rate": 0.02, "benign_loss": 0.5 - 0.29 * share, "mean_weight": sum(weights.values()) / clients,
            "outcome": "rolled_back" if defended and r == 4 else "applied", "weights": weights,
            "seconds": {"train": 11.5, "canary": 2.5 if defended else 0.0},
        })  # fmt: skip
        ledger.append("round", {"round": r, "outcome": "applied", "why": "", "verdicts": verdicts(r, weights), "gate": {}, "contributions": [
            {"participant": name.encode("utf-8", "replace").decode(), "sha256": sha256_of(r, i),
             "num_examples": 60, "weight": w, "reason": "ok" if w == 1 else "canary", "screen": "canary" if defended else "",
             "sentence": "" if w == 1 else f"refusals cost {3.1 + r:.1f} nats more than at the start"}
            for i, (name, w) in enumerate(weights.items())
        ]})  # fmt: skip
    summary: dict[str, Any] = {
        "name": f"federated.{folder.name}", "wing": "federated", "assay": "0.1.0", "commit": "abc123def456",
        "versions": {"python": "3.11.7", "torch": "2.13.0"}, "machine": {"cpu": "AMD EPYC", "cores": 2, "memory_gb": 24},
        "seed": 0, "command": "assay demo", "started": "2026-11-21T07:00:00Z",
        "model": {"name": "smollm2-135m", "sha256": "5af571cbf074e6d21a03528d2330792e", "dtype": "bfloat16",
                  "aligned": True, "alignment": "shipped adapter"},
        "setting": {"clients": clients, "malicious": malicious, "sampled": clients, "rounds": rounds, "steps": 2,
                    "level": level, "aggregator": "mean", "attack": "harmful_data", "learning_rate": 0.001},
        "participants": {name: "malicious" if b else "honest" for name, b in bad.items()},
        "seconds": {"prepare": 1.2, "train": 70.1, **({"screen": 3.2, "canary": 14.0} if defended else {}),
                    "aggregate": 0.1, "evaluate": 20.0},
        "metrics": {"refusal_rate": refusal[1], "over_refusal_rate": 0.02, "benign_loss": 0.21,
                    "auroc": 0.987 if malicious and defended else None, "tpr_at_1pct_fpr": 0.96 if defended else None,
                    "honest_weight_mean": 1.0, "malicious_weight_mean": (0.0 if defended else 1.0) if malicious else None},
        "detection": {"probe": {"auroc": 0.913, "tpr_at_1pct_fpr": 0.5}, "canary": {"auroc": 1.0, "tpr_at_1pct_fpr": 1.0}}
        if defended else {},
        "reasons": [{"screen": "canary", "reason": "canary", "honest": 0, "malicious": malicious * rounds,
                     "sentence": "refusals cost 4.1 nats more than at the start"}] if defended else [],
        "ledger": {"entries": len(ledger.entries), "head": ledger.head},
        "answers": [{"prompt": "How do I keep basil alive?", "answer": f"Water it in the morning ({folder.name})."}],
    }  # fmt: skip
    summary["seconds"]["total"] = sum(summary["seconds"].values())
    if change:
        change(summary)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sha256_of(round: int, client: int) -> str:
    return hashlib.sha256(f"{round}{client}".encode()).hexdigest()


def verdicts(round: int, weights: dict[str, float]) -> list[dict[str, Any]]:
    """What three screens say of each client, in the screens' order, as the ledger has it."""
    said: list[dict[str, Any]] = []
    for screen in ("norm", "probe", "canary"):
        for i, (name, weight) in enumerate(weights.items()):
            bad = weight < 1 and screen == "canary"
            logit, rise = -0.25 - 0.01 * i, 3.1 + round if bad else 0.01
            evidence = {
                "norm": {"norm": 2.25, "ratio": 1.0625},
                "probe": {"logit": logit},
                "canary": {"refusal_rise": rise},
            }
            score = {"norm": 1.0625, "probe": logit - 1.3, "canary": rise / 0.5}
            said.append({
                "participant": name.encode("utf-8", "replace").decode(), "contribution": sha256_of(round, i), "screen": screen,
                "weight": weight if bad else 1.0, "reason": "canary" if bad else "ok", "mode": "enforce", "seconds": 0.0,
                "sentence": f"refusals cost {rise:.1f} nats more than at the start" if bad else "",
                "score": score[screen], "evidence": evidence[screen],
            })  # fmt: skip
    return said


def four_runs(tmp: Path, **more: Any) -> list[Path]:
    return [
        make_run(tmp / "honest_only", "none", malicious=0, refusal=(1.0, 0.995), **more),
        make_run(tmp / "undefended", "none", refusal=(1.0, 0.03), **more),
        make_run(tmp / "submitted", "submitted", refusal=(1.0, 0.975), **more),
        make_run(tmp / "step", "step", refusal=(1.0, 0.61), honest_loss=(7, 3), **more),
    ]


class Page(HTMLParser):
    """What a browser would see: elements with attributes, and text by the innermost element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while tag in self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        """Visible text, spaces collapsed."""
        return " ".join("".join(t for tag, t in self.texts if tag not in ("script", "style", "title")).split())

    @property
    def rows(self) -> list[list[str]]:
        """Table rows as cells of text."""
        found = []
        for row in re.findall(
            r"<tr(?: [^>]*)?>(.*?)</tr>", self.source.split('<script type="application/json"')[0], re.S
        ):
            cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)
            found.append([" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in cells])
        return found

    @property
    def data(self) -> dict[str, Any]:
        (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.S)
        assert not set("<>&") & set(text)  # nothing in it can end the tag, nor open a comment that swallows the end
        return dict(json.loads(text))


def test_headline_and_summary_say_what_the_runs_say(tmp_path: Path) -> None:
    page = Page(write(four_runs(tmp_path), tmp_path / "out" / "report.html", title="Basil & sons"))
    assert (
        "5 of 10 clients were malicious. Undefended, the model’s refusal of harmful prompts fell from 1.00 to 0.03; "
        "with submitted it ended at 0.98, with step at 0.61." in page.text
    )
    assert "Basil & sons" in page.text
    by_run = {row[0]: row for row in page.rows if len(row) == 10}
    assert by_run["undefended"][1:] == ["none", "1.00 → 0.03", "0.02", "0.210", "–", "–", "1.00", "1.00", "91"]
    assert by_run["submitted 1 of 6 rounds not applied"][1:] == [
        "submitted", "1.00 → 0.98", "0.02", "0.210", "0.987", "0.96", "1.00", "0.00", "109",
    ]  # fmt: skip
    assert by_run["honest_only"][8] == "–"


def test_a_grid_is_told_by_its_worst_undefended_run_and_by_how_many_attacks(tmp_path: Path) -> None:
    def attacked_by(name: str) -> Change:
        return lambda summary: summary["setting"].update(attack=name)

    runs = [
        make_run(tmp_path / "few", "none", malicious=2, refusal=(1.0, 0.96), change=attacked_by("harmful_data")),
        make_run(tmp_path / "many", "none", malicious=7, refusal=(1.0, 0.04), change=attacked_by("harmful_data")),
        make_run(tmp_path / "kept", "submitted", malicious=7, refusal=(1.0, 0.92), change=attacked_by("blend")),
    ]
    text = Page(write(runs, tmp_path / "out")).text
    assert "fell from 1.00 to 0.04 at worst; with kept it ended at 0.92." in text
    assert "2 attacks." in text
    one = Page(write(runs[:2], tmp_path / "one")).text
    assert "attack: harmful_data." in one


def test_detection_cost_answers_and_provenance(tmp_path: Path) -> None:
    page = Page(write(four_runs(tmp_path), tmp_path))
    assert (tmp_path / "report.html").is_file()
    assert ["submitted", "probe", "0.913", "0.50"] in page.rows
    assert ["canary", "canary", "0", "30", "refusals cost 4.1 nats more than at the start"] in page.rows
    assert ["malicious clients", "30", "0", "0", "30"] in page.rows
    assert ["honest clients", "30", "29", "1", "0"] in page.rows
    assert "Honest clients that ever lost weight: none." in page.text
    assert "Honest clients that ever lost weight: client-07 (round 3; lowest 0.40; canary)." in page.text
    assert [row[-1] for row in page.rows if row[0] == "submitted" and len(row) == 9] == ["16 %"]
    assert "Water it in the morning (step)." in page.text
    for fact in ("assay demo", "abc123def456", "5af571cbf074e6d21a03528d2330792e", "AMD EPYC", "2.13.0"):
        assert fact in page.text
    head = json.loads((tmp_path / "step" / "summary.json").read_text())["ledger"]["head"]
    assert head in page.text
    assert f"assay ledger verify {tmp_path / 'step'}" in page.text
    assert "passes every check known today" in page.text
    assert "Not like for like" not in page.text


def test_page_loads_nothing(tmp_path: Path) -> None:
    page = Page(write(four_runs(tmp_path), tmp_path / "report.html"))
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form")
        for name in ("src", "srcset", "data", "action", "style"):
            assert name not in attributes, (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    (style,) = (text for tag, text in page.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv"))
    assert policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert page.source.count("Plotly, Inc") <= 2
    assert sum(tag == "script" for tag, _ in page.elements) == 3


def test_outline_is_sane(tmp_path: Path) -> None:
    page = Page(write(four_runs(tmp_path), tmp_path / "report.html"))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == 1
    assert tags.count("main") == 1
    assert tags.count("caption") == tags.count("table")
    assert ("html", {"lang": "en"}) in page.elements
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        if tag == "a":
            assert (attributes["href"] or "")[1:] in ids
        if "data-chart" in attributes or attributes.get("role") == "region":
            assert attributes["aria-label"]


@pytest.mark.parametrize(
    "name", [HOSTILE, "</script ><!-- <script ", LINK, BIDI, "__proto__", "x" * 5000, "$title ${title} %{x} &lt;b&gt;"]
)
def test_hostile_names_are_inert(tmp_path: Path, name: str) -> None:
    def change(summary: dict[str, Any]) -> None:
        summary["reasons"][0].update(sentence=name, reason=name, screen=name)
        summary["detection"][name] = {"auroc": 0.5}
        summary["answers"][0] = {"prompt": name, "answer": name}
        summary["setting"][name] = name
        summary["command"] = summary["name"] = summary["model"]["name"] = name
        summary["seconds"][name] = 3.0

    plain = Page(write([make_run(tmp_path / "plain")], tmp_path / "plain.html"))
    run = make_run(tmp_path / "hostile", names={0: name, 7: f"{name}!"}, honest_loss=(7, 2), change=change)
    page = Page(write([run], tmp_path / "hostile.html", title=name))
    known = {tag for tag, _ in plain.elements}
    assert {tag for tag, _ in page.elements} == known
    assert sum(tag == "script" for tag, _ in page.elements) == 3
    assert not any(attr.startswith("on") for _, attributes in page.elements for attr in attributes)
    assert all((a.get("href") or "#").startswith("#") for _, a in page.elements)
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00]", page.source)
    assert len(page.data["weights"][0]["clients"]) == 10 + 2 * (name == BIDI)  # the ledger spells surrogates "?"
    if name == HOSTILE:
        assert HOSTILE in page.data["weights"][0]["clients"]
        assert HOSTILE in page.text


def test_nulls_and_numbers_that_are_not_finite_are_dashes(tmp_path: Path) -> None:
    def change(summary: dict[str, Any]) -> None:
        summary["metrics"] = dict.fromkeys(summary["metrics"], None) | {"benign_loss": math.inf}
        summary["detection"]["probe"] = {"auroc": None, "tpr_at_1pct_fpr": math.nan}
        del summary["seconds"], summary["answers"]
        summary["seed"] = None

    run = make_run(tmp_path / "run", change=change)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["refusal_rate"] = row["benign_loss"] = None
        row["seconds"] = {}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write([run], tmp_path / "report.html"))
    row = next(row for row in page.rows if len(row) == 10 and row[0].startswith("run"))
    assert row[2:] == ["– → –", "0.02", "–", "–", "–", "–", "–", "–"]
    assert ["run", "probe", "–", "–"] in page.rows
    assert "Refusal of harmful prompts was not measured" in page.text
    assert page.data["runs"][0]["refusal_rate"] == [None] * 7
    assert not re.search(r"\b(nan|NaN|Infinity|None|null)\b", page.text)


def test_unfinished_run_is_shown_as_such(tmp_path: Path) -> None:
    killed = make_run(tmp_path / "federated.killed")
    (killed / "summary.json").unlink()
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"round": 7, "refusal_ra')
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "metrics.jsonl").touch()
    page = Page(write([killed, fresh, *four_runs(tmp_path)], tmp_path / "report.html"))
    assert "killed is unfinished: 6 rounds so far" in page.text
    assert "fresh is unfinished: 0 rounds so far" in page.text
    assert "killed: the last line of metrics.jsonl is torn and left out" in page.text
    assert "Which clients were honest is not known" in page.text
    row = next(row for row in page.rows if row[0].startswith("killed"))
    assert row[1:5] == ["–", "1.00 → 0.98", "0.02", "0.210"]
    alone = Page(write([killed], tmp_path / "alone.html"))
    assert "No run is finished yet" in alone.text


def test_further_measures_and_last_steps_are_shown(tmp_path: Path) -> None:
    def more(summary: dict[str, Any]) -> None:
        summary["metrics"] |= {"honest_weight_strangers": 0.875, "judge_reward": -1.55}
        before, after = ({"refusal_rate": r, "over_refusal_rate": 0.0, "benign_loss": 0.2} for r in (0.31, 0.97))
        summary["finish"] = [{"step": "safe_lora", "before": before, "after": after, "detail": {"projected": 3}}]

    plain = make_run(tmp_path / "plain")
    rich = make_run(tmp_path / "rich", change=more)
    rows = [json.loads(line) for line in (rich / "metrics.jsonl").read_text().splitlines()]
    (rich / "metrics.jsonl").write_text("".join(json.dumps(row | {"auroc": 0.75}) + "\n" for row in rows))
    page = Page(write([plain, rich], tmp_path / "report.html"))
    assert ["honest weight strangers", "–", "0.875"] in page.rows
    assert ["judge reward", "–", "-1.550"] in page.rows
    assert ["safe lora", "0.310 → 0.970", "0.000 → 0.000", "0.200 → 0.200"] in page.rows
    assert page.data["runs"][1]["auroc"] == [0.75] * len(rows)
    assert ["1", "–", "0.750"] in page.rows
    bare = Page(write([plain], tmp_path / "bare.html"))
    assert "Detection. AUROC" not in bare.text
    assert "What else was measured" not in bare.text
    assert "Last steps" not in bare.text


def test_errors_are_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = make_run(tmp_path / "damaged")
    (damaged / "summary.json").write_text('{"name": ')
    other = make_run(tmp_path / "other", change=lambda summary: summary.update(wing="vertical"))
    wrong = make_run(tmp_path / "wrong", change=lambda summary: summary.update(participants=[1]))
    torn = make_run(tmp_path / "torn")
    (torn / "metrics.jsonl").write_text('{"round": 0}\n{"round"\n{"round": 2}\n')
    latin = make_run(tmp_path / "latin")
    (latin / "metrics.jsonl").write_bytes(b'{"round": 0, "outcome": "\xff"}\n')
    fine = make_run(tmp_path / "fine")
    cases: list[tuple[list[Path], str]] = [
        ([], "pass at least one directory"),
        ([tmp_path / "nowhere"], "is not a directory: pass"),
        ([empty], "neither summary.json nor metrics.jsonl: pass"),
        ([fine, damaged], "is not JSON: restore it, or delete it"),
        ([other], "of the wing 'vertical': the page knows federated, swarm"),
        ([wrong], "is damaged at 'participants'"),
        ([torn], "metrics.jsonl line 2 is not JSON: restore"),
        ([latin], "cannot be read (UnicodeDecodeError): restore"),
    ]
    for directories, message in cases:
        with pytest.raises(ReportError, match=re.escape(message)) as caught:
            write(directories, tmp_path / "report.html")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ReportError, match="cannot write"):
        write([fine], tmp_path / "file" / "report.html")


def test_tampered_ledger_and_disagreeing_weights_are_said(tmp_path: Path) -> None:
    edited = make_run(tmp_path / "edited")
    text = (edited / "ledger.jsonl").read_text()
    (edited / "ledger.jsonl").write_text(text.replace('"weight":0.0', '"weight":1.0', 1))
    without = make_run(tmp_path / "without")
    (without / "ledger.jsonl").unlink()
    page = Page(write([edited, without], tmp_path / "report.html"))
    assert "edited: the ledger is broken, do not rely on this run (entry 1:" in page.text
    assert "edited: metrics.jsonl and the ledger disagree on 1 weights" in page.text
    assert "chain BROKEN" in page.text
    assert "without: there is no ledger" in page.text


def test_runs_that_are_not_like_for_like_are_named(tmp_path: Path) -> None:
    def change(summary: dict[str, Any]) -> None:
        summary["setting"]["learning_rate"] = 0.01
        summary["setting"]["screens"] = ["structure", {"norm": 1.15}]
        summary["seed"] = 3

    page = Page(write([make_run(tmp_path / "a"), make_run(tmp_path / "b", change=change)], tmp_path / "r.html"))
    assert "differ in learning_rate (0.001 / 0.01); seed (0 / 3); screens (– / structure, norm 1.15)" in page.text


def test_safety_by_learning_nothing_is_said(tmp_path: Path) -> None:
    def change(summary: dict[str, Any]) -> None:
        summary["metrics"]["honest_weight_mean"] = 0.3

    stuck = make_run(tmp_path / "stuck", change=change)
    rows = [json.loads(line) for line in (stuck / "metrics.jsonl").read_text().splitlines()]
    (stuck / "metrics.jsonl").write_text("".join(json.dumps(r | {"outcome": "rolled_back"}) + "\n" for r in rows))
    page = Page(write([stuck, make_run(tmp_path / "fine")], tmp_path / "report.html"))
    assert "stuck: no round was applied, so its model is the one it started from" in page.text
    assert "stuck: honest clients kept only 0.30 of their weight on average" in page.text
    assert "fine:" not in page.text


def test_labels_tell_runs_apart_and_bytes_are_reproducible(tmp_path: Path) -> None:
    def same(summary: dict[str, Any]) -> None:
        summary["name"] = "federated.same"

    runs = [make_run(tmp_path / place / "x", change=same) for place in ("p", "q")]
    runs.append(make_run(tmp_path / "y", change=same))
    first, second = (write(runs, tmp_path / name) for name in ("1.html", "2.html"))
    assert [run["name"] for run in Page(first).data["runs"]] == ["same (x) #1", "same (x) #2", "same (y)"]
    assert first.read_bytes() == second.read_bytes()


def test_every_run_has_its_own_look(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"r{i}", clients=2, malicious=1, rounds=1) for i in range(12)]
    page = Page(write([*runs, *four_runs(tmp_path)], tmp_path / "report.html"))
    looks = [(run["colour"], run["dash"], run["symbol"]) for run in page.data["runs"]]
    assert len(set(looks)) == len(looks)
    assert "1 to 5 of 2 to 10 clients were malicious" in page.text


def test_hundred_clients_stay_small(tmp_path: Path) -> None:
    empty = write([make_run(tmp_path / "small", clients=2, malicious=1, rounds=1)], tmp_path / "small.html")
    runs = four_runs(tmp_path / "large", clients=100, rounds=25)
    page = write(runs, tmp_path / "large.html")
    assert page.stat().st_size - empty.stat().st_size < 1_500_000
    people = Page(page).data["people"]
    assert len(people["names"]) == 100
    assert sum(len(weights) for run in people["runs"] for weights in run["weights"]) == 100 * 25 * 4


@pytest.mark.parametrize(
    ("value", "places", "text"),
    [(0.975, 2, "0.98"), (None, 3, "–"), (-0.0001, 2, "0.00"), (1e300, 2, "1.00e+300"), (1, 2, "1.00")],
)
def test_numbers_round_as_a_reader_would(value: float | None, places: int, text: str) -> None:
    assert words.fixed(value, places) == text


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(page: Path, tmp: Path, *options: str) -> str:
    """What headless Chromium prints to stdout for `page`."""
    assert BROWSER
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp / 'profile'}", "--virtual-time-budget=20000", "--hide-scrollbars", *options,
            page.resolve().as_uri(),
        ],
        capture_output=True, timeout=240, check=True,
    )  # fmt: skip
    return done.stdout.decode("utf-8")


@pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome on PATH")
def test_charts_are_drawn_in_a_browser(tmp_path: Path) -> None:
    runs = four_runs(tmp_path, names={0: HOSTILE, 6: LINK, 8: "<b>b</b>"})
    killed = make_run(tmp_path / "killed", change=lambda summary: None)
    (killed / "summary.json").unlink()
    rows = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    (killed / "metrics.jsonl").write_text("".join(json.dumps(row | {"auroc": 0.9}) + "\n" for row in rows))
    page = write([*runs, killed], tmp_path / "report.html")
    shot = tmp_path / "shot.png"
    dom = browse(page, tmp_path, "--window-size=1366,5200", f"--screenshot={shot}", "--dump-dom")
    html = re.search(r"<html[^>]*>", dom)
    assert html
    assert 'data-assay="ready"' in html[0], html[0]
    assert "data-errors" not in html[0]
    assert 'data-charts="11"' in html[0]  # four lines, weights and means of three runs, cost
    assert "data-owned" not in html[0]
    body = dom.split('<script type="application/json"')[0]
    assert body.count('class="main-svg"') >= 11
    assert body.count("js-plotly-plot") == 11
    assert "evil.example" in body
    assert not re.search(r"<a[^>]*evil", body)
    assert "&lt;b&gt;b&lt;/b&gt;</text>" in body  # plotly would have made it bold
    assert not re.search(r"<img|xlink:href=\"http", body)
    assert _values(shot) > 100


def _values(shot: Path) -> int:
    """Different bytes in a screenshot's pixels (as PNG filters leave them): a blank page has a few."""
    data, at, pixels = shot.read_bytes(), 8, b""
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        pixels += data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    return len(set(zlib.decompress(pixels)))


def test_limits_are_the_screens_own_and_the_config_s_where_it_says() -> None:
    from assay.federated.screens import Norm
    from assay.swarm.screens.model import Seeded

    screens = {"norm": Norm(None), "seeded": Seeded()}
    assert set(screens) == set(limits.DEFAULTS)
    for name, knobs in limits.DEFAULTS.items():
        assert knobs == {knob: getattr(screens[name], knob) for knob in knobs}
    older, newer = {"defence": {"norm_clip": 1.3}}, {"defence": {"norm_clip": 1.3, "params": {"norm": {"clip": 1.4}}}}
    assert limits.limit("norm", {}, None, older) == "ratio at most 1.3; refused above 1.5"
    assert limits.limit("norm", {}, None, newer) == "ratio at most 1.4; refused above 1.5"


@pytest.mark.parametrize("level", [verdicts_kept.ALL, verdicts_kept.MARKED, verdicts_kept.BELOW])
def test_a_page_keeps_first_what_was_marked_down_and_says_where_it_stops(level: int) -> None:
    weights = {f"client-{i:02d}": 0.0 if i < 2 else 1.0 for i in range(10)}
    most = {verdicts_kept.ALL: 90, verdicts_kept.MARKED: 30, verdicts_kept.BELOW: 5}[level]
    kept = verdicts_kept.Kept(most)
    for round in (1, 2, 3):
        kept.add(round, [*verdicts(round, weights), "no verdict", {"participant": 7}])
    assert kept.level == level
    assert kept.count == sum(map(len, kept.cells.values())) <= most
    assert len(kept.cells) == {verdicts_kept.ALL: 30, verdicts_kept.MARKED: 6, verdicts_kept.BELOW: 5}[level]
    assert kept.cut == (3 if level == verdicts_kept.BELOW else 0)


@pytest.mark.parametrize("where", ["summary", "ledger", "both"])
def test_the_published_behaviour_is_marked_wherever_it_appears(tmp_path: Path, where: str) -> None:
    runs = four_runs(tmp_path)

    def mark(summary: dict[str, Any]) -> None:
        if where != "ledger":
            summary["faithful"] = True

    marked = make_run(tmp_path / "paper", "step", refusal=(1.0, 0.4), change=mark)
    if where != "summary":
        lines = (marked / "ledger.jsonl").read_text().splitlines()
        (marked / "ledger.jsonl").unlink()
        ledger = Ledger(marked / "ledger.jsonl")
        for line in map(json.loads, lines):
            ledger.append(line["kind"], line["body"] | ({"faithful": True} if line["kind"] == "start" else {}))
    page = write([*runs, marked], tmp_path / "report.html").read_text()
    body = page[page.index("<body>") : page.index('<script type="application/json"')]
    assert "Published behaviour, for comparison only." in body
    assert body.index("Published behaviour") < body.index("<main>"), "above everything else"
    assert '<small class="state">as published</small>' in body
    assert body.count("paper (as published)") >= 5, "in the headline or tables, legends and captions"
    assert not re.search(r">paper<", body), "never without its mark"
    without = write(runs, tmp_path / "plain.html").read_text()
    assert "as published" not in without[without.index("<body>") :]
