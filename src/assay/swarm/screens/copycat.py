"""Completions that another participant wrote: copied within the round, or replayed from an earlier one."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from assay.config import ConfigError
from assay.contribution import Pool
from assay.swarm.screens.common import fold, log_chernoff_tail, median_low, say
from assay.verdict import Reason, State, Verdict

MAX_KEPT = 20_000  # texts of earlier rounds that are remembered; the oldest rounds go first
ENOUGH_PAIRS = 200  # pairs of one's own long texts without a repeat, before one shared long text is a copy
PRIOR_PAIRS = 30.0  # weight of the round's rate of repeats in that of one prompt: its own few pairs show few repeats


@dataclass(frozen=True, slots=True)
class Copycat:
    """Of texts that several participants sent, one copy stays.

    Two texts are the same when they are but for spaces and capitals (after NFKC, however they are tokenised). Honest models
    of low entropy also meet: a participant is judged only once it met the others in more texts than chance explains
    (Chernoff's bound on the count under `level`), or for a text of `long_tokens` or more where nobody else repeats
    himself in texts so long. Chance on the same prompt is how often participants repeat *themselves* there: for two
    distributions sum p_i q_i <= sqrt(sum p_i^2 sum q_i^2). The quarter (at least one) that repeats itself most is left
    out, so that one who does it on purpose hides nobody. Chance on other prompts is how often the lower middle
    participant meets anybody. Texts under `min_tokens` tokens say nothing.

    Who stays: whoever sent the text in the earliest of the last `window` rounds; he is known to be the author, and the
    others' verdicts have `known_author` 1. Within one round the author is *not* known, and to refuse every copy would
    let anyone knock out an honest completion by sending it too. So one sender keeps his: one who is not judged, else
    the one with fewest meetings, else the one a hash of the text picks, which nobody can steer without changing it.
    What stays and what goes say the same; a verdict with `known_author` 0 must not count against its sender. Sybils who
    send one text count once.

    Limits: one changed word makes another text.
    """

    min_tokens: int = 16
    long_tokens: int = 40
    window: int = 4
    level: float = 1e-3
    name: str = "copycat"

    def __post_init__(self) -> None:
        if not 0 < self.level < 1 or self.window < 0 or not 1 <= self.min_tokens <= self.long_tokens:
            raise ConfigError("copycat: level in (0, 1), window 0 or more, 1 <= min_tokens <= long_tokens")

    def screen(self, pool: Pool, state: State) -> tuple[list[Verdict], State]:
        seen = _look(pool, state, self.min_tokens, self.long_tokens)
        tail = {p: log_chernoff_tail(len(seen.met[p]), seen.expected[p]) for p in seen.met}
        copies = self._copies(pool, seen, tail)
        out = []
        for row, completion in enumerate(pool.completions):
            sender = completion.participant
            others, known = copies.get(row, ("", False))
            when = "in an earlier round" if known else "in this round, and one copy stays"
            shared = seen.key[row] in seen.met.get(sender, ())
            out.append(
                say(
                    completion,
                    self.name,
                    Reason.COPYCAT if others else Reason.OK,
                    f"{others[:40]!r} sent the same text {when}" if others else "",
                    score=min(-tail[sender], 1e6) if shared else 0.0,
                    met=len(seen.met.get(sender, ())),
                    expected=seen.expected.get(sender, 0.0),
                    known_author=known,
                )
            )
        return out, self._remember(pool, seen, state)

    def _copies(self, pool: Pool, seen: _Seen, tail: dict[str, float]) -> dict[int, tuple[str, bool]]:
        """Rows that go: a participant whose copy stays, and whether he is known to be the author."""
        suspects = {p for p, value in tail.items() if value < math.log(self.level)}
        out = {}
        for key, rows in seen.rows.items():
            senders = {pool.completions[r].participant for r in rows}
            authors = set(seen.authors.get(key, ()))
            judged = {p for p in senders - authors if key in seen.met[p] and (p in suspects or seen.too_long(key, p))}
            keep = authors or senders - judged
            if judged and not keep:
                fewest = min(len(seen.met[p]) for p in senders)
                even = [p for p in senders if len(seen.met[p]) == fewest]
                keep = {min(even, key=lambda p: hashlib.sha256(f"{key}:{p}".encode(errors="surrogatepass")).digest())}
            for row in rows:
                sender = pool.completions[row].participant
                if sender in judged - keep:
                    out[row] = (min(keep), bool(authors))
        return out

    def _remember(self, pool: Pool, seen: _Seen, state: State) -> State:
        """The last `window` rounds: for each text who sent it and for which prompts; how many rows each prompt had."""
        sent = {
            key: [
                sorted({pool.completions[r].participant for r in rows}),
                sorted({pool.completions[r].prompt for r in rows}),
            ]
            for key, rows in sorted(seen.rows.items())
        }
        prompts = Counter(str(pool.completions[r].prompt) for rows in seen.rows.values() for r in rows)
        here = {"index": pool.index, "sent": sent, "prompts": dict(sorted(prompts.items()))}
        rounds = [r for r in state.get("rounds", []) if r["index"] < pool.index] + [here]
        rounds = rounds[-self.window :] if self.window else []
        while len(rounds) > 1 and sum(len(r["sent"]) for r in rounds) > MAX_KEPT:
            rounds = rounds[1:]
        return {"rounds": rounds}


@dataclass(slots=True)
class _Seen:
    """A round's texts by key (sha256 of what is not space), beside those of the rounds before it."""

    key: list[str]  # of each row; "" where the text is too short to speak of
    rows: dict[str, list[int]] = field(default_factory=dict)
    authors: dict[str, list[str]] = field(default_factory=dict)  # who sent it in the earliest round of the window
    met: dict[str, set[str]] = field(default_factory=dict)  # by participant: texts that another one has, too
    expected: dict[str, float] = field(default_factory=dict)  # by participant: how many that would be by chance
    foreign: set[str] = field(default_factory=set)  # texts known from an earlier round, or sent for several prompts
    long: set[str] = field(default_factory=set)
    repeats: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # by participant: repeats, pairs among own long texts

    def too_long(self, key: str, participant: str) -> bool:
        """Whether this one text is too long to be met by chance: nobody else repeats himself in such."""
        others = [v for p, v in self.repeats.items() if p != participant]
        if key not in self.long or any(repeats for repeats, _ in others):
            return False
        return key in self.foreign or sum(pairs for _, pairs in others) >= ENOUGH_PAIRS


def _look(pool: Pool, state: State, min_tokens: int, long_tokens: int) -> _Seen:
    past = [r for r in state.get("rounds", []) if r["index"] < pool.index]
    key = [_key(t, c.ids) if len(c.ids) >= min_tokens else "" for t, c in zip(pool.texts, pool.completions)]
    seen = _Seen(key)
    by_sender: dict[str, list[int]] = {c.participant: [] for c in pool.completions}
    for row, (k, completion) in enumerate(zip(key, pool.completions)):
        if k:
            seen.rows.setdefault(k, []).append(row)
            by_sender[completion.participant].append(row)
    earlier: dict[str, set[int]] = {}  # text -> prompts it was sent for before
    for held in past:
        for k in held["sent"].keys() & seen.rows.keys():
            seen.authors.setdefault(k, held["sent"][k][0])
            earlier.setdefault(k, set()).update(held["sent"][k][1])
    for k, rows in seen.rows.items():
        senders = {pool.completions[r].participant for r in rows}
        if k in seen.authors or len({pool.completions[r].prompt for r in rows}) > 1:
            seen.foreign.add(k)
        if min(len(pool.completions[r].ids) for r in rows) >= long_tokens:
            seen.long.add(k)
        for p in senders:
            authors = seen.authors.get(k, [])
            if p not in authors and (authors or len(senders) > 1):
                seen.met.setdefault(p, set()).add(k)
    for p, rows in by_sender.items():
        seen.met.setdefault(p, set())
        seen.repeats[p] = _repeats([key[r] for r in rows if key[r] in seen.long])
    _expect(pool, seen, by_sender, past, earlier)
    return seen


def _expect(
    pool: Pool, seen: _Seen, by_sender: dict[str, list[int]], past: Sequence[State], earlier: dict[str, set[int]]
) -> None:
    """Fill `seen.expected`: the sum over a participant's texts of the chance that anyone else has the same."""
    groups: dict[int, dict[str, list[str]]] = {}  # prompt -> participant -> keys
    for p, rows in by_sender.items():
        for row in rows:
            groups.setdefault(pool.completions[row].prompt, {}).setdefault(p, []).append(seen.key[row])
    own: dict[str, tuple[int, int]] = {}
    for group in groups.values():
        for p, keys in group.items():
            repeats, pairs = _repeats(keys)
            so_far = own.get(p, (0, 0))
            own[p] = so_far[0] + repeats, so_far[1] + pairs
    same: dict[str, int] = {}  # meetings on the same prompt, on other prompts
    other: dict[str, int] = {}
    texts = {p: {(seen.key[r], pool.completions[r].prompt) for r in rows} for p, rows in by_sender.items()}
    on_prompt = Counter(
        place for held in texts.values() for place in held
    )  # participants with this text for this prompt
    for p, held in texts.items():
        for k, prompt in held:
            if k in seen.met[p]:
                there = prompt in earlier.get(k, ()) or on_prompt[k, prompt] > 1
                same[p], other[p] = same.get(p, 0) + there, other.get(p, 0) + (not there)
    before = Counter({int(q): n for held in past for q, n in held["prompts"].items()})
    here = {q: sum(len(keys) for keys in group.values()) for q, group in groups.items()}
    rivals = {p: sum(here[q] - len(groups[q][p]) + before[q] for _, q in held) for p, held in texts.items()}
    # nobody sent two of a prompt: how often the ordinary participant meets another one has to do
    met_rate = median_low([(same.get(p, 0) + 0.5) / (rivals[p] + 1) for p in texts] or [0.0])
    elsewhere = median_low([(other.get(p, 0) + 0.5) / (len(held) + 1) for p, held in texts.items()] or [0.0])
    paired = sorted((p for p, (_, n) in own.items() if n), key=lambda p: (own[p][0] / own[p][1], p))
    ordinary = set(paired[: max(1, len(paired) - max(1, len(paired) // 4))])
    rate = met_rate
    if ordinary:  # its upper end: few repeats among few pairs prove little
        count, pairs = (sum(own[p][i] for p in ordinary) for i in (0, 1))
        rate = (count + 0.5 + 1.64 * math.sqrt(count + 0.5)) / (pairs + 1)
    chance = {}
    for q, group in groups.items():
        found = [_repeats(keys) for p, keys in group.items() if p in ordinary]
        chance[q] = (sum(d for d, _ in found) + PRIOR_PAIRS * rate) / (sum(n for _, n in found) + PRIOR_PAIRS)
    for p, held in texts.items():
        seen.expected[p] = math.fsum(
            min(1.0, elsewhere + chance[q] * (here[q] - len(groups[q][p]) + before[q])) for _, q in sorted(held)
        )


def _repeats(keys: Sequence[str]) -> tuple[int, int]:
    """Pairs of equal ones, and all pairs."""
    return sum(n * (n - 1) // 2 for n in Counter(keys).values()), len(keys) * (len(keys) - 1) // 2


def _key(text: str, ids: Sequence[int]) -> str:
    """Name of a text: what is not space; of one without any, its token ids."""
    said = "".join(fold(text).split()) or f"ids:{','.join(map(str, ids))}"
    return hashlib.sha256(said.encode(errors="surrogatepass")).hexdigest()[:16]
