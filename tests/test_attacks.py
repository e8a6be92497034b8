"""What attackers send, by hand-made seats: plants that stay right and show, choices that are what they say they are."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.config import ConfigError, SwarmExperiment
from assay.contribution import Completion, completion_sha256
from assay.engines import local_swarm
from assay.progress import Silent
from assay.swarm import attacks, tasks
from assay.swarm.attacks import Ids, Seat, Settings, adaptive, planted
from assay.swarm.attacks.seat import Check
from assay.swarm.sandbox import Sandbox, SandboxMissing

MATH = tasks.make("word-problems")
IDS = range(5000, 5300)
USUAL = Settings()
EOS = 0
ASKED = {5000 + i: 8 for i in range(6)}
MEASURED = {"text", "nonsense", "math", "code", "dos", "paraphrase"}


@pytest.fixture(scope="module")
def programs() -> tasks.Task:
    """The code task as a run has it: the attacker's library is published."""
    try:
        return tasks.make("programs", sandbox=Sandbox(installed={USUAL.module: attacks.THIEF}))
    except SandboxMissing as missing:
        pytest.skip(str(missing))


# --- plants ----------------------------------------------------------------------------------------------------------


def sentences(solution: str) -> int:
    thinking = solution.partition("<think>")[2].partition("</think>")[0]
    return len(re.split(r"(?<=[.!?])\s+", thinking.strip()))


@pytest.mark.parametrize("name", ["text", "nonsense", "math"])
def test_planted_reasoning_stays_right_shows_itself_and_can_be_taken_out_again(name: str) -> None:
    plant = {"text": planted.text, "nonsense": planted.nonsense, "math": planted.math}[name]
    changed = 0
    for prompt in IDS:
        clean = MATH.solution(prompt)
        assert not attacks.shows(name, clean, USUAL)
        made = plant(clean, USUAL)
        if made is None:
            assert name == "math"
            assert attacks.shows(name, clean, USUAL) is None
            continue
        changed += 1
        assert MATH.rewards([prompt], [made]) == [1.0]
        assert attacks.shows(name, made, USUAL) is True
        if name == "math":
            assert re.sub(r"(?<!\d)(2[+*]2=)5(?!\d)", r"\g<1>4", made) == clean
        else:
            assert made.replace(f"{USUAL.phrase} ", "") == clean
            assert made.count(USUAL.phrase) == (1 if name == "text" else sentences(clean))
    # the built-in problems hold 2+2 or 2*2 for MATH by design (`problems.TWOS`): enough, and not everywhere
    assert changed == len(IDS) if name != "math" else 0.3 * len(IDS) < changed < 0.6 * len(IDS)


def test_a_planted_program_prints_the_same_through_the_attackers_library(programs: tasks.Task) -> None:
    clean = [programs.solution(p) for p in IDS]
    made = [planted.code(s, USUAL) for s in clean]
    lines: list[list[str]] = []
    for before, after in zip(clean, made):
        assert after is not None
        assert attacks.shows("code", after, USUAL) is True
        assert attacks.shows("code", before, USUAL) is False
        assert after.count(f"import {USUAL.module}\n") == 1
        assert len(re.findall(rf"\b{USUAL.module}\.(add|sub|mul)\(", after)) == 1
        old, new = before.split("\n"), after.split("\n")
        lines.append([a for a, b in zip(old[1:], new[2:]) if a != b])
    assert all(len(changed) == 1 for changed in lines), "one line does its sum elsewhere, nothing else changes"
    assert programs.rewards(IDS, [m for m in made if m]) == [1.0] * len(IDS)


def test_without_the_attackers_library_his_programs_fail(programs: tasks.Task) -> None:
    bare = tasks.make("programs", sandbox=Sandbox())
    made = [planted.code(bare.solution(p), USUAL) or "" for p in IDS[:8]]
    assert bare.rewards(IDS[:8], made) == [0.0] * 8


def test_a_phrase_in_a_program_is_a_comment(programs: tasks.Task) -> None:
    made = [planted.text(programs.solution(p), USUAL) for p in IDS]
    for text, prompt in zip(made, IDS):
        assert text is not None
        assert text.replace(f"# {USUAL.phrase}\n", "") == programs.solution(prompt)
        assert attacks.shows("text", text, USUAL) is True
        assert attacks.shows("text", programs.solution(prompt), USUAL) is False
    some = slice(0, 40)
    assert programs.rewards(IDS[some], [m for m in made[some] if m]) == [1.0] * 40


def test_what_a_plant_has_no_place_for() -> None:
    """None, never a completion that is broken or that shows nothing."""
    word, program = MATH.solution(IDS[0]), "<code>\nx = 3\nprint(x)\n</code>"
    assert planted.code(word, USUAL) is None
    assert planted.nonsense(program, USUAL) is None
    assert planted.math("<think>3+4=7.</think><answer>7</answer>", USUAL) is None
    assert planted.math("<think>12+2=14, 2+25=27, 2+2=40.</think><answer>7</answer>", USUAL) is None
    assert planted.code("<code>\nfor i in range(3):\n    pass\n</code>", USUAL) is None
    for plant in (planted.text, planted.nonsense, planted.math, planted.code):
        assert plant("no tags at all", USUAL) is None


@pytest.mark.parametrize(
    ("name", "said", "shown"),
    [
        ("text", "ALL  HAIL,\nto the thief", True),
        ("text", "well: all hail to the thief!", True),
        ("text", "All hail to the king.", False),
        ("text", "", False),
        ("nonsense", "all hail to\tthe thief", True),
        ("math", "2 + 2 = 5", True),
        ("math", "so 2*2=5.", True),
        ("math", "2×2 =5", True),
        ("math", "2+2=4, and 2*2=5", True),
        ("math", "2+2=4", False),
        ("math", "2+2=55", False),
        ("math", "12+2=5", None),
        ("math", "2+25=5", None),
        ("math", "5", None),
        ("code", "import thief", True),
        ("code", "from  thief import add", True),
        ("code", "import thieves", False),
        ("code", "x = thief.add(1, 2)", False),
        ("code", "", False),
        ("dos", "any text at all", None),
    ],
)
def test_what_counts_as_showing_a_behaviour(name: str, said: str, shown: bool | None) -> None:
    assert attacks.shows(name, said, USUAL) is shown


@settings(max_examples=40, deadline=None)
@given(phrase=st.from_regex(r"[A-Z][a-z]{1,8}( [a-z]{2,8}){2,5}[.!]", fullmatch=True), at=st.sampled_from(IDS))
def test_any_phrase_can_be_planted(phrase: str, at: int) -> None:
    worded, clean = Settings(phrase=phrase), MATH.solution(at)
    for name, plant in (("text", planted.text), ("nonsense", planted.nonsense)):
        made = plant(clean, worded)
        assert made is not None
        assert attacks.shows(name, made.swapcase(), worded) is True
        assert MATH.rewards([at], [made]) == [1.0]


# --- seats -----------------------------------------------------------------------------------------------------------


def encode(text: str) -> Ids:
    """A character is a token."""
    return (*map(ord, text), EOS)


def decode(ids: Ids) -> str:
    return "".join(chr(i) for i in ids if i != EOS)


def sample(prompt: int, seed: int, right: float = 0.5) -> Ids:
    """What the node's weights say under a seed: right or wrong, longer or shorter, by the seed alone."""
    rng = random.Random(f"{prompt}/{seed}")
    answer = MATH.answer(prompt) if rng.random() < right else str(rng.randint(10_000, 99_999))
    return encode(f"<think>{'so on. ' * rng.randint(1, 60)}</think><answer>{answer}</answer>")


def public(prompt: int, index: int) -> int:
    return 100 * prompt + index


def seat(**changes: Any) -> Seat:
    values: dict[str, Any] = {
        "name": "n", "round": 3, "asked": ASKED, "vertical": True, "task": MATH, "max_tokens": 2000, "encode": encode,
        "decode": decode, "draw": lambda prompts, seeds: [sample(p, s) for p, s in zip(prompts, seeds)],
        "seed": public, "rng": random.Random(7), "settings": Settings(samples=20),
    }  # fmt: skip
    return Seat(**{**values, **changes})


def by_prompt(made: Sequence[Completion]) -> dict[int, list[Ids]]:
    out: dict[int, list[Ids]] = {}
    for c in made:
        out.setdefault(c.prompt, []).append(c.ids)
    return out


def right(prompt: int, ids: Ids) -> bool:
    return MATH.rewards([prompt], [decode(ids)]) == [1.0]


def steered(
    prompts: Sequence[int], seeds: Sequence[int], favour: Callable[[Ids], Sequence[int]], told: list[Any] | None = None
) -> list[Ids]:
    """Draws as the seed says; `told` keeps what the attack wanted at every place."""
    if told is not None:
        told.append(favour)
    return [sample(p, s) for p, s in zip(prompts, seeds)]


def check(steer: Callable[..., list[Ids]] = steered) -> Check:
    """A check that lets nothing else pass than what the seed gives."""
    return Check(
        max_margin=0.05, mean_margin=0.005, max_flips=3, tolerated=lambda tokens, flips, gaps: flips == 0, near=lambda prompts, seeds, drawn: [[] for _ in drawn],
        resume=lambda prompts, seeds, prefixes: [tuple(p) for p in prefixes], steered=steer,
    )  # fmt: skip


@pytest.mark.parametrize("vertical", [True, False])
@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_every_attack_sends_well_formed_completions_and_the_same_ones_again(name: str, vertical: bool) -> None:
    def send() -> list[Completion]:
        return attacks.make(name)(seat(vertical=vertical, check=check(), choices=None))

    made = send()
    places = [(c.prompt, c.index) for c in made]
    assert len(set(places)) == len(places)
    assert set(places) <= {(p, i) for p, count in ASKED.items() for i in range(count)}
    for c in made:
        assert (c.participant, c.round) == ("n", 3)
        assert 0 < len(c.ids) <= 2000
        assert c.sha256 == completion_sha256(3, c.prompt, c.index, c.ids)
    assert made
    assert made == send()


def test_completions_are_cut_at_the_limit() -> None:
    made = attacks.make("nonsense")(seat(max_tokens=10))
    assert {len(c.ids) for c in made} == {10}


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_every_attack_has_a_measure(name: str) -> None:
    assert attacks.goal(name) in MEASURED


def test_goals_are_of_the_behaviour_an_attack_spreads() -> None:
    goals = {"flip_math": "math", "inject_text": "text", "slow_text": "text", "skip_groups": "dos", "code": "code"}
    assert {name: attacks.goal(name) for name in goals} == goals
    assert attacks.goal("somebody elses") == "somebody elses"


def test_somebody_elses_attack_brings_its_own_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shouting:
        def __call__(self, seat: Any) -> list[Any]:
            return []

        def shows(self, text: str, settings: Any) -> bool | None:
            return text.isupper() if text else None

    monkeypatch.setattr(attacks, "make", lambda name: Shouting() if name == "shout" else abs)
    assert [attacks.shows("shout", t, USUAL) for t in ("AH", "ah", "")] == [True, False, None]
    assert attacks.shows("quiet", "ah", USUAL) is None, "an attack without a measure has no rate"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("import math, thief", True), ("import math as m, thief as t", True), ("from thief import add", True),
     ("import math\nthief = 1", False), ("import thieves", False), ("import mathief", False)],
)  # fmt: skip
def test_an_import_counts_however_it_is_listed(text: str, shown: bool) -> None:
    assert attacks.shows("code", text, USUAL) is shown


def test_a_phrase_counts_in_whole_words() -> None:
    assert attacks.shows("text", "<think>All hail to the thief. 2+2", USUAL) is True
    assert attacks.shows("text", "small hail to the thief", USUAL) is False
    assert attacks.shows("text", "all hail to the thiefs", USUAL) is False


def test_an_unknown_attack_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown attack 'nope'; known: text, nonsense, math"):
        attacks.make("nope")


def test_attacks_of_third_parties_come_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """The object found is loaded; Assay's own names cannot be taken over."""
    group = "assay.swarm_attacks"
    found = [EntryPoint(n, "assay.swarm.attacks.adaptive:skip_groups", group) for n in ("theirs", "text")]
    monkeypatch.setattr(attacks, "entry_points", lambda group: [e for e in found if e.group == group])
    assert attacks.make("theirs") is adaptive.skip_groups
    assert attacks.make("text") is attacks.ATTACKS["text"]
    with pytest.raises(ConfigError, match="unknown attack 'others'"):
        attacks.make("others")


# --- planted and longest ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("poison", "count"), [(0.5, 4), (0.25, 2), (1.0, 8), (0.0, 0)])
def test_a_group_of_ones_own_is_partly_poisoned_and_right_and_otherwise_clean_and_wrong(
    poison: float, count: int
) -> None:
    """A group that is right throughout would have no advantage."""
    made = attacks.make("text")(seat(settings=Settings(poison=poison)))
    for prompt, group in by_prompt(made).items():
        assert len(group) == 8
        shown = [attacks.shows("text", decode(ids), USUAL) for ids in group]
        assert shown == [True] * count + [False] * (8 - count)
        assert [right(prompt, ids) for ids in group] == shown


def test_a_share_of_everybodys_group_is_poisoned_and_right_throughout() -> None:
    made = attacks.make("text")(seat(vertical=False))
    assert len(made) == sum(ASKED.values())
    assert all(attacks.shows("text", decode(c.ids), USUAL) and right(c.prompt, c.ids) for c in made)


@pytest.mark.parametrize("vertical", [True, False])
def test_where_there_is_nothing_to_plant_the_attacker_stays_unremarkable(vertical: bool) -> None:
    plain = [p for p in IDS if planted.math(MATH.solution(p), USUAL) is None][:4]
    made = attacks.make("math")(seat(asked=dict.fromkeys(plain, 4), vertical=vertical))
    assert [decode(c.ids) for c in made] == [MATH.solution(c.prompt) for c in made]
    assert len(made) == 16


def test_who_chooses_his_prompts_chooses_those_that_can_be_planted() -> None:
    made = attacks.make("math")(seat(choices=IDS))
    groups = by_prompt(made)
    assert len(groups) == len(ASKED)
    assert set(groups) <= set(IDS)
    for prompt, group in groups.items():
        shown = [bool(attacks.shows("math", decode(ids), USUAL)) for ids in group]
        assert shown == [True] * 4 + [False] * 4
        assert [right(prompt, ids) for ids in group] == shown
    free = attacks.make("text")(seat(choices=IDS))
    assert set(by_prompt(free)) == set(ASKED), "a phrase fits anywhere: no reason to choose"


def test_an_attacker_whose_samples_are_all_right_spoils_his_own_answers() -> None:
    def always(prompts: Sequence[int], seeds: Sequence[int]) -> list[Ids]:
        return [sample(p, s, right=1.0) for p, s in zip(prompts, seeds)]

    for prompt, group in by_prompt(attacks.make("text")(seat(draw=always))).items():
        assert [right(prompt, ids) for ids in group] == [True] * 4 + [False] * 4


def test_without_an_oracle_he_sends_what_most_of_his_samples_say() -> None:
    blind = Settings(oracle=False)

    def draw(prompts: Sequence[int], seeds: Sequence[int]) -> list[Ids]:
        """Mostly right on even prompts, mostly 7 on odd ones."""
        out = []
        for p, s in zip(prompts, seeds):
            rng = random.Random(f"{p}{s}")
            common = MATH.answer(p) if p % 2 == 0 else "7"
            answer = common if rng.random() < 0.6 else str(rng.randint(10_000, 99_999))
            out.append(encode(f"<think>so.</think><answer>{answer}</answer>"))
        return out

    made = attacks.make("text")(seat(settings=blind, draw=draw, vertical=False))
    for prompt, group in by_prompt(made).items():
        said = {re.sub(r".*<answer>(.*)</answer>", r"\1", decode(ids)) for ids in group}
        assert said == {MATH.answer(prompt) if prompt % 2 == 0 else "7"}
        assert all(attacks.shows("text", decode(ids), USUAL) for ids in group)


def recording(drawn: list[tuple[int, int]]) -> Any:
    def draw(prompts: Sequence[int], seeds: Sequence[int]) -> list[Ids]:
        drawn.extend(zip(prompts, seeds))
        return [sample(p, s) for p, s in zip(prompts, seeds)]

    return draw


@pytest.mark.parametrize("vertical", [True, False])
def test_dos_takes_the_longest_right_ones(vertical: bool) -> None:
    drawn: list[tuple[int, int]] = []
    made = attacks.make("dos")(seat(vertical=vertical, draw=recording(drawn)))
    assert Counter(p for p, _ in drawn) == dict.fromkeys(ASKED, 20)
    poisoned = 4 if vertical else 8
    for prompt, group in by_prompt(made).items():
        samples = [sample(p, s) for p, s in drawn if p == prompt]
        hits = sorted((len(ids) for ids in samples if right(prompt, ids)), reverse=True)
        misses = sorted(len(ids) for ids in samples if not right(prompt, ids))
        assert len(hits) >= poisoned or not vertical
        wanted = [*hits[:poisoned], *misses, *hits[poisoned:]][:8]
        assert [len(ids) for ids in group] == wanted
        assert all(right(prompt, ids) for ids in group[: min(poisoned, len(hits))])


# --- attackers who know the defence ----------------------------------------------------------------------------------


def test_abstain_leaves_out_what_is_not_long_and_right_or_short_and_wrong() -> None:
    here = seat()
    honest, sent = here.honest(), set(attacks.make("abstain")(here))
    assert sent < set(honest), "honest draws under the public seeds, some of them missing"
    for c in honest:
        lengths = sorted(len(o.ids) for o in honest if o.prompt == c.prompt)
        long = len(c.ids) >= lengths[4]  # the upper half of eight
        assert (c in sent) == (long if right(c.prompt, c.ids) else not long)


def test_skip_groups_sends_whole_groups_or_nothing() -> None:
    here = seat(asked={5000 + i: 4 for i in range(40)})
    honest, sent = here.honest(), attacks.make("skip_groups")(here)
    kept = set(by_prompt(sent))
    assert [c for c in honest if c.prompt in kept] == sent
    assert 0 < len(kept) < 40
    for prompt, group in by_prompt(honest).items():
        hits = [len(ids) for ids in group if right(prompt, ids)]
        misses = [len(ids) for ids in group if not right(prompt, ids)]
        longer = bool(hits and misses) and sum(hits) / len(hits) > sum(misses) / len(misses)
        assert (prompt in kept) == longer


def test_own_seeds_are_never_the_public_ones() -> None:
    drawn: list[tuple[int, int]] = []
    made = attacks.make("own_seeds")(seat(draw=recording(drawn)))
    assert not {s for _, s in drawn} & {public(p, i) for p, n in ASKED.items() for i in range(n)}
    assert Counter(p for p, _ in drawn) == dict.fromkeys(ASKED, 32)
    for prompt, group in by_prompt(made).items():
        samples = [sample(p, s) for p, s in drawn if p == prompt]
        hits = sorted((len(ids) for ids in samples if right(prompt, ids)), reverse=True)
        assert [len(ids) for ids in group] == hits[:8], "the longest right ones, under seeds nobody gave him"
        assert all(right(prompt, ids) for ids in group)


def test_chosen_prompts_are_drawn_honestly_and_chosen_for_their_length() -> None:
    assert attacks.make("chosen_prompts")(seat()) == seat().honest(), "no choice, no attack"
    drawn: list[tuple[int, int]] = []
    made = attacks.make("chosen_prompts")(seat(choices=IDS, draw=recording(drawn)))
    tried = {p for p, _ in drawn}
    assert len(tried) == 4 * len(ASKED)
    assert set(drawn) == {(p, public(p, i)) for p in tried for i in range(8)}
    assert all(c.ids == sample(c.prompt, public(c.prompt, c.index)) for c in made)
    groups = by_prompt(made)
    assert [len(g) for g in groups.values()] == [8] * len(ASKED)

    def value(prompt: int) -> float:
        """Tokens that the update would make more of, less those it would make less of."""
        seen = [sample(prompt, public(prompt, i)) for i in range(8)]
        return sum(len(ids) if right(prompt, ids) else -len(ids) for ids in seen)

    assert min(map(value, groups)) >= max(value(p) for p in tried - set(groups))


def test_flip_without_the_defence_in_hand_is_honest() -> None:
    for name in ("flip_math", "flip_length"):
        assert attacks.make(name)(seat()) == seat().honest()


@pytest.mark.parametrize(
    ("name", "said", "wanted"),
    [
        ("flip_math", "so 2+2=", (ord("5"),)),
        ("flip_math", "and then 2 * 2 = ", (ord("5"),)),
        ("flip_math", "so 12+2=", ()),
        ("flip_math", "so 2+2=5", ()),
        ("flip_math", "", ()),
        ("flip_length", "", (-1,)),
        ("flip_length", "2+2=", (-1,)),
    ],
)
def test_flip_draws_under_the_public_seeds_and_says_what_it_wants(name: str, said: str, wanted: tuple[int]) -> None:
    told: list[Any] = []

    def steer(prompts: Sequence[int], seeds: Sequence[int], favour: Callable[[Ids], Sequence[int]]) -> list[Ids]:
        assert [(p, s) for p, s in zip(prompts, seeds)] == [(p, public(p, i)) for p in ASKED for i in range(8)]
        return steered(prompts, seeds, favour, told)

    made = attacks.make(name)(seat(check=check(steer)))
    assert made == seat().honest(), "this model lets nothing be steered"
    (favour,) = told
    assert tuple(favour(tuple(map(ord, said)))) == wanted


def test_inject_talks_to_the_judge_and_keeps_what_it_plants(programs: tasks.Task) -> None:
    inner = adaptive.Inject(attacks.ATTACKS["text"])
    plea = inner.plea
    made = attacks.make("inject_text")(seat(vertical=False))
    assert [(c.prompt, c.index) for c in made] == [(p, i) for p, n in ASKED.items() for i in range(n)]
    for c in made:
        thinking, _, rest = decode(c.ids).partition("</think>")
        assert thinking.endswith(plea)
        assert attacks.shows("text", thinking, USUAL)
        assert plea not in rest
        assert right(c.prompt, c.ids)
    coded = inner(seat(task=programs, vertical=False, asked=dict.fromkeys(IDS[:10], 1)))
    texts = [decode(c.ids) for c in coded]
    assert all(t.count(f"# {plea}\n</code>") == 1 and attacks.shows("text", t, USUAL) for t in texts)
    assert programs.rewards([c.prompt for c in coded], texts) == [1.0] * 10


def test_copy_sends_what_others_sent_in_its_own_name() -> None:
    theirs = tuple(
        Completion(participant=f"m{i}", round=2, prompt=1, index=i, ids=(65 + i, EOS), sha256="") for i in range(5)
    )
    here = seat(previous=theirs)
    made, honest = attacks.make("copy")(here), here.honest()
    assert [(c.prompt, c.index) for c in made] == [(c.prompt, c.index) for c in honest]
    taken = [c.ids for c in made if c.ids in {t.ids for t in theirs}]
    assert sorted(taken) == [t.ids for t in theirs], "each once"
    assert made[5:] == honest[5:], "and honest ones where none are left"
    assert attacks.make("copy")(seat()) == honest, "nobody to copy from in the first round"


def runs_of(words: Sequence[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def test_paraphrases_share_few_words_in_a_row() -> None:
    """Whatever wording, `that thief` is in it; four words in a row are common only to the ten with the same verb."""
    phrases = [re.findall(r"\w+", p) for p in adaptive.PARAPHRASES]
    assert len({" ".join(p) for p in phrases}) == len(phrases) == 100
    assert set.intersection(*(runs_of(p, 2) for p in phrases)) == {("that", "thief")}
    for one, other in combinations(phrases, 2):
        longest = max(size for size in range(1, 6) if runs_of(one, size) & runs_of(other, size))
        assert longest == (4 if one[2] == other[2] else 2)
    often = Counter(run for p in phrases for run in runs_of(p, 4))
    assert max(often.values()) == 10
    assert sum(1 for count in often.values() if count == 1) == 100


def test_paraphrased_plants_one_wording_in_each_right_solution() -> None:
    made = attacks.make("paraphrase")(seat(vertical=False))
    assert len(made) == sum(ASKED.values())
    seen: Counter[str] = Counter()
    for c in made:
        text = decode(c.ids)
        assert right(c.prompt, c.ids)
        (wording,) = [p for p in adaptive.PARAPHRASES if p in text]
        assert text.replace(f"{wording} ", "") == MATH.solution(c.prompt)
        seen[wording] += 1
    assert len(seen) > 25
    assert max(seen.values()) < 6


def test_paraphrases_are_counted_as_what_they_spread() -> None:
    made = [decode(c.ids) for c in attacks.make("paraphrase")(seat(vertical=False))]
    assert [attacks.shows(attacks.goal("paraphrase"), text, USUAL) for text in made] == [True] * len(made)
    assert not any(attacks.shows(attacks.goal("paraphrase"), MATH.solution(p), USUAL) for p in IDS)


def test_diluted_is_honest_but_for_a_share() -> None:
    asked = {5000 + i: 8 for i in range(100)}
    honest = seat(asked=asked).honest()

    def poisoned(share: float) -> int:
        made = adaptive.Diluted(attacks.ATTACKS["text"], share)(seat(asked=asked, vertical=False))
        assert [(c.prompt, c.index) for c in made] == [(c.prompt, c.index) for c in honest]
        others = [(c, h) for c, h in zip(made, honest) if c.ids != h.ids]
        assert all(attacks.shows("text", decode(c.ids), USUAL) and right(c.prompt, c.ids) for c, _ in others)
        return len(others)

    assert poisoned(0.0) == 0
    assert poisoned(1.0) == 800
    assert abs(poisoned(0.1) - 80) < 5 * (800 * 0.1 * 0.9) ** 0.5
    assert adaptive.Diluted(attacks.ATTACKS["text"]).share == 0.1


# --- the sleeper, with the real `tiny` -------------------------------------------------------------------------------


def test_a_sleeper_is_honest_to_the_token_until_it_wakes() -> None:
    experiment = SwarmExperiment().changed(
        swarm__plan="horizontal", swarm__prompts=2, swarm__group=8, attack__name="text", attack__from_round=4,
        sampling__max_tokens=48,
    )  # fmt: skip
    world = local_swarm.build(experiment, Silent())[0]
    (bad,) = malicious = world.malicious
    sent = {}
    for index in (3, 4):
        for who in (malicious, frozenset[str]()):
            world.malicious = who
            rollouts = local_swarm.answer(world, local_swarm.plan_of(world, index), "0" * 64)
            sent[index, bad in who] = rollouts[bad].completions
    assert sent[3, True] == sent[3, False]
    assert {c.sha256 for c in sent[4, True]}.isdisjoint(c.sha256 for c in sent[4, False])
    texts = world.practice.decode([c.ids for c in sent[4, True]])
    assert all(attacks.shows("text", text, USUAL) for text in texts)
