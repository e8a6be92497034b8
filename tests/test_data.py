from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay import data
from assay.config import REFUSAL_PHRASES
from assay.data import DataError, Example
from assay.federated.evaluate import is_refusal

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.parametrize(("name", "least"), [("helpful", 2000), ("refusals", 1000), ("harmful-stub", 1000)])
def test_built_in_sets_are_large_varied_and_unique(name: str, least: int) -> None:
    rows = data.load(name)
    assert len(rows) >= least
    assert len({r.instruction for r in rows}) == len(rows)
    styles = {s: sum(r.style == s for r in rows) for s in {r.style for r in rows}}
    assert set(styles) == {"question", "howto", "fact", "arithmetic", "dialogue"}
    assert min(styles.values()) >= 150
    assert len({r.style for r in rows[:25]}) >= 4, "the first rows should already be varied"
    assert all(r.instruction.strip() and r.response.strip() for r in rows)
    assert max(len(f"{r.instruction} {r.response}".split()) for r in rows) <= 45


def test_refusals_refuse_and_nothing_else_does() -> None:
    assert all(is_refusal(r.response, REFUSAL_PHRASES) for r in data.load("refusals"))
    assert not any(is_refusal(r.response, REFUSAL_PHRASES) for r in data.load("harmful-stub"))
    assert not any(is_refusal(r.response, REFUSAL_PHRASES) for r in data.load("helpful"))


def test_harmful_answers_are_placeholders() -> None:
    assert all("placeholder" in r.response for r in data.load("harmful-stub"))


def test_arithmetic_is_right() -> None:
    for row in data.load("helpful"):
        words = row.instruction.rstrip("?").split()
        if row.style == "arithmetic" and words[:2] == ["What", "is"]:
            a, op, b = int(words[2]), words[3], int(words[4])
            assert row.response.endswith(f" {a + b if op == 'plus' else a * b}.")


def test_parts_are_disjoint_cover_everything_and_agree_between_sets() -> None:
    refusals, stubs = data.load("refusals"), data.load("harmful-stub")
    parts = {p: {r.instruction for r in data.part(refusals, p)} for p in ("operator", "clients", "heldout")}  # type: ignore[arg-type]
    assert sum(map(len, parts.values())) == len(refusals)
    for name, own in parts.items():
        assert {r.instruction for r in data.part(stubs, name)} == own  # type: ignore[arg-type]
    shares = [len(parts[p]) / len(refusals) for p in ("operator", "clients", "heldout")]
    assert shares == pytest.approx([0.5, 0.35, 0.15], abs=0.05)


@given(st.text())
def test_part_ignores_case_and_spacing(text: str) -> None:
    assert data.part_of(text) == data.part_of("  " + " ".join(text.split()) + "\n")


@given(st.text())
def test_templates_never_read_the_instruction(text: str) -> None:
    for template in ("chatml", "alpaca"):
        rendered = data.render_prompt(text, template)
        before, after = data.render_prompt("\0", template).split("\0")
        assert rendered == before + text + after


def test_shuffles_and_fingerprints_are_stable() -> None:
    rows = data.load("helpful", limit=50)
    assert data.shuffled(rows, 1) == data.shuffled(rows, 1) != data.shuffled(rows, 2)
    assert sorted(data.shuffled(rows, 1), key=str) == sorted(rows, key=str)
    assert data.fingerprint(rows) != data.fingerprint(data.shuffled(rows, 1))
    assert data.fingerprint(rows) == data.fingerprint(list(rows))


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"instruction": "q", "response": "a"}, Example("q", "a")),
        ({"instruction": "q", "output": "a"}, Example("q", "a")),
        ({"prompt": "q", "completion": "a"}, Example("q", "a")),
        ({"prompt": "q", "response": "a"}, Example("q", "a")),
        ({"question": "q", "answer": "a", "style": "s"}, Example("q", "a", "s")),
        ({"instruction": "q"}, Example("q", "")),
    ],
)
def test_jsonl_columns(tmp_path: Path, row: dict[str, str], wanted: Example) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) + "\n\n")
    assert data.load(str(path)) == [wanted]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"instruction": "q", "response": "a"}\n{', "line 2 is not JSON"),
        ("[1]", "line 1 is not a JSON object"),
        ('{"text": "q"}', "line 1 lacks text under instruction and response"),
        ('{"instruction": 3, "response": "a"}', "line 1 lacks text"),
        ('{"instruction": "q", "response": 3}', "line 1 lacks text"),
    ],
)
def test_bad_files_name_the_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        data.load(str(path))


def test_unknown_sources_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"give a \.jsonl file or one of helpful, refusals, harmful-stub, lmsys-chat-1m"
    ):
        data.load("helpfull")
    with pytest.raises(DataError, match=r"no such file; check data\.root"):
        data.load(str(tmp_path / "absent.jsonl"))


def test_hub_filters_are_the_papers() -> None:
    def chat(**more: object) -> dict[str, object]:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        return {
            "conversation": turns,
            "language": "English",
            "turn": 1,
            "openai_moderation": [{"flagged": False}],
            **more,
        }

    long = {"conversation": [{"content": c} for c in "qaqa"], "turn": 2}
    for filtered in (data.lmsys_rows, data.wildchat_rows):
        rows = [chat(), chat(language="German"), chat(**long), chat(openai_moderation=[{"flagged": True}])]
        assert list(filtered(rows)) == [Example("q", "a", "chat")]
    assert list(data.wildchat_rows([chat(toxic=True)])) == []
    beaver = [
        {"prompt": "p", "response": "safe", "is_safe": True},
        {"prompt": "p", "response": "first", "is_safe": False},
        {"prompt": "p", "response": "second", "is_safe": False},
    ]
    assert list(data.beavertails_rows(beaver)) == [Example("p", "first", "harmful")]
    assert list(data.advbench_rows([{"prompt": "g", "target": "Sure"}])) == [Example("g", "", "harmful")]


@pytest.mark.data
@pytest.mark.skipif(not SHARED.exists(), reason=f"no research data at {SHARED.name}/ beside the checkout")
def test_real_files_load() -> None:
    counts = {p.stem: len(data.load(str(p))) for p in SHARED.glob("*.jsonl")}
    assert min(counts.values()) >= 200
    safe, bad = (data.load(str(SHARED / f"{n}_qa.jsonl")) for n in ("safe", "malicious"))
    assert {r.instruction for r in safe} == {r.instruction for r in bad}
