"""The tokens that the page marks are those a screen of texts spoke of; on real rounds of `tiny`, and on hostile texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.swarm import evaluate
from assay.swarm.learner import Memory
from assay.swarm.marks import spans, tokens_in
from test_swarm import gathered_of, small, world_of


def marked_by(attack: str, screen: str, **changes: Any) -> tuple[dict[str, Any], str]:
    """What is shown of a round under one screen of texts, and the text of its marked tokens."""
    torch.set_num_threads(1)
    world = world_of(small(**{"attack__name": attack, "defence__screens": ["schema", screen], **changes}))
    (learner,) = world.learners.values()
    _, learnt = learner.learn(gathered_of(world), Memory())
    shown = evaluate.shown(learnt, world.malicious, attack, world.settings, world.practice.decode)
    assert shown is not None
    return shown, "".join(shown["tokens"][at] for at in shown["marked"])


def test_wrong_sums_are_marked() -> None:
    shown, text = marked_by("math", "arithmetic", swarm__assigned=False)
    assert shown["screen"] == "arithmetic"
    assert "=5" in text
    assert len(shown["marked"]) < len(shown["tokens"]) / 2


def test_planted_phrases_are_marked() -> None:
    shown, text = marked_by("text", "enrichment", swarm__plan="horizontal", swarm__prompts=8, swarm__group=12)
    assert shown["screen"] == "enrichment"
    assert "hail to the thief" in text
    assert len(shown["marked"]) < len(shown["tokens"]) / 2


def test_what_no_screen_of_texts_decided_has_no_marks() -> None:
    shown, _ = marked_by("math", "seeded", swarm__assigned=False)
    assert shown["marked"] == []
    assert shown["gaps"]


def test_forbidden_imports_are_marked_wherever_they_are_named() -> None:
    text = "<code>\nimport thief\nx = thief.add(2, thiefs)\nprint(x)\n</code>"
    assert [text[a:b] for a, b in spans("imports", text, {})] == ["thief", "thief"]
    assert spans("imports", "<code>\nimport math\nprint(1)\n</code>", {}) == []


@pytest.mark.parametrize("screen", ["arithmetic", "imports", "enrichment", "length", ""])
@given(text=st.text(max_size=200))
def test_hostile_texts_have_marks_within_them_or_none(screen: str, text: str) -> None:
    found = spans(screen, text, {"listed": {"text:4:00000000000000ff": {"gram": "a"}}})
    assert all(0 <= start <= end <= len(text) for start, end in found)
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    assert all(0 <= at < len(pieces) for at in tokens_in(pieces, text, found))


def test_tokens_that_do_not_make_up_the_text_are_not_marked() -> None:
    assert tokens_in(["�", "�5"], "é5", [(0, 2)]) == []
