"""The swarm's section says what its runs say, alone or beside the federated one, whatever nodes write."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.ledger import Ledger
from assay.report import ReportError, swarm_charts, swarm_words, write
from test_report import BIDI, BROWSER, HOSTILE, LINK, Page, _values, browse
from test_report import four_runs as federated_runs
from test_report import make_run as make_federated

EDGES = [0.0, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
TEXT = "She buys 3 boxes of 4 pens, 3*4=12. Then 2+2=5 more, so 12+4=16. #### 16"

Change = Callable[[dict[str, Any]], None]


def make_swarm(
    folder: Path,
    level: str = "seeded",
    *,
    attack: str = "math",
    malicious: int = 1,
    nodes: int = 4,
    iterations: int = 10,
    every: int = 5,
    asr: tuple[float | None, float | None] = (0.02, 0.01),
    reward: tuple[float, float] = (0.4, 0.7),
    tokens: tuple[float, float] = (37.0, 33.0),
    caught: bool | None = None,
    names: dict[int, str] | None = None,
    question: str = "How many pens has she?",
    text: Sequence[str] | None = None,
    recorded: int = 1000,
    verdicts: Sequence[dict[str, Any]] = (),
    change: Change | None = None,
    change_row: Change | None = None,
) -> Path:
    """A run directory as `assay run` leaves it; the last nodes are malicious. With `caught` they are struck in every
    iteration and banned from the third strike on, readmitted never. The ledger has entries of the first `recorded`
    iterations, each with `verdicts`. `change` edits the summary, `change_row` a row."""
    folder.mkdir(parents=True)
    caught = level == "seeded" and malicious > 0 if caught is None else caught
    names = {i: (names or {}).get(i, f"node-{i}") for i in range(nodes)}
    bad = [names[i] for i in range(nodes - malicious, nodes)]
    roles = {name: "malicious" if name in bad else "honest" for name in names.values()}
    rng = random.Random(f"{folder.name}")
    resolved = {"run_id": "0123456789abcdef", "model": {"tiny": "a" * 64}, "versions": {"assay": "0.1.0"}, "experiment": {
        "wing": "swarm", "seed": 0, "model": {"name": "tiny"}, "task": {"name": "word-problems"},
        "swarm": {"nodes": nodes, "malicious": malicious / nodes, "plan": "vertical", "iterations": iterations},
        "attack": {"name": attack}, "defence": {"level": level, "params": {}},
    }}  # fmt: skip
    (folder / "resolved.json").write_text(json.dumps(resolved))
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append("start", {"run": "0123456789abcdef", "public_run": "fedcba9876543210", "model": "b" * 64})
    rows: list[dict[str, Any]] = [
        {"round": 0, "heldout": {"asr": asr[0], "tokens": tokens[0], "reward": reward[0]}, "seconds": {"prepare": 1.2, "evaluate": 2.0}}
    ]  # fmt: skip
    strikes: list[int] = []
    for r in range(1, iterations + 1):
        share = r / iterations
        now = [None if None in pair else pair[0] + share * (pair[1] - pair[0]) for pair in (asr, reward, tokens)]  # type: ignore[operator]
        strikes = [*strikes, r] if caught else []
        banned = bad if len(strikes) >= 3 else []
        row: dict[str, Any] = {
            "round": r,
            "asr": None if now[0] is None else min(1.0, max(0.0, now[0] + rng.uniform(-0.04, 0.04))),
            "occasions": 60, "completion_tokens_mean": now[2], "train_reward": now[1], "loss": 0.01, "grad_norm": 0.4,
            "honest_rejected_rate": 0.004 if level != "none" else 0.0, "honest_right_rejected_rate": 0.003,
            "honest_wrong_rejected_rate": 0.005, "poison_rejected_rate": (0.98 if caught else 0.0) if malicious else None,
            "admitted": {name: (0.0 if name in banned else 0.02) if caught and name in bad else 1.0 for name in roles},
            "banned": banned, "struck": bad if caught else [],
            "reasons": [
                {"screen": level, "reason": level, "honest": 0, "malicious": 40, "sentence": "token 31 misses the seed’s choice by 7.31"},
                {"screen": level, "reason": "group", "honest": 1, "malicious": 7, "sentence": "5 of its group of 12 were refused"},
            ] if caught else [],
            "margins": {"edges": EDGES, "honest": [140, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                        "malicious": [3, 0, 0, 0, 0, 0, 0, 2, 1, 4, 9, 20, 8, 1] if malicious else [0] * 14}
            if level == "seeded" else None,
            "scores": {level: {"honest": [0.0] * 30, "malicious": [7.31] * 10}} if level != "none" else {},
            "shown": shown(bad[0], level, question, text or re.findall(r" ?\S+", TEXT), caught) if malicious else None,
            "seconds": {"generate": 2.1, "screen": 0.02, "update": 1.4, "evaluate": 0.3},
        }  # fmt: skip
        if r % every == 0 or r == iterations:
            row["heldout"] = {"asr": now[0], "tokens": now[2], "reward": now[1]}
        if change_row:
            change_row(row)
        rows.append(row)
        if r > recorded:
            continue
        ledger.append("round", {
            "round": r, "pool": hashlib.sha256(f"{r}".encode()).hexdigest(), "model_before": "c" * 64, "model_after": "d" * 64,
            "contributions": [], "refused": [],
            "learners": {"tiny": {"admitted": 150.0, "verdicts": list(verdicts), "passed": {"schema": 192}, "trust": {
                name.encode("utf-8", "replace").decode(): {"rounds": strikes if name in bad else [], "banned": name in banned, "clean": 0}
                for name in roles
            }}},
        })  # fmt: skip
    summary: dict[str, Any] = {
        "name": f"swarm.{folder.name}", "wing": "swarm", "assay": "0.1.0", "commit": "abc123def456",
        "versions": {"python": "3.11.7", "torch": "2.13.0"}, "machine": {"cpu": "AMD EPYC", "cores": 2},
        "seed": 0, "command": "assay demo", "finished": "2026-11-21T07:00:00Z",
        "model": {"name": "tiny", "sha256": "5af571cbf074e6d2", "dtype": "float32", "all": {"tiny": "5af571cbf074e6d2"}},
        "setting": {"nodes": nodes, "malicious": malicious, "plan": "vertical", "assigned": False, "iterations": iterations,
                    "prompts": 16, "group": 12, "task": "word-problems", "attack": attack, "level": level},
        "participants": roles,
        "seconds": {"prepare": 1.2, "generate": 21.0, "screen": 0.2, "update": 14.0, "evaluate": 5.0, "total": 41.4},
        "metrics": {"asr": asr[1], "completion_tokens_mean": tokens[1], "heldout_reward": reward[1],
                    "honest_rejected_rate": 0.004 if level != "none" else 0.0, "poison_rejected_rate": rows[-1]["poison_rejected_rate"],
                    "asr_peak": asr[1], "heldout_reward_start": reward[0], "completion_tokens_start": tokens[0]},
        "detection": {level: {"auroc": 0.991 if caught else 0.52, "tpr_at_1pct_fpr": 0.97}} if malicious and level != "none" else {},
        "reasons": [{**found, "honest": found["honest"] * iterations, "malicious": found["malicious"] * iterations}
                    for found in rows[-1]["reasons"]],
        "struck": {name: strikes if name in bad else [] for name in roles},
        "banned": {name: strikes[2:] if name in bad else [] for name in roles},
        "ledger": {"entries": len(ledger.entries), "head": ledger.head},
        "defence": {"level": level, "screens": ["schema", level], "monitor": []},
    }  # fmt: skip
    if change:
        change(summary)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shown(node: str, level: str, question: str, tokens: Sequence[str], caught: bool) -> dict[str, Any]:
    """What `evaluate.shown` keeps: the seventh token from the end is the one that gives it away."""
    gaps = [0.0] * len(tokens)
    if caught:
        gaps[-min(7, len(tokens))] = 7.31
    return {
        "participant": node, "question": question, "tokens": list(tokens), "gaps": gaps if level == "seeded" else [], "limit": 0.05,
        "reward": 1.0, "admitted": not caught, "screen": level if caught else "", "reason": level if caught else "ok",
        "sentence": "token 31 misses the seed’s choice by 7.31" if caught else "",
    }  # fmt: skip


def math_runs(tmp: Path, **more: Any) -> list[Path]:
    return [
        make_swarm(tmp / "honest_only", "none", malicious=0, asr=(0.02, 0.01), reward=(0.4, 0.78), **more),
        make_swarm(tmp / "undefended", "none", asr=(0.02, 0.97), reward=(0.4, 0.61), **more),
        make_swarm(tmp / "logit", "logit", asr=(0.02, 0.945), reward=(0.4, 0.63), **more),
        make_swarm(tmp / "seeded", "seeded", asr=(0.02, 0.004), reward=(0.4, 0.74), **more),
    ]


def length_runs(tmp: Path, **more: Any) -> list[Path]:
    more = {"attack": "dos", "asr": (None, None), **more}
    return [
        make_swarm(tmp / "dos.honest_only", "none", malicious=0, **more),
        make_swarm(tmp / "dos.undefended", "none", tokens=(37.0, 61.6), **more),
        make_swarm(tmp / "dos.seeded", "seeded", **more),
    ]


def summary_rows(page: Page) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in page.rows if len(row) == 10}


def test_headline_and_summary_say_what_the_runs_say(tmp_path: Path) -> None:
    page = Page(write(math_runs(tmp_path), tmp_path / "report.html"))
    assert (
        "1 of 4 nodes was malicious. Undefended, the attack’s success rate rose from 0.02 to 0.97; with logit it ended "
        "at 0.95, with seeded at 0.00. Questions answered right at the end: honest only 0.78, undefended 0.61, logit "
        "0.63, seeded 0.74." in page.text
    )
    rows = summary_rows(page)
    assert rows["honest_only"] == ["none", "none", "0.02 → 0.01", "0.40 → 0.78", "37 → 33", "0 %", "–", "–", "41"]
    assert rows["logit"][:6] == ["math", "logit", "0.02 → 0.95", "0.40 → 0.63", "37 → 33", "0.4 %"]
    assert rows["seeded"][6:] == ["98 %", "0.991 seeded", "41"]
    assert "Every token must be the one that its public seed gives" in page.text
    assert [run["name"] for run in page.data["swarm"]["runs"]] == ["honest_only", "undefended", "logit", "seeded"]
    assert page.data["runs"] == []
    for fact in ("assay demo", "abc123def456", "11 entries, chain holds", "12 entries"):
        assert (fact in page.text) == (fact != "12 entries")
    assert f"assay ledger verify {tmp_path / 'seeded'}" in page.text
    assert "Not like for like" not in page.text


def test_strikes_reasons_margins_and_the_poisoned_text(tmp_path: Path) -> None:
    page = Page(write(math_runs(tmp_path), tmp_path / "report.html"))
    assert ["node-3", "malicious", "0.4 %", "1–10", "3–10"] in page.rows
    assert ["node-0", "honest", "100 %", "–", "–"] in page.rows
    assert "No node lost anything in honest_only, undefended, logit." in page.text
    assert "Who is honest and who malicious is the simulation’s knowledge" in page.text
    assert ["seeded", "seeded", "0", "400", "token 31 misses the seed’s choice by 7.31"] in page.rows
    assert ["seeded", "group", "10", "70", "5 of its group of 12 were refused"] in page.rows
    assert ["seeded", "seeded", "0.991", "0.97"] in page.rows
    (grid,) = page.data["swarm"]["grids"]
    assert grid["clients"] == ["node-0", "node-1", "node-2", "node-3"]
    assert grid["z"] == [[1.0] * 10] * 3 + [[0.02, 0.02] + [0.0] * 8]
    assert (grid["struck"], grid["banned"]) == ([[3, j] for j in range(10)], [[3, j] for j in range(2, 10)])
    bars = page.data["swarm"]["margins"]
    assert bars["limits"] == [[3.5, "0.05"]]  # between the bins 0.01-0.05 and 0.05-0.1
    assert [series["name"] for series in bars["series"]] == ["honest", "malicious: math"]
    assert bars["series"][0]["counts"][:4] == [1400, 10, 0, 20]
    assert sum(bars["series"][1]["shares"]) == pytest.approx(1, abs=0.01)
    assert ["0.01–0.05", "20", "0"] in page.rows
    marked = re.findall(r'<mark title="gap ([^"]*)">([^<]*)</mark>', page.source)
    assert marked == [("7.310", " Then")]
    assert (
        "1 of 15 tokens miss what the seed gives by more than 0.05; the largest gap is 7.31, at token 9." in page.text
    )
    assert TEXT in page.text
    assert page.text.count("The same attack in") == 2
    assert "Learnt from, reward 1.00. No gaps are recorded for it." in page.text


def test_courses_carry_training_and_held_out(tmp_path: Path) -> None:
    page = Page(write(math_runs(tmp_path), tmp_path / "report.html"))
    success, reward = page.data["swarm"]["charts"]
    assert (success["key"], reward["key"]) == ("asr", "reward")
    undefended = success["series"][1]
    assert undefended["marks"] == [[0, 0.02], [5, 0.495], [10, 0.97]]
    assert [x for x, _ in undefended["line"]] == list(range(1, 11))
    assert page.rows[0] != ["10", "0.76", "0.78", "0.59", "0.61"]
    assert ["0", "–", "0.40", "–", "0.40", "–", "0.40", "–", "0.40"] in page.rows


def test_attacks_are_set_apart_and_a_defence_looks_the_same_in_each(tmp_path: Path) -> None:
    more = [make_swarm(tmp_path / f"text.{level}", level, attack="text") for level in ("seeded", "logit")]
    page = Page(write([*math_runs(tmp_path), *length_runs(tmp_path), *more], tmp_path / "report.html"))
    looks = {run["name"]: (run["colour"], run["dash"], run["symbol"]) for run in page.data["swarm"]["runs"]}
    assert looks["seeded"] == looks["dos.seeded"] == looks["text.seeded"]
    assert looks["logit"] == looks["text.logit"] != looks["seeded"]
    assert looks["undefended"] == looks["dos.undefended"]
    assert [(chart["key"], len(chart["series"])) for chart in page.data["swarm"]["charts"]] == [
        ("asr", 4), ("reward", 4), ("reward", 3), ("tokens", 3), ("asr", 2), ("reward", 2),
    ]  # fmt: skip
    assert (
        "Over 2 attacks the success rate ended: undefended 0.97, logit 0.01 to 0.95, seeded 0.00 to 0.01." in page.text
    )
    assert "Where nothing is planted, completions ended with: undefended 62, seeded 33 tokens." in page.text
    assert summary_rows(page)["dos.seeded"][2] == "–"
    names = [series["name"] for series in page.data["swarm"]["margins"]["series"]]
    assert names == ["honest", "malicious: math", "malicious: dos", "malicious: text"]


def test_many_runs_of_one_attack_look_unlike(tmp_path: Path) -> None:
    runs = [
        make_swarm(tmp_path / f"r{i}", level, iterations=1) for i, level in enumerate(["seeded", "none", "logit"] * 5)
    ]
    page = Page(write(runs, tmp_path / "report.html"))
    looks = [(run["colour"], run["dash"], run["symbol"]) for run in page.data["swarm"]["runs"]]
    assert len(set(looks)) == len(looks)


def test_both_wings_share_one_page(tmp_path: Path) -> None:
    runs = [
        make_federated(tmp_path / "f" / "step"),
        *math_runs(tmp_path),
        make_federated(tmp_path / "f" / "undefended", "none"),
    ]
    page = Page(write(runs, tmp_path / "report.html", title="Both"))
    assert [run["name"] for run in page.data["runs"]] == ["step", "undefended"]
    assert [run["name"] for run in page.data["swarm"]["runs"]] == ["honest_only", "undefended", "logit", "seeded"]
    assert "Federated fine-tuning: 5 of 10 clients were malicious." in page.text
    assert "Swarm: 1 of 4 nodes was malicious." in page.text
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == tags.count("main") == 1
    assert tags.count("caption") == tags.count("table")
    assert tags.count("nav") == 2
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {"federated", "swarm", "summary", "swarm-summary"} <= set(ids)
    for tag, attributes in page.elements:
        if tag == "a":
            assert (attributes["href"] or "")[1:] in ids
        if "data-chart" in attributes or attributes.get("role") == "region":
            assert attributes["aria-label"]
        for name in ("src", "srcset", "data", "action", "style"):
            assert name not in attributes
    assert sum(tag == "script" for tag in tags) == 3


def test_a_page_of_one_wing_does_not_speak_of_the_other(tmp_path: Path) -> None:
    swarm = Page(write(math_runs(tmp_path), tmp_path / "swarm.html"))
    federated = Page(write(federated_runs(tmp_path / "f"), tmp_path / "federated.html"))
    for word in ("client", "Refusal of harmful", "federated", "Benign loss"):
        assert word not in swarm.text
    for word in ("node-", "ASR", "swarm", "margin", "GRPO"):
        assert word not in federated.text
    assert federated.data["swarm"] == {
        "runs": [], "charts": [], "margins": None, "grids": [], "cost": {"stages": [], "screening": [], "seconds": []},
        "people": {"names": [], "runs": [], "texts": [], "forms": []},
    }  # fmt: skip


def test_unfinished_runs_are_told_by_their_config(tmp_path: Path) -> None:
    killed = make_swarm(tmp_path / "swarm.killed", names={0: "node-<b>"})
    (killed / "summary.json").unlink()
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    (killed / "metrics.jsonl").write_text("\n".join(lines[:8]) + '\n{"round": 8, "as')
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "resolved.json").write_text((killed / "resolved.json").read_text())
    (fresh / "metrics.jsonl").touch()
    page = Page(write([killed, fresh, *math_runs(tmp_path)], tmp_path / "report.html"))
    assert "killed is unfinished: 7 iterations so far. It is left out of the sentence above." in page.text
    assert "fresh is unfinished: 0 iterations so far" in page.text
    assert "killed: the last line of metrics.jsonl is torn and left out" in page.text
    rows = summary_rows(page)
    assert rows["killed unfinished"][:5] == [
        "math",
        "seeded",
        "0.02 → 0.02",
        "0.40 → 0.55",
        "37 → 35",
    ]  # held out at iteration 5
    assert rows["killed unfinished"][5:7] == ["0.4 %", "98 %"]
    assert ["node-3", "unknown", "0.6 %", "1–7", "3–7"] in page.rows
    assert ["seeded", "seeded", "0", "280", "token 31 misses the seed’s choice by 7.31"] in page.rows
    alone = Page(write([fresh], tmp_path / "alone.html"))
    assert "No run is finished yet" in alone.text
    assert alone.data["swarm"]["grids"] == []


def test_runs_without_margins_or_malicious_nodes_say_so(tmp_path: Path) -> None:
    page = Page(write(math_runs(tmp_path)[:2], tmp_path / "report.html"))
    assert page.data["swarm"]["margins"] is None
    assert "No run measured margins: only the seeded check does." in page.text
    assert "No node lost anything in any run." in page.text
    assert not any(attributes.get("data-chart") in ("margins", "grid") for _, attributes in page.elements)
    honest = Page(write(math_runs(tmp_path / "again")[:1], tmp_path / "honest.html"))
    assert "Every node was honest." in honest.text
    assert "poison" not in [attributes.get("class") for _, attributes in honest.elements]
    assert not any(attributes.get("id") == "swarm-poison" for _, attributes in honest.elements)


def test_what_is_bad_is_said_beside_the_headline(tmp_path: Path) -> None:
    def change(summary: dict[str, Any]) -> None:
        summary["metrics"] |= {"honest_rejected_rate": 0.31, "heldout_reward": 0.2}

    def ban(row: dict[str, Any]) -> None:
        row["banned"] = ["node-0"] if row["round"] == 4 else []

    strict = make_swarm(tmp_path / "strict", change=change, change_row=ban)
    other = make_swarm(tmp_path / "other", change=lambda summary: summary["setting"].update(learning_rate=1.0))
    page = Page(write([strict, other], tmp_path / "report.html"))
    assert "strict: 31 % of honest completions were refused or lost their reward" in page.text
    assert "strict: training made answers worse: held-out reward fell from 0.40 to 0.20" in page.text
    assert "strict: 1 honest node was banned for a time" in page.text
    assert "strict: metrics.jsonl and the ledger disagree on who was struck or banned in 8 iterations" in page.text
    assert "differ in learning_rate (– / 1.0)" in page.text
    assert "other: metrics.jsonl and the ledger disagree" not in page.text


def test_tampered_and_missing_ledgers_are_said(tmp_path: Path) -> None:
    edited, without = make_swarm(tmp_path / "edited"), make_swarm(tmp_path / "without")
    text = (edited / "ledger.jsonl").read_text()
    (edited / "ledger.jsonl").write_text(text.replace('"admitted":150.0', '"admitted":151.0', 1))
    (without / "ledger.jsonl").unlink()
    page = Page(write([edited, without], tmp_path / "report.html"))
    assert "edited: the ledger is broken, do not rely on this run (entry 1:" in page.text
    assert "without: there is no ledger" in page.text
    assert "chain BROKEN" in page.text


@pytest.mark.parametrize(
    "text", [HOSTILE, "</script ><!-- <script ", LINK, BIDI, "__proto__", "x" * 5000, "$title ${title} %{x} &lt;b&gt;"]
)
def test_hostile_text_is_inert(tmp_path: Path, text: str) -> None:
    def change(summary: dict[str, Any]) -> None:
        summary["reasons"][0].update(sentence=text, reason=text, screen=text)
        summary["detection"][text] = {"auroc": 1.0}
        summary["command"] = summary["name"] = summary["model"]["name"] = text
        summary["setting"][text] = summary["setting"]["attack"] = summary["setting"]["level"] = summary["defence"][
            "level"
        ] = text
        summary["seconds"][text] = 3.0

    def change_row(row: dict[str, Any]) -> None:
        row["shown"] |= {"sentence": text, "reason": text, "screen": text, "participant": text}

    plain = Page(write([make_swarm(tmp_path / "plain")], tmp_path / "plain.html"))
    run = make_swarm(
        tmp_path / "hostile", names={0: text, 3: f"{text}!"}, question=text, text=[text] * 400, change=change, change_row=change_row
    )  # fmt: skip
    page = Page(write([run], tmp_path / "hostile.html", title=text))
    assert {tag for tag, _ in page.elements} - {"i", "br"} <= {tag for tag, _ in plain.elements} | {"i"}
    assert sum(tag == "script" for tag, _ in page.elements) == 3
    assert not any(attr.startswith("on") for _, attributes in page.elements for attr in attributes)
    assert all((a.get("href") or "#").startswith("#") for _, a in page.elements)
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00]", page.source)
    assert len(page.source) - len(plain.source) < 400_000
    if text == HOSTILE:
        assert HOSTILE in page.data["swarm"]["grids"][0]["clients"]
        assert page.text.count('onerror="owned()"') > 3


def test_what_a_screen_of_texts_objected_to_is_marked(tmp_path: Path) -> None:
    def change_row(row: dict[str, Any]) -> None:
        row["shown"] |= {"gaps": [], "marked": [1, 2, 10_000, -1], "screen": "arithmetic"}

    made = make_swarm(tmp_path / "text", "text", text=["It ", "is ", "2+2=5", ". ", "So"], change_row=change_row)
    page = Page(write([made], tmp_path / "report.html"))
    assert re.findall(r"<mark>([^<]*)</mark>", page.source)[-2:] == ["is ", "2+2=5"]
    assert "2 of 5 tokens are what it objects to." in page.text
    assert "No gaps are recorded" not in page.text


def test_long_text_and_late_tokens_are_cut_around_what_gave_it_away(tmp_path: Path) -> None:
    tokens = [f" w{i}" for i in range(1000)] + ["X" * 900] * 7
    page = Page(write([make_swarm(tmp_path / "long", text=tokens, question="why " * 5000)], tmp_path / "report.html"))
    (marked,) = re.findall(r'<mark title="gap 7.310">([^<]*)</mark>', page.source)
    assert marked == "X" * 48 + "…"
    assert "[976 tokens before]" in page.text
    assert " w975" not in page.text.replace("…", "")
    assert "w976 w977" in page.text
    assert "why " * 140 in page.text
    assert "why " * 160 not in page.text


def test_a_thousand_iterations_of_many_nodes_stay_small(tmp_path: Path) -> None:
    small = write([make_swarm(tmp_path / "small", iterations=1)], tmp_path / "small.html")
    runs = [
        make_swarm(tmp_path / f"long{i}", level, nodes=nodes, malicious=nodes // 4, iterations=1000, recorded=20)
        for i, (level, nodes) in enumerate([("seeded", 4), ("seeded", 130), ("none", 4)])
    ]
    path = write(runs, tmp_path / "long.html")
    assert (
        path.stat().st_size - small.stat().st_size < 1_000_000
    )  # 138,000 shares of nodes and iterations, and what became of 33 malicious ones
    page = Page(path)
    for chart in page.data["swarm"]["charts"]:
        for series in chart["series"]:
            assert 40 < len(series["line"]) <= swarm_charts.POINTS
            assert series["line"][-1][0] == 1000
            assert len(series["marks"]) <= swarm_charts.POINTS
    few, many = page.data["swarm"]["grids"]
    assert len(few["rounds"]) <= swarm_charts.COLUMNS
    assert few["spans"][-1].endswith("1000")
    assert len(many["clients"]) == swarm_charts.ROWS
    assert many["roles"].count("malicious") == 32  # those that lost something come first
    assert len(many["clients"]) * len(many["rounds"]) <= swarm_charts.CELLS
    assert "30 nodes more are not listed" in page.text
    assert len([row for row in page.rows if len(row) == 7 and row[0] == "1000"]) == 2


def test_damaged_files_are_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    def short(row: dict[str, Any]) -> None:
        row["margins"]["honest"] = [1]

    def falling(row: dict[str, Any]) -> None:
        row["margins"]["edges"] = EDGES[::-1]

    odd = make_swarm(tmp_path / "odd")
    (odd / "resolved.json").write_text("{")
    empty = make_swarm(tmp_path / "empty")
    (empty / "summary.json").write_text("null")
    cases = [
        (make_swarm(tmp_path / "short", change_row=short), "must be of one length"),
        (make_swarm(tmp_path / "falling", change_row=falling), "edges must rise"),
        (make_swarm(tmp_path / "wrong", change=lambda s: s.update(participants=[1])), "is damaged at 'participants'"),
        (make_swarm(tmp_path / "negative", change_row=lambda row: row.update(round=-1)), "is damaged at 'round'"),
        (odd, "resolved.json is not JSON"),
        (empty, "is damaged at 'name'"),
    ]
    for directory, message in cases:
        with pytest.raises(ReportError, match=re.escape(message)) as caught:
            write([directory], tmp_path / "report.html")
        assert "\n" not in str(caught.value)


def test_numbers_that_are_not_there_are_dashes(tmp_path: Path) -> None:
    def bare(row: dict[str, Any]) -> None:
        for key in [key for key in row if key != "round"]:
            row[key] = None if key in ("asr", "margins", "shown", "train_reward", "honest_rejected_rate") else row[key]
        row["completion_tokens_mean"] = math.nan
        row.pop("heldout", None)
        row["admitted"] = {"node-0": None}

    def change(summary: dict[str, Any]) -> None:
        summary["metrics"] = {"asr": math.inf}
        summary["detection"] = {"seeded": {"auroc": None}}
        summary["seed"] = None
        for key in ("seconds", "setting", "participants", "defence", "reasons"):
            summary.pop(key)

    run = make_swarm(tmp_path / "bare", change=change, change_row=bare)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[0] = {"round": 0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write([run], tmp_path / "report.html"))
    assert summary_rows(page)["bare"] == ["–", "–", "–", "–", "–", "–", "–", "–", "–"]
    assert "Which nodes were malicious is not known. What the attack achieved was not measured." in page.text
    assert "No seed is recorded" in page.text
    assert not re.search(r"\b(nan|NaN|Infinity|None|null)\b", page.text)


def test_labels_and_bytes_are_reproducible(tmp_path: Path) -> None:
    runs = [make_swarm(tmp_path / place / "x", change=lambda s: s.update(name="swarm.same")) for place in ("p", "q")]
    federated = make_federated(tmp_path / "same")
    first, second = (write([*runs, federated], tmp_path / name) for name in ("1.html", "2.html"))
    assert [run["name"] for run in Page(first).data["swarm"]["runs"]] == ["same (x) #1", "same (x) #2"]
    assert [run["name"] for run in Page(first).data["runs"]] == ["same"]  # another wing's name is no clash
    assert first.read_bytes() == second.read_bytes()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=3000), st.integers(3, 200))
@settings(max_examples=60, deadline=None)
def test_thinning_keeps_ends_order_and_range(values: list[float], most: int) -> None:
    points = [(float(i), value) for i, value in enumerate(values)]
    thin = swarm_charts._thin(points, most)
    assert len(thin) <= max(most, 3)
    assert thin[0][0] == 0
    assert thin[-1][0] == len(values) - 1
    assert [x for x, _ in thin] == sorted({x for x, _ in thin})
    assert all(min(values) - 1e-3 <= y <= max(values) + 1e-3 for _, y in thin)


@given(st.sets(st.integers(0, 60)))
@settings(deadline=None)
def test_ranges_name_exactly_the_iterations(numbers: set[int]) -> None:
    said = set()
    for part in swarm_words.ranges(sorted(numbers), longest=99).split(", "):
        if part != "–":
            low, _, high = part.partition("–")
            said |= set(range(int(low), int(high or low) + 1))
    assert said == numbers


@pytest.mark.parametrize(
    ("limit", "place"),
    [(0.05, 3.5), (0.0, -0.5), (1e-4, 0.5), (0.75, 7.0), (1.5, 8.0), (32.0, 13.0), (99.0, 13.0), (-1.0, -0.5)],
)
def test_the_limit_stands_where_its_bin_is(limit: float, place: float) -> None:
    assert swarm_charts._place(EDGES, limit) == pytest.approx(place)


@pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome on PATH")
def test_charts_are_drawn_in_a_browser(tmp_path: Path) -> None:
    hostile = {0: HOSTILE, 1: LINK, 3: "<b>b</b>"}
    runs = [*federated_runs(tmp_path / "f"), *math_runs(tmp_path, names=hostile), *length_runs(tmp_path)]
    killed = make_swarm(tmp_path / "killed", text=[HOSTILE, LINK] * 8)
    (killed / "summary.json").unlink()
    page = write([*runs, killed], tmp_path / "report.html")
    shot = tmp_path / "shot.png"
    dom = browse(page, tmp_path, "--window-size=1366,9000", f"--screenshot={shot}", "--dump-dom")
    html = re.search(r"<html[^>]*>", dom)
    assert html
    assert 'data-assay="ready"' in html[0], html[0]
    assert "data-errors" not in html[0]
    # federated: three lines, weights and means of two runs, cost; swarm: two courses of each attack, margins,
    # grids of seeded, dos.seeded and killed, cost
    assert 'data-charts="17"' in html[0]
    assert "data-owned" not in html[0]
    body = dom.split('<script type="application/json"')[0]
    assert body.count("js-plotly-plot") == 17
    assert not re.search(r"<a[^>]*evil", body)
    assert not re.search(r"<img|xlink:href=\"http", body)
    assert "&lt;b&gt;b&lt;/b&gt;</text>" in body  # plotly would have made it bold
    assert _values(shot) > 100
