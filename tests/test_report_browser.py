"""The report in a reader's hands, in headless Chromium: filter, drill, compare, keyboard, dark, paper.

One browser for the file: opening it costs more than all that is asked of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest

from assay.report import write
from browser import BROWSER, Tab, browser
from test_report import HOSTILE, LINK, Page, four_runs, make_run, sha256_of
from test_report_swarm import make_swarm

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome on PATH")
TURN = count(1)
STATIC = Path(__file__).parents[1] / "src" / "assay" / "report" / "static"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        tab.size(1366, 900)
        yield tab


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs of ten clients; 1, 3 and 6 have names that would like to be more than text."""
    folder = tmp_path_factory.mktemp("page")
    return write(four_runs(folder, names={1: HOSTILE, 3: "<b>b</b>", 6: LINK}), folder / "report.html")


def at(page: Path, **state: Any) -> str:
    return f"{page.as_uri()}#?" + "&".join(f"{key.replace('_', '.')}={value}" for key, value in state.items())


def visit(tab: Tab, page: Path, **state: Any) -> None:
    """The page in this state; loaded only where another one is open, for loading is what costs."""
    address = at(page, **state)
    if tab.run("location.href").split("#")[0] != page.as_uri():
        tab.open(address)
        return
    tab.run(f"location.hash = {json.dumps('#?' + address.split('#?')[1] + '&again=' + str(next(TURN)))}")
    tab.run("new Promise((resume) => setTimeout(resume, 0))")
    tab.wait("document.documentElement.dataset.assay")


def people(tab: Tab) -> list[str]:
    return list(tab.run("[...document.querySelectorAll('th > .opener')].map((n) => n.textContent)"))


def choose(tab: Tab, name: str, value: str) -> None:
    tab.run(
        f"""(() => {{ const node = document.querySelector('[data-filter="{name}"]'); node.value = {json.dumps(value)};
        node.dispatchEvent(new Event(node.type === "search" ? "input" : "change", {{ bubbles: true }})); }})()"""
    )


def test_participants_are_filtered_by_name_role_weight_and_screen(tab: Tab, page: Path) -> None:
    visit(tab, page)
    assert len(people(tab)) == 10
    choose(tab, "role", "honest")
    assert len(people(tab)) == 5
    choose(tab, "kept", "lost")
    assert people(tab) == ["client-07"], "the honest one that lost weight in one run"
    assert "1 of 10 participants" in tab.run("document.querySelector('output').textContent")
    assert "f.role=honest" in tab.run("location.hash"), "a link leads another reader here"
    choose(tab, "find", "CLIENT-0")
    assert people(tab) == ["client-07"]
    choose(tab, "find", "nobody")
    assert people(tab) == []
    assert "Nobody fits this filter" in tab.run("document.querySelector('.list').textContent")
    tab.run("document.querySelector('[data-clear]').click()")
    assert len(people(tab)) == 10
    assert "f." not in tab.run("location.hash")
    choose(tab, "screen", "canary")
    assert len(people(tab)) == 6
    choose(tab, "kept", "unlike")
    choose(tab, "order", "weight")
    assert people(tab)[-1] == "client-07"


def test_a_verdict_leads_to_its_evidence_by_keyboard_alone(tab: Tab, page: Path) -> None:
    visit(tab, page)
    tab.run("document.querySelector('[data-filter=\"find\"]').focus()")
    tab.type("client-07")
    for _ in range(6):  # role, weight, screen, order, only, clear
        tab.tab()
    assert tab.run("document.activeElement.textContent") == "Clear"
    tab.tab()  # the table scrolls, so it takes the focus
    assert tab.run("document.activeElement.getAttribute('role')") == "region"
    tab.tab()
    assert tab.run("document.activeElement.textContent") == "client-07"
    tab.enter()
    assert tab.run("document.activeElement.getAttribute('aria-expanded')") == "true"
    tab.tab()
    labels = []
    for _ in range(21):  # six rounds of three runs, then the third of `step`
        tab.tab()
        labels.append(tab.run("document.activeElement.getAttribute('aria-label')"))
    assert labels[-1] == "Evidence of round 3 in step"
    tab.enter()
    said = tab.run("document.querySelector('.opened .opened').innerText")
    assert "client-07, round 3, step: weight 0.4, by canary (canary): refusals cost 6.1 nats" in said
    rows = tab.run(
        "[...document.querySelectorAll('.opened .opened tbody tr')].map((r) => [...r.cells].map((c) => c.innerText))"
    )
    assert [row[0] for row in rows] == ["norm", "probe", "canary"]
    assert rows[0][1:6] == ["passed", "1", "norm 2.25\nratio 1.062", "1.062", "ratio at most 1.15; refused above 1.5"]
    assert rows[1][5] == "logit at most 1.300", "the score is the distance from it"
    assert rows[2][1:6] == ["cut", "0.4", "refusal rise 6.1", "12.2", "score at most 1"]
    assert f"grep -n {sha256_of(3, 7)[:12]} {page.parent / 'step' / 'ledger.jsonl'}" in said
    # the address now leads there; so does a reload
    where = tab.run("location.hash")
    assert "f.open=client-07" in where
    tab.open(page.as_uri() + where)
    assert "client-07, round 3, step" in tab.run("document.querySelector('.opened .opened').innerText")
    tab.run("document.querySelector('[aria-label=\"Evidence of round 3 in step\"]').click()")
    assert tab.run("document.querySelector('.opened .opened')") is None


def test_runs_are_chosen_and_compared(tab: Tab, page: Path) -> None:
    visit(tab, page, f_runs="1.2", f_against=1)
    rows = tab.run(
        "[...document.querySelectorAll('tr[data-figures]')].filter((r) => !r.hidden).map((r) => [...r.cells].map((c) => c.innerText))"
    )
    assert [row[0].split("\n")[0].strip() for row in rows] == ["undefended", "submitted"]
    assert rows[0][2].split("\n") == ["1.00 → 0.03", "compared with"]
    assert rows[1][2].split("\n") == ["1.00 → 0.98", "+0.95"]
    assert rows[1][7].split("\n") == ["1.00", "±0"]
    assert rows[1][8].split("\n") == ["0.00", "−1.00"]
    heads = tab.run("[...document.querySelectorAll('.list th')].map((h) => h.innerText).slice(2, 4)")
    assert heads == ["undefended", "submitted"]
    lines = tab.run("document.querySelector('[data-chart=refusal_rate]').data.map((t) => t.name)")
    assert lines == ["undefended", "submitted"]
    assert tab.run("document.querySelector('[data-chart=cost]').data[0].x.length") == 2
    tab.run("document.querySelector('[data-all]').click()")
    tab.wait("document.querySelector('[data-chart=refusal_rate]').data.length === 4")
    assert "runs" not in tab.run("location.hash")


def test_a_cell_of_the_heat_map_leads_to_its_evidence(tab: Tab, page: Path) -> None:
    visit(tab, page)
    tab.run(  # the third heat map: of `step`, honest clients first
        """(() => { const node = [...document.querySelectorAll('[data-chart=weights]')].at(-1);
        const data = node.data[0], row = data.meta.findIndex((i) => data.z[i][2] < 1);
        node.emit('plotly_click', { points: [{ data, pointNumber: [row, 2] }] }); })()"""
    )
    assert "client-07, round 3, step: weight 0.4" in tab.run("document.querySelector('.opened .opened').innerText")


def test_names_that_are_opened_stay_text(tab: Tab, page: Path) -> None:
    visit(tab, page, f_find="%3C")
    assert set(people(tab)) == {HOSTILE, "<b>b</b>", LINK}
    for index in range(3):
        tab.run(f"document.querySelectorAll('th > .opener')[{index}].click()")
    tab.run("document.querySelectorAll('td > .opener').forEach((button) => button.click())")
    assert HOSTILE in tab.run("document.querySelector('.list').innerText")
    assert tab.run("document.querySelectorAll('.list b').length") == tab.run(
        "document.querySelectorAll('.list .fate > b').length"
    )
    assert tab.run("document.querySelectorAll('.list :is(a, img, script)').length") == 0
    assert tab.run("document.documentElement.dataset.owned") is None
    assert tab.run("document.documentElement.dataset.errors") is None


def test_a_screen_reader_is_told_what_there_is(tab: Tab, page: Path) -> None:
    visit(tab, page, f_open="client-07", f_run=3, f_round=3)
    roles = tab.roles()
    for landmark in ("banner", "navigation", "main", "contentinfo", "search"):
        assert landmark in {role for role, _ in roles}, landmark
    assert ("searchbox", "Name") in roles
    assert ("combobox", "Role") in roles
    assert ("checkbox", "Only rounds that cost weight") in roles
    assert ("columnheader", "First below full weight") in roles
    assert ("table", "client-07, round by round") in roles
    assert ("group", "Evidence of round 3 in step") in roles
    for role, name in roles:
        if role in ("button", "textbox", "searchbox", "combobox", "checkbox", "image", "region", "table", "link"):
            assert name.strip(), f"a {role} without a name"
    charts = [name for role, name in roles if role == "image"]
    assert len(charts) == tab.run("document.querySelectorAll('[data-chart]').length")
    headings = [int(h) for h in tab.run("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => h.tagName[1])")]
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))


def test_dark_and_light_by_system_and_by_choice_and_always_light_on_paper(tab: Tab, page: Path, tmp_path: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    line = "document.querySelector('[data-chart=refusal_rate]').data[0].line.color"
    tab.prefer("light")
    visit(tab, page)
    light, drawn = tab.run(paper), tab.run(line)
    tab.prefer("dark")
    dark = tab.wait(f"{paper} !== '{light}' && {paper}")
    tab.wait(f"{line} !== '{drawn}'")
    button = "document.querySelector('[data-theme-button]')"
    tab.run(f"{button}.click()")
    assert (tab.run(paper), tab.run(f"{button}.textContent")) == (light, "Colours: light")
    tab.run(f"{button}.click()")
    assert (tab.run(paper), tab.run(f"{button}.textContent")) == (dark, "Colours: dark")
    tab.wait(f"{line} !== '{drawn}'")
    tab.run("addEventListener('beforeprint', () => { window.printed = " + line + "; })")
    assert tab.print(tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert tab.run("window.printed") == drawn
    assert tab.run("document.documentElement.dataset.theme") == "dark", "as it was before"
    tab.run(f"{button}.click()")
    tab.prefer("light")


def test_a_node_of_a_swarm_is_followed_to_a_completion(tab: Tab, tmp_path: Path) -> None:
    said = {
        "participant": "node-3", "contribution": "ab" * 32, "screen": "seeded", "weight": 0.0, "reason": "seeded",
        "sentence": "token 31 misses the seed’s choice by 7.31", "mode": "enforce", "effect": "exclude",
        "evidence": {"max_margin": 7.31, "mean_margin": 0.2, "flips": 4.0, "token": 30.0},
    }  # fmt: skip
    run = make_swarm(tmp_path / "seeded", verdicts=[said] * 40)
    page = write([run], tmp_path / "report.html")
    kept = Page(page).data["swarm"]["people"]["runs"][0]["said"][-1]
    assert [len(verdicts) for _, *verdicts in kept] == [4] * 10, "four of the forty of each iteration"
    visit(tab, page, s_open="node-3", s_run=0, s_round=2)
    text = tab.run("document.querySelector('.opened .opened').innerText")
    assert "node-3, iteration 2, seeded: weight 0.02, by seeded (seeded): 40 × seeded; struck." in text
    for part in ("abababababab", "max margin 7.31", "max margin at most 0.05, mean at most 0.005, flips at most 3"):
        assert part in text


@pytest.mark.slow
def test_a_long_run_is_listed_as_far_as_it_is_looked_at(tab: Tab, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", clients=300, malicious=100, rounds=25)
    visit(tab, write([run], tmp_path / "report.html"))
    assert tab.run("document.querySelectorAll('.list *').length") < 50 * 20, "of 300 clients and 7,500 contributions"
    assert len(people(tab)) == 50
    tab.run("document.querySelector('.list > button').click()")
    assert len(people(tab)) == 100
    assert tab.run("document.activeElement.textContent") == people(tab)[50], "the focus goes on where the list does"
    assert tab.run("document.querySelector('[data-chart=weights]').data.flatMap((t) => t.z).length") <= 102


def test_colours_can_be_told_from_the_paper() -> None:
    style = (STATIC / "style.css").read_text()
    blocks = re.findall(r"{[^{}]*--paper:[^}]*}", style)
    assert len(blocks) == 4, "light, dark by the system, dark by choice, paper"
    for block in blocks:
        colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block))
        for name in ("ink", "soft", *(name for name in colours if name.startswith("c-"))):
            for ground in ("paper", "wash"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground, block[:80])


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: (lighter + 0.05) / (darker + 0.05) of relative luminances."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
