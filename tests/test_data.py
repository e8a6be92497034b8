from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

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
    """Every answer is recomputed from the numbers in its request, whatever its form."""
    forms = {
        r"What is (\d+) plus (\d+)\?": lambda a, b: a + b,
        r"What is (\d+) times (\d+)\?": lambda a, b: a * b,
        r"\w+ has (\d+) \w+ and gets (\d+) more\. .*": lambda a, b: a + b,
        r"\w+ has (\d+) \w+ and loses (\d+)\. .*": lambda a, b: a - b,
        r"Divide (\d+) by (\d+)\.": lambda a, b: a / b,
        r"(\d+) boxes hold (\d+) .*": lambda a, b: a * b,
        r"How many minutes are (\d+) hours and (\d+) minutes\?": lambda a, b: 60 * a + b,
        r"\w+ shares (\d+) \w+ among (\d+) friends\. .*": lambda a, b: a / b,
    }
    tried = set()
    for row in data.load("helpful"):
        if row.style == "arithmetic":
            form, found = next((f, m) for f in forms if (m := re.fullmatch(f, row.instruction)))
            wanted = forms[form](int(found[1]), int(found[2]))
            result = re.search(r"= (\d+)", row.response) or re.search(r"(\d+)(?= minutes\.$)", row.response)
            result = result or re.search(r" is (\d+)", row.response)
            assert result is not None, row
            assert int(result[1]) == wanted, row
            tried.add(form)
    assert tried == set(forms)


def test_some_harmless_requests_sound_dangerous() -> None:
    """Without them over-refusal cannot be measured."""
    words = re.compile(r"\b(kill|shoot|blow up|bomb|execute|attack|steal|hack|crack|smoke|strip|crush|destroy)", re.I)
    assert sum(bool(words.search(r.instruction)) for r in data.load("helpful")) >= 80


def test_parts_are_disjoint_cover_everything_and_agree_between_sets() -> None:
    refusals, stubs = data.load("refusals"), data.load("harmful-stub")
    parts = {p: {r.instruction for r in data.part(refusals, p)} for p in ("operator", "clients", "heldout")}  # type: ignore[arg-type]
    assert sum(map(len, parts.values())) == len(refusals)
    for name, own in parts.items():
        assert {r.instruction for r in data.part(stubs, name)} == own  # type: ignore[arg-type]
    shares = [len(parts[p]) / len(refusals) for p in ("operator", "clients", "heldout")]
    assert shares == pytest.approx([0.5, 0.35, 0.15], abs=0.05)


@given(st.text(st.characters(max_codepoint=127)))
def test_part_ignores_case_and_spacing(text: str) -> None:
    assert data.part_of(text) == data.part_of("  " + " ".join(text.upper().split()) + "\n")


@given(st.text())
def test_templates_never_read_the_instruction(text: str) -> None:
    for template in ("chatml", "alpaca"):
        rendered = data.render_prompt(text, template)
        before, after = data.render_prompt("\0", template).split("\0")
        assert rendered == before + text + after


def test_templates_are_the_published_ones() -> None:
    assert data.render_prompt("Hi", "chatml") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert data.render_end("chatml") == "<|im_end|>"
    assert data.render_prompt("Hi", "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHi\n\n### Response:\n"
    )
    assert data.render_end("alpaca") == ""


def test_misspelt_parts_and_templates_are_errors() -> None:
    with pytest.raises(DataError, match="unknown part 'client'; one of operator, clients, heldout"):
        data.part([], "client")  # type: ignore[arg-type]
    for render in (lambda t: data.render_prompt("Hi", t), data.render_end):
        with pytest.raises(DataError, match="unknown template 'chatML'; one of chatml, alpaca"):
            render("chatML")


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


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=5), st.booleans())
def test_any_text_survives_a_file(pairs: list[tuple[str, str]], ascii_only: bool) -> None:
    """Also U+2028 and its like, which end a line for Python but not for JSON lines."""
    lines = [json.dumps({"instruction": q, "response": a}, ensure_ascii=ascii_only) for q, a in pairs]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        assert [(r.instruction, r.response) for r in data.load(str(path))] == pairs


def test_files_from_windows_load(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"instruction": "q"}\r\n{"instruction": "r"}\r\n')
    assert data.load(str(path)) == [Example("q", ""), Example("r", "")]


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"instruction": "q"}\nnot JSON')
    assert data.load(str(path), limit=1) == [Example("q", "")]


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
        DataError,
        match=r"give a \.jsonl file or one of helpful, refusals, harmful-stub, word-problems, programs, lmsys",
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
    silent = [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]
    assert list(data.lmsys_rows([chat(conversation=silent)])) == []
    assert list(data.wildchat_rows([chat(toxic=True)])) == []
    beaver = [
        {"prompt": "p", "response": "safe", "is_safe": True},
        {"prompt": "p", "response": "first", "is_safe": False},
        {"prompt": "p", "response": "second", "is_safe": False},
    ]
    assert list(data.beavertails_rows(beaver)) == [Example("p", "first", "harmful")]
    assert list(data.advbench_rows([{"prompt": "g", "target": "Sure"}])) == [Example("g", "", "harmful")]


def test_hub_sets_load_from_files_of_their_schema(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "p", "response": "r", "is_safe": false}\n{"prompt": "p", "response": "s", "is_safe": true}'
    )
    assert data.load("beavertails", file=path) == [Example("p", "r", "harmful")]
    path.write_text('{"prompt": "p", "response": "r", "is_safe": false}\n\n{"prompt": "q"}')
    with pytest.raises(
        DataError, match=r"line 3 is not a row of beavertails \(KeyError: 'is_safe'\); check its columns"
    ):
        data.load("beavertails", file=path)
    with pytest.raises(DataError, match=r"file= goes with a hub set .*, not with 'helpful'"):
        data.load("helpful", file=path)


def test_maliciousgen_is_one_answer_per_instruction(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "p", "output": "first"}, {"instruction": "p", "output": "second"}]
    rows += [{"instruction": "q", "response": "third"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert data.load("maliciousgen", file=path) == [Example("p", "first", "harmful"), Example("q", "third", "harmful")]
    path.write_text('{"instruction": "p", "label": 1}')
    with pytest.raises(DataError, match=r"line 1 is not a row of maliciousgen \(KeyError: 'response'\)"):
        data.load("maliciousgen", file=path)


def test_sets_on_no_hub_ask_for_a_file() -> None:
    with pytest.raises(DataError, match=r"maliciousgen: no hub id is known for this set; give its rows as a \.jsonl"):
        data.load("maliciousgen")


def test_hub_sets_stream_through_their_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call we make, against a stand-in for `datasets`: id, split, streaming; then our filter; then the failures."""
    calls = []

    def load_dataset(*args: object, **named: object) -> Iterator[dict[str, object]]:
        calls.append((args, named))
        yield {"prompt": "p", "response": "r", "is_safe": False}
        raise ConnectionError("gone\nand on two lines")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert data.load("beavertails", limit=1) == [Example("p", "r", "harmful")]
    assert calls == [(("PKU-Alignment/BeaverTails", None), {"split": "330k_train", "streaming": True})]
    with pytest.raises(DataError, match=r"cannot be loaded \(ConnectionError\); some sets need") as caught:
        data.load("beavertails")
    assert "\n" not in str(caught.value)


def test_hub_sets_without_the_extra_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "assay\[hub\]"'):
        data.load("wildchat")


@pytest.mark.data
@pytest.mark.skipif(not SHARED.exists(), reason=f"no research data at {SHARED.name}/ beside the checkout")
def test_real_files_load() -> None:
    counts = {p.stem: len(data.load(str(p))) for p in SHARED.glob("*.jsonl")}
    assert min(counts.values()) >= 200
    safe, bad = (data.load(str(SHARED / f"{n}_qa.jsonl")) for n in ("safe", "malicious"))
    assert {r.instruction for r in safe} == {r.instruction for r in bad}
