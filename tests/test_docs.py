"""What the docs say is so: their commands parse, their code runs, every section of the report is explained, links hold."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer

from assay import config, ledger
from assay.cli import app
from assay.federated import aggregators, attacks, population, screens
from assay.report import swarm_view, view

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PLUGIN = ROOT / "examples" / "plugin"


def commands(page: Path) -> Iterator[list[str]]:
    """Commands of Assay in code blocks, fenced or indented, as a shell would split them."""
    text = page.read_text().replace("\\\n", " ")
    fenced = re.findall(r"^```(?:sh|shell|bash)\n(.*?)^```", text, re.S | re.M)
    blocks = [*fenced, *re.findall(r"^ {4,}(\S.*)$", text, re.M)]
    for block in blocks:
        for line in block.splitlines():
            if line.strip().startswith("assay ") and "|" not in line:
                yield shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_parse_and_files_they_name_are_here(page: Path) -> None:
    root = typer.main.get_command(app)
    for words in commands(page):
        command, rest, path = root, words, "assay"
        while hasattr(command, "commands") and rest and rest[0] in command.commands:
            command, path, rest = command.commands[rest[0]], f"{path} {rest[0]}", rest[1:]
        command.make_context(path, list(rest))  # raises for unknown commands and options, runs nothing
        for word in rest:
            if word.startswith("examples/"):
                assert (ROOT / word).exists(), f"{page.name}: {word}"


def test_the_experiment_of_the_quick_start_finds_its_rows() -> None:
    """Parsing is not enough: twenty clients want more rows than the built-in data have, unless told otherwise."""
    (text,) = re.findall(r"^```toml\n(.*?)^```", (ROOT / "docs" / "QUICKSTART.md").read_text(), re.S | re.M)
    experiment = config.parse(tomllib.loads(text))
    assert isinstance(experiment, config.Experiment)
    clients = population.make_clients(experiment, population.load_sources(experiment))
    assert len(clients) == experiment.clients.total
    assert sum(client.malicious for client in clients) == experiment.clients.malicious_count
    assert population.make_attack(experiment).parts
    assert aggregators.from_config(experiment.aggregation, {}) is not None


def test_the_pages_with_commands_are_read() -> None:
    found = {page.name: len(list(commands(page))) for page in PAGES}
    assert found["README.md"] > 5
    assert found["QUICKSTART.md"] > 3


def test_every_section_of_the_report_is_explained() -> None:
    text = (ROOT / "docs" / "REPORT.md").read_text()
    for _, heading in (*view.SECTIONS, *swarm_view.SECTIONS):
        assert f"**{heading}**" in text, heading


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_are_committed_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code), f"{path}: strip its outputs"


def test_code_of_the_contributing_page_runs() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    for block in blocks:
        exec(block, named)  # our own page, not a peer's
    assert np.array_equal(named["aggregate"](np.ones((2, 3), np.float32), [1, 1]), np.full(3, 0.5, np.float32))  # type: ignore[operator]
    shown = tomllib.loads("\n".join(re.findall(r"^```toml\n(.*?)^```", text, re.S | re.M)))
    assert shown["project"]["entry-points"] == entry_points()


def entry_points() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]["entry-points"]
    return found


def install(folder: Path) -> Path:
    """What `pip install examples/plugin` leaves, without a package index: metadata beside the module."""
    info = folder / "assay_example_plugin-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: assay-example-plugin\nVersion: 0.1.0\n")
    groups = entry_points().items()
    text = "\n".join(f"[{group}]\n" + "\n".join(f"{n} = {t}" for n, t in names.items()) for group, names in groups)
    (info / "entry_points.txt").write_text(text)
    (folder / "assay_example.py").write_text((PLUGIN / "assay_example.py").read_text())
    return folder


def test_the_example_plugin_is_found_by_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(install(tmp_path)))
    agreed = aggregators.make("majority", share=0.6)
    delta_ND = np.array([[1, 1], [1, -1], [1, 1]], np.float32)
    assert np.array_equal(agreed(delta_ND, [1, 1, 1]), np.float32([1, 1 / 3]))
    assert np.array_equal(agreed(delta_ND, [1, 1, 0]), np.float32([1, 0])), "half is not more than 0.6"
    attack = attacks.make("late_flip", {"after": 2})
    assert [attack.active(round) for round in (1, 2, 3)] == [False, False, True]
    assert screens.make("against", limit=-0.1).name == "against"
    with pytest.raises(config.ConfigError, match="no such parameter"):
        attacks.make("late_flip", {"before": 1})
    assert config.load(PLUGIN / "try.toml").name == "plugin"


@pytest.mark.slow
def test_the_example_plugin_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack is honest for a round; then its screen refuses what points against the others."""
    monkeypatch.setenv("PYTHONPATH", str(install(tmp_path / "site")), prepend=":")
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "assay", "run", str(PLUGIN / "try.toml"), "--out", str(out), "--json"],
        capture_output=True, text=True, timeout=900, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout)
    bad = {name for name, role in summary["participants"].items() if role == "malicious"}
    entries = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    rounds = [entry["body"] for entry in entries if entry["kind"] == "round"]
    refused = [
        {v["participant"] for v in r["verdicts"] if v["screen"] == "against" and v["weight"] == 0} for r in rounds
    ]
    assert bad
    assert refused == [set(), bad]
    said = [v for r in rounds for v in r["verdicts"] if v["screen"] == "against"]
    assert {v["reason"] for v in said} == {"ok", "assay-example-plugin:against"}
    assert all((v["evidence"]["cosine"] >= v["evidence"]["cosine_floor"]) == (v["weight"] == 1) for v in said)
    assert [(r["screen"], r["reason"]) for r in summary["reasons"]] == [("against", "assay-example-plugin:against")]
    assert "assay-example-plugin:against" in (out / "report.html").read_text()
    assert ledger.verify(out / "ledger.jsonl", summary["ledger"]["head"]).ok


@pytest.mark.slow
def test_a_broken_link_fails_the_site(tmp_path: Path) -> None:
    """The site's own settings on two pages: links to a page, a heading and a folder pass, links to nothing do not."""

    def build(*links: str) -> subprocess.CompletedProcess[str]:
        lines = "".join(f"[there]({link})\n" for link in links)
        (tmp_path / "docs" / "index.md").write_text(f"# First\n\n{lines}\n```{{toctree}}\n../README\n```\n")
        return subprocess.run(
            [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-c", "docs", "-d", "trees", ".", "site"],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    (tmp_path / "docs" / "root").mkdir(parents=True)
    (tmp_path / "docs" / "conf.py").write_text((ROOT / "docs" / "conf.py").read_text())
    (tmp_path / "README.md").write_text("# Title\n\n## A heading\n\nText, and [a folder](docs).\n")
    done = build("../README.md", "../README.md#a-heading")
    assert done.returncode == 0, done.stderr
    broken = ("../MISSING.md", "../README.md#no-heading", "NOWHERE")
    done = build("../README.md", *broken)
    assert done.returncode != 0
    for link in broken:
        assert link.split("#")[-1] in done.stderr, link
